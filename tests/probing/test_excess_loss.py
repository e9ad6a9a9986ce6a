"""`ExcessLoss`: loss, floor and distance are what enumeration and closed forms say, for every kind of network."""

import json
import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import stablefield as sf
from stablefield._modules import modules_of
from stablefield.probing._prediction import OutputWeighting, Prediction, ScheduledSteps
from stablefield.report import render_page

KINDS = ("denoiser", "x0", "epsilon", "v", "velocity")
PROCESSES = (sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow())
TWO = torch.tensor([[-0.5], [0.5]], dtype=torch.float64)


class Circle(sf.Process):
    """A process of the caller's: a quarter circle of which the time is the angle."""

    def alpha(self, t):
        return torch.cos(t)

    def sigma(self, t):
        return torch.sin(t)

    def alpha_dot(self, t):
        return -torch.sin(t)

    def sigma_dot(self, t):
        return torch.cos(t)

    def time(self, noise_level):
        return torch.atan(noise_level)


class BoundedCircle(Circle):
    time_range = (0.0, math.pi / 2)


class Backwards(BoundedCircle):
    def alpha(self, t):
        return torch.sin(t)

    def sigma(self, t):
        return torch.cos(t)

    def time(self, noise_level):
        return math.pi / 2 - torch.atan(noise_level)


def rowed(values, x):
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def optimum_of_two(x, sigma):
    """The posterior mean of two points -a and a: a tanh(a x / sigma^2)."""
    return 0.5 * torch.tanh(0.5 * x / rowed(sigma, x) ** 2)


def as_kind(denoiser, process, kind):
    """The raw model that is this denoiser, by the definitions of what it predicts."""

    def model(x_t, t, *labels):
        if kind == "denoiser":
            return denoiser(x_t, t, *labels)
        alpha, sigma = rowed(process.alpha(t), x_t), rowed(process.sigma(t), x_t)
        x0 = denoiser(x_t / alpha, process.noise_level(t), *labels)
        noise = (x_t - alpha * x0) / sigma
        if kind == "velocity":
            return rowed(process.alpha_dot(t), x_t) * x0 + rowed(process.sigma_dot(t), x_t) * noise
        return {"x0": x0, "epsilon": noise, "v": alpha * noise - sigma * x0}[kind]

    return model


def test_the_exact_optimum_has_distance_0_and_the_floor_as_its_loss():
    excess = sf.ExcessLoss(TWO, noise_levels=sf.LogNormal(-0.7, 0.7), rows=2000)
    found = excess(optimum_of_two)
    assert float(found.distance.mean.max()) < 1e-20
    gap = found.loss_minus_floor
    assert float(found.floor.mean.max()) > 0.3
    assert bool((gap.mean.abs() < 4 * gap.error + 1e-12).all())
    total = found.total("loss_minus_floor")
    assert abs(total.value) < 4 * total.error


def test_loss_minus_floor_and_the_distance_are_one_number_of_a_gaussian(two_gaussians):
    # D is off by a tenth of the noise level, so the distance is known: w s^2 / 100, with EDM's weight 4 + 1 / s^2.
    def shifted(x, sigma):
        return sf.posterior(x, 1.0, sigma, two_gaussians).mean + 0.1 * sigma[:, None]

    found = sf.ExcessLoss(two_gaussians, rows=1500, levels=4)(shifted)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    expected = (0.01 * (4 * torch.exp(-1.2 + 1.2 * torch.special.ndtri(u)) ** 2 + 1)).reshape(4, -1).mean(1)
    assert bool(((found.distance.mean - expected).abs() < 4 * found.distance.error + 1e-5).all())
    for name in ("distance", "loss_minus_floor"):
        total = found.total(name)
        assert abs(total.value - float(expected.mean())) < 4 * total.error
    gap = found.loss_minus_floor.mean - found.distance.mean
    assert bool((gap.abs() < 4 * found.loss_minus_floor.error).all())
    # What makes the distance the number to compare by.
    assert found.total("distance").error < 0.5 * found.total("loss_minus_floor").error


