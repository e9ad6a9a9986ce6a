"""Claims on the objective: exact expectations by enumeration, a second implementation, and what reaches whom."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor, nn

import stablefield as sf
from stablefield.diffusion._noise_levels import NoiseLevels
from stablefield.diffusion._objective import Draws

PROCESSES = [sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()]
WEIGHTINGS = [sf.EDMWeighting(), sf.SNRWeighting(), sf.FlowWeighting()]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@dataclass(frozen=True)
class At(NoiseLevels):
    """All rows at one noise level."""

    level: float = 1.0

    def quantile(self, u, process):
        return process.time(torch.full_like(u, self.level))


@dataclass(frozen=True)
class Times(NoiseLevels):
    """All rows at one time, just as it is."""

    t: float = 1.0

    def quantile(self, u, process):  # noqa: ARG002
        return torch.full_like(u, self.t)

    def sample(self, process, batch, generator=None, device=None):  # noqa: ARG002
        return torch.full((batch,), self.t, device=device)


@dataclass(frozen=True)
class Drawn(NoiseLevels):
    """All rows at one time, by way of a quantile."""

    t: float = 1.0

    def quantile(self, u, process):  # noqa: ARG002
        return torch.full_like(u, self.t)


def identity(x, sigma, class_labels=None, augment_labels=None):
    return x


def fit(x, sigma, class_labels=None, augment_labels=None):
    """A denoiser without parameters, neither good nor trivial."""
    return 0.4 * torch.tanh(x) + 0.1 * x / (1 + sigma.to(x.dtype)).reshape(-1, *(1,) * (x.ndim - 1))


class Spy:
    """A denoiser that keeps what it is called with."""

    def __init__(self, answer=identity):
        self.answer = answer

    def __call__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return self.answer(*args, **kwargs)


class SpyTarget(sf.StableTarget):
    """A stable target that keeps what it is called with."""

    def __call__(self, *args, **kwargs):
        found = super().__call__(*args, **kwargs)
        object.__setattr__(self, "seen", (args, kwargs, found))
        return found


# --- a second implementation ------------------------------------------------------------------------------------------


def vp_alpha(t):
    return np.exp(-0.5 * (19.9 * t**2 / 2 + 0.1 * t))


CASES = {
    "edm": (
        sf.EDM(),
        sf.LogNormal(),
        lambda u: np.exp(-1.2 + 1.2 * scipy.special.ndtri(u)),
        lambda t: (np.ones_like(t), t),
        sf.EDMWeighting(),
        lambda s: (s**2 + 0.25) / (0.5 * s) ** 2,
    ),
    "vp": (
        sf.VP(),
        sf.Uniform(),
        lambda u: 1e-5 + u * (1 - 1e-5),
        lambda t: (vp_alpha(t), np.sqrt(1 - vp_alpha(t) ** 2)),
        sf.SNRWeighting(),
        lambda s: 1 / s**2,
    ),
    "ve": (
        sf.VE(),
        sf.LogUniform(),
        lambda u: u,
        lambda t: (np.ones_like(t), 0.02 * 5000**t),
        sf.SNRWeighting(maximum=5.0),
        lambda s: np.minimum(1 / s**2, 5),
    ),
    "flow": (
        sf.RectifiedFlow(),
        sf.LogNormal(mean=0.0, std=1.0),
        lambda u: scipy.special.expit(scipy.special.ndtri(u)),
        lambda t: (1 - t, t),
        sf.FlowWeighting(),
        lambda s: (1 + 1 / s) ** 2,
    ),
}


@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_part_of_the_value_agrees_with_a_plain_second_implementation(case, stable):
    process, noise_levels, time, coefficients, weighting, weight = CASES[case]
    x0 = 0.5 * normal(24, 1, 2, 3)
    target = sf.StableTarget(process, references=sf.InBatch()) if stable else sf.DenoisingTarget(process)
    objective = sf.Objective(process, noise_levels=noise_levels, weighting=weighting, target=target)
    value = objective(fit, x0, generator=generator(5))

    # The documented order of the draws: noise levels, then noise.
    source = generator(5)
    t = time(torch.rand(24, generator=source, dtype=torch.float64).numpy()).astype(np.float32).astype(np.float64)
    noise = torch.randn(x0.shape, generator=source, dtype=torch.float64).numpy().reshape(24, 6)
    y = x0.numpy().reshape(24, 6)
    alpha, sigma = (value[:, None] for value in coefficients(t))
    x_t = alpha * y + sigma * noise
    distance = ((x_t[:, None] - alpha[:, None] * y) ** 2).sum(-1)
    w = scipy.special.softmax(-distance / (2 * sigma**2), axis=1) if stable else np.eye(24)
    mean = w @ y
    variance = (w * ((y - mean[:, None]) ** 2).sum(-1)).sum(1)
    s = (sigma / alpha)[:, 0]
    x = x_t / alpha
    estimate = 0.4 * np.tanh(x) + 0.1 * x / (1 + s[:, None])
    row_loss = weight(s) * ((estimate - mean) ** 2).sum(1) / 6
    removed = weight(s) * variance / 6

    # Times are float32, which a steep clock turns into some ulps of the noise level.
    np.testing.assert_allclose(value.noise_level, s, rtol=3e-5)
    np.testing.assert_allclose(value.row_loss, row_loss, rtol=2e-4)
    np.testing.assert_allclose(value.variance_removed, removed, rtol=2e-4, atol=1e-6 * row_loss.max())
    np.testing.assert_allclose(value.loss, row_loss.mean(), rtol=2e-4)
    assert (removed > 0.01 * row_loss).any() == stable


@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (5, 2, 4, 4)])
def test_parts_have_one_number_per_row_and_the_loss_is_their_mean(shape):
    for dtype in (torch.float32, torch.float64):
        theta = torch.ones((), dtype=dtype, requires_grad=True)
        x0 = normal(*shape).to(dtype)
        value = sf.Objective(sf.VP(), target=sf.StableTarget(sf.VP(), references=sf.InBatch()))(
            lambda x, s, theta=theta: theta * x, x0, generator=generator()
        )
        assert value.row_loss.shape == value.noise_level.shape == value.variance_removed.shape == (5,)
        assert value.loss.shape == ()
        assert value.row_loss.dtype == dtype
        assert value.loss.requires_grad
        assert value.row_loss.requires_grad
        assert not value.variance_removed.requires_grad
        assert not value.noise_level.requires_grad
        torch.testing.assert_close(value.loss, value.row_loss.mean())


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_denoiser_is_called_in_noise_to_signal_units(process):
    spy, x0 = Spy(), normal(6, 3)
    value = sf.Objective(process, target=sf.StableTarget(process, references=sf.InBatch()))(
        spy, x0, generator=generator(2)
    )
    x, level = spy.args
    source = generator(2)
    t = sf.LogNormal().sample(process, 6, source)
    noise = torch.randn(6, 3, generator=source, dtype=torch.float64)
    assert torch.equal(level, value.noise_level)
    torch.testing.assert_close(level, process.noise_level(t))
    expected = x0 + (process.sigma(t) / process.alpha(t)).double()[:, None] * noise
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


def test_the_default_is_edms_training_with_a_stable_target_over_the_batch():
    objective = sf.Objective(sf.VP(), target=sf.StableTarget(sf.VP(), references=sf.InBatch()))
    assert objective.noise_levels == sf.LogNormal(mean=-1.2, std=1.2)
    assert objective.weighting == sf.EDMWeighting(sigma_data=0.5)
    assert objective.target == sf.StableTarget(sf.VP(), references=sf.InBatch())
    assert objective.label_dropout == 0


def test_the_single_sample_target_removes_nothing():
    value = sf.Objective(sf.EDM(), noise_levels=At(level=5.0), target=sf.DenoisingTarget(sf.EDM()))(
        identity, normal(9, 2)
    )
    assert torch.equal(value.variance_removed, torch.zeros(9, dtype=torch.float64))


# --- exact expectations by enumeration --------------------------------------------------------------------------------

ATOMS = torch.tensor([[-1.0, 0.2], [0.3, 0.9], [1.4, -0.5], [0.1, -1.1]], dtype=torch.float64)
STATES = torch.tensor([[0.3, -0.4], [1.5, 0.6], [-3.0, 2.0]], dtype=torch.float64)


def arriving_at(process, state):
    """`process`, except that noise carries every sample to the same noisy state, x_t = alpha `state`.

    Then the rows of a batch are all the ways in which one state can have come about, and what the ways weigh is known.
    """

    class Arriving(type(process)):  # pyrefly: ignore[invalid-inheritance]
        def perturb(self, x0, t, noise=None, generator=None):  # noqa: ARG002
            return self.alpha(t).to(x0.dtype)[:, None] * state.expand_as(x0)

    return Arriving(**vars(process))


def affine(parameters):
    def denoiser(x, sigma, class_labels=None, augment_labels=None):
        out = parameters[0] * x + parameters[1]
        return out if class_labels is None else out + parameters[2] * (1 + class_labels[:, None])

    return denoiser


def likelihood(process, level, state, samples):
    """Density of the noisy state under each sample, up to a factor that all share."""
    t = process.time(torch.tensor(level, dtype=torch.float64)).float()
    s = (process.sigma(t).double() / process.alpha(t).double()).item()
    return torch.exp(-(state - samples).square().sum(-1) / (2 * s**2))


def expectation(objective, batches, weights, parameters, **labels):
    """Expected loss, variance removed, gradient and squared gradient of row 0 over weighted batches."""
    denoiser = affine(parameters)
    weights = weights / weights.sum()
    loss = removed = gradient = square = 0.0
    for i, (weight, x0) in enumerate(zip(weights, batches, strict=True)):
        more = {name: value[i] for name, value in labels.items()}
        value = objective(denoiser, x0, generator=generator(LABEL_SEED), **more)
        (g,) = torch.autograd.grad(value.row_loss[0], parameters)
        loss += weight * value.row_loss[0].detach()
        removed += weight * value.variance_removed[0]
        gradient, square = gradient + weight * g, square + weight * g**2
    return loss, removed, gradient, square - gradient**2


LABEL_SEED = 0


def both(process, state, level, weighting, batches, weights, references=None, parameters=None, dropout=0.0, **labels):
    """What `expectation` gives for the stable target and for the single-sample target."""
    arriving = arriving_at(process, state)
    parameters = torch.tensor([0.4, -0.1, 0.3], dtype=torch.float64, requires_grad=True)
    return [
        expectation(
            sf.Objective(
                arriving, noise_levels=At(level=level), weighting=weighting, target=target, label_dropout=dropout
            ),
            batches,
            weights,
            parameters,
            **labels,
        )
        for target in (
            sf.StableTarget(arriving, references=references or sf.InBatch(), validate_args=False),
            sf.DenoisingTarget(arriving, validate_args=False),
        )
    ]


def check_same_but_for_the_variance(stable, single):
    loss, removed, gradient, spread = stable
    single_loss, single_removed, single_gradient, single_spread = single
    assert single_removed == 0
    torch.testing.assert_close(loss + removed, single_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, single_gradient, rtol=1e-6, atol=1e-9)
    # And all of it is worth having: the references took something, in the loss and in the gradient.
    assert removed > 1e-3 * single_loss
    assert (spread <= single_spread * (1 + 1e-9)).all()
    assert spread.sum() < single_spread.sum()


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("level", [0.7, 4.0])
def test_with_the_whole_set_as_references_loss_plus_variance_removed_is_the_single_sample_loss(
    process, weighting, level
):
    for state in STATES[:2]:
        weights = likelihood(process, level, state, ATOMS)
        # Row 0 is each atom in turn.
        orders = [torch.arange(4).roll(-k) for k in range(4)]
        stable, single = both(
            process, state, level, weighting, [ATOMS[o] for o in orders], weights, sf.Pool(ATOMS), index=orders
        )
        check_same_but_for_the_variance(stable, single)
        # All randomness but the noise is gone from the target, and with it from the gradient at a given state.
        assert stable[3].abs().max() < 1e-9 * single[3].max()


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_over_all_batches_drawn_with_replacement_the_two_losses_differ_by_the_variance_removed(process, size):
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    draws = [list(draw) for draw in itertools.product(range(3), repeat=size)]
    for state in STATES[:1] if size == 3 else STATES[:2]:
        like = likelihood(process, 1.3, state, ATOMS)
        weights = torch.stack([prior[d].prod() * like[d[0]] for d in draws])
        stable, single = both(process, state, 1.3, sf.EDMWeighting(), [ATOMS[d] for d in draws], weights)
        if size == 1:
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(stable, single, strict=True))
        else:
            check_same_but_for_the_variance(stable, single)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_over_all_batches_drawn_without_replacement_the_two_losses_differ_by_the_variance_removed(process):
    draws = [list(draw) for draw in itertools.permutations(range(4), 3)]
    like = likelihood(process, 2.0, STATES[0], ATOMS)
    stable, single = both(
        process, STATES[0], 2.0, sf.SNRWeighting(), [ATOMS[d] for d in draws], torch.stack([like[d[0]] for d in draws])
    )
    check_same_but_for_the_variance(stable, single)


def test_the_gradients_variance_falls_by_four_weights_and_squared_features_times_the_variance_removed():
    # In one dimension the gradient of w (D - target)^2 is 2 w (D - target) f with f = dD/dparameter, known at a state, so
    # that its variances differ by 4 w^2 f^2 V = 4 w f^2 (variance removed). Features of `affine`: x and 1.
    atoms, state, level = ATOMS[:3, :1], torch.tensor([0.4], dtype=torch.float64), 1.1
    draws = [list(draw) for draw in itertools.product(range(3), repeat=3)]
    like = likelihood(sf.VP(), level, state, atoms)
    weights = torch.stack([like[d[0]] for d in draws])
    stable, single = both(sf.VP(), state, level, sf.EDMWeighting(), [atoms[d] for d in draws], weights)
    weight = 4 + 1 / level**2
    for i, feature in enumerate((0.4, 1.0)):
        expected = 4 * weight * feature**2 * stable[1]
        torch.testing.assert_close(single[3][i] - stable[3][i], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
@pytest.mark.parametrize("seen", [0, 1])
def test_with_labels_the_two_losses_differ_by_the_variance_removed_given_what_the_network_sees(dropout, seen):
    label = torch.tensor([0, 1, 0, 1])
    draws = [list(draw) for draw in itertools.product(range(4), repeat=3)]
    if dropout == 0:
        draws = [d for d in draws if label[d[0]] == seen]
    like = likelihood(sf.EDM(), 1.5, STATES[0], ATOMS)
    stable, single = both(
        sf.EDM(),
        STATES[0],
        1.5,
        sf.EDMWeighting(),
        [ATOMS[d] for d in draws],
        torch.stack([like[d[0]] for d in draws]),
        dropout=dropout,
        class_labels=[label[d] for d in draws],
    )
    check_same_but_for_the_variance(stable, single)


@pytest.mark.parametrize("mutation", ["no variance", "variance per row", "unweighted variance"])
def test_the_enumeration_would_notice_a_wrong_variance(mutation):
    state, level = STATES[0], 0.7
    weights = likelihood(sf.EDM(), level, state, ATOMS)
    orders = [torch.arange(4).roll(-k) for k in range(4)]
    stable, single = both(
        sf.EDM(), state, level, sf.EDMWeighting(), [ATOMS[o] for o in orders], weights, sf.Pool(ATOMS), index=orders
    )
    factor = {"no variance": 0, "variance per row": 2, "unweighted variance": 1 / (4 + 1 / level**2)}[mutation]
    with pytest.raises(AssertionError):
        check_same_but_for_the_variance((stable[0], factor * stable[1], *stable[2:]), single)


# --- the same with real draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whole_set", "share"), [(False, 0.75), (True, 0.55)])
def test_on_random_batches_the_means_agree_and_the_stable_gradient_is_quieter(whole_set, share):
    data = torch.cat([ATOMS, 0.5 * normal(4, 2, seed=3)])
    process, source, batches = sf.VP(), generator(1), 200
    parameters = torch.tensor([0.8, 0.02], dtype=torch.float64, requires_grad=True)
    targets = [
        sf.StableTarget(process, references=sf.Pool(data) if whole_set else sf.InBatch()),
        sf.DenoisingTarget(process),
    ]

    def denoiser(x, sigma):
        return parameters[0] * x / (1 + sigma.double() ** 2)[:, None] + parameters[1]

    totals, gradients, removed = [], [], []
    for seed in range(batches):
        index = torch.randint(len(data), (32,), generator=source)
        values = [
            sf.Objective(
                process,
                noise_levels=sf.LogNormal(mean=0.0, std=1.0, stratified=True),
                weighting=sf.SNRWeighting(maximum=5.0),
                target=target,
            )(denoiser, data[index], index=index, generator=generator(seed))
            for target in targets
        ]
        totals.append(torch.stack([value.loss.detach() + value.variance_removed.mean() for value in values]))
        gradients.append(torch.stack([torch.autograd.grad(value.loss, parameters)[0] for value in values]))
        removed.append(values[0].variance_removed.mean())
    gap, gradients = torch.stack(totals).diff(dim=1)[:, 0], torch.stack(gradients)
    error = gap.std() / math.sqrt(batches)
    assert abs(gap.mean()) < 4 * error
    # What was removed is a hundred errors wide, so its absence would have been noticed.
    assert torch.stack(removed).mean() > 50 * error
    difference = gradients[:, 0] - gradients[:, 1]
    assert (difference.mean(0).abs() < 4 * difference.std(0) / math.sqrt(batches)).all()
    assert (gradients[:, 0].var(0) < share * gradients[:, 1].var(0)).all()


# --- randomness -------------------------------------------------------------------------------------------------------


def same(a, b):
    pairs = [(getattr(a, name), getattr(b, name)) for name in vars(a)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("references", [sf.InBatch(), sf.Pool(normal(40, 2), size=16)], ids=repr)
def test_the_value_is_a_function_of_the_generator_alone(references):
    process = sf.EDM()
    data = normal(40, 2)
    objective = sf.Objective(
        process,
        noise_levels=sf.LogNormal(mean=1.0, stratified=True),
        target=sf.StableTarget(process, references=references),
    )

    def value(seed):
        return objective(identity, data[:8], None, torch.arange(8), generator=generator(seed))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = value(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert same(value(3), one)
    assert not same(value(4), one)


def test_one_call_for_several_batches_is_cut_into_their_examples():
    data = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 2
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(data, labels=labels))
    objective = sf.Objective(sf.EDM(), target=target, label_dropout=0.4)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randperm(50, generator=generator)[:24].split(8)
    draws = [objective.draw((8, 3), generator, labelled=True) for _ in batches]
    index = torch.cat(batches)
    joined = Draws(*(torch.cat([getattr(one, name) for one in draws]) for name in ("t", "noise", "hidden")))
    whole = objective.example(data[index], joined, labels[index], index)
    for number, rows in enumerate(batches):
        found = whole[8 * number : 8 * number + 8]
        truth = objective.example(data[rows], draws[number], labels[rows], rows)
        for name in "x", "noise_level", "seen":
            assert torch.equal(getattr(found, name), getattr(truth, name))
        for name in "x0", "variance", "ess", "source_weight", "noise", "score", "v", "source", "x_t", "t":
            torch.testing.assert_close(getattr(found.target, name), getattr(truth.target, name), rtol=1e-5, atol=1e-6)
        assert (found.weight, found.target.process) == (None, sf.EDM())


def test_without_a_generator_torchs_global_one_is_used():
    objective, x0 = (
        sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()), label_dropout=0.5),
        normal(8, 2),
    )
    labels = torch.zeros(8, dtype=torch.long)
    torch.manual_seed(3)
    one = objective(identity, x0, labels)
    torch.manual_seed(3)
    assert same(objective(identity, x0, labels), one)
    assert not same(objective(identity, x0, labels), one)


def test_one_seed_shows_the_network_the_same_rows_whatever_the_target_and_the_label_dropout():
    process, data, labels = sf.VP(), normal(40, 2), torch.arange(40) % 3
    seen = []
    for dropout in (0.0, 0.3, 0.6):
        for target in (
            sf.DenoisingTarget(process),
            sf.StableTarget(process, references=sf.InBatch()),
            sf.StableTarget(process, references=sf.Pool(data, size=20, labels=labels)),
        ):
            spy = Spy()
            sf.Objective(process, target=target, label_dropout=dropout)(
                spy, data[:12], labels[:12], torch.arange(12), generator=generator(7)
            )
            seen.append((dropout, *spy.args))
    for _, x, level, _ in seen:
        assert torch.equal(x, seen[0][1])
        assert torch.equal(level, seen[0][2])
    for dropout, rows in itertools.groupby(seen, key=lambda row: row[0]):
        shown = [row[3] for row in rows]
        assert torch.equal(shown[0], shown[1])
        assert torch.equal(shown[0], shown[2])
        assert (shown[0] == -1).any() == (dropout > 0)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_stated_share_of_labels_is_hidden_and_the_rest_shown_as_they_are(share):
    n, spy = 40_000, Spy(lambda x, s, c: x)
    labels = torch.randint(0, 10, (n,), generator=generator(1))
    before = labels.clone()
    objective = sf.Objective(sf.EDM(), target=sf.DenoisingTarget(sf.EDM()), label_dropout=share)
    objective(spy, torch.zeros(n, 1), labels, generator=generator(2))
    shown = spy.args[2]
    assert torch.equal(labels, before)
    hidden = shown == -1
    assert torch.equal(shown[~hidden], labels[~hidden])
    count = hidden.sum().item()
    if share in (0.0, 1.0):
        assert count == share * n
    else:
        assert abs(count - share * n) < 4 * math.sqrt(n * share * (1 - share))
        # Of each class alike, and independently of the row before.
        per_class = torch.bincount(labels[hidden], minlength=10) / torch.bincount(labels, minlength=10)
        assert (per_class - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / 3800)
        pairs = (hidden[1:] & hidden[:-1]).double().mean()
        assert abs(pairs - share**2) < 4 * math.sqrt(2 * share**2 / n)


@pytest.mark.parametrize("references", ["batch", "pool"])
def test_rows_with_a_hidden_label_average_over_all_references_and_the_others_over_their_class(references):
    rows, level = 60, 2.0
    data, labels = normal(rows, 1, seed=4), torch.randint(0, 3, (rows,), generator=generator(5))
    labels[:4] = 3  # those without a label have one of their own
    index = torch.arange(rows)
    policy = sf.InBatch() if references == "batch" else sf.Pool(data, labels=labels)
    objective = sf.Objective(
        sf.EDM(),
        noise_levels=At(level=level),
        weighting=sf.SNRWeighting(power=0.0),
        target=sf.StableTarget(sf.EDM(), references=policy),
        label_dropout=0.4,
    )
    # In one dimension two constant answers tell the target: (0 - m)^2 - (1 - m)^2 = 2 m - 1.
    zero, one = Spy(lambda x, s, c: 0 * x), Spy(lambda x, s, c: 0 * x + 1)
    at_zero = objective(zero, data, labels, index, generator=generator(6))
    at_one = objective(one, data, labels, index, generator=generator(6))
    assert torch.equal(zero.args[0], one.args[0])
    mean = (at_zero.row_loss - at_one.row_loss + 1) / 2

    shown = zero.args[2]
    y, x = data.numpy(), zero.args[0].numpy()
    # A row whose label is hidden is a reference for its class all the same.
    allowed = (shown[:, None] == labels) | (shown[:, None] == -1)
    w = scipy.special.softmax(np.where(allowed, -((x - y.T) ** 2) / (2 * level**2), -np.inf), axis=1)
    np.testing.assert_allclose(mean, (w @ y)[:, 0], rtol=1e-6, atol=1e-9)
    variance = (w @ y**2 - (w @ y) ** 2)[:, 0]
    np.testing.assert_allclose(at_zero.variance_removed, variance, rtol=1e-6)
    hidden = shown == -1
    assert 10 < hidden.sum() < 50
    # The other readings of the rule differ, so they would be noticed.
    for other in (labels[:, None] == labels, shown[:, None] == shown, torch.ones(rows, rows, dtype=torch.bool)):
        assert (other != allowed).any()


def test_without_dropout_labels_reach_target_and_denoiser_unchanged():
    labels, spy = torch.tensor([0, 1, 2, 1, 0]), Spy()
    target = SpyTarget(sf.EDM(), references=sf.InBatch())
    sf.Objective(sf.EDM(), target=target)(spy, normal(5, 2), labels, generator=generator())
    args, kwargs, _ = target.seen
    assert torch.equal(spy.args[2], labels)
    assert torch.equal(args[3], labels)
    assert torch.equal(kwargs["reference_labels"], labels)


# --- what is handed on ------------------------------------------------------------------------------------------------


def test_the_denoiser_is_given_labels_if_and_only_if_the_objective_is():
    objective, x0 = (
        sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()), label_dropout=0.3),
        normal(4, 2),
    )
    labels, augment = torch.tensor([0, 1, 1, 0]), normal(4, 9)
    assert objective(lambda x, sigma: x, x0).loss > 0
    assert objective(lambda x, sigma, class_labels: x, x0, labels).loss > 0
    spy = Spy()
    objective(spy, x0, labels, augment_labels=augment, generator=generator())
    given = dict(zip(("x", "sigma", "class_labels", "augment_labels"), spy.args, strict=False)) | spy.kwargs
    assert given["augment_labels"] is augment
    assert ((given["class_labels"] == labels) | (given["class_labels"] == -1)).all()
    objective(spy, x0, augment_labels=augment)
    given = dict(zip(("x", "sigma", "class_labels", "augment_labels"), spy.args, strict=False)) | spy.kwargs
    assert given["augment_labels"] is augment
    assert given.get("class_labels") is None


def test_a_denoiser_with_a_network_of_its_own_can_be_trained_by_it():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x, label):
            return self.layer(torch.cat([x, label[:, None]], 1))

    data = normal(64, 2).float() * 0.5
    denoiser = sf.Denoiser(Network())
    objective, parameters, losses = (
        sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch())),
        list(denoiser.parameters()),
        [],
    )
    for step in range(60):
        value = objective(denoiser, data, generator=generator(step))
        for parameter, gradient in zip(parameters, torch.autograd.grad(value.loss, parameters), strict=True):
            parameter.data -= 0.1 * gradient
        losses.append(value.loss.item())
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_flip_alone_index_and_the_noise_reach_the_target_as_they_are():
    target, x0 = SpyTarget(sf.VP(), references=sf.InBatch()), normal(5, 1, 2, 3)
    flip, source_only, index = (
        torch.tensor([1, 0, 1, 0, 0]).bool(),
        torch.tensor([0, 0, 1, 1, 0]).bool(),
        torch.arange(5),
    )
    source, spy = generator(3), Spy()
    sf.Objective(sf.VP(), target=target)(spy, x0, None, index, flip=flip, source_only=source_only, generator=source)
    (given_x0, x_t, t, labels, given_index), kwargs, _ = target.seen
    assert given_x0 is x0
    assert labels is None
    assert kwargs["reference_labels"] is None
    assert given_index is index
    assert kwargs["flip"] is flip
    assert kwargs["source_only"] is source_only
    assert kwargs["generator"] is source
    torch.testing.assert_close(x_t, sf.VP().perturb(x0, t, kwargs["noise"]))


def test_rows_that_are_alone_are_regressed_on_their_own_sample():
    process = sf.EDM()
    options = {"noise_levels": At(level=4.0)}
    x0, source_only = normal(6, 3), torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    references = sf.StableTarget(process, references=sf.InBatch())
    stable = sf.Objective(process, **options, target=references)(
        fit, x0, source_only=source_only, generator=generator()
    )
    single = sf.Objective(process, **options, target=sf.DenoisingTarget(process))(fit, x0, generator=generator())
    assert torch.equal(stable.row_loss[source_only], single.row_loss[source_only])
    assert (stable.variance_removed[source_only] == 0).all()
    assert (stable.row_loss[~source_only] != single.row_loss[~source_only]).all()
    assert (stable.variance_removed[~source_only] > 0).all()


def test_mirrored_rows_have_the_loss_of_the_mirror_image_of_the_unmirrored_batch():
    # Noise that is mirrored with the row, and a network that commutes with mirroring: nothing may change.
    process, images = sf.EDM(), normal(6, 1, 2, 4)
    flip = torch.tensor([1, 0, 1, 0, 0, 1]).bool()

    class Mirroring(sf.EDM):
        def perturb(self, x0, t, noise=None, generator=None):  # noqa: ARG002
            noise = torch.where(flip[:, None, None, None], noise.flip(-1), noise)
            return super().perturb(x0, t, noise)

    plain = sf.Objective(process, noise_levels=At(level=2.0), target=sf.StableTarget(process, references=sf.InBatch()))
    mirroring = sf.Objective(
        Mirroring(),
        target=sf.StableTarget(Mirroring(), references=sf.InBatch(), validate_args=False),
        noise_levels=At(level=2.0),
    )
    mirrored = torch.where(flip[:, None, None, None], images.flip(-1), images)
    one = plain(fit, images, generator=generator())
    two = mirroring(fit, mirrored, flip=flip, generator=generator())
    torch.testing.assert_close(two.row_loss, one.row_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(two.variance_removed, one.variance_removed, rtol=1e-10, atol=0)
    without = mirroring(fit, mirrored, generator=generator())
    assert not torch.allclose(without.row_loss, one.row_loss, rtol=1e-3)


# --- precision --------------------------------------------------------------------------------------------------------


def test_autocast_changes_the_network_alone():
    x0 = normal(16, 8).float()
    objective = sf.Objective(
        sf.VP(), target=sf.StableTarget(sf.VP(), references=sf.InBatch()), noise_levels=sf.LogNormal(mean=0.5)
    )
    plain = objective(fit, x0, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective(fit, x0, generator=generator())
    assert same(plain, inside)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        spy = Spy(lambda x, s: layer(x))
        low = objective(spy, x0, generator=generator())
        assert layer(spy.args[0]).dtype == torch.bfloat16
    assert low.row_loss.dtype == low.loss.dtype == torch.float32
    assert torch.equal(low.variance_removed, plain.variance_removed)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_low_precision_estimate_is_compared_in_float32(low):
    x0 = normal(16, 8).float()
    objective = sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()))
    value = objective(lambda x, s: torch.tanh(x).to(low), x0, generator=generator())
    exact = objective(lambda x, s: torch.tanh(x).to(low).float(), x0, generator=generator())
    assert same(value, exact)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_label_dropout_that_is_no_probability_is_refused(share):
    with pytest.raises(ValueError, match=f"label_dropout is {share}"):
        sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()), label_dropout=share)


def test_a_target_for_another_process_is_refused():
    for target in (
        sf.StableTarget(sf.VP(), references=sf.InBatch()),
        sf.DenoisingTarget(sf.EDM()),
        sf.StableTarget(sf.VE(sigma_max=50.0), references=sf.InBatch()),
    ):
        with pytest.raises(ValueError, match="one process"):
            sf.Objective(sf.VE(), target=target)
    assert (
        sf.Objective(sf.VE(), target=sf.StableTarget(sf.VE(sigma_max=100.0), references=sf.InBatch())).process
        == sf.VE()
    )


def in_batch(process: sf.Process) -> sf.StableTarget:
    return sf.StableTarget(process, references=sf.InBatch())


TARGETS = [in_batch, sf.DenoisingTarget]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("process", [sf.RectifiedFlow(), sf.Cosine()], ids=repr)
def test_an_infinite_noise_level_is_refused(process, target):
    objective = sf.Objective(process, noise_levels=Times(t=1.0), target=target(process))
    with pytest.raises(ValueError, match="noise"):
        objective(fit, normal(4, 2))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("levels", [Times(t=0.0), Drawn(t=0.0)], ids=repr)
@pytest.mark.parametrize("process", [sf.EDM(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()], ids=repr)
def test_a_noise_level_of_0_is_refused(process, levels, target):
    objective = sf.Objective(process, noise_levels=levels, target=target(process))
    with pytest.raises(ValueError, match="noise"):
        objective(fit, normal(4, 2))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("process", [sf.RectifiedFlow(), sf.Cosine()], ids=repr)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_a_time_that_float32_rounds_to_the_end_of_a_flow_gives_a_finite_loss(process, weighting, target):
    objective = sf.Objective(process, noise_levels=Drawn(t=1 - 1e-12), target=target(process), weighting=weighting)
    value = objective(fit, normal(4, 2).float())
    for part in (value.loss, value.row_loss, value.noise_level, value.variance_removed):
        assert part.isfinite().all()
    assert (value.noise_level > 1e6).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_data_that_are_not_floating_point_are_refused(dtype):
    with pytest.raises(ValueError, match="x0 has dtype"):
        sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()))(
            identity, torch.ones(4, 2, dtype=dtype)
        )


class Answering(nn.Module):
    """A network that is a function."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, label):
        return self.answer(x, label)


