"""Claims on runs that begin with the weights of another: what is copied, class by class, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stablefield as sf
from stablefield.cli.entry import main
from stablefield.data._image_set import ImageSet, Origin, make_image_set
from stablefield.training._initial_weights import InitialWeights
from stablefield.training._recipe import DiffusersUNetConfig, MLPConfig, Recipe, SiTConfig, SongUNetConfig
from stablefield.training._weight_source import _UNET2D

TINY = Recipe(
    steps=3,
    batch=8,
    ramp_images=0,
    ema_snapshot_every=2,
    importance_sampling=True,
    checkpoint_every=100,
    sample_every=0,
    noise_band=0.0,
    network=MLPConfig(width=16, depth=1),
)
SONG = SongUNetConfig(base_channels=8, multipliers=(1, 2), blocks=1, dropout=0.0)
NETWORKS = {
    "perceptron": MLPConfig(width=16, depth=1),
    "song": SONG,
    "diffusers": DiffusersUNetConfig(widths=(8, 8), blocks=1, groups=4),
    "sit": SiTConfig(width=16, depth=1, heads=2),
}


def images(side: int = 8, names: tuple[str, ...] | None = None, channels: int = 1, count: int = 24) -> ImageSet:
    """Random images, of classes in turn."""
    pixels = np.random.default_rng(side).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    labels = None if names is None else np.arange(count) % len(names)
    return make_image_set(pixels, labels, Origin(name="random", source="random", class_names=names))


def train(path: Path, data: ImageSet, network: object = None, **options: object) -> sf.Run:
    recipe = dataclasses.replace(TINY, network=network or TINY.network, conditional=data.labels is not None)
    return sf.train(data, out=path, device="cpu", **{"recipe": recipe, **options})


def averages(run: sf.Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder.checkpoint(run.step) / "ema.safetensors")


def begin(path: Path, data: ImageSet, init: object, **options: object) -> dict[str, torch.Tensor]:
    """The weights with which a run begins, from its first checkpoint."""
    run = sf.train(data, init=init, out=path, device="cpu", stop=lambda: True, **options)
    first = run.folder.checkpoint(0)
    weights = load_file(first / "model.safetensors")
    for name in ("ema", "power-0.05", "power-0.1"):
        there = load_file(first / f"{name}.safetensors") if (first / f"{name}.safetensors").exists() else weights
        assert all(torch.equal(value, there[key]) for key, value in weights.items())
    return weights


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> sf.Run:
    return train(tmp_path_factory.mktemp("source") / "run", images())


def test_a_run_begins_with_the_averaged_weights_of_another_and_its_recipe(source: sf.Run, tmp_path: Path) -> None:
    other = images(8, count=6)
    weights = begin(tmp_path / "a", other, source)
    theirs = averages(source)
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in weights.items())
    raw = load_file(source.folder.checkpoint(3) / "model.safetensors")
    assert not torch.equal(raw["network.leave.weight"], theirs["network.leave.weight"])
    config = sf.Run(tmp_path / "a").config
    # The data are fewer than a batch.
    assert config.recipe == dataclasses.replace(source.config.recipe, batch=6, noise_band=config.recipe.noise_band)
    found = config.initial
    assert found is not None
    assert (found.source, found.copied, found.tensors) == (str(source.path), len(theirs), len(theirs))
    assert (
        found.sha256
        == json.loads((source.folder.checkpoint(3) / "state.json").read_text())["sha256"]["ema.safetensors"]
    )
    assert (found.fresh, found.unused, found.classes, found.notes) == ((), (), (), ())
    assert "step 3, average" in " ".join(str(found).split())  # lines break by the length of the path
    assert max(map(len, str(found).splitlines())) <= 80


def test_a_resume_needs_the_source_no_more_and_ends_in_the_same_bytes(source: sf.Run, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source.path, copy)
    data = images(8, count=30)
    whole = sf.train(data, init=copy, out=tmp_path / "whole", steps=5, device="cpu")
    cut = sf.train(data, init=copy, out=tmp_path / "cut", steps=5, device="cpu", stop=lambda: True)
    assert cut.step == 1
    shutil.rmtree(copy)
    shutil.rmtree(cut.folder.checkpoint(1))  # back to the copied weights themselves
    assert cut.resume(data=data, device="cpu").step == 5
    files = sorted(path.name for path in whole.folder.checkpoint(5).glob("*.safetensors"))
    assert len(files) == 6
    for name in files:
        assert (cut.folder.checkpoint(5) / name).read_bytes() == (whole.folder.checkpoint(5) / name).read_bytes()
    # Without any checkpoint, it does not begin with other weights instead.
    shutil.rmtree(cut.path / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint, not even one of the weights of"):
        cut.resume(data=data, device="cpu")


@pytest.mark.parametrize("kind", NETWORKS)
def test_classes_of_both_keep_their_outputs_and_new_ones_begin_as_in_a_new_network(kind: str, tmp_path: Path) -> None:
    if kind == "diffusers":
        pytest.importorskip("diffusers")
    old, new = ("ant", "bee", "cat", "dog"), ("dog", "fox", "bee")
    run = train(tmp_path / "old", images(8, old), NETWORKS[kind])
    recipe = dataclasses.replace(run.config.recipe, references="auto", noise_band="auto")
    plan = sf.training.make_plan(images(8, new), recipe, init=run, device="cpu")
    fresh = sf.training.make_plan(images(8, new), recipe, device="cpu").config
    assert fresh.initial is None
    before, after = run.model().denoiser, plan.initial
    assert after is not None
    found = plan.config.initial
    assert found is not None
    assert (found.classes, found.new_classes, found.dropped_classes) == (("dog", "bee"), ("fox",), ("ant", "cat"))
    assert (found.fresh, found.unused, found.copied) == ((), (), found.tensors)
    x, sigma = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 1.0, 4.0])
    with torch.no_grad():
        for name in ("dog", "bee", None):
            one, two = (
                network.eval()(x, sigma, torch.full((4,), -1 if name is None else names.index(name)))
                for network, names in ((before, old), (after, new))
            )
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        # The class matters to the outputs.
        odd = before(x, sigma, torch.full((4,), old.index("ant")))
        assert not torch.allclose(odd, before(x, sigma, torch.full((4,), old.index("dog"))), rtol=1e-5, atol=1e-6)
    # The embedding itself, by hand: parts of classes of both, and of the class that only the new network has.
    from stablefield.training._model import build_denoiser

    name, axis = {
        "perceptron": ("embed_class.weight", 1),
        "diffusers": ("unet.class_embedding.weight", 0),
        "sit": ("y_embedder.embedding_table.weight", 0),
    }.get(kind, ("map_label.weight", 1))
    embedding, theirs, random = (
        network.network.state_dict()[name] for network in (after, before, build_denoiser(plan.config))
    )
    factor = (4 / 3) ** 0.5 if name == "map_label.weight" else 1
    expected = [theirs.select(axis, 3) * factor, random.select(axis, 1), theirs.select(axis, 1) * factor]
    expected += [theirs.select(axis, 4)] if kind in ("diffusers", "sit") else []
    torch.testing.assert_close(embedding, torch.stack(expected, axis), rtol=1e-6, atol=0)
    assert bool(found.notes) == (factor != 1)


def test_classes_without_names_are_matched_by_number(tmp_path: Path) -> None:
    named = train(tmp_path / "old", images(8, ("ant", "bee")))
    labels = np.arange(24) % 3
    plan = sf.training.make_plan(
        make_image_set(images().images, labels, Origin(name="random", source="random")),
        dataclasses.replace(TINY, conditional=True), init=named.path, device="cpu",
    )  # fmt: skip
    found = plan.config.initial
    assert found is not None
    assert (found.classes, found.new_classes, found.dropped_classes) == (("0", "1"), ("2",), ())
    assert "by number" in found.notes[0]
    # With classes on one side only, the rest is copied.
    without = sf.training.make_plan(images(), TINY, init=named, device="cpu").config.initial
    assert without is not None
    assert (without.unused, without.dropped_classes) == (("network.embed_class.weight",), ("ant", "bee"))
    plain = train(tmp_path / "plain", images())
    added = sf.training.make_plan(
        images(8, ("ant", "bee")), dataclasses.replace(TINY, conditional=True), init=plain, device="cpu"
    ).config.initial
    assert added is not None
    assert (added.fresh, added.new_classes) == (("embed_class.weight",), ("ant", "bee"))
    assert added.copied == added.tensors - 1


class Patches(torch.nn.Module):
    """A network in the manner of a transformer: places as a constant of the size, and a table with a row for no class."""

    def __init__(self, side: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(1, 4, 2, 2)
        self.table = torch.nn.Embedding(classes + 1, 4)
        self.register_buffer("places", torch.arange(4.0 * (side // 2) ** 2).reshape(-1, 4))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=generator)


@dataclasses.dataclass(frozen=True)
class PatchesConfig:
    """Its settings."""

    def build(self, shape: tuple[int, int, int], classes: int, _: int, generator: torch.Generator) -> torch.nn.Module:
        """The network."""
        return Patches(shape[1], classes, generator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchesRecipe(Recipe):
    """A recipe that takes it."""

    network: PatchesConfig = PatchesConfig()  # pyrefly: ignore[bad-override]


def test_classes_of_one_name_in_an_older_run_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    # New data cannot have them, but published networks do: ImageNet's "crane" is a bird and a machine.
    data = images(names=("crane (0)", "dog", "crane (2)"))
    run = train(tmp_path / "old", data)
    path = run.path / "config.json"
    record = json.loads(path.read_text())
    record["manifest"]["class_names"] = ["crane", "dog", "crane"]
    del record["checksum"]
    path.write_text(json.dumps(record))
    assert run.config.class_names == ("crane (0)", "dog", "crane (2)")
    with pytest.raises(ValueError, match=r"class_label=crane: .*0 \(crane \(0\)\), 1 \(dog\), 2 .* Did you mean crane"):
        run.sample(1, class_label="crane", steps=2, device="cpu")
    drawn = [run.sample(1, class_label=label, steps=2, device="cpu").images for label in (0, "crane (2)", 2)]
    assert np.array_equal(drawn[1], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])
    weights = begin(tmp_path / "new", data, run)
    assert all(torch.equal(value, weights[name]) for name, value in averages(run).items())


def test_constants_of_the_size_and_rows_for_no_class_go_their_own_way(tmp_path: Path) -> None:
    theirs = Patches(8, 3, torch.Generator().manual_seed(1)).state_dict()
    torch.save(theirs, tmp_path / "theirs.pt")
    recipe = PatchesRecipe(**(vars(TINY) | {"network": PatchesConfig()}))
    for side, names, rows in (
        (8, None, [3]),
        (8, ("ant", "bee"), [0, 1, 3]),
        (16, ("a", "b", "c", "d"), [0, 1, 2, None, 3]),
    ):
        own = dataclasses.replace(recipe, conditional=names is not None)
        plan = sf.training.make_plan(images(side, names), own, init=tmp_path / "theirs.pt", device="cpu")
        fresh = Patches(side, len(names or ()), torch.Generator()).state_dict()
        assert plan.initial is not None
        assert plan.config.initial is not None
        found = plan.initial.network.state_dict()
        for row, value in zip(rows, found["table.weight"], strict=True):
            assert row is None or torch.equal(value, theirs["table.weight"][row])
        assert torch.equal(found["embed.weight"], theirs["embed.weight"])
        assert torch.equal(found["places"], fresh["places"])
        assert plan.config.initial.fresh == (() if side == 8 else ("places",))
        assert plan.config.initial.classes == tuple(str(row) for row in rows if row not in (None, 3))


def test_other_classes_alone_leave_the_embedding_new(tmp_path: Path) -> None:
    run = train(tmp_path / "old", images(8, ("ant", "bee")))
    recipe = dataclasses.replace(TINY, conditional=True)
    found = sf.training.make_plan(images(8, ("cow", "dog")), recipe, init=run, device="cpu").config.initial
    assert found is not None
    assert (found.fresh, found.classes, found.new_classes) == (("embed_class.weight",), (), ("cow", "dog"))
    assert found.dropped_classes == ("ant", "bee")


@pytest.mark.parametrize("kind", ["song", "diffusers"])
def test_another_side_takes_all_tensors_of_its_levels(kind: str, tmp_path: Path) -> None:
    if kind == "diffusers":
        pytest.importorskip("diffusers")
    run = train(tmp_path / "small", images(8, channels=3), NETWORKS[kind])
    weights = begin(tmp_path / "large", images(16, channels=3), run)
    theirs = averages(run)
    renamed = {name.replace("8x8_", "16x16_").replace("4x4_", "8x8_"): value for name, value in theirs.items()}
    assert weights.keys() == renamed.keys()
    assert all(torch.equal(value, renamed[name]) for name, value in weights.items())
    found = sf.Run(tmp_path / "large").config.initial
    assert found is not None
    assert (found.fresh, found.unused) == ((), ())
    assert sf.Run(tmp_path / "large").config.shape == (3, 16, 16)


def test_what_does_not_fit_names_the_tensor_both_shapes_and_the_remedy(source: sf.Run, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"network\.enter\.weight of shape \(16, 64\), and this network enter\.weight of shape \(16, 256\): "
        r"train on images of its size, resolution=8\.$",
    ):
        sf.train(images(16), init=source, out=tmp_path / "no", device="cpu")
    with pytest.raises(ValueError, match=r"\(16, 64\).*\(16, 192\): train on images of 1 channels"):
        sf.train(images(8, channels=3), init=source, out=tmp_path / "no", device="cpu")
    wider = dataclasses.replace(TINY, network=MLPConfig(width=32, depth=1))
    with pytest.raises(
        ValueError, match=r"leave the settings of the network out, for those of the source, MLPConfig\(w"
    ):
        sf.train(images(), init=source, recipe=wider, out=tmp_path / "no", device="cpu")
    with pytest.raises(ValueError, match=r"has no tensor of this network: it has network.* To continue, leave"):
        sf.train(
            images(), init=source, recipe=dataclasses.replace(TINY, network=SONG), out=tmp_path / "no", device="cpu"
        )
    assert not (tmp_path / "no").exists()
    # What the network has more of begins as in a new one.
    deeper = dataclasses.replace(TINY, network=MLPConfig(width=16, depth=2))
    found = sf.training.make_plan(images(), deeper, init=source, device="cpu").config.initial
    assert found is not None
    assert {name.rpartition(".")[0] for name in found.fresh} == {
        "blocks.1.norm", "blocks.1.first", "blocks.1.embed", "blocks.1.second"
    }  # fmt: skip
    other = dataclasses.replace(TINY, preconditioning=sf.VEPreconditioning())
    found = sf.training.make_plan(images(), other, init=source, device="cpu").config.initial
    assert found is not None
    assert "trained in EDMPreconditioning" in found.notes[0]


def test_files_and_exports_are_sources_too_with_the_names_of_their_classes(tmp_path: Path) -> None:
    data, recipe = images(8, ("ant", "bee")), dataclasses.replace(TINY, conditional=True)
    source = train(tmp_path / "run", data)
    theirs = {name.removeprefix("network."): value for name, value in averages(source).items()}
    torch.save({f"module.model.{name}": value for name, value in theirs.items()}, tmp_path / "wrapped.pt")
    torch.save({"state_dict": theirs, "epoch": 3}, tmp_path / "nested.pth")
    both = {f"model.{name}": torch.zeros_like(value) for name, value in theirs.items()}
    torch.save(both | {f"ema.{name}": value for name, value in theirs.items()}, tmp_path / "both.pt")
    source.export(tmp_path / "plain", format="plain", samples=0)
    source.export(tmp_path / "pipeline", samples=0)
    sources = [tmp_path / name for name in ("wrapped.pt", "nested.pth", "both.pt", "plain", "pipeline")]
    for k, one in enumerate(sources):
        weights = begin(tmp_path / str(k), data, one, recipe=recipe)
        assert all(torch.equal(weights[f"network.{name}"], value) for name, value in theirs.items()), one
    for one in sources[3:]:
        found = sf.training.make_plan(images(8, ("bee", "cow")), recipe, init=one, device="cpu").config.initial
        assert found is not None
        assert (found.classes, found.new_classes) == (("bee",), ("cow",))
    # A file of a checkpoint: the weights of the last step.
    raw = source.folder.checkpoint(3) / "model.safetensors"
    weights = begin(tmp_path / "raw", data, str(raw), recipe=recipe)
    assert all(torch.equal(weights[name], value) for name, value in load_file(raw).items())


@pytest.mark.parametrize("format_", ["run", "plain", "diffusers"])
def test_a_source_says_in_which_preconditioning_it_was_trained(format_: str, tmp_path: Path) -> None:
    for k, kind in enumerate((sf.VPPreconditioning(0.2, 15.0), sf.EDMPreconditioning(0.4))):
        run = train(tmp_path / f"run{k}", images(), recipe=dataclasses.replace(TINY, preconditioning=kind))
        out = tmp_path / f"export{k}"
        init = run if format_ == "run" else run.export(out, format=format_, samples=0)
        found = sf.training.make_plan(images(), TINY, init=init, device="cpu").config.initial
        assert found is not None
        assert found.notes == (f"the source was trained in {kind}, this run trains in {TINY.preconditioning}.",)
        same = dataclasses.replace(TINY, preconditioning=kind)
        assert sf.training.make_plan(images(), same, init=init, device="cpu").config.initial.notes == ()


def test_a_pipeline_of_diffusers_own_network_states_edm_and_one_of_another_program_nothing(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    run = train(tmp_path / "run", images(), NETWORKS["diffusers"])
    folder = run.export(tmp_path / "pipeline", samples=0)
    recipe = dataclasses.replace(run.config.recipe, preconditioning=sf.EDMPreconditioning(0.3))
    notes = sf.training.make_plan(images(), recipe, init=folder, device="cpu").config.initial.notes
    assert notes == (
        f"the source was trained in {sf.EDMPreconditioning(0.5)}, this run trains in {recipe.preconditioning}.",
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDPMPipeline"}))
    assert sf.training.make_plan(images(), recipe, init=folder, device="cpu").config.initial.notes == ()
    (folder / "model_index.json").write_text(json.dumps({**index, "scaling": {"mean": [0]}}))
    with pytest.raises(
        ValueError, match=r"^init=.*model_index\.json cannot be used: its scaling is damaged.*name the folder"
    ):
        sf.training.make_plan(images(), recipe, init=folder, device="cpu")
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"sigma_data": "x"}))
    with pytest.raises(ValueError, match=r"^init=.*scheduler_config\.json cannot be used: .*sigma_data"):
        sf.training.make_plan(images(), recipe, init=folder, device="cpu")


def test_an_imported_network_is_trained_on(tmp_path: Path) -> None:
    network = sf.networks.SongUNet.ddpmpp(8, 1, 8, (1, 2), 1, generator=torch.Generator().manual_seed(0))
    torch.save(network.state_dict(), tmp_path / "published.pt")
    run = sf.interop.import_run(tmp_path / "published.pt", tmp_path / "imported", preconditioning="edm")
    weights = begin(tmp_path / "run", images(16), run, steps=2)
    assert torch.equal(weights["network.enc.16x16_conv.weight"], network.state_dict()["enc.8x8_conv.weight"])
    assert sf.Run(tmp_path / "run").config.initial.copied == len(weights)
    assert sf.Run(tmp_path / "run").resume(data=images(16), device="cpu").step == 2


def test_averages_of_any_length_have_the_frequencies_that_came_with_the_weights(source: sf.Run, tmp_path: Path) -> None:
    # A network of another seed would draw others, with which the weights are of no use.
    data = images(8, ("bee", "fly"))
    recipe = dataclasses.replace(TINY, conditional=True, seed=1)
    run = sf.train(data, init=source, recipe=recipe, out=tmp_path / "run", device="cpu")
    wanted = load_file(source.folder.checkpoint(3) / "model.safetensors")["network.embed.freqs"]
    for ema in ("none", "half-life", "0.1"):
        assert torch.equal(run.model(ema).denoiser.network.embed.freqs, wanted), ema
    exported = run.export(tmp_path / "plain", format="plain", ema="0.1", samples=0)
    assert torch.equal(load_file(exported / "model.safetensors")["embed.freqs"], wanted)
    # So has the file of such an average, with which another run begins.
    average, _ = run.average(0.1)
    weights = begin(tmp_path / "next", data, average, recipe=dataclasses.replace(recipe, seed=5))
    assert torch.equal(weights["network.embed.freqs"], wanted)
    # Weights alone are refused.
    alone = {name: value for name, value in load_file(average).items() if "freqs" not in name}
    torch.save(alone, tmp_path / "alone.pt")
    with pytest.raises(ValueError, match=r"alone\.pt lacks embed\.freqs, which is drawn at random .* Name a run"):
        sf.train(data, init=tmp_path / "alone.pt", recipe=recipe, out=tmp_path / "never", device="cpu")


def test_what_holds_no_weights_is_refused(source: sf.Run, tmp_path: Path) -> None:
    torch.save({"network": {"a": torch.zeros(2)}, "step": 3}, tmp_path / "other.pt")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    (tmp_path / "empty").mkdir()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("other.pt", "text.safetensors", "empty", "module.pt", "nowhere"):
        with pytest.raises(ValueError, match=rf"^init=.*{name}.*name the folder of a run or an export, or a file with"):
            sf.train(images(), init=tmp_path / name, recipe=TINY, out=tmp_path / "no", device="cpu")
    shutil.copytree(source.path, tmp_path / "young")
    shutil.rmtree(tmp_path / "young" / "checkpoints")
    with pytest.raises(ValueError, match="the run has no checkpoint yet"):
        sf.train(images(), init=tmp_path / "young", out=tmp_path / "no", device="cpu")
    with pytest.raises(TypeError, match=r"^init is int: pass a run"):
        sf.train(images(), init=3, out=tmp_path / "no", device="cpu")
    with pytest.raises(ValueError, match="holds all settings: leave init out"):
        sf.train(sf.training.make_plan(images(), TINY, device="cpu"), init=source)
    assert not (tmp_path / "no").exists()


def test_a_description_that_is_none_is_refused(source: sf.Run, tmp_path: Path) -> None:
    begin(tmp_path / "run", images(), source)
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    assert InitialWeights.of(record["initial"]).record() == record["initial"]
    for odd in ("x", {}, {**record["initial"], "copied": "all"}, {**record["initial"], "fresh": [1]}):
        path.write_text(json.dumps({**record, "initial": odd}))
        with pytest.raises(ValueError, match=r"config\.json cannot be used: .*initial weights"):
            _ = sf.Run(tmp_path / "run").config


def test_the_command_says_what_it_copies(
    source: sf.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", images().images[:, 0])
    flags = ("train", "data.npy", "--init", str(source.path), "--device", "cpu", "--out")
    assert status(*flags, "run", "--steps", "2") == 0
    told = " ".join(capsys.readouterr().out.split())
    count = len(averages(source))
    assert f"recipe: that of {source.path}" in told
    assert f"copied {count} of {count} tensors" in told
    assert sf.Run("run").config.recipe.network == TINY.network
    assert status(*flags, "no", "--resolution", "16") == 2
    assert "train on images of its size, --resolution 8." in capsys.readouterr().err
    assert status("train", "data.npy", "--init", "nowhere", "--out", "no") == 2
    assert "--init nowhere does not exist" in capsys.readouterr().err
    assert status("train", "--resume", "--init", "nowhere", "--out", "run") == 2
    assert "--init with --resume" in capsys.readouterr().err
    assert not Path("no").exists()


@pytest.mark.parametrize("format_", ["run", "plain", "diffusers", "unet"])
@pytest.mark.parametrize(
    ("kind", "field", "name"), [("sit", "heads", "heads"), ("diffusers", "groups", "norm_num_groups")]
)
def test_a_setting_of_the_network_that_no_weight_shows_is_noted(
    kind: str, field: str, name: str, format_: str, tmp_path: Path
) -> None:
    if (kind, format_) == ("diffusers", "plain"):
        pytest.skip("there is no such export")
    init: object = train(tmp_path / "run", images(), NETWORKS[kind])
    if format_ != "run":
        init = init.export(tmp_path / "export", format="plain" if format_ == "plain" else "diffusers", samples=0)
        init = init / "unet" if format_ == "unet" else init
    given = getattr(NETWORKS[kind], field)
    for value in (given, given // 2):
        recipe = dataclasses.replace(TINY, network=dataclasses.replace(NETWORKS[kind], **{field: value}))
        found = sf.training.make_plan(images(), recipe, init=init, device="cpu").config.initial
        assert found.copied == found.tensors
        told = f"the source's network has {name} {given}, this run's {value}, which no weight shows: with the copied"
        assert sum("no weight shows" in note for note in found.notes) == (value != given)
        assert any(told in note for note in found.notes) == (value != given)


OTHERS = {
    "act_fn": "gelu",
    "attention_head_dim": 4,
    "attn_norm_num_groups": 2,
    "center_input_sample": True,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 2.0,
    "norm_eps": 0.1,
    "norm_num_groups": 2,
    "dropout": 0.3,
    "num_train_timesteps": 500,
    "time_embedding_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": "timestep",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "add_attention": False,
    "mid_block_type": None,
    "layers_per_block": 2,
    "sample_size": 16,
    "time_embedding_type": "fourier",
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_noted_settings_of_diffusers_network_are_those_that_change_it_and_none_of_its_shapes(name: str) -> None:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    options = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
    options |= {"layers_per_block": 1, "norm_num_groups": 4, **blocks}
    one, other = (UNet2DModel(**options | change).eval() for change in ({}, {name: OTHERS[name]}))
    states = [network.state_dict() for network in (one, other)]
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shapes = [{key: value.shape for key, value in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        assert name not in _UNET2D
        return
    other.load_state_dict(states[0])
    with torch.no_grad():
        differ = not torch.equal(one(x, 30.0).sample, other(x, 30.0).sample)
    assert differ == (name in _UNET2D)
