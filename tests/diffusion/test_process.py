"""Processes: derivatives, inverses, identities and accuracy, each against something that is not the code."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import stablefield as sf

CONTINUOUS = [sf.EDM(), sf.VE(), sf.VP(), sf.VP(beta_min=0.5, beta_max=8.0), sf.Cosine(), sf.RectifiedFlow()]
# Times near both ends and between, exact in float32, so that both precisions are asked the same question.
TIMES = torch.cat(
    [torch.logspace(-6, -1, 40), torch.linspace(0.1, 0.9, 41), 1 - torch.logspace(-1, -6, 40), torch.tensor([0.5])]
).float()

each_process = pytest.mark.parametrize("process", CONTINUOUS, ids=repr)


# The definitions, in float64 and as the papers write them.
DEFINITIONS = {
    sf.EDM(): (lambda t: 1.0, lambda t: t),
    sf.VE(0.02, 100.0): (lambda t: 1.0, lambda t: 0.02 * (100.0 / 0.02) ** t),
    sf.VP(0.1, 20.0): (
        lambda t: math.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1),
        lambda t: math.sqrt(1 - math.exp(-0.5 * t**2 * 19.9 - t * 0.1)),
    ),
    sf.Cosine(): (lambda t: math.cos(math.pi * t / 2), lambda t: math.sin(math.pi * t / 2)),
    sf.RectifiedFlow(): (lambda t: 1 - t, lambda t: t),
}


@pytest.mark.parametrize("process", DEFINITIONS, ids=repr)
def test_alpha_and_sigma_are_those_of_the_papers(process: sf.Process) -> None:
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    for function, definition in zip((process.alpha, process.sigma), DEFINITIONS[process], strict=True):
        expected = torch.tensor([definition(value) for value in t.tolist()], dtype=torch.float64)
        torch.testing.assert_close(function(t), expected, rtol=1e-12, atol=1e-14)


@each_process
def test_derivatives_are_those_of_finite_differences(process: sf.Process) -> None:
    t = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    step = 1e-4
    for function, derivative in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        # Central differences of order four: an error of about step^4 times the fifth derivative.
        near, far = (function(t + k * step) - function(t - k * step) for k in (1, 2))
        measured = (8 * near - far) / (12 * step)
        torch.testing.assert_close(derivative(t), measured, rtol=1e-8, atol=1e-9)


@each_process
@pytest.mark.parametrize("name", ["alpha", "sigma", "alpha_dot", "sigma_dot", "noise_level"])
def test_float32_keeps_its_relative_accuracy_at_both_ends(process: sf.Process, name: str) -> None:
    function = getattr(process, name)
    narrow, wide = function(TIMES), function(TIMES.double())
    assert narrow.dtype == torch.float32
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=2e-6, atol=0)


@each_process
def test_float64_keeps_its_relative_accuracy_at_both_ends(process: sf.Process) -> None:
    # Against 60 digits.
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    t = TIMES.double()

    def beta_integral(u, low, high):
        return (mpmath.mpf(high) - low) * u**2 / 2 + mpmath.mpf(low) * u

    def level(u):
        match process:
            case sf.VE():
                return mpmath.mpf(process.sigma_min) * (mpmath.mpf(process.sigma_max) / process.sigma_min) ** u
            case sf.VP():
                return mpmath.sqrt(mpmath.expm1(beta_integral(u, process.beta_min, process.beta_max)))
            case sf.Cosine():
                return mpmath.tan(mpmath.pi * u / 2)
            case sf.RectifiedFlow():
                return u / (1 - u)
            case _:
                return u

    expected = torch.tensor([float(level(mpmath.mpf(value))) for value in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(process.noise_level(t), expected, rtol=1e-13, atol=0)


@each_process
def test_the_noise_level_is_sigma_over_alpha_and_grows(process: sf.Process) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    level = process.noise_level(t)
    torch.testing.assert_close(level, process.sigma(t) / process.alpha(t), rtol=1e-12, atol=0)
    assert (level.diff() > 0).all()


@each_process
def test_time_is_the_inverse_of_the_noise_level(process: sf.Process) -> None:
    t = TIMES.double()
    torch.testing.assert_close(process.time(process.noise_level(t)), t, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(process.time(process.noise_level(TIMES)), TIMES, rtol=1e-5, atol=5e-7)
    level = torch.logspace(-4, 2, 61, dtype=torch.float64)
    torch.testing.assert_close(process.noise_level(process.time(level)), level, rtol=1e-10, atol=0)


@pytest.mark.parametrize("process", [sf.VP(), sf.Cosine(), sf.RectifiedFlow(), sf.EDM()], ids=repr)
def test_small_noise_levels_keep_their_relative_accuracy_in_float32(process: sf.Process) -> None:
    level = torch.logspace(-6, 2, 81)
    torch.testing.assert_close(process.time(level).double(), process.time(level.double()), rtol=2e-6, atol=0)


@pytest.mark.parametrize("process", [sf.VP(), sf.VP(beta_min=0.5, beta_max=8.0), sf.Cosine()], ids=repr)
def test_variance_is_preserved(process: sf.Process) -> None:
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    square = process.alpha(t) ** 2 + process.sigma(t) ** 2
    torch.testing.assert_close(square, torch.ones_like(t), rtol=0, atol=1e-15)


def test_the_ends_of_the_clock_are_exact() -> None:
    ends = torch.tensor([0.0, 1.0])
    flow, cosine, ve, vp = sf.RectifiedFlow(), sf.Cosine(), sf.VE(0.02, 100.0), sf.VP()
    assert flow.alpha(ends).tolist() == [1, 0]
    assert flow.sigma(ends).tolist() == [0, 1]
    assert cosine.alpha(ends).tolist() == [1, 0]
    assert cosine.sigma(ends).tolist() == [0, 1]
    assert vp.alpha(ends)[0] == 1
    assert vp.sigma(ends)[0] == 0
    torch.testing.assert_close(
        ve.sigma(ends.double()), torch.tensor([0.02, 100.0], dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert flow.time(torch.tensor([0.0, math.inf])).tolist() == [0, 1]


@each_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_shape_and_dtype_of_the_time(process: sf.Process, dtype: torch.dtype) -> None:
    for t in (torch.tensor(0.3, dtype=dtype), torch.full((2, 3), 0.3, dtype=dtype)):
        names = ("alpha", "sigma", "alpha_dot", "sigma_dot", "noise_level", "time")
        for value in (getattr(process, name)(t) for name in names):
            assert value.shape == t.shape
            assert value.dtype == dtype


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sf.VE(sigma_min=0.0), r"VE\(sigma_min=0\.0, sigma_max=100\.0\)"),
        (lambda: sf.VE(sigma_min=1.0, sigma_max=1.0), "sigma_min < sigma_max must hold"),
        (lambda: sf.VE(sigma_max=math.inf), "sigma_max=inf"),
        (lambda: sf.VE(sigma_min=math.nan), "sigma_min=nan"),
        (lambda: sf.VP(beta_min=-0.1), r"VP\(beta_min=-0\.1, beta_max=20\.0\)"),
        (lambda: sf.VP(beta_min=3.0, beta_max=2.0), "beta_min < beta_max must hold"),
        (lambda: sf.VP(beta_max=math.inf), "beta_max=inf"),
    ],
)
def test_impossible_schedules_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Perturbation.


@each_process
def test_perturb_is_the_affine_map_of_the_given_noise(process: sf.Process, rng: torch.Generator) -> None:
    x0, noise = torch.randn(2, 4, 2, 3, generator=rng, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    found = process.perturb(x0, t, noise)
    for row in range(4):
        expected = process.alpha(t)[row] * x0[row] + process.sigma(t)[row] * noise[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(process.perturb(x0, 0.4, noise)[1], found[1], rtol=1e-15, atol=1e-15)


@each_process
def test_perturb_draws_noise_of_mean_zero_and_scale_sigma(process: sf.Process, rng: torch.Generator) -> None:
    t = torch.tensor(0.4, dtype=torch.float64)
    x0 = torch.tensor([3.0, -1.0], dtype=torch.float64).repeat(20000, 1)
    x_t = process.perturb(x0, t, generator=rng)
    alpha, sigma = process.alpha(t), process.sigma(t)
    z = (x_t - alpha * x0) / sigma
    assert (z.mean(0).abs() < 4 / 20000**0.5).all()
    assert ((z.var(0) - 1).abs() < 4 * (2 / 20000) ** 0.5).all()
    assert abs((z[:, 0] * z[:, 1]).mean()) < 4 / 20000**0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / 40000) ** 0.5


def test_perturb_draws_from_the_generator_alone() -> None:
    x0 = torch.zeros(3, 4)

    def draw(seed: int) -> Tensor:
        return sf.EDM().perturb(x0, 1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise_dtype", [None, torch.float32, torch.float64])
def test_perturb_keeps_the_dtype_of_the_data(x_dtype, t_dtype, noise_dtype) -> None:
    x0 = torch.zeros(3, 4, dtype=x_dtype)
    noise = None if noise_dtype is None else torch.ones(3, 4, dtype=noise_dtype)
    assert sf.VP().perturb(x0, torch.full((3,), 0.5, dtype=t_dtype), noise).dtype == x_dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(3, 4, dtype=torch.uint8)}, r"x0 has dtype torch\.uint8.*127\.5"),
        ({"x0": torch.zeros(3, 4, dtype=torch.long)}, r"x0 has dtype torch\.int64"),
        ({"noise": torch.zeros(3, 5)}, r"noise has shape \(3, 5\), x0 has \(3, 4\)"),
        ({"noise": torch.zeros(4)}, r"noise has shape \(4,\)"),
        ({"t": torch.zeros(4)}, r"t has shape \(4,\).*3 rows"),
        ({"t": torch.zeros(3, 1)}, r"t has shape \(3, 1\).*one per row"),
        ({"t": torch.zeros(3, device="meta")}, r"t is on meta.*move"),
    ],
)
def test_perturb_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.VP().perturb(**({"x0": torch.zeros(3, 4), "t": 0.5} | change))


# The discrete process.


def ddpm() -> Tensor:
    """The table of DDPM: 1,000 steps, beta from 1e-4 to 0.02."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def test_the_discrete_process_is_its_table() -> None:
    table = ddpm()
    process = sf.Discrete(table.float())  # diffusers keeps float32
    for t in (torch.tensor([0, 17, 999]), torch.tensor([0.0, 17.0, 999.0]), torch.tensor([[5], [6]])):
        alpha, sigma = process.alpha(t), process.sigma(t)
        assert alpha.shape == t.shape
        assert alpha.dtype == sigma.dtype == torch.float32
        entry = table.float().double()[t.long()]
        torch.testing.assert_close(alpha.double(), entry.sqrt(), rtol=2e-7, atol=0)
        torch.testing.assert_close(sigma.double(), (1 - entry).sqrt(), rtol=2e-7, atol=0)
        torch.testing.assert_close(process.noise_level(t).double(), (1 / entry - 1).sqrt(), rtol=5e-7, atol=0)
    assert process.alpha(torch.tensor([3.0], dtype=torch.float64)).dtype == torch.float64


