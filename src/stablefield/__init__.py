"""Low-variance training targets for any Gaussian diffusion or flow model.

import stablefield as sf

stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images))
target = stable(x0, x_t, sigma, index=index)  # then regress on target.x0, .noise, .score, .v or .velocity
"""

# ruff: noqa: F403, F405
import importlib
import typing

if typing.TYPE_CHECKING:
    from stablefield.public import *

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "Denoiser",
    "DenoisingTarget",
    "Discrete",
    "EDMPreconditioning",
    "EDMWeighting",
    "FlowWeighting",
    "GaussianKernel",
    "InBatch",
    "LogNormal",
    "LogUniform",
    "NoiseBand",
    "Objective",
    "ObjectiveValue",
    "Pool",
    "Posterior",
    "Process",
    "RankError",
    "RectifiedFlow",
    "Regression",
    "SNRWeighting",
    "ShardedPool",
    "StableTarget",
    "StudentTKernel",
    "Target",
    "Uniform",
    "VEPreconditioning",
    "VPPreconditioning",
    "from_diffusers",
    "pick_noise_band",
    "posterior",
    "sampling",
]


def __getattr__(name: str) -> typing.Any:
    """Import the public names when one of them is first asked for.

    So the command can say what there is, and what a mistyped flag may have meant, without waiting for torch.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module("stablefield.public")
    globals().update({known: getattr(public, known) for known in __all__})
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
