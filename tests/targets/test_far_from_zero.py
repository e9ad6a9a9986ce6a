"""Data far from zero: weights, means and variances are those of float64, on every path, since a common origin is taken off.

Rounding errors are relative to the size of the numbers, here 10,000, and not to the differences that count, here 0.01.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield.targets._engine.assembly import posterior_of, summed
from stablefield.targets._engine.query import Host, Plan, Query
from stablefield.targets._engine.reference_matrix import ReferenceMatrix
from stablefield.targets._perturbation_kernel import GaussianKernel
from stablefield.targets._target import Posterior

SHAPE = (3, 32, 32)
DIM = 3072
B = 4
# Name, and what is added to samples of standard deviation 1.
FAR = ["offset 1e4", "offset 1e3", "alike at 1e4", "per channel", "one constant channel", "outliers", "0 to 255"]
PATHS = ["source", "search", "pool", "mirrored", "drawn", "batch", "array", "static", "unread", "unread search"]


def data(kind: str, rng: torch.Generator, sigma: float) -> Tensor:
    """40 samples, float32. For the first four, three near-duplicates each, one sigma from them."""
    y = torch.randn(40, *SHAPE, generator=rng, dtype=torch.float64)
    match kind:
        case "offset 1e4":
            y += 1e4
        case "offset 1e3":
            y += 1e3
        case "alike at 1e4":
            y = 1e4 + 1e-3 * y
        case "per channel":
            y += torch.tensor([1000.0, -30.0, 0.1], dtype=torch.float64)[:, None, None]
        case "one constant channel":
            y[:, 1] = 1000.0
        case "outliers":
            y += 1e4
            y[20], y[30] = -1e6, 0.0
        case "0 to 255":
            y = (128 + 60 * y).clamp(0, 255)
    step = torch.nn.functional.normalize(torch.randn(3 * B, DIM, generator=rng, dtype=torch.float64), dim=1)
    y[B : 4 * B] = y[:B].repeat(3, 1, 1, 1) + sigma * step.reshape(-1, *SHAPE)
    return y.float()


def found_by(path: str, y: Tensor, x_t: Tensor, sigma: float, tmp_path: Path) -> Posterior | sf.Target:
    index = torch.arange(B)
    if path.startswith("unread"):
        with mock.patch("stablefield.targets._engine.query._shares_memory", return_value=False):
            return sf.posterior(x_t, 1.0, sigma, y, None if path.endswith("search") else index)
    match path:
        case "source":
            return sf.posterior(x_t, 1.0, sigma, y, index, chunk_size=17)
        case "search":
            return sf.posterior(x_t, 1.0, sigma, y)
        case "static":
            plan = Plan(matrix=ReferenceMatrix(y), host=Host.NEVER, kernel=GaussianKernel(), chunk_size=17)
            one = torch.ones(B)
            return posterior_of(Query(x_t=x_t, alpha=one, sigma=sigma * one, source=index), plan)
        case "batch" | "drawn":
            # A batch of all samples, so that all are references; others that are drawn are of another labels.
            noisy, labels = y.clone(), torch.arange(80) // 40
            noisy[:B] = x_t
            pool = sf.InBatch() if path == "batch" else sf.Pool(torch.cat([y, y + 1]), 60, labels)
            target = sf.StableTarget(sf.EDM(), references=pool, validate_args=False)(
                y, noisy, sigma, labels[:40], torch.arange(40)
            )
            return Posterior(
                target.x0[:B], target.variance[:B], target.ess[:B], target.source_weight[:B], target.ess[:B]
            )
        case "array":
            np.save(tmp_path / "y.npy", y.numpy())
            pool = sf.Pool(np.load(tmp_path / "y.npy", mmap_mode="r"))
        case _:
            # A mirror image of this data is nobody's near-duplicate.
            pool = sf.Pool(y, mirrored=path == "mirrored")
    return sf.StableTarget(sf.EDM(), references=pool, chunk_size=17, validate_args=False)(
        y[:B], x_t, sigma, index=index
    )


def check(found: Posterior | sf.Target, truth, y: Tensor, sigma: float, rows: slice = slice(None)) -> None:
    own = truth.weights.diagonal()[: len(truth.ess)]
    if found.source_weight is not None:
        assert (found.source_weight.double() - own).abs().max() < 3e-4
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=1e-3, atol=0)
    mean = (found.x0 if isinstance(found, sf.Target) else found.mean).flatten(1).double()
    assert ((mean - truth.mean).abs() / y.abs().max()).max() < 2.0**-23
    middle = y.flatten(1).double().median(0).values
    size = (y.flatten(1).double() - middle).norm(dim=1).max()
    assert ((found.variance.double() - truth.variance).abs() <= variance_bound(truth.variance, sigma, size)).all()


def variance_bound(variance: Tensor, level: float, size: float | Tensor) -> Tensor:
    """What `Posterior.variance` promises at a noise level, for references within `size` of their middle."""
    eps, size = torch.finfo(torch.float32).eps, float(size)
    return 1e-4 * variance + 4 * eps * size * (level if size > 29 * level else size)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", FAR)
def test_near_duplicates_far_from_zero_get_their_weights_and_variance(
    kind: str, path: str, rng: torch.Generator, exact: Callable, tmp_path: Path
) -> None:
    sigma = 0.5 if kind == "0 to 255" else 0.01
    y = data(kind, rng, sigma)
    x_t = (y[:B].double() + sigma * torch.randn(B, *SHAPE, generator=rng, dtype=torch.float64)).float()
    truth = exact(x_t, 1.0, sigma, y)
    assert truth.ess.max() > 1.2
    assert truth.weights.diagonal().min() < 0.9
    check(found_by(path, y, x_t, sigma, tmp_path), truth, y, sigma)


@pytest.mark.parametrize("kind", FAR)
def test_float64_far_from_zero_is_exact(kind: str, rng: torch.Generator, exact: Callable) -> None:
    y = data(kind, rng, 0.01).double()
    x_t = y[:B] + 0.01 * torch.randn(B, *SHAPE, generator=rng, dtype=torch.float64)
    truth = exact(x_t, 1.0, 0.01, y)
    for source in (torch.arange(B), None):
        found = sf.posterior(x_t, 1.0, 0.01, y, source)
        torch.testing.assert_close(found.ess, truth.ess, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.variance, truth.variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("alpha", [0.8, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_the_data_is_taken_into_account(
    alpha: float, dtype: torch.dtype, rng: torch.Generator, exact: Callable
) -> None:
    y = data("offset 1e3", rng, 0.01).to(dtype)
    sigma = alpha * 0.01
    x_t = (alpha * y[:B].double() + sigma * torch.randn(B, *SHAPE, generator=rng, dtype=torch.float64)).to(dtype)
    check(sf.posterior(x_t, alpha, sigma, y, torch.arange(B)), exact(x_t, alpha, sigma, y), y, 0.01)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("with_source", [True, False])
def test_heavy_tails_far_from_zero_keep_the_accuracy(
    sigma: float, with_source: bool, rng: torch.Generator, exact: Callable
) -> None:
    kernel = sf.StudentTKernel(4.0)
    y = data("offset 1e4", rng, sigma)
    x_t = (y[:B].double() + sigma * kernel.noise(torch.zeros(B, *SHAPE, dtype=torch.float64), rng)).float()
    truth = exact(x_t, 1.0, sigma, y, log_kernel=kernel.log_density)
    found = sf.posterior(x_t, 1.0, sigma, y, torch.arange(B) if with_source else None, kernel=kernel)
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.variance.double(), truth.variance, rtol=5e-3, atol=0)
    torch.testing.assert_close(found.log_evidence.double(), truth.log_evidence, rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_source", [True, False])
def test_clusters_far_from_each_other_get_their_weights(
    with_source: bool, rng: torch.Generator, exact: Callable
) -> None:
    # No origin is near all; the pairs of one cluster are compared with each other.
    y = data("offset 1e4", rng, 0.01)
    y = torch.cat([y, -y])
    index = torch.tensor([0, 1, 40, 41])
    x_t = (y[index].double() + 0.01 * torch.randn(4, *SHAPE, generator=rng, dtype=torch.float64)).float()
    truth = exact(x_t, 1.0, 0.01, y)
    found = sf.posterior(x_t, 1.0, 0.01, y, index if with_source else None)
    assert truth.ess.min() > 1.2
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=1e-3, atol=0)
    if found.source_weight is not None:
        assert (found.source_weight.double() - truth.weights[torch.arange(4), index]).abs().max() < 1e-3


# Without a look the repair is one product in float64, whose digits end where data are 1e6 sigma apart.
@pytest.mark.parametrize(("reads", "offset", "sigma"), [(True, 1e4, 1e-3), (False, 1e2, 1e-2)])
def test_a_few_samples_near_zero_keep_their_digits_beside_many_far_from_it(
    reads: bool, offset: float, sigma: float, rng: torch.Generator, exact: Callable
) -> None:
    y = offset + torch.randn(40, *SHAPE, generator=rng)
    y[4:8] = sigma * torch.randn(4, *SHAPE, generator=rng)
    y[6:8] = y[4:6] + sigma / DIM**0.5 * torch.randn(2, *SHAPE, generator=rng)
    x_t = y[4:6] + sigma * torch.randn(2, *SHAPE, generator=rng)
    truth = exact(x_t, 1.0, sigma, y)
    with mock.patch("stablefield.targets._engine.query._shares_memory", return_value=reads):
        found = sf.posterior(x_t, 1.0, sigma, y, torch.tensor([4, 5]))
    assert ReferenceMatrix(y).norms(torch.float32).origin is not None
    assert truth.ess.max() > 1.2
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=1e-3, atol=0)


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_a_tiny_variance_keeps_its_digits(
    spread: float, with_source: bool, rng: torch.Generator, exact: Callable
) -> None:
    # Near-duplicates at a tenth of sigma and farther, among samples of any spread; without an offset, too.
    for offset in (0.0, 0.3, 1e3):
        for distance in (0.1, 1.0, 4.0):
            sigma = 0.01
            y = offset + spread * torch.randn(40, DIM, generator=rng)
            step = torch.nn.functional.normalize(torch.randn(DIM, generator=rng), dim=0)
            y[1] = y[0] + distance * sigma * step
            x_t = (y[:1].double() + sigma * torch.randn(1, DIM, generator=rng, dtype=torch.float64)).float()
            truth = exact(x_t, 1.0, sigma, y)
            found = sf.posterior(x_t, 1.0, sigma, y, torch.zeros(1).long() if with_source else None)
            size = max(spread * DIM**0.5, sigma)
            gap = (found.variance.double() - truth.variance).abs()
            assert (gap <= variance_bound(truth.variance, sigma, size)).all(), (offset, distance)


def test_the_variance_beside_a_source_of_nearly_all_the_weight_is_right_relative_to_itself(
    rng: torch.Generator, exact: Callable
) -> None:
    y = torch.rand(40, DIM, generator=rng) * 2 - 1
    step = torch.nn.functional.normalize(torch.randn(6, DIM, generator=rng), dim=1)
    sigma = 0.1
    for distance in (4.0, 5.0, 6.0, 7.0):
        y[6:12] = y[:6] + distance * sigma * step
        x_t = y[:6] + 0.3 * sigma * torch.randn(6, DIM, generator=rng)
        truth = exact(x_t, 1.0, sigma, y)
        found = sf.posterior(x_t, 1.0, sigma, y, torch.arange(6))
        lost = 1 - truth.weights.diagonal()
        assert lost.max() < 1e-2
        # An ulp of |y|^2 would be 1e-4. What weighs less than float32 sees beside 1 is left out.
        some = lost > 6e-8
        torch.testing.assert_close(found.variance.double()[some], truth.variance[some], rtol=1e-5, atol=0)
        assert (found.variance >= 0).all()
        assert (found.variance <= 1.001 * truth.variance).all()


def test_shards_with_origins_of_their_own_merge(rng: torch.Generator, exact: Callable) -> None:
    # As ranks do: sums about the same anchors, over parts whose middles differ.
    y = data("offset 1e4", rng, 0.01)
    y[26:] += 7
    parts = [y[:6], y[6:26], y[26:]]
    x_t = (y[:B].double() + 0.01 * torch.randn(B, *SHAPE, generator=rng, dtype=torch.float64)).float()
    one = torch.ones(B, dtype=torch.float64)
    parts_summed, origins, first = [], [], 0
    for part in parts:
        matrix = ReferenceMatrix(part)
        plan = Plan(matrix=matrix, host=Host.READS, kernel=GaussianKernel(), chunk_size=5)
        place = torch.arange(B) if first == 0 else torch.full((B,), -1)
        # With a level at hand, the values of the query count as checked.
        query = Query(x_t=x_t, alpha=one, sigma=0.01 * one, source=place, anchor=y[:B], levels=100 * one)
        parts_summed.append(summed(query.checked(plan), plan))
        origins.append(matrix.norms(torch.float32).origin)
        first += len(part)
    own, *others = parts_summed  # the first part holds the sources
    merged = own.softmax
    for other in others:
        merged = merged.merge(other.softmax)
    assert not torch.equal(origins[0], origins[1])
    check(replace(own, softmax=merged).posterior(), exact(x_t, 1.0, 0.01, y), y, 0.01)


def test_far_images_of_bytes_need_no_origin(rng: torch.Generator, exact: Callable) -> None:
    # Nearly white: as far from zero as bytes can be, and steps of 1/127.5 apart.
    images = torch.full((40, *SHAPE), 250, dtype=torch.uint8)
    images[:, 0, 0, :20] = torch.randint(250, 256, (40, 20), generator=rng, dtype=torch.uint8)
    y = images.double() / 127.5 - 1
    x_t = (y[:B] + 0.02 * torch.randn(B, *SHAPE, generator=rng, dtype=torch.float64)).float()
    truth = exact(x_t, 1.0, 0.02, y)
    found = sf.posterior(x_t, 1.0, 0.02, images, torch.arange(B))
    assert ReferenceMatrix(images).norms(torch.float32).origin is None
    assert truth.ess.max() > 1.2
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.variance.double(), truth.variance, rtol=1e-3, atol=0)


def test_only_what_is_far_from_zero_is_moved(rng: torch.Generator, smooth_images: Callable) -> None:
    images = smooth_images(40, rng)
    for near in (images, images + 1, (images + 1) * 127.5, torch.randn(40, 5), torch.zeros(4, 2), torch.zeros(3, 0)):
        assert ReferenceMatrix(near).norms(torch.float32).origin is None
    outlier = torch.randn(40, 8, generator=rng)
    outlier[0] = 1e6
    assert ReferenceMatrix(outlier).norms(torch.float32).origin is None
    for kind in FAR[:-1]:
        y = data(kind, rng, 0.01)
        origin = ReferenceMatrix(y).norms(torch.float32).origin
        assert origin is not None
        assert (y.flatten(1) - origin).norm(dim=1).median() < 0.3 * y.flatten(1).norm(dim=1).median()
