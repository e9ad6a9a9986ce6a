import math
from dataclasses import replace

import pytest
import torch

import stablefield as sf
from stablefield.probing._advice import Training, advise
from stablefield.probing._floor import LossFloor, logged_excess
from stablefield.probing._phases import find_phases, share_above
from stablefield.probing._population import Population
from stablefield.probing._series import Series
from stablefield.probing._variance import VarianceCurve, measure_variance

LEVELS = torch.logspace(-2, 2, 41, dtype=torch.float64)


def made_curve(dsm, stf=None, divergence=None, error=0.0):
    """A curve in closed form, with total variance 1, for 1,000 samples of 10 numbers."""

    def series(values):
        return Series(values, torch.full_like(values, error))

    return VarianceCurve(
        noise_level=LEVELS,
        dsm=series(dsm),
        stf={n: series(values) for n, values in (stf or {}).items()},
        divergence=series(torch.ones_like(LEVELS) if divergence is None else divergence),
        source_weight=series(torch.ones_like(LEVELS)),
        ess=series(torch.ones_like(LEVELS)),
        score_factor=LEVELS**-4,
        total=1.0,
        samples=1000,
        drawn_from=None,
        dim=10,
        sources=1000,
        draws=2,
        seconds=41.0,
    )


def test_the_edges_of_a_power_law_are_where_it_meets_the_tolerances():
    curve = made_curve((LEVELS / 10) ** 2, divergence=math.log(1000) / LEVELS)
    phases = find_phases(curve, 0.03)
    assert phases.single_below.noise_level == pytest.approx(10 * 0.03**0.5, rel=1e-9)
    assert phases.prior_above.noise_level == pytest.approx(1 / 0.03, rel=1e-9)
    assert find_phases(curve, 0.001).single_below.noise_level == pytest.approx(10 * 0.001**0.5, rel=1e-9)


def test_an_edge_has_the_interval_that_two_standard_errors_give():
    edge = find_phases(made_curve(LEVELS / 10, error=0.002), 0.02).single_below
    assert edge.low == pytest.approx(0.16, rel=0.02)
    assert edge.high == pytest.approx(0.24, rel=0.02)
    falling = made_curve(LEVELS, divergence=math.log(1000) / LEVELS, error=0.02)
    edge = find_phases(falling, 0.02).prior_above
    assert edge.noise_level == pytest.approx(50)
    assert edge.low < 50 < edge.high


def test_the_peak_is_that_of_the_score():
    # s^8 / (1 + s^6) / s^4 has its peak at 2^(1/6).
    phases = find_phases(made_curve(LEVELS**8 / (1 + LEVELS**6)))
    assert phases.peak == pytest.approx(2 ** (1 / 6), rel=0.13)


def test_edges_beyond_the_levels_measured_are_none():
    phases = find_phases(made_curve(torch.ones_like(LEVELS)))
    assert phases.single_below is None
    assert phases.prior_above is None
    assert find_phases(made_curve(torch.zeros_like(LEVELS))).single_below is None
    for tolerance in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance is"):
            find_phases(made_curve(LEVELS), tolerance)


@pytest.mark.parametrize(
    ("distribution", "process"),
    [
        (sf.LogNormal(), sf.EDM()),
        (sf.LogUniform(), sf.VE()),
        (sf.Uniform(1e-5, 1.0), sf.VP()),
        (sf.Uniform(0.0, 1.0), sf.RectifiedFlow()),
    ],
)
def test_the_share_of_a_batch_in_the_band_is_that_of_drawn_batches(distribution, process):
    drawn = process.noise_level(distribution.sample(process, 200_000, torch.Generator().manual_seed(0)))
    for level in (0.1, 1.0, 3.0):
        share = share_above(level, distribution, process)
        assert share == pytest.approx(float((drawn >= level).double().mean()), abs=0.005)


