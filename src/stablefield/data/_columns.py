"""Find the columns of images and labels in a table by the type of their content.

Labels come from the column `label` or `labels` if it holds class labels, whole numbers or texts, else from the only column
of class labels, else from `label` or `labels` of whole numbers stored as floats, or of truth values. If several columns
qualify, none does but one seems to hold labels, or a row has none, there are no labels, and a note says why.
"""

import math
from collections.abc import Iterable, Mapping
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from stablefield.data._image_files import names_labels, natural
from stablefield.data._image_set import CLASS_LIMIT, check_class_names

__all__ = ["Labels", "image_column", "label_column", "read_labels"]

_CLASSES = ("ClassLabel", "number", "text")
"""The kinds of columns that hold classes."""
_READ = (*_CLASSES, "float", "bool")
"""The kinds of columns that labels are read from; floats may be other quantities, such as prices or times."""
_UNREAD = {
    "list": "lists",
    "large_list": "lists",
    "fixed_size_list": "lists",
    "sequence": "lists",
    "null": "no values",
    "struct": "records",
    "bytes": "bytes",
    "image": "images",
    "timestamp": "times",
    "date": "dates",
    "decimal": "decimal numbers",
}
"""Plain words for how the other kinds begin, which are names of Arrow and of `datasets`."""
LABEL_LIMIT = 2**31
TEXT_LIMIT = 2**25
"""Limit on the total length of the distinct texts in a column of labels."""

Labels = tuple[NDArray[np.int64] | None, tuple[str, ...] | None, tuple[str, ...]]
"""Labels, class names, and notes for the user."""


def image_column(kinds: Mapping[str, str], rows: int, source: str) -> str:
    """The column of images.

    Args:
        kinds: the content of each column: "Image", "ClassLabel", "bytes", "number", "float", "bool", "text", or another type
            name.
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
    """The column of labels or None, and a note if there is none although a column seems to hold them."""
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    called = [column for column in ("label", "labels") if column in kinds]
    found = [column for column in called if kinds[column] in _CLASSES]
    found += classes if len(classes) == 1 else []
    found += [column for column in called if kinds[column] in _READ]
    if found:
        return found[0], ()
    if classes:
        columns = ", ".join(classes)[:1000]
        return None, (
            f"The columns {columns} all hold class labels and none is called label, so there are no labels: rename one.",
        )
    if called:
        kind = kinds[called[0]]
        what = next(
            (words for name, words in _UNREAD.items() if kind.lower().startswith(name)), f"values of type {kind}"
        )
        return None, (
            f"The column {called[0]} holds {what}, so there are no labels: write a class number from 0, or a "
            "text, in each row.",
        )
    similar = [column for column, kind in kinds.items() if kind in _READ and names_labels(column)]
    if similar:
        columns = ", ".join(similar)[:1000]
        which = f"the column {columns} holds" if len(similar) == 1 else f"one of the columns {columns} holds"
        return None, (f"No column is called label, so there are no labels: if {which} them, rename it label.",)
    return None, ()


def read_labels(column: str, kind: str, values: Iterable[object], names: tuple[str, ...] | None) -> Labels:
    """Labels from the values of a column.

    Args:
        column: its name.
        kind: "ClassLabel", "number", "float", "bool" or "text".
        values: its values; None, NaN and numbers below 0 mean no label.
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
        elif not isinstance(value, Real) or kind == "text" or value < 0 or math.isnan(value):
            found.append(-1)
        elif isinstance(value, int):
            found.append(int(value))
        elif float(value).is_integer():
            found.append(int(float(value)))
        else:
            note = (
                f"The column {column} holds {value}, which is no class number, so the labels are ignored: write whole "
                "numbers from 0."
            )
            return None, None, (note,)
    unlabelled = sum(value < 0 for value in found)
    if unlabelled:
        note = (
            f"{unlabelled:,} of {len(found):,} rows have no label in the column {column} (none, or below 0), so the labels "
            "are ignored: give each row a label, or leave these rows out."
        )
        return None, None, (note,)
    most = max(CLASS_LIMIT, len(found))
    if kind == "float" and max(found) >= most:
        note = (
            f"The column {column} holds {max(found)}, and class numbers run from 0 to {most - 1:,}, so the labels are "
            "ignored: number the classes 0, 1, 2, ..."
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
