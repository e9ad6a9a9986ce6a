"""Damaged files of weights, each a function of its number: run as a program by the tests, and by hand for longer.

    python fuzzed.py FOLDER FIRST COUNT    one line of JSON: what came of the files of these numbers

Small good files of every kind are damaged in their bytes and in their structure: opcodes of a pickle left out, doubled and
exchanged, numbers replaced by extreme ones, an archive written anew around a damaged part, a header of safetensors with
other shapes, dtypes and offsets. The process ends at the first file that took too long, and names it.
"""

import io
import json
import pickletools
import random
import resource
import signal
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import foreign
import torch
from safetensors.torch import save

from stablefield.interop._published import read_published
from stablefield.networks import SongUNet

SECONDS = 10
EXTREMES = (0, 1, -1, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**47, 2**48, 2**62, 2**63 - 1, -(2**63))
OPCODES = b"().RbcQN]}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94aesu0h2K\x8a"
KINDS = ("pickle", "zip", "legacy", "state zip", "state legacy", "safetensors", "state")

# What no file may make Python do. The hook cannot be taken away again, so it listens only while a file is read.
WATCHED = {"import", "exec", "compile", "pickle.find_class", "ctypes.dlopen", "socket.connect", "subprocess.Popen"}
heard: list[str] | None = None


def listen(event: str, arguments: tuple) -> None:
    if heard is None:
        return
    writes = event == "open" and str(arguments[1]) not in ("rb", "r", "None")
    if writes or event in WATCHED or event.startswith(("os.", "shutil.")):
        heard.append(f"{event} {str(arguments[:1])[:80]}")


def good() -> dict[str, bytes]:
    """A small good file of each kind."""
    network = SongUNet.ddpmpp(4, 1, 4, (1,), 1, generator=torch.Generator().manual_seed(0))
    files = {kind: foreign.edm_file(network, kind=kind) for kind in ("pickle", "zip", "legacy")}
    files |= {
        f"state {kind}": foreign.saved(network.state_dict(), legacy=kind == "legacy") for kind in ("zip", "legacy")
    }
    return files | {"safetensors": save(network.state_dict())}


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes replaced, left out, doubled, or cut off; numbers of 4 and 8 bytes replaced by extreme ones."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(out) + 1)
        match chance.randrange(6):
            case 0:
                out[place : place + 1] = bytes([chance.choice((chance.randrange(256), *OPCODES))])
            case 1:
                out[place : place + 8] = struct.pack("<q", chance.choice(EXTREMES))
            case 2:
                out[place : place + 4] = struct.pack("<I", chance.choice(EXTREMES) % 2**32)
            case 3:
                del out[place : place + chance.choice((1, 2, 16, 300))]
            case 4:
                out[place:place] = out[place : place + chance.choice((1, 4, 64))] * chance.choice((1, 3))
            case _:
                del out[max(1, place) :]
    return bytes(out)


def damaged_pickle(data: bytes, chance: random.Random) -> bytes:
    """The opcodes of the first pickle in `data` left out, doubled, exchanged or with other numbers; the rest as it was."""
    stream = io.BytesIO(data)
    starts = [place for _, _, place in pickletools.genops(stream)]
    rest, ends = data[stream.tell() :], [*starts[1:], stream.tell()]
    codes = [data[a:b] for a, b in zip(starts, ends, strict=True)]
    for _ in range(chance.choice((1, 1, 2, 5))):
        place, other = chance.randrange(1, len(codes)), chance.randrange(1, len(codes))
        match chance.randrange(6):
            case 0:
                codes[place] = b""
            case 1:
                codes[place : place + chance.choice((1, 5, 40))] = [b"".join(codes[place : place + 5])] * chance.choice(
                    (1, 2, 9)
                )
            case 2:
                codes[place], codes[other] = codes[other], codes[place]
            case 3:
                codes[place] = b"\x8a\x08" + struct.pack("<q", chance.choice(EXTREMES))
            case 4:
                codes[place] = bytes([chance.choice(OPCODES)])
            case _:
                # Another text of the same kind: a name, a key or a class.
                texts = [k for k, code in enumerate(codes) if code[:1] in (b"X", b"c", b"\x8c")]
                if texts:
                    codes[chance.choice(texts)] = codes[chance.choice(texts)]
    return b"".join(codes) + rest


