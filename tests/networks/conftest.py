"""The test about diffusers is left out where it is not installed."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("diffusers") else ["test_diffusers_unet.py"]
