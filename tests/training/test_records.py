"""What a run writes and reads back is told by name when it is damaged, and nothing but regular files is opened."""

import copy
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_interruptions import SMALL, go, start, trained

from stablefield.training import _run_folder as run_folder
from stablefield.training._checkpoint import CheckpointError, State, read_state, save
from stablefield.training._ema import LENGTHS
from stablefield.training._model import open_model
from stablefield.training._post_hoc import combine, snapshot_steps, take_snapshot
from stablefield.training._records import append_line, read_lines, seal
from stablefield.training._run_folder import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that has everything a run can have, written under the usual umask."""
    found = os.umask(0o022)
    try:
        run = start(
            tmp_path_factory.mktemp("finished") / "run",
            dataclasses.replace(SMALL, steps=4, checkpoint_every=2, log_every=1, ema_snapshot_every=2),
        )
        go(run)
    finally:
        os.umask(found)
    return run.path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    found = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, found)


def damage_told(read: Callable[[], object], path: Path, wanted: object) -> bool:
    """Whether reading says that `path` is damaged; if not, nothing has changed."""
    try:
        found = read()
    except ValueError as error:
        message = str(error)
    else:
        assert found == wanted
        return False
    assert str(path) in message
    return True


def flips(path: Path, every: int) -> Iterator[bytes]:
    """The content of a file with one bit flipped, for every `every`-th bit, written in place each time."""
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), every):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        yield bytes(damaged)
    path.write_bytes(whole)


def test_no_flipped_bit_of_a_state_makes_another_state(tmp_path: Path) -> None:
    folder = tmp_path / "kept"  # a name that does not tell the step
    save(folder, State(50, 1600), trained(0))
    path = folder / "state.json"
    told = [damage_told(lambda: read_state(folder), path, State(50, 1600)) for _ in flips(path, 5)]
    assert sum(told) > 0.8 * len(told) > 200


def test_a_flipped_bit_of_the_step_does_not_resume_elsewhere(run: RunFolder) -> None:
    path = run.checkpoint(4) / "state.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 0'))
    newest = run.newest()
    assert newest is not None
    assert newest[1].step == 2
    assert [str(path) in complaint for complaint in newest[2]] == [True]


def as_before(path: Path) -> None:
    """A record as it was before records carried checksums."""
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps(record, indent=2) + "\n")


def test_runs_from_before_checksums_open_and_go_on_to_the_same_bytes(run: RunFolder) -> None:
    wanted = (run.checkpoint(4) / "model.safetensors").read_bytes()
    shutil.rmtree(run.checkpoint(4))
    as_before(run.path / "config.json")
    as_before(run.checkpoint(2) / "state.json")
    log = run.path / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "checksum"}) + "\n" for line in lines))
    assert open_model(run.path).step == 2
    go(run)
    assert (run.checkpoint(4) / "model.safetensors").read_bytes() == wanted
    assert [entry["step"] for entry in run.metrics()] == [1, 2, 3, 4]


def test_a_state_from_before_checksums_is_held_against_the_name_of_its_folder(run: RunFolder) -> None:
    path = run.checkpoint(4) / "state.json"
    as_before(path)
    assert read_state(path.parent).step == 4
    path.write_text(path.read_text().replace('"step": 4', '"step": 0'))
    with pytest.raises(CheckpointError, match=r"state\.json cannot be used.*its step is 0"):
        read_state(path.parent)


def test_no_flipped_bit_of_a_config_makes_another_run(run: RunFolder) -> None:
    path, wanted = run.path / "config.json", run.config()
    told = [damage_told(run.config, path, wanted) for _ in flips(path, 37)]
    assert sum(told) > 0.5 * len(told) > 100


def test_a_config_that_was_changed_on_purpose_says_how_to_mean_it(run: RunFolder) -> None:
    path = run.path / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record))  # another layout is no other content
    assert run.config().recipe.steps == 4
    record["recipe"]["steps"] = 6
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match='remove its entry "checksum"'):
        run.config()
    del record["checksum"]
    path.write_text(json.dumps(record))
    assert run.config().recipe.steps == 6


def test_no_flipped_bit_of_a_snapshot_makes_another_average(tmp_path: Path) -> None:
    for step in (10, 20):
        torch.manual_seed(step)
        take_snapshot(tmp_path, step, [(length, torch.nn.Linear(2, 2)) for length in LENGTHS])

    def read() -> object:
        return {name: value.tolist() for name, value in combine(tmp_path, 0.08)[0].items()}

    path, wanted = tmp_path / "step-00000020.safetensors", read()
    told = [damage_told(read, path, wanted) for _ in flips(path, 13)]
    assert sum(told) > 0.8 * len(told) > 200


def test_a_snapshot_from_before_checksums_is_read(tmp_path: Path) -> None:
    linear = torch.nn.Linear(2, 2)
    tensors = {
        f"{length}/{name}": value.detach().clone() for length in LENGTHS for name, value in linear.named_parameters()
    }
    metadata = {"averages": json.dumps({"step": 10, "lengths": list(LENGTHS)})}
    save_file(tensors, tmp_path / "step-00000010.safetensors", metadata)
    assert snapshot_steps(tmp_path) == [10]
    torch.testing.assert_close(combine(tmp_path, 0.08)[0]["weight"], linear.weight.detach())


DAMAGED = [
    b'{"step": 3, "loss": 1.0, "checksum": "0123456789abcdef"}',
    b'{"step": 3, "lo',
    b"\0" * 50,
    b'\xff\xfe{"step": 3}',
    b'{"step": 3, "loss": NaN}',
    b'{"step": 3, "loss": 1e400}',
    b'{"step": "3"}',
    b'{"step": true}',
    b'{"step": 3, "loss": "low"}',
    b'{"step": 3, "bin_edges": [1.0], "bin_loss": [1.0]}',
    b'{"step": 3, "bin_edges": [2.0, 1.0], "bin_loss": [1.0, 1.0, 1.0]}',
    b'{"step": 3, "bin_edges": 1.0}',
    b'{"step": 3, "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[3]",
    b"3",
    b" " * 2**21,
]


def test_damaged_lines_of_the_log_are_dropped_and_the_others_kept(run: RunFolder) -> None:
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes().splitlines()
    assert len(whole) == 4
    kept = list(run.metrics())
    between = b"\n".join(DAMAGED)
    path.write_bytes(b"\n".join([whole[0], between, *whole[1:3], between, whole[3], between]))
    assert list(run.metrics()) == kept
    run.rewind_log(3)
    assert path.read_bytes().splitlines() == whole[:3]


def test_a_line_is_not_written_onto_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    append_line(path, {"step": 3})
    assert list(read_lines(path)) == [{"step": 1}, {"step": 3}]


def test_numbers_that_are_not_finite_do_not_make_a_line_that_is_dropped(run: RunFolder) -> None:
    run.log({"step": 5, "loss": 1.0, "images_per_second": float("inf")})
    assert list(run.metrics())[-1] == {"step": 5, "loss": 1.0}


def changed(*keys: str, to: object) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = to

    return change


WRONG = {
    "shape of texts": changed("shape", to=["1", "8", "8"]),
    "shape of two": changed("shape", to=[8, 8]),
    "shape of zero": changed("shape", to=[0, 8, 8]),
    "shape a number": changed("shape", to=8),
    "huge shape": changed("shape", to=[10**6, 10**6, 10**6]),
    "classes of text": changed("classes", to="ten"),
    "classes below zero": changed("classes", to=-1),
    "many classes": changed("classes", to=2**40),
    "data a number": changed("data", to=3),
    "manifest a list": changed("manifest", to=[]),
    "opening of other words": changed("opening", "exec", to="x"),
    "opening of other types": changed("opening", "resolution", to=[8]),
    "opening a text": changed("opening", to="no"),
    "version a list": changed("stablefield", to=[]),
    "format a list": changed("format", to=[1]),
    "recipe a text": changed("recipe", to="all"),
    "recipe of another kind": changed("recipe", "kind", to="MLPConfig"),
    "steps a text": changed("recipe", "steps", to="many"),
    "steps a half": changed("recipe", "steps", to=1.5),
    "steps true": changed("recipe", "steps", to=True),
    "steps a huge number": changed("recipe", "steps", to=10**400),
    "references a list": changed("recipe", "references", to=[3]),
    "network a number": changed("recipe", "network", to=3),
    "network a process": changed("recipe", "network", to={"kind": "EDM"}),
    "width a text": changed("recipe", "network", "width", to="wide"),
    "width huge": changed("recipe", "network", "width", to=2**40),
    "width beyond memory": changed("recipe", "network", "width", to=2**20),
    "depth beyond time": changed("recipe", "network", "depth", to=10**9),
    "depth of another run": changed("recipe", "network", "depth", to=2),
    "deep": changed("manifest", "deep", to=json.loads("[" * 200 + "]" * 200)),
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_config_is_the_fault_of_the_file(run: RunFolder, name: str, sealed: bool) -> None:
    path = run.path / "config.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    WRONG[name](record)
    path.write_text(json.dumps(seal(record) if sealed else record))
    with pytest.raises(ValueError, match=r"config\.json"):
        open_model(run.path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "3",
        "null",
        "NaN",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": 1e400}',
        '{"format": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("name", ["config.json", "checkpoints/step-00000004/state.json"])
def test_what_is_no_record_is_the_fault_of_the_file(run: RunFolder, name: str, text: str) -> None:
    (run.path / name).write_text(text)
    if name == "config.json":
        with pytest.raises(ValueError, match=r"config\.json cannot be used"):
            open_model(run.path)
        return
    opened = open_model(run.path)
    assert opened.step == 2
    assert str(run.path / name) in opened.complaints[0]


def test_a_record_as_large_as_a_bomb_is_not_read(run: RunFolder) -> None:
    with (run.path / "config.json").open("r+b") as file:
        file.truncate(2**40)  # a hole, which takes no space
    with pytest.raises(ValueError, match=r"config\.json cannot be used: it has more than 4,194,304 bytes"):
        run.config()


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "metrics.jsonl",
        ".stablefield.lock",
        "checkpoints/step-00000004/state.json",
        "checkpoints/step-00000004/model.safetensors",
        "checkpoints/step-00000004/optimizer.safetensors",
        "ema/step-00000004.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "device", "folder"])
@pytest.mark.usefixtures("no_waiting")
def test_nothing_but_regular_files_is_opened_in_a_run(run: RunFolder, name: str, kind: str, tmp_path: Path) -> None:
    path = run.path / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    if name.startswith("checkpoints"):
        opened = open_model(run.path)
        assert opened.step == 2
        assert str(path) in opened.complaints[0]
    elif name == "config.json":
        with pytest.raises(ValueError, match=r"no config\.json"):
            open_model(run.path)
    elif name.startswith("ema"):
        with pytest.raises(ValueError, match=r"snapshot .*step-00000004\.safetensors"):
            open_model(run.path, ema="0.1")
    elif name == "metrics.jsonl":
        with pytest.raises((ValueError, OSError), match=r"metrics\.jsonl"):
            run.log({"step": 9})
    else:
        with pytest.raises((ValueError, OSError), match="lock"):
            run.locked().__enter__()


def test_files_of_a_run_may_be_read_by_whom_the_umask_allows(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".png", ".safetensors"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


@pytest.mark.parametrize("moment", ["read_state", "load_weights"])
def test_a_reader_whose_checkpoint_is_pruned_takes_the_newest_again(
    run: RunFolder, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stablefield.training import _model as model

    module = run_folder if moment == "read_state" else model
    function, pruned = getattr(module, moment), []

    def prune(folder: Path, *more: object) -> object:
        if not pruned:
            pruned.append(folder)
            save(run.checkpoint(6), State(6, 192), copy.deepcopy(made))
            run.prune(1, 0)
        return function(folder, *more)

    made = restored(run)
    monkeypatch.setattr(module, moment, prune)
    opened = open_model(run.path)
    assert pruned == [run.checkpoint(4)]
    assert not pruned[0].exists()
    assert opened.step == 6
    assert opened.complaints == ()


def restored(run: RunFolder):
    from stablefield.training._checkpoint import Trained
    from stablefield.training._model import build_denoiser

    model = build_denoiser(run.config())
    return Trained(model, {"ema": copy.deepcopy(model)})


def test_a_resume_with_the_config_of_another_run_names_both_files(run: RunFolder, tmp_path: Path) -> None:
    other = start(tmp_path / "other", dataclasses.replace(SMALL, network=dataclasses.replace(SMALL.network, width=64)))  # pyrefly: ignore[unexpected-keyword]
    shutil.copy(other.path / "config.json", run.path / "config.json")
    with pytest.raises(ValueError, match=r"step-00000004/model\.safetensors does not fit.*config\.json"):
        go(run)
