"""A training step that is compiled as a whole takes the target as it is, without tracing it."""

import pytest
import torch
from torch import Tensor, nn

import stablefield as sf


@pytest.mark.slow
def test_compiled_step_has_the_loss_of_the_plain_one(rng: torch.Generator) -> None:
    images = torch.rand(60, 1, 4, 4, generator=rng) * 2 - 1
    network = nn.Linear(16, 16)
    target = torch.compiler.disable(sf.StableTarget(sf.EDM(), references=sf.Pool(images), noise_band=0.5).__call__)

    def loss(x0: Tensor, x_t: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        found = target(x0, x_t, sigma, index=index)
        return (network(x_t.flatten(1)) - found.x0.flatten(1)).square().mean()

    compiled = torch.compile(loss, backend="aot_eager")
    # The number of rows in the band differs from batch to batch, for which nothing is compiled anew.
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            index = torch.randint(60, (8,), generator=rng)
            sigma = torch.exp(torch.randn(8, generator=rng))
            x_t = sf.EDM().perturb(images[index], sigma, generator=rng)
            batch = (images[index], x_t, sigma, index)
            torch.testing.assert_close(compiled(*batch), loss(*batch))
