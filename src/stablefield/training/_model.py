"""The model of a run: from its configuration and a checkpoint to a denoiser."""

import warnings
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stablefield._shapes import check_kind
from stablefield.diffusion._importance_sampling import ImportanceSampling
from stablefield.diffusion._preconditioning import Denoiser
from stablefield.training._checkpoint import CheckpointError, Trained, load_weights
from stablefield.training._ema import LENGTHS, follower
from stablefield.training._files import tensor_shapes
from stablefield.training._fully_sharded import shard
from stablefield.training._post_hoc import combine, snapshot_steps
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder, checkpoint_name
from stablefield.training._seeding import Purpose, generator_for

__all__ = ["OpenModel", "average_name", "build_denoiser", "open_model", "require_fit", "untrained", "warn_of_average"]

# Relative error of an average's profile above which it is no longer the average that was asked for.
_OFF = 0.05


@dataclass(frozen=True)
class OpenModel:
    """A trained model, ready to be asked.

    Attributes:
        denoiser: D(x, sigma, class_labels=None) in noise-to-signal units, in evaluation mode.
        config: of its run.
        step: steps it was trained for.
        ema: which average of the weights it is: "half-life", "none", or the length "0.1".
        complaints: what was wrong with newer checkpoints, which were passed over.
        ema_error: the relative L2 error of the profile of an average that was made of snapshots.
    """

    denoiser: Denoiser
    config: RunConfig
    step: int
    ema: str
    complaints: tuple[str, ...] = ()
    ema_error: float = 0.0

    @property
    def average(self) -> str:
        """`ema` with the error of its profile, for a protocol."""
        error = f"{self.ema_error:.1%}"
        return self.ema if error == "0.0%" else f"{self.ema} (profile {error} off)"

    def warn(self, argument: str = "ema", depth: int = 3) -> None:
        """Warn of newer checkpoints that were passed over, and of an average far from the one that `argument` asked for.

        Args:
            argument: that chose the average.
            depth: calls from here to the one that the warning points to.
        """
        for complaint in self.complaints:
            warnings.warn(f"skipped a newer checkpoint: {complaint}", stacklevel=depth)
        warn_of_average(f"{argument}={self.ema}", self.ema_error, depth + 1)


def warn_of_average(asked: str, error: float, depth: int = 3) -> None:
    """Warn of an average of snapshots whose profile is far from the one that was `asked` for.

    Args:
        asked: the argument with its value.
        error: relative error of the profile.
        depth: calls from here to the one that the warning points to.
    """
    if error > _OFF:
        warnings.warn(
            f"{asked}: the average of the run's snapshots differs by {error:.1%} from one of that length, in the L2 norm of "
            "its profile: train with a smaller ema_snapshot_every, or pass a length nearer to "
            f"{' or '.join(map(str, LENGTHS))}, which are kept.",
            stacklevel=depth,
        )


