"""Training: a recipe, the loop that follows it, and the folder of a run."""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
