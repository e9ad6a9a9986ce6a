"""A collection of image files: the names in a folder or a .zip archive, how to open each, and their labels.

Files are recognised by their suffix, ordered by name, and found in sub-folders too. Names that begin with a dot and
`__MACOSX` are skipped. Names are relative to the deepest folder that holds all images. Then,

- if every name begins with a word for a split (train, val, test, ...), and at least two of them occur, only the files of
  the requested split are read;
- labels come from `dataset.json`, `{"labels": [["a/b.png", 3], ...]}` with names relative to its folder, if there is one
  (its labels may be null: none);
- a table, such as metadata.csv, is not read, and a note says so if there are no labels;
- otherwise, if every image lies in exactly one level of sub-folder, and there are at least two, the sub-folders are the
  classes. They are numbered in the natural order of their names (2 before 10), in every split as in the training split.
  If images lie elsewhere, there are no classes, and the manifest notes why if others lie so. It also notes folders that
  seem to be splits and do not count as such, whose images are all read.
"""

import json
import os
import re
import reprlib
import zipfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stablefield._regular_file import JSON_LIMIT, open_regular
from stablefield.data._archive import Archive, EntryFile
from stablefield.data._image_set import MissingSplitError

__all__ = [
    "METADATA",
    "NOTED",
    "SPLITS",
    "SUFFIXES",
    "ChosenFiles",
    "ImageFiles",
    "choose_files",
    "common_folder",
    "folder_files",
    "hidden",
    "names_labels",
    "natural",
    "read_documents",
    "split_word",
    "stamp",
    "table_note",
    "zip_files",
]

SUFFIXES = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".tga",
        ".avif",
    ]
)
_UNREAD = frozenset(
    [".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".psd", ".exr", ".hdr"]
)
"""Suffixes of images that are not read; a note says how many files have one."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables beside images that may hold their labels; `datasets` reads them, and so does the hub's conversion."""
_TABLES = frozenset([".csv", ".tsv", ".jsonl", ".json", ".txt"])
"""Suffixes of other tables, if their names say that they hold labels."""
_LABEL_WORDS = frozenset(["label", "labels", "class", "classes", "cls", "target", "targets", "category", "categories"])
_FOLLOWING = frozenset(["id", "ids", "name", "names", "number", "numbers"])
"""Words that may follow those, beside words for a split."""
NOTED = 200
"""Letters of a name in a note: notes go into the header of a packed file."""
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_GENERIC = "(sets?|data|images?|imgs?|splits?)+$"
"""Ends of words of a folder's name that say nothing about its images."""
_SPLIT_OF = {word: key for key, words in SPLITS.items() for word in words}

DOCUMENT_SHARE = 512
"""Bytes that a dataset.json may have for each file beside it, beyond the limit for any JSON."""


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Image files with their labels; nothing is decoded yet."""

    names: tuple[str, ...]
    """Each file's name in messages."""
    open: Callable[[int], BinaryIO | EntryFile]
    """Open file i for reading; may be called from several threads."""
    labels: NDArray[np.int64] | None
    """Class numbers, shape (n,), or None."""
    class_names: tuple[str, ...] | None
    """Class names, if known."""
    name: str
    """A short name."""
    source: str
    """One line that describes where the files are."""
    fingerprint: Callable[[], str]
    """A text that changes when a file does: names, sizes, modification times. Call it after every file was opened once:
    only then is it known which rows of a table name a file."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how they were chosen, one sentence each."""


def folder_files(
    folder: Path, split: str = "train", tables: Callable[[list[Path], Path, str], ImageFiles] | None = None
) -> ImageFiles:
    """The image files in a folder and its sub-folders; follows links, once each.

    Args:
        folder: the folder.
        split: which of its splits, if it has any.
        tables: reads the parquet files of a folder that holds no other images.

    Raises:
        ValueError: if there are no images, images beside parquet files, no such split, or `dataset.json` does not fit the
            files.
    """
    paths: dict[str, Path] = {}
    unread: list[str] = []
    beside: list[str] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.") from error

    for place, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not hidden(name))
        for file in files:
            if hidden(file):
                continue
            suffix = Path(file).suffix.lower()
            path = Path(place) / file
            name = path.relative_to(folder).as_posix()
            if suffix in SUFFIXES or suffix == ".parquet" or file == "dataset.json":
                paths[name] = path
            elif suffix in _UNREAD:
                unread.append(file)
            elif _is_table(file):
                beside.append(name)
    parquet = [paths.pop(name) for name in list(paths) if name.lower().endswith(".parquet")]
    if parquet and tables is not None:
        single = next((path for name, path in paths.items() if PurePosixPath(name).name != "dataset.json"), None)
        if single is None:
            return tables(parquet, folder, split)
        rows = next((path for path in parquet if path.name not in METADATA), None)
        if rows is not None:
            raise ValueError(
                f"{folder} holds parquet files, such as {rows}, and image files, such as {single}: name a folder with only "
                "one kind."
            )
        beside += [path.relative_to(folder).as_posix() for path in parquet]
    named = {name: path for name, path in paths.items() if PurePosixPath(name).name == "dataset.json"}
    documents = read_documents(named, len(paths))
    chosen = choose_files([name for name in paths if name not in documents], documents, folder, split)

    def fingerprint() -> str:
        return json.dumps([str(folder.resolve()), [[name, *stamp(paths[name])] for name in chosen.names]])

    return ImageFiles(
        names=tuple(str(paths[name]) for name in chosen.names),
        open=lambda i: open_regular(paths[chosen.names[i]]),
        labels=chosen.labels,
        class_names=chosen.class_names,
        notes=(*chosen.notes, *table_note(beside, chosen), *_unread_note(unread)),
        name=folder.resolve().name or "images",
        source=f"folder {folder.resolve().name} with {len(chosen.names):,} image files{chosen.note}",
        fingerprint=fingerprint,
    )


