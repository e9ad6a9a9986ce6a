"""Small files in which a number, or one thing used over and over, asks for work or memory without end."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping

import torch
from foreign import archive, legacy, named, program, reconstructed, storage_id, tensor_of, text
from safetensors.torch import save

from stablefield.networks import SongUNet


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def state(shapes: Mapping[str, tuple[int, ...]], count: int = 64) -> bytes:
    """A state dict of these shapes, all in one storage of `count` numbers."""
    parts = [storage_id(count), b"\x940", named("torch._utils", "_rebuild_tensor_v2"), b"\x940}("]
    for name, shape in shapes.items():
        strides = [1] * len(shape)
        for axis in range(len(shape) - 2, -1, -1):
            strides[axis] = min(2**46, strides[axis + 1] * shape[axis + 1])
        # Memo 0 is the storage, memo 1 the function.
        parts += [text(name), b"h\x01(h\x00K\x00", sizes(*shape), sizes(*strides), b"\x89NtR"]
    body = b"".join(parts)
    return archive(program(body + b"u"), {"data/0": struct.pack("<f", 0.25) * count})  # a resampling filter, too


def plain(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of tensors of these shapes, each in memory of its own."""
    return save({name: torch.full(shape, 0.25) for name, shape in shapes.items()})


def unet(levels: int = 1, blocks: int = 1, side: int = 64, width: int = 8) -> dict[str, tuple[int, ...]]:
    """The few names by which a network is known to be one, and nothing else of it."""
    names: dict[str, tuple[int, ...]] = {f"enc.{side}x{side}_conv.weight": (width, 1, 3, 3)}
    for level in range(levels):
        here = f"enc.{side >> level}x{side >> level}_block"
        names |= {f"{here}0.norm0.weight": (width,), f"{here}0.conv1.weight": (width, width, 3, 3)}
    names |= {f"enc.{side}x{side}_block{k}.conv1.weight": (width, width, 3, 3) for k in range(blocks)}
    return names


def shared_child(modules: int, tensors: int) -> bytes:
    """Modules that are all one and the same, which holds some tensors."""
    view = tensor_of(storage_id(2)) + b"\x94"
    held = b"}(" + b"".join(text(f"t{k}") + b"h\x00" for k in range(tensors)) + b"u"
    child = reconstructed("A", b"}" + text("_parameters") + held + b"s") + b"\x94"
    many = b"}(" + b"".join(text(f"m{k}") + b"h\x01" for k in range(modules)) + b"u"
    whole = reconstructed("EDMPrecond", b"}" + text("_modules") + many + b"s")
    return archive(program(view + b"0" + child + b"0}" + text("ema") + whole + b"s"), {"data/0": bytes(8)})


def shared_names(names: int, modules: int) -> bytes:
    """Modules that share one dict of submodules that are all None."""
    shared = b"}(" + b"".join(text(f"n{k}") + b"N" for k in range(names)) + b"u\x940"
    many = b"}("
    for k in range(modules):
        many += text(f"m{k}") + reconstructed("A", b"}" + text("_modules") + b"h\x00s")
    whole = reconstructed("EDMPrecond", b"}" + text("_modules") + many + b"us")
    return program(shared + b"}" + text("ema") + whole + b"s")


def one_storage(times: int, numbers: int) -> bytes:
    """Weights that all are the whole of one storage."""
    return state({f"w{k}": (numbers,) for k in range(times)} | unet(), numbers)


def doubled_network() -> bytes:
    """A whole network whose weights all view one storage."""
    with torch.device("meta"):
        made = SongUNet.ddpmpp(16, 1, 128, (2, 2), 2)
    shapes = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    return state(shapes, max(torch.Size(shape).numel() for shape in shapes.values()))


def arrays(times: int, size: int) -> bytes:
    """Buffers that are numpy arrays of one and the same bytes."""
    body = named("numpy.core.multiarray", "_reconstruct") + b"\x940"
    body += (
        named("numpy", "dtype")
        + b"("
        + text("u1")
        + b"tR(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x940"
    )
    body += b"B" + struct.pack("<I", size) + bytes(size) + b"\x940"
    held = b"}("
    for k in range(times):
        held += text(f"b{k}") + b"h\x00)R(K\x01" + sizes(size) + b"h\x01\x89h\x02tb"
    node = reconstructed("EDMPrecond", b"}" + text("_buffers") + held + b"us")
    return program(body + b"}" + text("ema") + node + b"s")


def members(count: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("archive/data.pkl", program(b"}", 2))
    data = bytearray(file.getvalue())
    # The central directory by hand: zipfile takes a second for 10,000.
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry, name = bytes(data[start:end]), b"archive/data.pkl"
    many = b"".join(entry.replace(name, b"%016d" % k) for k in range(count))
    return (
        bytes(data[:end])
        + many
        + (b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 65535, 65535, len(entry) + len(many), start, 0))
    )


