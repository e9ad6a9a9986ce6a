"""Rows with a label meet the references of their label only: the posterior of the definition, at the cost of these."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stablefield as sf
from stablefield.targets._engine import assembly, label_index
from stablefield.targets._engine.label_index import LabelIndex

# Labels of very different size, with gaps between them.
SIZES = {0: 1, 1: 2, 2: 31, 5: 7, 6: 7, 9: 40, 11: 3, 12: 29}


@pytest.fixture
def by_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for data so large that products decide."""
    monkeypatch.setattr(label_index, "_PART", -(2**60))
    monkeypatch.setattr(assembly, "_FEW", 0)


def case(kind: str, rng: torch.Generator) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """Data, options of a pool over them, and arguments of a call: 90 rows, some without a label."""
    labels = torch.cat([torch.full((count,), label) for label, count in SIZES.items()])
    if kind != "sorted":
        labels = labels[torch.randperm(len(labels), generator=rng)]
    images = torch.randint(0, 256, (len(labels), 1, 4, 5), generator=rng, dtype=torch.uint8)
    if kind == "twins":
        images[labels == 9] = images[0].clone()
        images[labels == 9, 0, 0, 0] = torch.arange(40, dtype=torch.uint8)
    data: Any = images if kind == "uint8" else images / 127.5 - 1
    if kind in ("float16", "array"):
        data = data.half()
    elif kind == "float64":
        data = data.double()
    elif kind == "far from zero":
        data = data + 300
    options: dict[str, Any] = {"labels": labels.int() if kind == "uint8" else labels}
    probabilities = torch.ones(len(labels))
    if kind == "weights":
        options["weights"] = probabilities = torch.rand(len(labels), generator=rng) + 0.05
    options["mirrored"] = kind == "mirrored"
    index = torch.multinomial(probabilities, 90, replacement=True, generator=rng)
    x0 = images[index] / 127.5 - 1 if kind == "uint8" else data[index]
    x0 = x0.float() if x0.dtype == torch.float16 else x0
    sigma = torch.exp(torch.linspace(-4, 2, 90))[torch.randperm(90, generator=rng)].to(x0.dtype)
    call = {"x0": x0, "x_t": sf.EDM().perturb(x0, sigma, generator=rng), "t": sigma, "index": index}
    call["labels"] = torch.where(torch.arange(90) % 5 == 0, -1, labels[index])
    return data.numpy() if kind == "array" else data, options, call


