"""The ledger of variance: its terms and levers against integrals, and against the measured variance of batches."""

import copy
import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import stablefield as sf
from stablefield.networks import MLP, SongUNet
from stablefield.probing import _gradient_products
from stablefield.probing._gradient_products import GradientSampler
from stablefield.probing._population import Population
from stablefield.probing._training import Training
from stablefield.probing._variance_ledger import Lever, VarianceLedger, measure_ledger
from stablefield.report import Estimate, render_page

TERMS = ["noise level", "image", "noise", "target"]


class Affine(nn.Module):
    """D(x, sigma) = w x + b, with one w and one b for all numbers, in float64."""

    def __init__(self, w: float, b: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, x, sigma):  # noqa: ARG002
        return self.w * x + self.b


def bounded(s):
    """A loss weight that gives the gradient of such a network no heavy tail."""
    return 1 / (0.25 + s**2)


def integrals(points, w, b, training):
    """Terms and levers of an affine network on points of the line, by quadrature: shares of a row's variance."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    e, p = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    batch, fine = training.batch, 256
    u = (torch.arange(batch * fine, dtype=torch.float64) + 0.5) / (batch * fine)
    s = training.noise_levels.quantile(u, training.process)[:, None, None]
    x0 = points[:, None].double()
    x = x0 + s * e  # (levels, points, noises)
    logits = -((x[..., None] - points.double()) ** 2) / (2 * s[..., None] ** 2)
    mean = (logits.softmax(-1) * points.double()).sum(-1)
    factor = 2 * training.weighting(s)

    def gradient(target):
        error = factor * (w * x + b - target)
        return torch.stack([error * x, error], -1)

    def mean_over_noise(value):
        return (value * p[:, None]).sum(-2)

    def products(g):
        cell = mean_over_noise(g)  # (levels, points, 2)
        level = cell.mean(1)
        # The weights of importance sampling, fitted to the derivative by b: that in the network's output.
        root = (g[..., 1] ** 2 * p).sum(-1).mean(1).unflatten(0, (32, -1)).mean(1).sqrt()
        v = (1 / (0.2 + 0.8 * root / root.mean())).repeat_interleave(len(u) // 32)
        pair = ((g + g.flip(2)) / 2).square().sum(-1)
        return {
            "reweighted": ((v - 1)[:, None] * ((g**2).sum(-1) * p).sum(-1)).mean(),
            "pair at level": (v * ((pair * p).sum(-1).mean(1) - (level**2).sum(-1))).mean(),
            "row": ((g**2).sum(-1) * p).sum(-1).mean(),
            "mirror": ((g * g.flip(2)).sum(-1) * p).sum(-1).mean(),
            "cell": (cell**2).sum(-1).mean(),
            "level": (level**2).sum(-1).mean(),
            "stratum": (level.unflatten(0, (batch, fine)).mean(1) ** 2).sum(-1).mean(),
            "image": (cell.mean(0) ** 2).sum(-1).mean(),
            "nothing": (level.mean(0) ** 2).sum(),
        }

    single, stable = products(gradient(x0)), products(gradient(mean))
    target = ((gradient(x0) - gradient(mean)) ** 2).sum(-1)
    terms = torch.stack(
        [
            stable["level"] - stable["nothing"],
            stable["cell"] - stable["level"],
            stable["row"] - stable["cell"],
            (target * p).sum(-1).mean(),
        ]
    )
    variance = single["row"] - single["nothing"]
    assert float(terms.sum() / variance) == pytest.approx(1, rel=1e-6)  # the law of total variance

    def with_levers(q):
        plain = q["row"] - q["nothing"]
        draws = [plain + (k - 1) * (q["image"] - q["nothing"]) for k in (2, 4)]
        pair = (q["row"] + q["mirror"]) / 2 - q["nothing"]
        strata = (q["row"] + q["mirror"]) / 2 - q["stratum"]
        found = [plain, q["row"] - q["stratum"], *draws, 2 * pair, plain + q["reweighted"], 2 * strata]
        return torch.stack([*found, 2 * q["pair at level"]]) / variance

    return variance, terms / variance, with_levers(single), with_levers(stable)


def agrees(estimate, truth, errors=4.5, slack=0.0):
    return abs(estimate.value - float(truth)) < errors * estimate.error + slack + 1e-9


@pytest.mark.parametrize(
    ("points", "w", "b"), [((-1.0, 1.0), 0.6, 0.1), ((-1.0, 0.3, 2.0), 0.3, -0.5)], ids=["2 points", "3 points"]
)
def test_terms_and_levers_of_a_linear_network_are_the_integrals(points, w, b):
    """In a batch of 4, so that stratified levels leave a part of the variance between levels."""
    data = torch.tensor(points, dtype=torch.float64)
    training = Training(noise_levels=sf.LogNormal(mean=-0.4, std=0.8), weighting=bounded, batch=4)
    variance, terms, single, stable = integrals(data, w, b, training)
    found = measure_ledger(Affine(w, b), Population(data[:, None]), training, groups=240)
    assert found is not None
    assert agrees(found.variance, variance / 4)
    for name, truth in zip(TERMS, terms, strict=True):
        assert agrees(found.terms[name], truth), (name, found.terms[name], truth)
        assert found.terms[name].error < 0.03
    for lever, one, two in zip(found.levers[:-1], single, stable, strict=True):
        # 1,280 rows fit the density of importance sampling nearly as well as the integrals do.
        slack = 0.02 if "importance" in lever.name else 0.0
        for share, truth in ((lever.single, one), (lever.stable, two)):
            assert agrees(share, truth, slack=slack), (lever.name, share, truth)
    assert agrees(found.measured, 1)


def test_in_batch_references_have_the_variance_of_batches_drawn_one_by_one():
    data, w, b = torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.6, 0.1
    training = Training(noise_levels=sf.LogNormal(mean=0.3, std=0.8), weighting=bounded, batch=8)
    found = measure_ledger(Affine(w, b), Population(data[:, None]), training, groups=150)
    generator = torch.Generator().manual_seed(1)
    batches = 20_000
    x0 = data[torch.randint(2, (batches, 8), generator=generator)]
    s = torch.exp(0.3 + 0.8 * torch.randn(batches, 8, generator=generator, dtype=torch.float64))
    x = x0 + s * torch.randn(batches, 8, generator=generator, dtype=torch.float64)
    mean = (-((x[:, :, None] - x0[:, None]) ** 2) / (2 * s[:, :, None] ** 2)).softmax(2) @ x0[:, :, None]
    variance = []
    for target in (x0, mean[..., 0]):
        error = 2 * training.weighting(s) * (w * x + b - target)
        variance.append(torch.stack([(error * x).mean(1), error.mean(1)]).var(1).sum())
    assert found is not None
    lever = found.levers[-1]
    assert lever.name == "references from the batch"
    assert lever.single is None
    assert agrees(lever.stable, variance[1] / variance[0])
    assert lever.stable.error < 0.08


def gratings():
    """200 images of 8 x 8 pixels: waves of random direction and phase."""
    generator = torch.Generator().manual_seed(3)
    k = torch.randint(1, 3, (200, 2, 1, 1), generator=generator) * math.tau / 8
    phase = math.tau * torch.rand(200, 1, 1, generator=generator)
    place = torch.arange(8.0)
    return torch.sin(k[:, 0] * place[:, None] + k[:, 1] * place + phase)[:, None]


@functools.cache
def trained(kind, data_name):
    """A network after a few steps, and its data."""
    generator = torch.Generator().manual_seed(0)
    data = gratings()
    if data_name == "digits":
        data = torch.tensor(sf.data.open_images("digits").images[:300]).float() / 127.5 - 1
    if kind == "MLP":
        network = MLP((1, 8, 8), 64, 2, generator=generator)
    else:
        network = SongUNet.ddpmpp((8, 8), 1, 8, (1,), 1, dropout=0.1, generator=generator)
    denoiser = sf.Denoiser(network)
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    objective = sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.Pool(data)))
    for _ in range(20):
        index = torch.randint(len(data), (32,), generator=generator)
        optimizer.zero_grad()
        objective(denoiser, data[index], index=index, generator=generator).loss.backward()
        optimizer.step()
    denoiser.zero_grad()
    return denoiser, data


def measured(denoiser, data, objective, images, batches, seed):
    """Variance of the gradient between independent batches, with its error, by Welford's recurrence."""
    generator = torch.Generator().manual_seed(seed)
    weights = list(denoiser.parameters())
    mean, squares, each = torch.zeros(sum(w.numel() for w in weights)).double(), 0.0, []
    for k in range(batches):
        index = torch.randint(len(data), (images,), generator=generator)
        loss = objective(denoiser, data[index], index=index, generator=generator).loss
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]).double()
        gap = gradient - mean
        mean += gap / (k + 1)
        squares += float(gap @ (gradient - mean))
        each += [float(gap.square().sum())] if k > batches // 4 else []
    spread = np.std(each) / np.mean(each)
    variance = squares / (batches - 1)
    return variance, variance * spread / batches**0.5