def header(entries: object, data: bytes = b"") -> bytes:
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(content)) + content + data


def empties(count: int) -> bytes:
    entry = '"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return header(("{" + ",".join(entry % k for k in range(count)) + "}").encode())


def nested_keys(depth: int) -> bytes:
    """A list of storage keys that is a pair of a pair of a pair."""
    keys = text("0") + b"\x94" + b"".join(b"0h" + bytes([k]) + b"h" + bytes([k]) + b"\x86\x94" for k in range(depth))
    return legacy(program(b"}", 2)).removesuffix(pickle.dumps([], 2)) + program(b"]" + keys + b"a")


FLOODS: Mapping[str, Callable[[], bytes]] = {
    "resolution of 0": lambda: state({"enc.0x0_conv.weight": (8, 1, 3, 3), "enc.0x0_block0.norm0.weight": (8,),
                                      "enc.0x0_block0.conv1.weight": (8, 8, 3, 3)}, 576),
    "resolution of 65,536": lambda: state(unet(17, 1, 65536), 576),
    "resolution of 65,536 of a network": lambda: plain(unet(1, 1, 65536, 4)),
    "storage keys nested in pairs": lambda: nested_keys(60),
    "storage keys nested in a few pairs": lambda: nested_keys(22),
    "45,000 modules that share one child": lambda: shared_child(45_000, 100),
    "one module of 45,000 tensors that all are one": lambda: shared_child(1, 45_000),
    "modules that share 100,000 names": lambda: shared_names(100_000, 2_000),
    "30,000 blocks": lambda: state(unet(1, 30_000), 576),
    "blocks times levels": lambda: state(unet(11, 8_000, 1024), 576),
    "as many blocks as there are tensors": lambda: plain(unet(1, 9_000, width=1)),
    "blocks times levels of a network": lambda: plain(unet(11, 900, 1024, 4)),
    "as many blocks as are read": lambda: plain(
        unet(1, 499, width=1) | {f"surplus.{k}": (1,) for k in range(9_490)}),
    "weights that all are one storage": lambda: one_storage(440, 1_250_000),
    "network whose weights all are one storage": doubled_network,
    "arrays that all are the same bytes": lambda: arrays(1_000, 2_000_000),
    "long class name over and over": lambda: program(
        text("a" * 1_000_000) + b"\x940" + text("EasyDict") + b"\x940" + b"h\x00h\x01\x93" * 20_000 + b"N"),
    "long module of dots": lambda: program(named("." * 5_000_000, "_reconstruct_persistent_obj")),
    "device of many words over and over": lambda: program(
        b"(" + b"N" * 100_000 + b"t\x940" + named("torch", "device") + b"\x940" + b"h\x01h\x00R0" * 10_000 + b"N"),
    "sets": lambda: program(b"\x8f" * 1_100_000 + b"N"),
    "tensors": lambda: archive(program(
        storage_id(2) + b"\x940" + named("torch._utils", "_rebuild_tensor_v2") + b"\x940"
        + b"(h\x00K\x00" + sizes(*[2**40] * 8) * 2 + b"\x89Nt\x940" + b"h\x01h\x02R" * 50_000, 2), {"data/0": bytes(8)}),
    "attributes over and over": lambda: program(
        named("torch.nn.modules.container", "Sequential") + b"\x940}("
        + b"".join(text(str(k)) + b"N" for k in range(100_000)) + b"u\x940" + b"h\x00)\x81h\x01b" * 9),
    "objects within objects": lambda: program(
        named("torch.nn.modules.container", "Sequential") + b"\x94" + b"h\x00)\x81}" + text("a")
        + (b"h\x00)\x81}" + text("a")) * 40_000 + b"N" + b"sb" * 40_001),
    "no elements and huge axes": lambda: state(unet() | {"map_label.weight": (0, 2**46, 2**46)}, 576),
    "huge axes": lambda: state(unet(width=2**30), 576),
    "width beyond any": lambda: state({name: (2**28, 1, *shape[2:]) for name, shape in unet().items()}, 576),
    "archive of 300,000 members": lambda: members(300_000),
    "safetensors of 150,000 tensors": lambda: empties(150_000),
    "safetensors of 2^62 columns": lambda: header(
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
    "safetensors of 2^63 columns": lambda: header(
        {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}),
    "safetensors of 10,000 axes": lambda: header(
        {"enc.8x8_conv.weight": {"dtype": "F32", "shape": [1] * 10_000, "data_offsets": [0, 4]}}, bytes(4)),
    "safetensors nested deep": lambda: header(b'{"a":' * 100_000),
}  # fmt: skip
