import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stablefield.data._digits import open_digits
from stablefield.evaluation._extraction import ExtractorPass
from stablefield.evaluation._extractor import RawPixels
from stablefield.evaluation._features import Statistics, statistics_of
from stablefield.evaluation._protocol import DamagedCacheWarning, Protocol, ProtocolWarning
from stablefield.evaluation._reference import ReferenceSet, load_tensors, measure_reference, save_tensors

PROTOCOL = Protocol(
    metric="FID",
    extractor="net",
    extractor_sha256="7f" * 32,
    resize="none",
    sample_count=1_000,
    reference="digits",
    reference_sha256="ab" * 32,
    reference_count=40,
    split="train",
    seeds=("0-999",),
    sampler="heun",
    steps=18,
    commit="0123abc",
)


def statistics() -> Statistics:
    return statistics_of(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))


def save_statistics(path: Path, found: Statistics, protocol: Protocol) -> None:
    save_tensors(path, {"mean": found.mean, "covariance": found.covariance}, found.count, protocol)


def load_statistics(path: Path, expected: Protocol) -> Statistics:
    mean, covariance = load_tensors(path, ("mean", "covariance"), expected)
    return Statistics(count=expected.reference_count, mean=mean, covariance=covariance)


def test_statistics_come_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reference.safetensors"
    save_statistics(path, statistics(), PROTOCOL)
    got = load_statistics(path, PROTOCOL)
    assert got.count == 40
    assert torch.equal(got.mean, statistics().mean)
    assert torch.equal(got.covariance, statistics().covariance)
    assert [file.name for file in path.parent.iterdir()] == ["reference.safetensors"]


def test_samples_and_metric_of_the_measurement_do_not_matter(tmp_path: Path) -> None:
    save_statistics(tmp_path / "r", statistics(), PROTOCOL)
    other = dataclasses.replace(
        PROTOCOL, metric="x", sample_count=7, sampler="euler", steps=1, seeds=(), settings={"k": 3}
    )
    assert load_statistics(tmp_path / "r", other).count == 40


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extractor_sha256", "00" * 32),
        ("resize", "tensorflow1-bilinear-299x299"),
        ("reference_sha256", "cd" * 32),
        ("reference_count", 41),
        ("split", "test"),
    ],
)
def test_statistics_of_something_else_are_refused(tmp_path: Path, field: str, value: object) -> None:
    save_statistics(tmp_path / "r", statistics(), PROTOCOL)
    with pytest.raises(ValueError, match=f"other reference statistics than this measurement needs .{field}: "):
        load_statistics(tmp_path / "r", dataclasses.replace(PROTOCOL, **{field: value}))


@pytest.mark.parametrize("field", ["extractor", "reference", "commit"])
def test_another_commit_or_name_is_a_warning(tmp_path: Path, field: str) -> None:
    save_statistics(tmp_path / "r", statistics(), PROTOCOL)
    with pytest.warns(ProtocolWarning, match=f"{field}: .* against 'other'"):
        load_statistics(tmp_path / "r", dataclasses.replace(PROTOCOL, **{field: "other"}))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    save_statistics(path, statistics(), PROTOCOL)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_statistics(path, statistics_of(torch.zeros(40, 6)), PROTOCOL)
    assert torch.equal(load_statistics(path, PROTOCOL).mean, statistics().mean)
    assert [file.name for file in tmp_path.iterdir()] == ["r"]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with pytest.raises(ValueError, match="there is no file"):
        load_statistics(path, PROTOCOL)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no reference statistics"):
        load_statistics(path, PROTOCOL)
    save_file({"mean": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match="holds no reference statistics"):
        load_statistics(path, PROTOCOL)
    save_statistics(path, Statistics(count=40, mean=torch.zeros(2), covariance=torch.zeros(3, 3)), PROTOCOL)
    with pytest.raises(ValueError, match="contradicts its own record"):
        load_statistics(path, PROTOCOL)
    nothing = torch.full((2, 2), torch.nan)
    save_statistics(path, Statistics(count=40, mean=torch.zeros(2), covariance=nothing), PROTOCOL)
    with pytest.raises(ValueError, match="holds NaN"):
        load_statistics(path, PROTOCOL)
    metadata = {"count": "40", "protocol": PROTOCOL.of_reference().to_json()}
    save_file({"mean": torch.zeros(2), "covariance": torch.zeros(2, 2)}, str(path), metadata)
    with pytest.raises(ValueError, match="has no checksum"):
        load_statistics(path, PROTOCOL)


def test_a_flipped_bit_anywhere_in_kept_statistics_is_found(tmp_path: Path) -> None:
    save_statistics(tmp_path / "r", statistics(), PROTOCOL)
    whole = (tmp_path / "r").read_bytes()
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged "):
            load_statistics(tmp_path / "damaged", PROTOCOL)
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        (tmp_path / "damaged").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged holds no reference statistics"):
            load_statistics(tmp_path / "damaged", PROTOCOL)


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
        assert torch.equal(again.statistics.covariance, first.statistics.covariance)
        # Warnings are errors here: what was made anew is taken without one.
        measure_reference(whole, wanted, batch=50, cache=tmp_path)


def test_statistics_of_a_part_of_the_reference_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"statistics are of 40 rows, protocol.reference_count is 41"):
        save_statistics(tmp_path / "r", statistics(), dataclasses.replace(PROTOCOL, reference_count=41))
