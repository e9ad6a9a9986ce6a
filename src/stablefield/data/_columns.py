"""Find the columns of images and labels in a table by the type of their content.

Labels come from the column `label` or `labels` (class labels, whole numbers or texts) if there is one, else from the only
column of class labels. If several columns qualify, there are no labels, and a note says why.
"""

from collections.abc import Iterable, Mapping
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from stablefield.data._image_files import natural
from stablefield.data._image_set import check_class_names

__all__ = ["Labels", "image_column", "label_column", "read_labels"]

LABEL_LIMIT = 2**31
TEXT_LIMIT = 2**25
"""Limit on the total length of the distinct texts in a column of labels."""

Labels = tuple[NDArray[np.int64] | None, tuple[str, ...] | None, tuple[str, ...]]
"""Labels, class names, and notes for the user."""


def image_column(kinds: Mapping[str, str], rows: int, source: str) -> str:
    """The column of images.

    Args:
        kinds: the content of each column: "Image", "ClassLabel", "bytes", "number", "text", or another type name.
        rows: the number of rows.
        source: the table, for messages.

    Raises:
        ValueError: if there is not exactly one, or no row.
    """
    images = [column for column, kind in kinds.items() if kind == "Image"]
    # Without a description of the columns, images are plain bytes.
    images = images or [column for column, kind in kinds.items() if kind == "bytes"]
    image = images[0] if len(images) == 1 else next((name for name in ("image", "img") if name in images), None)
    if image is None or rows == 0:
        shown = ", ".join(f"{column} ({kind})" for column, kind in list(kinds.items())[:20])
        raise ValueError(
            f"{source} has {rows:,} rows with the columns {shown[:1000]}: it needs rows and exactly one column of images, "
            "or one called image."
        )
    return image


def label_column(kinds: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The column of labels or None, and a note if there is none because several qualify."""
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    called = [column for column in ("label", "labels") if kinds.get(column) in ("ClassLabel", "number", "text")]
    if not called and len(classes) > 1:
        columns = ", ".join(classes)[:1000]
        return None, (f"The columns {columns} all hold class labels and none is called label, so there are no labels.",)
    return next(iter([*called, *classes]), None), ()


def read_labels(column: str, kind: str, values: Iterable[object], names: tuple[str, ...] | None) -> Labels:
    """Labels from the values of a column.

    Args:
        column: its name.
        kind: "ClassLabel", "number" or "text".
        values: its values; None and numbers below 0 mean no label.
        names: the class names, for class labels.

    Raises:
        ValueError: if a number is too large for a label, the texts are too long for class names, or two classes have
            one name.
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
                        f"the column {column} holds more than {TEXT_LIMIT:,} letters of different texts, too many for class "
                        "names: rename the column, so that it is not read as labels."
                    )
            found.append(texts[value])
        else:
            found.append(int(value) if isinstance(value, Integral) and kind != "text" else -1)
    unlabelled = sum(value < 0 for value in found)
    if unlabelled:
        note = (
            f"{unlabelled:,} of {len(found):,} rows have no label in the column {column} (none, or below 0), so the labels "
            "are ignored."
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
    check_class_names(f"the column {column}", names)
    return np.array(found, np.int64), names, ()
