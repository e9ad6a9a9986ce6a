"""Every complaint: a ValueError that names the argument and what to do."""

from collections.abc import Callable

import pytest
import torch

import stablefield as sf

X = torch.zeros(4, 3)
Y = torch.arange(15, dtype=torch.float32).reshape(5, 3)
ELSEWHERE = torch.device("meta")


def with_value(x: torch.Tensor, place: tuple[int, int], value: float) -> torch.Tensor:
    x = x.clone()
    x[place] = value
    return x


POSTERIOR = {
    "x_t of integers": ({"x_t": X.long()}, r"x_t has dtype torch\.int64.*floating"),
    "x_t without rows": ({"x_t": X[:0]}, r"x_t has shape \(0, 3\).*at least one row"),
    "x_t without dimensions": ({"x_t": X[:, 0]}, r"x_t has shape \(4,\).*data dimension"),
    "x_t with nan": ({"x_t": with_value(X, (2, 1), float("nan"))}, r"x_t\[2\] holds NaN or inf.*clean"),
    "x_t with inf": ({"x_t": with_value(X, (3, 1), float("inf"))}, r"x_t\[3\] holds NaN or inf"),
    "references of integers": ({"references": Y.long()}, r"references have dtype torch\.int64.*uint8"),
    "references of bool": ({"references": Y > 0}, r"references have dtype torch\.bool"),
    "no references": ({"references": Y[:0]}, r"references have shape \(0, 3\).*at least one"),
    "references of another shape": ({"references": Y[:, :2]}, r"references have shape \(5, 2\).*\(n, 3\)"),
    "references elsewhere": ({"references": Y.to(ELSEWHERE)}, r"references are on meta, x_t is on cpu: move"),
    "references with nan": ({"references": with_value(Y, (4, 0), float("nan"))}, r"references\[4\] holds NaN"),
    "sigma zero": ({"sigma": 0.0}, r"sigma\[0\] is 0: it must be positive"),
    "sigma negative": ({"sigma": torch.tensor([1.0, 1.0, -2.0, 1.0])}, r"sigma\[2\] is -2: it must be positive"),
    "sigma nan": ({"sigma": float("nan")}, r"sigma\[0\] is nan"),
    "sigma infinite": ({"sigma": float("inf")}, r"sigma\[0\] is inf.*finite"),
    "sigma of another shape": ({"sigma": torch.ones(3)}, r"sigma has shape \(3,\).*4 rows"),
    "sigma per element": ({"sigma": torch.ones(4, 1)}, r"sigma has shape \(4, 1\).*one per row"),
    "sigma elsewhere": ({"sigma": torch.ones(4, device=ELSEWHERE)}, r"sigma is on meta.*move"),
    "alpha nan": ({"alpha": float("nan")}, r"alpha\[0\] is nan: it must be finite"),
    "alpha infinite": ({"alpha": torch.tensor([1.0, float("inf"), 1.0, 1.0])}, r"alpha\[1\] is inf"),
    "alpha of another shape": ({"alpha": torch.ones(5)}, r"alpha has shape \(5,\).*4 rows"),
    "source of floats": ({"source": torch.zeros(4)}, r"source has dtype torch\.float32.*integers"),
    "source of bool": ({"source": torch.zeros(4, dtype=torch.bool)}, r"source has dtype torch\.bool.*integers"),
    "source of another length": ({"source": torch.zeros(5, dtype=torch.long)}, r"source has shape \(5,\).*\(4,\)"),
    "source too large": ({"source": torch.tensor([0, 5, 0, 0])}, r"source\[1\] is 5: it must index the 5 references"),
    "source negative": ({"source": torch.tensor([0, 0, 0, -1])}, r"source\[3\] is -1.*0 to 4"),
    "source elsewhere": ({"source": torch.zeros(4, dtype=torch.long, device=ELSEWHERE)}, r"source is on meta.*move"),
    "labels alone": ({"labels": torch.zeros(4, dtype=torch.long)}, r"reference_labels is missing.*with labels"),
    "reference_labels alone": ({"reference_labels": torch.zeros(5, dtype=torch.long)}, r"^labels is missing"),
    "labels of floats": (
        {"labels": torch.zeros(4), "reference_labels": torch.zeros(5, dtype=torch.long)},
        r"^labels has dtype torch\.float32.*integers",
    ),
    "labels of another length": (
        {"labels": torch.zeros(5, dtype=torch.long), "reference_labels": torch.zeros(5, dtype=torch.long)},
        r"^labels has shape \(5,\).*\(4,\)",
    ),
    "reference_labels of another length": (
        {"labels": torch.zeros(4, dtype=torch.long), "reference_labels": torch.zeros(4, dtype=torch.long)},
        r"^reference_labels has shape \(4,\).*\(5,\)",
    ),
    "reference_labels elsewhere": (
        {
            "labels": torch.zeros(4, dtype=torch.long),
            "reference_labels": torch.zeros(5, dtype=torch.long).to(ELSEWHERE),
        },
        r"^reference_labels is on meta.*move",
    ),
    "a labels of nobody": (
        {"labels": torch.tensor([0, 0, 7, 0]), "reference_labels": torch.zeros(5, dtype=torch.long)},
        r"no reference may serve row 2 \(label 7\).*label -1",
    ),
    "a source of another labels": (
        {
            "labels": torch.zeros(4, dtype=torch.long),
            "reference_labels": torch.tensor([0, 0, 0, 0, 1]),
            "source": torch.tensor([0, 4, 0, 0]),
        },
        r"labels\[1\] is 0: the row's own source is a reference with another label",
    ),
    "log_prior of another length": ({"log_prior": torch.zeros(4)}, r"log_prior has shape \(4,\).*\(5,\)"),
    "log_prior elsewhere": ({"log_prior": torch.zeros(5, device=ELSEWHERE)}, r"log_prior has shape.*on meta"),
    "log_prior nan": ({"log_prior": torch.full((5,), float("nan"))}, r"log_prior\[0\] is nan"),
    "log_prior infinite": ({"log_prior": torch.tensor([0, 0, 0, float("inf"), 0])}, r"log_prior\[3\] is inf.*-inf"),
    "all references excluded": ({"log_prior": torch.full((5,), -float("inf"))}, r"no reference may serve row 0: "),
    "chunk_size zero": ({"chunk_size": 0}, r"chunk_size is 0: pass at least 1"),
}


