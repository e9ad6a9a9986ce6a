"""Stable targets in a plain loop on Accelerate, with EDM's preconditioning and loss written out.

Lines that end in `# +` were added; lines that begin with `# -` show what they replace.

    pip install . accelerate  # in a checkout of the project
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stablefield as sf  # +
from stablefield.data import open_images

SIGMA_DATA = 0.5


class Network(nn.Module):
    """A small convolutional network conditioned on the noise level."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        e = self.embed(label[:, None])[:, :, None, None]
        h = self.enter(x)
        for layer in self.inner:
            h = h + layer(nn.functional.silu(h + e))
        return self.leave(nn.functional.silu(h))


def main(steps: int = 400) -> list[float]:
    set_seed(0)
    images = torch.from_numpy(open_images("digits").images.copy()).float() / 127.5 - 1
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    accelerator = Accelerator()
    # - loader = DataLoader(TensorDataset(images), 64, shuffle=True, drop_last=True)
    loader = DataLoader(TensorDataset(images, torch.arange(len(images))), 64, shuffle=True, drop_last=True)  # +
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    set_seed(0, device_specific=True)  # each process draws noise of its own
    pool = sf.Pool(images.to(accelerator.device), size=512)  # +
    stable = sf.StableTarget(sf.EDM(), references=pool, noise_band=0.3)  # +
    generator = torch.Generator(accelerator.device).manual_seed(1 + accelerator.process_index)  # +

    losses: list[float] = []
    while len(losses) < steps:
        # - for (x0,) in loader:
        for x0, index in loader:  # +
            sigma = torch.exp(1.2 * torch.randn(len(x0), 1, 1, 1, device=x0.device) - 1.2)
            noise = torch.randn_like(x0)
            x_t = x0 + sigma * noise
            root = (sigma**2 + SIGMA_DATA**2).sqrt()
            output = network(x_t / root, sigma.flatten().log() / 4)
            denoised = (SIGMA_DATA / root) ** 2 * x_t + sigma * SIGMA_DATA / root * output
            weight = (root / (sigma * SIGMA_DATA)) ** 2
            # - loss = (weight * (denoised - x0) ** 2).mean()
            target = stable(x0, x_t, sigma.flatten(), index=index, noise=noise, generator=generator)  # +
            loss = (weight * (denoised - target.x0) ** 2).mean()  # +
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    print(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
    return losses


if __name__ == "__main__":
    main()
