"""Other people's libraries and files: diffusers' schedulers, networks and pipelines, and published checkpoints.

Nothing here is imported by `stablefield` itself; each module imports the library it is about where it uses it.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