def test_the_share_under_edm_has_a_closed_form():
    for level in (0.3, 2.0):
        expected = 0.5 * math.erfc((math.log(level) + 1.2) / 1.2 / 2**0.5)
        assert share_above(level, sf.LogNormal(), sf.EDM()) == pytest.approx(expected, rel=1e-9)
    assert share_above(0.0, sf.LogNormal(), sf.EDM()) == 1
    assert share_above(1e9, sf.LogNormal(), sf.EDM()) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="level is -1"):
        share_above(-1.0, sf.LogNormal(), sf.EDM())


def test_the_variance_left_is_weighted_as_training_weighs_it():
    dsm = LEVELS**4 / (1 + LEVELS**4)
    curve = made_curve(dsm, {8: dsm / (1 + LEVELS), 64: dsm / 50})
    training = Training(noise_levels=sf.LogUniform(0.1, 50), weighting=sf.SNRWeighting(), batch=100)
    advice = advise(curve, training, band=0.0, aim=0.1)
    drawn = sf.LogUniform(0.1, 50).sample(sf.EDM(), 400_000, torch.Generator().manual_seed(0)).double()
    v = drawn**4 / (1 + drawn**4) / drawn**2
    expected = float((v / (1 + drawn)).sum() / v.sum())
    assert [entry.size for entry in advice.sizes] == [8, 64, 1000]
    assert advice.sizes[0].left == pytest.approx(expected, rel=0.01)
    assert advice.sizes[1].left == pytest.approx(1 / 50, rel=1e-3)
    assert advice.sizes[2].left == 0
    assert advice.recommended.size == 64


def test_the_cost_is_that_of_the_rows_in_the_band():
    curve = made_curve(LEVELS**4 / (1 + LEVELS**4), {8: torch.zeros_like(LEVELS)})
    advice = advise(curve, Training(noise_levels=sf.LogUniform(0.1, 10), batch=100), band=0.5)
    # 41 seconds for 2,000 rows at 41 levels against 1,000 samples: half a microsecond per pair.
    assert advice.sizes[0].flops == pytest.approx(4 * 100 * advice.share * 8 * 10)
    assert advice.sizes[0].seconds == pytest.approx(100 * advice.share * 8 * 41 / (2000 * 41 * 1000))
    assert advice.share == pytest.approx(math.log(10 / 0.5) / math.log(10 / 0.1), rel=1e-6)
    for band, share in ((0.0, 1), (math.inf, 0)):
        assert advise(curve, Training(), band=band).share == pytest.approx(share, abs=1e-12)


def test_nothing_but_the_whole_set_may_be_what_it_takes():
    dsm = LEVELS**4 / (1 + LEVELS**4)
    assert advise(made_curve(dsm, {8: dsm / 2}), Training(), band=0.0).recommended.size == 1000
    with pytest.raises(ValueError, match="aim is 1"):
        advise(made_curve(dsm), Training(), band=0.0, aim=1.0)
    with pytest.raises(ValueError, match="batch is 0"):
        Training(batch=0)


def test_the_floor_is_the_loss_of_the_exact_posterior_mean(two_gaussians):
    population = Population(two_gaussians)
    level = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    curve = measure_variance(population, level, sizes=(64,), draws=4)
    noise_levels = sf.LogUniform(0.5, 0.5001)
    generator = torch.Generator().manual_seed(0)
    for size, target in (
        (1, sf.DenoisingTarget(sf.EDM())),
        (64, sf.StableTarget(sf.EDM(), references=sf.Pool(two_gaussians, 64))),
        (1000, sf.StableTarget(sf.EDM(), references=sf.Pool(two_gaussians))),
    ):
        floor = LossFloor.of(curve, sf.EDMWeighting(), size)
        objective = sf.Objective(sf.EDM(), noise_levels=noise_levels, target=target)
        losses = []
        for _ in range(80):
            index = torch.randperm(1000, generator=generator)[:50]
            value = objective(
                lambda x, s: sf.posterior(x, 1.0, s, two_gaussians).mean,
                two_gaussians[index],
                index=index,
                generator=generator,
            )
            losses.append(value.loss)
        loss = torch.stack(losses).double()
        expected = float(floor(torch.tensor(0.5)))
        assert abs(float(loss.mean()) - expected) < 4 * float(loss.std()) / 80**0.5 + 0.01 * expected + 1e-9
        assert float(floor.excess(loss.mean(), torch.tensor(0.5))) == pytest.approx(float(loss.mean()) - expected)


