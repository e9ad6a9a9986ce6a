from stablefield.probing.advice import Advice as Advice
from stablefield.probing.advice import advise as advise
from stablefield.probing.batch import BatchVariance as BatchVariance
from stablefield.probing.batch import measure_batch as measure_batch
from stablefield.probing.bias import BiasCheck as BiasCheck
from stablefield.probing.bias import check_bias as check_bias
from stablefield.probing.bias_probe import BiasProbe as BiasProbe
from stablefield.probing.bias_probe import probe_bias as probe_bias
from stablefield.probing.fit import (
    Fit as Fit,
)
from stablefield.probing.fit import (
    Optimum as Optimum,
)
from stablefield.probing.fit import (
    find_optimum as find_optimum,
)
from stablefield.probing.fit import (
    measure_fit as measure_fit,
)
from stablefield.probing.floor import LossFloor as LossFloor
from stablefield.probing.network_probe import NetworkProbe as NetworkProbe
from stablefield.probing.network_probe import probe_network as probe_network
from stablefield.probing.phases import Phases as Phases
from stablefield.probing.phases import find_phases as find_phases
from stablefield.probing.population import Population as Population
from stablefield.probing.population import draw_population as draw_population
from stablefield.probing.probe import Probe as Probe
from stablefield.probing.probe import probe_data as probe_data
from stablefield.probing.training import TRAININGS as TRAININGS
from stablefield.probing.training import Training as Training
from stablefield.probing.variance import VarianceCurve as VarianceCurve
from stablefield.probing.variance import measure_variance as measure_variance