@contextmanager
def zip_files(path: Path, split: str = "train") -> Generator[ImageFiles, None, None]:
    """The image files in a .zip archive, which stays open within the block; unpacks nothing to disk.

    Args:
        path: the archive.
        split: which of its splits, if it has any.

    Raises:
        ValueError: if the archive is damaged or encrypted, an entry's name leads out of it or occurs twice, there is no
            image, no such split, or `dataset.json` does not fit the files.
    """
    with Archive(path) as archive:
        entries: dict[str, zipfile.ZipInfo] = {}
        unread: list[str] = []
        beside: list[str] = []
        for entry in archive.entries:
            # Some Windows programs write backslashes.
            name = entry.filename.replace("\\", "/")
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or ":" in name.split("/")[0]:
                raise ValueError(f"{path}: the entry {entry.orig_filename!r} leads out of the archive: make it again.")
            if not parts or name.endswith("/") or any(hidden(part) for part in parts):
                continue
            suffix = PurePosixPath(name).suffix.lower()
            if suffix not in SUFFIXES and parts[-1] != "dataset.json":
                if suffix in _UNREAD:
                    unread.append(parts[-1])
                elif _is_table(parts[-1]):
                    beside.append(name)
                continue
            if name in entries:
                raise ValueError(f"{path}: the entry {name!r} occurs twice: make the archive again.")
            if entry.flag_bits & 1:
                raise ValueError(f"{path}: the entry {name!r} is encrypted: unpack the archive and use the folder.")
            entries[name] = entry
        documents: dict[str, bytes] = {}
        for name, entry in entries.items():
            if PurePosixPath(name).name == "dataset.json":
                with archive.open(entry) as file:
                    documents[name] = _document(file, f"{path}/{name}", len(entries))
        chosen = choose_files([name for name in entries if name not in documents], documents, path, split)

        def fingerprint() -> str:
            return json.dumps([str(path.resolve()), *stamp(path), chosen.names])

        yield ImageFiles(
            names=tuple(f"{path}/{name}" for name in chosen.names),
            open=lambda i: archive.open(entries[chosen.names[i]]),
            labels=chosen.labels,
            class_names=chosen.class_names,
            notes=(*chosen.notes, *table_note(beside, chosen), *_unread_note(unread)),
            name=path.stem,
            source=f"archive {path.name} with {len(chosen.names):,} image files{chosen.note}",
            fingerprint=fingerprint,
        )


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time of a file; zeros if they cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, kw_only=True)
class ChosenFiles:
    """The selected files, in order, with their labels."""

    names: list[str]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    note: str = ""
    notes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """The folders of other splits, each with a slash at its end."""


def hidden(name: str) -> bool:
    """Whether to skip a file or folder of this name."""
    return name.startswith(".") or name == "__MACOSX"


