"""The picture that a run draws of its samples: a small one in tests, of which most only need that there is one.

What it shows is held by tests that ask for `whole_pictures`.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from stablefield.sampling import edm_sigmas
from stablefield.training import _loop, _run_report

_WHOLE = {"SAMPLE_SEEDS": _loop.SAMPLE_SEEDS, "samples": _loop.samples}


def draw_small_pictures() -> None:
    """Draw four images in two steps instead of 64 in 18, and no reports on the way, for the rest of this process."""
    _loop.SAMPLE_SEEDS = range(4)
    _run_report.FIRST = math.inf
    _loop.samples = partial(_loop.samples, sigmas=edm_sigmas(2))


@contextmanager
def whole_pictures() -> Generator[None]:
    """Draw the pictures that users see."""
    with patch.multiple(_loop, **_WHOLE):
        yield
