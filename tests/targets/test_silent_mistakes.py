"""Mistakes that bias a target, and that no loss curve shows, are errors."""

import math

import pytest
import torch

import stablefield as sf

EDM = sf.EDM()


def test_a_call_without_labels_over_a_pool_with_labels_is_refused(rng: torch.Generator) -> None:
    data, labels = torch.randn(8, 3, generator=rng), torch.arange(8) % 2
    stable = sf.StableTarget(EDM, references=sf.Pool(data, labels=labels))
    x_t, index = EDM.perturb(data, 1.0, generator=rng), torch.arange(8)
    with pytest.raises(ValueError, match=r"labels is missing.*torch\.full\(\(len\(x0\),\), -1\)"):
        stable(data, x_t, 1.0, index=index)
    everything = stable(data, x_t, 1.0, torch.full((8,), -1), index)
    plain = sf.StableTarget(EDM, references=sf.Pool(data))(data, x_t, 1.0, index=index)
    torch.testing.assert_close(everything.x0, plain.x0)


def test_unknown_labels_are_refused_where_dropped_ones_are_meant(rng: torch.Generator) -> None:
    data = torch.randn(4, 3, generator=rng)
    with pytest.raises(ValueError, match=r"Pool labels\[2\] is -1.*largest plus 1"):
        sf.Pool(data, labels=torch.tensor([0, 1, -1, 0]))
    with pytest.raises(ValueError, match=r"reference_labels\[1\] is -1.*largest plus 1"):
        sf.StableTarget(EDM, references=sf.InBatch())(
            data,
            EDM.perturb(data, 1.0, generator=rng),
            1.0,
            torch.tensor([0, -1, -1, 0]),
            reference_labels=torch.tensor([0, -1, 1, 0]),
        )


def test_references_are_chosen_by_the_user() -> None:
    with pytest.raises(TypeError, match="references"):
        sf.StableTarget(EDM)  # pyrefly: ignore[missing-argument]
    with pytest.raises(TypeError, match="target"):
        sf.Objective(EDM)  # pyrefly: ignore[missing-argument]


def test_a_capacity_breaks_ties_at_random() -> None:
    """Atoms -1 and +1, always in this order, at x_t = 0.2, sigma 1, room for one: tanh(0.2) = 0.197, not 0.678."""
    atoms = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    stable = sf.StableTarget(EDM, references=sf.Pool(atoms), capacity=1, validate_args=False)
    x_t = torch.full((2, 1), 0.2, dtype=torch.float64)
    truth = math.tanh(0.2)
    of_row = torch.tensor([(1 - truth) / 2, (1 + truth) / 2], dtype=torch.float64)  # P(source | x_t)
    means, firsts = [], 0
    for seed in range(400):
        rng = torch.Generator().manual_seed(seed)
        found = stable(atoms, x_t, 1.0, index=torch.arange(2), generator=rng)
        firsts += int(found.ess[0] > 1)
        means.append(float(of_row @ found.x0[:, 0]))
    assert abs(firsts - 200) < 5 * 10  # five standard deviations
    # Each of the two choices is as probable as the other, so this is the expectation.
    assert len(set(means)) == 2
    assert sum(set(means)) / 2 == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("case", ["small", "constant channel"])
def test_a_wrong_index_shows_at_any_scale_of_the_data(case: str, rng: torch.Generator) -> None:
    data = 0.001 * torch.randn(20, 2, 4, 4, generator=rng)
    if case == "constant channel":
        data = 1000 * data
        data[:, 0] = 1000.0
    sigma = float(data.std()) if case == "small" else 1.0
    stable = sf.StableTarget(EDM, references=sf.Pool(data))
    index = torch.arange(6)
    x_t = EDM.perturb(data[index], sigma, generator=rng)
    stable(data[index], x_t, sigma, index=index)
    with pytest.raises(ValueError, match="row 2 of x0 is not sample 7"):
        stable(data[index], x_t, sigma, index=torch.tensor([0, 1, 7, 3, 4, 5]))


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
def test_rows_that_differ_from_the_pool_by_rounding_are_accepted(scale: float, rng: torch.Generator) -> None:
    images = torch.randint(0, 256, (20, 3, 4, 4), generator=rng, dtype=torch.uint8)
    index = torch.arange(8)
    for x0 in (images / 127.5 - 1, (images / 255 - 0.5) / 0.5, (images.double() / 127.5 - 1).half().float()):
        x_t = EDM.perturb(x0[index], 1.0, generator=rng)
        sf.StableTarget(EDM, references=sf.Pool(images))(x0[index], x_t, 1.0, index=index)
    data = scale * torch.randn(20, 5, generator=rng)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x_t = EDM.perturb(data[index], scale, generator=rng)
        sf.StableTarget(EDM, references=sf.Pool(data.to(dtype)))(data[index], x_t, scale, index=index)


