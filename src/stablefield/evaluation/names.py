"""What a number may be called.

FID is the Frechet distance on one network, KID the kernel distance on it: the I is that network's. The same formula on
other features has other values, and is named after its extractor.
"""

from stablefield.evaluation.extractor import Extractor
from stablefield.evaluation.inception import Inception

__all__ = ["frechet_name", "kernel_name"]


def frechet_name(extractor: Extractor) -> str:
    """The name of a Frechet distance on the features of `extractor`.

    "FID" for FID's own Inception and resize rule; "FID (resize RULE)" for that network after another rule;
    "Frechet distance (NAME)" for everything else, whatever it calls itself.
    """
    return _name("FID", "Frechet distance", extractor)


def kernel_name(extractor: Extractor) -> str:
    """The name of a kernel distance on the features of `extractor`: "KID", by the rules of `frechet_name`."""
    return _name("KID", "kernel distance", extractor)


def _name(own: str, general: str, extractor: Extractor) -> str:
    # The class itself, which has checked its weights; a subclass may compute anything.
    if type(extractor) is not Inception:
        return f"{general} ({extractor.name})"
    return own if extractor.standard else f"{own} (resize {extractor.resize})"
