"""Nothing is lost: kills, full disks and damaged files leave a run that goes on to the same bytes."""

import dataclasses
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forks import Server
from stablefield.cli.entry import main
from stablefield.data._digits import open_digits
from stablefield.training._checkpoint import CheckpointError, State, Trained, read_state, restore, save, sweep
from stablefield.training._loop import TrainingError, fit
from stablefield.training._post_hoc import remove_snapshots
from stablefield.training._recipe import MLPConfig
from stablefield.training._recipes import DIGITS
from stablefield.training._run import Run
from stablefield.training._run_config import RunConfig
from stablefield.training._run_folder import RunFolder

SMALL = dataclasses.replace(
    DIGITS,
    references="all",
    noise_band=0.0,
    steps=24,
    batch=32,
    network=MLPConfig(width=32, depth=1),
    sample_every=0,
    checkpoint_every=4,
    keep_last=2,
    keep_every=12,
)


def start(path: Path, recipe=SMALL) -> RunFolder:
    data = open_digits()
    config = RunConfig(
        data="digits", shape=data.shape, classes=0, manifest=data.manifest, recipe=recipe, version="test"
    )
    return RunFolder.create(path, config)


def go(folder: RunFolder) -> None:
    fit(folder, folder.config(), open_digits(), device=torch.device("cpu"))


def test_a_run_killed_at_random_moments_ends_in_the_bytes_of_a_quiet_one(tmp_path: Path, fork_server: Server) -> None:
    done = fork_server.start_file(Path(__file__).with_name("kills.py"), ["5", str(tmp_path)])
    assert done.wait(300) == 0, done.stderr
    assert done.stdout.startswith("5 kills")


def test_the_last_checkpoints_and_every_nth_are_kept(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    go(run)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == [
        "step-00000012",
        "step-00000020",
        "step-00000024",
    ]


def test_a_checkpoint_that_could_not_be_finished_is_swept_and_never_loaded(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    go(run)
    half = run.path / "checkpoints" / ".step-00000028.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\0" * 100)
    newest = run.newest()
    assert newest is not None
    assert newest[1].step == 24
    sweep(run.path / "checkpoints")
    assert not half.exists()


def test_a_run_that_has_lost_its_checkpoints_is_not_begun_anew_over_its_log_and_snapshots(tmp_path: Path) -> None:
    recipe = dataclasses.replace(SMALL, steps=12, log_every=3, ema_snapshot_every=3)
    run = start(tmp_path / "run", recipe)
    go(run)
    shutil.rmtree(run.path / "checkpoints")
    kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    match = (
        r"reach step 12: its checkpoints are gone, .* start a new run in another folder, or move metrics\.jsonl and ema"
    )
    for call in (lambda: go(run), lambda: Run(run.path).resume(), lambda: Run(run.path).resume(steps=20)):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(SystemExit) as left:
        main(["train", "--resume", "--out", str(run.path), "--steps", "20", "--device", "cpu"])
    assert left.value.code == 2
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == kept
    # The snapshots alone, or the log alone, are lost, too.
    (run.path / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=match):
        go(run)
    (run.path / "ema").rename(tmp_path / "ema")
    go(run)
    assert run.newest()[1].step == 12


def test_a_kill_before_the_first_checkpoint_loses_the_folder_nothing(tmp_path: Path) -> None:
    recipe = dataclasses.replace(SMALL, steps=8, log_every=1, ema_snapshot_every=1)
    run, whole = (start(tmp_path / name, recipe) for name in ("run", "whole"))
    go(whole)
    go(run)
    # As it was when the line and the snapshot of step 4 were written, and its checkpoint was not.
    shutil.rmtree(run.path / "checkpoints")
    run.rewind_log(4)
    remove_snapshots(run.snapshots, 4)
    go(run)
    name = "model.safetensors"
    assert (run.checkpoint(8) / name).read_bytes() == (whole.checkpoint(8) / name).read_bytes()


def test_a_resume_names_the_damaged_checkpoint_that_it_skips_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=12))
    go(run)
    for last in (lambda: Run(run.path).resume(), None):
        weights = run.checkpoint(12) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        if last is not None:
            with pytest.warns(UserWarning, match=r"^skipped a newer checkpoint, .*step-00000012") as told:
                last()
            assert len(told) == 1
            assert Path(told[0].filename) == Path(__file__)
            continue
        with pytest.raises(SystemExit) as left:
            main(["train", "--resume", "--out", str(run.path), "--device", "cpu"])
        assert left.value.code == 0
        out = "".join(capsys.readouterr())
        assert out.count("skipped") == 1
        assert run.newest()[1].step == 12


