"""What a command foretells is what it then takes, by a clock that only the work moves on."""

import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stablefield.cli.console import console
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits

TINY = ["--steps", "30", "--network.width", "16", "--network.depth", "1", "--sample-every", "0"]


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "plain"
    assert status("train", "digits", *TINY, "--out", str(path)) == 0
    return path


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "conditional"
    assert status("train", "digits", "--conditional", *TINY, "--out", str(path)) == 0
    return path


class Clock:
    """A clock that only the work that is watched moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._patch = 0.0, monkeypatch
        self.told: list[tuple[float, str]] = []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        printed = console.print

        def listen(*given: Any, **options: Any) -> None:
            self.told.append((self.now, str(given[0]) if given else ""))
            printed(*given, **options)

        monkeypatch.setattr(console, "print", listen)

    def charge(self, place: str, price: Callable[..., float], first: float = 0.0) -> None:
        """Let a function take so many seconds by its arguments, and more when it is called for the first time."""
        owner, _, name = place.rpartition(".")
        function = getattr(pkgutil.resolve_name(owner), name)
        extra = [first]

        def charged(*given: Any, **options: Any) -> Any:
            self.now += price(*given) + (extra.pop() if extra else 0.0)
            return function(*given, **options)

        self._patch.setattr(place, charged)

    def foretold(self) -> tuple[float, float]:
        """What was foretold, and what it then took."""
        at, line = next(entry for entry in self.told if entry[1].startswith("takes about"))
        hours, minutes, seconds = (
            float(found[1]) if (found := re.search(rf"about (?:.* )?(\d+) {unit}\b.* from here", line)) else 0.0
            for unit in ("h", "min", "s")
        )
        return 3600 * hours + 60 * minutes + seconds, self.now - at


@pytest.mark.parametrize(
    ("flags", "slowest"),
    [
        (("--samples", "900", "--batch", "100"), "drawing"),
        (("--samples", "260", "--batch", "100", "--class", "1", "--guidance-scale", "2"), "drawing"),
        (("--samples", "90", "--sampler", "pc-ve", "--steps", "9"), "drawing"),
        (("--samples", "400", "--repeats", "2"), "metrics"),
        (("--samples", "400"), "features"),
        (("--samples", "400", "--metrics", "frechet", "kernel"), "metrics"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_evaluate_foretells_is_what_it_takes(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    slowest: str,
) -> None:
    run: Path = request.getfixturevalue("conditional" if "--guidance-scale" in flags else "run")
    dear = {name: 20.0 if name == slowest else 1.0 for name in ("drawing", "features", "metrics")}
    np.save(tmp_path / "others.npy", 255 - open_digits().images[:300])
    clock = Clock(monkeypatch)
    # Each with a slow first call, as a network's, that the forecast must neither count for the others nor leave to them.
    clock.charge("stablefield.networks._mlp.MLP.forward", lambda _, x, *__: dear["drawing"] * 2e-3 * len(x), 30.0)
    clock.charge(
        "stablefield.evaluation._extractor.RandomConvolutions.__call__",
        lambda _, x: dear["features"] * 1e-2 * len(x),
        30.0,
    )
    clock.charge("stablefield.evaluation._extractor.RawPixels.__call__", lambda _, x: dear["features"] * 1e-3 * len(x))
    for place in ("_neighbours.blocks", "_precision_recall.blocks"):
        clock.charge(f"stablefield.evaluation.{place}", lambda a, b: dear["metrics"] * 1e-6 * len(a) * len(b))
    clock.charge("stablefield.evaluation._kid._unbiased", lambda x, _: dear["metrics"] * 1e-6 * len(x) ** 2)
    clock.charge("stablefield.evaluation._fid.distance_between", lambda *_: dear["metrics"] * 0.5)
    control = () if "--metrics" in flags else ("--held-out", str(tmp_path / "others.npy"))  # of nearest
    given = ("--extractor", "random", "--device", "cpu", *control, *flags)
    assert status("evaluate", str(run), *given, "--out", str(tmp_path / "r.json")) == 0
    foretold, took = clock.foretold()
    assert took > 10
    assert foretold == pytest.approx(took, rel=0.3)


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(
    ("flags", "slowest"),
    [
        (("--steps", "40", "--samples", "60", "--evaluations", "1"), "network"),
        (("--steps", "8", "--samples", "60", "--evaluations", "2"), "distance"),
        (("--steps", "8", "--samples", "60", "--evaluations", "1"), "posterior"),
        (("--steps", "8", "--samples", "60", "--evaluations", "1"), "setup"),
        (("--steps", "8", "--samples", "60", "--evaluations", "1"), "features"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_compare_foretells_is_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], slowest: str
) -> None:
    dear = {
        name: 30.0 if name == slowest else 1.0 for name in ("network", "distance", "posterior", "setup", "features")
    }
    clock = Clock(monkeypatch)
    clock.charge(
        "stablefield.networks._mlp.MLP.forward",
        lambda _, x, *__: dear["network"] * 1e-4 * len(x) * (3 if torch.is_grad_enabled() else 1),
        5.0,
    )
    clock.charge("stablefield.evaluation._extractor.RawPixels.__call__", lambda _, x: dear["features"] * 1e-2 * len(x))
    clock.charge("stablefield.training._self_check.jackknife_error", lambda *_: dear["distance"])
    clock.charge(
        "stablefield.probing._exact.ExactPosterior.__call__", lambda _, x, *__: dear["posterior"] * 1e-3 * len(x)
    )
    clock.charge("stablefield.training._stepper.Stepper.__init__", lambda *_: dear["setup"])
    clock.charge("stablefield.training._comparison.comparison_page", lambda *_: 2.0)
    small = ("--network.width", "16", "--network.depth", "1", "--batch", "32", "--seeds", "0", "--device", "cpu")
    assert status("compare", "digits", *small, *flags, "--out", str(tmp_path / "c")) == 0
    foretold, took = clock.foretold()
    assert took > 10
    assert foretold == pytest.approx(took, rel=0.3)
