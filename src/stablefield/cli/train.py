"""`stablefield train DATA`: train a model and write a run folder."""

import dataclasses
import pprint
import shlex
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.markup import escape

from stablefield._distributed import Ranks
from stablefield.cli.console import console, print_rows, quoted, relative
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.interruption import Interruption
from stablefield.cli.parser import given
from stablefield.cli.places import check_new_folder
from stablefield.cli.progress import EVERY, TrainingBar
from stablefield.cli.recipe_flags import TrainingFlags
from stablefield.cli.sources import open_data
from stablefield.data._image_set import ImageSet
from stablefield.report._cells import duration
from stablefield.training._estimate import estimate_run
from stablefield.training._loop import Tracker, check_tracker
from stablefield.training._observers import FrechetObserver, Reading, SelfCheck, check_samples
from stablefield.training._recipe import Recipe
from stablefield.training._recipes import RECIPES
from stablefield.training._run import Run, make_plan, place, train
from stablefield.training._run_folder import RunFolder

__all__ = ["Train"]


@dataclass(frozen=True)
class Train(TrainingFlags):
    """Train a diffusion model with the stable target (or with the single-sample one)."""

    out: Path | None = None
    """Folder of the run, new or empty; by default runs/DATA-TARGET, with a number if that exists."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, with its own recipe. DATA then names the new place of its data,
    if they have moved."""
    print: bool = False
    """Show the recipe as Python, and exit."""
    dry_run: bool = False
    """Estimate the run's time and memory on this machine, and exit."""
    tracker: Tracker = "none"
    """Copy metrics.jsonl to TensorBoard (in the run's folder) or Weights & Biases."""
    evaluate_every: int = 0
    """Steps between Frechet distances of a few samples, logged to metrics.jsonl; 0 for none."""
    evaluate_samples: int = 500
    """Samples per Frechet distance; more are less noisy."""
    measure: ExtractorFlags = dataclasses.field(default_factory=ExtractorFlags)
    """The network that measures those samples."""

    def check(self) -> None:
        """Check the flags and the packages before reading the data.

        Raises:
            ValueError: naming the flag.
            ImportError: if a package is missing.
        """
        super().check()
        if self.evaluate_every < 0:
            raise ValueError(f"--evaluate-every is {self.evaluate_every}: it must not be negative.")
        if self.evaluate_every:
            self.measure.check()
        self._check_samples(None)
        check_tracker(self.tracker)
        if not self.print and not self.dry_run and not self.resume:
            if self.out is not None:
                RunFolder(self.out).require_unlocked()
            advice = f"name a new folder, or continue the run in it with --resume --out {shlex.quote(str(self.out))}"
            check_new_folder("--out", self.out or Path("runs", "new"), advice)

    def run(self) -> int:
        """Train with a progress bar, and print the paths of the results."""
        if self.resume:
            return self._resume()
        if self.print and not self.data and self.recipe in RECIPES:
            return _print_recipe(*self.config.on(RECIPES[self.recipe]))
        found = self.chosen()
        if self.print:
            return _print_recipe(found.recipe, found.notes)
        self._check_samples(len(found.data))
        plan = make_plan(found.data, found.recipe, device=found.device)
        console.print(f"recipe:     {found.name} (all of it: --print)")
        for note in found.notes:
            console.print(f"changed:    {note}", markup=False)
        console.print(f"references: {plan.references}")
        if found.recipe.target == "stf":
            console.print(f"noise band: {plan.noise_band}")
        if self.dry_run:
            return print_rows(plan.estimate(found.device).rows())
        call = partial(train, plan, out=self.out, device=found.device)
        return self._trained(found.data, found.device, 0, found.recipe.steps, call)

    def _resume(self) -> int:
        self._check_nothing_changes()
        if self.out is None:
            raise ValueError("--resume needs --out: name the folder of the run to continue.")
        run = Run(self.out)
        if self.print:
            return _print_recipe(run.config.recipe, ())
        self.check()
        device, ranks = place(self.device or None)
        with _held(run, ranks.first and not self.dry_run):
            _print_where_it_stands(run)
            config, done = run.config, run.step
            if done >= config.recipe.steps and not self.dry_run:
                console.print(f"nothing left to do: {done:,} of {config.recipe.steps:,} steps are done.")
                console.print("A run cannot be extended yet: to train for longer, start a new one with more --steps.")
                _print_sampling(run)
                return 0
            with ranks.rank_0_first("to open the data"):
                data = open_data(self.data or config.data, **config.opening)
            self._check_samples(len(data))
            if self.dry_run:
                return print_rows(estimate_run(config, data, device, done).rows())
            call = partial(run.resume, data=data, device=device)
            return self._trained(data, device, done, config.recipe.steps, call)

    def _check_nothing_changes(self) -> None:
        """Reject flags that a resumed run would ignore.

        Raises:
            ValueError: naming them.
        """
        changes = [*given(self.config.words), *(["--recipe"] if self.recipe != "auto" else [])]
        if changes:
            raise ValueError(
                f"{', '.join(changes)} with --resume: a run continues with its own recipe; leave it out, or start a new run."
            )
        for name in ("resolution", "resize", "skip_broken"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"--{name.replace('_', '-')} with --resume: a run opens its data as at its start; leave it out."
                )

    def _check_samples(self, images: int | None) -> None:
        if self.evaluate_every:
            check_samples(f"--evaluate-samples {self.evaluate_samples}", self.evaluate_samples, images)

    def _trained(self, data: ImageSet, device: torch.device, done: int, steps: int, call: Callable[..., Run]) -> int:
        """Train from step `done` by a call of the library, with a bar, and return the exit status."""
        observers, began = self._observers(data, device), time.monotonic()
        # From here on Ctrl-C saves the run: once the command prints that a run has begun, users can rely on that.
        with Interruption() as interruption, TrainingBar(steps, done) as bar:
            run = call(
                tracker=self.tracker,
                observers=observers,
                on_start=_print_beginning,
                progress=bar.update,
                every=EVERY,
                stop=lambda: interruption.requested,
            )
        _print_end(run, time.monotonic() - began)
        # For a shell or a scheduler, an unfinished run is not a success.
        return interruption.status if run.step < steps else 0

    def _observers(self, data: ImageSet, device: torch.device) -> list[FrechetObserver]:
        if not self.evaluate_every or not Ranks.launched(device).first:
            return []
        self.measure.check()
        extractor = self.measure.open(data.shape, device, floating=data.scaling is not None, usual="random")
        check = SelfCheck.prepare(data, extractor, samples=self.evaluate_samples)

        def tell(step: int, reading: Reading) -> None:
            console.print(f"step {step:,}: {reading}")

        return [FrechetObserver(check, self.evaluate_every, data.shape, device, tell, data.scaling)]


