"""x_t is compared with x0, t and noise: what a process did not make is refused, and what it made never is."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

import stablefield as sf
from stablefield.targets._consistency import consistency_checks

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
PROCESSES = [sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow(), sf.Discrete(TABLE)]
SHAPE = (3, 4, 4)


def batch(process: sf.Process, rng: torch.Generator, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, t, noise) with noise levels from 0.1 to 10."""
    x0 = torch.randn(size, *SHAPE, generator=rng) + 2
    t = process.time(torch.exp(torch.linspace(-2.3, 2.3, size)))
    return x0, t, torch.randn(size, *SHAPE, generator=rng)


def call(process: sf.Process, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor | None) -> sf.Target:
    return sf.StableTarget(process, references=sf.InBatch())(x0, x_t, t, noise=noise)


@pytest.mark.parametrize("given", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_what_the_process_makes_is_accepted(process: sf.Process, given: bool, rng: torch.Generator) -> None:
    for size in (1, 2, 64):
        x0, t, noise = batch(process, rng, size)
        call(process, x0, process.perturb(x0, t, noise), t, noise if given else None)


@pytest.mark.parametrize("given", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_rounded_to_half_precision_are_accepted(dtype: torch.dtype, given: bool, rng: torch.Generator) -> None:
    process = sf.RectifiedFlow()
    x0, t, noise = (value.to(dtype) for value in batch(process, rng))
    scale = t[:, None, None, None]
    call(process, x0, (1 - scale) * x0 + scale * noise, t.float(), noise if given else None)


MISTAKES: dict[str, tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], str, bool]] = {
    # (x_t, t, noise) of (x0, t, noise), what the error says, whether it can be seen without the noise
    "reversed time": (lambda p, x0, t, n: (p.perturb(x0, t, n), 1 - t, n), "agree at 1 - t", True),
    "steps in place of times": (
        lambda p, x0, t, n: (p.perturb(x0, t, n), (t * 1000).round(), n),
        "run from 0 to 1",
        True,
    ),
    "times out of the range": (lambda p, x0, t, n: (p.perturb(x0, t, n), t + 1, n), "run from 0 to 1", True),
    "another draw's noise": (lambda p, x0, t, n: (p.perturb(x0, t, n), t, n.roll(1, 0)), "is not alpha x0", False),
    "rows in another order": (lambda p, x0, t, n: (p.perturb(x0, t, n).flip(0), t, n), "is not alpha x0", True),
    "times of other rows": (lambda p, x0, t, n: (p.perturb(x0, t, n), t.flip(0), n), "is not alpha x0", True),
    "input perturbation": (
        lambda p, x0, t, n: (p.perturb(x0, t, n + 0.3 * n.roll(1, 0)), t, n),
        "is not alpha x0",
        False,
    ),
    "noise of another scale": (lambda p, x0, t, n: (p.perturb(x0, t, 1.2 * n), t, 1.2 * n), "variance", True),
    "no noise": (lambda p, x0, t, n: (p.perturb(x0, t, 0 * n), t, 0 * n), "variance", True),
}


