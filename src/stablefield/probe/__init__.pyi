from stablefield.probe.advice import Advice as Advice
from stablefield.probe.advice import advise as advise
from stablefield.probe.batch import BatchVariance as BatchVariance
from stablefield.probe.batch import measure_batch as measure_batch
from stablefield.probe.bias import BiasCheck as BiasCheck
from stablefield.probe.bias import check_bias as check_bias
from stablefield.probe.fit import (
    Fit as Fit,
)
from stablefield.probe.fit import (
    Optimum as Optimum,
)
from stablefield.probe.fit import (
    find_optimum as find_optimum,
)
from stablefield.probe.fit import (
    measure_fit as measure_fit,
)
from stablefield.probe.floor import LossFloor as LossFloor
from stablefield.probe.phases import Phases as Phases
from stablefield.probe.phases import find_phases as find_phases
from stablefield.probe.training import Training as Training
from stablefield.probe.variance import VarianceCurve as VarianceCurve
from stablefield.probe.variance import measure_variance as measure_variance
