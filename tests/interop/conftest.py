"""Tests about diffusers are left out where it is not installed."""

import importlib.util

_ABOUT_DIFFUSERS = ["test_schedulers.py", "test_export.py", "test_exported_pipeline.py", "test_push.py"]

collect_ignore = [] if importlib.util.find_spec("diffusers") else _ABOUT_DIFFUSERS