def fitted(denoiser, data, objective):
    """Importance sampling after 20 batches, fitted as the trainer does."""
    generator = torch.Generator().manual_seed(2)
    importance = sf.ImportanceSampling(sf.LogNormal(), sf.EDM())
    for _ in range(20):
        index = torch.randint(len(data), (128,), generator=generator)
        with torch.no_grad():
            value = objective(denoiser, data[index], index=index, generator=generator)
        level = value.noise_level
        scale = sf.EDMWeighting()(level) * denoiser.preconditioning(level).c_out ** 2
        importance.observe(importance.sums(level, scale * value.row_loss))
    return importance


@pytest.mark.parametrize("data_name", ["digits", "gratings"])
@pytest.mark.parametrize("kind", ["MLP", "SongUNet"])
def test_terms_add_up_to_the_variance_of_batches_with_and_without_levers(kind, data_name):
    """Independent batches, through the objective and backpropagation; the ledger takes derivatives along directions."""
    denoiser, data = trained(kind, data_name)
    denoiser.eval()
    found = measure_ledger(denoiser, Population(data), Training(batch=16), groups=48 if kind == "MLP" else 16)
    assert found is not None
    assert sum(share.value for share in found.terms.values()) == pytest.approx(1)
    assert agrees(found.measured, 1)
    single = sf.DenoisingTarget(sf.EDM())
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(data))
    pairs = {"draws_per_image": 2, "antithetic": True}
    stratified = sf.LogNormal(stratified=True)
    levers = {lever.name: lever for lever in found.levers}
    compared = [
        (levers["none"].single, {"target": single}, 16),
        (levers["antithetic pairs, stratified"].stable, {"target": stable, "noise_levels": stratified, **pairs}, 8),
    ]
    if kind == "MLP":
        plain, both = (sf.ImportanceSampling(levels, sf.EDM()) for levels in (sf.LogNormal(), stratified))
        state = fitted(denoiser, data, sf.Objective(sf.EDM(), target=stable)).state_dict()
        plain.load_state_dict(state)
        both.load_state_dict(state)
        compared += [
            (levers["importance sampling"].stable, {"target": stable, "importance": plain}, 16),
            (
                levers["pairs, stratified, importance"].stable,
                {"target": stable, "noise_levels": stratified, "importance": both, **pairs},
                8,
            ),
        ]
    for share, settings, images in compared:
        objective = sf.Objective(sf.EDM(), **settings)
        variance, error = measured(denoiser, data, objective, images, 30, 1)
        expected = share.value * found.variance.value
        spread = math.hypot(error, share.error * found.variance.value, share.value * found.variance.error)
        assert abs(variance - expected) < 3.5 * spread, (variance, error, expected, spread)
        assert spread < 0.5 * expected


