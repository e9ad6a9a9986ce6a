"""Networks for training: a perceptron, and the U-Nets DDPM++ and NCSN++.

`DiffusersUNet` wraps a fourth, the UNet2DModel of diffusers, which it imports when you make one.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