def _print_recipe(recipe: Recipe, notes: Sequence[str]) -> int:
    """Show a recipe as Python that makes it."""
    for note in notes:
        console.out(f"# {note}")
    console.out(pprint.pformat(recipe, width=100, sort_dicts=False))
    return 0


def _print_where_it_stands(run: Run) -> None:
    newest = run.folder.newest()
    if newest is None:
        console.print("this run has no checkpoint yet: starting from its first step.")
        return
    for complaint in newest[2]:
        console.print(f"[yellow]skipped:[/] {escape(complaint)}")
    if newest[1].step < run.config.recipe.steps:
        console.print(f"continuing from step {newest[1].step:,}")


def _print_beginning(run: Run, data: ImageSet) -> None:
    recipe, processes = run.config.recipe, Ranks.launched(run.device).world_size
    many = f" x {processes} processes" if processes > 1 else ""
    what = "images" if data.scaling is None else "samples"
    console.print(
        f"[bold]{recipe.target.upper()}[/] on {escape(data.name)}: {len(data):,} {what} of "
        f"{'x'.join(map(str, data.shape))}, {recipe.steps:,} steps of {recipe.batch}, on {run.device}{many}"
    )
    console.print(f"run folder: {escape(relative(run.path))}")


def _print_end(run: Run, seconds: float) -> None:
    done = run.step
    if done < run.config.recipe.steps:
        console.print(
            f"stopped at step {done:,}; to continue: {quoted('stablefield', 'train', '--resume', '--out', run.path)}"
        )
    else:
        console.print(f"done in {duration(seconds)}")
        console.print(f"samples:    {escape(relative(run.drawn))}")
    _print_sampling(run)


@contextmanager
def _held(run: Run, wanted: bool) -> Generator[None]:
    """Keep other processes from training in the run's folder within this block."""
    if not wanted:
        yield
        return
    with ExitStack() as held:
        try:
            held.enter_context(run.folder.locked(tell=console.print))
        except OSError as error:
            raise ValueError(
                f"--out {run.path} cannot be written ({error.strerror}): a run continues in its folder; change its "
                f"permissions, or continue a copy of it."
            ) from error
        yield


def _print_sampling(run: Run) -> None:
    console.print(f"draw more:  {quoted('stablefield', 'sample', run.path, '--seeds', '0-63')}")