def choose_files(names: list[str], documents: dict[str, bytes], where: Path | str, split: str) -> ChosenFiles:
    """Split, order and labels of the image files `names`, by the rules of the module."""
    if not names:
        raise ValueError(
            f"{where} holds no image file: pass files that end in {', '.join(sorted(SUFFIXES))}, in sub-folders too."
        )
    names = sorted(names)
    root = common_folder(names)
    first = {name[len(root) :].split("/")[0] if "/" in name[len(root) :] else "" for name in names}
    words = _SPLIT_OF
    note = ""
    notes: list[str] = []
    others: tuple[str, ...] = ()
    trained: set[str] = set()
    named = sorted(word for word in first if word.lower() in words)
    if len(named) >= 2 and len(first) > len(named):
        other = next(name for name in names if not name.startswith(tuple(f"{root}{word}/" for word in named)))
        if "" in first:
            raise ValueError(
                f"{where} holds the splits {', '.join(named)} and beside them {other}, which is in none: move it, or name "
                f"the folder of one split, such as {root}{named[0]}."
            )
        # Among many other folders they are classes, such as train beside bus and car.
        if 2 * len(named) > len(first):
            notes.append(
                f"The folders {', '.join(named)} do not count as splits, because {other[:NOTED]} is in none of them, so "
                "the images of all of them are read: to read one split, name its folder."
            )
    class_root = root
    if len(first) >= 2 and all(word.lower() in words for word in first):
        kept = [word for word in first if words[word.lower()] == words.get(split.lower(), split)]
        if len(kept) != 1:
            wrong = ValueError if kept else MissingSplitError
            raise wrong(f"split={split!r}: {where} holds the splits {', '.join(sorted(first))}; pass one of them.")
        training = [
            name
            for word in first
            if words[word.lower()] == "train"
            for name in names
            if name.startswith(f"{root}{word}/")
        ]
        names = [name for name in names if name.startswith(f"{root}{kept[0]}/")]
        others = tuple(f"{root}{word}/" for word in first if word != kept[0])
        above = common_folder(training)
        trained = {name[len(above) :].split("/")[0] for name in training if name[len(above) :].count("/") == 1}
        # A split may have images of one class only; its classes lie where those of the training split do. A lone folder
        # that is no training class, such as images or unknown, holds images without labels.
        class_root = "/".join([f"{root}{kept[0]}", *above[len(root) :].split("/")[1:]])
        documents = {name: document for name, document in documents.items() if not name.startswith(others)}
        root, note = common_folder(names), f", split {kept[0]}"
        known = class_root == root or root.removeprefix(class_root).rstrip("/") in trained
        if not (known and _are_classes(training, above) and _are_classes(names, class_root)):
            class_root = root
    elif split != "train":
        raise MissingSplitError(
            f"split={split!r}: {where} has no splits; leave split out, or name the folder with the images."
        )
    else:
        notes += [] if notes else _mixed_note(first, root)
    notes += _inner_note(names, root)
    folders = {name.removesuffix("dataset.json"): name for name in sorted(documents, key=len)}
    holder = next(filter(root.startswith, folders), None)
    are_classes = holder is None and _are_classes(names, class_root)
    given = "the folder of each image gives its label" if are_classes else ""
    if holder is not None:
        given = f"{folders[holder][:NOTED]} gives the labels of all images"
    notes += _document_note([name for place, name in folders.items() if place != holder], root, given)
    if holder is not None:
        name = folders[holder]
        labels = _document_labels([n[len(holder) :] for n in names], documents[name], f"{where}/{name}")
        return ChosenFiles(names=names, labels=labels, note=note, notes=tuple(notes), others=others)
    classes = [name[len(class_root) :].split("/") for name in names]
    if are_classes:
        class_names = sorted(trained, key=natural)
        class_names += sorted({parts[0] for parts in classes} - trained, key=natural)
        number = {name: i for i, name in enumerate(class_names)}
        labels = np.array([number[parts[0]] for parts in classes], np.int64)
        return ChosenFiles(
            names=names,
            labels=labels,
            class_names=tuple(class_names),
            note=note,
            notes=tuple(notes),
            others=others,
        )
    holding = {parts[0] for parts in classes if len(parts) >= 2}
    stray = [name for name, parts in zip(names, classes, strict=True) if len(parts) != 2]
    # Where no image lies as those of classes do, the folders mean something else, such as patients or parts of a data set.
    if len(holding) >= 2 and len(stray) < len(names):
        deeper = all(len(parts) > 2 for parts in classes if len(parts) != 2)
        notes.append(
            f"The {len(holding):,} folders do not count as classes, because {len(stray):,} of {len(names):,} images "
            f"{'lies' if len(stray) == 1 else 'lie'} {'in folders below them' if deeper else 'elsewhere'}, the first "
            f"{stray[0][:NOTED]}: for classes, move {'it' if len(stray) == 1 else 'them'} into one of the folders or away, "
            "or write a dataset.json."
        )
    return ChosenFiles(names=names, note=note, notes=tuple(notes), others=others)


