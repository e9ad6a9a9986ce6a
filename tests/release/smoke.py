"""What a fresh install must do with torch and numpy alone: `python smoke.py` prints the versions as JSON, or fails.

Kept apart from the tests, because it runs in environments that have none of their packages.
"""

import json
import platform

import numpy
import torch

import stablefield as sf
from stablefield import networks


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=generator)
    index = torch.randperm(64, generator=generator)[:16]
    x0 = images[index].float() / 127.5 - 1

    # The target of three loops is the posterior mean, by its definition.
    references = (images / 127.5 - 1).flatten(1).double()
    for process, t in ((sf.EDM(), 8.0), (sf.VP(), 0.7), (sf.RectifiedFlow(), 0.9)):
        x_t = process.perturb(x0, t, generator=generator)
        target = sf.StableTarget(process, references=sf.Pool(images))(x0, x_t, t, index=index)
        alpha, sigma = (float(f(torch.tensor([t], dtype=torch.float64))) for f in (process.alpha, process.sigma))
        square = (x_t.flatten(1).double()[:, None] - alpha * references).square().sum(2)
        mean = torch.softmax(-square / (2 * sigma**2), 1) @ references
        assert (target.x0.flatten(1) - mean).abs().max() < 1e-4

    # Compiled, it is the same.
    level = torch.linspace(0.5, 20, 16)
    arguments = (x0, sf.EDM().perturb(x0, level, generator=generator), level, None, index)
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images), noise_band=1.0, capacity=12)
    compiled = torch.compile(stable, fullgraph=True, backend="eager")
    assert (compiled(*arguments).x0 - stable(*arguments).x0).abs().max() < 1e-4

    # A U-Net trains a step on it, and a sampler runs.
    network = networks.SongUNet.ddpmpp(16, 3, base_channels=16, multipliers=(1, 2), blocks=1)
    denoiser = sf.Denoiser(network, sf.EDMPreconditioning(sigma_data=0.5))
    objective = sf.Objective(sf.EDM(), target=sf.StableTarget(sf.EDM(), references=sf.Pool(images)))
    objective(denoiser, x0, index=index, generator=generator).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())
    counted = sf.sampling.counted(denoiser.eval())
    with torch.no_grad():
        noise = torch.randn(2, 3, 16, 16, generator=generator) * 80
        samples = sf.sampling.heun(counted, noise, sf.sampling.edm_sigmas(18))
    assert samples.isfinite().all()
    assert counted.nfe == 35
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    print(json.dumps(versions | {"stablefield": sf.__version__}))


if __name__ == "__main__":
    main()
