r"""Post-hoc averages: weights averaged over any length, from snapshots that were taken while the run went on.

A snapshot taken at step $t_i$ of the power-function average of exponent $\gamma_i$ weighs the run's past by the profile
$p_i(\tau) = (\gamma_i + 1)\, \tau^{\gamma_i} / t_i^{\gamma_i + 1}$ on $[0, t_i]$. The wanted profile p is approximated by
the combination of the $p_i$ that is nearest in $L^2$ among those whose coefficients sum to 1, so that what does not change
during the run is not changed by averaging: with

$$ \langle p_i, p_j \rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)\; m}{t_i t_j\, (\gamma_i + \gamma_j + 1)}
   \left(\frac{m}{t_i}\right)^{\gamma_i} \left(\frac{m}{t_j}\right)^{\gamma_j}, \qquad m = \min(t_i, t_j), $$

the coefficients solve $\sum_j \langle p_i, p_j \rangle c_j + \lambda = \langle p_i, p \rangle$, $\sum_j c_j = 1$, and the
weights are $\sum_j c_j \theta_j$.

References:
    Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    CVPR 2024, section 3.2 and appendix C.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stablefield.shapes import check_kind
from stablefield.training.ema import power_exponent
from stablefield.training.files import write_tensors, write_whole

__all__ = ["Profile", "combine", "mixture", "snapshot_steps", "take_snapshot"]


class Profile(NamedTuple):
    """Which steps an average weighs how much.

    Attributes:
        step: at which the average was taken.
        length: relative length of the average.
    """

    step: int
    length: float


def mixture(snapshots: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Coefficients of the snapshots nearest to the wanted profile, shape (m,), and the relative L2 error of the profile.

    Raises:
        ValueError: if there is no snapshot, or the wanted step lies beyond the last one.
    """
    check_kind("wanted", wanted, Profile, "a Profile(step, length)")
    check_kind("snapshots", snapshots, (list, tuple), "a list of Profile(step, length)")
    for k, snapshot in enumerate(snapshots):
        check_kind(f"snapshots[{k}]", snapshot, Profile, "a Profile(step, length)")
    if not snapshots:
        raise ValueError("there are no snapshots to make an average of: train with --ema-snapshot-every STEPS.")
    if wanted.step > max(profile.step for profile in snapshots):
        raise ValueError(f"the average is wanted at step {wanted.step}, and the last snapshot is of an earlier one.")
    products = _products(snapshots, snapshots)
    right = _products(snapshots, [wanted])[:, 0]
    scale = float(products.max())
    system = np.pad(products / scale, (0, 1), constant_values=1.0)
    system[-1, -1] = 0.0
    coefficients = np.linalg.lstsq(system, np.append(right / scale, 1.0), rcond=1e-12)[0][:-1].astype(np.float64)
    norm = _products([wanted], [wanted])[0, 0]
    residual = norm - 2 * coefficients @ right + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(0.0, residual) / norm))


def take_snapshot(folder: Path, step: int, averages: Sequence[tuple[float, nn.Module]]) -> Path:
    """Write the averages of this step, (length, module) each, as one file step-00001000.safetensors, whole or not at all."""
    tensors = {f"{length}/{name}": value for length, average in averages for name, value in average.named_parameters()}
    # One entry: safetensors writes several in no fixed order, and equal snapshots are to be equal files.
    metadata = {"averages": json.dumps({"step": step, "lengths": [length for length, _ in averages]})}
    path = folder / f"step-{step:08d}.safetensors"
    write_whole(path, lambda temporary: write_tensors(temporary, tensors, metadata))
    return path


def snapshot_steps(folder: Path) -> list[int]:
    """Steps of which there are snapshots, in order."""
    return sorted({profile.step for profile, _ in _profiles(folder)})


def combine(folder: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """The weights averaged over `length`, from the snapshots in `folder`.

    Args:
        folder: of snapshots.
        length: relative length of the average, above 0 and below 0.28.
        step: at which step; that of the last snapshot if not given.

    Returns:
        The parameters by name, and the relative L2 error of the profile.

    Raises:
        ValueError: if there are no snapshots, or the length is out of range.
    """
    from safetensors import safe_open

    power_exponent(length)
    found = _profiles(folder)
    if not found:
        raise ValueError(f"{folder.parent} has no snapshots of averages: train with --ema-snapshot-every STEPS.")
    wanted = Profile(step or max(profile.step for profile, _ in found), length)
    coefficients, error = mixture([profile for profile, _ in found], wanted)
    sums: dict[str, Tensor] = {}
    for (profile, path), coefficient in zip(found, coefficients, strict=True):
        with safe_open(path, framework="pt") as file:
            prefix = f"{profile.length}/"
            for key in file.keys():  # noqa: SIM118
                if key.startswith(prefix):
                    name, value = key.removeprefix(prefix), file.get_tensor(key).double() * float(coefficient)
                    sums[name] = sums[name] + value if name in sums else value
    return {name: value.to(torch.float32) for name, value in sums.items()}, error


def _profiles(folder: Path) -> list[tuple[Profile, Path]]:
    from safetensors import safe_open

    found: list[tuple[Profile, Path]] = []
    for path in sorted(folder.glob("step-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["averages"])
        found += [(Profile(record["step"], length), path) for length in record["lengths"]]
    return found


def _products(rows: Sequence[Profile], columns: Sequence[Profile]) -> NDArray[np.float64]:
    """Inner products of the profiles, shape (len(rows), len(columns))."""

    def parts(profiles: Sequence[Profile]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        steps = np.array([float(p.step) for p in profiles])
        return steps, np.array([power_exponent(p.length) for p in profiles])

    (t, g), (u, h) = parts(rows), parts(columns)
    t, g = t[:, None], g[:, None]
    m = np.minimum(t, u)
    return (g + 1) * (h + 1) * m / (t * u * (g + h + 1)) * (m / t) ** g * (m / u) ** h