@pytest.mark.parametrize("name", POSTERIOR)
def test_posterior_refuses(name: str) -> None:
    change, message = POSTERIOR[name]
    arguments = {"x_t": X, "alpha": 1.0, "sigma": 1.0, "references": Y} | change
    with pytest.raises(ValueError, match=message):
        sf.posterior(**arguments)


ZERO = torch.zeros(4, dtype=torch.long)
TARGET = {
    "x0 of integers": ({"x0": X.byte()}, r"x0 has dtype torch\.uint8.*127\.5"),
    "x0 without rows": ({"x0": X[:0], "x_t": X[:0]}, r"x0 has shape \(0, 3\).*at least one row"),
    "x0 without dimensions": ({"x0": X[:, 0], "x_t": X[:, 0]}, r"x0 has shape \(4,\)"),
    "x0 with nan": ({"x0": with_value(X, (1, 0), float("nan"))}, r"\[1\] holds NaN or inf"),
    "x_t of another shape": ({"x_t": X[:3]}, r"x_t has shape \(3, 3\), x0 has \(4, 3\)"),
    "x_t of integers": ({"x_t": X.long()}, r"x_t has dtype torch\.int64"),
    "x_t elsewhere": ({"x_t": X.to(ELSEWHERE)}, r"x_t is on meta.*move"),
    "x_t with nan": ({"x_t": with_value(X, (2, 1), float("nan"))}, r"x_t\[2\] holds NaN"),
    "noise of another shape": ({"noise": X[:, :2]}, r"noise has shape \(4, 2\)"),
    "noise elsewhere": ({"noise": X.to(ELSEWHERE)}, r"noise is on meta"),
    "t of another shape": ({"t": torch.ones(3)}, r"t has shape \(3,\).*4 rows"),
    "t elsewhere": ({"t": torch.ones(4, device=ELSEWHERE)}, r"t is on meta"),
    "t negative": ({"t": -1.0}, r"sigma\[0\] is -1"),
    "t nan": ({"t": torch.full((4,), float("nan"))}, r"sigma\[0\] is nan"),
    "flip of integers": ({"flip": ZERO}, r"flip has shape \(4,\) and dtype torch\.int64.*bool"),
    "flip of another length": ({"flip": torch.zeros(3, dtype=torch.bool)}, r"flip has shape \(3,\).*\(4, m\)"),
    "flip of too many columns": ({"flip": torch.zeros(4, 2, dtype=torch.bool)}, r"flip has 2 columns.*fewer axes"),
    "flip of three dimensions": ({"flip": torch.zeros(4, 1, 1, dtype=torch.bool)}, r"flip has shape \(4, 1, 1\)"),
    "alone of integers": ({"source_only": ZERO}, r"source_only has shape \(4,\) and dtype torch\.int64.*bool"),
    "alone of another length": (
        {"source_only": torch.zeros(5, dtype=torch.bool)},
        r"source_only has shape \(5,\).*\(4,\)",
    ),
    "alone of two dimensions": (
        {"source_only": torch.zeros(4, 1, dtype=torch.bool)},
        r"source_only has shape \(4, 1\)",
    ),
    "labels of floats": ({"labels": X[:, 0]}, r"labels has shape \(4,\) and dtype torch\.float32"),
    "labels too short": ({"labels": ZERO[:3]}, r"labels has shape \(3,\)"),
    "labels too long": ({"labels": torch.zeros(6, dtype=torch.long)}, r"labels has shape \(6,\)"),
    "reference_labels too short": ({"labels": ZERO, "reference_labels": ZERO[:3]}, r"labels has shape \(3,\)"),
    "reference_labels of another class": (
        {"labels": ZERO, "reference_labels": ZERO + 1},
        r"labels\[0\] is 0: the row's own source",
    ),
    "index too short": ({"index": torch.arange(3)}, r"index has shape \(3,\).*one integer per row"),
    "index too long": ({"index": torch.arange(5)}, r"index has shape \(5,\).*one integer per row"),
}


