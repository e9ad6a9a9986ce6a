"""The folder of latents that `encode` writes.

    latents.json         how the latents were made and how far it got; at the end their manifest
    latents.safetensors  mean, std, draws: float16 or float32, (n, C, h, w); flipped_mean, flipped_std; labels: int64 (n,)

An encoder returns a normal distribution for each image. `mean` and `std` are its moments, `flipped_mean` and `flipped_std`
those of the mirrored image, which are not the mirror images of the moments. `draws` holds one draw of each: what verbs use
that need a fixed set, such as a probe. Training draws anew in each step.

The file has its full size from the start. Each batch is written in its place and is on the disk before latents.json counts
it, so `encode` goes on where it was stopped, and `open_images` refuses a folder that is not complete.
"""

import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from stablefield._atomic_file import sync, write_atomically
from stablefield._memory import size_text
from stablefield._regular_file import JSON_LIMIT, open_regular, read_limited, reason
from stablefield.data._autoencoder import Autoencoder, AutoencoderRecord
from stablefield.data._image_set import ImageSet, Origin, labels_sha256, make_image_set, pixels_sha256
from stablefield.data._packed import found_tensor, read_header
from stablefield.data._raw_array import mapped
from stablefield.data._scaling import Scaling
from stablefield.targets._moments import Moments

__all__ = ["KINDS", "LatentFolder", "is_encoded", "open_latents"]

_RECORD, _TENSORS = "latents.json", "latents.safetensors"
_FORMAT = "stablefield latents 1"
_PARTS = ("mean", "std", "draws", "flipped_mean", "flipped_std")
KINDS = {"float16": "F16", "float32": "F32"}
"""Dtypes of latents, and their names in safetensors."""
_DTYPES = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
# The settings, in the words of an error.
_SETTINGS = {
    "images": "images of sha256",
    "labels": "labels of sha256",
    "class_names": "classes",
    "shape": "images of shape",
    "count": "a number of images of",
    "autoencoder": "an autoencoder of sha256",
    "dtype": "dtype",
    "mirror": "mirror",
}
# Seed of the stored draws.
_SEED = 0


def is_encoded(folder: Path) -> bool:
    """Whether a folder is one that `encode` made, complete or not."""
    return (folder / _RECORD).is_file()


def open_latents(folder: Path) -> ImageSet:
    """Open a folder that `encode` made: its `images` are the stored draws, mapped, with the `moments` beside them.

    Raises:
        ValueError: if it is not complete, or damaged.
    """
    found = LatentFolder.read(folder)
    if found.manifest is None:
        raise ValueError(
            f"{folder} is not complete: {found.encoded:,} of {found.settings['count']:,} images are encoded; call encode "
            "again, with the same arguments, to go on."
        )
    return found.open()


