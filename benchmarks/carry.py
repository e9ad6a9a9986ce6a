"""Carry CIFAR-10 and FID's network to a machine without a network, in parts that each stay under a limit. Needs Pillow.

    python benchmarks/carry.py pack CIFAR_FOLDER OUT [--inception FILE] [--limit MEGABYTES]
    python benchmarks/carry.py unpack PART... DEST

`pack` writes OUT/part1, OUT/part2, ...: images, the test part's too, as lossless WebP sheets of 10 x 10 (0.535 of their
size), and FID's Inception-v3 with its weights in half precision (39 MB; its features differ from float32's by 0.4 % in
relative norm). `unpack` takes the parts that have arrived, in any number of calls, and writes what `gpu.py` reads: the
official binary files, as far as their sheets are there, and DEST/inception.pt.
"""

import argparse
import io
import lzma
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

FILES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
FILE_IMAGES = 10_000
SHEET_IMAGES, SHEET_SIDE, SIDE = 100, 10, 32


def sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """100 images (100, 3, 32, 32) as one picture (320, 320, 3)."""
    rows = images.reshape(SHEET_SIDE, SHEET_SIDE, 3, SIDE, SIDE).transpose(0, 3, 1, 4, 2)
    return rows.reshape(SHEET_SIDE * SIDE, SHEET_SIDE * SIDE, 3)


def images_of(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The images (100, 3, 32, 32) of a sheet."""
    rows = picture.reshape(SHEET_SIDE, SIDE, SHEET_SIDE, SIDE, 3).transpose(0, 2, 4, 1, 3)
    return rows.reshape(SHEET_IMAGES, 3, SIDE, SIDE)


def pack(cifar: Path, out: Path, inception: Path | None, limit: int) -> list[Path]:
    """Write the parts and return their folders."""
    if out.exists():
        shutil.rmtree(out)
    parts: list[Path] = []
    room = 0

    def put(name: str, content: bytes) -> None:
        nonlocal room
        if len(content) > limit:
            raise SystemExit(f"{name} has {len(content):,} bytes, more than the limit of {limit:,}; raise --limit")
        if len(content) > room:
            parts.append(out / f"part{len(parts) + 1}")
            parts[-1].mkdir(parents=True)
            room = limit
        (parts[-1] / name).write_bytes(content)
        room -= len(content)

    folder = cifar / "cifar-10-batches-bin" if (cifar / "cifar-10-batches-bin").is_dir() else cifar
    for name in FILES:
        rows = np.fromfile(folder / f"{name}.bin", np.uint8).reshape(FILE_IMAGES, 1 + 3 * SIDE * SIDE)
        put(f"{name}.labels", rows[:, 0].tobytes())
        for k in range(FILE_IMAGES // SHEET_IMAGES):
            stream = io.BytesIO()
            images = rows[k * SHEET_IMAGES : (k + 1) * SHEET_IMAGES, 1:]
            Image.fromarray(sheet(images)).save(stream, "WEBP", lossless=True, method=4)
            put(f"{name}.{k:02}.webp", stream.getvalue())
    if inception is not None:
        stream = io.BytesIO()
        torch.jit.save(torch.jit.load(inception).half(), stream)
        put("inception.pt.xz", lzma.compress(stream.getvalue()))
    return parts


def unpack(parts: list[Path], dest: Path) -> None:
    """Add the parts to DEST, and write the files that are complete."""
    arrived = dest / "arrived"
    folder = dest / "cifar-10-batches-bin"
    for path in (arrived, folder):
        path.mkdir(parents=True, exist_ok=True)
    for part in parts:
        for path in part.iterdir():
            shutil.copyfile(path, arrived / path.name)
    for name in FILES:
        sheets = sorted(arrived.glob(f"{name}.*.webp"))
        if (folder / f"{name}.bin").exists() or len(sheets) < FILE_IMAGES // SHEET_IMAGES:
            continue
        labels = np.frombuffer((arrived / f"{name}.labels").read_bytes(), np.uint8)
        images = np.concatenate([images_of(np.asarray(Image.open(path).convert("RGB"))) for path in sheets])
        rows = np.concatenate([labels[:, None], images.reshape(FILE_IMAGES, -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
        print(f"{name}.bin: {FILE_IMAGES:,} images")
    packed = arrived / "inception.pt.xz"
    if packed.exists() and not (dest / "inception.pt").exists():
        network = torch.jit.load(io.BytesIO(lzma.decompress(packed.read_bytes()))).float()
        torch.jit.save(network, dest / "inception.pt")
        print("inception.pt: weights rounded to half precision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="write the parts")
    packing.add_argument("cifar", type=Path, help="folder of CIFAR-10's binary files")
    packing.add_argument("out", type=Path, help="folder for the parts; replaced where it exists")
    packing.add_argument("--inception", type=Path, help="TorchScript file of FID's network")
    packing.add_argument("--limit", type=float, default=60.0, help="megabytes of a part")
    unpacking = verbs.add_parser("unpack", help="write the data from the parts")
    unpacking.add_argument("parts", type=Path, nargs="+")
    unpacking.add_argument("dest", type=Path)
    options = parser.parse_args()
    if options.verb == "unpack":
        unpack(options.parts, options.dest)
        return
    for part in pack(options.cifar, options.out, options.inception, int(options.limit * 1e6)):
        size = sum(path.stat().st_size for path in part.iterdir())
        print(f"{part}: {size / 1e6:.1f} MB in {len(list(part.iterdir()))} files")


if __name__ == "__main__":
    main()
