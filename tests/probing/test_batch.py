"""The variance of a batch's gradient, against enumeration, batches drawn one by one, and the ledger of a network."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stablefield as sf
from stablefield.probing._advice import Training, advise
from stablefield.probing._batch import measure_batch
from stablefield.probing._population import Population
from stablefield.probing._training import TRAININGS
from stablefield.probing._variance import measure_variance
from stablefield.probing._variance_ledger import measure_ledger

ATOMS = Population(torch.tensor([-1.0, 1.0]).repeat(2000)[:, None])


def at_noise_level(level: float, batch: int) -> Training:
    """All levels weigh the same, and nothing is known of the network: the gradient is the plain sum of the targets."""
    levels = sf.LogUniform(level, level * (1 + 1e-6))
    return Training(noise_levels=levels, weighting=sf.SNRWeighting(power=0), batch=batch)


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
    # The gradient of EDM's loss at the start has variance weight ((1 - c_skip)^2 + c_skip^2 s^2), and the data mean 0.
    skip = 0.25 / (sigma[:, 0, 0] ** 2 + 0.25)
    of_gradient = weight @ ((1 - skip) ** 2 + skip**2 * sigma[:, 0, 0] ** 2)
    whole = float(found.batch.whole.mean)
    assert whole == pytest.approx(1 - weight @ of_one / of_gradient, abs=4 * float(found.batch.whole.error) + 0.002)
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


def test_weights_without_a_variance_are_refused() -> None:
    curve = measure_variance(ATOMS, [1.0], sizes=(), sources=8, draws=1)
    for weighting in (lambda s: 0 * s, lambda s: -s, lambda s: s * torch.inf):
        training = Training(noise_levels=sf.LogUniform(1.0, 1.0 + 1e-6), weighting=weighting)
        with pytest.raises(ValueError, match=r"training\.weighting is .* not negative, and not 0 everywhere"):
            measure_batch(ATOMS, curve, training, band=0.0, batches=3)


USUAL = pytest.mark.parametrize("usual", TRAININGS, ids=[usual.name for usual in TRAININGS])


def gradients(name: str, s: Tensor, x0: Tensor, noise: Tensor, target: Tensor) -> Tensor:
    """Of the loss with respect to the network's output, where that is 0; written as each parameterisation has it."""
    if name in ("VE", "VP"):  # predicts the noise, so the target is (x - target) / s, and the output 0
        return (target - x0) / s - noise
    if name == "flow":  # predicts the velocity x0 - noise
        return (target - x0) * (1 + 1 / s) + x0 - noise
    # EDM, equation 8: the network's target has the scale of 1.
    c_skip, c_out = 0.25 / (s**2 + 0.25), 0.5 * s / torch.sqrt(s**2 + 0.25)
    return (target - c_skip * (x0 + s * noise)) / c_out


def drawn_one_by_one(usual: Training, data: Tensor, size: int | None) -> tuple[float, float]:
    """Var(sum of gradients), stable over single, from batches of 3 with `size` references, and its standard error."""
    generator = torch.Generator().manual_seed(5)
    count, rows, n = 60_000, 3, len(data)
    index = torch.randint(n, (count, rows), generator=generator)
    if size is None:
        found = index
    else:
        order = torch.rand(count, n, generator=generator).scatter_(1, index, -1.0)
        found = order.argsort(1)[:, :size]  # the rows of the batch, each once, and others
    u = torch.rand(count, rows, generator=generator, dtype=torch.float64)
    s = usual.process.noise_level(usual.noise_levels.quantile(u, usual.process))[..., None]
    noise = torch.randn(count, rows, data.shape[1], generator=generator, dtype=torch.float64)
    x0, references = data[index], data[found]
    logits = -((x0 + s * noise)[:, :, None] - references[:, None]).square().sum(-1) / (2 * s**2)
    mean = logits.softmax(-1) @ references
    sums = torch.stack([gradients(usual.name, s, x0, noise, target).sum(1) for target in (mean, x0)])
    parts = (sums - sums.mean(1, keepdim=True)).square().sum(2).unflatten(1, (60, -1)).mean(2)
    ratio = float(parts[0].mean() / parts[1].mean())
    error = (parts[0] - ratio * parts[1]).std() / parts[1].mean() / 60**0.5
    return ratio, float(error)


@USUAL
def test_the_variance_is_that_of_the_gradient_of_the_trainings_own_loss(usual: Training) -> None:
    data = 0.3 + 0.5 * torch.randn(12, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    population, training = Population(data), replace(usual, batch=3)
    curve = measure_variance(population, process=usual.process, sizes=(6,), draws=400)
    measured = measure_batch(population, curve, training, band=0.0, batches=600)
    for size, series in ((None, measured.in_batch), (6, measured.pools[6]), (12, measured.whole)):
        ratio, error = drawn_one_by_one(usual, data, size)
        assert max(error, float(series.error)) < 0.03
        assert float(series.mean) == pytest.approx(ratio, abs=4 * math.hypot(error, float(series.error)) + 0.002), size


class Bias(nn.Module):
    """A network that returns one number per pixel, 0 at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        return self.bias.reshape(x.shape[1:]) + 0 * x


PRECONDITIONINGS = {
    "EDM": sf.EDMPreconditioning(),
    "VE": sf.VEPreconditioning(),
    "VP": sf.VPPreconditioning(),
    "flow": sf.FlowPreconditioning(),
}


@USUAL
@pytest.mark.parametrize("stratified", [False, True], ids=["independent", "stratified"])
def test_the_ledger_of_a_network_that_returns_its_bias_says_the_same(
    usual: Training, stratified: bool, digits: sf.data.ImageSet
) -> None:
    levels = replace(usual.noise_levels, stratified=stratified)
    training, population = replace(usual, noise_levels=levels, batch=64), Population(torch.tensor(digits.images))
    curve = measure_variance(population, process=usual.process, sizes=(), sources=600)
    measured = measure_batch(population, curve, training, band=0.0, batches=100)
    network = sf.Denoiser(Bias(population.dim), PRECONDITIONINGS[usual.name])
    ledger = measure_ledger(network, population, training, groups=96)
    assert ledger is not None
    plain, strata, *_, in_batch = ledger.levers
    found = strata if stratified else plain
    assert found.single is not None
    share = found.stable.value / found.single.value
    assert float(measured.whole.mean) == pytest.approx(
        share, abs=4 * math.hypot(found.stable.error, float(measured.whole.error))
    )
    if not stratified:  # the ledger's whole batches have independent levels
        assert float(measured.in_batch.mean) == pytest.approx(
            in_batch.stable.value, abs=4 * math.hypot(in_batch.stable.error, float(measured.in_batch.error))
        )


def test_the_parameterisation_follows_from_the_loss_weight() -> None:
    """The loss weighs the error of the network's output equally at all noise levels: weight c_out^2 = 1."""
    level = torch.logspace(-3, 3, 50, dtype=torch.float64)
    for weighting in (sf.EDMWeighting(0.7), sf.SNRWeighting(), sf.FlowWeighting()):
        scalings = Training(weighting=weighting).preconditioning
        assert scalings is not None
        torch.testing.assert_close(weighting(level) * scalings(level).c_out ** 2, torch.ones_like(level))
    for weighting in (sf.SNRWeighting(maximum=5), sf.SNRWeighting(power=0), lambda s: 1 / s):
        assert Training(weighting=weighting).preconditioning is None