def damaged_archive(data: bytes, chance: random.Random) -> bytes:
    """The archive written anew with a damaged part, so that its sums are right; or with parts left out or doubled."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    place = chance.randrange(len(parts)) if chance.random() < 0.3 else 0
    name, content = parts[place]
    match chance.randrange(5):
        case 0:
            del parts[place]
        case 1:
            parts[place] = (parts[chance.randrange(len(parts))][0], content)
        case _:
            damage = damaged_pickle if name.endswith("data.pkl") and chance.random() < 0.8 else damaged_bytes
            parts[place] = (name, damage(content, chance) if content else b"x")
    file = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if chance.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in dict(parts).items():
            archive.writestr(name, content)
    return file.getvalue()


def damaged_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with other names, shapes, dtypes and offsets in its header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(chance.choice((1, 1, 3))):
        name = chance.choice([name for name, entry in header.items() if isinstance(entry, dict)])
        entry = header[name]
        odd = chance.choice((*EXTREMES, None, "", "\x1b[31m", [], {}, 1.5, float("nan"), True, 10**400))
        match chance.randrange(6):
            case 0:
                entry["shape"] = [chance.choice(EXTREMES) for _ in range(chance.choice((0, 1, 4, 70)))]
            case 1:
                entry["dtype"] = chance.choice(
                    ("F8_E4M3", "F8_E5M2", "F4", "U64", "C64", "BOOL", "F16", "BF16", "I8", "F64")
                )
            case 2:
                entry["data_offsets"] = [chance.choice((0, *EXTREMES)), chance.choice((4, 16, *EXTREMES))]
            case 3:
                entry[chance.choice(("shape", "dtype", "data_offsets"))] = odd
            case 4:
                header[name] = odd
            case _:
                header = {
                    chance.choice((key, key, "enc.0x0_conv.weight", "\x1b]0;x\x07", "")): v for key, v in header.items()
                }
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + content


def damaged_state(chance: random.Random) -> bytes:
    """A whole file whose tensors are not those of a network: other names, shapes, dtypes, strides or values."""
    make = chance.choice((SongUNet.ddpmpp, SongUNet.ncsnpp))
    network = make(8, 1, 4, chance.choice(((1,), (1, 2))), chance.choice((1, 2)), classes=chance.choice((0, 3)))
    state: dict[str, torch.Tensor] = dict(network.state_dict())
    for _ in range(chance.choice((1, 1, 2, 4))):
        name = chance.choice((*state, *[key for key in state if "_conv.w" in key or "map_" in key or "block0" in key]))
        side = chance.choice((1, 4, 8, 16, 65536))
        match chance.randrange(7):
            case 0:
                state[name] = torch.zeros(
                    [chance.choice((0, 1, 2, 4, 9)) for _ in range(chance.choice((0, 1, 2, 4, 9)))]
                )
            case 1:
                dtype = chance.choice((torch.float16, torch.int64, torch.bool, torch.float64, torch.complex64))
                state[name] = state[name].to(dtype)
            case 2:
                state[name] = state[name].double() + chance.choice((1e39, float("nan"), float("inf"), -1e300))
            case 3:
                del state[name]
            case 4:
                state[chance.choice((f"enc.{side}x{side}_conv.weight", f"enc.{side}x{side}_block0.norm0.weight"))] = (
                    state[name]
                )
            case 5:
                state[f"enc.8x8_block{chance.choice((1, 2, 3))}.conv1.weight"] = state[name]
            case _:
                state[name] = torch.zeros(1).expand(state[name].shape)
    if chance.random() < 0.5:
        return foreign.saved(state, legacy=chance.random() < 0.5)
    return save({name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()})


def damaged(files: dict[str, bytes], number: int) -> tuple[str, bytes]:
    """The file of this number, and of which kind it is."""
    chance = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    structures: dict[str, Callable[[bytes, random.Random], bytes]] = {
        "zip": damaged_archive, "state zip": damaged_archive, "pickle": damaged_pickle, "safetensors": damaged_header,
    }  # fmt: skip
    if kind == "state":
        return kind, damaged_state(chance)
    damage = structures.get(kind, damaged_legacy) if chance.random() < 0.7 else damaged_bytes
    return kind, damage(files[kind], chance)


def damaged_legacy(data: bytes, chance: random.Random) -> bytes:
    """A file of torch's older format with one of its five pickles damaged."""
    stream, starts = io.BytesIO(data), [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        starts.append(stream.tell())
    place = chance.choice((0, 1, 2, 3, 3, 3, 4))
    return data[: starts[place]] + damaged_pickle(data[starts[place] :], chance)


def read(path: Path) -> str:
    """Read a file and say what came of it: "read", "refused", or what is wrong with how it was refused."""
    try:
        network = read_published(path, "edm")
        values = network.denoiser().state_dict().values()
    except ValueError as error:
        told = str(error)
        if path.name not in told or len(told) > 700 or not told.isprintable():
            return f"told as {told[:300]!r}"
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "read" if all(bool(value.isfinite().all()) for value in values) else "not finite"


def main(folder: Path, first: int, count: int) -> None:
    """Read the files `first` to `first + count - 1`, and print what came of them."""
    global heard
    files, counts, faults = good(), Counter[str](), list[str]()
    path, largest, slowest = folder / "network.pkl", 0, 0.0
    for data in files.values():  # what is imported at the first time
        path.write_bytes(data)
        assert read(path) == "read"
    "".encode("cp437")
    sys.addaudithook(listen)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + count):
        kind, data = damaged(files, number)
        path.write_bytes(data)
        signal.alarm(6 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + SECONDS, resource.RLIM_INFINITY))
        sys.stderr.write(f"{number}\n")  # should the process end here
        sys.stderr.flush()
        heard, began = [], time.process_time()
        said = read(path)
        done, heard = heard, None
        slowest, largest = max(slowest, time.process_time() - began), max(largest, len(data))
        counts[f"{kind}: {said if said in ('read', 'refused') else 'at fault'}"] += 1
        if said not in ("read", "refused") or done:
            faults.append(f"file {number}, {kind}: {said} {done}")
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    record = {"counts": counts, "faults": faults[:20], "largest": largest, "peak": peak, "slowest": slowest}
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
