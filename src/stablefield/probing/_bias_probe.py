"""The bias check of data: whether reference policies are unbiased on them, and whether the test detects planted faults."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._progress import Progress
from stablefield._shapes import found_device, per_row
from stablefield.diffusion._process import EDM, Process
from stablefield.probing._bias import BiasCheck, TargetLike, check_bias
from stablefield.probing._population import MOST, Population, Samples, described, draw_population
from stablefield.probing._record import bias_record
from stablefield.report._cells import text_table
from stablefield.report._chart import LineChart
from stablefield.report._page import Page, Table, Text
from stablefield.report._result import Result
from stablefield.targets._pool import Pool
from stablefield.targets._posterior import posterior
from stablefield.targets._references import InBatch
from stablefield.targets._stable_target import StableTarget

__all__ = ["BiasProbe", "ClassesMixed", "SourceLeftOut", "SourceTwice", "probe_bias"]

# Samples that a bias check uses: the faults that it finds depend on the policy, not on the size.
_CHECKED = 4096
_COLUMNS = ("references", "verdict", "p", "max |t|", "direction, noise level")


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class BiasProbe(Result):
    """The result of the bias test for each reference policy, and for targets with a planted fault.

    Attributes:
        name: of the data.
        manifest: their description, as JSON values.
        checks: the tests by the name of the policy or fault.
        planted: names of those with a planted fault.
        false_alarm: rate at which an unbiased policy may fail.
        seed: of all random draws.
        command: the command line that made it, for the report; empty for a call from Python.
    """

    name: str
    manifest: Mapping[str, Any]
    checks: Mapping[str, BiasCheck]
    planted: tuple[str, ...]
    false_alarm: float
    seed: int
    command: str = ""

    @property
    def passed(self) -> bool:
        """Whether the test found no biased policy."""
        return all(check.passed for name, check in self.checks.items() if name not in self.planted)

    def __str__(self) -> str:
        return f"{text_table(_COLUMNS, self._rows())}\n{self._explained()}"

    def to_dict(self) -> dict[str, Any]:
        """All numbers and their context, as JSON values."""
        return {
            "command": self.command,
            "data": dict(self.manifest),
            "seed": self.seed,
            "checks": {
                name: {"planted": name in self.planted, **bias_record(check)} for name, check in self.checks.items()
            },
        }

    def charts(self) -> Mapping[str, LineChart]:
        """An empty mapping: this result has no charts."""
        return {}

    def page(self) -> Page:
        """The report."""
        verdict = "No bias found in any policy." if self.passed else "A policy is biased."
        return Page(
            title=f"Bias check on {self.name}",
            summary=verdict,
            blocks=(Table(columns=_COLUMNS, rows=tuple(map(tuple, self._rows()))), Text(self._explained())),
            footer=f"`{self.command}`" if self.command else "",
        )

    def _rows(self) -> list[list[str]]:
        return [
            [
                f"fault: {name}" if name in self.planted else name,
                "no bias seen" if check.passed else "BIASED",
                f"{check.p_value:.2g}",
                f"{check.statistic:.1f}",
                f"{check.direction}, at {check.noise_level:.2g}",
            ]
            for name, check in self.checks.items()
        ]

    def _explained(self) -> str:
        rows = next(iter(self.checks.values())).rows
        missed = [name for name in self.planted if self.checks[name].passed]
        return (
            f"{rows:,} training rows each; an unbiased policy fails at a rate of {self.false_alarm:g}.\n"
            "The faults are planted, to show what the test detects on these data."
            + (f"\nIt did not detect: {', '.join(missed)}. A policy with this fault would pass, too." if missed else "")
        )


def probe_bias(
    images: Samples,
    *,
    labels: Tensor | NDArray[np.int64] | None = None,
    by_class: bool = False,
    process: Process | None = None,
    false_alarm: float = 0.001,
    max_images: int = MOST,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> BiasProbe:
    """Test that the reference policies are unbiased on data, and that planted faults are detected.

    Args:
        images: a set, or a tensor or array of shape (n, ...), as for `probe_data`; the test uses at most 4,096 of them.
        labels: class of each sample, integers of shape (n,), to keep posteriors within classes.
        by_class: the same with the classes of an image set.
        process: of the training; EDM if None.
        false_alarm: rate at which an unbiased policy may fail.
        max_images: samples to use, 4,096 at most.
        seed: of all random draws.
        device: where to compute; a GPU if there is one, if None.
        progress: called as policies are done.

    Raises:
        ValueError: if the data have nothing to measure, or an argument does not fit.
    """
    process = EDM() if process is None else process
    population = draw_population(
        images, labels, max_images=min(max_images, _CHECKED), by_class=by_class or labels is not None, seed=seed
    ).to(found_device(device))
    size = min(256, len(population))
    data, classes = population.data, population.labels
    # Thousands of small calls, whose rows the check makes itself: to compare x_t with x0 and t would take much of the time.
    policy = partial(StableTarget, process, validate_args=False)
    targets: dict[str, TargetLike] = {
        "the batch": policy(references=InBatch()),
        f"a pool of {size:,}": policy(references=Pool(data, size, classes)),
        f"all {len(population):,}": policy(references=Pool(data, None, classes)),
    }
    faulty: dict[str, TargetLike] = {
        "source left out": SourceLeftOut(population, size, process=process),
        "source included twice": SourceTwice(population, size, process=process),
    }
    if classes is not None:
        faulty["classes mixed"] = ClassesMixed(population, size, process=process)
    checks: dict[str, BiasCheck] = {}
    # The pool must hold the batch, and other samples must remain without it.
    rows = min(128, max(2, len(population) // 3))
    for name, target in (targets | faulty).items():
        checks[name] = check_bias(target, population, process=process, batch=rows, false_alarm=false_alarm, seed=seed)
        if progress is not None:
            progress(Progress(stage="testing", done=len(checks), total=len(targets | faulty)))
    name, _, manifest = described(images)
    return BiasProbe(
        name=name, manifest=manifest, checks=checks, planted=tuple(faulty), false_alarm=false_alarm, seed=seed
    )


# Targets with a planted fault: each has the signature of a `StableTarget`, and is wrong in the way that its name states.


@dataclass(frozen=True)
class _Faulty:
    """A target over `size` samples of `population`, or all of it if None."""

    population: Population
    size: int | None = None
    _: KW_ONLY
    process: Process = field(default_factory=EDM)


class SourceLeftOut(_Faulty):
    """References drawn from all samples except those of the batch.

    A row whose class has no other sample keeps its own, and so has no fault.
    """

    def __call__(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        *,
        reference_labels: Tensor | None = None,  # noqa: ARG002
        generator: torch.Generator | None = None,
    ) -> Tensor:
        data = self.population.data
        free = torch.ones(len(data), dtype=torch.bool, device=data.device)
        free[index] = False
        places = free.nonzero()[:, 0]
        chosen = places[torch.randperm(len(places), generator=generator).to(places.device)[: self.size]]
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if labels is None or self.population.labels is None:
            return posterior(x_t, alpha, sigma, data[chosen]).mean
        groups = self.population.labels[chosen]
        served = ((labels[:, None] == groups).any(1) | (labels == -1)).nonzero()[:, 0]
        found = posterior(
            x_t[served], alpha[served], sigma[served], data[chosen], labels=labels[served], reference_labels=groups
        )
        return x0.index_copy(0, served, found.mean)


class ClassesMixed(_Faulty):
    """References of all classes, for a network that sees the class."""

    def __call__(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,  # noqa: ARG002
        index: Tensor | None = None,
        *,
        reference_labels: Tensor | None = None,  # noqa: ARG002
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return self._stable(x0, x_t, t, index=index, generator=generator).x0

    @cached_property
    def _stable(self) -> StableTarget:
        return StableTarget(self.process, references=Pool(self.population.data, self.size), validate_args=False)


class SourceTwice(_Faulty):
    """References that include each row's source twice."""

    def __call__(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        *,
        reference_labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        once = self._stable(x0, x_t, t, labels, index, reference_labels=reference_labels, generator=generator)
        # With a second copy the weights w become w / (1 + w_own), and the source's 2 w_own / (1 + w_own).
        own = per_row(once.source_weight, x0)
        return once.x0 + own / (1 + own) * (x0 - once.x0)

    @cached_property
    def _stable(self) -> StableTarget:
        pool = Pool(self.population.data, self.size, self.population.labels)
        return StableTarget(self.process, references=pool, validate_args=False)
