"""`stablefield train DATA`: train a model and leave a run folder."""

import dataclasses
import shlex
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import PartialState
from rich.markup import escape
from rich.table import Table

from stablefield.cli.console import console, quoted, relative
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.interruption import Interruption
from stablefield.cli.places import check_new_folder
from stablefield.cli.progress import EVERY, TrainingProgress
from stablefield.cli.recipes import BY_DATA, RecipeName, shown
from stablefield.cli.settling import pick_device, settled
from stablefield.cli.sources import open_data
from stablefield.cli.words import duration
from stablefield.data._image_set import ImageSet, size_text
from stablefield.training._estimate import estimate
from stablefield.training._feed import Feed
from stablefield.training._loop import Report, Tracker, check_tracker, make_accelerator
from stablefield.training._observers import FrechetObserver, Reading, SelfCheck, check_samples
from stablefield.training._placement import placed
from stablefield.training._processes import first_process_first, start_processes
from stablefield.training._recipe import Recipe
from stablefield.training._run import Plan, Run, make_plan, share_plan, train
from stablefield.training._run_folder import RunConfig, RunFolder

__all__ = ["Train"]


@dataclass(frozen=True)
class Train:
    """Train a diffusion model with the stable target (or with the single-sample one)."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = ""
    """What to train on: digits (built in), a folder or .zip of images, .npy, .npz, idx, parquet or CIFAR-10 files,
    hf:OWNER/NAME.
    With --resume: where the data are now, if they have moved."""
    out: Path | None = None
    """Folder of the run, new or empty; runs/DATA-TARGET with a number if not given."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, as it was configured."""
    recipe: RecipeName = "auto"
    """Which settings to start from; the flags below change them. auto chooses by the data."""
    print: bool = False
    """Show the recipe as Python, and do nothing."""
    dry_run: bool = False
    """Say what the run would take here, and do nothing."""
    resolution: int | None = None
    """Bring every image to this many pixels a side; chosen by the recipe where sizes differ."""
    resize: Literal["crop", "squash"] = "crop"
    """Cut to the largest centred square first, or take the whole image."""
    skip_broken: bool = False
    """Leave out files that cannot be read, and count them."""
    tracker: Tracker = "none"
    """Mirror metrics.jsonl to TensorBoard (in the run's folder) or Weights & Biases."""
    evaluate_every: int = 0
    """Steps between Frechet distances of a few samples, which go into metrics.jsonl; 0 for none."""
    evaluate_samples: int = 500
    """How many samples; the more, the less noisy."""
    measure: ExtractorFlags = dataclasses.field(default_factory=lambda: ExtractorFlags(extractor="random"))
    """What looks at those samples."""
    device: str = ""
    """Where to compute, such as cpu or cuda; a GPU if there is one."""
    config: Annotated[Recipe, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Recipe)
    """What the run does."""
    opened: tyro.conf.Suppress[Any] = None
    """The data, once they are open."""
    yields: tyro.conf.Suppress[tuple[str, ...]] = ()
    """What flags have changed in the recipe."""

    def settled(self, parse: "Callable[[Recipe], Train]", base: Recipe) -> "Train":
        """This call with the recipe that the data suggest, if none was named; flags are read anew on top of it.

        Args:
            parse: reads the command line on top of a recipe.
            base: what this call was read on top of.
        """
        if self.resume:
            if self.config != base or self.recipe != "auto":
                changed = [
                    f.name for f in dataclasses.fields(Recipe) if getattr(self.config, f.name) != getattr(base, f.name)
                ]
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed) or "--recipe"
                raise ValueError(
                    f"{flags} with --resume: a run goes on as it was configured; leave it out, or start a new run."
                )
            for name in ("resolution", "resize", "skip_broken"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"--{name.replace('_', '-')} with --resume: the data are opened as the run was begun; leave it out."
                    )
            return self
        if not self.data:
            if self.print and self.recipe not in BY_DATA:
                return self
            raise ValueError("DATA is missing: name what to train on, such as: stablefield train digits.")
        return settled(self, parse)

    def check(self) -> None:
        """Find out before the data are read whether it can be done.

        Raises:
            ValueError: naming the flag.
            ImportError: if a package is missing.
        """
        if self.evaluate_every < 0:
            raise ValueError(f"--evaluate-every is {self.evaluate_every}: it must not be negative.")
        if self.evaluate_every:
            self.measure.check()
            check_samples(f"--evaluate-samples {self.evaluate_samples}", self.evaluate_samples)
        check_tracker(self.tracker)
        if not self.print and not self.dry_run:
            if self.out is not None:
                RunFolder(self.out).require_unlocked()
            advice = f"name a new folder, or continue the run in it with --resume --out {shlex.quote(str(self.out))}"
            check_new_folder("--out", self.out or Path("runs", "new"), advice)

    def run(self) -> int:
        """Train, with a progress bar, and say what is where."""
        if self.print:
            for note in self.yields:
                console.out(f"# {note}")
            console.out(shown(self._existing().config.recipe if self.resume else self.config))
            return 0
        device = pick_device(self.device)
        state = start_processes(accelerated=device.type == "cuda")
        console.quiet = not state.is_main_process
        device = torch.device(state.device or device) if state.num_processes > 1 else device
        return self._resume(device, state) if self.resume else self._begin(device, state)

    def _begin(self, device: torch.device, state: PartialState) -> int:
        data = self.opened
        assert isinstance(data, ImageSet)
        self._check_samples(data)
        plan = share_plan(self._plan(data, device, state.num_processes) if state.is_main_process else None, data)
        if self.dry_run:
            return self._rehearse(plan.config, data, device, 0)
        observers = self._observers(data, device)
        # From here on Ctrl-C is a wish to stop in order: whoever sees that a run has begun can rely on it.
        with Interruption() as interruption, _Bar() as bar:
            run = train(
                plan,
                out=self.out,
                device=device,
                tracker=self.tracker,
                observers=observers,
                on_start=bar.begin,
                progress=bar.update,
                every=EVERY,
                stop=lambda: interruption.requested,
            )
        return bar.end(run, interruption)

    def _resume(self, device: torch.device, state: PartialState) -> int:
        check_tracker(self.tracker)
        run = self._existing()
        with _held(run, state.is_main_process and not self.dry_run):
            self._tell_where_it_stands(run)
            config, done = run.config, run.step
            if done >= config.recipe.steps and not self.dry_run:
                console.print(f"nothing left to do: {done:,} of {config.recipe.steps:,} steps are done.")
                console.print("A run cannot be extended yet: to train for longer, begin a new one with more --steps.")
                _print_sampling(run)
                return 0
            with first_process_first(state):
                data = open_data(self.data or config.data, **config.opening)
            self._check_samples(data)
            if self.dry_run:
                return self._rehearse(config, data, device, done)
            observers = self._observers(data, device)
            with Interruption() as interruption, _Bar() as bar:
                run.resume(
                    data=data,
                    device=device,
                    tracker=self.tracker,
                    observers=observers,
                    on_start=bar.begin,
                    progress=bar.update,
                    every=EVERY,
                    stop=lambda: interruption.requested,
                )
            return bar.end(run, interruption)

    def _plan(self, data: ImageSet, device: torch.device, processes: int) -> Plan:
        plan = make_plan(data, self.config, device=device, processes=processes)
        console.print(f"recipe:     {self.recipe} (all of it: --print)")
        for note in self.yields:
            console.print(f"changed:    {note}", markup=False)
        console.print(f"references: {plan.references}")
        if plan.config.recipe.target == "stf":
            console.print(f"noise band: {plan.noise_band}")
        return plan

    def _check_samples(self, data: ImageSet) -> None:
        if self.evaluate_every:
            check_samples(f"--evaluate-samples {self.evaluate_samples}", self.evaluate_samples, len(data))

    def _observers(self, data: ImageSet, device: torch.device) -> list[FrechetObserver]:
        if not self.evaluate_every or not PartialState().is_main_process:
            return []
        self.measure.check()
        extractor = self.measure.open(data.shape, device)
        check = SelfCheck.prepare(data, extractor, samples=self.evaluate_samples)

        def tell(step: int, reading: Reading) -> None:
            console.print(f"step {step:,}: {reading}")

        return [FrechetObserver(check, self.evaluate_every, data.shape, device, tell)]

    def _rehearse(self, config: RunConfig, data: ImageSet, device: torch.device, done: int) -> int:
        recipe, left = config.recipe, config.recipe.steps - done
        accelerator = make_accelerator(device)
        placement = placed(recipe, data, device, accelerator.num_processes)
        feed = Feed(data, recipe, device, labelled=config.classes > 0, placement=placement)
        found = estimate(config, feed, accelerator)
        feed.close()
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_row("images", f"{len(data):,} of {'x'.join(map(str, data.shape))}, {size_text(data.images.nbytes)}")
        table.add_row("parameters", f"{found.parameters:,}")
        table.add_row(
            "memory",
            f"{size_text(found.state_bytes)} of weights, averages, gradients and moments; "
            f"{size_text(found.peak_bytes)} at the peak on {device}",
        )
        images, steps = left * recipe.batch, f"{left:,} of {recipe.steps:,} left," if done else f"{left:,}"
        epochs = images / len(data)
        times = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
        table.add_row("steps", f"{steps} of {recipe.batch}: {images:,} images, {times} epochs")
        if recipe.target == "stf":
            sharded = f"all, in {accelerator.num_processes} parts"
            many = sharded if placement == "sharded" else recipe.references
            table.add_row("references", f"{many} per step")
        share = found.target_seconds / found.seconds_per_step
        table.add_row("a step here", f"{found.seconds_per_step:.3f} s, of which noise and target {share:.1%}")
        table.add_row("all of it", f"about {duration(found.seconds_per_step * left)} on {device}")
        console.print(table)
        return 0

    def _existing(self) -> Run:
        if self.out is None:
            raise ValueError("--resume needs --out: name the folder of the run to continue.")
        return Run(self.out)

    def _tell_where_it_stands(self, run: Run) -> None:
        newest = run.folder.newest()
        if newest is None:
            console.print("this run has no checkpoint yet: it starts from its first step.")
            return
        for complaint in newest[2]:
            console.print(f"[yellow]passed over:[/] {escape(complaint)}")
        if newest[1].step < run.config.recipe.steps:
            console.print(f"continuing from step {newest[1].step:,}")


