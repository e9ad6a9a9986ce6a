"""Checks of a pool's arguments: its samples, labels, sizes and weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablefield._shapes import array_of_numbers, check_kind, check_tensor, whole_number
from stablefield.targets._engine.reference_matrix import wide_dtype

__all__ = ["check_data", "check_flipped", "check_label_sizes", "check_labels", "checked_weights", "sample_weights"]


def check_data(data: Any, dtype: torch.dtype | None) -> None:
    """Check that `data` are samples (n, ...), and that `dtype` is given for an array of bits only.

    Raises:
        TypeError: if they are no tensor or array.
        ValueError: if they are empty, or of another dtype.
    """
    check_kind("Pool data", data, (Tensor, np.ndarray), "a tensor or a numpy array of shape (n, ...)")
    if data.ndim < 2 or len(data) == 0:
        raise ValueError(f"Pool data have shape {tuple(data.shape)}: pass at least one sample, shape (n, ...).")
    are_bits = data.dtype == np.uint16
    if isinstance(data, Tensor):
        check_tensor("Pool data", data)
        fits = data.is_floating_point() or data.dtype == torch.uint8
    else:
        fits = data.dtype.name in ("uint8", "float16", "bfloat16", "float32", "float64")
    if not (fits or (are_bits and dtype == torch.bfloat16)):
        hint = ", or dtype=torch.bfloat16 if these are its bits" if are_bits else ""
        raise ValueError(f"Pool data have dtype {data.dtype}: pass floating point data, or uint8 images{hint}.")
    if dtype is not None and not (dtype == torch.bfloat16 and are_bits):
        raise ValueError(
            f"Pool dtype is {dtype}, the data are {data.dtype}: pass dtype=torch.bfloat16 for an array of uint16 that "
            "holds the bits of bfloat16 numbers, and else None."
        )


def check_labels(labels: Tensor, n: int) -> None:
    """Check the kind and shape of the labels of `n` samples, without reading them.

    Raises:
        TypeError: if they are no tensor.
        ValueError: if they are not `n` integers.
    """
    check_tensor("Pool labels", labels, real=True, numbers=True)
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(
            f"Pool labels has shape {tuple(labels.shape)} and dtype {labels.dtype}: "
            f"pass one integer per sample, shape ({n},)."
        )


def check_flipped(flipped: Any, data: Tensor | NDArray[Any], mirrored: bool) -> None:
    """Check that the flipped samples are of the kind, shape, dtype and device of `data`, and that none is `mirrored`.

    Raises:
        TypeError: if they are no tensor or array.
        ValueError: if they differ from the data, or mirror images are asked for, too.
    """
    check_kind("Pool flipped", flipped, (Tensor, np.ndarray), "the flipped samples, shape (n, ...), like the data")
    if isinstance(flipped, Tensor) != isinstance(data, Tensor) or (flipped.shape, flipped.dtype) != (
        data.shape,
        data.dtype,
    ):
        raise ValueError(
            f"Pool flipped is a {type(flipped).__name__} of shape {tuple(flipped.shape)} and dtype {flipped.dtype}: pass "
            f"the kind, shape and dtype of the data, {type(data).__name__}, {tuple(data.shape)} and {data.dtype}."
        )
    if isinstance(data, Tensor) and flipped.device != data.device:
        raise ValueError(
            f"Pool flipped is on {flipped.device}, the data are on {data.device}: move them to one device."
        )
    if mirrored:
        raise ValueError("mirrored=True adds the mirror images, flipped= other samples for them: pass one of the two.")


def check_label_sizes(n: int, size: int | None, labels: Tensor | None, sizes: Mapping[str, int | None]) -> None:
    """Check the `sizes` that depend on a row's label, `label_size` and `unlabelled_size`, for a pool of `n` samples.

    Raises:
        TypeError: if one is no whole number.
        ValueError: if one is not between 1 and `n`, there are no `labels`, or a `size` is given for all rows.
    """
    for name, number_of in sizes.items():
        if number_of is None:
            continue
        whole_number(f"Pool {name}", number_of, 1)
        if labels is None or size is not None:
            there = "the Pool has no labels" if labels is None else f"its size is {size}"
            raise ValueError(f"Pool {name} is {number_of}, but {there}: pass labels, and size=None, with it.")
        if number_of > n:
            raise ValueError(f"Pool {name} is {number_of}: pass at most the {n} samples, or None for all of them.")


def checked_weights(weights: Tensor | NDArray[Any], n: int) -> Tensor:
    """The weights of `n` samples in float64, the largest 1.

    Raises:
        ValueError: if they are not `n` finite numbers, 0 or more, and not all 0.
    """
    values = sample_weights(weights, n)
    if not bool((values > 0).any()):
        raise ValueError("Pool weights are all 0: give each sample that can be drawn a positive weight.")
    return values / values.max()


def sample_weights(weights: Tensor | NDArray[Any], n: int) -> Tensor:
    """The weights of `n` samples in float64, on their given scale.

    Raises:
        ValueError: if they are not `n` finite numbers, 0 or more.
    """
    values = array_of_numbers("Pool weights", weights).detach()
    if values.shape != (n,):
        raise ValueError(
            f"Pool weights have shape {tuple(values.shape)} and dtype {values.dtype}: pass one number per sample, ({n},)."
        )
    values = values.to(wide_dtype(values.device))
    bad = ~((values >= 0) & values.isfinite())
    if bool(bad.any()):
        place = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"Pool weights are {values[place].item():g} at sample {place}: pass finite numbers, 0 or more."
        )
    return values
