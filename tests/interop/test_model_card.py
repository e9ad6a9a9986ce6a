"""What a card publishes: names as they are, and nothing of the machine that it was written on."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

from stablefield.cli.entry import main
from stablefield.evaluation._protocol import Protocol, Score
from stablefield.interop._model_card import ModelCard, public_name, results_of_run
from stablefield.training._recipe import Recipe

HOSTILE = [
    "[free](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "<img src=x onerror=alert(1)>",
    "<!-- ",
    "a | b | c",
    "**bold** _it_ ~~no~~ `code`",
    "a\\|b\\\\",
    "# h\n\n---\nlicense: mit\n---\n",
    "$x^2$ and $$y$$",
    "[^1]: note",
    "&lt;b&gt; &amp;",
    "trailing #",
    "* 1. - + = >",
    "x\x1b]0;title\x07\x1b[31m\u202e",
    "https://evil.example www.evil.example me@evil.example",
]


def protocol(**changes) -> Protocol:
    fields = {
        "metric": "FID", "extractor": "pixels", "extractor_sha256": "0" * 64, "resize": "none", "sample_count": 5,
        "reference": "digits", "reference_sha256": "1" * 64, "reference_count": 7, "split": "train",
    }  # fmt: skip
    return Protocol(**{**fields, **changes})


def card(name: str = "m", data: str = "digits", **changes) -> str:
    results = (Score(values=(1.0,), protocol=protocol(**changes)),)
    sizes = {"shape": (1, 8, 8), "classes": 0, "parameters": 3}
    return ModelCard(
        name=name, data=data, recipe=Recipe(), step=9, ema="none", version="1", results=results, **sizes
    ).text()  # fmt: skip


def shown(text: str) -> tuple[list[str], set[str]]:
    """The texts that a renderer shows of a card, and the kinds of what is in them."""
    body = text.split("---\n", 2)[2]
    texts, kinds = [], set()
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body):
        kinds.add(token.type)
        for child in token.children or ():
            kinds.add(child.type)
        if token.type == "inline":
            texts.append("".join(child.content for child in token.children))
    return texts, kinds


def one_line(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(name.split()))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is_and_nothing_of_it_is_markup(name: str) -> None:
    plain, kinds = shown(card())
    texts, found = shown(card(name, metric=name, split=name, sampler=name, ema=name))
    assert found <= kinds | {"text_special"}
    assert len(texts) == len(plain)
    assert texts[0] == one_line(name)
    cells = [text for text in texts if one_line(name) in text]
    assert len(cells) == 4  # the heading, the metric, against and the sampler
    # Outside of commonmark: formulas, mentions and bare links, which GitHub and the hub make of unescaped marks.
    written = card(name).split("---\n", 2)[2].splitlines()[1]
    assert not re.search(r"(?<!\\)[$@]|(?<!\\):|www(?<!\\)\.e", written)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_card_of_a_conditional_run_lists_its_classes_by_number_and_name(name: str) -> None:
    def conditional(*names: str) -> str:
        told = ModelCard(
            name="m", data="digits", shape=(1, 8, 8), classes=len(names), parameters=3, recipe=Recipe(), step=9, ema="none",
            version="1", class_names=names,
        )  # fmt: skip
        return told.text()

    plain, kinds = shown(conditional("ant", "bee"))
    place = plain.index("number")
    assert plain[place - 2 : place + 6] == [
        "Classes", "Pass a class by its name or its number, 0 to 1, or -1 for none.", "number", "name",
        "0", "ant", "1", "bee",
    ]  # fmt: skip
    texts, found = shown(conditional("ant", name))
    assert found <= kinds | {"text_special"}
    assert texts == [one_line(name) if text == "bee" else text for text in plain]


def test_the_card_says_where_classes_have_no_names_and_nothing_where_there_are_none() -> None:
    sizes = {"shape": (1, 8, 8), "parameters": 3}
    told = {
        "name": "m",
        "data": "x",
        "recipe": Recipe(),
        "step": 9,
        "ema": "none",
        "version": "1",
        "label_dropout": 0.1,
    }
    assert (
        "0 to 6, or -1 for none. The names of the classes are unknown." in ModelCard(classes=7, **sizes, **told).text()
    )
    named = ModelCard(classes=2, class_names=("`odd`", "red cats"), **sizes, **told).text()
    call = 'pipe(batch_size=16, num_inference_steps=18, class_labels="red cats", guidance_scale=2.0).images'
    assert call in named
    without = ModelCard(classes=2, class_names=("`odd`", "$"), **sizes, **(told | {"label_dropout": 0.0})).text()
    assert "Pass a class by its name or its number, 0 to 1.\n" in without
    assert "Without it the images take the classes in turn." in without
    assert "pipe(batch_size=16, num_inference_steps=18, class_labels=0).images" in without
    assert "guidance" not in without.split("## Use")[1]
    assert "Classes" not in ModelCard(classes=0, **sizes, **told).text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", "digits"),
        ("hf:ada/faces", "hf:ada/faces"),
        ("imported from net.pkl", "imported from net.pkl"),
        ("data/faces.zip", "faces.zip"),
        ("/srv/ada/faces/", "faces"),
        ("~/faces", "faces"),
        ("../faces", "faces"),
        ("C:" + r"\Users\ada\faces", "faces"),
        ("/" + "home/ada", ""),
        ("/" + "home/ada/", ""),
        ("C:" + r"\Users\ada", ""),
        ("~ada", "~ada"),
        ("~ada/", ""),
        ("/", ""),
        ("..", ""),
        ("D:/", ""),
    ],
)
def test_data_are_called_by_their_name_without_their_place(name: str, expected: str) -> None:
    assert public_name(name) == expected


def test_place_and_owner_of_data_are_not_on_the_card() -> None:
    for place in ("/srv/ada-lovelace/faces", "/" + "home/ada-lovelace", "C:" + r"\Users\ada-lovelace\x"):
        assert "lovelace" not in card(data=place, reference=place, extractor=place)
    assert "private data" in card(data="/" + "home/ada")


def leaves(value: object, place: tuple = ()) -> list[tuple]:
    """The places of everything in a record."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in inner for found in leaves(item, (*place, key)))]


