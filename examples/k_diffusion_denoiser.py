"""Stable targets in a denoiser like k-diffusion's: a module that scales its network's input, output and target.

Its loss compares the network's raw output with (x0 - c_skip x_t) / c_out; the stable target replaces x0.
Lines that end in `# +` were added; lines that begin with `# -` show what they replace.

    pip install .  # in a checkout of the project
"""

import torch
from torch import Tensor, nn

import stablefield as sf  # +
from stablefield import sampling
from stablefield.data import open_images


class Denoiser(nn.Module):
    """D(x, sigma), and the loss that trains it.

    Args:
        inner: called with the scaled image and the noise level.
        sigma_data: standard deviation of the data.
        stable: makes the target.
    """

    # - def __init__(self, inner: nn.Module, sigma_data: float = 0.5) -> None:
    def __init__(self, inner: nn.Module, sigma_data: float = 0.5, *, stable: sf.StableTarget) -> None:  # +
        super().__init__()
        self.inner, self.sigma_data = inner, sigma_data
        self.stable = stable  # +

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, each of shape (B, 1, 1, 1)."""
        s = sigma[:, None, None, None]
        square = s**2 + self.sigma_data**2
        return self.sigma_data**2 / square, s * self.sigma_data / square**0.5, 1 / square**0.5

    # - def loss(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    def loss(self, x0: Tensor, noise: Tensor, sigma: Tensor, index: Tensor) -> Tensor:  # +
        """The loss of each row."""
        c_skip, c_out, c_in = self.scalings(sigma)
        noised = x0 + noise * sigma[:, None, None, None]
        output = self.inner(noised * c_in, sigma)
        # - target = (x0 - c_skip * noised) / c_out
        target = (self.stable(x0, noised, sigma, index=index, noise=noise).x0 - c_skip * noised) / c_out  # +
        return (output - target).pow(2).flatten(1).mean(1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out, c_in = self.scalings(sigma)
        return self.inner(x * c_in, sigma) * c_out + x * c_skip


class Inner(nn.Module):
    """A perceptron on images of 8 x 8 pixels."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(64 + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64)
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.network(torch.cat([x.flatten(1), sigma[:, None].log() / 4], dim=1)).reshape(x.shape)


def main(steps: int = 400) -> list[float]:
    torch.manual_seed(0)
    images = torch.from_numpy(open_images("digits").images.copy()).float() / 127.5 - 1
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images))  # +
    # - model = Denoiser(Inner(), sigma_data=0.5)
    model = Denoiser(Inner(), sigma_data=0.5, stable=stable)  # +
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        x0 = images[index]
        sigma = torch.exp(1.2 * torch.randn(len(x0)) - 1.2)
        # - loss = model.loss(x0, torch.randn_like(x0), sigma).mean()
        loss = model.loss(x0, torch.randn_like(x0), sigma, index).mean()  # +
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Our samplers call a denoiser as k-diffusion's do.
    drawn = sampling.heun(model, 80 * torch.randn(4, 1, 8, 8), sampling.edm_sigmas(18))
    print(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}, images from {drawn.min():.2f} to {drawn.max():.2f}")
    return losses


if __name__ == "__main__":
    main()