# With rows alone, or rows below the band, the batch is cut into parts before it is used: errors must not change by that.
@pytest.mark.parametrize("parts", ["whole", "source_only", "band"])
@pytest.mark.parametrize("name", TARGET)
def test_stable_target_refuses(name: str, parts: str) -> None:
    change, message = TARGET[name]
    x0 = Y[:4].clone()
    arguments = {"x0": x0, "x_t": x0 + 0.5, "t": torch.tensor([1.0, 1.0, 1.0, 1.0])} | change
    band = 0.0
    if parts == "source_only":
        arguments = {"source_only": torch.tensor([False, False, False, True])} | arguments
    elif parts == "band" and "t" not in change:
        arguments["t"] = torch.tensor([1.0, 1.0, 1.0, 0.1])
        band = 0.5
    references = sf.InBatch()
    if "index" in change:
        references = sf.Pool(Y)
    with pytest.raises(ValueError, match=message):
        sf.StableTarget(sf.EDM(), references=references, noise_band=band)(**arguments)


@pytest.mark.parametrize("band", [-0.1, float("nan")])
def test_stable_target_refuses_a_band_that_is_no_noise_level(band: float) -> None:
    with pytest.raises(ValueError, match="noise_band is"):
        sf.StableTarget(sf.EDM(), references=sf.InBatch(), noise_band=band)


def test_stable_target_refuses_a_chunk_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"chunk_size=0.*at least 1"):
        sf.StableTarget(sf.EDM(), references=sf.InBatch(), chunk_size=0)(X, X, 1.0)


POOL: dict[str, tuple[Callable[[], object], str]] = {
    "no data": (lambda: sf.Pool(Y[:0]), r"Pool data have shape \(0, 3\).*at least one"),
    "data without dimensions": (lambda: sf.Pool(Y[:, 0]), r"Pool data have shape \(5,\)"),
    "data of integers": (lambda: sf.Pool(Y.long()), r"Pool data have dtype torch\.int64.*uint8"),
    "size zero": (lambda: sf.Pool(Y, 0), r"Pool size is 0.*pass 1 to the 5"),
    "size above the data": (lambda: sf.Pool(Y, 6), r"Pool size is 6.*None for all"),
    "labels of another length": (lambda: sf.Pool(Y, labels=ZERO), r"Pool labels has shape \(4,\).*\(5,\)"),
    "labels of floats": (lambda: sf.Pool(Y, labels=Y[:, 0]), r"Pool labels has shape \(5,\) and dtype torch\.float32"),
}


@pytest.mark.parametrize("name", POOL)
def test_pool_refuses(name: str) -> None:
    make, message = POOL[name]
    with pytest.raises(ValueError, match=message):
        make()


