"""The whole data set in place of StableVM's bank of latents.

StableVM (arXiv 2602.05435, github.com/linYDTHU/StableVelocity) keeps the latest latents of each class in half precision, and
the latest of all for rows without a label. It draws the rows of a batch from this bank. From time 0.5 on, a row's target is
the mean velocity over the bank of its label. `Bank` does this in our words, without the chunks and clamps of their code.

A pool of all latents replaces the bank: there is nothing to fill or update, and a row meets every latent of its label.
`noise_band=1.0` begins at the same time, because sigma / alpha = t / (1 - t).

With a bank that holds all latents, both versions give the same losses up to rounding. Lines that end in `# +` were added;
lines that begin with `# -` show what they replace.

    pip install .  # in a checkout of the project
"""

import torch
from torch import Tensor, nn

import stablefield as sf  # +
from stablefield.data import open_images

CLASSES = 10
DROPOUT = 0.1
BATCH = 256


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


def pick(sets: list[Tensor], seen: Tensor, which: Tensor) -> Tensor:
    """A member of the set of each row's label; the last set is that of the label -1."""
    size = torch.tensor([len(members) for members in sets])
    return torch.cat(sets)[(size.cumsum(0) - size)[seen] + which % size[seen]]


# - class Bank:
# -     """The latest latents of each class, and of all, in half precision.
# -
# -     Args:
# -         sizes: how many of each class, and of all.
# -         dim: numbers of a latent.
# -     """
# -
# -     def __init__(self, sizes: list[int], dim: int) -> None:
# -         self.latents = [torch.empty(size, dim, dtype=torch.float16) for size in sizes]
# -         self.seen = [0] * len(sizes)
# -
# -     def add(self, latents: Tensor, labels: Tensor) -> None:
# -         """Write latents (b, dim) over the oldest ones."""
# -         for label, bank in enumerate(self.latents):
# -             new = latents if label == CLASSES else latents[labels == label]
# -             place = torch.arange(self.seen[label], self.seen[label] + len(new)) % len(bank)
# -             bank[place[-len(bank) :]] = new[-len(bank) :].half()
# -             self.seen[label] += len(new)
# -
# -     def velocity(self, x_t: Tensor, t: Tensor, seen: Tensor) -> Tensor:
# -         """The mean velocity of rows (b, dim), over the latents of their labels."""
# -         velocity = torch.empty_like(x_t)
# -         for label in seen.unique():
# -             rows, latents = seen == label, self.latents[label].float()
# -             x, s = x_t[rows][:, None], t[rows][:, None, None]
# -             gap = x - (1 - s) * latents  # b x n x dim numbers
# -             weight = torch.softmax(-gap.square().sum(2) / (2 * s[:, 0] ** 2), dim=1)
# -             velocity[rows] = (weight[:, :, None] * ((x - latents) / s)).sum(1)
# -         return velocity


def encode(images: Tensor, dim: int = 16) -> Tensor:
    """Latents of unit variance by a principal component analysis, instead of an autoencoder."""
    flat = images.flatten(1)
    left = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).U
    return left[:, :dim] * len(flat) ** 0.5


# - def main(steps: int = 600, capacity: int = 36, mean_from: float = 0.5) -> list[float]:
def main(steps: int = 600) -> list[float]:  # +
    torch.manual_seed(0)
    data = open_images("digits")
    labels = torch.from_numpy(data.labels.copy()).long()
    latents = encode(torch.from_numpy(data.images.copy()).float() / 127.5 - 1).half()
    # - sizes = [min(capacity, size) for size in (*labels.bincount().tolist(), len(labels))]
    # - bank = Bank(sizes, latents.shape[1])
    # - bank.add(latents, labels)
    members = [(labels == label).nonzero()[:, 0] for label in range(CLASSES)] + [torch.arange(len(labels))]  # +
    stable = sf.StableTarget(sf.RectifiedFlow(), references=sf.Pool(latents, labels=labels), noise_band=1.0)  # +
    model = Velocity(latents.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses: list[float] = []
    for _ in range(steps):
        # - batch = (len(losses) * BATCH + torch.arange(BATCH)) % len(latents)
        # - bank.add(latents[batch], labels[batch])
        # The label of each row, or -1 for none, and which of the label's latents it is.
        seen = torch.randint(CLASSES, (BATCH,)).masked_fill(torch.rand(BATCH) < DROPOUT, -1)
        which = torch.randint(2**40, (BATCH,))
        # - x0 = pick(bank.latents, seen, which).float()
        index = pick(members, seen, which)  # +
        x0 = latents[index].float()  # +
        t = torch.rand(BATCH).clamp(1e-4, 1 - 1e-4)
        noise = torch.randn_like(x0)
        x_t = (1 - t[:, None]) * x0 + t[:, None] * noise
        # - velocity = noise - x0
        # - late = t >= mean_from
        # - velocity[late] = bank.velocity(x_t[late], t[late], seen[late])
        velocity = stable(x0, x_t, t, labels=seen, index=index, noise=noise).velocity  # +
        loss = (model(x_t, t, seen) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
    return losses


if __name__ == "__main__":
    main()