@pytest.mark.usefixtures("by_label")
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize(
    "kind",
    [
        "float32",
        "float64",
        "uint8",
        "float16",
        "array",
        "sorted",
        "weights",
        "mirrored",
        "twins",
        "tails",
        "far from zero",
    ],
)
def test_the_posterior_by_label_is_that_of_the_definition_in_float64(
    kind: str, chunk_size: int | None, rng: torch.Generator, exact: Callable[..., Any]
) -> None:
    data, options, call = case(kind, rng)
    kernel = sf.StudentTKernel(30.0) if kind == "tails" else sf.GaussianKernel()
    stable = sf.StableTarget(
        sf.EDM(), references=sf.Pool(data, **options), kernel=kernel, chunk_size=chunk_size, validate_args=False
    )
    found = stable(**call)
    references = torch.from_numpy(data) if kind == "array" else data
    references = references / 127.5 - 1 if kind == "uint8" else references.double()
    labels, weights = options["labels"], options.get("weights")
    if kind == "mirrored":
        references, labels = torch.cat([references, references.flip(-1)]), labels.repeat(2)

    def heavy(square: Tensor, sigma: Tensor, dim: int) -> Tensor:
        return -(30.0 + dim) / 2 * torch.log(square + 30.0 * sigma**2)

    allowed = (call["labels"][:, None] == labels) | (call["labels"][:, None] == -1)
    log_prior = None if weights is None else weights.log()
    truth = exact(call["x_t"], 1.0, call["t"], references, allowed, log_prior, heavy if kind == "tails" else None)
    torch.testing.assert_close(found.x0.flatten(1).double(), truth.mean, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(found.variance.double(), truth.variance, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_it_equals_the_masked_product_to_1e_6(kind: str, rng: torch.Generator, request: pytest.FixtureRequest) -> None:
    data, options, call = case(kind, rng)
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data, **options), validate_args=False)
    masked = stable(**call)
    request.getfixturevalue("by_label")
    found = stable(**call)
    assert not torch.equal(found.x0, masked.x0)  # another order of the sums
    torch.testing.assert_close(found.x0, masked.x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.ess, masked.ess, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("by_label")
def test_every_row_meets_the_references_of_its_label_once_and_no_others(rng: torch.Generator) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in SIZES.items()])
    labels = labels[torch.randperm(len(labels), generator=rng)]
    # 7 is a label of no reference.
    asked = torch.tensor([0, 2, 2, 5, 5, 6, 6, 9, 11, 12, 12, 7, -1, -1])[torch.randperm(14, generator=rng)]
    index = LabelIndex(labels)
    for size in (1, 8, 30, 1000):
        found = index.parts(asked, 10**9, size)
        assert found is not None
        met = torch.zeros(len(asked), len(labels), dtype=torch.long)
        for part in found.parts:
            rows = found.order[part.rows]
            if part.runs is None:
                met[rows] += 1
                continue
            for columns in index.columns(part, size):
                assert columns.groups * len(columns) <= max(size, columns.groups)
                places = torch.arange(len(labels))[columns.where]
                usable = columns.usable(len(rows))
                for k, row in enumerate(rows):
                    own = places if places.ndim == 1 else places[k // (len(rows) // columns.groups)]
                    hidden = (
                        torch.zeros(len(own), dtype=torch.bool) if usable is None else ~usable.expand(len(rows), -1)[k]
                    )
                    met[row].index_add_(0, own, (~hidden).long())
                source = rows.new_tensor([int((labels == asked[row]).nonzero()[0, 0]) for row in rows])
                column = columns.of_source(source)
                for k in range(len(rows)):
                    own = places if places.ndim == 1 else places[k // (len(rows) // columns.groups)]
                    inside = 0 <= column[k] < len(columns)
                    assert not inside or own[column[k]] == source[k]
        assert torch.equal(met, ((asked[:, None] == labels) | (asked[:, None] == -1)).long())


def test_a_batch_with_hundreds_of_labels_takes_few_operations(rng: torch.Generator) -> None:
    class Count(TorchDispatchMode):
        operations = grouped = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += 1
            self.grouped += func.overloadpacket.__name__ == "bmm"
            return func(*args, **(kwargs or {}))

    def operations(classes: int) -> int:
        labels = torch.arange(40_000) % classes
        data = torch.randn(len(labels), 24, generator=rng)
        stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data, labels=labels), validate_args=False)
        index = torch.randperm(len(labels), generator=rng)[:512]
        x_t = data[index] + torch.randn(512, 24, generator=rng)
        with Count() as count:
            stable(data[index], x_t, 1.0, labels[index], index)
        assert (count.grouped > 0) == (classes > 1)
        return count.operations

    # In 400 labels, 512 rows come 1 to about 6 times each.
    assert operations(400) < 6 * operations(1)


@pytest.mark.timed
def test_rows_with_labels_take_a_third_of_the_masked_product(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = torch.randn(20_000, 1024, generator=rng)
    labels = torch.randint(0, 100, (len(data),), generator=rng)
    index = torch.randint(0, len(data), (512,), generator=rng)
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data, labels=labels), validate_args=False)
    call = (data[index], data[index] + 30 * torch.randn(512, 1024, generator=rng), 30.0, labels[index], index)

    def seconds() -> float:
        start = time.perf_counter()
        stable(*call)
        return time.perf_counter() - start

    seconds()
    by_label = min(seconds() for _ in range(4))
    monkeypatch.setattr(LabelIndex, "parts", lambda *_: None)
    masked = min(seconds() for _ in range(4))
    assert by_label < masked / 3, (by_label, masked)


