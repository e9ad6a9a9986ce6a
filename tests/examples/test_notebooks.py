"""The notebooks run from top to bottom, and show in the repository what they print and draw."""

import base64
from pathlib import Path

import pytest
from notebooks import FOLDER, NOTEBOOKS, code, execute, read

import stablefield as sf

# What makes them small enough for a test; each must be there.
SMALL = {
    "quick_start.ipynb": {"steps=600": "steps=30", "run.metrics()[2::3]": "run.metrics()", "samples=500": "samples=40"},
    "probe.ipynb": {"references=(128, 512))": "references=(128,), sources=64)", "sources=256": "sources=32"},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sources = code(read(FOLDER / name))
    for old, new in SMALL[name].items():
        assert sum(source.count(old) for source in sources) == 1, old
        sources = [source.replace(old, new) for source in sources]
    outputs = execute(sources)
    kept = [cell["outputs"] for cell in read(FOLDER / name)["cells"] if cell["cell_type"] == "code"]
    # What the file shows is of the same kinds as what the cells show now.
    kinds = [[[found["output_type"], *sorted(found.get("data", ()))] for found in cell] for cell in outputs]
    assert [[[found["output_type"], *sorted(found.get("data", ()))] for found in cell] for cell in kept] == kinds


def test_the_notebooks_show_their_outputs_in_the_repository_and_are_small() -> None:
    assert [path.name for path in NOTEBOOKS] == sorted(SMALL)
    for path in NOTEBOOKS:
        cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert all(cell["outputs"] for cell in cells)
        pictures = [
            data["data"]["image/png"]
            for cell in cells
            for data in cell["outputs"]
            if "image/png" in data.get("data", ())
        ]
        assert pictures
        for picture in pictures:
            png = base64.b64decode(picture)
            assert png.startswith(b"\x89PNG")
            assert len(png) < 300_000


def test_results_say_in_a_line_or_a_table_what_they_are() -> None:
    digits = sf.data.open_images("digits")
    assert repr(digits) == "<ImageSet digits: 1,797 greyscale images of 8 x 8, 10 classes, 112.3 KiB in memory>"
    samples = sf.training.Samples(
        images=digits.images[:3], seeds=(0, 1, 2), sampler="heun", nfe=35.0, ema="none, step 9"
    )
    assert repr(samples) == "<Samples: 3 images of 1x8x8, heun, NFE 35, EMA none, step 9>"
    assert samples._repr_png_().startswith(b"\x89PNG")
    found = sf.evaluate(
        digits, data=digits, metrics=["nearest"], extractor=sf.evaluation.RawPixels((1, 8, 8)), cache=False
    )
    assert repr(found) == str(found)