@dataclasses.dataclass
class LatentFolder:
    """A folder of latents, complete or not.

    Attributes:
        path: the folder.
        settings: what determines the latents.
        shape: of one latent.
        encoded: number of images that are encoded, from the first one on.
        manifest: of the complete set; None before.
    """

    path: Path
    settings: dict[str, Any]
    shape: tuple[int, ...]
    encoded: int = 0
    manifest: dict[str, Any] | None = None

    @classmethod
    def begin(
        cls, path: Path, settings: dict[str, Any], shape: tuple[int, ...], labels: NDArray[np.int64] | None
    ) -> "LatentFolder":
        """The folder of an earlier call, or a new one.

        Raises:
            ValueError: if it holds anything else.
            OSError: if it cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise ValueError(f"out={path} is a file: name a folder.")
        if is_encoded(path):
            found = cls.read(path)
            for name, words in _SETTINGS.items():
                if found.settings.get(name) != settings[name]:
                    theirs, ours = (_short(one.get(name)) for one in (found.settings, settings))
                    raise ValueError(
                        f"out={path} holds latents of {words} {theirs}, and these have {ours}: pass the same, or name a new "
                        "folder."
                    )
        else:
            if path.is_dir() and any(not one.name.startswith(".") for one in path.iterdir()):
                raise ValueError(f"out={path} is not empty and holds no latents: name a new folder.")
            path.mkdir(parents=True, exist_ok=True)
            found = cls(path, settings, shape)
            header, size = found._header()
            free = shutil.disk_usage(path).free
            if free < len(header) + size:
                raise ValueError(
                    f"out={path}: the latents take {size_text(size)}, and {size_text(free)} are free there: name another "
                    "place."
                )
            found.write()
        if found.encoded == 0:
            found._create(labels)
        return found

    @classmethod
    def read(cls, path: Path) -> "LatentFolder":
        """An existing folder.

        Raises:
            ValueError: if its record is damaged.
        """
        try:
            record: Any = json.loads(read_limited(path / _RECORD))
            if not isinstance(record, dict) or record.get("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            entries = cast("dict[str, Any]", record)
            settings, shape, encoded, manifest = (
                entries.get(name) for name in ("settings", "latent", "encoded", "manifest")
            )
            sides = cast("list[Any]", shape) if isinstance(shape, list) else []
            if not isinstance(settings, dict) or len(sides) != 3 or any(type(s) is not int or s < 1 for s in sides):
                raise ValueError("its settings are damaged")
            known = cast("dict[str, Any]", settings)
            count = known.get("count")
            if type(count) is not int or count < 1 or known.get("dtype") not in KINDS:
                raise ValueError("its settings are damaged")
            if type(encoded) is not int or not 0 <= encoded <= count or not isinstance(manifest, dict | None):
                raise ValueError("its progress is damaged")
            if manifest is not None and encoded < count:
                raise ValueError("its progress is damaged")
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path / _RECORD} is damaged ({reason(error)}): remove the folder, and encode the images again."
            ) from error
        return cls(path, known, tuple(sides), encoded, cast("dict[str, Any] | None", manifest))

    def encode(self, images: ImageSet, encoder: Autoencoder, batch: int, *, mirror: bool) -> Iterator[int]:
        """Encode what is left, batch by batch, and yield how many images are encoded."""
        header, _ = self._header()
        places = self._places()
        count, width = len(images), math.prod(self.shape)
        dtype = _DTYPES[KINDS[self.settings["dtype"]]]
        with (self.path / _TENSORS).open("r+b") as file:
            while self.encoded < count:
                rows = np.arange(self.encoded, min(self.encoded + batch, count))
                pixels, _ = images.batch(rows)
                mean, std = encoder.moments(pixels)
                found: dict[str, NDArray[Any]] = {"mean": mean, "std": std}
                if mirror:
                    found["flipped_mean"], found["flipped_std"] = encoder.moments(pixels[..., ::-1])
                rngs = [np.random.default_rng([_SEED, row]) for row in rows.tolist()]
                found["draws"] = mean + std * np.stack([rng.standard_normal(self.shape, np.float32) for rng in rngs])
                for name, values in found.items():
                    with np.errstate(over="ignore"):
                        rounded = np.ascontiguousarray(values, dtype)
                    if rounded.shape[1:] != self.shape or not np.isfinite(rounded).all():
                        raise ValueError(
                            f"images {rows[0]} to {rows[-1]} have a {name} of shape {rounded.shape[1:]} with values up to "
                            f"{np.abs(values).max():.3g}: pass dtype='float32', or another autoencoder."
                        )
                    file.seek(len(header) + places[name] + int(rows[0]) * width * dtype.itemsize)
                    file.write(rounded.data)
                file.flush()
                os.fsync(file.fileno())
                self.encoded = int(rows[-1]) + 1
                self.write()
                yield self.encoded

    def finish(self, images: ImageSet, autoencoder: AutoencoderRecord) -> None:
        """Measure the scaling and the checksums, and write the manifest."""
        tensors = self._mapped()
        labels = cast("NDArray[np.int64] | None", tensors.get("labels"))
        if labels_sha256(labels) != self.settings["labels"]:
            raise ValueError(f"{self.path / _TENSORS} is damaged: remove the folder, and encode the images again.")
        origin = Origin(
            name=self.path.resolve().name,
            source=f"latents of {images.manifest['source']}",
            class_names=images.class_names,
            skipped=int(images.manifest["skipped"]),
        )
        manifest = make_image_set(tensors["draws"], labels, origin).manifest
        moments = {name: pixels_sha256(tensors[name]) for name in _PARTS if name in tensors and name != "draws"}
        self.manifest = manifest | {
            "autoencoder": autoencoder.record,
            "moments_sha256": moments,
            "encoded_from": {
                key: images.manifest[key] for key in ("name", "source", "sha256", "resized", "conversions")
            },
        }
        self.write()

    def open(self) -> ImageSet:
        """The complete set."""
        manifest = cast("dict[str, Any]", self.manifest)
        try:
            tensors = self._mapped()
            labels = cast("NDArray[np.int64] | None", tensors.get("labels"))
            scaling, autoencoder = Scaling.of_manifest(manifest), AutoencoderRecord.of_manifest(manifest)
            expected = {
                "count": len(tensors["mean"]),
                "shape": list(self.shape),
                "labels_sha256": labels_sha256(labels),
            }
            for name, value in expected.items():
                if manifest.get(name) != value:
                    raise ValueError(f"its manifest says {name} = {_short(manifest.get(name))}, and it holds {value}")
            if scaling is None or len(scaling.mean) != self.shape[0] or autoencoder is None:
                raise ValueError("its manifest has no scaling for these latents, or no autoencoder")
            names = self.settings.get("class_names")
            return ImageSet(
                images=tensors["draws"],
                labels=labels,
                class_names=None if names is None else tuple(map(str, names)),
                name=str(manifest["name"]),
                manifest=Origin(name="", source="").manifest(0) | manifest,
                opening={"source": str(self.path), "resolution": None, "resize": "crop", "skip_broken": False},
                scaling=scaling,
                moments=Moments(tensors["mean"], tensors["std"]),
                flipped=Moments(tensors["flipped_mean"], tensors["flipped_std"]) if "flipped_mean" in tensors else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is damaged ({reason(error)}): remove it, and encode the images again."
            ) from error

    def write(self) -> None:
        """Write how far it got."""
        record = {
            "format": _FORMAT,
            "settings": self.settings,
            "latent": list(self.shape),
            "encoded": self.encoded,
            "manifest": self.manifest,
        }
        text = json.dumps(record, indent=1).encode()
        if len(text) > JSON_LIMIT:
            raise ValueError(f"the names of the classes take more than {JSON_LIMIT:,} bytes: shorten them.")
        write_atomically(self.path / _RECORD, lambda temporary: temporary.write_bytes(text))

    def _names(self) -> list[str]:
        return [*(["labels"] if self.settings["labels"] else []), *_PARTS[: 5 if self.settings["mirror"] else 3]]

    def _places(self) -> dict[str, int]:
        """The first byte of each tensor, after the header."""
        count = self.settings["count"]
        size = count * math.prod(self.shape) * _DTYPES[KINDS[self.settings["dtype"]]].itemsize
        places, end = dict[str, int](), 0
        for name in self._names():
            places[name] = end
            end += 8 * count if name == "labels" else size
        return places | {"": end}

    def _header(self) -> tuple[bytes, int]:
        """The header of the safetensors file, and the number of bytes after it."""
        count, places = self.settings["count"], self._places()
        names, edges = self._names(), list(places.values())
        header = {
            name: {
                "dtype": "I64" if name == "labels" else KINDS[self.settings["dtype"]],
                "shape": [count] if name == "labels" else [count, *self.shape],
                "data_offsets": edges[place : place + 2],
            }
            for place, name in enumerate(names)
        }
        # The tensors begin at a multiple of 64.
        text = json.dumps(header).encode()
        text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
        return struct.pack("<Q", len(text)) + text, edges[-1]

    def _create(self, labels: NDArray[np.int64] | None) -> None:
        """Make the file of the tensors, in its full size, with the labels.

        Another process may have begun with the same images: what it has written into a file of this size stays.
        """
        header, size = self._header()
        path = self.path / _TENSORS
        whole = path.is_file() and path.stat().st_size == len(header) + size
        with path.open("r+b" if whole else "wb") as file:
            file.write(header)
            if labels is not None:
                file.write(np.ascontiguousarray(labels, "<i8").data)
            file.truncate(len(header) + size)
            file.flush()
            os.fsync(file.fileno())
        sync(self.path)

    def _mapped(self) -> dict[str, NDArray[Any]]:
        """The tensors; the labels are read.

        Raises:
            ValueError: if one is missing, or does not fit the settings.
        """
        place = self.path / _TENSORS
        try:
            with open_regular(place) as file:
                return self._tensors(place, file)
        except OSError as error:
            raise ValueError(f"{place} cannot be read ({error.strerror or error})") from error

    def _tensors(self, place: Path, file: BinaryIO) -> dict[str, NDArray[Any]]:
        header, start = read_header(place, file)
        size = file.seek(0, os.SEEK_END) - start
        found = dict[str, NDArray[Any]]()
        for name in self._names():
            kinds = {"I64": np.dtype("<i8")} if name == "labels" else _DTYPES
            if name not in header:
                raise ValueError(f"{place} holds no {name}")
            dtype, shape, begin = found_tensor(place, name, header[name], kinds, size)
            count = self.settings["count"]
            if shape != ((count,) if name == "labels" else (count, *self.shape)):
                raise ValueError(f"{place} has {name} of shape {shape}")
            if name == "labels":
                file.seek(start + begin)
                found[name] = np.frombuffer(file.read(8 * count), "<i8").astype(np.int64)
            else:
                found[name] = mapped(file, place, start + begin, shape, dtype=dtype)
        return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
