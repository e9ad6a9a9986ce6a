import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stablefield.data._digits import open_digits
from stablefield.evaluation._extraction import ExtractorPass
from stablefield.evaluation._extractor import RawPixels
from stablefield.evaluation._features import moments_of
from stablefield.evaluation._reference import (
    DamagedCacheWarning,
    ReferenceSet,
    load_tensor,
    measure_reference,
    save_tensor,
)

RECORD = {
    "extractor": "net",
    "extractor_sha256": "7f" * 32,
    "resize": "none",
    "reference": "digits",
    "reference_sha256": "ab" * 32,
    "reference_count": 40,
    "split": "train",
}


def moments() -> Tensor:
    return moments_of(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))


def save(path: Path, tensor: Tensor) -> None:
    save_tensor(path, "moments", tensor, RECORD, "0123abc")


def load(path: Path) -> Tensor:
    return load_tensor(path, "moments", RECORD)[0]


@pytest.mark.parametrize("kind", ["moments", "rows"])
def test_statistics_and_rows_come_back_to_the_bit_with_their_commit(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new" / "reference.safetensors"
    kept = moments() if kind == "moments" else torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    save_tensor(path, kind, kept, RECORD, "0123abc")
    got, commit = load_tensor(path, kind, RECORD)
    assert got.dtype == kept.dtype
    assert torch.equal(got, kept)
    assert commit == "0123abc"
    assert [file.name for file in path.parent.iterdir()] == ["reference.safetensors"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extractor", "other"),
        ("extractor_sha256", "00" * 32),
        ("resize", "tensorflow1-bilinear-299x299"),
        ("reference", "other"),
        ("reference_sha256", "cd" * 32),
        ("reference_count", 41),
        ("split", "test"),
    ],
)
def test_statistics_of_something_else_are_refused(tmp_path: Path, field: str, value: object) -> None:
    save(tmp_path / "r", moments())
    with pytest.raises(ValueError, match=rf"other reference statistics than this measurement needs \({field}\): "):
        load_tensor(tmp_path / "r", "moments", RECORD | {field: value})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    save(path, moments())

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, moments_of(torch.zeros(40, 6)))
    assert torch.equal(load(path), moments())
    assert [file.name for file in tmp_path.iterdir()] == ["r"]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with pytest.raises(ValueError, match="holds no reference statistics"):
        load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no reference statistics"):
        load(path)
    save_file({"mean": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match="holds no reference statistics"):
        load(path)
    for wrong in (moments_of(torch.zeros(39, 6)), moments()[0], torch.full((8, 6), torch.nan)):
        save(path, wrong)
        with pytest.raises(ValueError, match="contradicts its own record, or holds NaN"):
            load(path)
    save_tensor(path, "rows", torch.zeros(39, 6), RECORD)
    with pytest.raises(ValueError, match="contradicts its own record, or holds NaN"):
        load_tensor(path, "rows", RECORD)
    for record in (json.dumps(RECORD), "[]", "[" * 5000):
        save_file({"moments": torch.zeros(8, 6)}, str(path), {"record": record, "commit": ""})
        with pytest.raises(ValueError, match=r"is damaged: its checksum|holds no reference statistics"):
            load(path)


def test_a_flipped_bit_anywhere_in_kept_statistics_is_found(tmp_path: Path) -> None:
    save(tmp_path / "r", moments())
    whole = (tmp_path / "r").read_bytes()
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged "):
            load(tmp_path / "damaged")
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        (tmp_path / "damaged").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged holds no reference statistics"):
            load(tmp_path / "damaged")


def test_a_damaged_cache_is_named_and_made_anew(tmp_path: Path) -> None:
    whole = ReferenceSet(images=open_digits(), split="train", count=50)
    wanted = ExtractorPass(extractor=RawPixels((1, 8, 8)))
    first = measure_reference(whole, wanted, batch=50, cache=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    for path in kept:
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
        with pytest.warns(DamagedCacheWarning, match=rf"{path.name} is damaged: .* made anew now"):
            again = measure_reference(whole, wanted, batch=50, cache=tmp_path)
        assert torch.equal(again.rows, first.rows)
        assert torch.equal(again.moments, first.moments)
        # Warnings are errors here: what was made anew is taken without one.
        measure_reference(whole, wanted, batch=50, cache=tmp_path)
