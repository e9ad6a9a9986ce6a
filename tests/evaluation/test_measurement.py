import pytest
import torch

from stablefield.evaluation import _neighbours as neighbours
from stablefield.evaluation import _precision_recall as precision_recall
from stablefield.evaluation._evaluate import check_counts
from stablefield.evaluation._extraction import ExtractorPass, pass_for
from stablefield.evaluation._extractor import RawPixels
from stablefield.evaluation._features import moments_of
from stablefield.evaluation._fid import Frechet, frechet_distance_from_features
from stablefield.evaluation._inception_score import ClassifierScore, inception_score
from stablefield.evaluation._kid import Kernel, kernel_distance
from stablefield.evaluation._memorisation import Nearest, nearest_ratio
from stablefield.evaluation._metric import Features, Metric, MetricInput, Value
from stablefield.evaluation._precision_recall import (
    Coverage,
    Density,
    Precision,
    Recall,
    coverage,
    density,
    precision,
    recall,
)

ALL: tuple[Metric, ...] = (
    *(Frechet(), Kernel(subsets=5), Precision(), Recall(), Density(), Coverage(), Nearest(), ClassifierScore(splits=2)),
)
PIXELS = RawPixels((1, 2, 2))


def features(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def kept(rows: torch.Tensor) -> Features:
    return Features(rows=rows, moments=moments_of(rows))


def values(
    x: Features, real: Features, metrics: tuple[Metric, ...] = ALL, held_out: torch.Tensor | None = None
) -> list[Value]:
    given = MetricInput(samples=x, references=real, extractor=PIXELS, held_out=held_out)
    return [value for metric in metrics for value in metric(given)]


def test_every_metric_is_its_function_on_the_features() -> None:
    x, real, held_out = features(1, 30) + 0.2, features(0, 40), features(2, 20)
    got = {value.name: value.value for value in values(kept(x), kept(real), held_out=held_out)}
    ratio = nearest_ratio(x, real, held_out)
    kernel = kernel_distance(x, real, generator=torch.Generator().manual_seed(0), subsets=5, subset_size=15)
    assert got == pytest.approx(
        {
            "Frechet distance (pixels)": frechet_distance_from_features(x, real).value,
            "kernel distance (pixels)": kernel.mean,
            "precision": precision(real, x, 3),
            "recall": recall(real, x, 3),
            "density": density(real, x, 5),
            "coverage": coverage(real, x, 5),
            "memorised share": ratio.memorised,
            "memorised share of held-out images": ratio.held_out_memorised,
            "nearer than held-out images": ratio.closer,
            "classifier score (pixels)": inception_score(x.double().softmax(1), 2).mean,
        },
        rel=1e-6,
    )
    # Precision is not symmetric: swapped sides would show.
    assert precision(real, x, 3) != recall(real, x, 3)


def test_every_metric_says_which_direction_is_better() -> None:
    found = {value.name: value.better for value in values(kept(features(1, 30)), kept(features(0, 40)))}
    assert {name for name, better in found.items() if better == "lower is better"} == {
        "Frechet distance (pixels)",
        "kernel distance (pixels)",
        "memorised share",
    }
    assert {name for name, better in found.items() if better == "higher is better"} == {
        "precision",
        "recall",
        "density",
        "coverage",
        "classifier score (pixels)",
    }


def test_distances_within_a_set_are_found_once_for_all_metrics_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = neighbours.others

    def counted(points: torch.Tensor, k: int, **blocks: int) -> torch.Tensor:
        sizes.append(len(points))
        return whole(points, k, **blocks)

    monkeypatch.setattr(neighbours, "others", counted)
    monkeypatch.setattr(precision_recall, "others", counted)
    metrics = (Precision(), Recall(), Density(), Coverage(), Precision(k=7))
    references = kept(features(0, 40))
    for seed in (1, 2):
        x = features(seed, 30) + 0.2
        got = [value.value for value in values(kept(x), references, metrics)]
        real = features(0, 40)
        assert got == [
            precision(real, x, 3),
            recall(real, x, 3),
            density(real, x),
            coverage(real, x),
            precision(real, x, 7),
        ]
    # The reference images for k up to 5 and once more for k = 7, the samples of each repeat; others by the functions.
    by_metrics = [40, 30, 40, 30]
    by_functions = [40, 30, 40, 40, 40] * 2
    assert sorted(sizes) == sorted(by_metrics + by_functions)


def test_only_what_is_needed_is_kept() -> None:
    assert pass_for(PIXELS, [Frechet()]) == ExtractorPass(extractor=PIXELS, rows=False, moments=True)
    assert pass_for(PIXELS, [Precision(), Kernel()]) == ExtractorPass(extractor=PIXELS, rows=True, moments=False)
    assert pass_for(PIXELS, ALL) == ExtractorPass(extractor=PIXELS, rows=True, moments=True)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: type(metric).__name__)
def test_a_metric_with_just_enough_images_works_and_with_one_less_says_what_to_do(metric: Metric) -> None:
    n = metric.least
    check_counts([metric], n, n)
    assert values(kept(features(1, max(2, n))), kept(features(0, max(2, n))), (metric,))
    name = type(metric).__name__
    with pytest.raises(ValueError, match=f"there are {n - 1} samples, but {name} takes at least {n}: use more"):
        check_counts([metric], n - 1, n)
    with pytest.raises(ValueError, match=f"{n - 1} reference images, but {name}"):
        check_counts([metric], n, n - 1)


def test_metrics_that_lack_their_features_say_what_to_keep() -> None:
    rows, moments = Features(rows=features(1, 9)), Features(moments=moments_of(features(1, 9)))
    with pytest.raises(ValueError, match="needs mean and covariance, and they were not kept: set its moments to True"):
        values(rows, rows, (Frechet(),))
    for metric in (Recall(), ClassifierScore()):
        with pytest.raises(ValueError, match="needs the features themselves, and they were not kept: set its rows"):
            values(moments, moments, (metric,))


def test_a_share_of_none_claims_no_certainty() -> None:
    (share,) = values(kept(features(5, 30)), kept(features(0, 40)), (Nearest(),))
    assert share.value == 0
    assert share.standard_error is None
