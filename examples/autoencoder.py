"""A small AutoencoderKL for your images, to train a diffusion model on its latents.

Published autoencoders, such as stabilityai/sd-vae-ft-mse, suit photos of 256 pixels a side and more. For small images, or
images of another kind, train your own: this takes minutes on two CPU cores for images of 28 pixels a side. Each level halves
the sides, so `--widths 16 32 64` makes latents of a quarter of the height and width.

The loss is the squared error of the reconstruction plus a small weight times the Kullback-Leibler divergence of the latents'
distribution from the standard normal (Kingma, Welling, "Auto-Encoding Variational Bayes", 2014; Rombach et al.,
"High-Resolution Image Synthesis with Latent Diffusion Models", 2022, which adds perceptual and adversarial losses).

    pip install ".[train,diffusers]"  # in a checkout of the project
    python examples/autoencoder.py photos vae --resolution 32
    stablefield data encode photos latents --vae vae --resolution 32
"""

import argparse
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from stablefield.data import ImageSet, open_images


def pixels(images: ImageSet, index: Tensor) -> Tensor:
    """Rows of the images, in [-1, 1]: (B, C, H, W)."""
    return torch.from_numpy(images.images[index.numpy()]).float() / 127.5 - 1


def main(
    images: ImageSet,
    out: Path,
    steps: int = 1500,
    batch: int = 64,
    learning_rate: float = 2e-3,
    widths: tuple[int, ...] = (16, 32, 64),
    latent_channels: int = 4,
    kl_weight: float = 1e-4,
    seed: int = 0,
) -> list[float]:
    torch.manual_seed(seed)
    channels, height, width = images.shape
    if height % 2 ** (len(widths) - 1) or width % 2 ** (len(widths) - 1):
        raise SystemExit(
            f"{len(widths)} widths halve the sides {len(widths) - 1} times, but the images are {height}x{width}"
        )
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=max(height, width),
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05)
    losses: list[float] = []
    for step in range(steps):
        x = pixels(images, torch.randint(len(images), (batch,)))
        latents = vae.encode(x).latent_dist
        error = (vae.decode(latents.sample()).sample - x).square().mean()
        loss = error + kl_weight * latents.kl().mean() / latents.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: squared error {error.item():.4f}", flush=True)

    # Diffusion models expect latents of unit variance: Rombach et al. scale them by one number.
    vae.eval()
    with torch.no_grad():
        drawn = vae.encode(pixels(images, torch.randint(len(images), (min(1024, 16 * batch),)))).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / drawn.std().item(), 5))
    vae.save_pretrained(out)
    print(f"wrote {out}: {channels}x{height}x{width} to {'x'.join(map(str, drawn.shape[1:]))}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small AutoencoderKL on images.")
    parser.add_argument("images", help="a folder of images, or anything else that `stablefield train` reads")
    parser.add_argument("out", type=Path, help="folder of the autoencoder")
    parser.add_argument("--resolution", type=int, help="pixels a side; by default the images' own")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64], help="channels of each level")
    given = parser.parse_args()
    main(
        open_images(given.images, resolution=given.resolution),
        given.out,
        given.steps,
        given.batch,
        given.learning_rate,
        tuple(given.widths),
    )