@pytest.mark.parametrize("target", ["stable", "denoising", "banded"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_it_does_not_make_is_refused(mistake: str, target: str, rng: torch.Generator) -> None:
    process = sf.RectifiedFlow()
    stable = {
        "stable": sf.StableTarget(process, references=sf.InBatch()),
        "denoising": sf.DenoisingTarget(process),
        "banded": sf.StableTarget(process, references=sf.InBatch(), noise_band=1.0),
    }[target]
    x0, t, noise = batch(process, rng)
    make, message, seen = MISTAKES[mistake]
    x_t, time, told = make(process, x0, t, noise)
    with pytest.raises(ValueError, match=message):
        stable(x0, x_t, time, noise=told)
    if seen:
        with pytest.raises(ValueError, match=r"is not what RectifiedFlow|run from 0 to 1"):
            stable(x0, x_t, time)


@pytest.mark.parametrize("given", [True, False], ids=["noise", "no noise"])
def test_noise_that_a_coupling_assigned_to_the_data_is_refused(given: bool, rng: torch.Generator) -> None:
    from scipy.optimize import linear_sum_assignment

    process = sf.RectifiedFlow()
    x0, t, noise = batch(process, rng, 256)
    for cost in (torch.cdist(x0.flatten(1), noise.flatten(1)), torch.cdist(x0.flatten(1), noise.flatten(1)).square()):
        paired = noise[linear_sum_assignment(cost.numpy())[1]]
        with pytest.raises(ValueError, match=r"not independent of x0.*optimal transport"):
            call(process, x0, process.perturb(x0, t, paired), t, paired if given else None)


def test_samples_of_ones_own_choice_are_accepted_on_request(rng: torch.Generator) -> None:
    grid = torch.linspace(-5, 5, 64, dtype=torch.float64)[:, None]
    x0 = torch.where(torch.rand(64, 1, generator=rng) < 0.5, -1.0, 1.0).double()
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(torch.tensor([[-1.0], [1.0]])), validate_args=False)
    found = stable(x0, grid, 0.7, index=(x0[:, 0] > 0).long())
    torch.testing.assert_close(found.x0, torch.tanh(grid / 0.49), rtol=1e-6, atol=1e-6)
    for value in (grid, x0):
        bad = value.clone()
        bad[3] = torch.nan
        with pytest.raises(ValueError, match=r"\[3\] holds NaN"):
            stable(*((bad, grid) if value is x0 else (x0, bad)), 0.7, index=(x0[:, 0] > 0).long())


@pytest.mark.parametrize("stable", [sf.DenoisingTarget(sf.EDM()), sf.StableTarget(sf.EDM(), references=sf.InBatch())])
@pytest.mark.parametrize("name", ["x0", "x_t", "noise"])
def test_nan_is_named_whatever_the_band(name: str, stable: sf.StableTarget, rng: torch.Generator) -> None:
    x0, t, noise = batch(sf.EDM(), rng, 8)
    arguments = {"x0": x0, "x_t": sf.EDM().perturb(x0, t, noise), "noise": noise}
    arguments[name][5, 0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match=rf"{name}\[5\] holds NaN"):
        stable(**arguments, t=t)


@pytest.mark.parametrize("degrees", [1.0, 3.0, 64.0, 2048.0])
def test_heavy_tails_are_held_to_their_own_law(degrees: float, rng: torch.Generator) -> None:
    kernel = sf.StudentTKernel(degrees)
    stable = sf.StableTarget(sf.EDM(), references=sf.InBatch(), kernel=kernel)
    for size in (1, 4, 64):
        x0, t, _ = batch(sf.EDM(), rng, size)
        noise = kernel.noise(x0, rng)
        stable(x0, sf.EDM().perturb(x0, t, noise), t, noise=noise)
    with pytest.raises(ValueError, match="times the expected variance"):
        stable(x0, sf.EDM().perturb(x0, t, 9 * noise), t, noise=9 * noise)


def holds(kernel: sf.GaussianKernel | sf.StudentTKernel, noise: Tensor) -> bool:
    """Whether all checks accept this noise of scale 1 on data that are 0."""
    ones = torch.ones(len(noise))
    checks = consistency_checks(sf.EDM(), kernel, torch.zeros_like(noise), noise, ones, ones, ones, noise)
    return all(bool(check.holds.all()) for check in checks)


@pytest.mark.parametrize(("rows", "d"), [(1, 1), (1, 3), (2, 100), (64, 1), (64, 3072)])
def test_the_bound_of_the_law_is_that_of_a_chi_square(rows: int, d: int) -> None:
    """The sum at 7 standard deviations by scipy's chi-square is accepted, that at 10 is not (with few numbers, at 20)."""
    freedom = rows * d
    for deviations, accepted in ((7.0, True), (10.0 if freedom > 10 else 20.0, False)):
        # Beyond scipy's own quantile function: the sum at which its survival function is the normal one.
        low, high = float(freedom), float(freedom) * 1e4
        for _ in range(200):
            middle = math.sqrt(low * high)
            below = stats.chi2.logsf(middle, freedom) > stats.norm.logsf(deviations)
            low, high = (middle, high) if below else (low, middle)
        # Rows of one norm would count as one.
        share = torch.linspace(0.9, 1.1, rows)[:, None] if rows > 1 else torch.ones(1, 1)
        noise = share.sqrt() * torch.full((rows, d), math.sqrt(low / freedom))
        assert holds(sf.GaussianKernel(), noise) == accepted


def test_antithetic_noise_is_accepted(rng: torch.Generator) -> None:
    process = sf.VP()
    for _ in range(50):
        x0, t, noise = batch(process, rng, 64)
        noise = torch.cat([noise[:16], -noise[:16], noise[:16].flip(-1), -noise[:16].flip(-1)])
        call(process, x0, process.perturb(x0, t, noise), t, noise)
        half = torch.cat([x0[:32], x0[:32]])
        call(process, half, process.perturb(half, t, noise), t, noise)


def test_perturb_refuses_times_that_the_process_does_not_have() -> None:
    for process, end in ((sf.VE(), 2), (sf.VP(), 2), (sf.Cosine(), 1), (sf.RectifiedFlow(), 1)):
        with pytest.raises(ValueError, match=rf"t runs from 700 to 700.*to {end}: pass times"):
            process.perturb(torch.zeros(2, 3), 700.0)


def test_noise_levels_beyond_those_of_a_process_are_noise_levels(rng: torch.Generator) -> None:
    for process in (sf.VE(), sf.VP()):
        level = torch.tensor([0.001, 0.01, 90.0, 400.0]) if isinstance(process, sf.VE) else torch.tensor([160.0, 200.0])
        x0, t = torch.randn(len(level), 5, generator=rng), process.time(level)
        assert not ((t >= 0) & (t <= 1)).all()
        call(process, x0, process.perturb(x0, t, generator=rng), t, None)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loops_in_half_precision_around_a_scheduler_of_diffusers_are_accepted(
    dtype: torch.dtype, schedule: str, rng: torch.Generator
) -> None:
    """Its add_noise rounds the schedule to the dtype of the samples; small steps and all steps."""
    schedulers = pytest.importorskip("diffusers")
    scheduler = schedulers.DDPMScheduler(beta_schedule=schedule)
    regression = sf.from_diffusers(scheduler)
    for k in range(60):
        x0, noise = (torch.randn(16, 4, 8, 8, generator=rng).to(dtype) for _ in range(2))
        steps = torch.randint(0, 30 if k % 2 else 1000, (16,), generator=rng)
        noisy = scheduler.add_noise(x0, noise, steps)
        for given in (noise, None):
            call(regression.process, x0, noisy, regression.time(steps), given)


@pytest.mark.parametrize("given", [True, False], ids=["noise", "no noise"])
def test_offset_noise_at_its_usual_strength_is_refused(given: bool, rng: torch.Generator) -> None:
    process = sf.VP()
    x0 = torch.randn(16, 3, 32, 32, generator=rng)
    t = process.time(torch.full((16,), 1.0))
    noise = torch.randn(x0.shape, generator=rng) + 0.1 * torch.randn(16, 3, 1, 1, generator=rng)
    with pytest.raises(ValueError, match=r"is not white.*offset noise.*before the offset"):
        call(process, x0, process.perturb(x0, t, noise), t, noise if given else None)


@pytest.mark.parametrize("off", [-1, 1])
def test_steps_that_are_off_by_one_are_refused_if_the_noise_is_given(off: int, rng: torch.Generator) -> None:
    process = sf.Discrete(TABLE)
    for _ in range(20):
        x0, noise = (torch.randn(32, *SHAPE, generator=rng) for _ in range(2))
        t = torch.randint(1, len(TABLE) - 1, (32,), generator=rng)
        alpha, sigma = (scale[:, None, None, None] for scale in (TABLE[t].sqrt(), (1 - TABLE[t]).sqrt()))
        x_t = alpha * x0 + sigma * noise
        call(process, x0, x_t, t, noise)
        with pytest.raises(ValueError, match=r"x_t\[\d+\] is not alpha x0 \+ sigma noise"):
            call(process, x0, x_t, t + off, noise)


LAYOUTS = {"frames first": (8, 3, 8, 8), "channels first": (3, 8, 8, 8), "tokens": (32, 24), "images": (3, 16, 16)}


@pytest.mark.parametrize("given", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_that_frames_or_tokens_share_is_refused_in_every_layout(
    layout: str, given: bool, rng: torch.Generator
) -> None:
    process, shape = sf.EDM(), LAYOUTS[layout]
    x0 = torch.randn(16, *shape, generator=rng)
    axis = 2 if layout == "channels first" else 1
    own, shared = torch.randn(x0.shape, generator=rng), torch.randn(x0.shape, generator=rng).narrow(axis, 0, 1)
    call(process, x0, process.perturb(x0, 1.0, own), torch.ones(16), own if given else None)
    mixed = (own + shared) / 2**0.5  # of variance 1
    with pytest.raises(ValueError, match="is not white"):
        call(process, x0, process.perturb(x0, 1.0, mixed), torch.ones(16), mixed if given else None)


@pytest.mark.parametrize("atoms_first", [True, False])
def test_noise_without_a_mean_over_the_atoms_of_a_molecule_is_accepted_and_its_target_exact(
    atoms_first: bool, rng: torch.Generator
) -> None:
    """Data and noise lie in the subspace of zero centres, where the noise is white."""
    atoms = torch.randn(64, 40, 3, generator=rng, dtype=torch.float64)
    noise = torch.randn(64, 40, 3, generator=rng, dtype=torch.float64)
    atoms, noise = (x - x.mean(1, keepdim=True) for x in (atoms, noise))
    process, sigma = sf.EDM(), 3.0
    x_t = process.perturb(atoms, sigma, noise)
    given = [x if atoms_first else x.mT.contiguous() for x in (atoms, x_t, noise)]
    target = sf.StableTarget(process, references=sf.Pool(given[0]))
    found = target(given[0], given[1], sigma, index=torch.arange(64), noise=given[2]).x0
    found = found if atoms_first else found.mT
    # In coordinates of the subspace, 39 x 3 of them.
    basis = torch.linalg.qr(torch.eye(40, dtype=torch.float64) - 1 / 40).Q[:, :39]
    inner, noisy = (torch.einsum("bni,nk->bki", x, basis).flatten(1) for x in (atoms, x_t))
    weights = (-torch.cdist(noisy, inner).square() / (2 * sigma**2)).softmax(1)
    torch.testing.assert_close(found, (weights @ atoms.flatten(1)).reshape(atoms.shape), rtol=0, atol=1e-5)


def test_means_over_the_first_axis_are_chi_square(rng: torch.Generator) -> None:
    """Of 2,000 batches of white noise none comes near the bound, whatever the number of means and of rows."""
    for shape in ((2, 7, 1), (1, 2, 3), (3, 40, 2), (16, 2, 300)):
        for _ in range(500):
            assert holds(sf.GaussianKernel(), torch.randn(shape, generator=rng))


def test_the_target_before_the_offset_is_unbiased_for_the_one_after_it() -> None:
    """What the docs advise, by quadrature: E[x0 | x_t with offset] is the mean of the targets of x_t without it."""
    atoms, sigma, offset = torch.tensor([-1.0, 0.5], dtype=torch.float64), 0.8, 0.6
    nodes = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    seen = 0.3
    # Without the offset x_t = seen - offset * u, u ~ N(0, 1).
    before = seen - offset * nodes
    joint = torch.exp(-(nodes**2) / 2) * torch.exp(-((before - atoms[:, None]) ** 2) / (2 * sigma**2)).sum(0)
    target = sf.posterior(before[:, None], 1.0, sigma, atoms[:, None]).mean[:, 0]
    wide = torch.exp(-((seen - atoms) ** 2) / (2 * (sigma**2 + offset**2)))
    torch.testing.assert_close((joint @ target) / joint.sum(), (wide @ atoms) / wide.sum(), rtol=0, atol=1e-10)


def test_a_flow_matchers_extra_noise_is_refused(rng: torch.Generator) -> None:
    process = sf.RectifiedFlow()
    x0, t, noise = batch(process, rng)
    x_t = process.perturb(x0, t, noise) + 0.05 * torch.randn(x0.shape, generator=rng)
    with pytest.raises(ValueError, match="is not alpha x0"):
        call(process, x0, x_t, t, noise)


def test_pairing_shows_over_several_small_batches(rng: torch.Generator) -> None:
    from scipy.optimize import linear_sum_assignment

    process = sf.RectifiedFlow()
    stable = sf.StableTarget(process, references=sf.InBatch())

    def step(paired: bool) -> None:
        x0 = torch.randn(16, 3, 16, 16, generator=rng)
        t, noise = torch.rand(16, generator=rng), torch.randn(x0.shape, generator=rng)
        if paired:
            cost = torch.cdist(x0.flatten(1), noise.flatten(1)).square()
            noise = noise[linear_sum_assignment(cost.numpy())[1]]
        stable(x0, process.perturb(x0, t, noise), t, noise=noise)

    for _ in range(200):
        step(paired=False)

    def several() -> None:
        for _ in range(40):
            step(paired=True)

    with pytest.raises(ValueError, match="not independent of x0"):
        several()


@pytest.mark.parametrize("given", [True, False], ids=["noise", "no noise"])
def test_one_batch_can_be_overfitted_with_the_same_noise(given: bool) -> None:
    """The correlation of one batch is within four standard errors, however often it comes, at times of one's choice."""
    for seed in range(15):
        rng = torch.Generator().manual_seed(seed)
        x0, noise = (torch.randn(16, 3, 8, 8, generator=rng) for _ in range(2))
        stable = sf.StableTarget(sf.EDM(), references=sf.InBatch(), noise_band=100.0)
        for _ in range(200):
            t = 0.5 + torch.rand(16, generator=rng)
            order = torch.randperm(16, generator=rng)
            x_t = sf.EDM().perturb(x0, t, noise)
            stable(x0[order], x_t[order], t[order], noise=noise[order] if given else None)


def test_pairs_of_one_number_show_though_their_correlation_is_the_same_in_each_batch(rng: torch.Generator) -> None:
    """Of two atoms the noise's sign decides which: each batch of two rows has a correlation of exactly 2."""
    stable = sf.StableTarget(sf.EDM(), references=sf.InBatch())
    noise = torch.randn(200, 1, generator=rng).abs() * torch.tensor([[-1.0], [1.0]]).repeat(100, 1)
    x0 = noise.sign()

    def several() -> None:
        for some in torch.arange(200).split(2):
            stable(x0[some], x0[some] + noise[some], 1.0, noise=noise[some])

    with pytest.raises(ValueError, match="not independent of x0"):
        several()


def test_the_same_images_and_noise_at_many_levels_are_accepted(rng: torch.Generator) -> None:
    process, levels = sf.EDM(), torch.exp(torch.linspace(-1, 3, 50))
    for k in range(40):
        x0, noise = (torch.randn(3, 2, 8, generator=rng) for _ in range(2))
        x0, noise = x0.repeat(50, 1, 1), noise.repeat(50, 1, 1)
        t = levels.repeat_interleave(3)
        stable = sf.StableTarget(process, references=sf.InBatch())
        stable(x0, process.perturb(x0, t, noise), t, noise=noise if k % 2 else None)


@pytest.mark.parametrize("given", [True, False], ids=["noise", "no noise"])
def test_data_far_from_zero_hide_no_mistake(given: bool, rng: torch.Generator) -> None:
    x0 = 100 + torch.randn(64, *SHAPE, generator=rng)
    noise, t = torch.randn(x0.shape, generator=rng), torch.full((64,), 0.1)
    x_t = sf.EDM().perturb(x0, t, noise)
    call(sf.EDM(), x0, x_t, t, noise if given else None)
    with pytest.raises(ValueError, match=r"x_t(\[0\])? is not"):
        call(sf.EDM(), x0, x_t, 1.5 * t, noise if given else None)


def test_times_in_half_precision_are_taken_for_what_they_are(rng: torch.Generator) -> None:
    for process in (sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()):
        x0, noise = (torch.randn(32, 5, generator=rng) for _ in range(2))
        t = (0.05 + 0.9 * torch.rand(32, generator=rng)).bfloat16()
        call(process, x0, process.perturb(x0, t.float(), noise), t, noise)


def test_constant_images_are_accepted_at_any_time(rng: torch.Generator) -> None:
    process = sf.VP()
    for t in (1e-5, 1e-4, 1e-3, 0.5):
        x0, noise = torch.zeros(8, *SHAPE), torch.randn(8, *SHAPE, generator=rng)
        time = torch.full((8,), t)
        b = (0.5 * 19.9 * time + 0.1) * time
        x_t = torch.exp(-0.5 * b)[:, None, None, None] * x0 + (1 - torch.exp(-b)).sqrt()[:, None, None, None] * noise
        call(process, x0, x_t, time, noise)
