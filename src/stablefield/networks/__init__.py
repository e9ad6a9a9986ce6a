"""Networks that may be trained: a perceptron, and the U-Nets DDPM++ and NCSN++.

`diffusers_unet` has a fourth, the UNet2DModel of diffusers, which is imported where one is made.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