def test_a_pool_that_was_changed_in_place_is_read_anew(rng: torch.Generator) -> None:
    data = torch.randn(30, 6, generator=rng)
    pool = sf.Pool(data)
    stable = sf.StableTarget(EDM, references=pool)
    index = torch.arange(10)
    stable(data[index], EDM.perturb(data[index], 1.0, generator=rng), 1.0, index=index)
    data.mul_(3).add_(1)
    x_t = EDM.perturb(data[index], 1.0, generator=rng)
    found = stable(data[index], x_t, 1.0, index=index)
    truth = sf.posterior(x_t.double(), 1.0, 1.0, data.double(), index)
    torch.testing.assert_close(found.x0.double(), truth.mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["operation", "view", "detached", ".data", "NumPy", "inference mode"])
def test_which_changes_of_its_data_a_pool_notices(way: str, rng: torch.Generator) -> None:
    """As its docstring says: those of torch's operations on a tensor with a version; a new pool sees every change."""
    data = torch.randn(30, 6, generator=rng)
    with torch.inference_mode(way == "inference mode"):
        data = data.clone()
    pool, index = sf.Pool(data), torch.arange(10)
    x0 = data[index].clone()
    x_t = EDM.perturb(x0, 1.0, generator=rng)

    def found(pool: sf.Pool) -> torch.Tensor:
        return sf.StableTarget(EDM, references=pool)(x0, x_t, 1.0, index=index).x0.double()

    found(pool)
    with torch.inference_mode(way == "inference mode"):
        rest = {"view": data[10:], "detached": data.detach()[10:], ".data": data.data[10:]}.get(way, data[10:])
        if way == "NumPy":
            data.numpy()[10:] *= 3
        else:
            rest.mul_(3)
    truth = sf.posterior(x_t.double(), 1.0, 1.0, data.double(), index).mean
    torch.testing.assert_close(found(sf.Pool(data)), truth, rtol=1e-5, atol=1e-5)
    noticed = bool(((found(pool) - truth).abs() < 1e-4).all())
    assert noticed == (way in ("operation", "view", "detached"))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pool_in_half_precision_does_not_favour_the_source(compiled: bool, rng: torch.Generator) -> None:
    """Near-duplicates as far apart as the rounding: the weights are those of rounded samples under the same noise."""
    data = torch.randn(40, 64, generator=rng)
    data[20:] = data[:20] + 0.004 * torch.randn(20, 64, generator=rng)
    stored = data.bfloat16()
    index, sigma = torch.arange(40), 0.03
    noise = torch.randn(40, 64, generator=rng)
    stable = sf.StableTarget(EDM, references=sf.Pool(stored))
    call = torch.compile(stable, fullgraph=True, backend="eager") if compiled else stable
    found = call(data, data + sigma * noise, sigma, index=index)
    rounded = stored.double()
    truth = sf.posterior(rounded + sigma * noise.double(), 1.0, sigma, rounded, index)
    assert truth.source_weight is not None
    assert 0.3 < truth.source_weight.mean() < 0.9
    torch.testing.assert_close(found.source_weight.double(), truth.source_weight, rtol=1e-3, atol=1e-3)


def test_noise_without_any_is_its_mean_where_t_is_zero(rng: torch.Generator) -> None:
    process = sf.RectifiedFlow()
    x0, t = torch.randn(4, 3, generator=rng), torch.tensor([0.0, 0.5, 0.0, 1.0])
    noise = torch.randn(4, 3, generator=rng)
    x_t = process.perturb(x0, t, noise)
    for stable in (sf.StableTarget(process, references=sf.InBatch()), sf.DenoisingTarget(process)):
        found = stable(x0, x_t, t)
        assert torch.equal(found.velocity[::2], -x0[::2])
        given = stable(x0, x_t, t, noise=noise)
        assert torch.equal(given.velocity[::2], noise[::2] - x0[::2])


@pytest.mark.parametrize("size", [1.5, True, "4"])
def test_a_size_is_a_whole_number(size: object) -> None:
    with pytest.raises((TypeError, ValueError), match="Pool size"):
        sf.Pool(torch.zeros(5, 2), size=size)


