"""Interoperability: diffusers' schedulers, networks and pipelines, and published checkpoints.

`stablefield` itself imports nothing from here; each module imports its library where it uses it.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
