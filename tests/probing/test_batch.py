"""The variance of a batch's sum of targets, against enumeration."""

import math

import numpy as np
import pytest
import torch

import stablefield as sf
from stablefield.probing._advice import Training, advise
from stablefield.probing._batch import measure_batch
from stablefield.probing._population import Population
from stablefield.probing._variance import measure_variance

ATOMS = Population(torch.tensor([-1.0, 1.0]).repeat(2000)[:, None])


def at_noise_level(level: float, batch: int) -> Training:
    return Training(noise_levels=sf.LogUniform(level, level * (1 + 1e-6)), batch=batch)


def enumerated(batch: int, references: int, sigma: float = 1.0) -> float:
    """Var(sum of targets) / Var(sum of x0) for atoms -1 and +1: over all counts of +1, by quadrature of the noise."""
    z, w = np.polynomial.hermite_e.hermegauss(80)
    w = w / w.sum()
    k = np.arange(references + 1)
    with np.errstate(divide="ignore"):
        odds = np.log(k) - np.log(references - k)
    moments = {}
    for atom in (1, -1):
        target = np.tanh((odds[:, None] + 2 * (atom + sigma * z) / sigma**2) / 2)
        mean = target @ w
        moments[atom] = mean, (target**2) @ w - mean**2

    def chances(n: int) -> np.ndarray:
        return np.array([math.comb(n, j) for j in range(n + 1)], dtype=float) / 2.0**n

    others, square, mean = chances(references - batch), 0.0, 0.0
    for plus, chance in enumerate(chances(batch)):
        found = slice(plus, plus + references - batch + 1)
        total, spread = (
            np.nan_to_num(plus * moments[1][i][found] + (batch - plus) * moments[-1][i][found]) for i in (0, 1)
        )
        square += chance * others @ (spread + total**2)
        mean += chance * others @ total
    return (square - mean**2) / batch


def test_in_batch_references_raise_the_variance_of_the_batch_as_enumeration_says() -> None:
    assert enumerated(2, 2) == pytest.approx(1.1237, abs=1e-4)
    curve = measure_variance(ATOMS, [1.0], sizes=(), sources=64, draws=1)
    found = measure_batch(ATOMS, curve, at_noise_level(1.0, 2), band=0.0, batches=800).in_batch
    assert float(found.error) < 0.015
    assert float(found.mean) - 4 * float(found.error) > 1
    assert float(found.mean) == pytest.approx(1.1237, abs=4 * float(found.error))


def test_pools_lower_the_variance_of_the_batch_only_well_beyond_it() -> None:
    curve = measure_variance(ATOMS, [1.0], sizes=(32, 80, 128, 512), sources=2000, draws=1)
    training = at_noise_level(1.0, 64)
    found = measure_batch(ATOMS, curve, training, band=0.0, batches=150)
    assert sorted(found.pools) == [80, 128, 512]
    exact = {64: 1.2438, 80: 1.1047, 128: 0.8965, 512: 0.6368}
    for size, series in ((64, found.in_batch), *found.pools.items()):
        assert enumerated(64, size) == pytest.approx(exact[size], abs=1e-4)
        assert float(series.error) < 0.13
        assert float(series.mean) == pytest.approx(exact[size], abs=4 * float(series.error)), size
    # The whole set: E tanh(1 + z)^2, z a standard normal.
    assert float(found.whole.mean) == pytest.approx(0.5504, abs=4 * float(found.whole.error) + 0.002)
    assert found.of(32, 4000) is None
    # Row by row 80 references leave less than a tenth of the variance, but the batch varies more with them.
    row, both = (advise(curve, training, band=0.0, batch=batch) for batch in (None, found))
    assert [entry.size for entry in both.sizes] == [32, 80, 128, 512, 4000]
    assert row.recommended.size <= 80 < both.recommended.size
    assert all(entry.batch is None for entry in row.sizes)
    assert both.sizes[0].batch is None


def test_rows_below_the_band_count_with_their_single_sample() -> None:
    curve = measure_variance(ATOMS, [1.0], sizes=(128,), sources=64, draws=1)
    found = measure_batch(ATOMS, curve, at_noise_level(1.0, 8), band=2.0, batches=5)
    for series in (found.in_batch, found.whole, *found.pools.values()):
        assert float(series.mean) == pytest.approx(1, abs=1e-5)