@pytest.mark.usefixtures("by_label")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_pools_own_labels_that_are_changed_in_place_are_read_anew(dtype: torch.dtype, rng: torch.Generator) -> None:
    data, labels = torch.randn(40, 20, generator=rng), (torch.arange(40) % 4).to(dtype)
    index = torch.arange(20)
    x_t = data[:20] + torch.randn(20, 20, generator=rng)
    pool = sf.Pool(data, labels=labels)
    stable = sf.StableTarget(sf.EDM(), references=pool, validate_args=False)
    before = stable(data[:20], x_t, 1.0, labels[index], index)
    labels.copy_(torch.arange(40) % 5)
    with pytest.raises(ValueError, match="the Pool has another label"):  # the pool has a copy
        stable(data[:20], x_t, 1.0, labels[index], index)
    assert pool.labels is not None
    pool.labels.copy_(labels)
    found = stable(data[:20], x_t, 1.0, labels[index], index)
    fresh = sf.StableTarget(sf.EDM(), references=sf.Pool(data, labels=labels.clone()), validate_args=False)
    assert not torch.equal(found.x0, before.x0)
    assert torch.equal(found.x0, fresh(data[:20], x_t, 1.0, labels[index], index).x0)


@pytest.mark.usefixtures("by_label")
def test_a_file_that_may_only_be_read_is_read_by_label(rng: torch.Generator, tmp_path: Path) -> None:
    data, options, call = case("sorted", rng)
    np.save(tmp_path / "data.npy", data.numpy())
    mapped = np.load(tmp_path / "data.npy", mmap_mode="r")
    found, truth = (
        sf.StableTarget(sf.EDM(), references=sf.Pool(some, **options), validate_args=False)(**call)
        for some in (mapped, data)
    )
    assert torch.equal(found.x0, truth.x0)


@pytest.mark.usefixtures("by_label")
def test_a_posterior_without_sources_goes_by_label_and_names_the_row_that_has_no_reference(
    rng: torch.Generator, exact: Callable[..., Any]
) -> None:
    data, options, call = case("float32", rng)
    labels, given = options["labels"], call["labels"]
    # At low noise each row needs the nearest reference as its anchor.
    for level in (0.01, 2.0):
        found = sf.posterior(call["x_t"], 1.0, level, data, labels=given, reference_labels=labels)
        allowed = (given[:, None] == labels) | (given[:, None] == -1)
        truth = exact(call["x_t"], 1.0, torch.tensor(level), data.double(), allowed)
        torch.testing.assert_close(found.mean.flatten(1).double(), truth.mean, rtol=1e-5, atol=3e-5)
    given[3] = 7
    with pytest.raises(ValueError, match=r"no reference may serve row 3 \(label 7\)"):
        sf.posterior(call["x_t"], 1.0, 2.0, data, labels=given, reference_labels=labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_labels_and_indices_are_those_of_int64(dtype: torch.dtype, rng: torch.Generator) -> None:
    """The largest label is 255, whose bits in a uint8 are those of -1, a dropped label."""
    labels, data = torch.tensor([0, 254, 255]).repeat(10), torch.randn(30, 4, generator=rng)
    x_t, index = data + 2 * torch.randn(30, 4, generator=rng), torch.arange(30)
    for references in (sf.Pool(data, labels=labels.to(dtype)), sf.Pool(data, 30, labels.to(dtype)), sf.InBatch()):
        truth = sf.Pool(data, labels=labels) if isinstance(references, sf.Pool) else references
        given = (labels, index) if isinstance(references, sf.Pool) else (labels, None)
        found = sf.StableTarget(sf.EDM(), references=references)(
            data,
            x_t,
            2.0,
            *(None if one is None else one.to(dtype) for one in given),
            reference_labels=labels.to(dtype),
        )
        expected = sf.StableTarget(sf.EDM(), references=truth)(data, x_t, 2.0, *given, reference_labels=labels)
        torch.testing.assert_close(found.x0, expected.x0)
        assert found.ess.max() <= 10 + 1e-4
    found = sf.posterior(x_t, 1.0, 2.0, data, index.to(dtype), labels.to(dtype), labels.to(dtype))
    torch.testing.assert_close(found.mean, sf.posterior(x_t, 1.0, 2.0, data, index, labels, labels).mean)
