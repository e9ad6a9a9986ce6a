"""The forward process and the training objective: noise levels, weighting, preconditioning, objective.

`stablefield` itself re-exports the names. This file imports nothing, so that `stablefield.targets` can import
`stablefield.diffusion._process` without the modules that depend on the targets.
"""
