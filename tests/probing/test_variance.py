import math

import pytest
import torch

import stablefield as sf
from stablefield.probing._population import Population, draw_population
from stablefield.probing._series import Series, interpolate
from stablefield.probing._variance import find_noise_levels, measure_variance


def deviation(series, place, truth):
    """How many standard errors a measured figure is from a brute-force one."""
    gap = float(series.mean[place]) - truth[0]
    return abs(gap) / max(math.hypot(float(series.error[place]), truth[1]), 1e-9)


@pytest.fixture(scope="module")
def curve_of_gaussians(two_gaussians):
    """At all levels in one measurement, which takes as long as one level does."""
    return measure_variance(Population(two_gaussians), [0.5, 3.0], sizes=(2, 16, 128), draws=3, seed=1)


@pytest.mark.parametrize(("place", "level"), list(enumerate([0.5, 3.0])))
def test_v_dsm_and_v_stf_of_two_gaussians_agree_with_brute_force_in_float64(
    two_gaussians, curve_of_gaussians, brute_force, place, level
):
    sizes, curve = (2, 16, 128), curve_of_gaussians
    assert curve.complete
    assert curve.noise_level[place] == level
    truth = brute_force(two_gaussians, level, sizes, rows=500, seed=2)
    assert deviation(curve.dsm, place, truth["dsm"]) < 4
    for n in sizes:
        assert deviation(curve.stf[n], place, truth[n]) < 4
        # And the errors are worth something: a twentieth of the figure or so.
        assert curve.stf[n].error[place] < 0.2 * curve.stf[n].mean[place]
    assert curve.dsm.error[place] < 0.02 * curve.dsm.mean[place]


def test_the_ratios_known_for_two_gaussians_at_noise_level_one_half_are_met():
    # V_STF / V_DSM is 0.905, 0.433, 0.117 with 2, 16, 128 references, for a population without end.
    generator = torch.Generator().manual_seed(5)
    side = torch.randint(0, 2, (4000, 1), generator=generator) * 2 - 1
    data = 0.25 * side + 0.1 * torch.randn(4000, 64, generator=generator)
    curve = measure_variance(Population(data), [0.5], sizes=(2, 16, 128), sources=800)
    left = [float(curve.left(n).mean[0]) for n in (2, 16, 128)]
    assert left == pytest.approx([0.905, 0.433, 0.117], rel=0.1)


@pytest.fixture(scope="module")
def curve_of_digits(digits):
    return measure_variance(draw_population(digits), [0.6, 1.4, 4.0], sizes=(16, 256), draws=2, seed=3)


@pytest.mark.parametrize(("place", "level"), list(enumerate([0.6, 1.4, 4.0])))
def test_all_curves_of_the_digits_agree_with_brute_force_in_float64(digits, curve_of_digits, brute_force, place, level):
    curve = curve_of_digits
    assert curve.noise_level[place] == level
    data = draw_population(digits).data.double() / 127.5 - 1
    truth = brute_force(data, level, (16, 256), rows=400, seed=4)
    for name in ("dsm", "divergence", "source_weight", "ess"):
        assert deviation(getattr(curve, name), place, truth[name]) < 4, name
    for n in (16, 256):
        assert deviation(curve.stf[n], place, truth[n]) < 4


@pytest.mark.parametrize("images", [600, 300])  # sets of a small population share calls
def test_within_classes_the_curves_agree_with_brute_force(digits, brute_force, images):
    population = draw_population(digits, max_images=images, by_class=True)
    assert population.drawn_from == len(digits)
    curve = measure_variance(population, [1.2], sizes=(64,), draws=3, seed=3)
    data = population.data.double() / 127.5 - 1
    truth = brute_force(data, 1.2, (64,), rows=400, seed=4, labels=population.labels)
    for name in ("dsm", "divergence", "source_weight", "ess"):
        assert deviation(getattr(curve, name), 0, truth[name]) < 4, name
    assert deviation(curve.stf[64], 0, truth[64]) < 4


