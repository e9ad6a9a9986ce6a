"""`ExcessLoss` in other people's training loops: logged every so many steps through their loggers."""

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import nn

from stablefield._shapes import check_callable, check_kind, whole_number
from stablefield._warning import warn
from stablefield.probing._excess import Excess
from stablefield.probing._excess_loss import ExcessLoss
from stablefield.training._fully_sharded import is_sharded

__all__ = ["accelerate_callback", "lightning_callback"]


def accelerate_callback(
    excess: ExcessLoss, accelerator: Any, *, every: int = 1000, prefix: str = "excess_loss/"
) -> Callable[[Callable[..., Any], int], Excess | None]:
    """A function to call after each step of a loop around Accelerate, which logs the excess every `every` steps.

        log_excess = sf.interop.accelerate_callback(sf.ExcessLoss(images), accelerator, every=1000)
        ...
        log_excess(model, global_step)

    With gradient accumulation you may also call it after each batch: it logs each model once a step. It unwraps the model,
    and measures on the main process; the others go on and wait at their next collective operation, so a measurement must be
    shorter than the process group's timeout. All processes measure a model together whose weights are sharded over them by
    `fully_shard`. A function around a network is measured as it is: with several processes let it call
    `accelerator.unwrap_model(model)`.

    Args:
        excess: what to log.
        accelerator: an `accelerate.Accelerator` with a tracker (`log_with`, `init_trackers`).
        every: steps between measurements.
        prefix: of the names of the metrics.

    Returns:
        log(model, step): the `Excess` when it measured, else None.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if `every` is below 1.
    """
    check_kind("excess", excess, ExcessLoss, "an ExcessLoss, ExcessLoss(images)")
    whole_number("every", every, 1)
    check_kind("prefix", prefix, str, "a string")
    for name in ("log", "unwrap_model"):
        check_callable(f"accelerator.{name}", getattr(accelerator, name, None), f"accelerate.Accelerator().{name}")

    last = -1
    # The models, or for functions `log`, that were measured at this step: several batches may belong to it.
    measured: WeakSet[Callable[..., Any]] = WeakSet()
    warned = False

    def log(model: Callable[..., Any], step: int) -> Excess | None:
        nonlocal last, warned
        if whole_number("step", step, 0) != last:
            last = step
            measured.clear()
        which = model if isinstance(model, nn.Module) else log
        if step % every or which in measured or not (accelerator.is_main_process or _is_sharded(model)):
            return None
        measured.add(which)
        if not warned and not getattr(accelerator, "trackers", True):
            warned = True
            warn(
                "the accelerator has no tracker, so it drops the excess: pass log_with= to Accelerator and call "
                "accelerator.init_trackers(NAME) before the loop, or use what log(model, step) returns."
            )
        # Accelerate unwraps modules only.
        found = excess(accelerator.unwrap_model(model) if isinstance(model, nn.Module) else model)
        accelerator.log(found.metrics(prefix), step=step)
        return found

    return log


def lightning_callback(
    excess: ExcessLoss,
    *,
    every: int = 1000,
    network: Callable[[Any], Callable[..., Any]] | None = None,
    prefix: str = "excess_loss/",
) -> Any:
    """A `lightning.pytorch.Callback` that logs the excess every `every` steps of the optimiser.

        excess = sf.ExcessLoss(images, prediction="v", process=sf.Cosine())
        trainer = lightning.Trainer(callbacks=[sf.interop.lightning_callback(excess, network=lambda module: module.net)])

    The metrics go to the loggers and to `trainer.callback_metrics`, so `ModelCheckpoint(monitor="excess_loss/distance")` and
    `EarlyStopping` can use them. With several processes the first one measures, and the others wait for it; all measure a
    network together whose weights are sharded over them by `fully_shard`.

    Args:
        excess: what to log.
        every: steps of the optimiser between measurements.
        network: takes what to measure out of the LightningModule; None for the module itself.
        prefix: of the names of the metrics.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if `every` is below 1.
        ImportError: if neither lightning nor pytorch_lightning is installed.
    """
    check_kind("excess", excess, ExcessLoss, "an ExcessLoss, ExcessLoss(images)")
    whole_number("every", every, 1)
    check_kind("prefix", prefix, str, "a string")
    if network is not None:
        check_callable("network", network, "network(module), which returns the model to measure")

    class ExcessCallback(_lightning_base()):
        """Measures after a training batch, on the first process."""

        def __init__(self) -> None:
            self._last = 0

        def on_train_start(self, *_: Any) -> None:
            self._last = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
            step = int(trainer.global_step)
            # Several batches may belong to one step.
            if step == self._last or step % every:
                return
            self._last = step
            measured = pl_module if network is None else network(pl_module)
            metrics: dict[str, float] = {}
            if trainer.is_global_zero or _is_sharded(measured):
                metrics = excess(measured).metrics(prefix)
            # Every process needs them, or one would save a checkpoint alone.
            metrics = trainer.strategy.broadcast(metrics)
            pl_module.log_dict(metrics, logger=False, on_step=True, on_epoch=False)
            # With the step, which log_dict would replace by that of `log_every_n_steps`.
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.log_metrics(metrics, step=step)

    return ExcessCallback()


def _is_sharded(model: Callable[..., Any]) -> bool:
    return isinstance(model, nn.Module) and any(is_sharded(weight) for weight in model.parameters())


def _lightning_base() -> type:
    """`Callback` of the package that the program uses: the two names of Lightning have classes of their own."""
    try:
        if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
            from pytorch_lightning.callbacks import Callback
        else:
            try:
                from lightning.pytorch.callbacks import Callback
            except ImportError:
                from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError("lightning is not installed: pip install lightning.") from error
    return Callback
