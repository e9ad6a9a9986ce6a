"""Files as other programs write them: pickled modules that carry their source, and every trick a hostile pickle has."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# What such a file carries beside its tensors. Were it ever run, it would leave a file behind.
SOURCE = "import pathlib\npathlib.Path({canary!r}).touch()\nclass EDMPrecond: pass\n"


class EasyDict(dict):
    """A dict with attributes, as such files use for their options."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


EasyDict.__module__ = "somelib.util"


def _reconstruct_persistent_obj(meta: dict) -> object:
    raise AssertionError("the reconstruction function was called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent(nn.Module):
    """A module that pickles as a call of the reconstruction function with its source."""

    def __init__(self, class_name: str, source: str, **attributes: object) -> None:
        super().__init__()
        self.__dict__["_saved"] = (class_name, source, attributes)

    def __reduce__(self) -> tuple:
        class_name, source, attributes = self._saved
        state = {key: value for key, value in self.__dict__.items() if key != "_saved"} | attributes
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
        return _reconstruct_persistent_obj, (EasyDict(meta),)


@contextmanager
def foreign_modules() -> Generator[None]:
    """The modules of the other program, importable while its files are written."""
    modules = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "somelib": {},
        "somelib.util": {"EasyDict": EasyDict},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def disguised(module: nn.Module, source: str, **attributes: object) -> nn.Module:
    """`module` as the other program would hold it: the same names and tensors, classes that carry their source."""
    names = {"Encoder": "ModuleDict", "Decoder": "ModuleDict", "SongUNet": "SongUNet"}
    kind = type(module).__name__
    copy = nn.ModuleDict() if names.get(kind) == "ModuleDict" else Persistent(kind, source, in_channels=3, **attributes)
    for name, value in module._parameters.items():
        copy.register_parameter(name, value)
    for name, value in module._buffers.items():
        copy.register_buffer(name, value, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else disguised(child, source)
    return copy


def edm_file(
    network: nn.Module,
    class_name: str = "EDMPrecond",
    *,
    protocol: int = 4,
    source: str = SOURCE,
    kind: str = "pickle",
    inner: dict[str, object] | None = None,
    **attributes: object,
) -> bytes:
    """A snapshot as the EDM family writes it: a dict with the averaged network and what was around it.

    `inner` holds attributes of the network itself, `attributes` those of its preconditioning.
    """
    precond = Persistent(class_name, source, img_resolution=32, label_dim=0, use_fp16=False, **attributes)
    precond._modules["model"] = disguised(network, source, **(inner or {}))
    content = {
        "ema": precond,
        "loss_fn": Persistent("EDMLoss", source, P_mean=-1.2, P_std=1.2, sigma_data=0.5),
        "augment_pipe": Persistent("AugmentPipe", source, p=0.12),
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="cifar.zip", max_size=50_000),
    }
    file = io.BytesIO()
    with foreign_modules():
        if kind == "pickle":
            pickle.dump(content, file, protocol=protocol)
        else:
            torch.save(content, file, _use_new_zipfile_serialization=kind == "zip", pickle_protocol=protocol)
    return file.getvalue()


def saved(state: dict[str, Tensor] | object, *, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


# Opcodes by hand.


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def program(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def archive(pickled: bytes, entries: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        target.writestr("archive/data.pkl", pickled)
        target.writestr("archive/byteorder", b"little")
        for name, data in (entries or {}).items():
            target.writestr(f"archive/{name}", data)
    return file.getvalue()


def legacy(pickled: bytes, keys: object = (), storages: bytes = b"", system: bytes | None = None) -> bytes:
    """A file of torch's older format around a hand-written pickle."""
    if system is None:
        system = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + system
    return head + pickled + pickle.dumps(list(keys), 2) + storages


def hostile(canary: str) -> dict[str, bytes]:
    """Files that would touch `canary`, or worse, when read by `pickle` or a careless reader."""
    touch = text(f"touch {canary}")
    call = b"(" + touch + b"tR"
    code = text(f"__import__('pathlib').Path({canary!r}).touch()")
    mark_code = b"(" + code + b"tR"
    os_system = named("os", "system") + call
    stacked = text("os") + text("system") + b"\x93" + call
    hidden = saved_storage_with(program(os_system, 2))
    network = reconstructed("EDMPrecond", named("os", "system") + call)
    persistent = named("torch_utils.persistence", "_reconstruct_persistent_obj")
    return {
        "os.system by REDUCE": program(os_system),
        "os.system by REDUCE, protocol 0": os_system + b".",
        "posix.system": program(named("posix", "system") + call),
        "subprocess by REDUCE": program(named("subprocess", "check_output") + b"(]" + text("touch") + b"a" + b"tR"),
        "builtins.eval": program(named("builtins", "eval") + mark_code),
        "builtins.exec": program(named("builtins", "exec") + mark_code),
        "__builtin__.exec": program(named("__builtin__", "exec") + mark_code),
        "builtins.getattr": program(named("builtins", "getattr") + b"(" + named("os", "system") + text("x") + b"tR"),
        "builtins.__import__": program(named("builtins", "__import__") + b"(" + text("antigravity") + b"tR"),
        "STACK_GLOBAL": program(stacked),
        "STACK_GLOBAL from the memo": program(
            text("os") + b"\x94" + text("system") + b"\x94" + b"h\x00h\x01\x93" + call
        ),
        "STACK_GLOBAL with a dotted name": program(
            text("collections") + text("OrderedDict.fromkeys.__self__") + b"\x93)R"
        ),
        "STACK_GLOBAL with a dotted allowed module": program(
            text("torch") + text("_utils._rebuild_tensor_v2.__globals__") + b"\x93)R"
        ),
        "STACK_GLOBAL of a number": program(b"K\x01" + text("system") + b"\x93"),
        "INST": b"(S'touch'\nios\nsystem\n.",
        "INST with text": program(b"(" + touch + b"ios\nsystem\n"),
        "OBJ": program(b"(" + named("os", "system") + touch + b"o"),
        "NEWOBJ": program(named("subprocess", "Popen") + b"(" + touch + b"t\x81"),
        "NEWOBJ_EX": program(named("subprocess", "Popen") + b")}\x92"),
        "NEWOBJ of an allowed function": program(named("torch._utils", "_rebuild_tensor_v2") + b")\x81"),
        "EXT1": program(touch + b"\x82\x01" + b"\x85R"),
        "EXT2": program(touch + b"\x83\x01\x00" + b"\x85R"),
        "EXT4": program(touch + b"\x84\x01\x00\x00\x00" + b"\x85R"),
        "copyreg.add_extension": program(
            named("copyreg", "add_extension") + b"(" + text("os") + text("system") + b"K\x01tR" + b"\x82\x01" + call
        ),
        "copyreg._reconstructor": program(
            named("copyreg", "_reconstructor") + b"(" + named("subprocess", "Popen") * 2 + b"NtR"
        ),
        "BUILD on a name": program(named("collections", "OrderedDict") + b"}" + text("__init__") + touch + b"sb"),
        "BUILD on a name with slots": program(named("torch", "Size") + b"N}" + text("__call__") + touch + b"s\x86b"),
        "BUILD on a text": program(touch + b"}b"),
        "BUILD with a state from os": program(named("collections", "OrderedDict") + b")R" + os_system + b"b"),
        "call of a value": program(touch + b")R"),
        "call of a set": program(b"\x8f(" + touch + b"tR"),
        "call of a dtype": program(named("torch", "float32") + b")R"),
        "call of a node": program(reconstructed("EDMPrecond", b"}") + b")R"),
        "OrderedDict from a list": program(named("collections", "OrderedDict") + b"(]" + os_system + b"atR"),
        "os.system inside of a network": program(b"}" + text("ema") + network + b"s"),
        "reconstruction function without its arguments": program(persistent + b")R"),
        "reconstruction function with a list": program(persistent + b"(]tR"),
        "reconstruction function from elsewhere": program(
            named("evil.persistence_", "_reconstruct_persistent_obj") + b")R"
        ),
        "functools.partial": program(named("functools", "partial") + b"(" + named("os", "system") + touch + b"tR)R"),
        "torch.load by name": program(named("torch", "load") + b"(" + touch + b"tR"),
        "torch.nn.Module": program(named("torch.nn.modules.module", "Module") + b")\x81"),
        "torch.jit": program(named("torch.jit._serialization", "load") + b"(" + touch + b"tR"),
        "numpy load": program(named("numpy", "load") + b"(" + touch + b"tR"),
        "numpy objects": program(named("numpy", "dtype") + b"(" + text("O8") + b"\x89\x88tR"),
        "dill": program(named("dill._dill", "_create_code") + b"(tR"),
        "nested pickle in a storage": hidden,
        "nested pickle in the header of a storage": saved_storage_with(b"", system=program(os_system, 2)),
        "storage within a storage": saved_storage_with(
            program(named("torch.storage", "_load_from_bytes") + b"(" + b"B\x01\x00\x00\x00x" + b"tR", 2)
        ),
        "persistent id in a plain pickle": program(text("storage") + b"Q"),
        "persistent id as text": b"Pos.system\n.",
        "zip file": archive(program(os_system, 2)),
        "zip file with a foreign persistent id": archive(
            program(b"(" + text("module") + named("os", "system") + b"tQ", 2)
        ),
        "zip file of torch.jit": archive(program(named("__torch__", "Net") + b")\x81}b", 2), {"code/x.py": b"1"}),
        "zip file without a pickle": archive(program(b"N", 2)).replace(b"data.pkl", b"evil.pkl"),
        "older torch file": legacy(program(os_system, 2)),
        "older torch file, in its header": legacy(program(b"}", 2), system=program(os_system, 2)),
        "older torch file, after its pickle": legacy(program(b"}", 2), keys=())[:-4] + program(os_system, 2),
    }


def reconstructed(class_name: str, state: bytes) -> bytes:
    meta = b"}(" + text("class_name") + text(class_name) + text("state") + state + b"u"
    return named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"(" + meta + b"tR"


def saved_storage_with(pickled: bytes, system: bytes | None = None) -> bytes:
    inner = legacy(pickled, system=system)
    data = b"B" + struct.pack("<I", len(inner)) + inner
    return program(named("torch.storage", "_load_from_bytes") + b"(" + data + b"tR")


def storage_id(count: int, key: str = "0", kind: str = "FloatStorage", rest: bytes = b"") -> bytes:
    number = b"\x8a\x08" + struct.pack("<q", count)
    return b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number + rest + b"tQ"


def tensor_of(
    storage: bytes, offset: bytes = b"K\x00", shape: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    arguments = storage + offset + shape + stride + b"\x89" + named("collections", "OrderedDict") + b")R"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def bombs() -> dict[str, bytes]:
    """Files that would take memory or time without end."""
    long = struct.pack("<q", 2**62)
    two = struct.pack("<2f", 1, 2)
    # The memo's entry k is a pair of entry k - 1 and itself: a tuple with 2^k leaves in 6 k bytes.
    laughs = b"0".join(b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86\x94" for k in range(60))
    itself = b"]\x94h\x00a" + b"\x85" * 10
    huge = 2**40
    wide = b"\x8a\x06" + struct.pack("<q", huge)[:6] + b"\x85"
    nodes = reconstructed("A", b"}") + b"\x94"
    for k in range(40):
        pair = b"}(" + b"".join(text(name) + b"h" + bytes([k]) for name in "ab") + b"u"
        nodes += b"0" + reconstructed("A", b"}" + text("_modules") + pair + b"s") + b"\x94"
    return {
        "bytes of 2^62": program(b"\x8e" + long),
        "text of 2^62": program(b"\x8d" + long),
        "bytearray of 2^62": program(b"\x96" + long),
        "frame of 2^62": program(b"\x95" + long + b"N"),
        "number of a million bits": program(b"\x8b" + struct.pack("<I", 125_000) + b"\x7f" * 125_000),
        "number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "tuple of 2^60 as a key": program(b"K\x01\x940}" + laughs + b"K\x02s"),
        "tuple of 2^60 in a set": program(b"K\x01\x940\x8f(" + laughs + b"\x90"),
        "tuple of 2^60 as the whole": program(b"K\x01\x940" + laughs),
        "tuple nested 100,000 deep": program(b")" + b"\x85" * 100_000),
        "list nested 100,000 deep": program(b"]" * 100_000 + b"a" * 99_999),
        "list that holds itself": program(itself),
        "marks without end": program(b"(" * 200_000),
        "storage of 4 TB": archive(program(b"}" + text("w") + tensor_of(storage_id(huge)) + b"s", 2), {"data/0": two}),
        "storage of 4 TB, older": legacy(program(b"}" + text("w") + tensor_of(storage_id(huge)) + b"s", 2), ["0"], two),
        "negative storage": archive(program(b"}" + text("w") + tensor_of(storage_id(-8)) + b"s", 2), {"data/0": two}),
        "one number as 2^40": archive(
            program(b"}" + text("enc.8x8_conv.weight")
                    + tensor_of(storage_id(2), shape=wide, stride=b"K\x00\x85") + b"s", 2), {"data/0": two}),
        "compressed zip": archive(
            program(b"}" + text("w") + tensor_of(storage_id(25_000_000)) + b"s", 2),
            {"data/0": bytes(100_000_000)}, zipfile.ZIP_DEFLATED),
        "modules of 2^40": program(nodes + b"0}" + text("ema") + b"h\x28s"),
        "module within itself": program(
            b"}" + text("ema") + reconstructed("A", b"}\x94" + text("_modules") + b"}\x94s") + b"\x94s"
            + b"0h\x01" + text("a") + b"h\x02s0}" + text("ema") + b"h\x02s"),
        "storages over and over": program(
            b"B" + struct.pack("<I", len(STORAGE)) + STORAGE + b"\x940"
            + (named("torch.storage", "_load_from_bytes") + b"h\x00\x85R0") * 1000 + b"N"),
        "numbers of one hash as keys": program(b"}(" + b"".join(
            b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"N" for k in range(20_000)) + b"u"),
        "numbers of one hash in the memo": b"\x80\x02" + b"".join(
            b"Np" + str(k * (2**61 - 1)).encode() + b"\n0" for k in range(20_000)) + b"N.",
        "sets over and over": program(
            b"]\x94(" + text("b") * 20_000 + b"e0" + (named("builtins", "set") + b"h\x00\x85R0") * 1000 + b"N"),
    }  # fmt: skip


STORAGE = saved(torch.zeros(2500).untyped_storage(), legacy=True)
