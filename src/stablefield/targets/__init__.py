"""Low-variance training targets: the posterior over a reference set instead of the one sample that made x_t.

`stablefield` itself re-exports the names; this file imports nothing, so that you can import each module alone.
"""
