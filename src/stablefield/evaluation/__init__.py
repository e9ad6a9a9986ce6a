"""Numbers that can be compared: metrics on feature arrays, the extractors that make features, and the protocol record.

Metrics are pure functions of feature arrays and need torch alone. `stablefield.evaluation.streaming` (torchmetrics) and
the extractors' weights come with the extra: `pip install stablefield[evaluate]`.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