def test_an_answer_of_another_shape_than_the_data_is_refused_and_not_broadcast():
    for answer in (lambda x, s: x.sum(1, keepdim=True), lambda x, s: x[:1], lambda x, s: x[:, :, None]):
        with pytest.raises(ValueError, match="shape"):
            sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()))(answer, normal(4, 2))
        with pytest.raises(ValueError, match=r"the network returned shape .* return the shape of x"):
            sf.Denoiser(Answering(answer))(normal(4, 2), 1.0)


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(4),
        torch.zeros(4, 1, dtype=torch.long),
        torch.zeros(3, dtype=torch.long),
        torch.eye(4),
        torch.zeros(4, dtype=torch.bool),
    ],
    ids=lambda labels: f"{tuple(labels.shape)}, {labels.dtype}",
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_labels_that_are_not_one_integer_per_row_are_refused(labels, target, dropout):
    objective = sf.Objective(sf.EDM(), target=target(sf.EDM()), label_dropout=dropout)
    with pytest.raises(ValueError, match="class_labels"):
        objective(identity, normal(4, 2), labels, generator=generator())


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_what_the_target_refuses_of_labels_is_told_of_class_labels(dropout):
    x0, index = normal(4, 2), torch.arange(4)
    labels = torch.tensor([0, 1, 1, 0])

    def refused(references, told, index=None):
        target = sf.StableTarget(sf.EDM(), references=references)
        objective = sf.Objective(sf.EDM(), target=target, label_dropout=dropout)
        with pytest.raises(ValueError, match="class_labels") as error:
            objective(identity, x0, told, index, generator=generator())
        return str(error.value)

    some = refused(sf.InBatch(), torch.tensor([0, -1, 1, 0]))
    missing = refused(sf.Pool(x0, labels=labels), None, index)
    unasked = refused(sf.Pool(x0), labels, index)
    assert some.startswith("class_labels[1] is -1: -1 means a label that was dropped")
    assert missing.startswith("class_labels is missing: ")
    assert unasked.startswith("class_labels is given")
    if not dropout:  # a label that nobody sees cannot be wrong
        other = refused(sf.Pool(x0, labels=labels), 1 - labels, index)
        assert other.startswith("class_labels[0] is 1: the Pool has another label")