def test_rows_of_a_class_share_the_references_of_their_class() -> None:
    """Two classes of atoms -1 and +1 about means that are far apart: the variance between classes stays."""
    data = torch.cat([ATOMS.data[:1000] + 10, ATOMS.data[:1000] - 10])
    labels = torch.arange(2).repeat_interleave(1000)
    population = Population(data, labels)
    curve = measure_variance(population, [1.0], sizes=(), sources=200, draws=1)
    found = measure_batch(population, curve, at_noise_level(1.0, 16), band=0.0, batches=60)
    between = (100 + 0.5504) / 101
    assert float(found.whole.mean) == pytest.approx(between, abs=1e-3)
    assert 0.98 < float(found.in_batch.mean) < 1.02


@pytest.mark.parametrize("levels", [None, [1.0], [0.5, 2.0]])
def test_the_advice_is_about_all_noise_levels_of_the_training_whatever_levels_are_shown(
    levels: list[float] | None,
) -> None:
    """What 16 references and the whole set leave of the variance of atoms -1 and +1: by quadrature and enumeration."""
    training = Training(batch=8)
    found = sf.probing.probe_data(
        ATOMS.data[:600], training=training, references=[16], noise_levels=levels, sources=600, device="cpu"
    )
    z, w = np.polynomial.hermite_e.hermegauss(60)
    w = w / w.sum()
    sigma = training.levels(2000).numpy()[:, None, None]
    x = 1 + sigma * z
    exact = np.tanh(x / sigma**2)
    of_one = ((1 - exact) ** 2 @ w)[:, 0]
    # The other 15 references are drawn without replacement from the 599 other samples, 299 of which are +1.
    plus = np.arange(16)
    chance = np.array([math.comb(299, k) * math.comb(300, 15 - k) / math.comb(599, 15) for k in plus])
    with np.errstate(divide="ignore"):
        odds = np.log(plus + 1) - np.log(15 - plus)
    of_16 = (np.tanh((odds[:, None] + 2 * x / sigma**2) / 2) - exact) ** 2 @ w @ chance
    weight = (sigma[:, 0, 0] ** 2 + 0.25) / (0.5 * sigma[:, 0, 0]) ** 2
    of_size = found.advice.sizes[0]
    assert of_size.error < 0.005
    assert of_size.left == pytest.approx((weight @ of_16) / (weight @ of_one), abs=4 * of_size.error)
    assert found.noise_band.level < 0.2
    # E (1 - tanh)^2 = 1 - E tanh^2: the posterior's mean is calibrated.
    whole = float(found.batch.whole.mean)
    assert whole == pytest.approx(1 - of_one.mean(), abs=4 * float(found.batch.whole.error) + 0.002)
    assert found.phases.single_below is not None
    below = float(np.interp(0.01, of_one, sigma[:, 0, 0]))
    assert found.phases.single_below.noise_level == pytest.approx(below, rel=0.05)
    assert len(found.curve.noise_level) == (21 if levels is None else len(levels))


def test_a_curve_that_leaves_out_noise_levels_of_the_training_is_refused() -> None:
    for levels, left_out in (
        ([1.0], "from 0.[0-9]* to "),
        ([0.1, 0.5, 1.0, 2.0, 4.0, 8.0], "from 0.1 to 0.5:"),
        ([0.1, 0.2, 0.4, 0.8], "from 0.801 to "),
        ([0.8, 1.6, 3.2, 6.4], "from 0.0[0-9]* to 0.8:"),
    ):
        curve = measure_variance(ATOMS, levels, sizes=(), sources=256, draws=1)
        for call in (
            lambda curve=curve: measure_batch(ATOMS, curve, Training(), band=0.0),
            lambda curve=curve: advise(curve, Training(), band=0.0),
        ):
            with pytest.raises(ValueError, match=f"say too little about those of the training {left_out}"):
                call()


def test_two_batches_are_refused() -> None:
    curve = measure_variance(ATOMS, [1.0], sizes=(), sources=8, draws=1)
    with pytest.raises(ValueError, match="batches is 2"):
        measure_batch(ATOMS, curve, Training(), band=0.0, batches=2)
