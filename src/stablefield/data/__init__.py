"""Images from wherever they are to uint8 arrays, and the order in which they are dealt.

`open_images` opens a source, `pack` writes one memory-mappable file of it, `IndexStream` deals its rows, `summary` and
`sample_grid` say what is in it. NumPy is all that is imported; Pillow, pyarrow and huggingface_hub only where they are used.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
