"""The built-in data set: 1,797 handwritten digits of 8 x 8 pixels, ten classes, real data in 45 KiB.

Grey levels are counts v from 0 to 16 in the source; here they are (255 v + 8) // 16, the nearest whole number to
255 v / 16, so that 0 stays 0, 16 becomes 255, and round(16 p / 255) recovers v.

References:
    Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
    doi:10.24432/C50P49, CC BY 4.0 (its test part; the file digits-LICENSE.txt is beside this module).
"""

from importlib.resources import as_file, files

import numpy as np

from stablefield.data._image_set import ImageSet, Origin, make_image_set

__all__ = ["open_digits"]


def open_digits() -> ImageSet:
    """The digits as shipped: 1,797 greyscale images of 8 x 8 pixels with labels 0 to 9."""
    with as_file(files("stablefield.data") / "digits.npz") as path, np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    origin = Origin(
        name="digits",
        source="UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998, CC BY 4.0), built in",
        class_names=tuple("0123456789"),
    )
    return make_image_set(images, labels, origin)