class _Bar:
    """The lines around a training, and its progress bar."""

    def __init__(self) -> None:
        self._held, self._began = ExitStack(), 0.0
        self._progress: TrainingProgress | None = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def begin(self, run: Run, data: ImageSet) -> None:
        """Say what begins."""
        recipe, processes = run.config.recipe, PartialState().num_processes
        many = f" x {processes} processes" if processes > 1 else ""
        device = PartialState().device if processes > 1 else run.device
        console.print(
            f"[bold]{recipe.target.upper()}[/] on {escape(data.name)}: {len(data):,} images of "
            f"{'x'.join(map(str, data.shape))}, {recipe.steps:,} steps of {recipe.batch}, on {device}{many}"
        )
        console.print(f"run folder: {escape(relative(run.path))}")
        self._began = time.monotonic()
        self._progress = self._held.enter_context(TrainingProgress(recipe.steps, run.step))

    def update(self, report: Report) -> None:
        """Show a report."""
        if self._progress is not None:
            self._progress.update(report)

    def end(self, run: Run, interruption: Interruption) -> int:
        """Say where the run ended, and return the exit status."""
        done, steps = run.step, run.config.recipe.steps
        if done < steps:
            console.print(
                f"stopped at step {done:,}; to go on: {quoted('stablefield', 'train', '--resume', '--out', run.path)}"
            )
        else:
            console.print(f"done in {duration(time.monotonic() - self._began)}")
            console.print(f"samples:    {escape(relative(run.folder.picture(done)))}")
        _print_sampling(run)
        # A run that was not finished is no success to whoever started it, such as a shell or a scheduler.
        return interruption.status if done < steps else 0


@contextmanager
def _held(run: Run, wanted: bool) -> Generator[None]:
    """For a block in which no other process trains in the run's folder."""
    if not wanted:
        yield
        return
    with ExitStack() as held:
        try:
            held.enter_context(run.folder.locked(tell=console.print))
        except OSError as error:
            raise ValueError(
                f"--out {run.path} cannot be written ({error.strerror}): a run is continued in its folder; let yourself "
                f"write there, or continue a copy of it."
            ) from error
        yield


def _print_sampling(run: Run) -> None:
    console.print(f"draw more:  {quoted('stablefield', 'sample', run.path, '--seeds', '0-63')}")
