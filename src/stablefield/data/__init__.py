"""Images from wherever they are to uint8 arrays, and the order in which they are dealt.

`open_images` opens a source, `pack` writes one memory-mappable file of it, `IndexStream` deals its rows, `summary` and
`sample_grid` say what is in it. NumPy is all that is imported; Pillow and `datasets` only where they are used.
"""

from stablefield.data.image_set import ImageSet, Origin, make_image_set
from stablefield.data.index_stream import IndexStream
from stablefield.data.inspect import sample_grid, summary
from stablefield.data.packed import open_packed, pack
from stablefield.data.packed_writer import PackedWriter
from stablefield.data.png import tile, write_png
from stablefield.data.source import open_images

__all__ = [
    "ImageSet",
    "IndexStream",
    "Origin",
    "PackedWriter",
    "make_image_set",
    "open_images",
    "open_packed",
    "pack",
    "sample_grid",
    "summary",
    "tile",
    "write_png",
]