def test_the_discrete_time_is_the_nearest_step_in_logarithms() -> None:
    process, table = sf.Discrete(ddpm()), ddpm()
    t = torch.arange(1000)
    level = ((1 - table) / table).sqrt()
    assert torch.equal(process.time(level), t)
    assert torch.equal(process.time(process.noise_level(t)), t)
    between = (level[:-1].log() * 0.7 + level[1:].log() * 0.3).exp()
    assert torch.equal(process.time(between), t[:-1])
    assert process.time(torch.tensor([[1e-9, 1e9]])).tolist() == [[0, 999]]


def test_the_discrete_process_perturbs_by_its_table(rng: torch.Generator) -> None:
    table = ddpm()
    x0, noise = torch.randn(2, 3, 4, generator=rng)
    t = torch.tensor([0, 500, 999])
    expected = table[t].sqrt()[:, None] * x0.double() + (1 - table[t]).sqrt()[:, None] * noise.double()
    found = sf.Discrete(table).perturb(x0, t, noise)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert repr(sf.Discrete(table)) == "Discrete(<1000 steps>)"


@pytest.mark.parametrize("t", [[0.5], [-1], [1000], [3, 1000], [float("nan")]])
def test_the_discrete_process_refuses_what_is_no_step(t: list[float]) -> None:
    with pytest.raises(ValueError, match="whole step numbers from 0 to 999"):
        sf.Discrete(ddpm()).alpha(torch.tensor(t))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.ones(2, 3) / 2, r"alphas_cumprod has shape \(2, 3\)"),
        (torch.tensor([]), r"alphas_cumprod has shape \(0,\)"),
        (torch.linspace(1e-4, 0.02, 10), "must decrease strictly.*not the betas"),
        (torch.tensor([1.0, 0.5]), "between 0 and 1"),
        (torch.tensor([0.5, 0.0, 0.0]), "only the last step may have no signal.*cut the table there"),
        (torch.tensor([0.5, -0.1]), "between 0 and 1"),
        (torch.tensor([0.5, 0.5]), "decrease strictly"),
        (torch.tensor([0.5, float("nan")]), "between 0 and 1"),
        (torch.tensor([0.9, 0.5, 1.2]), r"alphas_cumprod\[2\] is 1.2: .*the cumulative products themselves"),
        (torch.tensor([0.9, 0.4, 0.5, 0.1]), r"alphas_cumprod\[1\] is 0.4 and the next 0.5"),
    ],
)
def test_the_discrete_process_refuses_what_is_no_table(table: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.Discrete(table)


def test_the_last_step_of_the_discrete_process_may_be_without_signal(rng: torch.Generator) -> None:
    process = sf.Discrete(torch.tensor([0.9, 0.5, 0.0]))
    t = torch.tensor([0, 1, 2])
    assert process.alpha(t)[2] == 0
    assert process.sigma(t)[2] == 1
    assert process.noise_level(t)[2] == torch.inf
    x0, noise = torch.randn(2, 3, 4, generator=rng)
    assert torch.equal(process.perturb(x0, t, noise)[2], noise[2])
    # The inverse, at both ends too: the last step is as far from every finite level as from any other.
    levels = torch.tensor([0.0, 1 / 3, 1.0, 1e30, torch.inf])
    assert process.time(levels).tolist() == [0, 0, 1, 1, 2]
    assert sf.Discrete(torch.tensor([0.9, 0.5, 0.1])).time(levels).tolist() == [0, 0, 1, 2, 2]
    # A target there is the mean over the references, and what the network is to say is a view of it.
    target = sf.StableTarget(process, references=sf.InBatch())(x0, process.perturb(x0, t, noise), t, noise=noise)
    torch.testing.assert_close(target.x0[2], x0.mean(0))
    torch.testing.assert_close(target.v[2], -x0.mean(0))


@pytest.mark.parametrize("table", ["abc", None, torch.zeros(3, dtype=torch.complex64), [[0.9], [0.8, 0.7]], {1: 0.5}])
def test_a_table_of_another_type_is_named(table: object) -> None:
    with pytest.raises(TypeError, match=r"alphas_cumprod (is|has) .*: pass .*\.$"):
        sf.Discrete(table)


def test_the_discrete_process_has_no_derivative() -> None:
    for name in ("alpha_dot", "sigma_dot"):
        with pytest.raises(ValueError, match="no time derivative: regress on noise"):
            getattr(sf.Discrete(ddpm()), name)(torch.tensor([3]))


class Own(sf.Process):
    """The variance-preserving path of a quarter circle, by its scales alone."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def time(self, noise_level: Tensor) -> Tensor:
        return torch.atan(noise_level) / (0.5 * math.pi)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_process_of_scales_alone_has_their_derivatives(mode: Callable[[], Any], rng: torch.Generator) -> None:
    t = torch.rand(16, generator=rng, dtype=torch.float64) * 0.9 + 0.05
    with mode():
        found = Own().alpha_dot(t), Own().sigma_dot(t)
        x0, noise = torch.randn(2, 16, 3, generator=rng, dtype=torch.float64)
        x_t = Own().perturb(x0, t, noise)
        target = sf.StableTarget(Own(), references=sf.InBatch())(x0, x_t, t, noise=noise)
        velocity = target.velocity
    half = 0.5 * math.pi
    expected = -half * (half * t).sin(), half * (half * t).cos()
    torch.testing.assert_close(found, expected)
    assert not velocity.requires_grad
    torch.testing.assert_close(
        velocity, expected[0][:, None] * target.x0 + expected[1][:, None] * target.noise, rtol=1e-9, atol=1e-9
    )


def test_the_derivative_of_a_learned_scale_has_its_gradient() -> None:
    class Learned(Own):
        power = torch.nn.Parameter(torch.tensor(2.0))

        def sigma(self, t: Tensor) -> Tensor:
            return t**self.power

    t = torch.tensor([0.25, 0.5])
    Learned().sigma_dot(t).sum().backward()
    # The derivative of p t^(p - 1) by p.
    expected = (t**1.0 * (1 + 2.0 * t.log())).sum()
    torch.testing.assert_close(Learned.power.grad, expected)


def test_scales_that_are_no_functions_of_time_need_derivatives_of_their_own() -> None:
    class Constant(Own):
        def alpha(self, t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def sigma(self, t: Tensor) -> Tensor:
            return torch.linspace(0, 1, 11, dtype=t.dtype)[(10 * t).long()]

    for name in ("alpha", "sigma"):
        message = rf"^{name} of .*Constant.* is no differentiable function of t: define {name}_dot\(t\), its derivative"
        with pytest.raises(ValueError, match=message):
            getattr(Constant(), f"{name}_dot")(torch.rand(3))
