"""What the posterior must not depend on: chunks, order, precision, memory layout, the clock; and its limits."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import stablefield as sf

FIELDS = ("mean", "variance", "ess", "source_weight", "log_evidence")


def case(rng: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x_t, alpha, sigma, references, source): 6 rows of noise level 0.3 to 30 over 23 references of shape (3, 4)."""
    y = torch.randn(23, 3, 4, generator=rng, dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.2, 0.05], dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.6, 0.7, 0.9, 1.0, 1.5], dtype=torch.float64)
    source = torch.tensor([3, 22, 0, 3, 11, 7])
    x_t = alpha[:, None, None] * y[source] + sigma[:, None, None] * torch.randn(
        6, 3, 4, generator=rng, dtype=torch.float64
    )
    return x_t.to(dtype), alpha, sigma, y.to(dtype), source


def assert_same(a: sf.Posterior, b: sf.Posterior, rtol: float) -> None:
    for name in FIELDS:
        # The variance is a difference of two numbers of the size of |y|^2, 30 here.
        atol = 100 * rtol if name == "variance" else rtol
        torch.testing.assert_close(
            getattr(a, name),
            getattr(b, name),
            rtol=rtol,
            atol=atol,
            check_dtype=False,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("kernel", [None, sf.StudentTKernel(4.0)])
@pytest.mark.parametrize("size", [1, 2, 7, 22, 23, 1000])
def test_chunks_do_not_matter(rng: torch.Generator, size: int, kernel: sf.StudentTKernel | None) -> None:
    x_t, alpha, sigma, y, source = case(rng)
    log_prior = torch.randn(23, generator=rng, dtype=torch.float64)
    labels, reference_labels = torch.tensor([0, 1, -1, 0, 1, -1]), torch.tensor([0, 1] * 11 + [1])
    reference_labels[source[:2]] = torch.tensor([0, 1])
    reference_labels[source[3:5]] = torch.tensor([0, 1])
    arguments = (x_t, alpha, sigma, y, source, labels, reference_labels, log_prior)
    assert_same(sf.posterior(*arguments, size, kernel), sf.posterior(*arguments, None, kernel), 1e-12)


def test_chunks_do_not_matter_in_float32_at_small_noise(rng: torch.Generator) -> None:
    y = torch.randn(40, 64, generator=rng)
    y[20:] = y[:20] + 0.02 * torch.randn(20, 64, generator=rng) / 8
    x_t = y[:20] + 0.02 * torch.randn(20, 64, generator=rng)
    whole = sf.posterior(x_t, 1.0, 0.02, y)
    for size in (1, 3, 20, 39):
        parts = sf.posterior(x_t, 1.0, 0.02, y, chunk_size=size)
        torch.testing.assert_close(parts.mean, whole.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(parts.ess, whole.ess, rtol=1e-4, atol=0)


def test_the_order_of_references_does_not_matter(rng: torch.Generator) -> None:
    x_t, alpha, sigma, y, source = case(rng)
    order = torch.randperm(23, generator=rng)
    shuffled = sf.posterior(x_t, alpha, sigma, y[order], order.argsort()[source])
    assert_same(shuffled, sf.posterior(x_t, alpha, sigma, y, source), 1e-12)


def test_rows_do_not_see_each_other(rng: torch.Generator) -> None:
    x_t, alpha, sigma, y, source = case(rng)
    whole = sf.posterior(x_t, alpha, sigma, y, source)
    for row in range(6):
        one = slice(row, row + 1)
        source_only = sf.posterior(x_t[one], alpha[row].item(), sigma[row].item(), y, source[one])
        torch.testing.assert_close(source_only.mean, whole.mean[one], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(source_only.log_evidence, whole.log_evidence[one], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions_give_the_float64_answer_for_the_same_numbers(
    rng: torch.Generator, dtype: torch.dtype
) -> None:
    x_t, alpha, sigma, y, source = case(rng, dtype)
    found = sf.posterior(x_t, alpha, sigma, y, source)
    truth = sf.posterior(x_t.double(), alpha, sigma, y.double(), source)
    assert found.mean.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.mean.double(), truth.mean, rtol=eps, atol=max(eps * 1e-3, 1e-6))
    for name in FIELDS[1:]:
        assert getattr(found, name).dtype == torch.float32
        atol = 2e-5 if name == "variance" else 1e-6  # an ulp of |y|^2, 30 here, is 2e-6
        torch.testing.assert_close(getattr(found, name).double(), getattr(truth, name), rtol=3e-6, atol=atol)


def test_either_side_in_float64_makes_the_computation_float64(rng: torch.Generator, exact: Callable) -> None:
    x_t, alpha, sigma, y, _ = case(rng, torch.float32)
    truth = exact(x_t, alpha, sigma, y)
    for left, right in ((x_t.double(), y), (x_t, y.double())):
        found = sf.posterior(left, alpha, sigma, right)
        assert found.log_evidence.dtype == torch.float64
        torch.testing.assert_close(found.log_evidence, truth.log_evidence, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uint8_references_are_their_float_values(rng: torch.Generator, dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (17, 3, 4, 4), generator=rng, dtype=torch.uint8)
    images[0], images[1] = 0, 255
    values = images.to(dtype) / 127.5 - 1
    assert values.min() == -1
    assert values.max() == 1
    source = torch.tensor([0, 1, 5])
    x_t = values[source] + 0.4 * torch.randn(3, 3, 4, 4, generator=rng, dtype=dtype)
    for size in (None, 5):
        a = sf.posterior(x_t, 1.0, 0.4, images, source, chunk_size=size)
        b = sf.posterior(x_t, 1.0, 0.4, values, source, chunk_size=size)
        for name in FIELDS:
            # The decoder rounds once where `values` are rounded twice.
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=2e-5, atol=1e-6)


def test_memory_layout_does_not_matter(rng: torch.Generator) -> None:
    y = torch.randn(12, 3, 8, 8, generator=rng)
    x_t = y[:4] + torch.randn(4, 3, 8, 8, generator=rng)
    plain = sf.posterior(x_t, 1.0, 1.0, y, torch.arange(4))
    last = torch.channels_last
    twice = torch.stack([y, -y], 1).flatten(0, 1)
    wide = torch.stack([x_t, -x_t], -1)
    layouts = {
        "channels_last": (x_t.contiguous(memory_format=last), y.contiguous(memory_format=last)),
        "strided": (wide[..., 0], twice[::2]),
        "transposed": (
            x_t.transpose(2, 3).contiguous().transpose(2, 3),
            y.transpose(1, 3).contiguous().transpose(1, 3),
        ),
        "expanded batch": (x_t, y.unsqueeze(0).expand(2, *y.shape)[1]),
    }
    for layout, (a, b) in layouts.items():
        found = sf.posterior(a, 1.0, 1.0, b, torch.arange(4), chunk_size=5)
        torch.testing.assert_close(found.mean, plain.mean, rtol=1e-5, atol=1e-6, msg=layout)
        assert found.mean.shape == x_t.shape


def test_ve_vp_and_flow_are_one_computation_at_equal_noise_level(rng: torch.Generator) -> None:
    x0 = torch.randn(9, 2, 3, generator=rng, dtype=torch.float64)
    noise = torch.randn(9, 2, 3, generator=rng, dtype=torch.float64)
    level = torch.logspace(-1.5, 1.5, 9, dtype=torch.float64)
    truth = None
    for process in (sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()):
        t = process.time(level)
        target = sf.StableTarget(process, references=sf.InBatch())(x0, process.perturb(x0, t, noise), t)
        truth = truth or target
        for name in ("x0", "noise", "variance", "ess", "source_weight"):
            torch.testing.assert_close(getattr(target, name), getattr(truth, name), rtol=1e-9, atol=1e-12)
    assert truth is not None
    assert truth.ess.max() > 5
    assert truth.ess.min() < 1.01


# Limits.


@pytest.mark.parametrize("alpha", [0.0, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_source", [True, False])
def test_without_signal_the_posterior_is_the_prior(
    rng: torch.Generator, alpha: float, dtype: torch.dtype, with_source: bool
) -> None:
    y = torch.randn(7, 5, generator=rng, dtype=dtype)
    x_t = 1.3 * torch.randn(3, 5, generator=rng, dtype=dtype)
    log_prior = torch.randn(7, generator=rng, dtype=torch.float64)
    source = torch.tensor([0, 6, 2]) if with_source else None
    found = sf.posterior(x_t, alpha, 1.3, y, source, log_prior=log_prior)
    prior = log_prior.softmax(0)
    mean = (prior[:, None] * y).sum(0)
    tight = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.mean.double(), mean.expand(3, 5), **tight)
    torch.testing.assert_close(found.ess.double(), (1 / prior.square().sum()).expand(3), **tight)
    torch.testing.assert_close(found.variance.double(), (prior * (y - mean).square().sum(1)).sum().expand(3), **tight)
    density = -x_t.double().square().sum(1) / (2 * 1.69) - 2.5 * math.log(2 * math.pi * 1.69)
    torch.testing.assert_close(found.log_evidence.double(), density, **tight)


@pytest.mark.parametrize("sigma", [1e4, 1e8, 1e15])
def test_at_unbounded_noise_the_posterior_is_the_prior(rng: torch.Generator, sigma: float) -> None:
    y = torch.randn(7, 5, generator=rng)
    source = torch.tensor([0, 6, 2])
    x_t = y[source] + sigma * torch.randn(3, 5, generator=rng)
    for given in (None, source):
        found = sf.posterior(x_t, 1.0, sigma, y, given)
        torch.testing.assert_close(found.mean, y.mean(0).expand(3, 5), rtol=0, atol=20 / sigma + 1e-6)
        torch.testing.assert_close(found.ess, torch.full((3,), 7.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sigma", [1e-2, 1e-4, 1e-8, 1e-15])
@pytest.mark.parametrize("with_source", [True, False])
def test_without_noise_the_posterior_is_the_source(rng: torch.Generator, sigma: float, with_source: bool) -> None:
    y = torch.randn(50, 64, generator=rng)
    source = torch.arange(0, 50, 5)
    x_t = y[source] + sigma * torch.randn(10, 64, generator=rng)
    found = sf.posterior(x_t, 1.0, sigma, y, source if with_source else None)
    assert torch.equal(found.mean, y[source])
    assert torch.equal(found.ess, torch.ones(10))
    if with_source:
        assert found.source_weight is not None
        assert torch.equal(found.source_weight, torch.ones(10))


@pytest.mark.parametrize("sigma", [1e-20, 1e-30])
def test_noise_so_small_that_its_square_leaves_float32_still_gives_the_source(
    rng: torch.Generator, sigma: float
) -> None:
    y = torch.randn(5, 3, generator=rng)
    found = sf.posterior(y, 1.0, sigma, y, torch.arange(5))
    assert torch.equal(found.mean, y)
    assert torch.isfinite(found.log_evidence).all()