@pytest.mark.parametrize("labels", [None, torch.arange(90) % 3])
def test_sets_that_share_a_call_give_what_each_gives_alone(two_gaussians, monkeypatch, labels):
    population = Population(two_gaussians[:90], labels)
    together = measure_variance(population, [0.3, 1.0, 3.0], sizes=(4, 32), draws=3)
    monkeypatch.setattr("stablefield.probing._variance._SET_PAIRS", 0)
    alone = measure_variance(population, [0.3, 1.0, 3.0], sizes=(4, 32), draws=3)
    for n in (4, 32):
        assert torch.allclose(together.stf[n].mean, alone.stf[n].mean, rtol=1e-4, atol=1e-7)
        assert torch.allclose(together.stf[n].error, alone.stf[n].error, rtol=1e-3, atol=1e-7)


def test_standard_errors_are_those_of_repetition(two_gaussians):
    population = Population(two_gaussians[:60])
    runs = [measure_variance(population, [0.3, 1.0], sizes=(8,), draws=2, seed=seed) for seed in range(24)]
    for pick in (lambda c: c.dsm, lambda c: c.source_weight, lambda c: c.stf[8]):
        means = torch.stack([pick(run).mean for run in runs])
        stated = torch.stack([pick(run).error for run in runs]).square().mean(0).sqrt()
        assert ((stated / means.std(0) > 0.55) & (stated / means.std(0) < 1.9)).all()


def test_sampled_sources_give_the_same_curves_with_larger_errors(digits):
    population = draw_population(digits)
    every = measure_variance(population, [1.0, 2.0], sizes=(64,), draws=2)
    some = measure_variance(population, [1.0, 2.0], sizes=(64,), sources=300)
    assert not some.complete
    assert some.sources == 300
    assert (some.dsm.error > every.dsm.error).all()
    gap = (some.dsm.mean - every.dsm.mean).abs() / torch.hypot(some.dsm.error, every.dsm.error)
    assert (gap < 4).all()


@pytest.fixture(scope="module")
def curve_of_edm(two_gaussians):
    return measure_variance(Population(two_gaussians[:100]), [0.4, 1.0, 3.0], sizes=(16,), seed=1)


@pytest.mark.parametrize("process", [sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()])
def test_the_variance_does_not_depend_on_the_process_and_that_of_the_score_does(two_gaussians, curve_of_edm, process):
    population, plain = Population(two_gaussians[:100]), curve_of_edm
    other = measure_variance(population, [0.4, 1.0, 3.0], sizes=(16,), seed=1, process=process)
    assert torch.allclose(other.noise_level, plain.noise_level, rtol=1e-6)
    assert torch.allclose(other.dsm.mean, plain.dsm.mean, rtol=1e-3, atol=1e-6)
    assert torch.allclose(other.stf[16].mean, plain.stf[16].mean, rtol=2e-3, atol=1e-6)
    t = process.time(other.noise_level)
    assert torch.allclose(other.score_factor, process.alpha(t) ** 2 / process.sigma(t) ** 4)


def test_a_process_with_a_table_is_measured_at_its_own_levels(two_gaussians):
    table = sf.Discrete(torch.linspace(0.99, 0.01, 50))
    curve = measure_variance(Population(two_gaussians[:50]), [0.5, 2.0], sizes=(), process=table)
    levels = table.noise_level(torch.arange(50)).double()
    assert all(float((levels - level).abs().min()) < 1e-12 for level in curve.noise_level)