def _are_classes(names: Sequence[str], root: str) -> bool:
    """Whether there are names, and all lie in one level of folders below `root`."""
    return bool(names) and all(name.startswith(root) and name[len(root) :].count("/") == 1 for name in names)


def split_word(name: str) -> str:
    """The word for a split that a name begins with, or nothing."""
    word = re.split(r"[-_.]", name)[0].lower()
    return word if word in _SPLIT_OF else ""


def _seeming_splits(folders: Iterable[str]) -> dict[str, list[str]]:
    """The folders of each split that seem to be splits; none unless most of the folders do.

    Their names begin or end with a word for a split, and differ in that word only, such as train_images beside test_images,
    trainset beside testset, or cats-train beside cats-val: `test tube` beside `train` are classes.
    """
    alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
    folders = list(filter(None, folders))
    named = sorted(folder for folder in folders if any(word in folder.lower() for word in _SPLIT_OF))
    # Most sets are done here, before the words of millions of folders are split.
    for folder in named if 2 * len(named) > len(folders) else ():
        words = [re.sub(_GENERIC, "", word) for word in re.findall("[a-z]+", folder.lower())]
        ends = {0, len(words) - 1} if words else set()
        place = next((k for k in sorted(ends) if words[k] in _SPLIT_OF), None)
        if place is not None:
            rest = tuple(word for k, word in enumerate(words) if word and k != place)
            alike.setdefault(rest, {}).setdefault(_SPLIT_OF[words[place]], []).append(folder)
    splits: dict[str, list[str]] = {}
    for found in alike.values():
        for key, those in found.items() if len(found) >= 2 else ():
            splits.setdefault(key, []).extend(those)
    return splits if 2 * sum(map(len, splits.values())) > len(folders) else {}


def _mixed_note(folders: Iterable[str], root: str) -> tuple[str, ...]:
    """A note on folders below `root` that seem to be splits, of which all images are read; none without such folders."""
    splits = _seeming_splits(folders)
    if not splits:
        return ()
    shown = ", ".join(folder for found in splits.values() for folder in found)
    # Two folders cannot have one name.
    single = all(len(found) == 1 for found in splits.values())
    renamed = f", or call the folders {', '.join(splits)}" if single else ""
    return (
        f"The folders {shown[:NOTED]} seem to be splits, but the images of all of them are read: to read one split, name "
        f"its folder, such as {root}{next(iter(splits.values()))[0][:NOTED]}{renamed}.",
    )


def _inner_note(names: Sequence[str], root: str) -> tuple[str, ...]:
    """A note on folders within those of `root` that seem to be splits; none without such folders."""
    places = sorted({name.rpartition("/")[0] for name in names})
    parts = [place[len(root) :].split("/") for place in places if len(place) > len(root)]
    for k in range(1, max(map(len, parts), default=0)):
        splits = _seeming_splits({part[k] for part in parts if len(part) > k})
        if splits:
            within = {part[k]: part[: k + 1] for part in parts if len(part) > k}
            found = [within[folders[0]] for folders in splits.values()]
            shown = ", ".join(root + "/".join(part) for part in found)
            return (
                f"The folders {shown[:NOTED]} seem to be splits, but the images of all of them are read, and the folders "
                "above them do not count as classes: to read one split with classes, put the folders of the classes into "
                f"those of the splits, such as {root}{next(iter(splits))}/{found[0][0][:NOTED]}.",
            )
    return ()


def _document_note(unused: Sequence[str], root: str, given: str) -> tuple[str, ...]:
    """A note on documents that give no labels to images in the folder `root`, since others are given; none without any."""
    if not unused:
        return ()
    which = (
        f"{unused[0][:NOTED]} is" if len(unused) == 1 else f"{len(unused):,} files, such as {unused[0][:NOTED]}, are"
    )
    if given:
        return (f"{which} not read, because {given}.",)
    place = f"the folder {root.rstrip('/')[:NOTED]}" if root else "the folder that holds them all"
    return (
        f"{which} not read, because not all images lie in {'its folder' if len(unused) == 1 else 'one of their folders'}: "
        f"for labels, put one dataset.json, with names relative to its folder, into {place}.",
    )


