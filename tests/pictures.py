"""Pictures beside what a test is about: small or empty, where it only needs that there is one.

What they show is held by tests that ask for `whole_pictures`, and by those of charts and pages.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from stablefield.report import _drawing
from stablefield.sampling import edm_sigmas
from stablefield.training import _loop, _report_writer

_WHOLE = {"SAMPLE_SEEDS": _loop.SAMPLE_SEEDS, "draw_samples": _loop.draw_samples}


def draw_small_pictures() -> None:
    """Draw four images in two steps instead of 64 in 18, and no reports on the way, for the rest of this process."""
    _loop.SAMPLE_SEEDS = range(4)
    _report_writer.FIRST = math.inf
    _loop.draw_samples = partial(_loop.draw_samples, sigmas=edm_sigmas(2))


@contextmanager
def whole_pictures() -> Generator[None]:
    """Draw the pictures that users see."""
    with patch.multiple(_loop, **_WHOLE):
        yield


@contextmanager
def empty_charts() -> Generator[None]:
    """Leave charts empty: matplotlib takes a fifth of a second for each that it draws, and a command draws up to six."""
    with patch.object(_drawing, "_draw", lambda *_: None):
        yield