def changed(value: object, place: tuple, other: object) -> object:
    if not place:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(copy[place[0]], place[1:], other)
    return copy


ODD = [
    None,
    True,
    "",
    "x\x1b[31m",
    "1",
    [],
    {},
    [[]],
    -1,
    0,
    1.5,
    10**400,
    -(10**400),
    2**63,
    float("nan"),
    float("inf"),
]


def test_results_of_wrong_types_are_told_of_by_their_file_or_shown(tmp_path: Path) -> None:
    path = tmp_path / "evaluations" / "pixels.json"
    path.parent.mkdir()
    made = Score(
        values=(1.0, 2.0), protocol=protocol(seeds=("0-1", "2-3"), settings={"k": 3}, steps=3, nfe=5.0, ema="x")
    )
    record = {"format": 1, "subject": "x", "results": [made.to_dict()]}
    refused: list[str] = []
    for place in leaves(record):
        for odd in ODD:
            path.write_text(json.dumps(changed(record, place, odd)))
            try:
                results = results_of_run(tmp_path)
            except ValueError as error:
                refused.append(str(error))
                continue
            sizes = {"shape": (1, 8, 8), "classes": 0, "parameters": 3}
            text = ModelCard(
                name="m", data="d", recipe=Recipe(), step=9, ema="none", version="1", results=results, **sizes
            ).text()  # fmt: skip
            assert "\x1b" not in text
    assert len(refused) > 100
    assert all(str(path) in told for told in refused)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format": 1e400}', "{", "", "\udcff"])
def test_results_that_are_no_json_are_told_of_by_their_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "pixels.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"pixels\.json holds no results"):
        results_of_run(tmp_path)


def test_fifo_among_the_results_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    os.mkfifo(tmp_path / "evaluations" / "pixels.json")
    with pytest.raises(ValueError, match=r"pixels\.json holds no results \(it is a FIFO"):
        results_of_run(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of data in a folder whose path names its owner."""
    from PIL import Image

    home = tmp_path_factory.mktemp("owner") / "ada-lovelace"
    data, path = home / "<b>faces", home / "runs" / "first"
    data.mkdir(parents=True)
    pixels = torch.randint(256, (8, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(data / f"{number}.png")
    flags = ["--recipe", "digits", "--steps", "1", "--batch", "4", "--network.width", "8", "--network.depth", "1"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(data), *flags, "--sample-every", "0", "--out", str(path)])
    return path


@pytest.mark.parametrize("kind", ["plain", "diffusers"])
def test_no_file_of_an_export_says_where_the_data_lie_or_whose_they_are(run: Path, kind: str, tmp_path: Path) -> None:
    if kind == "diffusers":
        pytest.importorskip("diffusers")
    assert "ada-lovelace" in (run / "config.json").read_text()
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(run), "--out", str(tmp_path / "out"), "--format", kind, "--samples", "2", "--steps", "2"])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 2
    for path in files:
        content = path.read_bytes()
        assert b"lovelace" not in content
        assert str(run.parents[2]).encode() not in content
    assert r"trained on \<b\>faces" in (tmp_path / "out" / "README.md").read_text()


def test_where_a_model_of_diffusers_was_loaded_from_is_not_exported(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers import UNet2DModel

    import stablefield as sf
    from stablefield.interop._pipeline_folder import write_pipeline
    from stablefield.networks._diffusers_unet import DiffusersUNet

    home = tmp_path / "ada-lovelace"
    DiffusersUNet.sized(8, 1, (8, 8), 1, groups=4).unet.save_pretrained(home)
    loaded = UNet2DModel.from_pretrained(str(home))
    assert "ada-lovelace" in loaded.config["_name_or_path"]
    write_pipeline(tmp_path / "out", sf.Denoiser(DiffusersUNet(loaded)), (1, 8, 8))
    assert all(b"lovelace" not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["sample_size"] is not None
    again = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), loaded.parameters(), strict=True))