def test_what_the_target_refuses_is_refused():
    x0 = normal(4, 2)
    pool = sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.Pool(x0)))
    with pytest.raises(ValueError, match="index is missing"):
        pool(identity, x0)
    with pytest.raises(ValueError, match="class_labels is given"):
        pool(identity, x0, torch.zeros(4, dtype=torch.long), torch.arange(4))
    with pytest.raises(ValueError, match="NaN"):
        sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()))(identity, x0 * math.nan)
    for bad in (x0[:0], x0[:, 0]):
        with pytest.raises(ValueError, match="x0 has shape"):
            sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.InBatch()))(identity, bad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise_levels": sf.LogNormal(stratified=True)},
        {"label_dropout": 0.3},
        {"draws_per_image": 2, "antithetic": True},
    ],
    ids=str,
)
def test_a_compiled_objective_takes_a_smaller_last_batch(options: dict[str, Any], rng: torch.Generator) -> None:
    process, data = sf.EDM(), torch.randn(24, 3, generator=rng)
    labels = torch.arange(24) % 3 if options.get("label_dropout") else None
    pool = sf.Pool(data, labels=labels)
    objective = sf.Objective(process, target=sf.StableTarget(process, references=pool), **options)

    def loss(index: Tensor) -> Tensor:
        seen = None if labels is None else labels[index]
        return objective(lambda x, sigma, *_: x.sin() + sigma[:, None], data[index], seen, index).row_loss

    compiled = torch.compile(loss, backend="eager")
    for size in (8, 8, 4, 6):
        index = torch.randperm(24, generator=rng)[:size]
        torch.manual_seed(size)
        found = compiled(index)
        torch.manual_seed(size)
        torch.testing.assert_close(found, loss(index))


