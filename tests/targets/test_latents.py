"""Pools of latents: drawn anew, flipped, for rows without a label, with conditions; against float64, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield.targets._moments import Moments, check_distances

N, SHAPE = 60, (2, 4, 4)


@pytest.fixture
def latents(rng: torch.Generator) -> dict[str, Tensor]:
    mean = torch.randn(N, *SHAPE, generator=rng)
    return {
        "mean": mean,
        "std": 0.1 + 0.2 * torch.rand(N, *SHAPE, generator=rng),
        "flipped_mean": torch.randn(N, *SHAPE, generator=rng),
        "flipped_std": 0.1 + 0.2 * torch.rand(N, *SHAPE, generator=rng),
        "labels": torch.randint(0, 3, (N,), generator=rng),
        "weights": torch.rand(N, generator=rng, dtype=torch.float64) + 0.1,
        "similarity": torch.randn(8, N, generator=rng),
    }


def plain(x_t: Tensor, sigma: float, references: Tensor, log_prior: Tensor) -> Tensor:
    """The posterior mean, in the plainest way, in float64: references (n, ...), log_prior (B, n)."""
    x, y = x_t.double().flatten(1), references.double().flatten(1)
    logits = -(x[:, None] - y).square().sum(2) / (2 * sigma**2) + log_prior
    return (torch.softmax(logits, 1) @ y).view(x_t.shape)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_target_of_a_row_that_is_drawn_anew_is_the_mean_with_itself_in_place_of_its_sample(
    flipped: bool,
    labelled: bool,
    weighted: bool,
    conditioned: bool,
    sigma: float,
    latents: dict[str, Tensor],
    rng: torch.Generator,
) -> None:
    pool = sf.Pool.from_moments(
        latents["mean"],
        latents["std"],
        latents["labels"] if labelled else None,
        flipped_mean=latents["flipped_mean"] if flipped else None,
        flipped_std=latents["flipped_std"] if flipped else None,
        weights=latents["weights"] if weighted else None,
    )
    index = torch.randint(0, N, (8,), generator=rng)
    flip = torch.tensor([False, True] * 4) if flipped else torch.zeros(8, dtype=torch.bool)
    mean, std = latents["mean"][index].clone(), latents["std"][index].clone()
    mean[flip], std[flip] = latents["flipped_mean"][index[flip]], latents["flipped_std"][index[flip]]
    x0 = mean + std * torch.randn(mean.shape, generator=rng)
    x_t = x0 + sigma * torch.randn(x0.shape, generator=rng)
    labels = latents["labels"][index].clone()
    labels[::3] = -1
    given = {"approximate_log_likelihood": lambda rows, k: latents["similarity"][rows][:, k]} if conditioned else {}
    target = sf.StableTarget(sf.EDM(), references=pool)
    found = target(x0, x_t, sigma, labels if labelled else None, index, flip=flip if flipped else None, **given)
    for row in range(8):
        assert isinstance(pool.data, Tensor)
        stored = [pool.data.clone()]
        prior = latents["weights"].log() if weighted else torch.zeros(N, dtype=torch.float64)
        if labelled and labels[row] >= 0:
            prior = prior.masked_fill(latents["labels"] != labels[row], -torch.inf)
        if conditioned:
            prior = prior + latents["similarity"][row]
        if flipped:
            assert isinstance(pool.flipped, Tensor)
            stored.append(pool.flipped.clone())
        stored[int(flip[row])][index[row]] = x0[row]
        expected = plain(x_t[row][None], sigma, torch.cat(stored), prior.repeat(len(stored))[None])[0]
        torch.testing.assert_close(found.x0[row].double(), expected, rtol=0, atol=2e-5)


def test_a_fresh_draw_of_the_stored_latents_is_the_same_each_time_and_normal(latents: dict[str, Tensor]) -> None:
    mean, std = (
        latents["mean"].expand(200, N, *SHAPE).flatten(0, 1),
        latents["std"].expand(200, N, *SHAPE).flatten(0, 1),
    )
    pool = sf.Pool.from_moments(mean, std, seed=3)
    assert isinstance(pool.data, Tensor)
    first = pool.data.clone()
    z = (first - mean) / std
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / z.numel()) ** 0.5
    pool.refresh()
    second = pool.data.clone()
    again = (second - mean) / std
    # Independent of the first.
    assert abs(float((z * again).mean())) < 5 / z.numel() ** 0.5
    pool.refresh(0)
    assert torch.equal(pool.data, first)
    pool.refresh()
    assert torch.equal(pool.data, second)
    other = sf.Pool.from_moments(mean.numpy(), std.numpy(), seed=3, dtype=torch.float16)
    assert torch.equal(other.data, first.half())


def test_refreshed_latents_are_used(latents: dict[str, Tensor], rng: torch.Generator) -> None:
    pool = sf.Pool.from_moments(latents["mean"], latents["std"])
    target = sf.StableTarget(sf.EDM(), references=pool)
    index = torch.arange(8)
    x0 = latents["mean"][:8]
    x_t = x0 + 2 * torch.randn(x0.shape, generator=rng)
    before = target(x0, x_t, 2.0, index=index)
    pool.refresh()
    after = target(x0, x_t, 2.0, index=index)
    assert not torch.equal(before.x0, after.x0)
    fresh = sf.Pool.from_moments(latents["mean"], latents["std"])
    fresh.refresh(1)
    assert torch.equal(after.x0, sf.StableTarget(sf.EDM(), references=fresh)(x0, x_t, 2.0, index=index).x0)


def test_rows_that_cannot_be_draws_of_their_samples_are_refused(
    latents: dict[str, Tensor], rng: torch.Generator
) -> None:
    pool = sf.Pool.from_moments(
        latents["mean"],
        latents["std"],
        flipped_mean=latents["flipped_mean"],
        flipped_std=latents["flipped_std"],
    )
    target = sf.StableTarget(sf.EDM(), references=pool)
    index = torch.arange(8)
    noise = torch.randn(8, *SHAPE, generator=rng)
    x0 = latents["mean"][:8] + latents["std"][:8] * noise
    target(x0, x0 + noise, 1.0, index=index)
    with pytest.raises(ValueError, match=r"a row of x0 with index 1 is .* pass the right index, and flip="):
        target(x0, x0 + noise, 1.0, index=index + 1)
    with pytest.raises(ValueError, match="flip= for flipped samples"):
        target(x0, x0 + noise, 1.0, index=index, flip=index == 3)


@pytest.mark.parametrize("fault", ["modes", "std in other units", "flipped modes"])
def test_rows_nearer_to_their_means_than_draws_are_refused(fault: str, rng: torch.Generator) -> None:
    mean, std = torch.randn(2, 20, 4, 8, 8, generator=rng), 0.1 + 0.2 * torch.rand(2, 20, 4, 8, 8, generator=rng)
    scale = 5.5 if fault == "std in other units" else 1.0
    pool = sf.Pool.from_moments(mean[0], scale * std[0], flipped_mean=mean[1], flipped_std=scale * std[1])
    target = sf.StableTarget(sf.EDM(), references=pool, validate_args=False)
    index, noise = torch.arange(8), torch.randn(8, 4, 8, 8, generator=rng)
    flip = torch.full((8,), fault == "flipped modes")
    right = mean[int(flip[0]), :8] + scale * std[int(flip[0]), :8] * noise
    target(right, right + noise, 1.0, index=index, flip=flip)
    wrong = right - scale * std[int(flip[0]), :8] * noise if "modes" in fault else mean[0, :8] + std[0, :8] * noise
    message = r"a draw is not so near.*latent_dist\.mode\(\).*use Pool\(mean\).*scale std like mean"
    with pytest.raises(ValueError, match=message):
        target(wrong, wrong + noise, 1.0, index=index, flip=flip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("std", [0.0, 1e-4, 1e-3, 4e-3, 0.02, 1.0])
def test_draws_are_not_refused_as_too_near_whatever_rounding_does(
    std: float, dtype: torch.dtype, rng: torch.Generator
) -> None:
    mean = 1 + torch.rand(500, 400, generator=rng)
    pool = sf.Pool.from_moments(mean, torch.full_like(mean, std))
    x0 = (mean + std * torch.randn(mean.shape, generator=rng)).to(dtype).float()
    distances = pool._moments[0].distance(x0, torch.arange(500))
    check_distances(distances, torch.arange(500), 400)
    assert bool((distances[2] > 0).all()) == (std >= 0.02)


def test_of_a_million_draws_none_is_refused(rng: torch.Generator) -> None:
    for dim in (1, 3, 100, 1000):
        mean = torch.zeros(2, dim)
        pool = sf.Pool.from_moments(mean, torch.tensor([[1.0], [0.0]]).expand(2, dim).contiguous())

        def far(x0: Tensor, index: Tensor, moments: Moments = pool._moments[0]) -> None:
            check_distances(moments.distance(x0, index), index, x0.shape[1])

        for _ in range(4):
            x0 = torch.randn(1_000_000 // (4 * dim), dim, generator=rng)
            far(x0, torch.zeros(len(x0), dtype=torch.long))
        with pytest.raises(ValueError, match="std is 0 "):
            far(x0[:1], torch.ones(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mirrored": True, "resampled": True}, "resampled latents are not mirror images of others"),
        ({"mirrored": True, "flipped": torch.zeros(4, 2)}, "pass one of the two"),
        ({"flipped": torch.zeros(4, 3)}, r"flipped is a Tensor of shape \(4, 3\).*\(4, 2\)"),
        ({"flipped": torch.zeros(4, 2).double()}, "dtype torch.float64: pass the kind, shape and dtype"),
        ({"unlabelled_size": 2}, "unlabelled_size is 2, but the Pool has no labels"),
        ({"unlabelled_size": 5, "labels": torch.zeros(4).long()}, "unlabelled_size is 5: pass at most the 4 samples"),
        (
            {"unlabelled_size": 2, "labels": torch.zeros(4).long(), "size": 3},
            "but its size is 3: pass labels, and size",
        ),
        ({"label_size": 2}, "label_size is 2, but the Pool has no labels"),
        ({"label_size": 2, "labels": torch.zeros(4).long(), "size": 3}, "label_size is 2, but its size is 3"),
        ({"unlabelled_size": 0, "labels": torch.zeros(4).long()}, "unlabelled_size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.Pool(torch.zeros(4, 2), **change)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 3), r"std a Tensor of shape \(4, 3\)"),
        (torch.zeros(4, 2), torch.full((4, 2), -1.0), "samples 0 to 3 hold NaN, inf or a negative std"),
        (torch.full((4, 2), torch.nan), torch.ones(4, 2), "hold NaN"),
        (torch.zeros(4, 2).long(), torch.ones(4, 2), "mean has shape .* pass floating point"),
    ],
)
def test_moments_that_do_not_fit_are_refused(mean: Tensor, std: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.Pool.from_moments(mean, std)


def test_only_a_pool_of_moments_can_be_refreshed() -> None:
    with pytest.raises(ValueError, match=r"make the pool by Pool.from_moments"):
        sf.Pool(torch.zeros(4, 2)).refresh()


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (
            lambda rows, k: torch.zeros(len(rows)),
            r"returned a tensor of shape \(8,\) and dtype torch.float32 for 8 rows and \d+ references",
        ),
        (lambda rows, k: 0.0, "returned float"),
        (lambda rows, k: torch.where(k == 15, torch.nan, 0.0).expand(len(rows), -1), "row 0 holds NaN or "),
        (lambda rows, k: torch.where((k == 15) & (rows[:, None] == 3), torch.inf, 0.0), "row 3 holds NaN or "),
        (lambda rows, k: torch.zeros(len(rows), len(k)).long(), "torch.int64"),
        (
            lambda rows, k: torch.full((len(rows), len(k)), -torch.inf),
            "row 0 and of its own sample is -inf: return a ",
        ),
    ],
)
def test_likelihoods_that_are_none_are_refused(likelihood: object, message: str, rng: torch.Generator) -> None:
    data = torch.randn(20, 3, generator=rng)
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(data))
    with pytest.raises(ValueError, match=message):
        target(data[:8], data[:8] + 1, 1.0, index=torch.arange(8), approximate_log_likelihood=likelihood)
    with pytest.raises(ValueError, match="numbers the samples of a Pool"):
        sf.StableTarget(sf.EDM(), references=sf.InBatch())(
            data[:8], data[:8] + 1, 1.0, approximate_log_likelihood=likelihood
        )


def test_what_is_drawn_or_conditioned_cannot_be_compiled(
    latents: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stablefield.targets._engine.query.readable", lambda device: False)
    data, labels, index = latents["mean"], latents["labels"], torch.arange(8)
    x_t = data[:8] + 1
    for pool, more, message in (
        (sf.Pool(data, labels=labels, unlabelled_size=5), {}, r"unlabelled_size is 5.*torch.compiler.disable"),
        (sf.Pool(data, flipped=latents["flipped_mean"]), {}, "a Pool with flipped samples cannot be compiled"),
        (
            sf.Pool(data),
            {"approximate_log_likelihood": lambda rows, k: torch.zeros(len(rows), len(k))},
            "cannot be comp",
        ),
    ):
        seen = labels[:8] if pool.labels is not None else None
        with pytest.raises(ValueError, match=message):
            sf.StableTarget(sf.EDM(), references=pool)(data[:8], x_t, 1.0, seen, index, **more)


@pytest.mark.parametrize("constant", [0.0, -1e3, -1e5, 1e7])
def test_a_constant_of_the_row_does_not_show_in_a_likelihood(constant: float, rng: torch.Generator) -> None:
    data = torch.randn(50, 3, generator=rng)
    table = torch.randn(8, 50, generator=rng, dtype=torch.float64)
    x_t = data[:8] + torch.randn(8, 3, generator=rng)
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(data))
    found = target(
        data[:8],
        x_t,
        1.0,
        index=torch.arange(8),
        approximate_log_likelihood=lambda rows, k: table[rows][:, k] + constant,
    )
    torch.testing.assert_close(found.x0.double(), plain(x_t, 1.0, data, table), rtol=0, atol=2e-6)


def test_the_single_sample_target_takes_a_likelihood_and_does_not_use_it(rng: torch.Generator) -> None:
    x0 = torch.randn(4, 3, generator=rng)
    found = sf.DenoisingTarget(sf.EDM())(x0, x0 + 1, 1.0, approximate_log_likelihood=lambda rows, k: None)
    assert torch.equal(found.x0, x0)


@pytest.mark.parametrize("way", ["copied", "inference"])
def test_a_refresh_is_noticed_by_copies_and_tensors_without_a_counter(
    way: str, latents: dict[str, Tensor], rng: torch.Generator
) -> None:
    index, noise = torch.arange(8), torch.randn(8, *SHAPE, generator=rng)
    x0 = latents["mean"][:8]
    with torch.inference_mode(way == "inference"):
        pool = sf.Pool.from_moments(latents["mean"], latents["std"])
        pool.refresh()
        sf.StableTarget(sf.EDM(), references=pool)(x0, x0 + 2 * noise, 2.0, index=index)
        pool = copy.deepcopy(pool) if way == "copied" else pool
        pool.refresh()
        found = sf.StableTarget(sf.EDM(), references=pool)(x0, x0 + 2 * noise, 2.0, index=index).x0
    fresh = sf.Pool.from_moments(latents["mean"], latents["std"])
    fresh.refresh(2)
    assert torch.equal(found, sf.StableTarget(sf.EDM(), references=fresh)(x0, x0 + 2 * noise, 2.0, index=index).x0)


def test_a_compiled_target_over_latents_drawn_anew_is_the_eager_one(
    latents: dict[str, Tensor], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pool = sf.Pool.from_moments(latents["mean"], latents["std"], dtype=dtype)
        x0 = latents["mean"][:8] + latents["std"][:8] * torch.randn(8, *SHAPE, generator=rng)
        call = (x0, x0 + 3 * torch.randn(8, *SHAPE, generator=rng), 3.0, None, torch.arange(8))
        target = sf.StableTarget(sf.EDM(), references=pool)
        eager = target(*call)
        with monkeypatch.context() as patch:
            patch.setattr("stablefield.targets._engine.query.readable", lambda device: False)
            static = target(*call)
        torch.testing.assert_close(static.x0, eager.x0, rtol=0, atol=1e-5)
        assert eager.ess.max() > 1.05


def test_half_precision_gives_a_row_drawn_anew_no_advantage(rng: torch.Generator) -> None:
    """Two equal latents with less spread than bfloat16 resolves: neither has more weight."""
    mean, std = torch.full((2, 6), 1.003), torch.full((2, 6), 1e-4)
    target = sf.StableTarget(sf.EDM(), references=sf.Pool.from_moments(mean, std, dtype=torch.bfloat16))
    index = torch.arange(2).repeat(500)
    x0 = mean[index] + std[index] * torch.randn(1000, 6, generator=rng)
    found = target(x0, x0 + 2e-3 * torch.randn(x0.shape, generator=rng), 2e-3, index=index)
    assert found.source_weight is not None
    assert float(found.source_weight.mean()) == pytest.approx(0.5, abs=0.02)
