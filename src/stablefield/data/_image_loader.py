"""Turn image files into an image set: a few threads read every header, then decode every file, in order.

The first pass reads only headers and determines the shape: greyscale if all images are or if asked for, their one size or
the requested resolution. The second decodes into a `Collector`. Both go through all files before they report those that
cannot be read.

Beside the set itself, reading takes no more than 1 GiB of memory, whatever the files hold: decoders share
`DECODING_MEMORY`, from which each reserves what its image needs before it begins, and at most 128 MiB of decoded images wait
to be collected.
"""

import ctypes
import json
import math
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stablefield._progress import Progress
from stablefield._regular_file import reason
from stablefield.data._collector import Collector, cached
from stablefield.data._colour import Colour, channels_of
from stablefield.data._image_decoder import DECODING_MEMORY, Header, decode, read_header
from stablefield.data._image_files import NOTED, ImageFiles
from stablefield.data._image_set import ImageSet, Origin, labels_sha256
from stablefield.data._pillow import require_pillow
from stablefield.data._resizing import (
    Resize,
    Resolution,
    height_and_width,
    natural_resolution,
    raised_resolution,
    resize_text,
)

__all__ = ["load_image_files"]

THREADS = 4
WINDOW = 32
WINDOW_BYTES = 2**27
LISTED = 5
REASON_LENGTH = 200

T = TypeVar("T")


@dataclass(frozen=True)
class _Broken:
    reason: str


