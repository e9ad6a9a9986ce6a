"""Small files that stand for a lot, and the memory that opening them takes, measured in a process of its own."""

import functools
import io
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
from PIL import Image

MIB = 2**20
PIECE = 16 * MIB

PROGRAM = """
import importlib, json, os, sys
import numpy, PIL.Image
from stablefield.data import open_images, summary

PIL.Image.init()
apart, *imports = sys.argv[1:]
for name in imports:
    importlib.import_module(name)

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

for line in sys.stdin:
    if apart == "apart" and (child := os.fork()):
        assert os.waitpid(child, 0)[1] == 0
        continue
    name, source, options = json.loads(line)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    try:
        images = open_images(source, **options)
        summary(images)
        said = f"{len(images)} images"
        del images
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said, status("VmHWM") - before]), flush=True)
    if apart == "apart":
        os._exit(0)
"""


def opened(sources, timeout=240, *, apart=False, imports=()):
    """Open sources, {name: (path, options)}, one after the other in one process, or each in a process `apart`.

    The process has imported `imports` before, so that each need not, and no peak is theirs.

    Returns:
        For each name what came of it ("5 images" or the error's type and text), and by how many MiB the memory of the
        process grew at its peak, pages of mapped files included.
    """
    lines = [json.dumps([name, str(path), options]) for name, (path, options) in sources.items()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "apart" if apart else "together", *imports],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (said, peak) for name, said, peak in map(json.loads, done.stdout.splitlines())}


@functools.cache
def zeros_deflated():
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(PIECE)) + packer.flush(zlib.Z_FULL_FLUSH)


def deflated(head, size):
    """`head` and `size` zeros (of whole pieces), deflated to a thousandth; also the checksum and the length of all.

    Above half a GiB the checksum is none, because nobody should come to where it is looked at.
    """
    assert size % PIECE == 0
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = zeros_deflated() if size else b""
    checksum = zlib.crc32(head)
    for _ in range(size // PIECE if size <= 512 * MIB else 0):
        checksum = zlib.crc32(bytes(PIECE), checksum)
    return first + block * (size // PIECE) + packer.flush(), checksum, len(head) + size


def gzipped(path, head, size=0):
    data, checksum, length = deflated(head, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + data + struct.pack("<II", checksum, length % 2**32))
    return path


def zipped(path, entries, *, method=8, mode=0o100644):
    """An archive of {name: (bytes, how many zeros come behind)}; `method` is what it says, deflated they are."""
    body, directory = b"", b""
    for name, (head, size) in entries.items():
        data, checksum, length = deflated(head, size)
        shared = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, checksum, len(data), length, len(name), 0)
        directory += b"PK\1\2" + struct.pack("<H", 3 * 256 + 20) + shared
        directory += struct.pack("<HHHII", 0, 0, 0, mode << 16, len(body)) + name.encode()
        body += b"PK\3\4" + shared + name.encode() + data
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\5\6" + end)
    return path


def npy_header(shape, descr="|u1"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def idx_header(*shape):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def image_bytes(mode="RGB", size=(8, 8), kind="PNG", value=90, **options):
    buffer = io.BytesIO()
    Image.new(mode, size, value if len(mode) == 1 else (value,) * len(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(pixels):
    """The PNG file of pixels (3, H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def png_with(kind, content, length=None):
    """The PNG file of `image_bytes` with a chunk in front of its pixels, which says to be `length` bytes long."""
    png = image_bytes()
    place = png.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(content) if length is None else length) + kind + content
    return (
        png[:place] + chunk + (struct.pack(">I", zlib.crc32(kind + content)) + png[place:] if length is None else b"")
    )


def tiff(entries, data=b""):
    """A TIFF file of one directory, entries being (tag, type, count, value or offset), with `data` behind it."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + data


def safetensors(path, header):
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path
