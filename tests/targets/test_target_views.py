"""The views of a target: closed forms, and bit for bit those of the usual loop where there is but one reference."""

import pytest
import torch
from torch import Tensor

import stablefield as sf

PROCESSES = [sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()]


def batch(process: sf.Process, rng: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, noise, x_t, t): eight images of noise level 0.05 to 20."""
    x0 = torch.rand(8, 3, 4, 4, generator=rng, dtype=dtype) * 2 - 1
    noise = torch.randn(8, 3, 4, 4, generator=rng, dtype=dtype)
    t = process.time(torch.logspace(-1.3, 1.3, 8, dtype=dtype))
    return x0, noise, process.perturb(x0, t, noise), t


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("given", [True, False])
def test_views_are_their_closed_forms_of_the_posterior_mean(
    process: sf.Process, given: bool, rng: torch.Generator, exact
) -> None:
    x0, noise, x_t, t = batch(process, rng, torch.float64)
    target = sf.StableTarget(process, references=sf.InBatch())(x0, x_t, t, noise=noise if given else None)
    truth = exact(x_t, process.alpha(t), process.sigma(t), x0)
    mean = truth.mean.reshape(x0.shape)
    alpha, sigma, alpha_dot, sigma_dot = (
        f(t).reshape(-1, 1, 1, 1) for f in (process.alpha, process.sigma, process.alpha_dot, process.sigma_dot)
    )
    eps = (x_t - alpha * mean) / sigma
    same = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(target.x0, mean, **same)
    torch.testing.assert_close(target.noise, eps, **same)
    torch.testing.assert_close(target.score, (alpha * mean - x_t) / sigma**2, **same)
    torch.testing.assert_close(target.v, alpha * eps - sigma * mean, **same)
    torch.testing.assert_close(target.velocity, alpha_dot * mean + sigma_dot * eps, **same)
    torch.testing.assert_close(target.ess, truth.ess, rtol=1e-9, atol=0)
    assert target.ess.max() > 4


def test_the_score_is_the_gradient_of_the_log_evidence(rng: torch.Generator) -> None:
    process = sf.VP()
    x0, noise, x_t, t = batch(process, rng, torch.float64)
    score = sf.StableTarget(process, references=sf.InBatch())(x0, x_t, t, noise=noise).score
    step = 1e-5
    for place in ((0, 0, 0), (1, 2, 3), (2, 3, 3)):
        shift = torch.zeros(3, 4, 4, dtype=torch.float64)
        shift[place] = step
        up, down = (sf.posterior(x_t + s * shift, process.alpha(t), process.sigma(t), x0).log_evidence for s in (1, -1))
        torch.testing.assert_close((up - down) / (2 * step), score[(slice(None), *place)], rtol=1e-6, atol=1e-6)


def test_the_network_target_of_edm_preconditioning_is_affine_in_the_mean(rng: torch.Generator) -> None:
    process, preconditioning = sf.EDM(), sf.EDMPreconditioning(sigma_data=0.5)
    x0, noise, x_t, t = batch(process, rng, torch.float64)
    target = sf.StableTarget(process, references=sf.InBatch())(x0, x_t, t, noise=noise)
    scale = preconditioning(t)
    skip, out, s = (value.reshape(-1, 1, 1, 1) for value in (scale.c_skip, scale.c_out, t))
    raw = (target.x0 - skip * x_t) / out
    # By substituting x_t = x0 + sigma noise: (sigma x0 - sigma_data^2 noise) / (sigma_data sqrt(sigma^2 + sigma_data^2)).
    closed = (s * target.x0 - 0.25 * target.noise) / (0.5 * torch.sqrt(s**2 + 0.25))
    torch.testing.assert_close(raw, closed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["denoising", "one reference", "source_only", "below the band"])
def test_with_the_source_alone_the_views_are_those_of_the_usual_loop_bit_for_bit(
    process: sf.Process, dtype: torch.dtype, kind: str, rng: torch.Generator
) -> None:
    x0, noise, x_t, t = batch(process, rng, dtype)
    rows, source_only = [slice(None)], None
    if kind == "denoising":
        make = sf.DenoisingTarget(process)
    elif kind == "below the band":
        make = sf.StableTarget(process, references=sf.InBatch(), noise_band=1e6)
    else:
        make = sf.StableTarget(process, references=sf.InBatch())
        if kind == "source_only":
            source_only = torch.ones(8, dtype=torch.bool)
        else:
            rows = [slice(i, i + 1) for i in range(8)]
    for r in rows:
        target = make(x0[r], x_t[r], t[r], noise=noise[r], source_only=source_only)
        alpha, sigma = process.alpha(t[r]).reshape(-1, 1, 1, 1), process.sigma(t[r]).reshape(-1, 1, 1, 1)
        assert torch.equal(target.x0, x0[r])
        assert torch.equal(target.noise, noise[r])
        assert torch.equal(target.v, alpha * noise[r] - sigma * x0[r])
        assert torch.equal(target.score, -noise[r] / sigma)
        if isinstance(process, sf.RectifiedFlow):
            assert torch.equal(target.velocity, noise[r] - x0[r])
        assert torch.equal(target.variance, torch.zeros_like(target.variance))
        assert torch.equal(target.ess, torch.ones_like(target.ess))
        assert torch.equal(target.source_weight, torch.ones_like(target.source_weight))


@pytest.mark.parametrize("process", [sf.RectifiedFlow(), sf.Cosine()], ids=repr)
def test_dsm_is_dsm_at_the_very_end_of_the_clock_where_alpha_is_zero(process: sf.Process, rng: torch.Generator) -> None:
    x0, noise = torch.randn(6, 4, generator=rng), torch.randn(6, 4, generator=rng)
    t = torch.ones(6)
    target = sf.DenoisingTarget(process)(x0, process.perturb(x0, t, noise), t, noise=noise)
    assert torch.equal(target.x0, x0)
    assert torch.equal(target.ess, torch.ones(6))


@pytest.mark.parametrize("process", [sf.RectifiedFlow(), sf.Cosine()], ids=repr)
@pytest.mark.parametrize("band", [0.1, None])
def test_a_time_of_exactly_zero_gives_the_usual_velocity_and_no_nan(
    process: sf.Process, band: float | None, rng: torch.Generator
) -> None:
    # torch.rand draws an exact 0 once in 2^24 times: some loop will meet it.
    x0, noise = torch.randn(6, 4, generator=rng), torch.randn(6, 4, generator=rng)
    t = torch.tensor([0.0, 0.01, 0.3, 0.5, 0.7, 0.9])
    make = (
        sf.DenoisingTarget(process)
        if band is None
        else sf.StableTarget(process, references=sf.InBatch(), noise_band=band)
    )
    target = make(x0, process.perturb(x0, t, noise), t, noise=noise)
    expected = process.alpha_dot(t)[:1, None] * x0[:1] + process.sigma_dot(t)[:1, None] * noise[:1]
    torch.testing.assert_close(target.noise[:1], noise[:1], rtol=0, atol=0)
    torch.testing.assert_close(target.velocity[:1], expected, rtol=0, atol=0)
    assert torch.isfinite(target.velocity).all()


def test_noise_views_do_not_magnify_rounding_at_small_noise(rng: torch.Generator, exact) -> None:
    # At sigma = 0.002 the plain (x_t - mean) / sigma in float32 is off by 3e-5; the given noise, corrected, is not.
    process = sf.EDM()
    x0 = torch.randn(8, 64, generator=rng)
    x0[4:] = x0[:4] + 0.002 * torch.randn(4, 64, generator=rng) / 8
    noise = torch.randn(8, 64, generator=rng)
    t = torch.full((8,), 0.002)
    x_t = process.perturb(x0, t, noise)
    target = sf.StableTarget(process, references=sf.InBatch())(x0, x_t, t, noise=noise)
    truth = exact(x_t, 1.0, 0.002, x0)
    correction = (x0.double() - truth.mean) / 0.002
    assert target.ess.min() > 1.05
    torch.testing.assert_close(target.noise.double(), noise.double() + correction, rtol=0, atol=5e-4)


def test_a_batch_of_half_precision_keeps_its_dtype(rng: torch.Generator) -> None:
    x0 = torch.randn(6, 4, generator=rng).bfloat16()
    x_t = x0 + torch.randn(6, 4, generator=rng).bfloat16()
    target = sf.StableTarget(sf.EDM(), references=sf.InBatch())(x0, x_t, 1.0)
    assert target.x0.dtype == target.noise.dtype == target.velocity.dtype == torch.bfloat16
    assert target.variance.dtype == torch.float32


def test_targets_carry_no_gradient(rng: torch.Generator) -> None:
    x0 = torch.randn(4, 3, generator=rng, requires_grad=True)
    target = sf.StableTarget(sf.EDM(), references=sf.InBatch())(x0.detach(), x0 + 1, 1.0)
    assert not target.x0.requires_grad
    assert not sf.posterior(x0, 1.0, 1.0, x0).mean.requires_grad


def test_a_discrete_process_serves_all_views_but_the_velocity(rng: torch.Generator) -> None:
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    process = sf.Discrete(table)
    t = torch.tensor([3, 400, 999])
    x0, noise = torch.randn(3, 5, generator=rng), torch.randn(3, 5, generator=rng)
    x_t = process.perturb(x0, t, noise)
    target = sf.StableTarget(process, references=sf.InBatch())(x0, x_t, t, noise=noise)
    found = sf.posterior(x_t, table[t].sqrt(), (1 - table[t]).sqrt(), x0)
    torch.testing.assert_close(target.x0, found.mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no time derivative"):
        _ = target.velocity


class Learned(sf.RectifiedFlow):
    """A flow whose noise has a trained scale."""

    scale = torch.nn.Parameter(torch.tensor(1.0))

    def sigma(self, t: Tensor) -> Tensor:
        return self.scale * t


@pytest.mark.parametrize("view", VIEWS := ["x0", "noise", "v", "velocity", "score"])
def test_views_of_a_stable_target_are_constants(view: str, rng: torch.Generator) -> None:
    """Also where the caller's tensors have gradients that the target does not need, and the rows are below the band."""
    x0, noise, x_t, t = (value.requires_grad_() for value in batch(sf.RectifiedFlow(), rng, torch.float32))
    for band in (0.0, 1.0, 100.0):
        stable = sf.StableTarget(sf.RectifiedFlow(), references=sf.InBatch(), noise_band=band)
        assert not getattr(stable(x0.detach(), x_t, t, noise=noise), view).requires_grad
        with torch.no_grad():
            target = stable(x0, x_t, t)
        assert not getattr(target, view).requires_grad
        assert not getattr(target[:4], view).requires_grad


