"""Which columns of a table are its images and its labels, by what each column holds.

The label is the column `label` or `labels` if there is one, of class labels, whole numbers or texts, else the only column of
class labels; where there are candidates and no labels, a note says why.
"""

from collections.abc import Iterable, Mapping
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from stablefield.data._image_files import natural

__all__ = ["Labels", "image_column", "label_column", "read_labels"]

LABEL_LIMIT = 2**31
TEXT_LIMIT = 2**25
"""Letters that the different texts of a column of labels may have together."""

Labels = tuple[NDArray[np.int64] | None, tuple[str, ...] | None, tuple[str, ...]]
"""Labels, names of the classes, and what a person should know of them."""


def image_column(kinds: Mapping[str, str], rows: int, source: str) -> str:
    """The column of images.

    Args:
        kinds: what each column holds: "Image", "ClassLabel", "bytes", "number", "text", or another name of its type.
        rows: how many rows there are.
        source: the table, for messages.

    Raises:
        ValueError: if there is not exactly one, or no row.
    """
    images = [column for column, kind in kinds.items() if kind == "Image"]
    # Without a description of columns, an image is its bytes.
    images = images or [column for column, kind in kinds.items() if kind == "bytes"]
    image = images[0] if len(images) == 1 else next((name for name in ("image", "img") if name in images), None)
    if image is None or rows == 0:
        shown = ", ".join(f"{column} ({kind})" for column, kind in list(kinds.items())[:20])
        raise ValueError(
            f"{source} has {rows:,} rows with the columns {shown[:1000]}: exactly one column of images, or one that is "
            "called image, is needed."
        )
    return image


def label_column(kinds: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The column of labels, if there is one, and a note on why there is none where several may be."""
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    called = [column for column in ("label", "labels") if kinds.get(column) in ("ClassLabel", "number", "text")]
    if not called and len(classes) > 1:
        columns = ", ".join(classes)[:1000]
        return None, (f"The columns {columns} all hold class labels and none is called label, so there are no labels.",)
    return next(iter([*called, *classes]), None), ()


def read_labels(column: str, kind: str, values: Iterable[object], names: tuple[str, ...] | None) -> Labels:
    """Labels from the values of a column.

    Args:
        column: what it is called.
        kind: "ClassLabel", "number" or "text".
        values: its values; None and numbers below 0 are no labels.
        names: what its classes are called, for class labels.

    Raises:
        ValueError: if a number is too large for a label, or the texts are too long for names of classes.
    """
    texts: dict[str, int] = {}
    length = 0
    found: list[int] = []
    for value in values:
        if isinstance(value, str) and kind == "text":
            if value not in texts:
                texts[value] = len(texts)
                length += len(value)
                if length > TEXT_LIMIT:
                    raise ValueError(
                        f"the column {column} holds more than {TEXT_LIMIT:,} letters of different texts, too many for names "
                        "of classes: rename it, so that it is not taken for labels."
                    )
            found.append(texts[value])
        else:
            found.append(int(value) if isinstance(value, Integral) and kind != "text" else -1)
    unlabelled = sum(value < 0 for value in found)
    if unlabelled:
        note = (
            f"{unlabelled:,} of {len(found):,} rows have no label in the column {column} (none, or below 0), so the labels "
            "are left out."
        )
        return None, None, (note,)
    if kind == "text":
        names = tuple(sorted(texts, key=natural))
        number = {texts[name]: i for i, name in enumerate(names)}
        return np.array([number[value] for value in found], np.int64), names, ()
    if max(found) >= LABEL_LIMIT:
        raise ValueError(
            f"the column {column} holds {max(found)}: a label is a whole number from 0 to {LABEL_LIMIT - 1:,}."
        )
    return np.array(found, np.int64), names, ()
