"""The scaling of data that are not 8-bit images: mean and standard deviation per channel, measured, applied and undone.

Networks, their preconditioning and the noise levels expect values of standard deviation 0.5. A channel is an entry of axis 1
of the data: of latents (n, C, H, W) and signals (n, C, L) one of C, of vectors (n, d) each of the d numbers. With the
channel's mean m and standard deviation s, a value v becomes (v - m) / (2 s), and a network's value z becomes 2 s z + m.
8-bit images have no scaling: everywhere the byte v means v / 127.5 - 1.

Both are measured once over all samples in float64, relative to the first sample, so that data far from zero lose no digits
and a constant channel has a standard deviation of exactly 0.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

__all__ = ["FLOATS", "Scaling", "check_floats", "chunks"]

FLOATS = tuple(np.dtype(name) for name in ("float16", "float32", "float64"))
"""Dtypes of data that are not images."""
CHUNK_BYTES = 16 * 2**20
"""Bytes to read at a time when all of a set is needed."""
CHANNEL_LIMIT = 2**15
"""Most channels: their means and deviations are part of a run's config.json."""
NUMBER_LIMIT = 2**24
"""Most numbers in a sample: measuring takes some 40 bytes for each."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Mean and standard deviation of each channel of float data.

    Raises:
        ValueError: if there are not as many means as deviations, one is not finite, or a deviation is negative.
    """

    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel; 0 for one that is constant, and stays so in samples."""
    dtype: str
    """Dtype of the data, and of samples: float16, float32 or float64."""

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std)
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, numbers)) or min(self.std, default=-1) < 0:
            raise ValueError(
                "a scaling has as many means as standard deviations, at least one of each, all finite, the deviations at "
                "least 0."
            )
        if self.dtype not in map(str, FLOATS):
            raise ValueError(f"a scaling has dtype {self.dtype!r}: it is one of {', '.join(map(str, FLOATS))}.")

    @classmethod
    def measure(cls, values: NDArray[Any], name: str) -> tuple["Scaling", str]:
        """Measure float data, (n, C, ...) or (n, d), in one pass.

        Returns:
            The scaling, and the sha256 of the values in C order.

        Raises:
            ValueError: if a value is NaN or infinite, or all samples are equal; names the sample.
        """
        digest = hashlib.sha256()
        axes = (0, *range(2, values.ndim))
        first = values[:1].astype(np.float64).reshape(values.shape[1], -1)[:, 0]
        count, mean, squares = 0, np.zeros_like(first), np.zeros_like(first)
        for chunk in chunks(values):
            digest.update(chunk.data)
            if not np.isfinite(chunk).all():
                place = tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(chunk)))
                raise ValueError(
                    f"{name}: sample {count + place[0]:,} is {chunk[place]} at {list(place[1:])}: leave such samples out, "
                    "or repair them."
                )
            with np.errstate(over="ignore", invalid="ignore"):
                gap = chunk.astype(np.float64) - _beside(first, chunk.ndim)
                own = gap.mean(axes)
                moved, share = own - mean, len(chunk) / (count + len(chunk))
                # Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
                squares = squares + np.square(gap - _beside(own, chunk.ndim)).sum(axes)
                squares = squares + moved**2 * (count * share * chunk[0, 0].size)
                mean = mean + moved * share
            count += len(chunk)
        std = np.sqrt(squares / (count * values[0, 0].size))
        if not np.isfinite(std).all():
            raise ValueError(f"{name} holds values of up to {np.abs(values).max():.3g}: pass values below 1e150.")
        if not std.any():
            raise ValueError(f"{name}: all {count:,} samples are equal, so there is nothing to learn: pass others.")
        found = cls(mean=tuple((first + mean).tolist()), std=tuple(std.tolist()), dtype=str(values.dtype))
        return found, digest.hexdigest()

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> "Scaling | None":
        """The scaling in the manifest of a set; None for images.

        Raises:
            ValueError: if the manifest has one that is invalid.
        """
        record = manifest.get("scaling")
        if record is None:
            return None
        try:
            entries = cast("dict[str, Any]", record)
            mean, std = (tuple(float(value) for value in entries[name]) for name in ("mean", "std"))
            return cls(mean=mean, std=std, dtype=str(entries["dtype"]))
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"its scaling is damaged ({error})") from error

    @property
    def record(self) -> dict[str, Any]:
        """The scaling as JSON values, for a manifest."""
        return {"mean": list(self.mean), "std": list(self.std), "dtype": self.dtype}

    @classmethod
    def of_factor(cls, factor: float, shift: float, channels: int, dtype: str) -> "Scaling":
        """The scaling by which a network sees (v - shift) * factor, as the autoencoder of published networks states it."""
        return cls(mean=(shift,) * channels, std=(0.5 / factor,) * channels, dtype=dtype)

    def apply(self, values: NDArray[Any], dtype: DTypeLike | None = None, *, deviations: bool = False) -> NDArray[Any]:
        """What a network sees of data (k, ...).

        Args:
            values: rows of the data.
            dtype: of the result; by default float16 for float16 data, else float32.
            deviations: whether the values are standard deviations of data, which have no mean.

        Returns:
            New memory. In float64, `undo` gives the data back to the last bit, except beside a mean 10^8 times as large.
        """
        half = values.dtype == np.float16
        scaled = np.empty(values.shape, dtype or (np.float16 if half else np.float32))
        # float32 resolves half-precision values, and takes half the time.
        wide = np.float32 if half and scaled.dtype != np.float64 else np.float64
        std = np.array(self.std)
        factor = _beside(np.divide(0.5, std, out=np.zeros_like(std), where=std > 0).astype(wide), values.ndim)
        mean = _beside((0.0 if deviations else 1.0) * np.array(self.mean).astype(wide), values.ndim)
        start = 0
        for chunk in chunks(values):
            scaled[start : start + len(chunk)] = (chunk.astype(wide) - mean) * factor
            start += len(chunk)
        return scaled

    def undo(self, x: Tensor) -> Tensor:
        """Data, in their own dtype and on the CPU, for values (k, ...) of a network or solver."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        most = torch.finfo(dtype).max
        shape = (-1, *(1,) * (x.ndim - 2))
        mean, std = (torch.tensor(value, dtype=torch.float64).reshape(shape) for value in (self.mean, self.std))
        return (x.cpu().double() * (2 * std) + mean).clamp(-most, most).to(dtype)


