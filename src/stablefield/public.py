"""The names that `import stablefield as sf` offers, from the modules that define them."""

from stablefield import sampling
from stablefield.diffusion.discrete import Discrete
from stablefield.diffusion.noise_levels import LogNormal, LogUniform, Uniform
from stablefield.diffusion.objective import Objective, ObjectiveValue
from stablefield.diffusion.preconditioning import (
    Denoiser,
    EDMPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
)
from stablefield.diffusion.process import EDM, VE, VP, Cosine, Process, RectifiedFlow
from stablefield.diffusion.scheduler import Regression, from_diffusers
from stablefield.diffusion.weighting import EDMWeighting, FlowWeighting, SNRWeighting
from stablefield.targets.band import NoiseBand, pick_noise_band
from stablefield.targets.kernel import GaussianKernel, StudentTKernel
from stablefield.targets.pool import Pool
from stablefield.targets.posterior import Posterior, posterior
from stablefield.targets.ranks import RankError
from stablefield.targets.references import InBatch
from stablefield.targets.sharded import ShardedPool
from stablefield.targets.stable_target import DenoisingTarget, StableTarget
from stablefield.targets.target import Target

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