@pytest.mark.parametrize("kind", ["MLP", "SongUNet"])
def test_derivatives_along_a_direction_are_those_of_backpropagation(kind):
    denoiser, data = trained(kind, "digits")
    denoiser.eval()
    sampler = GradientSampler(denoiser, Population(data), Training(batch=4), False, torch.Generator().manual_seed(0))
    index, u = torch.arange(6), torch.linspace(0.02, 0.98, 6, dtype=torch.float64)
    rows = sampler._rows(index, u, torch.randn(6, 64, generator=torch.Generator().manual_seed(1)))
    weights = list(denoiser.parameters())
    signs = sampler._random_signs(sum(weight.numel() for weight in weights))
    estimate, slope = sampler._along(signs, rows)
    expected = denoiser(rows.x, rows.level).flatten(1)
    assert torch.allclose(estimate, expected, atol=1e-4)
    for row in range(6):
        loss = sf.EDMWeighting()(rows.level[row]) * (expected[row] - rows.x0[row]).square().mean()
        parts = torch.autograd.grad(loss, weights, retain_graph=True)
        along = torch.cat([part.flatten() for part in parts]) @ signs.float()
        found = rows.factor[row] * ((estimate - rows.x0) * slope)[row].sum()
        assert float(found) == pytest.approx(float(along), rel=0.01, abs=0.01)


