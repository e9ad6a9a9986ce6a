"""The variance of training targets on your data, and the advice that follows.

`stablefield.probe` does everything in one call: it returns a `Probe`, or a `NetworkProbe` for a network or a run.
`probe_data`, `probe_network` and `probe_bias` are its parts, for your own tensors, networks and reference policies. Below
them, `measure_variance` measures the variance against the noise level and `measure_batch` that of whole batches;
`find_phases` and `advise` interpret them; `LossFloor` is the part of a training loss that it causes; `measure_fit` compares
a network with the exact posterior mean; `measure_ledger` splits the variance of its gradient; `check_bias` tests that a
target is unbiased.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