def load_image_files(
    files: ImageFiles,
    *,
    resolution: Resolution | None,
    limit: int | None,
    resize: Resize,
    colour: Colour,
    background: str,
    skip_broken: bool,
    progress: Callable[[Progress], object] | None,
    memory_budget: int,
    cache: Path,
) -> ImageSet:
    """Decode image files.

    Args:
        files: the files.
        resolution: bring every image to this side or height and width; None keeps the images' one size.
        limit: without a resolution, choose the natural one up to this (see `natural_resolution`).
        resize: how.
        colour: greyscale or RGB for all images; "auto" is greyscale only if all of them are.
        background: the colour behind transparent pixels, a name of `background_name`.
        skip_broken: skip files that cannot be read, and count them in the manifest.
        progress: called as files are done, from the caller's thread.
        memory_budget: bytes of pixels that may be kept in memory.
        cache: the folder for a packed file if they are more.

    Returns:
        The set, in the order of `files`.

    Raises:
        ValueError: if images differ in size and `resolution` is None, files cannot be read (unless skipped), or no image
            remains.
        ImportError: if Pillow is not installed.
    """
    require_pillow("reading image files")
    from PIL import Image

    with warnings.catch_warnings():
        # Pillow's other warnings are harmless here (odd EXIF, palettes); a decompression bomb must be an error.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        room = _Room(DECODING_MEMORY)
        headers = list(_reported("reading headers", progress, lambda i: _header(files, i, room), len(files.names)))
        notes = files.notes
        if resolution is None and limit is not None:
            sizes = {
                name: (header.height, header.width)
                for name, header in zip(files.names, headers, strict=True)
                if isinstance(header, Header)
            }
            resolution = natural_resolution(sizes.values(), limit) if sizes else None
            notes = (*notes, *_small_note(sizes, resolution, limit))
        shape, resized = _common_shape(files.names, headers, resolution, resize, colour)
        file = cache
        if len(headers) * math.prod(shape) > memory_budget:
            begin = [files.fingerprint(), labels_sha256(files.labels), files.class_names]
            end = [shape, resized, *[background] * (background != "white")]
            # A new note is no reason to decode anew; earlier versions named the file by the notes, too.
            for named in dict.fromkeys((notes, ())):
                file, found = cached(cache, json.dumps([*begin, named, *end]), notes)
                if found is not None and (skip_broken or found.manifest.get("skipped") == 0):
                    return found
        broken: dict[int, _Broken] = {}
        conversions: Counter[str] = Counter()
        with Collector(
            len(headers), shape, memory_budget=memory_budget, file=file, class_names=files.class_names
        ) as collector:
            wanted = None if resolution is None else (resolution, resize)

            def decoded(i: int) -> tuple[NDArray[np.uint8], tuple[str, ...]] | _Broken:
                header = headers[i]
                if isinstance(header, _Broken):
                    return header
                with room.taken(header.memory):
                    return _pixels(files, i, shape, wanted, background)

            window = min(WINDOW, max(1, WINDOW_BYTES // math.prod(shape)))
            with closing(_reported("decoding", progress, decoded, len(headers), window)) as results:
                for i, result in enumerate(results):
                    if isinstance(result, _Broken):
                        broken[i] = result
                    elif skip_broken or not broken:
                        collector.append(result[0][None])
                        conversions.update(result[1])
            reasons = [f"{files.names[i]} ({fault.reason[:REASON_LENGTH]})" for i, fault in broken.items()]
            if broken and (not skip_broken or len(broken) == len(headers)):
                raise ValueError(_broken_text(reasons, len(headers)))
            kept = np.array([i for i in range(len(headers)) if i not in broken])
            origin = Origin(
                name=files.name,
                source=files.source,
                class_names=files.class_names,
                resized=resized,
                conversions=dict(sorted(conversions.items())),
                skipped=len(broken),
                skipped_files=tuple(reasons[:LISTED]),
                notes=notes,
            )
            return collector.finish(None if files.labels is None else files.labels[kept], origin)


def _small_note(sizes: Mapping[str, tuple[int, int]], resolution: Resolution | None, limit: int) -> tuple[str, ...]:
    """A note on a few small images that lower the resolution of all; none without such images."""
    raised = None if resolution is None else raised_resolution(Counter(sizes.values()), limit)
    if resolution is None or raised is None:
        return ()
    better, count = raised
    path, (height, width) = min(sizes.items(), key=lambda item: min(item[1]))
    name = PurePath(path).name[:NOTED]
    now, then = (height_and_width(each) for each in (resolution, better))
    text, wanted = (str(then[0]), then[0]) if then[0] == then[1] else (f"{then[1]} x {then[0]}", then)
    few, them = ("smallest", "it") if count == 1 else (f"{count:,} smallest", "them")
    return (
        f"Resolution {now[0]} because of {name} ({width} x {height}): without the {few} of {len(sizes):,} images it "
        f"would be {text}; pass resolution={wanted}, or move {them} away.",
    )


def _common_shape(
    names: Sequence[str],
    headers: Sequence[Header | _Broken],
    resolution: Resolution | None,
    resize: Resize,
    colour: Colour,
) -> tuple[tuple[int, int, int], str]:
    """The shape of the set, and how its images are resized to it."""
    good = [(name, header) for name, header in zip(names, headers, strict=True) if isinstance(header, Header)]
    if not good:
        reasons = [f"{n} ({h.reason})" for n, h in zip(names, headers, strict=True) if isinstance(h, _Broken)]
        raise ValueError(_broken_text(reasons, len(names)))
    channels = channels_of(colour, grey=all(header.grey for _, header in good))
    sizes = Counter((header.height, header.width) for _, header in good)
    if resolution is not None:
        size = height_and_width(resolution)
        return (channels, *size), "no" if set(sizes) == {size} else resize_text(resolution, resize, sizes)
    if len(sizes) > 1:
        name, first = good[0]
        other, second = next((n, h) for n, h in good if (h.height, h.width) != (first.height, first.width))
        smallest = min(min(size) for size in sizes)
        raise ValueError(
            f"images differ in size ({len(sizes):,} sizes in {len(good):,} images): {name} has {first.width} x "
            f"{first.height} pixels, {other} has {second.width} x {second.height}. Pass a resolution to bring all of them "
            f"to one size (resolution=N for squares, of which the shortest side is {smallest}, or height and width)."
        )
    height, width = next(iter(sizes))
    return (channels, height, width), "no"


def _header(files: ImageFiles, i: int, room: "_Room") -> Header | _Broken:
    def read() -> Header:
        with files.open(i) as file:
            return read_header(file, room.taken)

    return _guarded(read)


def _pixels(
    files: ImageFiles,
    i: int,
    shape: tuple[int, int, int],
    wanted: tuple[Resolution, Resize] | None,
    background: str,
) -> tuple[NDArray[np.uint8], tuple[str, ...]] | _Broken:
    def read() -> tuple[NDArray[np.uint8], tuple[str, ...]]:
        with files.open(i) as file:
            resolution, resize = wanted or (None, "crop")
            pixels, notes = decode(file, shape[0], resolution, resize, background)
        if pixels.shape != shape:
            raise ValueError(f"it decodes to shape {pixels.shape}, but its header promised {shape}")
        return pixels, notes

    return _guarded(read)


def _guarded(read: Callable[[], T]) -> T | _Broken:
    """The result, or why there is none: decoders may raise anything over a damaged file."""
    from PIL import UnidentifiedImageError

    try:
        return read()
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return _Broken("not an image of a supported kind, or an empty file")
    except OSError as error:
        return _Broken(error.strerror or str(error) or type(error).__name__)
    except Exception as error:
        return _Broken(reason(error).strip() or type(error).__name__)


def _broken_text(reasons: Sequence[str], count: int) -> str:
    more = f" and {len(reasons) - LISTED:,} more" if len(reasons) > LISTED else ""
    return (
        f"{len(reasons):,} of {count:,} image files cannot be read: {'; '.join(reasons[:LISTED])}{more}. "
        "Repair or remove them, or skip them with skip_broken=True."
        if len(reasons) < count
        else f"none of {count:,} image files can be read: {'; '.join(reasons[:LISTED])}{more}. Repair or convert them."
    )


class _Room:
    """Memory that threads share: a thread that asks for some waits until it is free."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Generator[None, None, None]:
        """Reserve `size` bytes, at most the total, within the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            if size > WINDOW_BYTES // 2:
                _return_free_memory()
            with self._changed:
                self._free += size
                self._changed.notify_all()


def _return_free_memory() -> None:
    """Make the C library release freed memory: glibc keeps it for the thread that freed it, and no other can use it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reported(
    stage: str,
    progress: Callable[[Progress], object] | None,
    function: Callable[[int], T],
    count: int,
    ahead: int = WINDOW,
) -> Generator[T, None, None]:
    """Yield `function` of 0 .. count - 1, in order, from a pool of threads that runs only a little ahead."""
    window: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="stablefield-images")
    try:
        done = 0
        for i in range(count + ahead):
            if i < count:
                window.append(pool.submit(function, i))
            if i >= ahead and window:
                yield window.popleft().result()
                done += 1
                if progress is not None:
                    progress(Progress(stage=stage, done=done, total=count))
    finally:
        pool.shutdown(cancel_futures=True)
