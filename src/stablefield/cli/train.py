"""`stablefield train DATA`: train a model and write a run folder."""

import dataclasses
import pprint
import shlex
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.markup import escape

from stablefield._distributed import Ranks
from stablefield.cli.console import console, print_rows, quoted, relative, shown_warnings
from stablefield.cli.extractors import ExtractorFlags
from stablefield.cli.interruption import Interruption
from stablefield.cli.parser import given, words_of
from stablefield.cli.places import check_new_folder
from stablefield.cli.progress import EVERY, StageBar, TrainingBar
from stablefield.cli.recipe_flags import TrainingFlags
from stablefield.cli.sources import open_data
from stablefield.data._image_set import ImageSet
from stablefield.report._cells import duration
from stablefield.training._accelerator import Tracker, check_tracker
from stablefield.training._data_parallel import overlaps
from stablefield.training._estimate import decoding_seconds, estimate_run
from stablefield.training._fully_sharded import shards
from stablefield.training._pace import clock
from stablefield.training._plan import Plan, make_plan, place
from stablefield.training._recipe import Recipe, SongUNetConfig
from stablefield.training._recipes import RECIPES
from stablefield.training._run import Run
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import open_own
from stablefield.training._run_folder import RunFolder
from stablefield.training._self_check import FrechetObserver, Reading, SelfCheck, check_samples
from stablefield.training._time_budget import seconds_of
from stablefield.training._train import train
from stablefield.training._weight_source import open_weights

__all__ = ["Train"]


