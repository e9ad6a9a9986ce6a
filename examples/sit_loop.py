"""Stable targets in the training loop of SiT: classes, dropped labels, and latents that are drawn anew at every step.

SiT's code (github.com/willisma/SiT) flips an image at random, encodes it to a normal distribution, and draws a latent. Here
the means and standard deviations are cached. The path is x_t = t x1 + (1 - t) x0 with data x1 and noise x0, and the network
predicts the velocity x1 - x0: that is our rectified flow at time 1 - t, and the negative of its velocity.

SiT's network drops labels by itself. The target has to know which: a row with a label may only use references of its class,
and a row without one may use all. So the loop drops the labels, with the same random numbers.

The encoder is a principal component analysis of 2 x 2 pixels instead of an autoencoder. Lines that end in `# +` were added;
lines that begin with `# -` show what they replace.

    pip install .  # in a checkout of the project
"""

import torch
from torch import Tensor, nn

import stablefield as sf  # +
from stablefield.data import open_images

CLASSES = 10
DROPOUT = 0.1
SHAPE = (4, 4, 4)


class LabelEmbedder(nn.Module):
    """A table of the classes that drops labels in training, as SiT's does; its last row stands for no label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES + 1, width)
        self.dropout_prob = DROPOUT

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            y = y.masked_fill(torch.rand(len(y)) < self.dropout_prob, CLASSES)
        return self.table(y)


class Velocity(nn.Module):
    """A perceptron on latents, in the place of SiT's transformer."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.y_embedder = LabelEmbedder(width)
        self.enter = nn.Linear(64 + 1, width)
        self.leave = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        hidden = self.enter(torch.cat([x.flatten(1), t[:, None]], dim=1)) + self.y_embedder(y)
        return self.leave(hidden).view(x.shape)


def encode(images: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, (n, 4, 4, 4), of images (n, 1, 8, 8)."""
    mean = nn.functional.conv2d(images, directions, stride=2)
    return mean, torch.full_like(mean, 0.1)


def main(steps: int = 600) -> list[float]:
    torch.manual_seed(0)
    data = open_images("digits")
    labels = torch.from_numpy(data.labels.copy()).long()
    images = torch.from_numpy(data.images.copy()).float() / 127.5 - 1
    patches = nn.functional.unfold(images, 2, stride=2).transpose(1, 2).flatten(0, 1)
    directions = torch.linalg.eigh(patches.T @ patches).eigenvectors.T.view(4, 1, 2, 2)
    (mean, std), (flipped_mean, flipped_std) = encode(images, directions), encode(images.flip(-1), directions)
    pool = sf.Pool.from_moments(mean, std, labels, flipped_mean=flipped_mean, flipped_std=flipped_std)  # +
    stable = sf.StableTarget(sf.RectifiedFlow(), references=pool)  # +

    model = Velocity()
    model.y_embedder.dropout_prob = 0  # +
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses: list[float] = []
    while len(losses) < steps:
        pool.refresh()  # +
        for index in torch.randperm(len(labels)).split(256):
            flip, y = torch.rand(len(index)) < 0.5, labels[index]
            of_row = flip[:, None, None, None]
            x1 = torch.where(of_row, flipped_mean[index], mean[index])
            x1 = x1 + torch.where(of_row, flipped_std[index], std[index]) * torch.randn_like(x1)
            x0 = torch.randn_like(x1)
            t = torch.rand(len(x1))
            x_t = t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0
            # - output = model(x_t, t, y)
            # - u_t = x1 - x0
            drop = torch.rand(len(y)) < DROPOUT  # +
            output = model(x_t, t, y.masked_fill(drop, CLASSES))  # +
            seen = y.masked_fill(drop, -1)  # +
            u_t = -stable(x1, x_t, 1 - t, labels=seen, index=index, noise=x0, flip=flip).velocity  # +
            loss = (output - u_t).square().flatten(1).mean(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break

    # One digit of each class, by Euler's method with guidance.
    model.eval()
    with torch.no_grad():
        x, wanted = torch.randn(CLASSES, *SHAPE), torch.arange(CLASSES)
        for step in range(20):
            t = torch.full((CLASSES,), step / 20)
            conditional, unconditional = model(x, t, wanted), model(x, t, torch.full_like(wanted, CLASSES))
            x = x + (unconditional + 1.5 * (conditional - unconditional)) / 20
        drawn = nn.functional.conv_transpose2d(x, directions, stride=2)
    print(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}, pixels from {drawn.min():.2f} to {drawn.max():.2f}")
    return losses


if __name__ == "__main__":
    main()