def test_a_network_of_lower_precision_is_measured_in_float32():
    denoiser, data = trained("MLP", "digits")
    half = copy.deepcopy(denoiser).bfloat16()
    wide = copy.deepcopy(half).float()
    one, two = (measure_ledger(network, Population(data), Training(batch=8), groups=3) for network in (half, wide))
    assert one.record() == two.record()
    assert next(half.parameters()).dtype == torch.bfloat16


def test_without_an_overlap_of_images_the_target_adds_nothing():
    """At noise far below the distance of the images, the stable target is the single sample."""
    data = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
    training = Training(noise_levels=sf.LogNormal(mean=-5, std=0.1), batch=16)
    found = measure_ledger(Affine(0.8, 0.1), Population(data), training, groups=8)
    assert found is not None
    assert found.terms["target"].value == 0
    assert found.levers[0].stable.value == 1
    assert all(lever.single.value == pytest.approx(lever.stable.value) for lever in found.levers[:-1])


def test_antithetic_pairs_remove_all_of_a_gradient_that_is_linear_in_the_noise():
    """The gradient of a bias of D(x) = x + b is 2 w (s e + b) / d: at one level all of its variance is odd in the noise."""

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

        def forward(self, x, sigma):  # noqa: ARG002
            return x + self.b

    data = torch.tensor([[-1.0, 0.5], [1.0, -0.5], [0.2, 0.1]], dtype=torch.float64)
    training = Training(noise_levels=sf.LogUniform(0.01, 0.01 * (1 + 1e-12)), batch=16)
    found = measure_ledger(Bias(), Population(data), training, groups=8)
    assert found is not None
    assert found.terms["noise"].value == pytest.approx(1, abs=1e-3)
    levers = {lever.name: lever.single for lever in found.levers}
    for name in ("antithetic pairs", "antithetic pairs, stratified"):
        assert abs(levers[name].value) < 1e-3


def test_a_seed_decides_every_figure_and_the_network_stays_as_it_was(monkeypatch):
    # Rows that importance sampling is fitted to: a tenth of them depends on the seed as well as all.
    monkeypatch.setattr(_gradient_products, "_ROWS_OF_BIN", 4)
    denoiser, data = trained("SongUNet", "gratings")
    denoiser = copy.deepcopy(denoiser).train()
    denoiser.network.dec.eval()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    modes = [module.training for module in denoiser.modules()]
    state = torch.get_rng_state()
    training = Training(batch=8)
    one, two, other = (
        measure_ledger(denoiser, Population(data), training, groups=3, seed=seed).record() for seed in (1, 1, 2)
    )
    assert one == two
    assert one != other
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in denoiser.modules()] == modes
    assert all(weight.grad is None or not weight.grad.any() for weight in denoiser.parameters())
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


def test_only_weights_that_train_count():
    """Of an affine network with a frozen w, the gradient is that of its bias."""
    data = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    training = Training(noise_levels=sf.LogNormal(mean=0, std=0.5), batch=4)
    network = Affine(0.6, 0.1)
    whole = measure_ledger(network, Population(data), training, groups=50)
    network.w.requires_grad_(False)
    bias = measure_ledger(network, Population(data), training, groups=50)
    network.requires_grad_(False)
    none = measure_ledger(network, Population(data), training, groups=50)
    assert bias.variance.value < 0.8 * whole.variance.value
    assert none.record() == whole.record()