def test_an_enumeration_over_three_points_gives_the_same_rows():
    points = torch.tensor([[0.0, 0.3], [-0.4, 0.1], [0.5, -0.6]], dtype=torch.float64)
    excess = sf.ExcessLoss(points, noise_levels=sf.LogNormal(-0.5, 0.8), levels=3, rows=40, batch=7)
    found = excess(lambda x, sigma: 0.5 * x)
    for k, part in enumerate(excess._bins):
        loss, distance, floor = [], [], []
        for row in range(40):
            s = float(part.rows.t[row])
            x, x0 = part.rows.x_t[row], part.rows.x0[row]
            w = torch.softmax(-(x - points).square().sum(1) / (2 * s**2), 0)
            mean = w @ points
            weight = (4 + 1 / s**2) / 2
            loss.append(weight * (0.5 * x - x0).square().sum())
            distance.append(weight * (0.5 * x - mean).square().sum())
            floor.append(weight * (w @ (points - mean).square().sum(1)))
        for series, rows in ((found.loss, loss), (found.distance, distance), (found.floor, floor)):
            values = torch.stack(rows)
            assert float(series.mean[k]) == pytest.approx(float(values.mean()), rel=1e-9)
            assert float(series.error[k]) == pytest.approx(float((values.diff().square().mean() / 80).sqrt()), rel=1e-9)
        assert bool((part.rows.t.diff() > 0).all())
    # Every point is a source equally often, up to the last round.
    counts = torch.stack([(excess._bins[0].rows.x0 == point).all(1).sum() for point in points])
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_every_prediction_of_one_denoiser_gives_the_same_numbers(process):
    data = torch.randn(50, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = {}
    for kind in KINDS:
        excess = sf.ExcessLoss(
            data,
            process=process,
            noise_levels=sf.LogNormal(),
            weighting=sf.EDMWeighting(),
            prediction=kind,
            held_out=data[:20] + 0.1,
            levels=3,
            rows=30,
            batch=16,
        )
        found[kind] = excess(as_kind(lambda x, s: x / (1 + rowed(s, x) ** 2), process, kind)).to_dict()
    for kind in KINDS[1:]:
        for left, right in zip(found["denoiser"]["levels"], found[kind]["levels"], strict=True):
            assert left == pytest.approx(right, rel=1e-8)
        assert found["denoiser"]["total"] == pytest.approx(found[kind]["total"], rel=1e-8)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_the_loss_of_a_raw_model_is_the_mean_squared_error_of_its_output(process, kind):
    data = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    excess = sf.ExcessLoss(data, process=process, noise_levels=sf.LogNormal(), prediction=kind, levels=2, rows=50)
    found = excess(lambda x_t, t: 0.3 * x_t)
    for k, part in enumerate(excess._bins):
        rows = part.rows
        target = as_kind(lambda x, s, rows=rows: rows.x0, process, kind)(rows.x_t, rows.t)  # D = x0: the target itself
        expected = (0.3 * rows.x_t - target).square().mean()
        assert float(found.loss.mean[k]) == pytest.approx(float(expected), rel=1e-7)
    level = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)
    known = {"x0": sf.SNRWeighting(power=0), "epsilon": sf.SNRWeighting(), "v": sf.EDMWeighting(1.0)}
    if kind in known and (kind != "v" or isinstance(process, sf.VP | sf.Cosine)):
        torch.testing.assert_close(OutputWeighting(process, kind)(level), known[kind](level))
    if kind == "velocity" and isinstance(process, sf.RectifiedFlow):
        torch.testing.assert_close(OutputWeighting(process, kind)(level), sf.FlowWeighting()(level))


def test_a_network_that_remembers_has_a_gap_to_held_out_samples(digits):
    training, other = digits.images[:600], digits.images[600:1200]
    held_out = torch.from_numpy(other.copy()).float() / 127.5 - 1
    # The posterior mean over the training images knows nothing else.
    pool = torch.from_numpy(training.copy()).float() / 127.5 - 1
    excess = sf.ExcessLoss(training, held_out=held_out, rows=200, levels=4)
    found = excess(lambda x, sigma: sf.posterior(x, 1.0, sigma, pool).mean)
    gap = found.total("gap")
    assert gap.value > 5 * gap.error
    held, loss = found.total("held_out").value, found.total("loss").value
    assert gap.value == pytest.approx(held - loss)
    # One that forgets everything has none, and nothing is held out from data against themselves.
    forgets = excess(lambda x, sigma: torch.zeros_like(x)).total("gap")
    assert abs(forgets.value) < 5 * forgets.error
    assert "gap" in str(found)
    assert found.metrics()["excess_loss/gap"] == gap.value