def table_note(names: Sequence[str], chosen: ChosenFiles) -> tuple[str, ...]:
    """A note on tables that may hold labels of the chosen images; none without such tables, or if the images have labels.

    Args:
        names: the names of files beside the images, of any kind.
        chosen: the images.
    """
    if chosen.labels is not None:
        return ()
    tables = sorted(name for name in names if _is_table(name) and not name.startswith(chosen.others))
    if not tables:
        return ()
    first = tables[0][:NOTED]
    which = f"{first} is" if len(tables) == 1 else f"{len(tables):,} files, such as {first}, are"
    them = "it" if len(tables) == 1 else "them"
    return (
        f"{which} not read, so labels in {them} are left out: for classes, put the images of each into a folder of its own, "
        "or write a dataset.json.",
    )


def _is_table(name: str) -> bool:
    """Whether a file of this name is a table that seems to hold labels; called for each of millions of captions."""
    file = name.rpartition("/")[2]
    stem, _, suffix = file.rpartition(".")
    if f".{suffix.lower()}" in _TABLES:
        return stem.lower() == "metadata" or names_labels(stem)
    return file in METADATA


def names_labels(name: str) -> bool:
    """Whether a column, an array or a file of this name seems to hold labels: `y`, `Label`, `class_id`, `trainLabels`.

    Its last word must say so, but for a few words that may follow: `target_width` is no label.
    """
    low = name.lower()
    if not any(word in low for word in _LABEL_WORDS):
        return low == "y"
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    saying = [word for word in words if word not in _FOLLOWING and word not in _SPLIT_OF]
    return bool(saying) and saying[-1] in _LABEL_WORDS


def _unread_note(names: Sequence[str]) -> tuple[str, ...]:
    """A note on files that are images of a kind that is not read; none without such files."""
    if not names:
        return ()
    suffixes = ", ".join(sorted({PurePosixPath(name).suffix.lower() for name in names}))
    which = f"file that ends in {suffixes} is" if len(names) == 1 else f"files that end in {suffixes} are"
    return (f"{len(names):,} {which} not read: save {'it' if len(names) == 1 else 'them'} as PNG or JPEG.",)


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key for natural order, in which digits count as whole numbers."""
    parts = re.split(r"([0-9]+)", name)
    # Without leading zeros, the longer number is the larger one.
    whole = [part.lstrip("0") if place % 2 else part for place, part in enumerate(parts)]
    return [(len(part) if place % 2 else 0, part) for place, part in enumerate(whole)], name


def common_folder(names: list[str]) -> str:
    """The deepest folder that holds all names, "" or with a slash at its end."""
    if not names:
        return ""
    folders = [name.split("/")[:-1] for name in (min(names), max(names))]
    # The first and the last name in order agree on a prefix of folders only if all between them do.
    agree = takewhile(lambda pair: pair[0] == pair[1], zip(*folders, strict=False))
    return "".join(f"{part}/" for part, _ in agree)


def read_documents(paths: dict[str, Path], count: int) -> dict[str, bytes]:
    """The bytes of each dataset.json, by its name, in a folder of `count` files.

    Raises:
        ValueError: if one cannot be read or is too long.
    """
    documents: dict[str, bytes] = {}
    for name, path in paths.items():
        try:
            with open_regular(path) as file:
                documents[name] = _document(file, str(path), count)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    return documents


def _document(file: BinaryIO | EntryFile, where: str, count: int) -> bytes:
    """The bytes of a dataset.json beside `count` files; parsed, they take up to thirty times as much memory."""
    limit = JSON_LIMIT + DOCUMENT_SHARE * count
    pieces: list[bytes] = []
    size = 0
    while piece := file.read(2**20):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise ValueError(
                f"{where} has more than {limit:,} bytes, too many for the labels of {count:,} files: remove other content."
            )
    return b"".join(pieces)


def _document_labels(names: list[str], document: bytes, where: str) -> NDArray[np.int64] | None:
    """Labels of `names` from a dataset.json; entries without an image are ignored."""
    try:
        content: Any = json.loads(document)
        pairs: Any = content.get("labels")
        if pairs is None:
            return None
        table = {str(name): label for name, label in pairs}
        twice = next((name for name, label in pairs if table[str(name)] != label), None)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'{where} cannot be parsed ({error}): it should read {{"labels": [["name.png", 0], ...]}} or {{"labels": null}}.'
        ) from error
    if twice is not None:
        raise ValueError(f"{where} gives {twice} two labels: keep one.")
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(
            f"{where} has no label for {len(missing):,} of {len(names):,} images, the first {missing[0]}: add them."
        )
    labels = [table[name] for name in names]
    for name, label in zip(names, labels, strict=True):
        if type(label) is not int or not 0 <= label < 2**31:
            raise ValueError(f"{where} gives {name} the label {reprlib.repr(label)}: a label is a whole number from 0.")
    return np.array(labels, np.int64)
