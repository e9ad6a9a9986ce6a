import json
import subprocess
from pathlib import Path

import pytest
import torch

from stablefield.evaluation import commit, neighbours
from stablefield.evaluation.commit import running_commit
from stablefield.evaluation.extractor import RawPixels
from stablefield.evaluation.feature_pass import Features, Lens
from stablefield.evaluation.frechet import frechet_distance_from_features
from stablefield.evaluation.inception_score import inception_score
from stablefield.evaluation.kernel import kernel_distance
from stablefield.evaluation.manifold import coverage, density, precision, recall
from stablefield.evaluation.measurement import Making, Measurement, check_counts, lens_for
from stablefield.evaluation.memorisation import nearest_ratio
from stablefield.evaluation.metric import (
    ClassifierScore,
    Coverage,
    Density,
    Frechet,
    Kernel,
    Metric,
    Nearest,
    Precision,
    Recall,
)
from stablefield.evaluation.reference import Reference
from stablefield.evaluation.result_file import read_results, write_results
from stablefield.evaluation.statistics import statistics_of

ALL: tuple[Metric, ...] = (
    *(Frechet(), Kernel(subsets=5), Precision(), Recall(), Density(), Coverage(), Nearest(), ClassifierScore(splits=2)),
)
PIXELS = RawPixels((1, 2, 2))


def features(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def kept(rows: torch.Tensor) -> Features:
    return Features(count=len(rows), rows=rows, statistics=statistics_of(rows))


def measurement(metrics: tuple[Metric, ...] = ALL, held_out: torch.Tensor | None = None) -> Measurement:
    reference = Reference(name="cubes", sha256="ab" * 32, split="train", features=kept(features(0, 40)))
    return Measurement(extractor=PIXELS, metrics=metrics, reference=reference, held_out=held_out)


def test_every_metric_is_its_function_on_the_features() -> None:
    x, real, held_out = features(1, 30) + 0.2, features(0, 40), features(2, 20)
    got = {value.name: value.value for value in measurement(held_out=held_out).values(kept(x))}
    ratio = nearest_ratio(x, real, held_out)
    kernel = kernel_distance(x, real, generator=torch.Generator().manual_seed(0), subsets=5, subset_size=15)
    assert got == pytest.approx(
        {
            "Frechet distance (pixels)": frechet_distance_from_features(x, real).value,
            "kernel distance (pixels)": kernel.mean,
            "precision": precision(real, x, 3).value,
            "recall": recall(real, x, 3).value,
            "density": density(real, x, 5).value,
            "coverage": coverage(real, x, 5).value,
            "memorised share": ratio.memorised,
            "memorised share of held-out images": ratio.held_out_memorised,
            "nearer than held-out images": ratio.closer,
            "classifier score (pixels)": inception_score(x.double().softmax(1), 2).mean,
        },
        rel=1e-6,
    )
    # Precision is not symmetric: swapped sides would show.
    assert precision(real, x, 3).value != recall(real, x, 3).value


def test_distances_within_a_set_are_found_once_for_all_metrics_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = neighbours.others

    def counted(points: torch.Tensor, k: int, **blocks: int) -> torch.Tensor:
        sizes.append(len(points))
        return whole(points, k, **blocks)

    monkeypatch.setattr(neighbours, "others", counted)
    measured = measurement((Precision(), Recall(), Density(), Coverage(), Precision(k=7)))
    for seed in (1, 2):
        x = features(seed, 30) + 0.2
        got = [value.value for value in measured.values(kept(x))]
        real = features(0, 40)
        functions = (
            precision(real, x, 3),
            recall(real, x, 3),
            density(real, x),
            coverage(real, x),
            precision(real, x, 7),
        )
        assert got == [score.value for score in functions]
    # The reference images for k up to 5 and once more for k = 7, the samples of each repeat; others by the functions.
    by_metrics = [40, 30, 40, 30]
    by_functions = [40, 30, 40, 40, 40] * 2
    assert sorted(sizes) == sorted(by_metrics + by_functions)


def test_only_what_is_needed_is_kept() -> None:
    assert lens_for(PIXELS, [Frechet()]) == Lens(extractor=PIXELS, rows=False, moments=True)
    assert lens_for(PIXELS, [Precision(), Kernel()]) == Lens(extractor=PIXELS, rows=True, moments=False)
    assert lens_for(PIXELS, ALL) == Lens(extractor=PIXELS, rows=True, moments=True)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: type(metric).__name__)
