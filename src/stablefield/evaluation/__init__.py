"""Numbers that can be compared: metrics on feature arrays, the extractors that make features, and the protocol record.

`evaluate` measures images, or the samples of a run, against real images, and needs the extra
`pip install stablefield[evaluate]`. The metrics are also functions of feature arrays, and as such need torch alone.
"""

from stablefield._lazy import attach

__getattr__, __dir__ = attach(__name__, __file__)
