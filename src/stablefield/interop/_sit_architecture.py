"""The architecture of a SiT or DiT network, inferred from the names and shapes of its state.

Names and shapes show every option of `SiT` but one: the heads of the attention. For the widths of the published networks
their number is known. Height and width of the images follow from the embedding of places, which repeats with each row of
patches.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from stablefield.interop._architecture import require_shapes
from stablefield.interop._inert import RefusedError, TensorView
from stablefield.networks._sit import SIT_SIZES, SiT, place_embedding

__all__ = ["SiTArchitecture", "infer_sit", "is_sit"]

_FIRST = "x_embedder.proj.weight"
# The absolute difference of stored places that counts as rounding, in bfloat16 too.
_CLOSE = 1e-2
# Numbers in the embedding of places, and pixels of a side: many times what published networks have.
_MOST_PLACES = 2**25
_MOST_PIXELS = 2_048
# Five linear maps, each with weight and bias.
_TENSORS_PER_BLOCK = 10


@dataclass(frozen=True, kw_only=True)
class SiTArchitecture:
    """The options of a `SiT`; see there."""

    input_size: tuple[int, int]
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    classes: int
    learn_sigma: bool
    mlp_ratio: float

    @property
    def name(self) -> str:
        """SiT or DiT, which have one architecture."""
        sizes = {sizes: name for name, sizes in SIT_SIZES.items()}
        size = sizes.get((self.width, self.depth, self.heads))
        return f"SiT or DiT{f'-{size}' if size else ''}/{self.patch_size}"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.input_size

    def build(self) -> SiT:
        """A network of this architecture."""
        return SiT(**asdict(self))

    def describe(self) -> list[tuple[str, str]]:
        """Its properties, as pairs of a name and a text."""
        return [
            ("architecture", self.name),
            ("images", f"{self.channels} x {self.size[0]} x {self.size[1]}"),
            ("blocks", f"{self.depth} of width {self.width:,}, {self.heads} heads"),
            ("outputs", f"{'twice' if self.learn_sigma else 'once'} the channels"),
            ("classes", str(self.classes) if self.classes else "none"),
        ]


def is_sit(state: Mapping[str, Tensor | TensorView]) -> bool:
    """Whether the names of a state begin like those of SiT and DiT."""
    return _FIRST in state


def infer_sit(state: Mapping[str, Tensor | TensorView], heads: int | None = None) -> SiTArchitecture:
    """The architecture whose state has these names and shapes.

    Args:
        state: names without a common prefix (`x_embedder.proj.weight` and so on).
        heads: of the attention, which no shape shows; by default those of the published network of this width.

    Raises:
        RefusedError: if it is neither SiT nor DiT, with the first difference.
        ValueError: if the heads are unknown, or do not divide the width.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    first = shapes[_FIRST]
    if len(first) != 4 or first[2] != first[3] or first[0] % 4:
        raise RefusedError(f"its {_FIRST} has shape {first}; patches are square, and the width a multiple of 4.")
    width, channels, patch = first[:3]
    known = {sizes[0]: sizes[2] for sizes in SIT_SIZES.values()}
    if heads is None and width not in known:
        raise ValueError(f"heads: no shape shows how many heads a network of width {width:,} has; pass heads=N.")
    heads = known[width] if heads is None else heads
    if heads < 1 or width % heads:
        raise ValueError(f"heads={heads}: the network is {width:,} wide; pass a divisor of that.")
    depth = 0
    while f"blocks.{depth}.attn.qkv.weight" in shapes:
        depth += 1
    # Check this before building a network with so many blocks, even on the meta device.
    if _TENSORS_PER_BLOCK * depth > len(shapes):
        raise RefusedError(f"its names imply {depth:,} blocks, but {len(shapes):,} tensors are too few for them.")
    hidden, outputs = _rows(shapes, "blocks.0.mlp.fc1.weight"), _rows(shapes, "final_layer.linear.weight")
    rows, columns = _grid(state, width)
    if max(rows, columns) * patch > _MOST_PIXELS:
        raise RefusedError(
            f"its images would be {columns * patch:,} x {rows * patch:,} pixels; the limit is {_MOST_PIXELS:,} a side."
        )
    found = SiTArchitecture(
        input_size=(rows * patch, columns * patch),
        patch_size=patch,
        channels=channels,
        width=width,
        depth=depth,
        heads=heads,
        classes=_rows(shapes, "y_embedder.embedding_table.weight") - 1,
        learn_sigma=outputs == 2 * channels * patch**2,
        mlp_ratio=_ratio(hidden, width),
    )
    require_shapes(found.build, shapes, "SiT or DiT", "neither SiT nor DiT")
    return found


def _ratio(hidden: int, width: int) -> float:
    """The smallest quotient whose product with the width is not below `hidden`: `SiT` rounds the product down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if not shapes.get(name):
        raise RefusedError(f"it looks like SiT or DiT, but has no {name}.")
    return shapes[name][0]


def _grid(state: Mapping[str, Tensor | TensorView], width: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    stored = state.get("pos_embed")
    if stored is None or len(stored.shape) != 3 or stored.shape[0] != 1 or stored.shape[2] != width:
        raise RefusedError("it looks like SiT or DiT, but has no pos_embed of shape (1, patches, width).")
    if math.prod(stored.shape) > _MOST_PLACES:
        raise RefusedError(f"its pos_embed has {math.prod(stored.shape):,} numbers; the limit is {_MOST_PLACES:,}.")
    places = (stored.tensor() if isinstance(stored, TensorView) else stored)[0].float()
    count = len(places)
    # The first half of the embedding tells the column: it is that of the first patch again where the second row begins.
    again = ((places[1:, : width // 2] - places[0, : width // 2]).abs().amax(1) < _CLOSE).nonzero()
    columns = int(again[0, 0]) + 1 if len(again) else count
    if count % columns == 0:
        expected = place_embedding((count // columns, columns), width).float()
        if bool(((places - expected).abs() < _CLOSE).all()):
            return count // columns, columns
    side = math.isqrt(count)
    if side**2 != count:
        raise RefusedError(f"its pos_embed for {count:,} patches is not the fixed one, which would show their rows.")
    return side, side
