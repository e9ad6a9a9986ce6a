"""The architecture of a DDPM++ or NCSN++ network, inferred from the names and shapes of its state.

A state dict has no configuration. But it shows each option of `SongUNet`: the resolution in the names, widths in the shapes,
the resampling taps in the stored filters. The inferred architecture is then compared with the state, name by name and shape
by shape, before a number is read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablefield.interop._inert import RefusedError, TensorView, plain_text
from stablefield.networks._resample import resampling_filter
from stablefield.networks._song_unet import SongUNet

__all__ = ["Architecture", "infer_architecture"]

_TAPS = {2: (1.0, 1.0), 4: (1.0, 3.0, 3.0, 1.0)}
# The absolute difference of a stored filter that counts as rounding.
_CLOSE = 1e-6
# Twice and a hundred times what published networks have.
_MAX_RESOLUTION = 2_048
_MAX_WIDTH = 65_536
# Two normalisations, two convolutions and an affine map, each with weight and bias.
_TENSORS_PER_BLOCK = 10


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The options of a `SongUNet`; see there."""

    resolution: int | tuple[int, int]
    channels: int
    fourier: bool
    residual_input: bool
    taps: tuple[float, ...]
    base_channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    augment_dim: int
    classes: int
    dropout: float = 0.13

    @property
    def name(self) -> str:
        """DDPM++, NCSN++, or a mixture."""
        kinds = {(False, False, 2): "DDPM++", (True, True, 4): "NCSN++"}
        return kinds.get((self.fourier, self.residual_input, len(self.taps)), "a mixture of DDPM++ and NCSN++")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Height and width of its levels, from the full resolution down."""
        height, width = self.size
        return tuple((height >> level, width >> level) for level in range(len(self.multipliers)))

    def build(self) -> SongUNet:
        """A network of this architecture."""
        return SongUNet(
            self.resolution,
            self.channels,
            fourier=self.fourier,
            residual_input=self.residual_input,
            taps=self.taps,
            base_channels=self.base_channels,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention=self.attention,
            augment_dim=self.augment_dim,
            classes=self.classes,
            dropout=self.dropout,
        )

    def describe(self) -> list[tuple[str, str]]:
        """Its properties, as pairs of a name and a text."""
        times = ", ".join(f"{m} at {side[0]}x{side[1]}" for m, side in zip(self.multipliers, self.sides, strict=True))
        return [
            ("architecture", self.name),
            ("images", f"{self.channels} x {self.size[0]} x {self.size[1]}"),
            ("base width", f"{self.base_channels}, times {times}"),
            ("blocks", f"{self.blocks} per level, attention at {_listed(self.attention)}"),
            ("augmentation labels", f"{self.augment_dim} wide" if self.augment_dim else "none"),
            ("classes", str(self.classes) if self.classes else "none"),
        ]


def infer_architecture(state: Mapping[str, Tensor | TensorView]) -> Architecture:
    """The architecture whose state has these names and shapes.

    Args:
        state: names without a common prefix (`map_layer0.weight` and so on).

    Raises:
        RefusedError: if it is neither DDPM++ nor NCSN++, with the first difference.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    found = _read(shapes, state)
    require_shapes(found.build, shapes, found.name, "neither DDPM++ nor NCSN++")
    return found


def require_shapes(
    build: Callable[[], nn.Module], shapes: Mapping[str, tuple[int, ...]], like: str, neither: str
) -> None:
    """Check that the network that `build` makes has exactly these names and shapes, without allocating its memory.

    Args:
        build: makes the network.
        shapes: of the tensors of the file, by name.
        like: the architecture that the file looks like.
        neither: the architectures that it fits none of, if `build` fails, as in "neither A nor B".

    Raises:
        RefusedError: with the first difference.
    """
    with torch.device("meta"):
        try:
            expected = {name: tuple(value.shape) for name, value in build().state_dict().items()}
        except ValueError as error:
            raise RefusedError(f"its names and shapes fit {neither}: {error}") from error
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise RefusedError(
                f"it looks like {like}, but {plain_text(name)} has shape {shapes.get(name, 'none')} instead of "
                f"{expected.get(name, 'none')}; a network with such options is not supported."
            )


