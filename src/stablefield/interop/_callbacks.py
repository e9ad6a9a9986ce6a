"""`ExcessLoss` in other people's training loops: logged every so many steps through their loggers."""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from stablefield._shapes import check_callable, check_kind, whole_number
from stablefield.probing._excess import Excess
from stablefield.probing._excess_loss import ExcessLoss

__all__ = ["accelerate_callback", "lightning_callback"]


def accelerate_callback(
    excess: ExcessLoss, accelerator: Any, *, every: int = 1000, prefix: str = "excess_loss/"
) -> Callable[[Callable[..., Any], int], Excess | None]:
    """A function to call after each step of a loop around Accelerate, which logs the excess every `every` steps.

        log_excess = sf.interop.accelerate_callback(sf.ExcessLoss(images), accelerator, every=1000)
        ...
        log_excess(model, global_step)

    With gradient accumulation you may also call it after each batch: it logs a step once. It unwraps the model and measures
    on the main process; the others go on and wait at their next collective operation, so a measurement must be shorter than
    the process group's timeout. A model that is sharded over processes cannot be measured this way. A function around a
    network is measured as it is: with several processes let it call `accelerator.unwrap_model(model)`.

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

    last: int | None = None

    def log(model: Callable[..., Any], step: int) -> Excess | None:
        nonlocal last
        # Several batches may belong to one step.
        if whole_number("step", step, 0) % every or step == last or not accelerator.is_main_process:
            return None
        last = step
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

    With several processes the first one measures and logs.

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

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
            step = int(trainer.global_step)
            # Several batches may belong to one step.
            if step == self._last or step % every or not trainer.is_global_zero:
                return
            self._last = step
            metrics = excess(pl_module if network is None else network(pl_module)).metrics(prefix)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    return ExcessCallback()


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
