from stablefield.probing._advice import Advice as Advice
from stablefield.probing._advice import advise as advise
from stablefield.probing._batch import BatchVariance as BatchVariance
from stablefield.probing._batch import measure_batch as measure_batch
from stablefield.probing._bias import BiasCheck as BiasCheck
from stablefield.probing._bias import check_bias as check_bias
from stablefield.probing._bias_probe import BiasProbe as BiasProbe
from stablefield.probing._bias_probe import probe_bias as probe_bias
from stablefield.probing._excess import Excess as Excess
from stablefield.probing._fit import (
    Fit as Fit,
)
from stablefield.probing._fit import (
    Optimum as Optimum,
)
from stablefield.probing._fit import (
    find_optimum as find_optimum,
)
from stablefield.probing._fit import (
    measure_fit as measure_fit,
)
from stablefield.probing._floor import LossFloor as LossFloor
from stablefield.probing._network_probe import NetworkProbe as NetworkProbe
from stablefield.probing._network_probe import probe_network as probe_network
from stablefield.probing._phases import Phases as Phases
from stablefield.probing._phases import find_phases as find_phases
from stablefield.probing._population import Population as Population
from stablefield.probing._population import draw_population as draw_population
from stablefield.probing._probe import Probe as Probe
from stablefield.probing._probe import probe_data as probe_data
from stablefield.probing._training import TRAININGS as TRAININGS
from stablefield.probing._training import Training as Training
from stablefield.probing._variance import VarianceCurve as VarianceCurve
from stablefield.probing._variance import measure_variance as measure_variance
from stablefield.probing._variance_ledger import Lever as Lever
from stablefield.probing._variance_ledger import VarianceLedger as VarianceLedger
from stablefield.probing._variance_ledger import measure_ledger as measure_ledger