def test_v_dsm_tends_to_the_variance_of_the_data_and_v_stf_to_a_part_in_n(two_gaussians):
    population = Population(two_gaussians)
    centred = two_gaussians.double() - two_gaussians.double().mean(0)
    assert population.variance() == pytest.approx(float(centred.square().sum(1).mean()), rel=1e-6)
    curve = measure_variance(population, [300.0], sizes=(8,), draws=4)
    assert float(curve.dsm.mean[0]) == pytest.approx(curve.total, rel=1e-3)
    # References without replacement: 1 / n less the correction for the finite set.
    expected = (1 / 8) * (1 - 8 / 1000) * (1000 / 999)
    assert abs(float(curve.left(8).mean[0]) - expected) < 4 * float(curve.left(8).error[0])
    assert float(curve.divergence.mean[0]) < 1e-3


def test_the_variance_within_classes_is_the_mean_of_the_classes_variances(digits):
    population = draw_population(digits, by_class=True)
    data, labels = population.data.flatten(1).double() / 127.5 - 1, population.labels
    parts = [(data[labels == k] - data[labels == k].mean(0)).square().sum() for k in range(10)]
    assert population.variance() == pytest.approx(float(sum(parts)) / len(data), rel=1e-6)


def test_the_noise_levels_chosen_span_the_three_phases(digits):
    population = draw_population(digits)
    levels = find_noise_levels(population)
    assert len(levels) == 21
    ends = measure_variance(population, levels[[0, -1]], sizes=(), sources=200)
    assert ends.dsm.mean[0] < 1e-3 * ends.total
    assert ends.dsm.mean[1] > 0.98 * ends.total
    assert ends.divergence.mean[1] < 0.01 * math.log(len(population))


@pytest.mark.parametrize(("rare", "far"), [(2, 14.0), (1, 31.0)])
def test_the_noise_levels_chosen_reach_to_where_rare_samples_count(rare, far):
    """Of 1,000 numbers near 0 a few lie far off: V_DSM is the variance of all only with noise as large as their distance."""
    data = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) * 0.1
    data[:rare] = far
    population = Population(data)
    levels = find_noise_levels(population)
    assert population.radius() == pytest.approx(far - float(data.mean()), rel=1e-6)
    assert float(levels[-1]) == pytest.approx(population.radius(), rel=1e-9)
    assert float((levels[1:] / levels[:-1]).max()) < 1.901
    curve = measure_variance(population, levels, sizes=(), sources=1000, draws=2)
    assert float(curve.dsm.mean[-1]) > 0.9 * population.variance()
    curve.check_covers(sf.probing.Training(process=sf.RectifiedFlow(), noise_levels=sf.Uniform(0.0, 1.0)).levels(4096))


def test_a_table_has_one_level_for_all_that_are_nearest_to_it(two_gaussians):
    table = sf.Discrete(torch.linspace(0.99, 0.01, 50))
    curve = measure_variance(Population(two_gaussians[:50]), [1e-4, 1e-3, 1e-2, 0.5, 2.0], sizes=(4,), process=table)
    assert bool((curve.noise_level.diff() > 0).all())
    assert len(curve.noise_level) == len(curve.dsm.mean) == len(curve.stf[4].mean) == 3
    found = sf.probing.probe_data(
        two_gaussians[:50],
        training=sf.probing.Training(process=table, noise_levels=sf.LogNormal(), batch=8),
        references=[4],
        device="cpu",
    )
    assert 0 < found.advice.sizes[0].left < 1


def test_the_same_seed_gives_the_same_curves(two_gaussians):
    first, second = (measure_variance(Population(two_gaussians[:80]), sizes=(16,), draws=2, seed=7) for _ in range(2))
    assert torch.equal(first.dsm.mean, second.dsm.mean)
    assert torch.equal(first.stf[16].mean, second.stf[16].mean)


def test_sets_smaller_than_a_shared_batch_and_of_all_but_one_are_measured(two_gaussians):
    curve = measure_variance(Population(two_gaussians[:50]), [1.0], sizes=(1, 2, 49, 50, 9999), draws=60)
    assert set(curve.stf) == {2, 49}
    assert float(curve.left(1).mean[0]) == 1
    assert float(curve.left(50).mean[0]) == 0
    assert 0 < float(curve.stf[49].mean[0]) < 0.05 * float(curve.stf[2].mean[0])
    with pytest.raises(ValueError, match=r"size is 7, which was not measured: pass one of 2, 49 and 50"):
        curve.left(7)


