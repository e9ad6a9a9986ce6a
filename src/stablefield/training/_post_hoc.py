r"""Post-hoc averages: weights averaged over any length, from snapshots of the run.

A snapshot taken at step $t_i$ of the power-function average of exponent $\gamma_i$ weights the run's past by the profile
$p_i(\tau) = (\gamma_i + 1)\, \tau^{\gamma_i} / t_i^{\gamma_i + 1}$ on $[0, t_i]$. The nearest combination of the $p_i$ in
$L^2$ approximates the requested profile p; its coefficients sum to 1, so that averaging does not change constant weights:
with

$$ \langle p_i, p_j \rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)\; m}{t_i t_j\, (\gamma_i + \gamma_j + 1)}
   \left(\frac{m}{t_i}\right)^{\gamma_i} \left(\frac{m}{t_j}\right)^{\gamma_j}, \qquad m = \min(t_i, t_j), $$

the coefficients solve $\sum_j \langle p_i, p_j \rangle c_j + \lambda = \langle p_i, p \rangle$, $\sum_j c_j = 1$, and the
weights are $\sum_j c_j \theta_j$.

References:
    Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    CVPR 2024, section 3.2 and appendix C.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stablefield._atomic_file import write_atomically
from stablefield._distributed import Ranks
from stablefield._regular_file import check_safetensors, reason
from stablefield._shapes import check_kind, either
from stablefield.training._ema import power_exponent
from stablefield.training._files import write_tensors
from stablefield.training._fully_sharded import whole
from stablefield.training._records import is_count, parse, seal, unseal

__all__ = ["Profile", "combine", "mixture", "remove_snapshots", "snapshot_steps", "take_snapshot"]

# Steps that an error lists.
_LISTED = 6


class Profile(NamedTuple):
    """The weights of an average over the steps.

    Attributes:
        step: step of the average.
        length: relative length of the average.
    """

    step: int
    length: float


def mixture(snapshots: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Coefficients of the snapshots nearest to the wanted profile, shape (m,), and the relative L2 error of the profile.

    Raises:
        ValueError: if there is no snapshot, or the wanted step is after the last one.
    """
    check_kind("wanted", wanted, Profile, "a Profile(step, length)")
    check_kind("snapshots", snapshots, (list, tuple), "a list of Profile(step, length)")
    for k, snapshot in enumerate(snapshots):
        check_kind(f"snapshots[{k}]", snapshot, Profile, "a Profile(step, length)")
    if not snapshots:
        raise ValueError("there are no snapshots to average: train with ema_snapshot_every=STEPS.")
    if wanted.step > max(profile.step for profile in snapshots):
        raise ValueError(f"wanted is at step {wanted.step}, after the last snapshot: pass an earlier step.")
    products = _products(snapshots, snapshots)
    right = _products(snapshots, [wanted])[:, 0]
    scale = float(products.max())
    system = np.pad(products / scale, (0, 1), constant_values=1.0)
    system[-1, -1] = 0.0
    coefficients = np.linalg.lstsq(system, np.append(right / scale, 1.0), rcond=1e-12)[0][:-1].astype(np.float64)
    norm = _products([wanted], [wanted])[0, 0]
    residual = norm - 2 * coefficients @ right + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(0.0, residual) / norm))


def take_snapshot(
    folder: Path, step: int, averages: Sequence[tuple[float, nn.Module]], ranks: Ranks | None = None
) -> Path:
    """Write the averages of this step, (length, module) each, as one file step-00001000.safetensors, atomically.

    If processes hold parts of the averages, all `ranks` call this, and the first one writes.
    """
    ranks = ranks or Ranks()
    path = folder / f"step-{step:08d}.safetensors"
    tensors: dict[str, Tensor] = {}
    with ranks.waiting("to gather weights"):
        for length, average in averages:
            for name, value in average.named_parameters():
                found = whole(value.detach())
                if ranks.first:
                    tensors[f"{length}/{name}"] = found.contiguous().cpu()
    if not ranks.first:
        return path
    sums = [_sum(key, tensors[key]) for key in sorted(tensors)]
    record = {"step": step, "lengths": [length for length, _ in averages], "sha256": _sum_of(sums)}
    # One entry, since safetensors writes several in no fixed order, and equal snapshots must be equal files.
    metadata = {"averages": json.dumps(seal(record))}
    write_atomically(path, lambda temporary: write_tensors(temporary, tensors, metadata))
    return path


def remove_snapshots(folder: Path, after: int) -> None:
    """Delete the snapshots of later steps than `after`."""
    for step, path in snapshot_files(folder).items():
        if step > after:
            path.unlink()


def snapshot_files(folder: Path) -> dict[int, Path]:
    """The files of snapshots by their steps, intact or not."""
    found = ((re.fullmatch(r"step-(\d+)\.safetensors", path.name), path) for path in folder.glob("step-*.safetensors"))
    return {int(named[1]): path for named, path in found if named is not None}


def snapshot_steps(folder: Path) -> list[int]:
    """Steps with snapshots, in order.

    Raises:
        ValueError: naming a snapshot that is damaged.
    """
    return sorted({snapshot.step for snapshot in _snapshots(folder)})


