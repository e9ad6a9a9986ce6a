"""Files that ask for work or memory without end, and damaged ones without number: refused in seconds, in bounded memory."""

import json
import os
import re
from pathlib import Path

import fuzzed
import measured
import pytest
import torch
from floods import FLOODS, plain, state, unet

from forks import Server
from stablefield.cli.entry import main
from stablefield.interop._inert import RefusedError
from stablefield.interop._published import read_published
from stablefield.interop._weight_files import read_weight_file

# What `weight_files` promises.
CONSTANT, TIMES, SECONDS = 256 * 2**20, 8, 20


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory, fork_server: Server) -> dict[str, tuple[Path, measured.Reading]]:
    """Every flood as a file, and what reading it took."""
    folder, paths = tmp_path_factory.mktemp("floods"), {}
    for number, (name, make) in enumerate(FLOODS.items()):
        paths[name] = folder / f"network-{number}.pkl"
        paths[name].write_bytes(make())
    found = measured.measure(fork_server, list(paths.values()), SECONDS)
    return {name: (path, found[path]) for name, path in paths.items()}


@pytest.mark.parametrize("name", FLOODS)
def test_flood_is_refused_in_seconds_and_in_memory_bounded_by_its_size(name: str, readings) -> None:
    path, reading = readings[name]
    assert reading.said.startswith(f"RefusedError: {path.name} is refused: ")
    assert len(reading.said) < 500
    assert reading.said.isprintable()
    assert reading.peak < TIMES * path.stat().st_size + CONSTANT
    assert reading.seconds < SECONDS / 2


def test_floods_are_small(readings) -> None:
    large = {name for name, (path, _) in readings.items() if path.stat().st_size > 6_000_000}
    assert large == {"archive of 300,000 members", "safetensors of 150,000 tensors"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resolution of 0", "names are not those of"),
        ("resolution of 65,536 of a network", "images would be 65,536 x 65,536 pixels"),
        ("30,000 blocks", "it has 30,002 tensors; a network has no more than 10,000"),
        ("as many blocks as there are tensors", "1 levels of 9,000 blocks, but 9,002 tensors are too few"),
        ("blocks times levels of a network", "11 levels of 900 blocks"),
        ("45,000 modules that share one child", "its modules are nested without end"),
        ("weights that all are one storage", r"tensors take 2,200,00\d,\d+ bytes, but the file has 5,0"),
        ("network whose weights all are one storage", "they are views of the same memory"),
        ("long class name over and over", "a name of 1,000,008 characters"),
    ],
)
def test_refusal_of_a_flood_says_what_there_is_too_much_of(name: str, told: str, readings) -> None:
    assert re.search(told, readings[name][1].said)


def test_weights_that_share_memory_are_read_where_the_file_has_as_many_bytes(tmp_path: Path) -> None:
    # One flat storage, as some programs save all weights: each a view of a part of its own.
    from foreign import saved

    from stablefield.networks import SongUNet

    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1, generator=torch.Generator().manual_seed(0))
    flat, views, place = torch.cat([value.flatten() for value in network.state_dict().values()]), {}, 0
    for name, value in network.state_dict().items():
        views[name] = flat[place : place + value.numel()].view(value.shape)
        place += value.numel()
    (tmp_path / "flat.pt").write_bytes(saved(views))
    found = read_published(tmp_path / "flat.pt", "edm").state
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,) * 9])
@pytest.mark.parametrize("name", ["map_label.weight", "map_augment.weight", "enc.8x8_block0.conv1.weight"])
def test_weights_without_elements_or_of_other_axes_are_refused(name: str, shape, tmp_path: Path) -> None:
    from stablefield.networks import SongUNet

    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1).state_dict()
    (tmp_path / "w.safetensors").write_bytes(
        plain({key: tuple(value.shape) for key, value in network.items()} | {name: shape})
    )
    with pytest.raises(RefusedError, match=r"w\.safetensors is refused"):
        read_published(tmp_path / "w.safetensors", "edm")


def test_number_of_float64_beyond_float32_is_refused_not_made_infinite(tmp_path: Path) -> None:
    from foreign import saved

    from stablefield.networks import SongUNet

    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1).double().state_dict()
    (tmp_path / "w.pt").write_bytes(saved(network | {"map_layer1.bias": torch.full((32,), 1e39, dtype=torch.float64)}))
    with pytest.raises(RefusedError, match="holds NaN, infinite values, or values too large for float32"):
        read_published(tmp_path / "w.pt", "edm")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16, torch.bool])
def test_weights_of_a_dtype_that_is_not_read_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from stablefield.networks import SongUNet

    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1).state_dict()
    save_file(network | {"map_layer1.bias": torch.zeros(32).to(dtype)}, tmp_path / "w.safetensors")
    with pytest.raises(RefusedError, match=f"map_layer1.bias has dtype {dtype}"):
        read_published(tmp_path / "w.safetensors", "edm")


def test_digits_of_other_scripts_are_no_resolution(tmp_path: Path) -> None:
    names = {key.replace("64x64", "٦٤x٦٤"): shape for key, shape in unet().items()}
    (tmp_path / "w.pt").write_bytes(state(names, 576))
    with pytest.raises(RefusedError, match="is refused"):
        read_published(tmp_path / "w.pt", "edm")


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "device", "folder", "link to nothing"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "net.pkl"
    if "fifo" in kind:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe" if "link" in kind else tmp_path / "pipe")
        path = path if "link" in kind else tmp_path / "pipe"
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nothing")
    with pytest.raises(ValueError, match=path.name):
        read_weight_file(path)
    with pytest.raises(SystemExit, match="2"):
        main(["import", str(path), "--out", str(tmp_path / "run")])
    assert path.name in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "there.pt").write_bytes(state({"w": (2,)}))
    (tmp_path / "here.pt").symlink_to("there.pt")
    assert list(read_weight_file(tmp_path / "here.pt")) == ["w"]


def test_name_of_a_file_reaches_neither_terminal_nor_run_with_its_control_characters(tmp_path: Path, capsys) -> None:
    path = tmp_path / "net\x1b[31m.pkl"
    path.write_bytes(b"hello, I am a text file")
    with pytest.raises(SystemExit, match="2"):
        main(["import", str(path), "--out", str(tmp_path / "run")])
    told = capsys.readouterr()
    assert r"net?[31m.pkl" in told.err
    assert "\x1b" not in told.err + told.out


@pytest.mark.parametrize("first", [0])
def test_damaged_files_give_a_network_or_one_sentence_and_nothing_else(
    first: int, tmp_path: Path, fork_server: Server
) -> None:
    done = fork_server.start_file(Path(fuzzed.__file__), [str(tmp_path), str(first), "490"])
    # The last line is the number of the file at which it ended.
    assert done.wait(300) == 0, done.stderr[-300:]
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert found["peak"] < TIMES * found["largest"] + CONSTANT
    assert found["slowest"] < fuzzed.SECONDS
    for kind in fuzzed.KINDS:
        assert found["counts"][f"{kind}: refused"] > 35
        assert found["counts"][f"{kind}: read"] >= 1
