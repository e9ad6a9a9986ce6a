"""A recipe as JSON: dataclasses become objects with their class's name under "kind", and back.

Only the classes listed here are ever made from a file.
"""

from dataclasses import fields, is_dataclass
from typing import Any, cast

from stablefield.diffusion.noise_levels import LogNormal, LogUniform, Uniform
from stablefield.diffusion.preconditioning import EDMPreconditioning, VEPreconditioning, VPPreconditioning
from stablefield.diffusion.process import EDM, VE, VP, Cosine, RectifiedFlow
from stablefield.diffusion.weighting import EDMWeighting, FlowWeighting, SNRWeighting
from stablefield.training.recipe import Perceptron, Recipe, UNet, UNet2D

__all__ = ["decode", "encode"]

_KINDS = {
    kind.__name__: kind
    for kind in (
        *(EDM, VE, VP, Cosine, RectifiedFlow),
        *(LogNormal, LogUniform, Uniform),
        *(EDMWeighting, SNRWeighting, FlowWeighting),
        *(EDMPreconditioning, VPPreconditioning, VEPreconditioning),
        *(Perceptron, UNet, UNet2D, Recipe),
    )
}


def encode(value: Any) -> Any:
    """A dataclass of the list, or a JSON value, as JSON values; infinity becomes "inf", a tuple a list."""
    if is_dataclass(value):
        return {"kind": type(value).__name__, **{f.name: encode(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, tuple):
        return [encode(item) for item in cast("tuple[Any, ...]", value)]
    return "inf" if value == float("inf") else value


def decode(data: Any) -> Any:
    """The value that `encode` made `data` from.

    Raises:
        ValueError: if a kind is not of the list, or its fields do not fit.
    """
    if isinstance(data, list):
        return tuple(decode(item) for item in cast("list[Any]", data))
    if not isinstance(data, dict):
        return float("inf") if data == "inf" else data
    entries = {str(key): decode(value) for key, value in cast("dict[str, Any]", data).items()}
    kind = str(entries.pop("kind", None))
    if kind not in _KINDS:
        raise ValueError(f'config.json has the kind "{kind}", which this version does not know: {", ".join(_KINDS)}.')
    try:
        return _KINDS[kind](**entries)
    except TypeError as error:
        raise ValueError(f"config.json does not fit this version: {kind}: {error}.") from error
