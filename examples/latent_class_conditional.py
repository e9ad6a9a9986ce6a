"""Stable targets for class-conditional flow matching on latents, with label dropout for guidance.

If the network sees a row's class, the row may only use references of that class; a row whose label was dropped may use all.
Two lines achieve both: the pool knows the class of each latent (`labels=`), and the call passes the label that the network
sees, -1 where it sees none. Without them the target would be biased: it would average over images that the network's
condition rules out.

The encoder here is a principal component analysis instead of an autoencoder. Lines that end in `# +` were added; lines that
begin with `# -` show what they replace.

    pip install .  # in a checkout of the project
"""

import torch
from torch import Tensor, nn

import stablefield as sf  # +
from stablefield.data import open_images

CLASSES = 10
DROPOUT = 0.1


class Velocity(nn.Module):
    """A perceptron on latents; the last class embedding stands for no class."""

    def __init__(self, dim: int, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES + 1, width)
        self.enter = nn.Linear(dim + 1, width)
        self.leave = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        label = torch.where(label < 0, CLASSES, label)
        return self.leave(self.enter(torch.cat([x, t[:, None]], dim=1)) + self.embed(label))


def encode(images: Tensor, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of unit variance, and the mean and directions that decode them."""
    flat = images.flatten(1)
    mean = flat.mean(0)
    _, scale, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    directions = directions[:dim] * (scale[:dim, None] / len(flat) ** 0.5)
    return (flat - mean) @ torch.linalg.pinv(directions), mean, directions


def main(steps: int = 600) -> list[float]:
    torch.manual_seed(0)
    data = open_images("digits")
    labels = torch.from_numpy(data.labels.copy()).long()
    latents, mean, directions = encode(torch.from_numpy(data.images.copy()).float() / 127.5 - 1)
    stable = sf.StableTarget(sf.RectifiedFlow(), references=sf.Pool(latents, labels=labels))  # +
    model = Velocity(latents.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses: list[float] = []
    for _ in range(steps):
        index = torch.randint(len(latents), (256,))
        x0, label = latents[index], labels[index]
        seen = torch.where(torch.rand(len(x0)) < DROPOUT, -1, label)
        t = torch.sigmoid(torch.randn(len(x0)))
        noise = torch.randn_like(x0)
        x_t = (1 - t[:, None]) * x0 + t[:, None] * noise
        # - velocity = noise - x0
        velocity = stable(x0, x_t, t, labels=seen, index=index, noise=noise).velocity  # +
        loss = (model(x_t, t, seen) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    # One digit of each class, by Euler's method with guidance.
    with torch.no_grad():
        x, wanted = torch.randn(CLASSES, latents.shape[1]), torch.arange(CLASSES)
        for step in range(20):
            t = torch.full((CLASSES,), 1 - step / 20)
            conditional, unconditional = model(x, t, wanted), model(x, t, torch.full_like(wanted, -1))
            x = x - (unconditional + 1.5 * (conditional - unconditional)) / 20
        drawn = x @ directions + mean
    print(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}, pixels from {drawn.min():.2f} to {drawn.max():.2f}")
    return losses


if __name__ == "__main__":
    main()
