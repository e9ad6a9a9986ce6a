"""Claims on preconditioning: the published table value by value, unit variances, and what dtype is seen where."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import stablefield as sf
from stablefield.networks._embedding import FourierEmbedding, PositionalEmbedding

EDM = sf.EDMPreconditioning()
SIGMAS = np.array([2e-3, 0.02, 0.1, 0.3, 0.5, 1.0, 2.0, 7.3, 20.0, 80.0, 100.0, 151.0])


class Recorder(nn.Module):
    """A network that keeps what it is called with and returns what it is told to."""

    def __init__(self, answer=lambda x: x, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.answer = answer
        self.calls = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.answer(args[0])

    @property
    def x(self):
        return self.calls[-1][0][0]

    @property
    def label(self):
        return self.calls[-1][0][1]


def edm_table(s, sigma_data):
    root = np.sqrt(s**2 + sigma_data**2)
    return sigma_data**2 / root**2, s * sigma_data / root, 1 / root, np.log(s) / 4


def vp_table(s):
    t = (np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(s**2)) - 0.1) / 19.9
    return np.ones_like(s), -s, 1 / np.sqrt(s**2 + 1), 999 * t


def ve_table(s):
    return np.ones_like(s), s, np.ones_like(s), np.log(s / 2)


def flow_table(s, scale=1.0):
    return 1 / (1 + s), s / (1 + s), 1 / (1 + s), scale / (1 + s)


def ddpm_levels(first=1e-4, last=0.02, steps=1000):
    signal, levels = 1.0, []
    for step in range(steps):
        signal *= 1 - (first + (last - first) * step / (steps - 1))
        levels.append(math.sqrt((1 - signal) / signal))
    return np.array(levels)


def ddpm_table(s):
    levels = ddpm_levels()
    return np.ones_like(s), -s, 1 / np.sqrt(s**2 + 1), np.interp(np.log(s), np.log(levels), np.arange(1000.0))


PRECONDITIONINGS = [
    (sf.EDMPreconditioning(), lambda s: edm_table(s, 0.5)),
    (sf.EDMPreconditioning(sigma_data=1.3), lambda s: edm_table(s, 1.3)),
    (sf.VPPreconditioning(), vp_table),
    (sf.VEPreconditioning(), ve_table),
    (sf.FlowPreconditioning(), flow_table),
    (sf.FlowPreconditioning(label_scale=1000.0), lambda s: flow_table(s, 1000.0)),
    (sf.DDPMPreconditioning(), ddpm_table),
]
EVERY = [preconditioning for preconditioning, _ in PRECONDITIONINGS]


def batch(rows=3, dtype=torch.float32, seed=0):
    return torch.randn(rows, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preconditioning", "table"), PRECONDITIONINGS, ids=lambda value: getattr(value, "__name__", repr(value))[:40]
)
def test_scalings_are_the_published_table(preconditioning, table):
    scalings = preconditioning(torch.from_numpy(SIGMAS))
    for name, value, expected in zip(scalings._fields, scalings, table(SIGMAS), strict=True):
        # The plain logarithm of VP loses 1e-16 / s^2 of its label on purpose.
        np.testing.assert_allclose(value, expected, rtol=1e-10, err_msg=name)
        assert value.dtype == torch.float64


@pytest.mark.parametrize(
    ("preconditioning", "table"), PRECONDITIONINGS, ids=lambda value: getattr(value, "__name__", repr(value))[:40]
)
def test_a_denoiser_is_skip_x_plus_out_times_the_network_at_the_scaled_input(preconditioning, table):
    x = batch(len(SIGMAS), torch.float64)
    network = Recorder(torch.cos, torch.float64)
    estimate = sf.Denoiser(network, preconditioning)(x, torch.from_numpy(SIGMAS))
    skip, out, into, noise = (value.reshape(-1, 1, 1, 1) for value in table(SIGMAS))
    np.testing.assert_allclose(network.x, into * x.numpy(), rtol=1e-12)
    np.testing.assert_allclose(network.label, noise[:, 0, 0, 0], rtol=1e-10)
    np.testing.assert_allclose(estimate.detach(), skip * x.numpy() + out * np.cos(into * x.numpy()), rtol=1e-9)


@pytest.mark.parametrize("sigma", [-0.5, math.nan, -math.inf])
def test_a_float_that_is_no_noise_level_is_refused(sigma):
    with pytest.raises(ValueError, match=rf"^sigma={sigma}: pass a noise level, sigma / alpha, of 0 or more"):
        sf.Denoiser(Recorder())(batch()[0], sigma)


def test_edm_is_the_default():
    assert sf.Denoiser(Recorder()).preconditioning == sf.EDMPreconditioning(sigma_data=0.5)


@pytest.mark.parametrize("steps", [2, 1000])
@pytest.mark.parametrize(("beta_min", "beta_max"), [(0.1, 20.0), (0.5, 8.0)])
def test_the_vp_label_is_the_time_of_the_vp_process_in_steps(steps, beta_min, beta_max):
    preconditioning = sf.VPPreconditioning(beta_min=beta_min, beta_slope=beta_max - beta_min, steps=steps)
    process = sf.VP(beta_min=beta_min, beta_max=beta_max)
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(preconditioning(process.noise_level(t)).c_noise, (steps - 1) * t, rtol=1e-9, atol=0)


def test_the_vp_label_has_the_published_float32_rounding_of_a_plain_logarithm():
    s = np.logspace(-4, 2, 25).astype(np.float32)
    log = np.log(np.float32(1) + s**2)
    t = (np.sqrt(np.float32(0.1**2) + np.float32(2 * 19.9) * log) - np.float32(0.1)) / np.float32(19.9)
    label = sf.VPPreconditioning()(torch.from_numpy(s)).c_noise
    assert label.dtype == torch.float32
    # The difference to 0.1 magnifies an ulp of the root, which is 4e-7 of a label of 1,000 steps.
    np.testing.assert_allclose(label, np.float32(999) * t, rtol=1e-6, atol=2e-6)
    # A more accurate logarithm would be noticed: of small noise the plain one keeps few digits, or none.
    exact = vp_table(s.astype(np.float64))[3]
    assert label[0] == 0
    assert exact[0] > 5e-5
    assert np.abs(label.numpy() - exact)[s < 3e-3].max() > 2e-4


@pytest.mark.parametrize(("first", "last", "steps"), [(1e-4, 0.02, 1000), (1e-3, 0.1, 7)])
def test_the_ddpm_label_is_the_step_of_the_table_and_stays_within_it(first, last, steps):
    levels = torch.from_numpy(ddpm_levels(first, last, steps))
    preconditioning = sf.DDPMPreconditioning(first, last, steps)
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        label = preconditioning(levels.to(dtype)).c_noise
        assert label.dtype == dtype
        torch.testing.assert_close(label.double(), torch.arange(steps).double(), rtol=near, atol=near)
    beyond = torch.tensor([0.0, 1e-9, 1e9, math.inf])
    assert preconditioning(beyond).c_noise.tolist() == [0, 0, steps - 1, steps - 1]
    # DiT's table, with the definition of this library's tables.
    table = sf.Discrete(torch.cumprod(1 - torch.linspace(first, last, steps, dtype=torch.float64), 0))
    steps_there = torch.arange(steps).double()
    torch.testing.assert_close(table.noise_level(steps_there), levels, rtol=1e-12, atol=0)


def test_flow_predicts_the_velocity_from_noise_to_data_which_is_minus_that_of_rectified_flow():
    g = torch.Generator().manual_seed(1)
    y, noise = torch.randn(2, len(SIGMAS), 5, generator=g, dtype=torch.float64)
    process, s = sf.RectifiedFlow(), torch.from_numpy(SIGMAS)
    t = process.time(s)
    x_t = process.perturb(y, t, noise)
    network = Recorder(lambda x: y - noise, torch.float64)
    estimate = sf.Denoiser(network, sf.FlowPreconditioning())(x_t / process.alpha(t)[:, None], s)
    torch.testing.assert_close(estimate, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.x, x_t)
    torch.testing.assert_close(network.label, 1 - t)
    ours = process.alpha_dot(t)[:, None] * y + process.sigma_dot(t)[:, None] * noise
    torch.testing.assert_close(ours, noise - y)


def test_vp_ve_and_ddpm_predict_the_noise_exactly():
    g = torch.Generator().manual_seed(1)
    y, noise = torch.randn(2, len(SIGMAS), 5, generator=g, dtype=torch.float64)
    s = torch.from_numpy(SIGMAS)
    x = y + s[:, None] * noise
    pairs = ((sf.VPPreconditioning(), noise), (sf.VEPreconditioning(), -noise), (sf.DDPMPreconditioning(), noise))
    for preconditioning, answer in pairs:
        network = Recorder(lambda x, answer=answer: answer, torch.float64)
        torch.testing.assert_close(sf.Denoiser(network, preconditioning)(x, s), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.25, 0.5, 1.0, 3.0])
def test_edm_gives_the_network_inputs_and_targets_of_unit_variance_at_every_noise_level(sigma_data):
    # All four equally likely combinations of two-point data and two-point noise: an exact expectation.
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    y, noise = sigma_data * corners[:, :1], corners[:, 1:]
    preconditioning = sf.EDMPreconditioning(sigma_data=sigma_data)
    for s in SIGMAS:
        x = y + s * noise
        zero, one = Recorder(torch.zeros_like, torch.float64), Recorder(torch.ones_like, torch.float64)
        skipped = sf.Denoiser(zero, preconditioning)(x, float(s))
        out = sf.Denoiser(one, preconditioning)(x, float(s)) - skipped
        wanted = (y - skipped) / out
        for what in (zero.x, wanted):
            assert what.mean().item() == pytest.approx(0, abs=1e-9)
            assert what.square().mean().item() == pytest.approx(1, rel=1e-6)
        # Of all c_skip, that one makes an error of the network count least: the input tells nothing of the target's rest.
        assert (zero.x * wanted).mean().item() == pytest.approx(0, abs=1e-6)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioning", EVERY, ids=repr)
@pytest.mark.parametrize("sigma", [2e-3, 0.5, 80.0])
def test_a_float64_state_stays_float64_around_a_float32_network(preconditioning, sigma):
    x = batch(dtype=torch.float64)
    network = Recorder(torch.sin)
    estimate = sf.Denoiser(network, preconditioning)(x, torch.full((3,), sigma, dtype=torch.float64))
    assert network.x.dtype == network.label.dtype == torch.float32
    assert estimate.dtype == torch.float64
    scalings = preconditioning(torch.tensor([sigma], dtype=torch.float64))
    inner = torch.sin((scalings.c_in * x).float()).double()
    torch.testing.assert_close(estimate, scalings.c_skip * x + scalings.c_out * inner, rtol=1e-14, atol=0)
    # The label is the one that the network was trained with, of a float32 noise level.
    assert torch.equal(network.label, preconditioning(torch.full((3,), sigma)).c_noise)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preconditioning", EVERY, ids=repr)
def test_a_low_precision_network_sees_its_own_dtype_and_the_sums_are_float32(preconditioning, low):
    x = batch()
    network = Recorder(torch.sin, low)
    estimate = sf.Denoiser(network, preconditioning)(x, 0.7)
    assert network.x.dtype == network.label.dtype == low
    assert estimate.dtype == torch.float32
    scalings = preconditioning(torch.tensor([0.7]))
    inner = torch.sin((scalings.c_in * x).to(low)).float()
    torch.testing.assert_close(estimate, scalings.c_skip * x + scalings.c_out * inner, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preconditioning", EVERY, ids=repr)
@pytest.mark.parametrize("sigma", [2e-3, 0.02, 0.05, 1.0, 80.0, 1000.0])
def test_a_low_precision_network_gets_the_float32_label_rounded_once(preconditioning, sigma, low):
    network = Recorder(torch.sin, low)
    sf.Denoiser(network, preconditioning)(batch(), sigma)
    assert torch.equal(network.label, preconditioning(torch.full((3,), sigma)).c_noise.to(low))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("preconditioning", "embedding"), [(sf.VPPreconditioning(), PositionalEmbedding), (EDM, FourierEmbedding)], ids=repr
)
def test_networks_of_ours_tell_neighbouring_noise_levels_apart_in_16_bits(preconditioning, embedding, low):
    # 16 bits have a label of 999 in steps of 0.5 or 4, and round a frequency by up to 1 / 256 of itself.
    generator = torch.Generator().manual_seed(0)
    song = sf.networks.SongUNet.ddpmpp if embedding is PositionalEmbedding else sf.networks.SongUNet.ncsnpp
    network = song(8, 1, 16, (1,), blocks=1, dropout=0.0, generator=generator).eval()
    assert isinstance(network.map_noise, embedding)
    seen = []
    network.map_noise.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    x, sigma = torch.zeros(5, 1, 8, 8), torch.tensor([0.01, 0.5, 40.0, 40.1, 79.0])
    denoiser = sf.Denoiser(network, preconditioning)
    denoiser(x, sigma)
    denoiser.to(low)(x, sigma)
    (label, wanted), (rounded, found) = seen
    assert torch.equal(label, rounded)
    assert torch.equal(wanted, found)
    assert network.map_noise.freqs.dtype == torch.float32
    assert network.double().map_noise.freqs.dtype == torch.float64


@pytest.mark.parametrize(
    "network",
    [
        lambda: sf.networks.MLP((1, 8, 8), 8, 1),
        lambda: sf.networks.SiT((8, 8), 2, 1, 16, 1, 2),
        lambda: sf.networks.DiffusersUNet.sized(8, 1, (8, 8), 1, groups=4),
    ],
    ids=["MLP", "SiT", "DiffusersUNet"],
)
def test_all_networks_of_ours_get_labels_in_float32(network):
    network = network().bfloat16().eval()
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    out = sf.Denoiser(network, sf.VPPreconditioning())(torch.zeros(2, 1, 8, 8), torch.tensor([40.0, 40.1]))
    assert torch.equal(seen[0], sf.VPPreconditioning()(torch.tensor([40.0, 40.1])).c_noise)
    assert out.isfinite().all()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_low_precision_state_gives_a_float32_estimate(low):
    network = Recorder(torch.sin)
    x = batch().to(low)
    estimate = sf.Denoiser(network)(x, 0.7)
    assert network.x.dtype == estimate.dtype == torch.float32
    torch.testing.assert_close(estimate, sf.Denoiser(network)(x.float(), 0.7))


def test_a_float64_network_sees_float64_and_answers_in_the_states_dtype():
    network = Recorder(torch.sin, torch.float64)
    estimate = sf.Denoiser(network)(batch(), 0.7)
    assert network.x.dtype == network.label.dtype == torch.float64
    assert estimate.dtype == torch.float32


def test_a_network_without_parameters_sees_the_dtype_of_the_state():
    class Bare(nn.Module):
        def forward(self, x, label):
            self.seen = x.dtype, label.dtype
            return x

    for dtype in (torch.float32, torch.float64):
        network = Bare()
        assert sf.Denoiser(network)(batch(dtype=dtype), 0.7).dtype == dtype
        assert network.seen == (dtype, dtype)


@pytest.mark.parametrize("preconditioning", EVERY, ids=repr)
def test_autocast_reaches_the_network_and_not_the_scalings(preconditioning):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(32, 32)

        def forward(self, x, label):
            self.seen = x.dtype, label.dtype
            self.raw = self.layer(x.flatten(1)).reshape(x.shape)
            return self.raw

    network, x, s = Linear(), batch(), torch.tensor([2e-3, 0.3, 80.0])
    with torch.autocast("cpu", torch.bfloat16):
        estimate = sf.Denoiser(network, preconditioning)(x, s)
    assert network.seen == (torch.float32, torch.float32)
    assert network.raw.dtype == torch.bfloat16
    assert estimate.dtype == torch.float32
    scalings = preconditioning(s.double())
    skip, out, into, _ = (value.reshape(-1, 1, 1, 1) for value in scalings)
    expected = skip * x.double() + out * network.raw.double()
    torch.testing.assert_close(estimate.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = network.layer((into * x).float().flatten(1)).reshape(x.shape)
    assert torch.equal(network.raw, low)


def test_gradients_reach_the_network_and_the_state():
    x = batch(dtype=torch.float64).requires_grad_()
    network = Recorder(dtype=torch.float64)
    network.answer = lambda x: network.weight * x**2
    denoiser = sf.Denoiser(network)
    assert torch.autograd.gradcheck(lambda x: denoiser(x, 0.7), (x,))
    denoiser(x, 0.7).sum().backward()
    assert network.weight.grad is not None


# --- noise levels and labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioning", EVERY, ids=repr)
def test_one_noise_level_for_all_rows_is_that_level_in_each(preconditioning):
    x, denoiser = batch(), sf.Denoiser(Recorder(torch.sin), preconditioning)
    rows = denoiser(x, torch.full((3,), 0.7))
    torch.testing.assert_close(denoiser(x, torch.tensor(0.7)), rows)
    torch.testing.assert_close(denoiser(x, 0.7), rows)
    mixed = denoiser(x, torch.tensor([0.1, 0.7, 9.0]))
    torch.testing.assert_close(mixed[1], rows[1])
    assert not torch.allclose(mixed[0], rows[0])


def test_labels_reach_the_network_if_and_only_if_they_are_given():
    network = Recorder()
    denoiser, x = sf.Denoiser(network), batch()
    classes, augment = torch.tensor([0, -1, 2]), torch.zeros(3, 9)

    def keywords(*args, **kwargs):
        denoiser(x, 0.7, *args, **kwargs)
        args, kwargs = network.calls[-1]
        assert len(args) == 2
        return kwargs

    assert keywords() == {}
    assert keywords(None, None) == {}
    given = keywords(classes)
    assert set(given) == {"class_labels"}
    assert given["class_labels"] is classes
    given = keywords(classes, augment)
    assert set(given) == {"class_labels", "augment_labels"}
    assert given["class_labels"] is classes
    assert given["augment_labels"] is augment


def test_a_network_that_takes_augmentation_labels_alone_is_not_called_with_class_labels():
    network, augment = Recorder(), torch.zeros(3, 9)
    sf.Denoiser(network)(batch(), 0.7, augment_labels=augment)
    assert set(network.calls[-1][1]) == {"augment_labels"}
    assert network.calls[-1][1]["augment_labels"] is augment


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sf.Denoiser(Recorder())(batch(), torch.ones(2)), r"sigma has shape \(2,\)"),
        (lambda: sf.Denoiser(Recorder())(batch(), torch.ones(3, 1)), r"sigma has shape \(3, 1\)"),
        (lambda: sf.EDMPreconditioning(sigma_data=0.0), "sigma_data=0.0"),
        (lambda: sf.EDMPreconditioning(sigma_data=-1.0), "sigma_data=-1.0"),
        (lambda: sf.EDMPreconditioning(sigma_data=math.nan), "sigma_data=nan"),
        (lambda: sf.EDMPreconditioning(sigma_data=math.inf), "sigma_data=inf"),
        (lambda: sf.VPPreconditioning(beta_slope=0.0), "beta_slope=0"),
        (lambda: sf.VPPreconditioning(beta_min=-1.0), "beta_min=-1"),
        (lambda: sf.VPPreconditioning(steps=0), "steps=0"),
        (lambda: sf.FlowPreconditioning(label_scale=0.0), "label_scale=0.0"),
        (lambda: sf.DDPMPreconditioning(beta_start=0.03), "beta_start=0.03"),
        (lambda: sf.DDPMPreconditioning(beta_end=1.0), "beta_end=1.0"),
        (lambda: sf.DDPMPreconditioning(steps=1), "steps=1"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_the_denoiser_adds_no_parameters_and_its_state_is_the_networks():
    network = nn.Linear(3, 3)
    assert set(sf.Denoiser(network).state_dict()) == {f"network.{name}" for name in network.state_dict()}
