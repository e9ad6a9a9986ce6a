"""What holds for every posterior: bounds, over shapes and values that hypothesis thinks of."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stablefield as sf


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, allow_nan=False, allow_subnormal=False)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Arguments of `posterior`: any shapes, values, noise levels, sources, groups and priors."""
    batch, n = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    shape = draw(st.sampled_from([(1,), (3,), (2, 2), (1, 2, 2)]))
    size = torch.Size(shape).numel()
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))

    def tensor(rows: int, bound: float) -> torch.Tensor:
        values = draw(st.lists(floats(-bound, bound), min_size=rows * size, max_size=rows * size))
        return torch.tensor(values, dtype=dtype).reshape(rows, *shape)

    case = {"references": tensor(n, 100.0)}
    exponent = draw(floats(-3, 3))
    case["sigma"] = 10.0**exponent
    case["alpha"] = draw(floats(0.0, 2.0))
    source = torch.tensor(draw(st.lists(st.integers(0, n - 1), min_size=batch, max_size=batch)))
    noise = tensor(batch, 4.0)
    case["x_t"] = case["alpha"] * case["references"][source] + case["sigma"] * noise
    if draw(st.booleans()):
        case["source"] = source
    if draw(st.booleans()):
        case["reference_labels"] = torch.tensor(draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n)))
        dropped = torch.tensor(draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
        case["labels"] = torch.where(dropped, -1, case["reference_labels"][source])
    if draw(st.booleans()):
        case["log_prior"] = torch.tensor(draw(st.lists(floats(-20, 20), min_size=n, max_size=n)))
    case["chunk_size"] = draw(st.sampled_from([None, 1, 2]))
    case["kernel"] = draw(st.sampled_from([None, sf.StudentTKernel(2.0)]))
    return case


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_the_posterior_stays_within_its_bounds(case: dict) -> None:
    found = sf.posterior(**case)
    y, dtype = case["references"], case["references"].dtype
    n, eps = len(y), torch.finfo(dtype).eps
    for value in (found.mean, found.variance, found.ess, found.log_evidence):
        assert torch.isfinite(value).all()
    assert (found.variance >= 0).all()
    # At most a quarter of the squared diameter of the references, by Popoviciu's inequality in each coordinate.
    low, high = y.amin(0), y.amax(0)
    rounding = 16 * eps * y.flatten(1).square().sum(1).max()
    assert (found.variance <= (high - low).square().sum() / 4 * (1 + 1e-5) + rounding).all()
    assert (found.ess >= 1).all()
    assert (found.ess <= n * (1 + 2 * eps)).all()
    slack = 8 * eps * y.abs().amax(0)
    assert ((found.mean >= low - slack) & (found.mean <= high + slack)).all()
    if "source" in case:
        assert found.source_weight is not None
        assert (found.source_weight >= 0).all()
        assert (found.source_weight <= 1).all()
        # 1 / ess = sum of w^2 lies between w^2 of the source and that plus (1 - w)^2.
        w = found.source_weight.double()
        assert (1 / found.ess.double() >= w**2 * (1 - 1e-5)).all()
        assert (1 / found.ess.double() <= (w**2 + (1 - w) ** 2) * (1 + 1e-5) + 1e-7).all()
    else:
        assert found.source_weight is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_the_mean_is_that_of_the_definition_in_float64(case: dict) -> None:
    case = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in case.items()
    }
    found = sf.posterior(**case)
    x, y = case["x_t"].flatten(1), case["references"].flatten(1)
    square = (x[:, None] - case["alpha"] * y).square().sum(2)
    kernel = case["kernel"] or sf.GaussianKernel()
    logits = kernel.log_density(square, torch.tensor(case["sigma"], dtype=torch.float64), x.shape[1])
    logits = logits + case.get("log_prior", torch.zeros(len(y), dtype=torch.float64))
    if "labels" in case:
        allowed = (case["labels"][:, None] == case["reference_labels"]) | (case["labels"][:, None] == -1)
        logits = logits.masked_fill(~allowed, -torch.inf)
    # The definition itself rounds: a logit is a sum of squares over sigma^2, each known to an ulp.
    noise_level = case["alpha"] * y.abs().max() + x.abs().max()
    error = float(64 * 2.2e-16 * (noise_level / case["sigma"]) ** 2 * x.shape[1])
    mean = logits.softmax(1) @ y
    atol = 1e-9 + 100 * min(1.0, error)
    torch.testing.assert_close(found.mean.flatten(1), mean, rtol=1e-9, atol=atol)