def test_progress_runs_to_one(two_gaussians):
    seen = []
    measure_variance(Population(two_gaussians[:100]), [1.0], sizes=(4,), progress=seen.append)
    done = [report.done for report in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"noise_levels": [0.0]}, "noise_levels=\\["),
        ({"noise_levels": [math.nan]}, "noise_levels=\\["),
        ({"noise_levels": []}, "noise_levels=\\["),
        ({"noise_levels": [1.0], "sizes": (0,)}, "sizes are"),
        ({"noise_levels": [1.0], "sources": 2}, "sources is 2: pass at least 3"),
        ({"noise_levels": [1.0], "draws": 0}, "draws is 0"),
        ({"noise_levels": [1.0], "draws": 1}, "draws is 1, with every sample"),
    ],
)
def test_numbers_out_of_range_are_named(two_gaussians, arguments, words):
    with pytest.raises(ValueError, match=words):
        measure_variance(Population(two_gaussians[:20]), **arguments)


@pytest.mark.parametrize(
    ("data", "labels", "words"),
    [
        (torch.zeros(1, 4), None, "data hold 1 sample"),
        (torch.full((9, 4), 0.3), None, "all 9 samples are equal"),
        (torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([0, 1, 1]), "all 3 samples of each class are equal"),
        (torch.tensor([[0.0], [math.nan]]), None, r"data\[1\] holds NaN"),
        (torch.tensor([[0.0], [math.inf]]), None, r"data\[1\] holds NaN or inf"),
        (torch.zeros(3, 4, dtype=torch.long), None, "dtype torch.int64"),
        (torch.zeros(3), None, "shape"),
        (torch.rand(3, 2), torch.zeros(2, dtype=torch.long), "labels has shape"),
    ],
)
def test_data_without_variance_or_with_nan_are_told_of(data, labels, words):
    with pytest.raises(ValueError, match=words):
        Population(data, labels)


def test_many_images_are_sampled_and_only_the_drawn_are_read(tmp_path):
    import numpy as np

    from stablefield.data import make_image_set
    from stablefield.data._image_set import Origin

    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (300_000, 1, 2, 2))
    mapped[:] = np.random.default_rng(0).integers(0, 256, (300_000, 1, 2, 2), np.uint8)
    images = make_image_set(mapped, None, Origin(name="x", source="a test"))
    population = draw_population(images, max_images=500)
    assert len(population) == 500
    assert population.drawn_from == 300_000
    assert measure_variance(population, [0.1], sizes=(16,)).drawn_from == 300_000
    with pytest.raises(ValueError, match="no classes"):
        draw_population(images, by_class=True)
    with pytest.raises(ValueError, match="max_images is 1"):
        draw_population(images, max_images=1)


def test_interpolation_is_exact_on_power_laws_and_stops_at_the_ends():
    level = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    at = torch.tensor([0.05, 0.1, 0.5, 3.0, 10.0, 50.0], dtype=torch.float64)
    found = interpolate(at, level, level**2)
    assert torch.allclose(found, torch.tensor([0.0, 0.01, 0.25, 9.0, 100.0, 100.0], dtype=torch.float64))
    assert torch.equal(interpolate(at, level, torch.zeros(3, dtype=torch.float64)), torch.zeros(6, dtype=torch.float64))


def test_combining_two_estimates_takes_the_better_one():
    generator = torch.Generator().manual_seed(0)
    good = 5 + 0.1 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    poor = 5 + 3 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    for pair in ((good, poor), (poor, good)):
        best = Series.of_sets(*pair, torch.ones(400, dtype=torch.float64))
        assert float(best.error[0]) == pytest.approx(0.1 / 20, rel=0.15)
        assert abs(float(best.mean[0]) - 5) < 4 * float(best.error[0])
