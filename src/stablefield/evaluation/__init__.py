"""Numbers that can be compared: metrics on feature arrays, the extractors that make features, and the protocol record.

`evaluate` measures images, or the samples of a run, against real images. Metrics are functions of feature arrays too, and
as such need torch alone; `evaluate` needs the extra: `pip install stablefield[evaluate]`.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