class Differentiated(sf.RectifiedFlow):
    """A flow whose derivative torch computes."""

    def sigma_dot(self, t: Tensor) -> Tensor:
        t = t.detach().requires_grad_()
        return torch.autograd.grad(self.sigma(t).sum(), t)[0]


def test_a_velocity_takes_derivatives_by_differentiation(rng: torch.Generator) -> None:
    x0, noise, x_t, t = batch(sf.RectifiedFlow(), rng, torch.float32)
    one, other = (
        sf.StableTarget(process, references=sf.InBatch())(x0, x_t, t, noise=noise).velocity
        for process in (Differentiated(), sf.RectifiedFlow())
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("view", VIEWS)
def test_a_trained_encoder_gets_the_gradient_of_the_usual_loop_or_an_error(view: str, rng: torch.Generator) -> None:
    process, embedded = sf.RectifiedFlow(), torch.randn(16, 3, generator=rng).requires_grad_()
    noise, t = torch.randn(16, 3, generator=rng), torch.rand(16, generator=rng) * 0.9 + 0.05
    x_t = process.perturb(embedded, t, noise)
    s = t[:, None]
    usual = {
        "x0": embedded,
        "noise": noise,
        "v": (1 - s) * noise - s * embedded,
        "velocity": noise - embedded,
        "score": -noise / s,
    }
    found = getattr(sf.DenoisingTarget(process)(embedded, x_t, t, noise=noise), view)
    one, other = (
        torch.autograd.grad((x_t.sin() - y).square().sum(), embedded, retain_graph=True) for y in (found, usual[view])
    )
    torch.testing.assert_close(one, other)
    for references, index in ((sf.InBatch(), None), (sf.Pool(embedded.detach()), torch.arange(16))):
        with pytest.raises(ValueError, match=r"x0 requires a gradient.*x0\.detach\(\).*DenoisingTarget"):
            sf.StableTarget(process, references=references)(embedded, x_t, t, index=index, noise=noise)


def test_a_trained_process_gets_the_gradient_of_the_usual_loop_or_an_error(rng: torch.Generator) -> None:
    process = Learned()
    x0, noise, t = torch.randn(16, 3, generator=rng), torch.randn(16, 3, generator=rng), torch.full((16,), 0.5)
    x_t = process.perturb(x0, t, noise)
    target = sf.DenoisingTarget(process)(x0, x_t, t, noise=noise)
    found = torch.autograd.grad(target.v.sum(), process.scale)[0]
    torch.testing.assert_close(found, -0.5 * x0.sum())  # v = alpha noise - scale t x0
    stable = sf.StableTarget(process, references=sf.InBatch())
    with pytest.raises(ValueError, match=r"sigma requires a gradient.*the parameters of Learned"):
        stable(x0, x_t, t)
    with torch.no_grad():
        target = stable(x0, x_t, t)
    assert not any(getattr(target, view).requires_grad for view in VIEWS)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at it on its way out
def test_a_compiled_call_rejects_a_trained_encoder(rng: torch.Generator) -> None:
    process, encoder = sf.RectifiedFlow(), torch.nn.Linear(3, 3)
    stable = sf.StableTarget(process, references=sf.InBatch())
    y, noise, t = torch.randn(8, 3, generator=rng), torch.randn(8, 3, generator=rng), torch.full((8,), 0.5)

    def velocity(detach: bool) -> Tensor:
        x0 = encoder(y).detach() if detach else encoder(y)
        return stable(x0, process.perturb(x0, t, noise), t, noise=noise).velocity

    compiled = torch.compile(velocity, backend="eager")
    torch.testing.assert_close(compiled(True), velocity(True))
    with pytest.raises(Exception, match="x0 requires a gradient"):  # a ValueError, or the compiler's error around it
        compiled(False)
