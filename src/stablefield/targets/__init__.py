"""Low-variance training targets: the posterior over a reference set in place of the one sample that made x_t.

The names are re-exported by `stablefield` itself; this file imports nothing, so that each module stands alone.
"""
