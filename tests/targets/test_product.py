"""The products of the engine: right to their stated bound wherever they are made, and equal in every way but rounding."""

from collections.abc import Callable

import pytest
import torch

from stablefield.targets.product import ULPS, inner, weighted

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["oneDNN", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr("stablefield.targets.product._find", lambda: None)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dim", [64, 784, 3072, 12288])
@pytest.mark.parametrize("kind", ["images", "positive", "constant"])
def test_errors_keep_to_the_stated_bound(kind: str, dim: int, rng: torch.Generator) -> None:
    y = torch.rand(512, dim, generator=rng)
    y = {"images": 2 * y - 1, "positive": y, "constant": 0.37 + 0.01 * y}[kind]
    # Rows with themselves: all terms have one sign, so that what is rounded is largest.
    x = y[:64] + 0.001 * torch.randn(64, dim, generator=rng)
    truth = x.double() @ y.double().T
    norms = x.double().norm(dim=1)[:, None] * y.double().norm(dim=1)
    error = ((inner(x, y) - truth) / norms).abs().max()
    assert 0 < error < ULPS * EPS


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("batch", [1, 3, 4, 23, 64])
@pytest.mark.parametrize("count", [1, 37, 682])
def test_products_have_their_values_for_any_shape(batch: int, count: int, rng: torch.Generator) -> None:
    x, rows = torch.randn(batch, 3072, generator=rng), torch.randn(count, 3072, generator=rng)
    weights = torch.rand(batch, count, generator=rng)
    torch.testing.assert_close(inner(x, rows).double(), x.double() @ rows.double().T, rtol=0, atol=2e-3)
    torch.testing.assert_close(weighted(weights, rows).double(), weights.double() @ rows.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("product", [inner, lambda x, y: weighted(x[:, :600].contiguous(), y[:600])])
def test_float64_stays_float64(product: Callable, rng: torch.Generator) -> None:
    x = torch.randn(64, 3072, generator=rng, dtype=torch.float64)
    y = torch.randn(682, 3072, generator=rng, dtype=torch.float64)
    assert product(x, y).dtype == torch.float64


def test_results_do_not_share_memory_with_what_they_are_made_of(rng: torch.Generator) -> None:
    x, rows = torch.randn(24, 3072, generator=rng), torch.randn(682, 3072, generator=rng)
    first = inner(x, rows)
    kept = first.clone()
    inner(x + 1, rows).zero_()
    assert torch.equal(first, kept)
