from stablefield.diffusion.discrete import Discrete as Discrete
from stablefield.diffusion.noise_levels import LogNormal as LogNormal
from stablefield.diffusion.noise_levels import LogUniform as LogUniform
from stablefield.diffusion.noise_levels import Uniform as Uniform
from stablefield.diffusion.objective import Objective as Objective
from stablefield.diffusion.objective import ObjectiveValue as ObjectiveValue
from stablefield.diffusion.preconditioning import (
    Denoiser as Denoiser,
)
from stablefield.diffusion.preconditioning import (
    EDMPreconditioning as EDMPreconditioning,
)
from stablefield.diffusion.preconditioning import (
    VEPreconditioning as VEPreconditioning,
)
from stablefield.diffusion.preconditioning import (
    VPPreconditioning as VPPreconditioning,
)
from stablefield.diffusion.process import (
    EDM as EDM,
)
from stablefield.diffusion.process import (
    VE as VE,
)
from stablefield.diffusion.process import (
    VP as VP,
)
from stablefield.diffusion.process import (
    Cosine as Cosine,
)
from stablefield.diffusion.process import (
    Process as Process,
)
from stablefield.diffusion.process import (
    RectifiedFlow as RectifiedFlow,
)
from stablefield.diffusion.scheduler import Regression as Regression
from stablefield.diffusion.scheduler import from_diffusers as from_diffusers
from stablefield.diffusion.weighting import (
    EDMWeighting as EDMWeighting,
)
from stablefield.diffusion.weighting import (
    FlowWeighting as FlowWeighting,
)
from stablefield.diffusion.weighting import (
    SNRWeighting as SNRWeighting,
)
from stablefield.evaluation.evaluate import evaluate as evaluate
from stablefield.targets.band import NoiseBand as NoiseBand
from stablefield.targets.band import pick_noise_band as pick_noise_band
from stablefield.targets.kernel import GaussianKernel as GaussianKernel
from stablefield.targets.kernel import StudentTKernel as StudentTKernel
from stablefield.targets.pool import Pool as Pool
from stablefield.targets.posterior import Posterior as Posterior
from stablefield.targets.posterior import posterior as posterior
from stablefield.targets.ranks import RankError as RankError
from stablefield.targets.references import InBatch as InBatch
from stablefield.targets.sharded import ShardedPool as ShardedPool
from stablefield.targets.stable_target import DenoisingTarget as DenoisingTarget
from stablefield.targets.stable_target import StableTarget as StableTarget
from stablefield.targets.target import Target as Target
from stablefield.training.compare import compare as compare
from stablefield.training.run import Run as Run
from stablefield.training.run import train as train
from stablefield.training.run_probe import probe as probe

from . import (
    data as data,
)
from . import (
    evaluation as evaluation,
)
from . import (
    interop as interop,
)
from . import (
    networks as networks,
)
from . import (
    probing as probing,
)
from . import (
    sampling as sampling,
)
from . import (
    training as training,
)

__version__: str
