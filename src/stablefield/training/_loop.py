"""The training loop: steps, and between them reports, pictures and checkpoints.

A step is a function of (seed, step), see `_stepper`; the loop adds reports, lines of metrics.jsonl, pictures, checkpoints
and observers, none of which affects the steps. One process or many run it in the same way; the first process writes.
"""

import dataclasses
import errno
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator

from stablefield._distributed import RankError, Ranks, single_process
from stablefield._shapes import check_callable, check_kind, number, whole_number
from stablefield.data._autoencoder import Autoencoder
from stablefield.data._image_set import ImageSet
from stablefield.data._png import write_png
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.sampling._seeded_images import in_turn
from stablefield.training._accelerator import Tracker, log_picture, make_accelerator, tracking
from stablefield.training._checkpoint import State, Trained, restore, save, sweep
from stablefield.training._ema import follower
from stablefield.training._feed import Feed
from stablefield.training._fully_sharded import to_first
from stablefield.training._grids import write_animation
from stablefield.training._held_out_loss import HeldOutLoss
from stablefield.training._meter import Meter, Report, bin_edges
from stablefield.training._model import build_denoiser, require_fit
from stablefield.training._pace import Pace
from stablefield.training._placement import placed
from stablefield.training._post_hoc import remove_snapshots, take_snapshot
from stablefield.training._report_writer import ReportWriter, log_environment
from stablefield.training._run_config import RunConfig
from stablefield.training._run_data import check_vae, held_out_data, training_data
from stablefield.training._run_folder import RunFolder
from stablefield.training._samples import Samples, draw_samples
from stablefield.training._stepper import Stepper

__all__ = ["Observer", "Report", "TrainingError", "check_watchers", "fit", "not_finite", "writing"]

SAMPLE_SEEDS = range(64)
# Entries of metrics.jsonl that are the loop's own.
_LOGGED = (
    "step", "images", "loss", "variance_removed", "loss_minus_floor", "images_per_second", "target_share", "learning_rate",
    "bin_edges", "bin_loss", "bin_variance_removed",
)  # fmt: skip


class TrainingError(Exception):
    """The run cannot continue; the message says why and what remains."""


def not_finite(what: str) -> TrainingError:
    """The error of a run whose numbers are not finite; `what` says which."""
    return TrainingError(f"{what}: lower learning_rate or max_grad_norm in a new run.")


@contextmanager
def writing() -> Generator[None]:
    """Report a failed write of the run's files as a TrainingError; errors of callbacks are their callers' own.

    `fit` adds what remains of the run.
    """
    try:
        yield
    except OSError as error:
        full = error.errno is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "check its folder"
        raise TrainingError(f"the run cannot be written ({error.strerror or error}): {remedy}, then go on.") from error


def _entries(who: str, found: Any) -> dict[str, float]:
    """What an observer returned, in plain numbers, as metrics.jsonl takes them."""
    check_kind(f"observers: what {who} returned", found, Mapping, 'numbers by their names, such as {"score": 0.5}')
    entries: dict[str, float] = {}
    for name, value in cast("Mapping[Any, Any]", found).items():
        if not isinstance(name, str) or name.startswith("bin_"):
            raise ValueError(
                f"observers: {who} returned an entry named {name!r}: return a text that does not begin with bin_."
            )
        plain = isinstance(value, bool | np.bool_ | int | np.integer)
        entries[name] = int(value) if plain else number(f"observers: the entry {name} of {who}", value)
    return entries


class Observer(Protocol):
    """A regular measurement of the model, such as an evaluation."""

    @property
    def every(self) -> int:
        """Steps between measurements; there is always one after the last step."""
        ...

    def __call__(self, step: int, denoiser: Denoiser) -> dict[str, float]:
        """Measure the averaged model after `step` steps; return entries for metrics.jsonl.

        They are numbers. Their names are neither the loop's own nor another observer's, and do not begin with "bin_".
        """
        ...