def test_held_out_float_data_have_the_scaling_of_the_training_data():
    generator = np.random.default_rng(0)
    train, test = generator.normal(3, 2, (80, 6)), generator.normal(5, 4, (50, 6))
    # What the network sees, by the definition of the scaling, in float64.
    seen, held = ((values - train.mean(0)) / (2 * train.std(0)) for values in (train, test))
    sets = [sf.data.make_image_set(part, None, sf.data.Origin(name="a", source="a")) for part in (train, test)]

    def network(x, sigma):
        return sf.posterior(x, 1.0, sigma, torch.from_numpy(seen).to(x)).mean

    found = sf.ExcessLoss(sets[0], held_out=sets[1], rows=50, levels=3)(network)
    expected = sf.ExcessLoss(seen, held_out=held, rows=50, levels=3)(network)
    for name in ("loss", "held_out", "gap"):
        assert found.total(name).value == pytest.approx(expected.total(name).value, rel=1e-4), name
    other = sf.data.make_image_set(test[:, :5], None, sf.data.Origin(name="a", source="a"))
    with pytest.raises(ValueError, match=r"held_out has samples of shape \(5,\)"):
        sf.ExcessLoss(sets[0], held_out=other)


def test_labels_go_to_the_network_and_keep_the_posterior_within_classes(digits):
    pool = torch.from_numpy(digits.images.copy()).float() / 127.5 - 1
    labels = torch.from_numpy(digits.labels.copy()).long()

    def optimum(x, sigma, classes):
        return sf.posterior(x, 1.0, sigma, pool, labels=classes, reference_labels=labels).mean

    excess = sf.ExcessLoss(digits, labels=digits.labels, held_out=pool[:50], held_out_labels=labels[:50], rows=40)
    assert excess(optimum).total("distance").value < 1e-8
    blind = excess(lambda x, sigma, classes: sf.posterior(x, 1.0, sigma, pool).mean)
    assert blind.total("distance").value > 0.01


def test_the_loss_of_your_own_rows_minus_the_floor_is_the_distance(two_gaussians):
    def denoiser(x, sigma):
        return x / (1 + sigma[:, None] ** 2 / 0.0725)  # the best that is linear

    excess = sf.ExcessLoss(two_gaussians, rows=1000)
    objective = sf.Objective(sf.EDM(), target=sf.DenoisingTarget(sf.EDM()))
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(1000, (20_000,), generator=generator)
    value = objective(denoiser, two_gaussians[index], generator=generator)
    rows = excess.of(value.row_loss, value.noise_level)
    expected = excess(denoiser).total("distance")
    assert rows.shape == value.row_loss.shape
    error = math.hypot(float(rows.std()) / 20_000**0.5, expected.error)
    # The floor is measured too, to a few per cent: 0.26 of a loss of 0.33 here.
    floor = float((value.row_loss - rows).mean())
    assert abs(float(rows.mean()) - expected.value) < 4 * error + 0.03 * floor
    # The floor of `of` is that of the bins.
    level = torch.cat([part.rows.t for part in excess._bins])
    assert float(excess.floor(level).mean()) == pytest.approx(excess(denoiser).total("floor").value, rel=0.05)
    # The gradient is the loss's.
    loss = torch.ones(3, requires_grad=True)
    excess.of(loss, torch.ones(3)).sum().backward()
    assert torch.equal(loss.grad, torch.ones(3))