@pytest.mark.parametrize("name", ["x0", "x_t", "noise", "index", "labels"])
def test_what_is_no_tensor_is_named(name: str, rng: torch.Generator) -> None:
    x0 = torch.randn(4, 3, generator=rng)
    noise = torch.randn(4, 3, generator=rng)
    arguments = {
        "x0": x0,
        "x_t": x0 + noise,
        "t": 1.0,
        "noise": noise,
        "index": torch.arange(4),
        "labels": torch.zeros(4).long(),
    }
    stable = sf.StableTarget(EDM, references=sf.Pool(x0, labels=torch.zeros(4).long()))
    stable(**arguments)
    with pytest.raises(TypeError, match=f"{name} is a list"):
        stable(**{**arguments, name: arguments[name].tolist()})


def test_an_outlier_hides_no_wrong_index(rng: torch.Generator) -> None:
    data = torch.randn(300, 8, generator=rng)
    data[0] = 1e4
    index = torch.arange(100, 132)
    x_t = EDM.perturb(data[index], 1.0, generator=rng)
    stable = sf.StableTarget(EDM, references=sf.Pool(data))
    stable(data[index], x_t, 1.0, index=index)
    with pytest.raises(ValueError, match="row 0 of x0 is not sample 101"):
        stable(data[index], x_t, 1.0, index=index + 1)


@pytest.mark.parametrize("count", [1, 3])
def test_one_image_can_be_overfitted(count: int, rng: torch.Generator) -> None:
    image = torch.randint(0, 256, (1, 3, 8, 8), generator=rng, dtype=torch.uint8).repeat(count, 1, 1, 1)
    index = torch.zeros(32).long()
    x0 = image[index] / 127.5 - 1
    found = sf.StableTarget(EDM, references=sf.Pool(image))(x0, EDM.perturb(x0, 1.0, generator=rng), 1.0, index=index)
    torch.testing.assert_close(found.x0, x0)


def test_a_capacity_with_a_generator_compiles(rng: torch.Generator) -> None:
    data = torch.randn(20, 6, generator=rng)
    stable = sf.StableTarget(EDM, references=sf.Pool(data), capacity=3)
    index, t = torch.arange(8), torch.linspace(0.5, 3, 8)
    x_t = EDM.perturb(data[index], t, generator=rng)
    call = torch.compile(
        lambda g: stable(data[index], x_t, t, index=index, generator=g), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(call(rng).x0, stable(data[index], x_t, t, index=index).x0, rtol=1e-4, atol=1e-5)


def test_labels_dropped_in_place_stay_those_of_the_references(rng: torch.Generator) -> None:
    """A loop that drops labels in the tensor of all labels; the truth by enumeration in float64."""
    labels = torch.arange(60) % 3
    true, data = labels.clone(), torch.randn(60, 2, generator=rng) + 4 * labels[:, None]
    noise, index = torch.randn(60, 2, generator=rng), torch.arange(60)
    for later in (False, True):
        stable = sf.StableTarget(EDM, references=sf.Pool(data, labels=labels))
        if later:  # the first call has seen the labels
            stable(data, data + 2 * noise, 2.0, labels, index)
        labels[torch.rand(60, generator=rng) < 0.3] = -1
        x_t = (data + 2 * noise).double()
        allowed = (labels[:, None] == true) | (labels[:, None] == -1)
        logits = -torch.cdist(x_t, data.double()).square() / 8
        truth = torch.softmax(logits.masked_fill(~allowed, -math.inf), 1) @ data.double()
        found = stable(data, data + 2 * noise, 2.0, labels, index)
        torch.testing.assert_close(found.x0.double(), truth, rtol=1e-4, atol=1e-4)
        labels.copy_(true)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("n", "bad"), [(3, [2]), (120, [7]), (120, [7, 60]), (5000, [95]), (5000, [7]), (12, range(4, 12))]
)
def test_a_sample_that_is_not_finite_is_named_not_the_index(
    n: int, bad: list[int], value: float, rng: torch.Generator
) -> None:
    data = torch.randn(n, 8, generator=rng)
    data[list(bad), 3] = value
    stable = sf.StableTarget(EDM, references=sf.Pool(data))
    x0 = data[:2]
    with pytest.raises(ValueError, match=rf"references\[{min(bad)}\] holds NaN or inf.*clean the data first"):
        stable(x0, EDM.perturb(x0, 1.0, generator=rng), 1.0, index=torch.arange(2))
    other = torch.randn(2, 8, generator=rng)
    with pytest.raises(
        ValueError, match=r"row 0 of x0 is not sample 0|references\[4\] holds NaN or inf"
    ):  # still noticed
        stable(other, EDM.perturb(other, 1.0, generator=rng), 1.0, index=torch.arange(2))
