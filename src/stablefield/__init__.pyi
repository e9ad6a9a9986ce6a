from stablefield._bench import Benchmark as Benchmark
from stablefield._bench import benchmark as benchmark
from stablefield._distributed import RankError as RankError
from stablefield._doctor import CheckUp as CheckUp
from stablefield._doctor import check_machine as check_machine
from stablefield.diffusion._discrete import Discrete as Discrete
from stablefield.diffusion._from_diffusers import Regression as Regression
from stablefield.diffusion._from_diffusers import from_diffusers as from_diffusers
from stablefield.diffusion._importance_sampling import ImportanceSampling as ImportanceSampling
from stablefield.diffusion._noise_levels import LogNormal as LogNormal
from stablefield.diffusion._noise_levels import LogUniform as LogUniform
from stablefield.diffusion._noise_levels import NoiseLevels as NoiseLevels
from stablefield.diffusion._noise_levels import Uniform as Uniform
from stablefield.diffusion._objective import Objective as Objective
from stablefield.diffusion._objective import ObjectiveValue as ObjectiveValue
from stablefield.diffusion._preconditioning import (
    DDPMPreconditioning as DDPMPreconditioning,
)
from stablefield.diffusion._preconditioning import (
    Denoiser as Denoiser,
)
from stablefield.diffusion._preconditioning import (
    EDMPreconditioning as EDMPreconditioning,
)
from stablefield.diffusion._preconditioning import (
    FlowPreconditioning as FlowPreconditioning,
)
from stablefield.diffusion._preconditioning import (
    VEPreconditioning as VEPreconditioning,
)
from stablefield.diffusion._preconditioning import (
    VPPreconditioning as VPPreconditioning,
)
from stablefield.diffusion._process import (
    EDM as EDM,
)
from stablefield.diffusion._process import (
    VE as VE,
)
from stablefield.diffusion._process import (
    VP as VP,
)
from stablefield.diffusion._process import (
    Cosine as Cosine,
)
from stablefield.diffusion._process import (
    Process as Process,
)
from stablefield.diffusion._process import (
    RectifiedFlow as RectifiedFlow,
)
from stablefield.diffusion._weighting import (
    EDMWeighting as EDMWeighting,
)
from stablefield.diffusion._weighting import (
    FlowWeighting as FlowWeighting,
)
from stablefield.diffusion._weighting import (
    SNRWeighting as SNRWeighting,
)
from stablefield.evaluation._evaluate import evaluate as evaluate
from stablefield.probing._excess_loss import ExcessLoss as ExcessLoss
from stablefield.targets._band import NoiseBand as NoiseBand
from stablefield.targets._band import pick_noise_band as pick_noise_band
from stablefield.targets._perturbation_kernel import GaussianKernel as GaussianKernel
from stablefield.targets._perturbation_kernel import StudentTKernel as StudentTKernel
from stablefield.targets._pool import Pool as Pool
from stablefield.targets._posterior import Posterior as Posterior
from stablefield.targets._posterior import posterior as posterior
from stablefield.targets._references import InBatch as InBatch
from stablefield.targets._sharded import ShardedPool as ShardedPool
from stablefield.targets._stable_target import DenoisingTarget as DenoisingTarget
from stablefield.targets._stable_target import StableTarget as StableTarget
from stablefield.targets._target import Target as Target
from stablefield.training._compare import compare as compare
from stablefield.training._run import Run as Run
from stablefield.training._run_probe import probe as probe
from stablefield.training._train import train as train

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