def test_the_floor_of_a_bin_is_the_mean_over_its_rows():
    curve = made_curve(LEVELS**4 / (1 + LEVELS**4))
    training = Training()
    floor = LossFloor.of(curve, training.weighting)
    edges = (0.1, 0.4, 1.5)
    drawn = sf.LogNormal().sample(sf.EDM(), 400_000, torch.Generator().manual_seed(0)).double()
    place = torch.bucketize(drawn, torch.tensor(edges, dtype=torch.float64))
    values = floor(drawn)
    expected = [float(values[place == k].mean()) for k in range(4)]
    assert floor.bins(edges, training).tolist() == pytest.approx(expected, rel=0.02)
    assert math.isnan(float(floor.bins((1e-9, 1.0), training)[0]))


def test_the_logged_excess_is_that_of_the_network_whatever_the_references_were(two_gaussians):
    # A network that is off by 0.2 in every number has an excess of 0.04 w(s), with DSM and with STF.
    curve = measure_variance(Population(two_gaussians), sizes=(), draws=4)
    training = Training(noise_levels=sf.LogUniform(0.3, 5), weighting=sf.SNRWeighting(power=0))
    floor = LossFloor.of(curve, training.weighting)
    edges = (0.6, 1.5)
    for target in (sf.DenoisingTarget(sf.EDM()), sf.StableTarget(sf.EDM(), references=sf.Pool(two_gaussians, 200))):
        objective = sf.Objective(
            sf.EDM(), noise_levels=training.noise_levels, weighting=training.weighting, target=target
        )
        generator = torch.Generator().manual_seed(3)
        rows = []
        for _ in range(60):
            index = torch.randperm(1000, generator=generator)[:64]
            value = objective(
                lambda x, s: sf.posterior(x, 1.0, s, two_gaussians).mean + 0.2,
                two_gaussians[index],
                index=index,
                generator=generator,
            )
            rows.append(torch.stack([value.noise_level, value.row_loss, value.variance_removed], 1))
        level, loss, removed = torch.cat(rows).double().T.contiguous()
        place = torch.bucketize(level, torch.tensor(edges, dtype=torch.float64))
        entry = {
            "step": 7,
            "bin_edges": list(edges),
            "bin_loss": [float(loss[place == k].mean()) for k in range(3)],
            "bin_variance_removed": [float(removed[place == k].mean()) for k in range(3)],
        }
        (found,) = logged_excess([{"step": 1, "loss": 1.0}, entry], floor, training)
        error = [float((loss + removed)[place == k].std() / (place == k).sum() ** 0.5) for k in range(3)]
        assert found.step == 7
        assert all(abs(value - 0.04) < 4 * e + 5e-4 for value, e in zip(found.excess, error, strict=True))
    empty = {"step": 8, "bin_edges": list(edges), "bin_loss": [None, 1.0, 1.0]}
    assert logged_excess([empty], floor, training)[0].excess[0] is None


def test_the_floor_of_a_size_that_was_not_measured_is_refused():
    curve = made_curve(LEVELS, {8: LEVELS})
    with pytest.raises(ValueError, match="size is 9, which was not measured: pass one of 1, 8, 1000"):
        LossFloor.of(curve, sf.EDMWeighting(), 9)
    assert torch.equal(LossFloor.of(replace(curve, samples=9), sf.EDMWeighting(), 9)(LEVELS), torch.zeros_like(LEVELS))