def full_disk(limit: int) -> None:
    # Real failure of real writes: the kernel refuses a file to grow beyond the limit.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def train_until_the_disk_is_full(run: RunFolder, step: int) -> str:
    """Train, with a disk that takes no more from the report of `step` on; returns the message."""

    def fill(report: object) -> None:
        if report.step == step:
            full_disk(4096)

    try:
        with pytest.raises(TrainingError, match=r"cannot be written.*free some space, then go on") as told:
            fit(run, run.config(), open_digits(), device=torch.device("cpu"), report=fill, every=1)
        return str(told.value)
    finally:
        full_disk(resource.RLIM_INFINITY)


def test_a_full_disk_stops_the_run_with_a_message_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=8))
    assert train_until_the_disk_is_full(run, 6).endswith("then go on. Earlier checkpoints are intact.")
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-00000004"]
    whole = start(tmp_path / "whole", dataclasses.replace(SMALL, steps=8))
    go(whole)
    go(run)
    name = "model.safetensors"
    assert (run.checkpoint(8) / name).read_bytes() == (whole.checkpoint(8) / name).read_bytes()


def test_a_full_disk_at_a_snapshot_is_told_in_the_same_words(tmp_path: Path) -> None:
    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=4, ema_snapshot_every=2))
    told = train_until_the_disk_is_full(run, 2)
    assert told.endswith("then go on. There is no checkpoint yet: a resume begins with the first step.")
    assert list((run.path / "ema").iterdir()) == []


def trained(seed: int) -> Trained:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return Trained(model, {"ema": torch.nn.Linear(3, 4), "power-0.05": torch.nn.Linear(2, 2)}, optimizer)


def test_a_checkpoint_holds_model_averages_and_moments_bit_for_bit(tmp_path: Path) -> None:
    first, second = trained(0), trained(1)
    save(tmp_path / "step-00000007", State(7, 70), first)
    assert restore(tmp_path / "step-00000007", second) == State(7, 70)
    for name, module in first.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, second.modules()[name].state_dict()[key])
    assert first.optimizer is not None
    assert second.optimizer is not None
    for a, b in zip(
        first.optimizer.state_dict()["state"].values(), second.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("name", ["model", "ema", "power-0.05", "optimizer", "state"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_any_damage_to_a_checkpoint_is_seen(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "step-00000001"
    save(folder, State(1, 1), trained(0))
    path = next(folder.glob(f"{name}.*"))
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif name == "state":
        path.write_bytes(data.replace(b'"sha256"', b'"sha265"'))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError):
        read_state(folder)


def test_gradients_that_are_not_finite_are_mended_where_the_recipe_says_so(tmp_path: Path) -> None:
    from stablefield.training import _model

    class Broken(torch.nn.Linear):
        def forward(self, input):  # noqa: A002
            y = super().forward(input)
            if self.training:
                y.register_hook(lambda g: torch.full_like(g, float("nan")))
            return y

    run = start(tmp_path / "run", dataclasses.replace(SMALL, steps=4, nan_to_num=True, max_grad_norm=float("inf")))
    found = _model.build_denoiser

    def broken(config):
        model = found(config)
        model.network.enter = Broken(64, 32)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_model, "build_denoiser", broken)
        go(run)
    assert all(v.isfinite().all() for v in load_file(run.checkpoint(4) / "model.safetensors").values())
