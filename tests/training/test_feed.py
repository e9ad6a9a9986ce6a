"""The feed: rows and references of a step are functions of (seed, step), wherever the data lie."""

import dataclasses

import numpy as np
import pytest
import torch

import stablefield as sf
from stablefield.data._digits import open_digits
from stablefield.data._image_set import ImageSet
from stablefield.data._index_stream import IndexStream
from stablefield.data._packed import open_packed, pack
from stablefield.training import _placement as placement_module
from stablefield.training._feed import Feed, Rows
from stablefield.training._noise_band import resolve_band
from stablefield.training._placement import resolve_references
from stablefield.training._recipes import DIGITS

CPU = torch.device("cpu")
ALL = slice(0, 32)


def make(data: ImageSet, resident: bool, labelled: bool = False, **change: object) -> Feed:
    recipe = dataclasses.replace(DIGITS, batch=32, **change)
    return Feed(data, recipe, CPU, labelled=labelled, placement="resident" if resident else "loaded")


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_digits()


@pytest.fixture(scope="module")
def mapped(digits: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    data = open_packed(pack(digits, tmp_path_factory.mktemp("packed") / "digits.safetensors"))
    assert isinstance(data.images, np.memmap)
    return data


def distinct(rows: Rows) -> set[bytes]:
    return {row.numpy().tobytes() for row in rows.pool.data}


@pytest.mark.parametrize("resident", [True, False])
def test_rows_are_those_of_the_index_stream_and_lie_where_the_index_says(mapped: ImageSet, resident: bool) -> None:
    feed = make(mapped, resident, labelled=True, references=100)
    stream = IndexStream(len(mapped), 32, DIGITS.seed)
    for step in (0, 5, 1, 60):
        rows = feed.rows(step, ALL)
        expected, labels = mapped.batch(stream.batch_at(step))
        assert np.array_equal(rows.pixels.numpy(), expected)
        assert rows.labels is not None
        assert np.array_equal(rows.labels.numpy(), labels)
        assert torch.equal(rows.pool.data[rows.index], rows.pixels)
        assert rows.pool.labels is not None
        assert torch.equal(rows.pool.labels[rows.index], rows.labels)
        assert len(rows.pool.data) == 100
    feed.close()


def test_references_read_from_a_map_are_those_drawn_from_resident_data(digits: ImageSet, mapped: ImageSet) -> None:
    first, second = make(digits, True, references=64), make(mapped, False, references=64)
    for step in (3, 4, 9):
        a, b = first.rows(step, ALL), second.rows(step, ALL)
        assert torch.equal(a.pool.data, b.pool.data)
        assert torch.equal(a.index, b.index)
    second.close()


def test_every_part_of_a_step_has_the_same_references_and_its_own_rows(digits: ImageSet) -> None:
    feed = make(digits, True, references=64)
    whole = feed.rows(7, ALL)
    parts = [feed.rows(7, slice(a, b)) for a, b in ((0, 10), (10, 11), (11, 32))]
    again = make(digits, True, references=64).rows(7, slice(10, 11))
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
    assert all(torch.equal(part.pool.data, whole.pool.data) for part in (*parts, again))
    assert torch.equal(again.pixels, parts[1].pixels)


def test_references_differ_from_step_to_step_and_are_never_twice_there(digits: ImageSet) -> None:
    feed = make(digits, True, references=200)
    sets = [feed.rows(step, ALL).pool.data for step in range(3)]
    assert not torch.equal(sets[0], sets[1])
    for step in range(3):
        chosen, _ = feed._choice(step)
        assert len(set(chosen.tolist())) == 200


def test_whole_resident_data_are_not_copied_from_step_to_step(digits: ImageSet) -> None:
    feed = make(digits, True, references="all")
    assert feed.rows(0, ALL).pool is feed.rows(9, ALL).pool
    assert len(feed.rows(0, ALL).pool.data) == len(digits)


def test_single_sample_target_reads_nothing_but_the_batch(mapped: ImageSet) -> None:
    feed = make(mapped, False, target="dsm")
    assert len(feed.rows(2, ALL).pool.data) == 32
    feed.close()


def test_all_references_where_they_do_not_fit_is_an_error_with_the_remedy(
    mapped: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="number of references"):
        make(mapped, False, references="all")
    monkeypatch.setattr(placement_module, "free_bytes", lambda device: 200_000)
    with pytest.raises(ValueError, match=r"references=all.*such as 1797,"):
        resolve_references(dataclasses.replace(DIGITS, references="all"), mapped, CPU)


@pytest.mark.parametrize(
    ("free", "processes", "expected", "words"),
    [
        (10**9, 1, "all", "at most half of the"),
        (10**9, 4, "all", "at most half of the"),
        (200_000, 1, 1797, "more than half of the"),
        (200_000, 2, "sharded", "a part of the 112.3 KiB on each of 2 processes"),
        (50_000, 2, 1797, "more than half of the"),
    ],
)
def test_auto_takes_all_where_they_fit_and_says_the_rule(
    mapped: ImageSet, monkeypatch: pytest.MonkeyPatch, free: int, processes: int, expected: object, words: str
) -> None:
    monkeypatch.setattr(placement_module, "free_bytes", lambda device: free)
    found, rule = resolve_references(DIGITS, mapped, CPU, processes)
    assert found == expected
    assert words in rule


def test_processes_on_one_cpu_share_its_memory(mapped: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_module, "free_bytes", lambda device: 3 * mapped.images.nbytes)
    assert placement_module.can_be_resident(mapped, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not placement_module.can_be_resident(mapped, CPU)
    assert placement_module.can_be_resident(mapped, CPU, processes=2)


def test_sharded_references_of_one_process_are_refused_and_go_on_as_all(mapped: ImageSet) -> None:
    recipe = dataclasses.replace(DIGITS, references="sharded")
    with pytest.raises(ValueError, match=r"references=sharded needs several processes.*torchrun"):
        resolve_references(recipe, mapped, CPU)
    # A run that several processes began, and one goes on with.
    assert placement_module.placed(recipe, mapped, CPU) == "resident"
    assert placement_module.placed(recipe, mapped, CPU, processes=2) == "sharded"


def test_sharded_references_that_do_not_fit_are_refused(mapped: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(DIGITS, references="sharded")
    monkeypatch.setattr(placement_module, "free_bytes", lambda device: 50_000)
    with pytest.raises(ValueError, match=r"references=sharded: the data take 112.3 KiB.*also in 2 parts"):
        resolve_references(recipe, mapped, CPU, processes=2)
    with pytest.raises(ValueError, match=r"sharded over several processes.*continue with several"):
        placement_module.placed(recipe, mapped, CPU)


def test_half_of_the_free_memory_is_the_limit(mapped: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, fitting in ((2 * mapped.images.nbytes, True), (2 * mapped.images.nbytes - 2, False)):
        monkeypatch.setattr(placement_module, "free_bytes", lambda device, free=free: free)
        assert placement_module.can_be_resident(mapped, CPU) is fitting


def test_auto_band_is_where_the_probe_of_the_references_says(digits: ImageSet) -> None:
    pixels = torch.from_numpy(digits.images)
    found, words = resolve_band(dataclasses.replace(DIGITS, references="all"), digits, CPU)
    assert found == sf.pick_noise_band(sf.Pool(pixels)).level
    assert f"from {found:.3g}" in words
    fewer, _ = resolve_band(dataclasses.replace(DIGITS, references=256), digits, CPU)
    assert fewer == sf.pick_noise_band(sf.Pool(pixels, 256)).level > found > 0
    assert resolve_band(dataclasses.replace(DIGITS, noise_band=1.5), digits, CPU)[0] == 1.5
    assert resolve_band(dataclasses.replace(DIGITS, target="dsm"), digits, CPU)[0] == 0
