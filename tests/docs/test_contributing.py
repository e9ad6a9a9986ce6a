"""CONTRIBUTING's examples of extensions run as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest

import stablefield as sf
from stablefield.evaluation.evaluate import METRICS

ROOT = Path(__file__).resolve().parents[2]


def examples(title: str) -> list[str]:
    """The blocks of Python of a section."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", text, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)


def test_a_new_metric_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file, call = examples("Add a metric")
    names: dict[str, Any] = {"__name__": "mean_distance"}
    exec(compile(file, "mean_distance.py", "exec"), names)
    exec(compile(call, "call.py", "exec"), names)
    assert re.search(r"^mean distance ↓ +0\.\d{4}$", capsys.readouterr().out, re.M)
    (line,) = re.findall(r"`\"(mean-distance)\": (MeanDistance\(\)),`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    monkeypatch.setitem(METRICS, line[0], eval(line[1], names))  # pyright: ignore[reportArgumentType]
    digits = sf.data.open_images("digits")
    net = sf.evaluation.RandomConvolutions()
    assert sf.evaluate(digits, data=digits, metrics=["mean-distance"], extractor=net)["mean distance"].mean < 1e-6
