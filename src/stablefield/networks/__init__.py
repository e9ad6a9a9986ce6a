"""Networks that may be trained: a perceptron, and the U-Nets DDPM++ and NCSN++.

`diffusers_unet` has a fourth, the UNet2DModel of diffusers, which is imported where one is made.
"""

from stablefield.networks.mlp import MLP
from stablefield.networks.song_unet import SongUNet

__all__ = ["MLP", "SongUNet"]
