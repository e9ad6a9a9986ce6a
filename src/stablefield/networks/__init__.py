"""Networks that may be trained: a perceptron, and the U-Nets DDPM++ and NCSN++."""

from stablefield.networks.mlp import MLP
from stablefield.networks.song_unet import SongUNet

__all__ = ["MLP", "SongUNet"]
