"""`ExcessLoss` in the loops of Accelerate, Lightning and diffusers: the real packages train and log it."""

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import stablefield as sf
from forks import Fork
from stablefield.interop import accelerate_callback, lightning_callback


class Net(nn.Module):
    """A noise predictor for rows of four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([x_t, t[:, None]], 1))


def data() -> torch.Tensor:
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


def excess() -> sf.ExcessLoss:
    return sf.ExcessLoss(data(), process=sf.Cosine(), prediction="epsilon", levels=2, rows=8)


def loss_of(network: nn.Module, x0: torch.Tensor) -> torch.Tensor:
    t, noise = torch.rand(len(x0)), torch.randn(x0.shape)
    return (network(sf.Cosine().perturb(x0, t, noise), t) - noise).square().mean()


@pytest.mark.parametrize("batches", [1, 4])
def test_accelerate_logs_every_so_many_steps_once_through_its_trackers(batches: int, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker

    logged: list[tuple[int | None, dict[str, float]]] = []

    class Memory(GeneralTracker):
        name, requires_logging_directory = "memory", False

        def __init__(self) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
            logged.append((step, values))

    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=batches, log_with=Memory(), project_dir=str(tmp_path)
    )
    accelerator.init_trackers("test")
    network = Net()
    model, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.01))
    measured = excess()
    log_excess = accelerate_callback(measured, accelerator, every=2)
    step = 0
    for _ in range(4 * batches + 2):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, data()))
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        found = log_excess(model, step)
        if found is not None:
            assert logged[-1] == (step, found.metrics())
    # Before the first step there is a step 0 only where it takes several batches.
    assert [step for step, _ in logged] == ([2, 4, 6] if batches == 1 else [0, 2, 4])
    assert model.training
    accelerator.end_training()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's own
@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_lightning_logs_every_so_many_steps_of_the_optimiser(package: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip(package)
    if package == "lightning":
        from lightning.pytorch.loggers import CSVLogger
    else:
        from pytorch_lightning.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module, measured = Module(), excess()
    callback = lightning_callback(measured, every=2, network=lambda module: module.net)
    trainer = lightning.Trainer(
        max_steps=5,
        accumulate_grad_batches=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=CSVLogger(str(tmp_path), name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=4))
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row.get("excess_loss/distance")]
    assert [int(row["step"]) for row in rows] == [2, 4]
    assert {"excess_loss/loss", "excess_loss/floor", "excess_loss/distance_se"} <= rows[0].keys()
    # Trained on, it has another excess than at step 4.
    assert float(rows[1]["excess_loss/distance"]) != measured(module.net).total("distance").value


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's own
def test_callbacks_measure_functions_around_a_network_in_evaluation_mode(tmp_path: Path) -> None:
    class Dropping(Net):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x_t, t), 0.5, self.training)

    network, measured = Dropping(), excess()
    expected = measured(network.eval()).metrics()
    network.train()
    lightning = pytest.importorskip("lightning")
    logged: list[dict[str, float]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics))
    callback = lightning_callback(measured, every=1, network=lambda module: lambda x, t: module.net(x, t))
    module = lightning.LightningModule()
    module.net = network
    strategy = SimpleNamespace(broadcast=lambda metrics: metrics)
    trainer = SimpleNamespace(global_step=1, is_global_zero=True, loggers=[logger], strategy=strategy)
    callback.on_train_batch_end(trainer, module)
    assert logged == [expected]
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, project_dir=str(tmp_path))
    found = accelerate_callback(measured, accelerator, every=1)(lambda x, t: network(x, t), 1)
    assert found is not None
    assert found.metrics() == expected
    assert network.training


def test_the_three_lines_in_the_unconditional_script_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    noise_scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    excess = sf.ExcessLoss(images, process=sf.from_diffusers(noise_scheduler), levels=2, rows=8)
    metrics = excess(model).metrics()
    # The script's loss, on many of its batches.
    losses: list[float] = []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(40):
            clean = images.repeat(8, 1, 1, 1)
            noise = torch.randn(clean.shape, generator=generator)
            timesteps = torch.randint(0, 1000, (len(clean),), generator=generator)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            losses.append(float((model(noisy, timesteps).sample - noise).square().mean()))
    expected = sum(losses) / len(losses)
    assert abs(metrics["excess_loss/loss"] - expected) < 4 * metrics["excess_loss/loss_se"] + 0.01 * expected


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's own
def test_lightning_keeps_the_checkpoint_with_the_lowest_distance(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    distances: dict[int, float] = {}

    class Watched(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if batch_idx % 2 == 0:  # what the callback measures after this many steps
                distances[batch_idx] = measured(self.net).total("distance").value
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=3.0)  # so high that the last is not the best

    torch.manual_seed(0)
    module, measured = Watched(), excess()
    kept = ModelCheckpoint(str(tmp_path), monitor="excess_loss/distance", every_n_train_steps=2)
    trainer = lightning.Trainer(
        max_steps=7,
        accelerator="cpu",
        callbacks=[kept, lightning_callback(measured, every=2, network=lambda module: module.net)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=4))
    best = min((2, 4, 6), key=distances.__getitem__)
    assert kept.best_model_path.endswith(f"step={best}.ckpt")
    assert kept.best_model_score == pytest.approx(distances[best], rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's own
def test_a_callback_measures_every_run_that_it_is_used_in(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    logged: list[int] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append(step))
    network, module = Net(), lightning.LightningModule()
    callback = lightning_callback(excess(), every=4, network=lambda _: network)
    strategy = SimpleNamespace(broadcast=lambda metrics: metrics)
    for _ in range(3):
        for step in range(1, 5):
            trainer = SimpleNamespace(global_step=step, is_global_zero=True, loggers=[logger], strategy=strategy)
            if step == 1:
                callback.on_train_start(trainer, module)
            callback.on_train_batch_end(trainer, module)
    assert logged == [4, 4, 4]
    accelerate = pytest.importorskip("accelerate")
    log = accelerate_callback(excess(), accelerate.Accelerator(cpu=True, project_dir=str(tmp_path)), every=4)
    networks = [Net(), Net()]
    found = [[log(network, step) is not None for step in (1, 2, 3, 4, 4)] for network in networks]
    assert found == [[False, False, False, True, False]] * 2
    # Two models at one step, each after every batch of it.
    assert [log(network, 8) is not None for network in (*networks, *networks)] == [True, True, False, False]


def test_an_accelerator_that_drops_the_metrics_is_warned_of_once(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    log = accelerate_callback(excess(), accelerate.Accelerator(cpu=True, project_dir=str(tmp_path)), every=1)
    with pytest.warns(UserWarning, match=r"has no tracker, so it drops the excess: pass log_with= .*init_trackers"):
        log(Net(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log(Net(), 2)


SHARDED = """
import json, sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import stablefield as sf
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
network = torch.nn.Linear(4, 4)
forward = network.forward
network.forward = lambda x, t: forward(x)
images = torch.randn(40, 4)
excess = sf.ExcessLoss(images, process=sf.Cosine(), prediction="epsilon", levels=2, rows=8)
expected = excess(network).metrics()
fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
found = sf.interop.accelerate_callback(excess, accelerator, every=1)(network, 1)
print(json.dumps([expected, found.metrics()]))
"""


def test_all_processes_measure_a_sharded_network_together(
    fork_ranks: Callable[..., list[Fork]], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    for process in fork_ranks(2, SHARDED, cwd=tmp_path, PYTHONWARNINGS="ignore"):
        assert process.wait() == 0, process.stderr
        expected, found = json.loads(process.stdout.splitlines()[-1])
        assert found == pytest.approx(expected, rel=1e-5)


def test_what_a_callback_needs_is_said() -> None:
    with pytest.raises(TypeError, match="excess is a float"):
        lightning_callback(0.5)
    with pytest.raises(ValueError, match="every=0"):
        lightning_callback(excess(), every=0)
    with pytest.raises(TypeError, match=r"accelerator\.log is None"):
        accelerate_callback(excess(), object())
