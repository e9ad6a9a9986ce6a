"""The forward process and what is trained on it: noise levels, weighting, preconditioning, objective.

The names are re-exported by `stablefield` itself; this file stays empty, so that `stablefield.targets` can import
`stablefield.diffusion._process` without the modules that stand on the targets.
"""