def check_floats(what: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Check the dtype and shape of data that are not images, before they are read.

    Args:
        what: the file or the argument, for the error.
        dtype: of the array, of the kind "f".
        shape: of the array, with the samples first.

    Raises:
        ValueError: if they are not those of samples; says what fits.
    """
    if dtype not in FLOATS:
        raise ValueError(f"{what} has dtype {dtype}: save x.astype('float32'), or float16 or float64.")
    if not 2 <= len(shape) <= 4:
        remedy = "save x[:, None] for numbers" if len(shape) == 1 else "flatten the axes after the second"
        raise ValueError(
            f"{what} has shape {shape}: float data are vectors (n, d), signals (n, C, L) or latents (n, C, H, W); {remedy}."
        )
    if shape[0] < 2:
        raise ValueError(f"{what} has shape {shape}, which is {shape[0]} samples: pass at least 2, one per row.")
    if min(shape) < 1 or shape[1] > CHANNEL_LIMIT or math.prod(shape[1:]) > NUMBER_LIMIT:
        raise ValueError(
            f"{what} has shape {shape}: a sample has at least one number and up to {NUMBER_LIMIT:,}, and up to "
            f"{CHANNEL_LIMIT:,} channels (axis 1); reshape long vectors to (n, C, L)."
        )
    if len(shape) == 4 and shape[3] in (1, 3) and shape[1] == shape[2] > 3:
        raise ValueError(
            f"{what} has shape {shape} with the channels last: move them to axis 1, x.transpose(0, 3, 1, 2); images are "
            "best as uint8, from values in [0, 1] by (x * 255).round().astype('uint8')."
        )


def chunks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Go through `values` (n, ...) in contiguous pieces of about 16 MiB."""
    rows = max(1, CHUNK_BYTES // max(1, values[0].nbytes)) if len(values) else 1
    for start in range(0, len(values), rows):
        yield np.ascontiguousarray(values[start : start + rows])


def _beside(channels: NDArray[Any], ndim: int) -> NDArray[Any]:
    """Values per channel, shaped to go with rows of `ndim` axes."""
    return channels.reshape(-1, *(1,) * (ndim - 2))