def combine(folder: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """The weights averaged over `length`, from the snapshots in `folder`.

    Args:
        folder: folder of the snapshots.
        length: relative length of the average, above 0 and below 0.2887.
        step: step of the average, one with a snapshot; the last one's if None.

    Returns:
        The parameters by name, and the relative L2 error of the profile.

    Raises:
        ValueError: if there are no snapshots, or none of this step, one is damaged, or the length is out of range.
    """
    power_exponent(length)
    found = _snapshots(folder)
    if not found:
        raise ValueError(f"{folder.parent} has no snapshots of averages: train with ema_snapshot_every=STEPS.")
    profiles = [Profile(snapshot.step, each) for snapshot in found for each in snapshot.lengths]
    steps = sorted({snapshot.step for snapshot in found})
    if step is not None and step not in steps:
        # Between snapshots the profile is far off: by 50 % with ten of them in the run, by 20 % with 50.
        raise ValueError(f"step={step} has no snapshot: pass {_some(steps, step)}, or leave it out for the last one.")
    wanted = Profile(steps[-1] if step is None else step, length)
    coefficients, error = mixture(profiles, wanted)
    shares = dict(zip(profiles, coefficients.tolist(), strict=True))
    sums: dict[str, Tensor] = {}
    for snapshot in found:
        for each, name, value in snapshot.tensors():
            part = value.double() * shares[Profile(snapshot.step, each)]
            if name in sums and sums[name].shape != part.shape:
                raise _unusable(snapshot.path, f"{name} has a different shape from that in earlier snapshots")
            sums[name] = sums[name] + part if name in sums else part
    return {name: value.to(torch.float32) for name, value in sums.items()}, error


def _some(steps: Sequence[int], near: int) -> str:
    """Steps in words; of many, the nearest."""
    nearest = sorted(sorted(steps, key=lambda step: abs(step - near))[:_LISTED])
    more = "" if len(nearest) == len(steps) else f", the nearest of the {len(steps)} from {steps[0]} to {steps[-1]}"
    return either([str(step) for step in nearest]) + more


@dataclass(frozen=True)
class _Snapshot:
    """A file of averages.

    Attributes:
        path: the file.
        step: step of the averages.
        lengths: lengths of the averages.
        sha256: checksum of the tensors; None in older files.
    """

    path: Path
    step: int
    lengths: tuple[float, ...]
    sha256: str | None

    def tensors(self) -> Iterator[tuple[float, str, Tensor]]:
        """The length, the name and the value of each tensor; raises an error after the last if one is damaged."""
        from safetensors import safe_open

        known = {str(length): length for length in self.lengths}
        sums: list[bytes] = []
        with safe_open(self.path, framework="pt") as file:
            for key in sorted(file.keys()):
                value = file.get_tensor(key)
                sums.append(_sum(key, value))
                length, _, name = key.partition("/")
                if length not in known:
                    raise _unusable(self.path, f"it holds {key[:200]}, which belongs to none of its averages")
                yield known[length], name, value
        if self.sha256 not in (None, _sum_of(sums)):
            raise _unusable(self.path, "it is damaged: the checksum of its weights differs")


def _snapshots(folder: Path) -> list[_Snapshot]:
    """The snapshots in a folder, in the order of their steps."""
    from safetensors import SafetensorError, safe_open

    found: list[_Snapshot] = []
    for path in sorted(folder.glob("step-*.safetensors")):
        try:
            check_safetensors(path)
            with safe_open(path, framework="pt") as file:
                record = unseal(parse((file.metadata() or {}).get("averages", "")), frozenset({"step", "lengths"}))
            found.append(_snapshot(path, record))
        except (OSError, ValueError, SafetensorError) as error:
            raise _unusable(path, reason(error)) from error
    return found


def _snapshot(path: Path, record: Mapping[str, Any]) -> _Snapshot:
    step, lengths, sha256 = record.get("step"), record.get("lengths"), record.get("sha256")
    if not is_count(step) or path.name != f"step-{step:08d}.safetensors":
        raise ValueError(f"its step is {step}")
    if not isinstance(lengths, list) or not isinstance(sha256, str | None):
        raise ValueError("its entries are not those of a snapshot")
    known = [value if isinstance(value, float) else math.nan for value in cast("list[Any]", lengths)]
    for length in known:
        power_exponent(length)
    if len(set(known)) < len(known):
        raise ValueError("it names a length twice")
    return _Snapshot(path, step, tuple(known), sha256)


def _unusable(path: Path, why: str) -> ValueError:
    return ValueError(f"the snapshot {path} cannot be used: {why}. Move it out of the folder to average the others.")


def _sum(name: str, value: Tensor) -> bytes:
    """The checksum of a tensor on the CPU."""
    digest = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
    digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _sum_of(sums: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(sums)).hexdigest()


def _products(rows: Sequence[Profile], columns: Sequence[Profile]) -> NDArray[np.float64]:
    """Inner products of the profiles, shape (len(rows), len(columns))."""

    def parts(profiles: Sequence[Profile]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        steps = np.array([float(p.step) for p in profiles])
        return steps, np.array([power_exponent(p.length) for p in profiles])

    (t, g), (u, h) = parts(rows), parts(columns)
    t, g = t[:, None], g[:, None]
    m = np.minimum(t, u)
    return (g + 1) * (h + 1) * m / (t * u * (g + h + 1)) * (m / t) ** g * (m / u) ** h
