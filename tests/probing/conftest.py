"""What the probe's tests share: data, and variances by their definition."""

import pytest
import torch

from stablefield.data import open_images


@pytest.fixture(scope="session")
def digits():
    return open_images("digits")


@pytest.fixture(scope="session")
def two_gaussians():
    """Two Gaussians in R^64, 1,000 samples."""
    generator = torch.Generator().manual_seed(5)
    side = torch.randint(0, 2, (1000, 1), generator=generator) * 2 - 1
    return 0.25 * side + 0.1 * torch.randn(1000, 64, generator=generator)


@pytest.fixture(scope="session")
def brute_force():
    def compute(data, level, sizes, rows, seed, labels=None):
        """Mean and standard error of V_DSM, D, source weight, ESS and V_STF(n), in float64 and row by row.

        Rows are drawn independently with replacement, and every row has reference sets of its own.
        """
        y = data.flatten(1).double()
        generator = torch.Generator().manual_seed(seed)
        names = ("dsm", "divergence", "source_weight", "ess", *sizes)
        found = {name: [] for name in names}
        for _ in range(rows):
            k = int(torch.randint(len(y), (1,), generator=generator))
            x = y[k] + level * torch.randn(y.shape[1], generator=generator, dtype=torch.float64)
            members = torch.arange(len(y)) if labels is None else (labels == labels[k]).nonzero()[:, 0]
            logits = -(x - y[members]).square().sum(1) / (2 * level**2)
            w = logits.softmax(0)
            mean = w @ y[members]
            found["dsm"].append((w * (y[members] - mean).square().sum(1)).sum())
            found["divergence"].append((w * (w * len(w)).log()).nan_to_num(0).sum())
            found["source_weight"].append(w[members == k].sum())
            found["ess"].append(1 / w.square().sum())
            for n in sizes:
                others = torch.randperm(len(y) - 1, generator=generator)[: n - 1]
                chosen = torch.cat([torch.tensor([k]), others + (others >= k)])
                if labels is not None:
                    chosen = chosen[labels[chosen] == labels[k]]
                v = (-(x - y[chosen]).square().sum(1) / (2 * level**2)).softmax(0)
                found[n].append((v @ y[chosen] - mean).square().sum())
        stacked = {name: torch.stack(values) for name, values in found.items()}
        return {name: (float(v.mean()), float(v.std() / rows**0.5)) for name, v in stacked.items()}

    return compute