def test_rows_with_a_dropped_label_have_the_floor_of_all_samples():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(240) % 3
    data = 0.4 * (labels[:, None] - 1) + 0.15 * torch.randn(240, 4, generator=generator, dtype=torch.float64)
    excess = sf.ExcessLoss(data, labels=labels, noise_levels=sf.LogNormal(-1.0, 1.0), rows=240)
    # A training with half of the labels dropped, and a network that is perfect: posterior means by enumeration.
    index = torch.arange(24_000) % 240
    level = torch.exp(-1 + torch.randn(24_000, generator=generator, dtype=torch.float64))
    noise = torch.randn(24_000, 4, generator=generator, dtype=torch.float64)
    x_t = data[index] + level[:, None] * noise
    seen = torch.where(torch.rand(24_000, generator=generator) < 0.5, -1, labels[index])
    logits = -torch.cdist(x_t, data).square() / (2 * level[:, None] ** 2)
    logits = logits.masked_fill((seen[:, None] >= 0) & (labels != seen[:, None]), -math.inf)
    mean = logits.softmax(1) @ data
    row_loss = (4 + 1 / level**2) * (mean - data[index]).square().mean(1)
    rows = excess.of(row_loss, level, seen)
    for part in (seen == -1, seen >= 0, seen >= -1):
        floor = float((row_loss - rows)[part].mean())
        assert abs(float(rows[part].mean())) < 4 * float(rows[part].std()) / int(part.sum()) ** 0.5 + 0.03 * floor
    # The difference that it makes is far outside of that.
    assert float(excess.of(row_loss, level).mean()) > 0.05
    assert torch.equal(excess.of(row_loss, level, labels[index]), excess.of(row_loss, level))
    shaped = excess.of(
        row_loss.reshape(-1, 6).float(), level.reshape(-1, 6).float(), seen.to(torch.int8).reshape(-1, 6)
    )
    torch.testing.assert_close(shaped.flatten().double(), rows, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"labels has shape \(3,\) and dtype torch.int64, row_loss has shape \(24000,\)"
    ):
        excess.of(row_loss, level, seen[:3])
    with pytest.raises(ValueError, match=r"labels has .* dtype torch\.float32"):
        excess.of(row_loss, level, seen.float())
    with pytest.raises(ValueError, match="labels holds -2: pass classes from 0, and -1 for a dropped label"):
        excess.of(row_loss, level, seen - 1)
    with pytest.raises(ValueError, match="this ExcessLoss was made without labels"):
        sf.ExcessLoss(data).of(row_loss, level, seen)


@pytest.mark.parametrize("odd", [-0.5, math.nan, -math.inf])
def test_noise_levels_that_are_none_are_refused(odd):
    measured = sf.ExcessLoss(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=rf"^noise_level holds {odd:g}: pass sigma / alpha of each row, 0 or more"):
        measured.of(torch.ones(3), torch.tensor([0.0, 1.0, odd]))
    assert measured.of(torch.ones(2), torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("weighting", [None, sf.SNRWeighting(), sf.EDMWeighting()])
def test_at_a_noise_level_of_0_there_is_no_floor(process, weighting):
    excess = sf.ExcessLoss(TWO, process=process, weighting=weighting, prediction="epsilon", levels=2, rows=4)
    level, loss = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 2.0, 0.0])
    found = excess.of(loss, level)
    assert torch.equal(found[level == 0], loss[level == 0])
    assert float(found[1]) < 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, np.uint8, np.uint16])
def test_labels_of_all_integers_go_to_an_embedding(dtype):
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 4

    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 3, _weight=torch.arange(12.0).reshape(4, 3))

        def forward(self, x, sigma, classes):
            return x / (1 + sigma[:, None]) + 0.01 * self.embedding(classes)

    given = labels.to(dtype) if isinstance(dtype, torch.dtype) else labels.numpy().astype(dtype)
    found, same = (
        sf.ExcessLoss(data, labels=each, held_out=data, held_out_labels=each, levels=2, rows=8)(Embedded()).metrics()
        for each in (given, labels)
    )
    assert found == same


@pytest.mark.parametrize("one", [1.0, torch.tensor(1.0), torch.ones(1), np.ones(5)])
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_a_process_whose_scales_are_not_one_for_each_row_is_named(name, one):
    wrong = type("Wrong", (BoundedCircle,), {name: lambda self, t: one, "__repr__": lambda self: "Wrong()"})()
    x0 = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    t, circle = torch.full((5,), 0.5), BoundedCircle()
    for call in (
        lambda: wrong.perturb(x0, t),
        lambda: sf.StableTarget(wrong, references=sf.Pool(x0))(x0, circle.perturb(x0, t), t, index=torch.arange(5)),
        lambda: sf.DenoisingTarget(wrong)(x0, circle.perturb(x0, t), t),
        lambda: sf.ExcessLoss(x0, process=wrong),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} of Wrong\(\) .* one value per row, shape \(B,\)"):
            call()


@pytest.mark.parametrize("name", ["alpha_dot", "sigma_dot"])
def test_a_process_whose_rates_are_not_one_for_each_row_is_named(name):
    wrong = type("Wrong", (BoundedCircle,), {name: lambda self, t: 0.0, "__repr__": lambda self: "Wrong()"})()
    x0 = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    t = torch.full((5,), 0.5)
    target = sf.DenoisingTarget(wrong)(x0, wrong.perturb(x0, t), t)
    for call in (lambda: target.velocity, lambda: sf.ExcessLoss(x0, process=wrong, prediction="velocity")):
        with pytest.raises(TypeError, match=rf"^{name} of Wrong\(\) is a float: .* one value per row, shape \(B,\)"):
            call()


