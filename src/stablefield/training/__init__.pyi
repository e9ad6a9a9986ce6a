from stablefield.training._allocator import keep_freed_memory as keep_freed_memory
from stablefield.training._compare import compare as compare
from stablefield.training._comparison import Comparison as Comparison
from stablefield.training._initial_weights import InitialWeights as InitialWeights
from stablefield.training._loop import Observer as Observer
from stablefield.training._loop import Report as Report
from stablefield.training._loop import TrainingError as TrainingError
from stablefield.training._model import OpenModel as OpenModel
from stablefield.training._model import open_model as open_model
from stablefield.training._plan import Plan as Plan
from stablefield.training._plan import make_plan as make_plan
from stablefield.training._post_hoc import combine as combine
from stablefield.training._recipe import DiffusersUNetConfig as DiffusersUNetConfig
from stablefield.training._recipe import MLPConfig as MLPConfig
from stablefield.training._recipe import Recipe as Recipe
from stablefield.training._recipe import SiTConfig as SiTConfig
from stablefield.training._recipe import SongUNetConfig as SongUNetConfig
from stablefield.training._recipes import (
    CELEBA64_VE as CELEBA64_VE,
)
from stablefield.training._recipes import (
    CIFAR10_EDM as CIFAR10_EDM,
)
from stablefield.training._recipes import (
    CIFAR10_VE as CIFAR10_VE,
)
from stablefield.training._recipes import (
    CIFAR10_VP as CIFAR10_VP,
)
from stablefield.training._recipes import (
    DIGITS as DIGITS,
)
from stablefield.training._recipes import (
    MNIST28 as MNIST28,
)
from stablefield.training._recipes import (
    imagefolder as imagefolder,
)
from stablefield.training._recipes import recipe_for as recipe_for
from stablefield.training._recipes import sit as sit
from stablefield.training._recipes import (
    unet2d as unet2d,
)
from stablefield.training._run import Run as Run
from stablefield.training._run_config import Extension as Extension
from stablefield.training._run_config import RunConfig as RunConfig
from stablefield.training._run_folder import RunFolder as RunFolder
from stablefield.training._run_report import RunReport as RunReport
from stablefield.training._sampler import SamplerOptions as SamplerOptions
from stablefield.training._samples import Samples as Samples
from stablefield.training._train import train as train
