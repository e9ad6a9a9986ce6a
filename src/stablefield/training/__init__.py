"""Training: a recipe, the loop that follows it, and the folder in which a run lives."""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