def fit(
    folder: RunFolder,
    config: RunConfig,
    data: ImageSet,
    *,
    device: torch.device,
    report: Callable[[Report], object] | None = None,
    every: int = 10,
    stop: Callable[[], bool] = lambda: False,
    observers: Sequence[Observer] = (),
    tracker: Tracker = "none",
    accelerator: Accelerator | None = None,
    pace: Pace | None = None,
    held_out: ImageSet | None = None,
    page: bool = True,
    vae: str | Path = "",
    on_begin: Callable[[Trained], object] | None = None,
) -> int:
    """Train the run in `folder` to its last step, from its newest checkpoint if it has one.

    Args:
        folder: the run's folder.
        config: the content of config.json.
        data: the images.
        device: where to compute.
        report: called after every `every` steps, on the first process.
        every: steps between reports.
        stop: called after every step but the last; if true on any process, the run saves a checkpoint and stops.
        observers: provide further metrics.
        tracker: the tracker that mirrors metrics.jsonl.
        accelerator: the processes; made if not given.
        pace: of a run that is to end in time; it may change the number of steps.
        held_out: other data that the run holds out, if it does; only the first process needs them.
        page: whether to write RUN/report.html on the way.
        vae: the place of the autoencoder of a run on latents of images, if it has moved.
        on_begin: called before the first step with the state that the steps change.

    Returns:
        The steps done.

    Raises:
        TrainingError: if a loss or a weight is not finite, the disk is full, or the folder has been taken over while this
            process was stopped; says whether there are earlier checkpoints. Errors of `report`, `stop` and observers are
            raised as they are.
        ValueError: if another process trains in the folder, a run to continue has no intact checkpoint, or has lost them,
            or the data are not those of the run.
    """
    check_watchers(observers, report, every, stop)
    recipe, data = config.recipe, training_data(config, data)
    accelerator = accelerator or make_accelerator(device, tracker, folder)
    device = accelerator.device
    ranks = Ranks.launched(device)
    check_vae(vae, config)
    record, autoencoder = config.autoencoder, None
    if record is not None:
        with ranks.rank_0_first("to open the autoencoder"):
            autoencoder = record.open(vae, device) if ranks.first else None
    try:
        with ExitStack() as held:
            if ranks.first:
                with writing():
                    held.enter_context(folder.locked())
            placement = placed(recipe, data, device, ranks.world_size)
            labelled, rows = config.classes > 0, config.training_rows(len(data))
            with closing(Feed(data, recipe, device, labelled=labelled, placement=placement, rows=rows)) as feed:
                look = None
                if config.held_out is not None and ranks.first:
                    others = None if config.held_out.share is not None else held_out_data(config, held_out)
                    look = HeldOutLoss(config.held_out, recipe, data, others, labelled=labelled, device=device)
                loop = _Loop(folder, config, feed, accelerator, observers, look, autoencoder)
                if on_begin is not None:
                    on_begin(loop.trained)
                with tracking(accelerator, tracker, {"run": folder.path.name, "data": config.data}):
                    return loop.run(report, every, stop, pace, page=page)
    except (TrainingError, RankError) as error:
        raise TrainingError(f"{error} {_remaining(folder)}") from error


def check_watchers(
    observers: Sequence[Observer],
    report: Callable[[Report], object] | None,
    every: int,
    stop: Callable[[], bool],
    on_start: Callable[..., object] | None = None,
) -> None:
    """Check what watches a training, before it begins.

    Raises:
        TypeError: if one cannot be called, or `every` is not a number.
        ValueError: if `every`, or that of an observer, is not a whole number of at least 1.
    """
    whole_number("every", every, 1)
    check_callable("stop", stop, "stop()")
    if report is not None:
        check_callable("progress", report, "progress(report)")
    if on_start is not None:
        check_callable("on_start", on_start, "on_start(run, images)")
    check_kind("observers", observers, Sequence, "a list of observers")
    for k, observer in enumerate(observers):
        check_callable(f"observers[{k}]", observer, "observer(step, denoiser)")
        whole_number(f"observers[{k}].every", getattr(observer, "every", None), 1)


