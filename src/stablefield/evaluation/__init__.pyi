from stablefield.evaluation.extractor import Extractor as Extractor
from stablefield.evaluation.extractor import RawPixels as RawPixels
from stablefield.evaluation.frechet import (
    FrechetDistance as FrechetDistance,
)
from stablefield.evaluation.frechet import (
    frechet_distance as frechet_distance,
)
from stablefield.evaluation.frechet import (
    frechet_distance_from_features as frechet_distance_from_features,
)
from stablefield.evaluation.inception import Inception as Inception
from stablefield.evaluation.inception_score import InceptionScore as InceptionScore
from stablefield.evaluation.inception_score import inception_score as inception_score
from stablefield.evaluation.kernel import KernelDistance as KernelDistance
from stablefield.evaluation.kernel import kernel_distance as kernel_distance
from stablefield.evaluation.manifold import (
    ManifoldScore as ManifoldScore,
)
from stablefield.evaluation.manifold import (
    coverage as coverage,
)
from stablefield.evaluation.manifold import (
    density as density,
)
from stablefield.evaluation.manifold import (
    precision as precision,
)
from stablefield.evaluation.manifold import (
    recall as recall,
)
from stablefield.evaluation.memorisation import NearestRatio as NearestRatio
from stablefield.evaluation.memorisation import nearest_ratio as nearest_ratio
from stablefield.evaluation.protocol import Protocol as Protocol
from stablefield.evaluation.protocol import ProtocolWarning as ProtocolWarning
from stablefield.evaluation.random_convolutions import RandomConvolutions as RandomConvolutions
from stablefield.evaluation.torchscript import TorchScriptExtractor as TorchScriptExtractor
from stablefield.evaluation.torchscript import dinov2 as dinov2
