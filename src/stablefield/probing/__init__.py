"""The variance of training targets on one's own data, and what follows from it.

`stablefield.probe` does it all in one call: it returns a `Probe`, or a `NetworkProbe` for a run. `probe_data`,
`probe_network` and `probe_bias` are its parts, for tensors, networks and policies of one's own. Below them,
`measure_variance` measures it against the noise level, `measure_batch` that of whole batches; `find_phases` and `advise`
read them; `LossFloor` is what it makes of a training loss; `measure_fit` holds a network against the exact posterior mean;
`check_bias` tests that a target is unbiased.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