CALL = {
    "no index": (sf.Pool(Y), {"index": None}, r"index is missing"),
    "index of floats": (sf.Pool(Y), {"index": torch.arange(4.0)}, r"index has shape \(4,\) and dtype torch\.float32"),
    "index of bool": (sf.Pool(Y), {"index": torch.ones(4, dtype=torch.bool)}, r"index has.*torch\.bool"),
    "index elsewhere": (sf.Pool(Y), {"index": torch.arange(4).to(ELSEWHERE)}, r"index is on meta.*move"),
    "data elsewhere": (sf.Pool(Y.to(ELSEWHERE)), {}, r"Pool's data are on meta.*one device"),
    "index too large": (sf.Pool(Y), {"index": torch.tensor([0, 1, 2, 5])}, r"index\[3\] is 5.*0 to 4"),
    "index negative": (sf.Pool(Y), {"index": torch.tensor([0, 1, 2, -1])}, r"index\[3\] is -1.*0 to 4"),
    "data of another shape": (sf.Pool(Y[:, :2]), {}, r"rows of x0 have shape \(3,\), the Pool's \(2,\)"),
    "another sample": (sf.Pool(Y), {"index": torch.tensor([0, 1, 3, 3])}, r"row 2 of x0 is not sample 3.*flip="),
    "a size below the batch": (
        sf.Pool(Y, 3),
        {},
        r"Pool size is 3, but the batch has 4 distinct samples: pass at least the batch size",
    ),
    "a labels that the pool lacks": (sf.Pool(Y), {"labels": ZERO}, r"labels is given, but the Pool has none"),
    "a labels of another class": (
        sf.Pool(Y, labels=torch.tensor([0, 0, 0, 1, 1])),
        {"labels": ZERO},
        r"labels\[3\] is 0: the Pool has another label",
    ),
}


@pytest.mark.parametrize("name", CALL)
def test_a_target_over_a_pool_refuses(name: str) -> None:
    pool, change, message = CALL[name]
    arguments = {"x0": Y[:4], "x_t": Y[:4] + 0.5, "t": 1.0, "index": torch.arange(4)} | change
    with pytest.raises(ValueError, match=message):
        sf.StableTarget(sf.EDM(), references=pool)(**arguments)


def test_a_row_that_uses_references_is_named_by_its_place_in_the_batch() -> None:
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(Y), noise_band=1.0)
    levels = torch.tensor([0.5, 2.0, 0.5, 2.0])
    with pytest.raises(ValueError, match=r"row 3 of x0 is not sample 2 of the Pool"):
        target(Y[:4], Y[:4] + 0.5, levels, index=torch.tensor([0, 1, 3, 2]))
    # Rows below the band use no reference, so nothing depends on their index.
    other = target(Y[:4], Y[:4] + 0.5, levels, index=torch.tensor([0, 1, 4, 3]))
    assert torch.equal(other.x0[2], Y[2])


def test_where_references_are_drawn_every_row_is_looked_at() -> None:
    # A row below the band uses none, but what is drawn for the others depends on its index.
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(Y, 4), noise_band=1.0)
    levels = torch.tensor([0.5, 2.0, 0.5, 2.0])
    with pytest.raises(ValueError, match=r"row 2 of x0 is not sample 4 of the Pool"):
        target(Y[:4], Y[:4] + 0.5, levels, index=torch.tensor([0, 1, 4, 3]))
    # Rows that are alone have no part in it, and the others keep their number.
    source_only = torch.tensor([True, False, False, False])
    with pytest.raises(ValueError, match=r"row 3 of x0 is not sample 4 of the Pool"):
        target(Y[:4], Y[:4] + 0.5, levels, index=torch.tensor([1, 1, 2, 4]), source_only=source_only)


def test_a_pool_may_be_as_small_as_the_distinct_samples_of_the_batch() -> None:
    index = torch.tensor([2, 2, 0, 2])
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(Y, 2))
    assert target(Y[index], Y[index] + 0.5, 50.0, index=index).ess.max() > 1.9


class Ball(sf.GaussianKernel):
    """Noise that is uniform in a ball."""

    def log_ratio(self, distance, anchor_square, sigma, dim):
        return torch.where(distance + anchor_square > dim * sigma**2, -torch.inf, 0.0).to(distance.dtype)


def test_a_kernel_that_no_reference_can_have_made_the_row_by_is_an_error(rng: torch.Generator) -> None:
    references = torch.randn(20, 4, generator=rng)
    assert sf.posterior(references[:3], 1.0, 1.0, references, kernel=Ball()).mean.isfinite().all()
    with pytest.raises(ValueError, match="no reference may serve row 0"):
        sf.posterior(references[:3] + 100, 1.0, 1.0, references, kernel=Ball())
