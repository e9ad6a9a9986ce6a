"""Networks for your own loop, or for a recipe: the U-Nets DDPM++ and NCSN++, the transformer SiT, and a perceptron.

A U-Net for RGB images of 32 x 32 pixels, and the denoiser D(x, sigma) around it, with EDM's preconditioning:

    network = sf.networks.SongUNet.ddpmpp(32, 3, base_channels=128, multipliers=(2, 2, 2))  # or SongUNet.ncsnpp
    denoiser = sf.Denoiser(network, preconditioning=sf.EDMPreconditioning(sigma_data=0.5))
    x0 = denoiser(x, sigma)  # x (B, 3, 32, 32) with noise of standard deviation sigma (B,), to the clean images

Every network is called as network(x, noise_label, class_labels=None). `SiT` is for latents and images of any size that
divides into patches; `MLP` is for points and images of 8 x 8 pixels; `DiffusersUNet` wraps a UNet2DModel of diffusers, which
it needs, so that it is called in the same way. A recipe names a network by its settings:
`stablefield.training.SongUNetConfig`, `SiTConfig`, `MLPConfig`, `DiffusersUNetConfig`.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