@dataclass(frozen=True)
class Train(TrainingFlags):
    """Train a diffusion model with the stable target (or with the single-sample one)."""

    out: Path | None = None
    """Folder of the run, new or empty; by default runs/DATA-TARGET, with a number if that exists."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, with its own recipe; --steps makes it longer. DATA then names
    the new place of its data, if they have moved."""
    init: Annotated[Path | None, tyro.conf.arg(metavar="RUN|FILE")] = None
    """Begin with the weights of a run (its averaged ones, and its recipe), an export, or a file with a state dict. Prints
    what it copies. The data may differ, in classes and size too if the network takes them."""
    vae: str = ""
    """Of latents of images: the autoencoder's folder or name on a hub, if it has moved. It decodes the run's pictures."""
    time: str = ""
    """Time that the command may take, such as 90s, 10m or 2h, in place of --steps. A few trial steps show how many steps
    that is; the ramp of the learning rate, the averages, pictures and checkpoints follow, and the run keeps its pace.
    A U-Net becomes narrower if the time is short for it, unless --recipe, --init or a flag of the network is given."""
    held_out: Annotated[str, tyro.conf.arg(metavar="SHARE|DATA")] = ""
    """Do not train on these: a share of the data, such as 0.05, or other data of the same kind. Logs the loss on them at
    fixed noise, and keeps the checkpoint with the lowest one, for --checkpoint best."""
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
    measure: Annotated[ExtractorFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ExtractorFlags)
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
        self._check_measure()
        check_tracker(self.tracker)
        if self.init is not None:
            open_weights(self.init)
        held_out = self._held_out()
        if isinstance(held_out, float) and not 0 < held_out < 1:
            raise ValueError(f"--held-out {held_out:g}: give a share between 0 and 1, such as 0.05, or other data.")
        if self.time:
            seconds_of(self.time)
            if "--steps" in given(self.config.words):
                raise ValueError(f"--time {self.time} and --steps: give one of the two.")
        if not self.print and not self.dry_run and not self.resume:
            if self.out is not None:
                RunFolder(self.out).require_unlocked()
            advice = f"name a new folder, or continue the run in it with --resume --out {shlex.quote(str(self.out))}"
            check_new_folder("--out", self.out or Path("runs", "new"), advice)

    def run(self) -> int:
        """Train with a progress bar, and print the paths of the results."""
        if self.resume:
            return self._resume()
        began = clock()
        if self.print and not self.data and self.recipe in RECIPES:
            return _print_recipe(*self.config.on(RECIPES[self.recipe]))
        source = None if self.init is None else open_weights(self.init)
        found = self.chosen(source)
        if self.print:
            return _print_recipe(found.recipe, found.notes)
        self._check_samples(len(found.data))
        held_out = self._held_out()
        if isinstance(held_out, str) and Ranks.launched(found.device).first:
            held_out = open_data(held_out, **found.data.reading)
        with shown_warnings():
            plan = make_plan(found.data, found.recipe, init=self.init, held_out=held_out, device=found.device)
        console.print(f"recipe:     {found.name} (all of it: --print)")
        for note in found.notes:
            console.print(f"changed:    {note}", markup=False)
        console.print(f"references: {plan.references}")
        if found.recipe.target == "stf":
            console.print(f"noise band: {plan.noise_band}")
        if plan.config.initial is not None:
            print_rows(plan.config.initial.rows())
        if self.time:
            left = max(1e-3, began + seconds_of(self.time) - clock())
            fixed = [flag for flag in given(self.config.words) if flag.startswith("--network.")]
            fit = self.recipe == "auto" and self.init is None and not fixed
            plan = plan.within(left, found.device, self.vae, fit_width=fit)
            _print_budget(plan, found.recipe)
        if plan.config.held_out is not None:
            console.print(f"held out:   {plan.config.held_out.describe(plan.config.recipe, plan.data)}", markup=False)
        if self.dry_run:
            return print_rows(plan.estimate(found.device, self.vae, **self._evaluations()).rows())

        def call(**options: Any) -> Run:
            # The observers have taken of the time.
            left = began + seconds_of(self.time) - clock() if self.time else None
            plan_now = dataclasses.replace(plan, seconds=left)
            return train(plan_now, out=self.out, vae=self.vae, device=found.device, **options)

        return self._trained(found.data, found.device, 0, plan.config, call)

    def _resume(self) -> int:
        self._check_nothing_changes()
        if self.out is None:
            raise ValueError("--resume needs --out: name the folder of the run to continue.")
        run = Run(self.out)
        steps = self._steps()
        if self.print:
            return _print_recipe(_extended(run, steps).recipe, ())
        self.check()
        device, ranks = place(self.device or None)
        with _held(run, ranks.first and not self.dry_run):
            config, done = _extended(run, steps), run.step
            _print_where_it_stands(run, config)
            if done >= config.recipe.steps and not self.dry_run:
                console.print(f"nothing left to do: {done:,} of {config.recipe.steps:,} steps are done.")
                longer = quoted("stablefield", "train", "--resume", "--steps", str(2 * done), "--out", run.path)
                console.print(f"for longer: {longer}")
                _print_sampling(run)
                return 0
            with ranks.rank_0_first("to open the data"):
                data = _opened(config, self.data)
            self._check_samples(len(data))
            if self.dry_run:
                decoding = decoding_seconds(config, self.vae, device)
                found = estimate_run(config, data, device, done, decoding=decoding, **self._evaluations())
                return print_rows(found.rows())
            held_out = _opened(config, self.held_out) if self.held_out and ranks.first else None
            call = partial(run.resume, steps=steps, data=data, held_out=held_out, vae=self.vae, device=device)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "skipped a newer checkpoint")  # printed above
                return self._trained(data, device, done, config, call)

    def _check_nothing_changes(self) -> None:
        """Reject flags that a resumed run would ignore.

        Raises:
            ValueError: naming them.
        """
        changes = [flag for flag in given(self.config.words) if flag != "--steps"]
        changes += ["--recipe"] if self.recipe != "auto" else []
        changes += ["--noise-distribution"] if self.noise_distribution != "recipe" else []
        if changes:
            raise ValueError(
                f"{', '.join(changes)} with --resume: a run continues with its own recipe, and only --steps may change; "
                "leave it out, or start a new run."
            )
        if self.init is not None:
            raise ValueError("--init with --resume: a run continues with its own weights; leave one of the two out.")
        if isinstance(self._held_out(), float):
            raise ValueError(
                "--held-out with --resume: a run keeps what it holds out; name only the new place of data."
            )
        if self.time:
            raise ValueError("--time with --resume: a run continues to its last step; give --steps to change it.")
        for name in ("resolution", "resize", "colour", "background", "skip_broken"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"--{name.replace('_', '-')} with --resume: a run opens its data as at its start; leave it out."
                )

    def _for_resume(self) -> list[str]:
        """The given flags that a run does not keep, for the command that continues it."""
        kept = {"vae", "device", "tracker", "evaluate_every", "evaluate_samples", "measure"}
        kept |= {"data", "held_out"} if self.resume else set()  # where they have moved to
        besides = {field.name for field in dataclasses.fields(self)} - kept
        words = words_of(self, Train(), besides=besides)
        return [word for word in words if word != "--data"]  # it has no flag

    def _steps(self) -> int | None:
        """The value of --steps, if given."""
        values = given(self.config.words).get("--steps")
        return None if values is None else int(values[-1])

    def _held_out(self) -> float | str | None:
        """The value of --held-out: a share, or the name of data."""
        try:
            return float(self.held_out)
        except ValueError:
            return self.held_out or None

    def _check_measure(self) -> None:
        """Check the flags of the Frechet distances; without --evaluate-every none of them does anything."""
        if self.evaluate_every:
            self.measure.check()
        elif self.evaluate_samples != Train.evaluate_samples or self.measure != ExtractorFlags():
            besides = [
                field.name for field in dataclasses.fields(self) if field.name not in ("evaluate_samples", "measure")
            ]
            flag, *values = words_of(self, Train(), besides=besides)
            raise ValueError(
                f"{flag} {values[0]} does nothing without --evaluate-every: pass the steps between Frechet distances, such "
                "as --evaluate-every 1000, or leave it out."
            )
        self._check_samples(None)

    def _check_samples(self, images: int | None) -> None:
        if self.evaluate_every:
            check_samples(f"--evaluate-samples {self.evaluate_samples}", self.evaluate_samples, images)

    def _evaluations(self) -> dict[str, int]:
        return {"evaluate_every": self.evaluate_every, "evaluate_samples": self.evaluate_samples}

    def _trained(
        self, data: ImageSet, device: torch.device, done: int, config: RunConfig, call: Callable[..., Run]
    ) -> int:
        """Train from step `done` by a call of the library, with a bar, and return the exit status."""
        steps, observers = config.recipe.steps, self._observers(data, device, config)
        began = time.monotonic()
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
        _print_end(run, time.monotonic() - began, self._for_resume())
        # For a shell or a scheduler, an unfinished run is not a success.
        return interruption.status if run.step < steps else 0

    def _observers(self, data: ImageSet, device: torch.device, config: RunConfig) -> list[FrechetObserver]:
        if not self.evaluate_every or not Ranks.launched(device).first:
            return []
        self.measure.check()
        extractor = self.measure.open(data.shape, device, floating=data.scaling is not None, usual="random")
        check = SelfCheck.of_run(config, data, extractor, self.evaluate_samples)

        def tell(step: int, reading: Reading) -> None:
            console.print(f"step {step:,}: {reading}")

        return [FrechetObserver(check, self.evaluate_every, config, device, tell)]


