"""The flags of every verb that draws samples from a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from stablefield.training._sampler import SamplerOptions

__all__ = ["DrawingFlags"]

if TYPE_CHECKING:
    ClassNames = str | int | Sequence[str | int]
else:
    ClassNames = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DrawingFlags(SamplerOptions):
    """How to draw samples: the options of Python, of which class_label is --class."""

    class_label: Annotated[ClassNames, tyro.conf.arg(name="class")] = ()
