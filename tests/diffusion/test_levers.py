"""Claims on the levers of a batch's variance: each leaves the expectation as it is, and lowers the variance it names."""

import itertools
from dataclasses import dataclass

import pytest
import torch

import stablefield as sf
from stablefield.data._digits import open_digits
from stablefield.diffusion._noise_levels import NoiseLevels, times_at
from stablefield.diffusion._objective import Draws
from stablefield.training._meter import Meter, Stopwatch, bin_edges
from stablefield.training._run_data import check_fit

DATA = torch.tensor([[-1.0, 0.3], [0.2, 0.9], [0.8, -0.7]], dtype=torch.float64)
LEVELS = (0.4, 1.1)
# A two-point noise with the first three moments of a normal one: all sums over it are finite.
NOISE = [torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1.0, 1.0), repeat=2)]


@dataclass(frozen=True)
class At(NoiseLevels):
    """All rows at one noise level."""

    level: float = 1.0

    def quantile(self, u, process):
        return process.time(torch.full_like(u, self.level))


class Linear(torch.nn.Module):
    """D(x) = A x, whose error at small noise is linear in the noise."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.5, 0.2], [-0.1, 0.7]], dtype=torch.float64))

    def forward(self, x, *_):
        return x @ self.weight.T


def objective(process=None, levels=None, dsm=False, **options):
    process = process or sf.EDM()
    target = (
        sf.DenoisingTarget(process) if dsm else sf.StableTarget(process, references=sf.Pool(DATA), validate_args=False)
    )
    return sf.Objective(process, target=target, noise_levels=levels or sf.LogNormal(), **options)


def gradient(made, index, draws):
    """The gradient of the mean loss of rows at `index` of DATA."""
    denoiser = Linear()
    example = made.example(DATA[index], draws, index=index)
    (found,) = torch.autograd.grad(made.evaluate(denoiser, example).row_loss.mean(), denoiser.weight)
    return found


def enumerated(made, pairs):
    """The expectation of the gradient over images, two noise levels and NOISE, of plain rows or of antithetic pairs."""
    total, count = torch.zeros(2, 2, dtype=torch.float64), 0
    for image, level, noise in itertools.product(range(len(DATA)), LEVELS, NOISE):
        rows = 2 if pairs else 1
        signed = torch.stack([noise, -noise][:rows])
        t = made.process.time(torch.full((rows,), level, dtype=torch.float64))
        total += gradient(made, torch.full((rows,), image), Draws(t, signed))
        count += 1
    return total / count


@pytest.mark.parametrize("dsm", [False, True], ids=["stf", "dsm"])
@pytest.mark.parametrize("process", [sf.EDM(), sf.VP(), sf.RectifiedFlow()], ids=repr)
def test_antithetic_pairs_are_unbiased_by_enumeration(process, dsm):
    plain = objective(process, dsm=dsm)
    pairs = objective(process, dsm=dsm, draws_per_image=2, antithetic=True)
    torch.testing.assert_close(enumerated(pairs, True), enumerated(plain, False), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("draws", [2, 4])
def test_antithetic_draws_come_in_pairs_of_one_level_and_opposite_noise(draws):
    made = objective(draws_per_image=draws, antithetic=True, levels=sf.LogNormal(stratified=True), label_dropout=0.5)
    found = made.draw((12, 3), torch.Generator().manual_seed(0), labelled=True)
    assert torch.equal(found.noise[::2], -found.noise[1::2])
    assert torch.equal(found.t[::2], found.t[1::2])
    assert torch.equal(found.hidden[::2], found.hidden[1::2])
    assert len(found.t.unique()) == 6
    # The pairs are stratified over the whole batch.
    u = torch.special.ndtr((sf.EDM().noise_level(found.t[::2]).double().log() + 1.2) / 1.2)
    assert sorted((u * 6).long().tolist()) == list(range(6))


def test_each_row_of_an_antithetic_pair_keeps_the_law_of_the_noise():
    found = objective(draws_per_image=2, antithetic=True).draw((40_000, 1), torch.Generator().manual_seed(0))
    for rows in (found.noise[::2, 0], found.noise[1::2, 0]):
        assert float(rows.mean()) == pytest.approx(0, abs=0.03)
        assert float(rows.square().mean()) == pytest.approx(1, abs=0.04)


def test_a_call_repeats_each_image_in_consecutive_rows():
    made = objective(draws_per_image=3)
    seen = []

    def spy(x, sigma, class_labels=None, augment_labels=None):
        seen.append((x, sigma))
        return x

    value = made(spy, DATA[:2], index=torch.arange(2), generator=torch.Generator().manual_seed(0))
    draws = made.draw((6, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = made.evaluate(spy, made.example(DATA[index], draws, index=index))
    assert torch.equal(value.row_loss, expected.row_loss)
    assert torch.equal(seen[0][0], DATA[index] + seen[0][1].double()[:, None] * draws.noise)


def test_labels_flips_and_augmentation_labels_follow_their_image():
    images = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0])
    process = sf.EDM()
    target = sf.StableTarget(process, references=sf.Pool(images, labels=labels))
    made = sf.Objective(process, target=target, draws_per_image=2, antithetic=True)
    seen = []

    def spy(x, sigma, class_labels=None, augment_labels=None):
        seen.append((class_labels, augment_labels))
        return x

    flip = torch.tensor([True, False, True, False])
    x0 = torch.where(flip[:, None, None, None], images.flip(-1), images)
    extra = torch.arange(4.0)[:, None]
    made(spy, x0, labels, torch.arange(4), flip=flip, augment_labels=extra, generator=torch.Generator().manual_seed(0))
    assert seen[0][0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert seen[0][1].flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_antithetic_noise_removes_most_of_the_variance_of_a_linear_denoiser_at_small_noise():
    level = At(0.1)
    index = torch.arange(3).repeat(20)

    def spread(made, rows):
        found = []
        for seed in range(300):
            draws = made.draw((len(rows), 2), torch.Generator().manual_seed(seed), dtype=torch.float64)
            found.append(gradient(made, rows, draws))
        return float(torch.stack(found).var(0).sum())

    plain = spread(objective(levels=level, draws_per_image=2), index.sort().values)
    paired = spread(objective(levels=level, draws_per_image=2, antithetic=True), index.sort().values)
    assert paired < 0.2 * plain


def test_one_draw_without_pairs_has_the_bits_of_an_objective_without_levers():
    made = objective(label_dropout=0.3)
    found = made.draw((5, 2), torch.Generator().manual_seed(3), labelled=True)
    rng = torch.Generator().manual_seed(3)
    t = sf.LogNormal().sample(sf.EDM(), 5, rng)
    noise = torch.randn(5, 2, generator=rng)
    assert torch.equal(found.t, t)
    assert torch.equal(found.noise, noise)
    assert torch.equal(found.hidden, torch.rand(5, generator=rng) < 0.3)


@dataclass(frozen=True)
class Two(NoiseLevels):
    """The two levels of LEVELS, equally likely."""

    def quantile(self, u, process):
        return process.time(torch.where(u < 0.5, LEVELS[0], LEVELS[1]).to(u))


def fitted(levels, process, squares, **options):
    """A density that has seen 1,000 rows of each bin, with these mean squares of the gradient."""
    found = sf.ImportanceSampling(levels, process, bins=len(squares), **options)
    found.observe(torch.stack([1000 * torch.tensor(squares), torch.full((len(squares),), 1000.0)]))
    return found


@pytest.mark.parametrize("dsm", [False, True], ids=["stf", "dsm"])
@pytest.mark.parametrize("process", [sf.EDM(), sf.VP(), sf.RectifiedFlow()], ids=repr)
def test_importance_sampling_is_unbiased_by_enumeration(process, dsm):
    levels = Two()
    importance = fitted(levels, process, (0.3, 4.0))
    made, plain = (objective(process, levels, dsm, importance=one) for one in (importance, None))
    # Each level as often as the density draws it, with the weight that it gives.
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    moved, weight = importance(u)
    t = times_at(levels, moved, process)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for level in t.unique():
        there = t == level
        assert len(weight[there].unique()) == 1
        for image, noise in itertools.product(range(len(DATA)), NOISE):
            draws = Draws(t[there][:1].double(), noise[None], None, weight[there][:1])
            share = float(there.double().mean()) / len(DATA) / len(NOISE)
            expected += share * gradient(made, torch.tensor([image]), draws)
    torch.testing.assert_close(expected, enumerated(plain, False), rtol=2e-3, atol=1e-6)


def test_weights_undo_the_density_for_any_function_of_the_level():
    process, levels = sf.EDM(), sf.LogNormal()
    importance = fitted(levels, process, (4.0, 1.0, 0.5, 0.01, 0.0))
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    moved, weight = importance(u)
    assert float(weight.mean()) == pytest.approx(1, abs=1e-4)
    assert float(weight.max()) <= 1 / importance.uniform + 1e-9
    for function in (torch.log, torch.sin, torch.sqrt):
        truth = function(levels.quantile(u, process)).mean()
        assert float((weight * function(levels.quantile(moved, process))).mean()) == pytest.approx(
            float(truth), abs=1e-3
        )


def test_the_fitted_density_has_the_least_mean_square_that_its_uniform_share_allows():
    squares = torch.tensor([9.0, 4.0, 1.0, 0.25])
    importance = fitted(sf.LogNormal(), sf.EDM(), squares.tolist(), uniform=1e-6)
    # By Cauchy and Schwarz: the square of the mean of the roots.
    assert float((squares / importance.density()).mean()) == pytest.approx(float(squares.sqrt().mean()) ** 2, rel=1e-5)


def test_levels_are_drawn_as_without_it_until_every_bin_is_known():
    importance = sf.ImportanceSampling(sf.LogNormal(), sf.EDM(), bins=4)
    plain, made = objective(), objective(importance=importance)
    importance.observe(torch.tensor([[5.0, 1.0, 1.0, 0.0], [500.0, 500.0, 500.0, 31.0]]))
    found, truth = (one.draw((8, 2), torch.Generator().manual_seed(0)) for one in (made, plain))
    torch.testing.assert_close(found.t, truth.t, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weight, torch.ones(8), rtol=1e-6, atol=0)
    assert truth.weight is None


def test_the_loss_and_its_bins_are_those_without_importance_sampling():
    process, levels = sf.EDM(), sf.LogNormal()
    made = objective(importance=fitted(levels, process, (3.0, 1.0, 0.2)))
    means = []
    for one in (made, objective()):
        meter = Meter(bin_edges(levels, process), torch.device("cpu"), Stopwatch(torch.device("cpu")))
        rng = torch.Generator().manual_seed(0)
        index = torch.randint(3, (60_000,), generator=rng)
        draws = one.draw((60_000, 2), rng, dtype=torch.float64)
        meter.step([one.evaluate(Linear(), one.example(DATA[index], draws, index=index))], 1)
        report = meter.report(1)
        means.append((report.loss, *report.bin_loss))
    assert means[0] == pytest.approx(means[1], rel=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uniform": 0.0}, "uniform is 0.0: pass a share above 0, at most 1"),
        ({"half_life": 0}, "half_life is 0: pass a positive number of rows"),
        ({"bins": 0}, "bins=0: pass a whole number of at least 1"),
        ({"scale": lambda level: torch.ones(3)}, "a finite number, 0 or more, for each of the 32 noise levels"),
        ({"scale": lambda level: -level}, "a finite number, 0 or more, for each of the 32 noise levels"),
    ],
)
def test_importance_sampling_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sf.ImportanceSampling(sf.LogNormal(), sf.EDM(), **options)
    with pytest.raises(ValueError, match=r"importance is for LogUniform.*the objective has LogNormal.*use one of each"):
        objective(importance=sf.ImportanceSampling(sf.LogUniform(), sf.EDM()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws_per_image": 0}, "draws_per_image=0: pass a whole number of at least 1"),
        ({"antithetic": True}, "draws_per_image is 1: pass an even number, such as draws_per_image=2"),
        ({"antithetic": True, "draws_per_image": 3}, "draws_per_image is 3: pass an even number"),
    ],
)
def test_levers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_a_recipe_refuses_what_its_objective_would() -> None:
    with pytest.raises(ValueError, match="draws_per_image is 3: pass an even number"):
        sf.training.Recipe(antithetic=True, draws_per_image=3, batch=12)
    with pytest.raises(ValueError, match="batch is 128: it must be a multiple of draws_per_image=3, such as 129"):
        sf.training.Recipe(draws_per_image=3)


def test_references_of_an_image_count_its_draws_once() -> None:
    recipe = sf.training.Recipe(draws_per_image=4, batch=20, references=5)
    check_fit(recipe, open_digits())
    many = sf.training.Recipe(draws_per_image=2, batch=4000)
    with pytest.raises(ValueError, match=r"batch=4000 of 2000 images is above the 1797 images .* pass batch=3594"):
        check_fit(many, open_digits())


def test_references_from_the_batch_hold_all_rows_of_each_image():
    process, x0 = sf.EDM(), torch.randn(6, 2)
    for target in (sf.StableTarget(process, references=sf.InBatch()), sf.DenoisingTarget(process)):
        made = sf.Objective(process, target=target, draws_per_image=2)
        draws = made.draw(x0.shape)
        made.example(x0, draws)
        if isinstance(target, sf.DenoisingTarget):
            made.example(x0[:5], draws[:5])
            continue
        with pytest.raises(ValueError, match=r"x0 has 5 rows, and draws_per_image=2: InBatch\(\) .*use Pool"):
            made.example(x0[:5], draws[:5])


def test_rows_that_are_no_multiple_of_the_draws_are_refused():
    with pytest.raises(ValueError, match=r"has 5 rows, and draws_per_image=2: pass a multiple of it"):
        objective(draws_per_image=2).draw((5, 2))
