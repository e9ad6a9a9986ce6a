"""Warnings that name the user's own line, however many frames of this package and of torch lie between."""

import inspect
import os
import warnings
from pathlib import Path

import torch

__all__ = ["warn"]

_INSIDE = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent, Path(torch.__file__).parent))


def warn(message: str) -> None:
    """Warn at the first frame outside this package and torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level + 1)
