"""Stable targets in a torchcfm loop, where time runs from noise to data.

`ConditionalFlowMatcher(sigma=0.0)` draws x_t = t x1 + (1 - t) x0 with noise x0 and data x1, and regresses on x1 - x0. That
is our rectified flow at time 1 - t, and the negative of its velocity. Two kinds of matchers do not work: one with sigma > 0
adds noise at a different level from the flow's own, and one that pairs noise with data by optimal transport makes the noise
depend on the data, which changes the posterior over references.

Lines that end in `# +` were added; lines that begin with `# -` show what they replace.

    pip install . pot; pip install --no-deps torchcfm  # in a checkout of the project

(torchcfm's own requirements bring torchdyn and, through it, torchvision; its flow matchers need torch and pot only.)
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

import stablefield as sf  # +
from stablefield.data import open_images


class Velocity(nn.Module):
    """A perceptron on images of 8 x 8 pixels."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(64 + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(torch.cat([x, t[:, None]], dim=1))


def main(steps: int = 400) -> list[float]:
    torch.manual_seed(0)
    images = torch.from_numpy(open_images("digits").images.copy()).float().flatten(1) / 127.5 - 1
    # - loader = DataLoader(TensorDataset(images), 256, shuffle=True, drop_last=True)
    loader = DataLoader(TensorDataset(images, torch.arange(len(images))), 256, shuffle=True, drop_last=True)  # +
    stable = sf.StableTarget(sf.RectifiedFlow(), references=sf.Pool(images))  # +
    matcher = ConditionalFlowMatcher(sigma=0.0)
    model = Velocity()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses: list[float] = []
    while len(losses) < steps:
        # - for (x1,) in loader:
        for x1, index in loader:  # +
            x0 = torch.randn_like(x1)
            t, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1)
            u_t = -stable(x1, x_t, 1 - t, index=index, noise=x0).velocity  # +
            loss = torch.mean((model(t, x_t) - u_t) ** 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    print(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
    return losses


if __name__ == "__main__":
    main()
