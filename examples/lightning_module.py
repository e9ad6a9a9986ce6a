"""Stable targets in a Lightning module that predicts v under a cosine schedule of its own.

The recipe for any parameterisation: where the loss has the clean data and the noise, put `target.x0` and `target.noise`.
Lines that end in `# +` were added; lines that begin with `# -` show what they replace.

    pip install . lightning  # in a checkout of the project
"""

import math

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stablefield as sf  # +
from stablefield.data import open_images


class Diffusion(lightning.LightningModule):
    """A perceptron on images of 8 x 8 pixels."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(64 + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64)
        )
        self.stable = sf.StableTarget(sf.Cosine(), references=sf.InBatch())  # +
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor]) -> Tensor:
        (x0,) = batch
        t = torch.rand(len(x0), 1, device=x0.device).clamp(1e-4, 1 - 1e-4)
        alpha, sigma = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        noise = torch.randn_like(x0)
        x_t = alpha * x0 + sigma * noise
        output = self.network(torch.cat([x_t, alpha, sigma], dim=1))
        # - v = alpha * noise - sigma * x0
        target = self.stable(x0, x_t, t.flatten(), noise=noise)  # +
        v = alpha * target.noise - sigma * target.x0  # +
        loss = nn.functional.mse_loss(output, v)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(steps: int = 400) -> list[float]:
    lightning.seed_everything(0, verbose=False)
    images = torch.from_numpy(open_images("digits").images.copy()).float().flatten(1) / 127.5 - 1
    loader = DataLoader(TensorDataset(images), 256, shuffle=True, drop_last=True)
    module = Diffusion()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    print(f"loss {sum(module.losses[-50:]) / len(module.losses[-50:]):.4f}")
    return module.losses


if __name__ == "__main__":
    main()