def _read(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor | TensorView]) -> Architecture:
    firsts = [name for name in shapes if re.fullmatch(r"enc\.[1-9][0-9]{0,4}x[1-9][0-9]{0,4}_conv\.weight", name)]
    if len(firsts) != 1 or len(shapes[firsts[0]]) != 4:
        raise RefusedError(
            "its names are not those of a DDPM++ or NCSN++ network (one enc.HxW_conv.weight, H and W the resolution); "
            f"it has {len(shapes):,} tensors, the first of them {_examples(shapes)}."
        )
    height, width = map(int, re.findall(r"[0-9]+", firsts[0])[:2])
    first = f"{height}x{width}"
    # Nothing else in the file bounds the resolution, and every drawn image has its area.
    if max(height, width) > _MAX_RESOLUTION:
        raise RefusedError(
            f"its images would be {width:,} x {height:,} pixels; the limit is {_MAX_RESOLUTION:,} a side."
        )
    base, channels = shapes[firsts[0]][:2]
    sides = [(height, width)]
    while height % 2 == width % 2 == 0 and f"enc.{height // 2}x{width // 2}_block0.norm0.weight" in shapes:
        height, width = height // 2, width // 2
        sides.append((height, width))
    blocks = 0
    while f"enc.{first}_block{blocks}.conv1.weight" in shapes:
        blocks += 1
    # Check this before building a network with so many blocks, even on the meta device.
    if _TENSORS_PER_BLOCK * len(sides) * (2 * blocks + 1) > len(shapes):
        raise RefusedError(
            f"its names imply {len(sides)} levels of {blocks:,} blocks, but {len(shapes):,} tensors are too few for them."
        )
    widths = [_axis(shapes, f"enc.{h}x{w}_block0.conv1.weight", 0) for h, w in sides]
    if max(base, *widths) > _MAX_WIDTH:
        raise RefusedError(f"its levels are {_listed(widths)} wide; the limit is {_MAX_WIDTH:,}.")
    if base < 1 or blocks < 1 or any(width % base for width in widths):
        raise RefusedError(
            f"its levels are {_listed(widths)} wide, which are not multiples of the first width, {base}."
        )
    filters = [name for name in shapes if name.endswith(".resample_filter")]
    fourier = "map_noise.freqs" in shapes
    # With one level there is no lower one for the input to join: the option leaves no trace, and has no effect.
    residual = fourier if len(sides) == 1 else any("_aux_residual." in name for name in shapes)
    attends = [f"enc.{h}x{w}_block0.qkv.weight" in shapes for h, w in sides]
    return Architecture(
        resolution=sides[0][0] if sides[0][0] == sides[0][1] else sides[0],
        channels=channels,
        fourier=fourier,
        residual_input=residual,
        taps=_taps([state[name] for name in filters]) if filters else _TAPS[4 if residual else 2],
        base_channels=base,
        multipliers=tuple(width // base for width in widths),
        blocks=blocks,
        attention=tuple(side[0] for side, attending in zip(sides, attends, strict=True) if attending),
        augment_dim=_axis(shapes, "map_augment.weight", -1),
        classes=_axis(shapes, "map_label.weight", -1),
    )


def _axis(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> int:
    """The length of an axis; 0 if there is no such tensor, or it has no axes."""
    return (shapes.get(name) or (0,))[axis]


def _taps(filters: list[Tensor | TensorView]) -> tuple[float, ...]:
    for taps in _TAPS.values():
        expected = resampling_filter(taps)
        if all(tuple(stored.shape) == tuple(expected.shape) for stored in filters):
            values = [stored.tensor() if isinstance(stored, TensorView) else stored for stored in filters]
            if all((value.float() - expected).abs().max() < _CLOSE for value in values):
                return taps
    raise RefusedError("its resampling filters are neither those of DDPM++, (1, 1), nor those of NCSN++, (1, 3, 3, 1).")


def _listed(values: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _examples(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(plain_text(name, 40) for name in sorted(shapes)[:3]) or "none"
