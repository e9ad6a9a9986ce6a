from stablefield.training.allocator import keep_freed_memory as keep_freed_memory
from stablefield.training.compare import Comparison as Comparison
from stablefield.training.compare import compare as compare
from stablefield.training.loop import Observer as Observer
from stablefield.training.loop import Report as Report
from stablefield.training.loop import TrainingError as TrainingError
from stablefield.training.model import OpenModel as OpenModel
from stablefield.training.model import open_model as open_model
from stablefield.training.post_hoc import combine as combine
from stablefield.training.recipe import Perceptron as Perceptron
from stablefield.training.recipe import Recipe as Recipe
from stablefield.training.recipe import UNet as UNet
from stablefield.training.recipe import UNet2D as UNet2D
from stablefield.training.recipes import (
    CELEBA64_VE as CELEBA64_VE,
)
from stablefield.training.recipes import (
    CIFAR10_EDM as CIFAR10_EDM,
)
from stablefield.training.recipes import (
    CIFAR10_VE as CIFAR10_VE,
)
from stablefield.training.recipes import (
    CIFAR10_VP as CIFAR10_VP,
)
from stablefield.training.recipes import (
    DIGITS as DIGITS,
)
from stablefield.training.recipes import (
    MNIST28 as MNIST28,
)
from stablefield.training.recipes import (
    imagefolder as imagefolder,
)
from stablefield.training.recipes import recipe_for as recipe_for
from stablefield.training.recipes import (
    unet2d as unet2d,
)
from stablefield.training.run import Plan as Plan
from stablefield.training.run import Run as Run
from stablefield.training.run import make_plan as make_plan
from stablefield.training.run import train as train
from stablefield.training.run_folder import RunConfig as RunConfig
from stablefield.training.run_folder import RunFolder as RunFolder
from stablefield.training.sampler import SamplerOptions as SamplerOptions
from stablefield.training.samples import Samples as Samples