def test_the_errors_are_those_of_many_seeds(two_gaussians):
    def shrunk(x, sigma):
        return 0.7 * sf.posterior(x, 1.0, sigma, two_gaussians).mean

    runs = [sf.ExcessLoss(two_gaussians, rows=32, levels=4, seed=seed)(shrunk) for seed in range(60)]
    for name in ("loss", "floor", "loss_minus_floor", "distance"):
        totals = [run.total(name) for run in runs]
        spread = float(np.std([total.value for total in totals], ddof=1))
        stated = float(np.sqrt(np.mean([total.error**2 for total in totals])))
        assert 0.75 < spread / stated < 1.3, name  # 60 seeds: within 0.19


class Net(nn.Module):
    """A network with state to disturb: dropout, and a batch norm that would follow its input."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.sizes = []

    def forward(self, x, t):  # noqa: ARG002
        assert not torch.is_grad_enabled()
        torch.rand(3)
        self.sizes.append(len(x))
        return SimpleNamespace(sample=self.drop(self.norm(x.to(self.norm.weight.dtype))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mode_random_state_and_buffers_stay_and_rows_come_in_chunks(dtype):
    data = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    network = Net().to(dtype)
    network.drop.eval()  # a module that its owner froze stays frozen
    torch.manual_seed(7)
    before, mean = torch.get_rng_state(), network.norm.running_mean.clone()
    excess = sf.ExcessLoss(data, levels=2, rows=10, batch=4)
    first = excess(network)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network.norm.running_mean, mean)
    assert network.training
    assert network.norm.training
    assert not network.drop.training
    assert network.sizes == [4, 4, 2, 4, 4, 2]
    again = excess(network)
    assert first.metrics() == again.metrics()
    with pytest.raises(RuntimeError, match="fails"):
        excess(Failing())
    assert torch.equal(torch.get_rng_state(), before)


GLOBAL = {"net": Net()}


class Wrapper:
    """An object that keeps its network where only its methods look."""

    def __init__(self, net):
        self.inner = SimpleNamespace(net=net)

    def __call__(self, x, t):
        return self._raw(x, t)

    def _raw(self, x, t):
        return self.inner.net(x, t)

    def method(self, x, t):
        return self(x, t)


def through_a_default(net):
    return lambda x, t, net=net: net(x, t)


def through_two_closures(net):
    def inner(x, t):
        return net(x, t)

    return lambda x, t: inner(x, t)


def through_a_global(net):
    GLOBAL["net"] = net
    return lambda x, t: GLOBAL["net"](x, t)


def through_self(net):
    wrapper = Wrapper(net)
    return lambda x, t: wrapper.inner.net(x, t)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: lambda x, t: net(x, t),
        lambda net: net.forward,
        lambda net: partial(lambda model, x, t: model(x, t), net),
        Wrapper,
        lambda net: Wrapper(net).method,
        through_a_default,
        through_two_closures,
        through_a_global,
        through_self,
        lambda net: sf.sampling.counted(lambda x, t: net(x, t).sample),
        lambda net: lambda x, t: [net][0](x, t),
    ],
)
def test_a_function_around_a_network_is_measured_as_the_network_itself(wrap):
    network = Net()
    network.norm.running_mean += 0.3
    before = {name: value.clone() for name, value in network.state_dict().items()}
    excess = sf.ExcessLoss(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), levels=2, rows=10)
    # By hand in evaluation mode.
    by_hand = excess(network.eval()).metrics()
    network.train()
    network.norm.eval()  # each part keeps a mode of its own
    assert excess(wrap(network)).metrics() == by_hand
    assert (network.training, network.norm.training, network.drop.training) == (True, False, True)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert modules_of(wrap(network)) == [network]


def test_a_search_for_modules_ends_and_runs_nothing():
    loop = SimpleNamespace(calls=0)
    loop.loop, loop.net = loop, [loop]

    class Touchy:
        @property
        def net(self):
            raise AssertionError

    def model(x, t):
        return loop.net.loop.calls + Touchy().net + torch.tanh(x) + np.tanh(t) + model(x, t)

    assert modules_of(model) == []
    assert modules_of(lambda x, t: touchy.net(x, t)) == []
    touchy = Touchy()
    assert modules_of(lambda x, t: touchy.net(x, t)) == []
    assert modules_of(torch.tanh) == []


class Failing(nn.Module):
    def forward(self, x, t):  # noqa: ARG002
        raise RuntimeError("fails")


def test_a_sample_stands_for_the_data_and_the_result_says_so(digits):
    whole, part = (sf.ExcessLoss(digits, sample=sample, rows=16, levels=2) for sample in (None, 100))
    found = part(lambda x, sigma: x)
    assert (found.samples, found.drawn_from) == (100, 1797)
    assert "100 of 1,797 images represent" in str(found)
    assert found.to_dict()["drawn_from"] == 1797
    note = "sampled: 100 of 1,797 images represent the data set: the floor is theirs, and not exactly the training"
    assert note in render_page(found.page())
    every = whole(lambda x, sigma: x)
    assert every.drawn_from is None
    assert "represent the data set" not in render_page(every.page())


def test_the_result_saves_itself_and_fits_a_terminal(digits, tmp_path):
    found = sf.ExcessLoss(digits, held_out=digits.images[:100], rows=16)(lambda x, sigma: x)
    assert max(map(len, str(found).splitlines())) <= 80
    assert len(str(found).splitlines()) == 12
    record = json.loads(found.save(tmp_path / "a.json").read_text())
    assert record["prediction"] == "denoiser"
    assert record["process"] == "EDM()"
    assert len(record["levels"]) == 8
    assert record["total"]["distance"] == found.total("distance").value
    metrics = found.metrics("a/")
    assert all(type(value) is float for value in metrics.values())
    assert {"a/loss", "a/loss_se", "a/distance", "a/held_out", "a/gap_se"} <= set(metrics)
    page = found.save(tmp_path / "a.html").read_text()
    assert "held-out" in page
    assert page.count("<svg") == 2
    assert found._repr_html_().startswith("<iframe")
    assert found.save(tmp_path / "a.png").stat().st_size > 1000


def test_a_network_that_returns_nan_is_still_logged(digits, tmp_path):
    found = sf.ExcessLoss(digits, rows=4, levels=2)(lambda x, sigma: x * math.nan)
    assert math.isnan(found.metrics()["excess_loss/distance"])
    assert found.metrics()["excess_loss/floor"] > 0
    assert found.to_dict()["total"]["loss"] is None
    found.save(tmp_path / "a.json")
    found.save(tmp_path / "a.html")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prediction": "noise"}, "prediction='noise': pass one of denoiser, x0, epsilon, v, velocity"),
        ({"process": sf.Discrete([0.9, 0.5]), "prediction": "velocity"}, "no time derivative"),
        ({"held_out": torch.rand(5, 3)}, r"held_out has samples of shape \(3,\), data of \(4,\)"),
        ({"held_out": torch.full((5, 4), math.nan)}, r"held_out: data\[0\] holds NaN"),
        ({"labels": torch.zeros(6, dtype=torch.long), "held_out": torch.rand(5, 4)}, "held_out_labels"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels has shape \(3,\)"),
        ({"rows": 1}, "rows=1"),
        ({"levels": 0}, "levels=0"),
        ({"sample": 1}, "sample=1"),
        ({"batch": 0}, "batch=0"),
        ({"process": sf.Discrete([0.9, 0.5]), "prediction": "v", "levels": 4}, "levels=4"),
        ({"weighting": lambda level: level * math.inf}, "weighting=.* is not finite"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=words):
        sf.ExcessLoss(data, **settings)


def test_wrong_calls_are_named():
    excess = sf.ExcessLoss(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), levels=2, rows=4)
    with pytest.raises(ValueError, match=r"the model returned shape \(4, 3\) for rows of shape \(4, 4\)"):
        excess(lambda x, sigma: x[:, 1:])
    with pytest.raises(TypeError, match="the model's output is None"):
        excess(lambda x, sigma: None)
    with pytest.raises(TypeError, match="model is a float"):
        excess(0.5)
    with pytest.raises(ValueError, match=r"row_loss has shape \(3,\), noise_level \(2,\)"):
        excess.of(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="name='v': pass one of loss"):
        excess(lambda x, sigma: x).total("v")


def test_schedulers_of_diffusers_say_what_the_network_predicts_and_what_time_it_gets():
    diffusers = pytest.importorskip("diffusers")
    data = torch.randn(40, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for prediction, kind in (("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "x0")):
        scheduler = diffusers.DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=prediction != "epsilon")
        regression = sf.from_diffusers(scheduler)
        raw = as_kind(lambda x, s: x / (1 + rowed(s, x) ** 2), regression.process, kind)
        seen = []

        def model(x, timesteps, raw=raw, seen=seen):
            assert timesteps.dtype == torch.int64
            seen.append(timesteps)
            return raw(x, timesteps.double())

        excess = sf.ExcessLoss(data, process=regression, levels=4, rows=100)
        found = excess(model)
        assert found.description["prediction"] == kind
        times = torch.cat(seen)
        assert int(times.min()) < 10
        assert 990 < int(times.max()) < 1000
        by_hand = sf.ExcessLoss(data, process=regression.process, prediction=kind, levels=4, rows=100)
        assert by_hand(raw).metrics() == pytest.approx(found.metrics(), rel=1e-6)
    flow = sf.from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler())
    seen = []

    def velocity(x, timesteps):
        seen.append(timesteps)
        return as_kind(lambda x, s: x / (1 + rowed(s, x) ** 2), sf.RectifiedFlow(), "velocity")(x, timesteps / 1000)

    scaled = sf.ExcessLoss(data, process=flow, levels=3, rows=50)(velocity)
    assert 990 < float(torch.cat(seen).max()) < 1000
    steps = ScheduledSteps(tuple(k / 1000 for k in range(1, 1000)))
    plain = sf.ExcessLoss(
        data, process=sf.RectifiedFlow(), noise_levels=steps, prediction="velocity", levels=3, rows=50
    )
    raw = as_kind(lambda x, s: x / (1 + rowed(s, x) ** 2), sf.RectifiedFlow(), "velocity")
    assert plain(raw).metrics() == pytest.approx(scaled.metrics(), rel=1e-6)
    with pytest.raises(ValueError, match="clock 'log level'"):
        sf.ExcessLoss(data, process=sf.from_diffusers(diffusers.EDMEulerScheduler()))


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"num_train_timesteps": 50}])
def test_the_steps_of_a_flow_scheduler_are_those_of_a_loop_that_draws_its_timesteps_by_index(settings):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    if "use_karras_sigmas" in settings:
        scheduler.set_timesteps(100)  # a table
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3
    regression = sf.from_diffusers(scheduler)
    raw = regression.clock == "share"
    excess = sf.ExcessLoss(
        data,
        process=regression,
        prediction=None if raw else "denoiser",
        weighting=OutputWeighting(sf.RectifiedFlow(), "velocity"),
        rows=400,
    )

    def velocity(x, t):
        return 0.3 * x - t[:, None] / 2000

    def denoiser(x, sigma):
        t = sigma[:, None] / (1 + sigma[:, None])
        return (1 - t) * x - t * velocity((1 - t) * x, t[:, 0] * scheduler.config.num_train_timesteps)

    found = excess(velocity if raw else denoiser).total("loss")
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(len(scheduler.timesteps), (40_000,), generator=generator)
    noise = torch.randn(40_000, 4, generator=generator, dtype=torch.float64)
    x0, t = data.repeat(1000, 1), scheduler.timesteps[index].double()
    alone = scheduler.sigmas[: len(scheduler.timesteps)].double()[index][:, None]
    rows = (velocity((1 - alone) * x0 + alone * noise, t) - noise + x0).square().mean(1)
    # The step without signal is left out, of which a loop draws one in 50 to 1,000.
    rows = rows[alone[:, 0] < 1]
    assert abs(found.value - float(rows.mean())) < 4 * math.hypot(found.error, float(rows.std()) / 200)
    by_index = scheduler.sigmas[: len(scheduler.timesteps)].double().sort().values
    level = (by_index / (1 - by_index))[by_index < 1]
    # 8 bins of equally many steps, each with its middle.
    torch.testing.assert_close(
        excess._median, level[((torch.arange(8) + 0.5) / 8 * len(level)).long()], rtol=1e-4, atol=0
    )


def test_noise_levels_of_a_training_that_is_unknown_are_asked_for():
    diffusers = pytest.importorskip("diffusers")
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    regression = sf.from_diffusers(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match=r"noise_levels=None: the scheduler .* pass noise_levels=LogNormal"):
        sf.ExcessLoss(data, process=regression, prediction="denoiser")

    @dataclass(frozen=True)
    class ByIndex(sf.NoiseLevels):
        def quantile(self, u, process):  # noqa: ARG002
            return regression.times[(u * len(regression.times)).long()]

    excess = sf.ExcessLoss(data, process=regression, prediction="denoiser", noise_levels=ByIndex(), levels=4)
    sigmas = diffusers.EDMEulerScheduler().sigmas[:-1].double().sort().values
    torch.testing.assert_close(excess._median, sigmas[[125, 375, 625, 875]], rtol=1e-5, atol=0)
    by_hand = sf.Regression(sf.RectifiedFlow(), "velocity", "share", 1000)
    with pytest.raises(ValueError, match="noise_levels=None"):
        sf.ExcessLoss(data, process=by_hand)


def test_a_process_of_the_callers_has_the_times_of_its_range_or_says_how_it_draws_them():
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    excess = sf.ExcessLoss(data, process=BoundedCircle(), levels=4)
    expected = torch.tan((torch.arange(4, dtype=torch.float64) + 0.5) / 8 * math.pi)
    torch.testing.assert_close(excess._median, expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"noise_levels=None: .*time_range is from -inf to inf: pass noise_levels="):
        sf.ExcessLoss(data, process=Circle())
    with pytest.raises(ValueError, match=r"process=Backwards: its time runs from noise to data"):
        sf.ExcessLoss(data, process=Backwards())
    # With levels that are stated it is the same process.
    settings = {"noise_levels": sf.LogNormal(), "levels": 3, "rows": 40}
    found, same = (
        sf.ExcessLoss(data, process=process, **settings)(lambda x, sigma: 0.5 * x).total("loss").value
        for process in (Backwards(), Circle())
    )
    assert found == pytest.approx(same, rel=1e-4)

    @dataclass(frozen=True)
    class Falling(sf.NoiseLevels):
        def quantile(self, u, process):  # noqa: ARG002
            return 1 - u

    with pytest.raises(ValueError, match=r"noise_levels=.*Falling\(.*: its noise level falls .* let quantile"):
        sf.ExcessLoss(data, process=sf.Cosine(), noise_levels=Falling())


def test_the_population_may_be_an_array_and_the_denoiser_that_of_another_process():
    data = np.random.default_rng(0).normal(size=(20, 3))
    found = sf.ExcessLoss(data, process=sf.VP(), levels=2, rows=8)(lambda x, sigma: x / (1 + rowed(sigma, x) ** 2))
    assert found.description == {
        "process": "VP(beta_min=0.1, beta_max=20.0)",
        "noise_levels": "Uniform(stratified=False, start=1e-05, end=1.0)",
        "weighting": "EDMWeighting(sigma_data=0.5)",
        "prediction": "denoiser",
    }
    assert Prediction(sf.EDM(), "x0").weighting() == OutputWeighting(sf.EDM(), "x0")


@pytest.mark.parametrize("training", ["flips", "unequal draws"])
def test_what_training_makes_of_the_data_is_passed_as_data(training):
    """The optimum by hand of random flips, or of draws 1 to 4 times as often, is at distance 0 only with what is passed."""
    data = torch.randn(6, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.tensor([1, 4, 2, 1, 3, 1])
    if training == "flips":
        passed = torch.cat([data, data.flip(-1)])
        points, prior = passed, torch.full((12,), 1 / 12, dtype=torch.float64)
    else:
        passed = data.repeat_interleave(times, 0)
        points, prior = data, times / times.sum()

    def optimum(x, sigma):
        square = (x[:, None] - points).flatten(2).square().sum(2)
        near = (prior.log() - square / (2 * sigma.reshape(-1, 1) ** 2)).softmax(1).to(points)
        return (near @ points.flatten(1)).reshape(x.shape)

    right, wrong = (sf.ExcessLoss(of, rows=48, levels=4, device="cpu")(optimum) for of in (passed, data))
    assert right.total("distance").value < 1e-12
    assert wrong.total("distance").value > 0.01
    # At high noise the floor is the variance of the prior.
    middle = (prior[:, None] * points.flatten(1)).sum(0)
    spread = float((prior[:, None] * (points.flatten(1) - middle) ** 2).sum())
    floor = sf.ExcessLoss(passed, rows=48, levels=4, noise_levels=sf.LogUniform(1.0, 80.0), device="cpu").floor
    assert float(floor.variance[-1]) == pytest.approx(spread, rel=0.02)