class _Loop:
    """A run in progress on one process."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        feed: Feed,
        accelerator: Accelerator,
        observers: Sequence[Observer],
        look: HeldOutLoss | None = None,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        self._autoencoder = autoencoder
        self._folder, self._config, self._recipe = folder, config, config.recipe
        self._accelerator, self._look = accelerator, look
        self._observers = [look, *observers] if look is not None else observers
        self._ranks = Ranks.launched(accelerator.device)
        self._main = self._ranks.first
        # Observers may be of the first process alone, but all processes of a sharded run give it their parts of the average.
        self._periods = self._ranks.broadcast([observer.every for observer in self._observers], "to plan measurements")
        self._whole: Denoiser | None = None
        newest = folder.to_continue(config)
        if newest is not None:
            require_fit(config, newest[0])
        self._stepper = Stepper(config, feed, accelerator)
        self._edges = bin_edges(config.recipe.noise_levels, config.recipe.process)
        self._state = State(0, 0)
        if newest is not None:
            self._state = restore(newest[0], self._stepper.trained)
        self._ranks.barrier("to begin")
        if self._main:
            with writing():
                # Newer checkpoints are damaged, or they would have been used: they must not count among those to keep.
                folder.remove_after(self._state.step)
                # The steps that made them are taken back, and will be taken again.
                remove_snapshots(folder.snapshots, self._state.step)
                sweep(folder.path)
                folder.rewind_log(self._state.step)
        self._reported, self._logged = self._meter(), self._meter()
        # Step and value of the lowest held-out loss.
        self._best = folder.best() if self._main and look is not None else None
        self._page = ReportWriter(folder)

    @property
    def trained(self) -> Trained:
        """The state that every step changes."""
        return self._stepper.trained

    def run(
        self,
        report: Callable[[Report], object] | None,
        every: int,
        stop: Callable[[], bool],
        pace: Pace | None,
        *,
        page: bool,
    ) -> int:
        done = self._state.step
        if pace is not None:
            pace.begin(done, self._recipe.steps)
        while done < self._recipe.steps:
            parts = self._stepper.take(done)
            if self._main and done == self._state.step:
                with writing():  # from here on the folder holds a run that has begun
                    log_environment(self._folder, done, self._accelerator.device, self._ranks.world_size)
            done += 1
            if pace is not None and pace.due(done):
                self._keep_pace(pace, done)
            recipe = self._recipe
            # There may be no time for pictures when a run is stopped; it only needs a checkpoint.
            stopped = done < recipe.steps and self._stops(stop)
            last = done == recipe.steps or stopped
            for meter in (self._reported, self._logged):
                meter.step(parts, recipe.batch)
            extra = self._observe(done, last and not stopped)
            if done % recipe.log_every == 0 or last:
                self._log(done, extra)
            elif extra and self._main:
                self._write({"step": done, **extra})
            if done % every == 0 or last:
                found = self._report(self._reported, done)
                self._reported = self._meter()
                if report is not None and self._main:
                    with single_process():
                        report(found)
            improved = self._improved(done, extra, last and not stopped)
            with writing():
                looked = self._keep(done, last, stopped, improved)
            if self._main and last and not stopped:
                with writing():
                    self._animate(done)
            if page and self._main and (looked or extra or last):
                self._page.write(self._config, training=not last)
                self._pause()
            if last:
                break
        return done

    def _keep_pace(self, pace: Pace, done: int) -> None:
        """Take as many steps as the first process can in its time."""
        steps = self._ranks.broadcast(pace.steps(done), "to keep the time")
        pace.begin(done, steps)
        if steps != self._recipe.steps:
            self._config = self._config.extended(done, steps)
            self._recipe = self._config.recipe
            self._stepper.change_steps(steps)
            if self._main:
                self._require_folder()
                self._folder.extend(self._config)

    def _stops(self, stop: Callable[[], bool]) -> bool:
        # All or none: a process that stopped alone would leave the others waiting.
        return self._ranks.total(float(stop()), purpose="to say whether one of them is to stop")[0] > 0

    def _meter(self) -> Meter:
        return Meter(self._edges, self._accelerator.device, self._stepper.target_watch)

    def _report(self, meter: Meter, done: int) -> Report:
        sums = meter.sums.clone()
        self._ranks.all_reduce(sums, "to report their losses")
        return dataclasses.replace(meter.report(done, sums), steps=self._recipe.steps)

    def _log(self, done: int, extra: dict[str, float]) -> None:
        entry = self._report(self._logged, done)
        self._logged = self._meter()
        if not math.isfinite(entry.loss):
            raise not_finite(f"the loss is {entry.loss} at step {done}")
        if not self._main:
            return
        self._write(
            {
                "step": done,
                "images": done * self._recipe.batch,
                "loss": entry.loss,
                "variance_removed": entry.variance_removed,
                **self._minus_floor(entry),
                "images_per_second": entry.images_per_second,
                "target_share": entry.target_share,
                "learning_rate": self._recipe.learning_rate_at(done - 1),
                "bin_edges": list(self._edges),
                "bin_loss": [_or_none(value) for value in entry.bin_loss],
                "bin_variance_removed": [_or_none(value) for value in entry.bin_removed],
                **extra,
            }
        )

    def _minus_floor(self, entry: Report) -> dict[str, float]:
        """The single-sample loss of the batches minus its floor."""
        if self._look is None or self._look.floor is None:
            return {}
        return {"loss_minus_floor": entry.loss + entry.variance_removed - self._look.floor}

    def _require_folder(self) -> None:
        successor = self._folder.successor
        if successor is not None:
            raise TrainingError(
                f"{self._folder.path} was taken over by {successor} while this process was stopped: it ends here."
            )

    def _write(self, entry: dict[str, Any]) -> None:
        self._require_folder()
        with writing():
            self._folder.log(entry)
            if self._accelerator.trackers:
                flat = {key: value for key, value in entry.items() if isinstance(value, int | float)}
                for name in ("bin_loss", "bin_variance_removed"):
                    flat |= {f"{name}/{k}": v for k, v in enumerate(entry.get(name, ())) if v is not None}
                step = flat.pop("step")
                self._accelerator.log(flat, step=int(step))

    def _observe(self, done: int, last: bool) -> dict[str, float]:
        """Run the observers, on the first process; the others wait at their next step."""
        found: dict[str, float] = {}
        if not any(last or done % every == 0 for every in self._periods):
            return found
        with self._average() as ema:
            for observer in self._observers:
                if ema is not None and (last or done % observer.every == 0):
                    with single_process():
                        new = _entries(type(observer).__name__, observer(done, ema))
                    if taken := [name for name in new if name in found or name in _LOGGED]:
                        raise ValueError(
                            f"observers: {type(observer).__name__} returned {', '.join(taken)}, which metrics.jsonl has "
                            "from another source: return another name."
                        )
                    found |= new
        if found:
            self._pause()
        return found

    def _improved(self, done: int, extra: Mapping[str, float], last: bool) -> bool:
        """Whether the held-out loss is the lowest so far: the first process knows, and all save."""
        held_out = self._config.held_out
        if held_out is None or not (last or done % held_out.every == 0):
            return False
        loss = extra.get("held_out_loss", math.nan)
        improved = math.isfinite(loss) and (self._best is None or loss < self._best[1])
        if improved:
            self._best = (done, loss)
        return self._ranks.broadcast(improved, "to keep the best checkpoint")

    def _keep(self, done: int, last: bool, stopped: bool, improved: bool) -> bool:
        """Write what is due; returns whether there is a new picture."""
        recipe, folder = self._recipe, self._folder
        final = last and not stopped
        snapshot = recipe.ema_snapshot_every and (final or done % recipe.ema_snapshot_every == 0)
        picture = final or (not stopped and recipe.draws_grid(done))
        checkpoint = last or improved or done % recipe.checkpoint_every == 0
        if not (snapshot or picture or checkpoint):
            return False
        if checkpoint or snapshot:
            odd = self._stepper.odd_weight()
            if odd is not None:
                raise not_finite(f"the weight {odd} is not finite at step {done}")
        trained = self._stepper.trained
        if self._main:
            self._require_folder()
        if self._main or trained.sharded:
            writers = self._ranks if trained.sharded else Ranks()
            if snapshot:
                powers = [(n, m) for n, m in trained.averages.items() if n.startswith("power-")]
                lengths = [(float(n.removeprefix("power-")), m) for n, m in powers]
                take_snapshot(folder.snapshots, done, lengths, writers)
            if picture:
                self._picture(done)
            if checkpoint:
                save(folder.checkpoint(done), State(done, done * recipe.batch), trained, writers)
        if self._main and checkpoint:
            folder.prune(recipe.keep_last, recipe.keep_every, None if self._best is None else self._best[0])
        self._ranks.barrier("to write the run")
        self._pause()
        return bool(picture)

    def _animate(self, done: int) -> None:
        """Write the sample grids as one animation."""
        folder = self._folder.path / "samples"
        try:
            write_animation(folder, folder / "training.gif", done)
        except ValueError as error:  # the run is complete without it
            warnings.warn(f"there is no animation of the samples: {error}", stacklevel=2)

    def _pause(self) -> None:
        for meter in (self._reported, self._logged):
            meter.pause()

    @contextmanager
    def _average(self) -> Generator[Denoiser | None]:
        """The averaged model, on the first process; the parts of a sharded run are gathered there."""
        trained = self._stepper.trained
        ema = trained.averages["ema"]
        assert isinstance(ema, Denoiser)
        if not trained.sharded:
            yield ema if self._main else None
            return
        if self._main and self._whole is None:
            self._whole = follower(build_denoiser(self._config))
        to_first(ema, self._whole, self._ranks)
        yield None if self._whole is None else self._whole.to(self._accelerator.device)
        if self._whole is not None:
            self._whole.cpu()  # a GPU has room for the whole model only between steps

    def _picture(self, step: int) -> None:
        with self._average() as ema:
            if ema is not None:
                self._draw(ema, step)

    def _draw(self, ema: Denoiser, step: int) -> None:
        config = self._config
        labels = in_turn(config.learned_classes, SAMPLE_SEEDS) if config.classes else None
        drawn = Samples(
            images=draw_samples(
                ema, config, SAMPLE_SEEDS, self._accelerator.device, autoencoder=self._autoencoder
            ).numpy(),
            seeds=tuple(SAMPLE_SEEDS),
            labels=None if labels is None else labels.numpy(),
            class_names=config.class_names,
        )
        if config.picture_shape is None:
            drawn.save(self._folder.picture(step, ".npz"))
            return
        grid = drawn.grid()
        write_png(self._folder.picture(step), grid)
        log_picture(self._accelerator, step, grid)


def _remaining(folder: RunFolder) -> str:
    """What remains of a run that cannot continue."""
    if not folder.environments.exists():
        return "No step is done: start the run again."
    if folder.has_checkpoint:
        return "Earlier checkpoints are intact."
    return "There is no checkpoint yet: a resume begins with the first step."


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
