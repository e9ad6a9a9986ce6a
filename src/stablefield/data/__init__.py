"""Read images from many sources into uint8 arrays, and order them for training.

`open_images` opens a source, `pack` writes it as one memory-mappable file, `IndexStream` orders its rows, `summary` and
`sample_grid` show its content. `encode` writes the latents of images, `decode` makes images of them. Imports only NumPy and
torch; Pillow, pyarrow, diffusers and huggingface_hub are imported where they are used.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