def test_a_network_sees_the_classes_and_its_images_those_of_their_class():
    class Table(nn.Module):
        """A learned mean for each class."""

        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.tensor([[-1.0], [1.0]], dtype=torch.float64))

        def forward(self, x, sigma, class_labels):  # noqa: ARG002
            return self.mean[class_labels] + 0 * x

    labels = torch.arange(40) % 2
    data = (2.0 * labels - 1)[:, None].double() + 0.1 * torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    training = Training(noise_levels=sf.LogNormal(mean=2, std=0.1), batch=8)
    found = measure_ledger(Table(), Population(data.double(), labels), training, labelled=True, groups=32)
    # At so much noise the posterior mean is that of the class, which the network knows: all of the variance is the target's.
    assert found.terms["target"].value > 0.9
    with pytest.raises(ValueError, match="no labels"):
        measure_ledger(Table(), Population(data.double()), training, labelled=True)


@pytest.mark.usefixtures("without_charts")
def test_a_probe_of_a_network_has_the_ledger_in_print_json_and_page(tmp_path):
    denoiser, data = trained("MLP", "digits")
    training = Training(batch=32)
    seen = []
    found = sf.probe(
        data, network=denoiser, training=training, noise_levels=[0.3, 2.0], sources=16, progress=seen.append
    )
    assert isinstance(found, sf.probing.NetworkProbe)
    ledger = found.ledger
    stages = list(dict.fromkeys(report.stage for report in seen))
    assert stages == [
        "measuring the optimum",
        "measuring the network",
        "measuring whole batches",
        "splitting the variance",
    ]
    printed = str(found)
    assert "Most of a gradient's variance comes from the " in printed
    assert ledger.summary in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    record = json.loads(found.save(tmp_path / "probe.json").read_text())["ledger"]
    assert list(record["terms"]) == TERMS
    assert sum(term["share"] for term in record["terms"].values()) == pytest.approx(1)
    assert [lever["lever"] for lever in record["levers"]] == [lever.name for lever in ledger.levers]
    page = render_page(found.page())
    assert "Variance of the gradient" in page
    assert "antithetic pairs, stratified" in page
    assert "ledger" in found._repr_html_()
    assert "represent the data set" not in page
    part = replace(found, drawn_from=50_000, notes=("skipped: step-9.pt is damaged",))
    page, sampled = render_page(part.page()), f"sampled: {found.fit.samples:,} of 50,000 images represent the data set"
    for caution in ("skipped: step-9.pt is damaged", f"{sampled}: the posterior mean over them is not exactly"):
        assert caution in page


def test_the_sentence_names_the_lever_with_the_least_variance():
    denoiser, data = trained("MLP", "digits")
    found = measure_ledger(denoiser.eval(), Population(data), Training(batch=32), groups=24)
    figures = {lever.name: lever.stable.value for lever in found.levers}
    best = min(figures, key=figures.get)
    assert f"What pays most here: {best}, stable target." in found.summary
    assert f"It is worth a batch {1 / figures[best]:.2f} times as large." in found.summary


def test_a_lever_that_is_too_noisy_to_tell_hides_no_other_one():
    """75 ± 30 % may be no gain; 80 ± 2 % is one."""
    levers = {"none": (1.0, 0.01), "antithetic pairs": (0.8, 0.02), "references from the batch": (0.75, 0.3)}
    ledger = VarianceLedger(
        batch=8,
        variance=Estimate(1.0, 0.1),
        terms={name: Estimate(0.25, 0.01) for name in TERMS},
        levers=tuple(Lever(name=name, single=None, stable=Estimate(*figures)) for name, figures in levers.items()),
        measured=Estimate(1.0, 0.1),
        images=4,
        rows=128,
        batches=6,
    )
    assert "What pays most here: antithetic pairs, stable target.\nIt is worth a batch 1.25 times" in ledger.summary
    noisy = replace(ledger, levers=tuple(lever for lever in ledger.levers if lever.name != "antithetic pairs"))
    assert noisy.summary.endswith("No lever lowers it by more than twice its standard error.")


def test_networks_without_a_gradient_have_no_ledger():
    data = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x, sigma):  # noqa: ARG002
            return x

    assert measure_ledger(Unused(), Population(data), Training(batch=4), groups=3) is None
    for network in (Unused(), lambda x, sigma: x):
        found = sf.probe(data, network=network, noise_levels=[1.0], sources=4, device="cpu")
        assert found.ledger is None
        assert found.to_dict()["ledger"] is None
    with pytest.raises(ValueError, match="groups=2: pass a whole number of at least 3"):
        measure_ledger(Unused(), Population(data), Training(), groups=2)