def _print_recipe(recipe: Recipe, notes: Sequence[str]) -> int:
    """Show a recipe as Python that makes it."""
    for note in notes:
        console.out(f"# {note}")
    console.out(pprint.pformat(recipe, width=100, sort_dicts=False))
    return 0


def _extended(run: Run, steps: int | None) -> RunConfig:
    """The run's configuration, with another number of steps if one is given."""
    return run.config if steps is None else run.config.extended(run.step, steps)


def _opened(config: RunConfig, place: str) -> ImageSet:
    """Data of a run, opened with a bar; see `open_own`."""
    with StageBar() as bar:
        return open_own(config, place, progress=bar.update)


def _print_budget(plan: Plan, recipe: Recipe) -> None:
    """Print how a run uses its time, in comparison with the recipe."""
    found = plan.config.recipe
    left = duration(plan.seconds or 0)
    network, usual = found.network, recipe.network
    if isinstance(network, SongUNetConfig) and isinstance(usual, SongUNetConfig) and network != usual:
        console.print(
            f"network:    {network.base_channels} base channels instead of {usual.base_channels}, to take more steps in "
            "this time (to choose: --network.base-channels)"
        )
    console.print(f"time:       {left} left, for about {found.steps:,} steps (the recipe: {recipe.steps:,})")
    looks = f"a picture every {found.sample_every:,} steps" if found.sample_every else "one picture, at the end"
    if found.sample_every >= found.steps:
        looks = "two pictures, one early and one at the end"
    counted = "noisy images" if found.draws_per_image > 1 else "images"
    console.print(
        f"            ramp {found.ramp_images:,} {counted}, half-life of the averages {found.ema_half_life:,.0f}, {looks}"
    )


