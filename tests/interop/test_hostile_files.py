"""What a hostile file can do when it is imported: nothing."""

import builtins
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import foreign
import pytest
import torch

from stablefield.interop._inert import RefusedError, TensorView, plain_text
from stablefield.interop._pickles import interpret
from stablefield.interop._published import read_published
from stablefield.interop._weight_files import read_weight_file
from stablefield.networks import SongUNet

# Files are hostile whatever they would touch; the name is part of them.
CANARY = "canary-of-the-import-test"
HOSTILE, BOMBS = foreign.hostile(CANARY), foreign.bombs()

# An audit hook cannot be taken away again, so one is set for good and listens only while a file is read.
WATCHED = {"import", "exec", "compile", "pickle.find_class", "os.system", "os.exec", "os.fork", "os.posix_spawn"}
WATCHED |= {
    "subprocess.Popen",
    "socket.connect",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "shutil.rmtree",
    "ctypes.dlopen",
}
heard: list[str] | None = None


def listen(event: str, arguments: tuple) -> None:
    if heard is not None and (event in WATCHED or (event == "open" and str(arguments[1]) not in ("rb", "r", "None"))):
        heard.append(f"{event} {arguments[:1]}")


sys.addaudithook(listen)


@pytest.fixture
def events() -> Iterator[list[str]]:
    """What Python did of note while a file was read."""
    global heard
    heard = []
    yield heard
    heard = None


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modules that reading any file imports at its first time."""
    path = tmp_path_factory.mktemp("warm") / "file.pt"
    "".encode("cp437")  # zipfile decodes names by it
    for kind in ("pickle", "zip", "legacy"):
        path.write_bytes(foreign.edm_file(tiny(), kind=kind))
        read_published(path)


def tiny() -> SongUNet:
    return SongUNet.ddpmpp(8, 1, 8, (1, 2), 1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_and_nothing_is_executed_or_written(
    name: str, tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "network.pkl"
    path.write_bytes(HOSTILE[name])
    events.clear()
    modules = set(sys.modules)
    with pytest.raises(RefusedError, match=r"network\.pkl is refused: ") as refusal:
        read_published(path, "edm")
    assert events == []
    assert set(sys.modules) == modules
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.pkl"]
    assert len(str(refusal.value)) < 400
    assert str(refusal.value).isprintable()


def test_the_same_files_do_harm_when_they_are_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    for name in ("os.system by REDUCE", "builtins.eval", "STACK_GLOBAL from the memo"):
        pickle.loads(HOSTILE[name])
        (tmp_path / CANARY).unlink()


def test_what_is_heard_of_an_unpickled_file_is_not_nothing(events: list[str]) -> None:
    import pickle

    with pytest.raises(TypeError):
        pickle.loads(foreign.program(foreign.named("builtins", "eval") + b")R"))
    builtins.eval("1")
    assert any(event.startswith("pickle.find_class") for event in events)
    assert any(event.startswith("exec") for event in events)


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_within_seconds_and_without_memory(name: str, tmp_path: Path) -> None:
    import resource
    import time

    path = tmp_path / "network.pkl"
    path.write_bytes(BOMBS[name])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(RefusedError, match=r"network\.pkl is refused: "):
        read_published(path, "edm")
    assert time.process_time() - began < 20
    # KiB; the longest of these files makes half a million lists.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def test_refusal_names_what_the_file_refers_to(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    for name, word in (("os.system by REDUCE", "os.system"), ("zip file", "os.system"), ("NEWOBJ", "subprocess.Popen")):
        path.write_bytes(HOSTILE[name])
        with pytest.raises(RefusedError, match=f"refers to {word}, .* nothing in the file was executed"):
            read_weight_file(path)


def test_source_text_that_a_network_carries_is_not_run(tmp_path: Path, events: list[str]) -> None:
    path = tmp_path / "network.pkl"
    path.write_bytes(foreign.edm_file(tiny(), source=foreign.SOURCE.format(canary=str(tmp_path / CANARY))))
    assert b"pathlib" in path.read_bytes()
    events.clear()
    read_published(path)
    assert not [event for event in events if not event.startswith("open")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.pkl"]


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_every_cut_and_many_damages_of_a_good_file_are_refused_or_harmless(
    kind: str, tmp_path: Path, events: list[str]
) -> None:
    good = foreign.edm_file(SongUNet.ddpmpp(4, 1, 4, (1,), 1), kind=kind)
    path, chance, refused = tmp_path / "network.pkl", random.Random(0), 0
    for trial in range(60):
        data = bytearray(good)
        if trial % 4 == 0:
            data = data[: chance.randrange(len(data))]
        else:
            for _ in range(chance.choice((1, 1, 8))):
                # Mostly where the opcodes are dense: two thirds of the file are tensors.
                data[chance.randrange(len(data))] = chance.choice(
                    (chance.randrange(256), *b"(.RbcQN]}\x81\x85\x93\x94")
                )
        path.write_bytes(data)
        events.clear()
        try:
            read_published(path)
        except ValueError:
            refused += 1
        assert events == []
    assert refused > 12


def test_opcodes_are_counted() -> None:
    import io

    flood = foreign.program(b"N0" * 500 + b"N")
    with pytest.raises(RefusedError, match="more than 100 opcodes"):
        interpret(io.BytesIO(flood), max_opcodes=100)
    assert interpret(io.BytesIO(flood), max_opcodes=2_000) is None


def test_attributes_that_python_gives_a_meaning_are_only_names_here(tmp_path: Path) -> None:
    state = b"}(" + b"".join(
        foreign.text(name) + foreign.text("x") for name in ("__class__", "__setstate__", "__dict__", "class_name")
    ) + b"u"  # fmt: skip
    path = tmp_path / "network.pkl"
    path.write_bytes(foreign.program(foreign.reconstructed("EDMPrecond", state)))
    node = read_weight_file(path)
    assert type(node).__name__ == "Node"
    assert node.class_name == "EDMPrecond"
    assert node.attributes["__class__"] == "x"


def test_tensor_cannot_reach_out_of_its_storage_nor_repeat_it(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    state = tiny().state_dict()
    for shape, stride, offset in (((3,), (1,), 0), ((2,), (1,), 1), ((2,), (2,), 0), ((2, 2), (1, 1), 0)):
        view = foreign.tensor_of(
            foreign.storage_id(2),
            b"K" + bytes([offset]),
            b"(" + b"".join(b"K" + bytes([n]) for n in shape) + b"t",
            b"(" + b"".join(b"K" + bytes([n]) for n in stride) + b"t",
        )
        path.write_bytes(foreign.archive(foreign.program(view, 2), {"data/0": bytes(8)}))
        found = read_weight_file(path)
        assert isinstance(found, TensorView)
        with pytest.raises(RefusedError, match="exceeds its storage of 2 elements"):
            found.tensor()
    # The same from torch itself: one number seen 8 times.
    torch.save(state | {"map_layer0.bias": torch.zeros(1).expand(32)}, path)
    with pytest.raises(RefusedError, match="exceeds its storage of 1 elements"):
        read_published(path, "edm")


def test_text_of_a_file_is_shown_without_control_characters() -> None:
    assert plain_text("a\x1b[31m\nb" + "c" * 200) == "a?[31m?b" + "c" * 69 + "..."
    assert plain_text(object()) == "a object"
    assert plain_text(10**50) == "a huge number"