def test_a_compiled_perturbation_takes_a_smaller_last_batch() -> None:
    process, kernel = sf.VP(), sf.StudentTKernel(8.0)

    def noisy(x0: Tensor) -> Tensor:
        return process.perturb(x0, 0.5) + process.perturb(x0, 0.5, kernel.noise(x0))

    compiled = torch.compile(noisy, backend="eager")
    for size in (8, 8, 4, 6):
        torch.manual_seed(size)
        found = compiled(torch.zeros(size, 3))
        torch.manual_seed(size)
        torch.testing.assert_close(found, noisy(torch.zeros(size, 3)))


def test_draws_without_a_generator_are_those_of_torchs_own(rng: torch.Generator) -> None:
    """The same numbers from the same seed, whether the generator is named or is the global one."""
    process = sf.EDM()
    levels = sf.LogNormal(stratified=True)
    objective = sf.Objective(process, noise_levels=levels, target=sf.DenoisingTarget(process), label_dropout=0.3)
    torch.manual_seed(3)
    found = objective.draw((6, 4), labelled=True)
    named = objective.draw((6, 4), torch.Generator().manual_seed(3), labelled=True)
    assert torch.equal(found.t, named.t)
    assert torch.equal(found.noise, named.noise)
    assert found.hidden is not None
    assert named.hidden is not None
    assert torch.equal(found.hidden, named.hidden)