def average_name(name: str, value: Any) -> str:
    """The argument `name` that chooses an average of the weights, "half-life", "none" or a length, as a string.

    Raises:
        TypeError: if it is neither a string nor a number.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{float(value):g}"
    check_kind(name, value, str, "half-life, none, or a length such as 0.1")
    return str(value)


def build_denoiser(config: RunConfig) -> Denoiser:
    """The denoiser of a run with its initial weights, a function of the seed."""
    recipe = config.recipe
    generator = generator_for(recipe.seed, Purpose.WEIGHTS)
    network = recipe.network.build(config.shape, config.classes, recipe.augment_dim, generator)
    return Denoiser(network, recipe.preconditioning)


def untrained(
    config: RunConfig, device: torch.device, initial: Denoiser | None = None, *, sharded: bool = False
) -> Trained:
    """All that training changes, before the first step.

    Args:
        config: of the run.
        device: where to keep it.
        initial: the denoiser to begin with; by default that of `build_denoiser`.
        sharded: keep only this process's part of it; all processes call this.
    """
    recipe = config.recipe
    model = build_denoiser(config) if initial is None else initial
    if not sharded:
        model.to(device)
    averages: dict[str, nn.Module] = {}
    for name in ("ema", *(f"power-{length}" for length in LENGTHS if recipe.ema_snapshot_every)):
        averages[name] = follower(model)
        if sharded:
            shard(averages[name], device)
    if sharded:
        shard(model, device)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, fused=fused)
    importance = None
    if recipe.importance_sampling:
        importance = ImportanceSampling(recipe.noise_levels, recipe.process).to(device)
    return Trained(model, averages, optimizer, importance)


def open_model(
    path: Path, ema: str | float = "half-life", device: torch.device | str = "cpu", checkpoint: str | int = "newest"
) -> OpenModel:
    """Open a model of a run, by default the newest.

    Args:
        path: the run's folder.
        ema: "half-life" for the average by EDM's rule, "none" for the weights of the last step, or a length such as "0.1"
            for a power-function average made of the run's snapshots.
        device: where it is wanted.
        checkpoint: "newest", "best" for that with the lowest held-out loss, or a step.

    Raises:
        ValueError: if there is no run or no whole checkpoint, or the average is unknown, with what there is.
    """
    ema, checkpoint = average_name("ema", ema), checkpoint_name(checkpoint)
    folder = RunFolder.open(path)
    config = folder.config()

    def read(checkpoint: Path) -> Denoiser:
        require_fit(config, checkpoint)
        denoiser = build_denoiser(config)
        # With an average of snapshots: the buffers, which initial weights may have brought, and snapshots do not hold.
        load_weights(checkpoint, denoiser, "ema" if ema == "half-life" else "model")
        return denoiser

    if checkpoint != "newest" and ema not in ("half-life", "none"):
        raise ValueError(
            f"checkpoint={checkpoint} and ema={ema}: an average of that length is made of snapshots; leave one of them out."
        )
    found = folder.read_checkpoint(checkpoint, read)
    if found is None:
        raise ValueError(f"{path} has no checkpoint yet: let it train for longer.")
    denoiser, state, complaints = found
    step, error = (state.step, 0.0) if ema in ("half-life", "none") else _load_power_average(folder, ema, denoiser)
    return OpenModel(denoiser.eval().requires_grad_(False).to(device), config, step, ema, tuple(complaints), error)


def require_fit(config: RunConfig, checkpoint: Path) -> None:
    """Compare the weights in a checkpoint with the network of a run, before memory is taken for either.

    Raises:
        CheckpointError: if their names or shapes differ, or the run can have no such network.
        FileNotFoundError: if the checkpoint is gone.
    """
    path = checkpoint / "model.safetensors"
    found = tensor_shapes(path)
    wanted: dict[str, tuple[int, ...]] = {}
    why = ""
    try:
        with torch.device("meta"):
            recipe = config.recipe
            network = recipe.network.build(config.shape, config.classes, recipe.augment_dim, torch.Generator())
            denoiser = Denoiser(network, recipe.preconditioning)
        wanted = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        why = f" ({str(error).splitlines()[0]})"
    if found != wanted:
        odd = next(iter(sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))), "")
        raise CheckpointError(
            f"{path} does not fit the network that the run's config.json names{why}: one of the two is of another run. "
            f"Its {odd} is {found.get(odd, 'missing')}, and the network's {wanted.get(odd, 'missing')}."
        )


def _load_power_average(folder: RunFolder, ema: str, denoiser: Denoiser) -> tuple[int, float]:
    """Load an average made of the snapshots; returns its step and the error of its profile."""
    steps = snapshot_steps(folder.snapshots)
    there = "half-life, none"
    if steps:
        there += f", or a length from 0.01 to 0.25, made of {len(steps)} snapshots up to step {steps[-1]:,}"
    try:
        length = float(ema)
    except ValueError:
        raise ValueError(f"ema={ema} is unknown: this run has {there}.") from None
    if not steps:
        raise ValueError(
            f"ema={ema}: this run has {there}; averages of other lengths need ema_snapshot_every=STEPS in training."
        )
    parameters, error = combine(folder.snapshots, length)
    try:
        denoiser.load_state_dict({**denoiser.state_dict(), **parameters})
    except RuntimeError as error:
        raise ValueError(f"the snapshots in {folder.snapshots} do not fit the run's config.json: {error}") from error
    return steps[-1], error