def test_a_metric_with_just_enough_images_works_and_with_one_less_says_what_to_do(metric: Metric) -> None:
    n = metric.least
    check_counts([metric], n, n)
    reference = Reference(name="r", sha256="", split="train", features=kept(features(0, max(2, n))))
    enough = Measurement(extractor=PIXELS, metrics=(metric,), reference=reference)
    assert enough.values(kept(features(1, max(2, n))))
    name = type(metric).__name__
    with pytest.raises(ValueError, match=f"there are {n - 1} samples, but {name} takes at least {n}: use more"):
        check_counts([metric], n - 1, n)
    with pytest.raises(ValueError, match=f"{n - 1} reference images, but {name}"):
        check_counts([metric], n, n - 1)


def test_results_hold_every_repeat_and_the_whole_protocol(tmp_path: Path) -> None:
    it = measurement((Frechet(), Kernel(subsets=5)))
    repeats = [it.values(kept(features(seed, 30))) for seed in (1, 2, 3)]
    making = Making(sampler="heun", steps=18, nfe=35, ema="half-life", commit="c")
    results = it.results(repeats, 30, ("0-29", "30-59", "60-89"), making)
    frechet, kernel = results
    assert frechet.values == tuple(repeat[0].value for repeat in repeats)
    assert frechet.standard_error is None
    errors = [repeat[1].standard_error or 0 for repeat in repeats]
    assert kernel.standard_error == pytest.approx((sum(error**2 for error in errors) / 3) ** 0.5)
    record = kernel.to_dict()["protocol"]
    assert record["settings"] == {"seed": 0, "subset_size": 15, "subsets": 5}
    assert {key: record[key] for key in ("sampler", "steps", "nfe", "ema", "commit", "seeds", "sample_count")} == {
        "sampler": "heun",
        "steps": 18,
        "nfe": 35,
        "ema": "half-life",
        "commit": "c",
        "seeds": ["0-29", "30-59", "60-89"],
        "sample_count": 30,
    }
    assert (record["reference"], record["reference_count"], record["split"]) == ("cubes", 40, "train")
    path = write_results(tmp_path / "deep" / "r.json", "runs/a", results)
    assert read_results(path) == ("runs/a", results)
    assert json.loads(path.read_text())["results"][0]["minimum"] == min(frechet.values)
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_no_flipped_bit_of_results_makes_other_results(tmp_path: Path) -> None:
    it = measurement((Frechet(),))
    results = it.results([it.values(kept(features(1, 30)))], 30, ("0-29",), Making(commit="c"))
    path = write_results(tmp_path / "r.json", "runs/a", results)
    content = path.read_bytes()
    told: list[str] = []
    for bit in range(0, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert read_results(path) == ("runs/a", results)  # white space became other white space
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 2 * len(content)
    assert all(text.startswith(f"{path} holds no results") for text in told)
    record = json.loads(content)
    del record["checksum"]  # as before results carried one
    path.write_text(json.dumps(record))
    assert read_results(path) == ("runs/a", results)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "subject": "x", "results": [{}]}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json holds no results .*name a file that `stablefield evaluate` wrote"):
        read_results(path)
    with pytest.raises(ValueError, match=r"none\.json holds no results"):
        read_results(tmp_path / "none.json")


def test_metrics_that_lack_their_features_say_what_to_keep() -> None:
    rows, moments = Features(count=9, rows=features(1, 9)), Features(count=9, statistics=statistics_of(features(1, 9)))
    with pytest.raises(ValueError, match="needs the moments of both sides"):
        measurement((Frechet(),)).values(rows)
    with pytest.raises(ValueError, match="needs the features of both sides"):
        measurement((Recall(),)).values(moments)
    with pytest.raises(ValueError, match="keep the rows"):
        measurement((ClassifierScore(),)).values(moments)


def test_a_share_of_none_claims_no_certainty() -> None:
    (share,) = measurement((Nearest(),)).values(kept(features(5, 30)))
    assert share.value == 0
    assert share.standard_error is None


def test_the_commit_is_gits_and_says_whether_files_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git("init", "-q")
    monkeypatch.setattr("stablefield.__file__", str(package / "__init__.py"))
    # Inside a repository, but not of it.
    monkeypatch.setattr(commit, "_installed_commit", lambda: None)
    assert running_commit().startswith("version ")
    git("add", "-A")
    git("commit", "-qm", "x")
    assert running_commit() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("1")
    assert running_commit() == git("rev-parse", "HEAD") + "-dirty"