def _print_where_it_stands(run: Run, config: RunConfig) -> None:
    newest, before = run.folder.to_continue(config), run.config.recipe
    if newest is None:
        console.print("this run has no checkpoint yet: starting from its first step.")
        return
    for complaint in newest[2]:
        console.print(f"[yellow]skipped:[/] {escape(complaint)}")
    done, after = newest[1].step, config.recipe
    if done < after.steps:
        console.print(f"continuing from step {done:,}")
    if after.steps != before.steps:
        console.print(f"steps:      {after.steps:,}, instead of {before.steps:,}")
        rate, usual = (recipe.learning_rate_at(max(0, done - 1)) for recipe in (before, after))
        if rate < usual:
            console.print(
                f"[yellow]note:[/] the learning rate had fallen to {rate:.2g} for the end at step {before.steps:,}; it goes "
                f"back to {usual:.2g}, and falls over the last {after.decay_share:.0%} of {after.steps:,} steps."
            )


def _print_beginning(run: Run, data: ImageSet) -> None:
    recipe, processes = run.config.recipe, Ranks.launched(run.device).world_size
    many = f" x {processes} processes" if processes > 1 else ""
    what = "images" if data.scaling is None else "samples"
    draws = f" rows of {recipe.images_per_step}" if recipe.draws_per_image > 1 else ""
    console.print(
        f"[bold]{recipe.target.upper()}[/] on {escape(data.name)}: {len(data):,} {what} of "
        f"{'x'.join(map(str, data.shape))}, {recipe.steps:,} steps of {recipe.batch}{draws}, on {run.device}{many}"
    )
    if processes > 1:
        console.print(
            f"gradients:  summed {_summed(recipe, processes, run.device)}; a resumed run has the same bits on {processes} "
            "processes of the same kind, and on another number the same losses up to rounding"
        )
    console.print(f"run folder: {escape(relative(run.path))}")


def _summed(recipe: Recipe, processes: int, device: torch.device) -> str:
    if shards(recipe, processes):
        return f"by FSDP2, and each process holds 1/{processes} of the weights, gradients, moments and averages"
    return "by DistributedDataParallel" if overlaps(recipe, processes, device) else "in a fixed order"


def _print_end(run: Run, seconds: float, flags: Sequence[str]) -> None:
    """Print what a run has left, and how to continue it, with these flags, or to draw from it."""
    done = run.step
    if done < run.config.recipe.steps:
        command = quoted("stablefield", "train", "--resume", "--out", run.path, *flags)
        console.print(f"stopped at step {done:,}; to continue: {command}")
    else:
        console.print(f"done in {duration(seconds)}")
        console.print(f"samples:    {escape(relative(run.drawn))}")
    for name, path in (("over time", run.path / "samples" / "training.gif"), ("report", run.path / "report.html")):
        if path.is_file():
            console.print(f"{name + ':':11} {escape(relative(path))}")
    best = run.folder.best()
    if best is not None:
        console.print(f"best:       step {best[0]:,}, with a held-out loss of {best[1]:.4g} (--checkpoint best)")
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
    if run.config.classes:
        number, names = run.config.learned_classes[0], run.config.class_names
        name = str(number) if names is None else names[number]
        console.print(f"of a class: {quoted('stablefield', 'sample', run.path, '--class', name)}")
