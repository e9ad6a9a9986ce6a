"""What runs on the far device, and what waits there; prints it as JSON. Run by test_far_device.py."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from far import FAR, counts, far_device, launches, near, waits
from names import SAMPLERS, STEPS, TARGETS
from steps import RECIPES, stepper
from torch import Tensor, nn

import stablefield as sf
from stablefield import sampling
from stablefield.data._image_set import ImageSet
from stablefield.evaluation._extractor import RandomConvolutions
from stablefield.targets._engine import assembly, label_index, query, reference_matrix
from stablefield.targets._engine.reference_matrix import sent_ahead
from stablefield.training._meter import Meter

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
VIEWS = ("x0", "noise", "v", "variance", "ess", "source_weight")
SHAPE = (3, 8, 8)


def of_the_device() -> dict[str, Any]:
    """What it counts, and what it refuses."""
    x, whole, square = (torch.ones(4, 4, device=FAR), torch.arange(3, device=FAR), torch.eye(3, device=FAR))
    probes: dict[str, Callable[[], Any]] = {
        "sum": lambda: (x + 1).sum(0) * torch.tensor(2.0),
        "item": lambda: x.sum().item(),
        "bool": lambda: bool((x > 0).all()),
        "mask": lambda: x[x > 0],
        "byte mask": lambda: x[(x > 0).to(torch.uint8)],
        "put by mask": lambda: x.clone().index_put_((x > 0,), x.sum()),
        "nonzero": lambda: x.nonzero(),
        "equal": lambda: torch.equal(x, x),
        "allclose": lambda: torch.allclose(x, x),
        "masked_select": lambda: x.masked_select(x > 0),
        "unique": lambda: whole.unique(),
        "unique rows": lambda: x.unique(dim=0),
        "repeat_interleave": lambda: whole.repeat_interleave(whole),
        "bincount": lambda: whole.bincount(),
        "histc": lambda: x.histc(),
        "multinomial": lambda: torch.multinomial(x, 2),
        "inv": lambda: torch.linalg.inv(square),
        "cholesky": lambda: torch.linalg.cholesky(square),
        "eigh": lambda: torch.linalg.eigh(square),
        "solve": lambda: torch.linalg.solve(square, square),
        "svd": lambda: torch.linalg.svd(square),
        "to near": lambda: x.cpu(),
        "to far": lambda: torch.ones(2).to(FAR),
        "of numbers": lambda: torch.tensor([1.0, 2.0], device=FAR),
    }
    found: dict[str, Any] = {name: waits(probe) for name, probe in probes.items()}
    for name, function in {
        "two devices": lambda: x + torch.ones(4),
        "two generators": lambda: torch.randn(3, device=FAR, generator=torch.Generator()),
    }.items():
        try:
            function()
        except RuntimeError as error:
            found[name] = str(error)
    return found


def case(kind: str, batch: int = 64) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a target of this kind, and arguments of a call, on the CPU."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, *SHAPE), generator=rng, dtype=torch.uint8)
    images[150:] = images[:150].clamp(0, 254) + 1  # twins, which small noise does not tell apart
    index = torch.randperm(len(images), generator=rng)[:batch]
    x0 = images[index] / 127.5 - 1
    process = sf.Discrete(TABLE) if kind == "discrete" else sf.VP() if kind == "VP" else sf.EDM()
    t = process.time(torch.exp(torch.linspace(-3, 3, batch)))
    flag = torch.arange(batch) % 3 == 0
    if kind == "flips":
        x0 = torch.where(flag[:, None, None, None], x0.flip(-1), x0)
    call = {"x0": x0, "x_t": process.perturb(x0, t, generator=rng), "t": t, "index": index}
    label = torch.arange(len(images)) % 5
    data = images.numpy() if kind == "array" else images / 127.5 - 1 if kind == "floats" else images
    if kind.endswith("far from zero"):
        data = 1000 + images / 127.5
        call["x0"], call["x_t"] = data[index], process.perturb(data[index], t, generator=rng)
    if kind == "host":
        data = (images / 127.5 - 1).to(torch.bfloat16)
        call["x0"] = data[index].float()
        call["x_t"] = process.perturb(call["x0"], t, generator=rng)
    options: dict[str, Any] = {"process": process, "noise_band": 0.1, "references": sf.InBatch()}
    labels = {"labels": label} if kind in ("groups", "by label") else {}
    size = 200 if kind == "drawn" else None
    options["pool"] = {"data": data, "size": size, "mirrored": kind == "mirrored", **labels}
    match kind:
        case "in batch" | "in batch, far from zero" | "DSM":
            options.pop("pool")
            call["index"] = None
        case "groups" | "by label":
            call["labels"] = torch.where(flag, -1, label[index])
        case "flips":
            call["flip"] = flag
        case "source_only":
            call["source_only"] = flag
        case "capacity":
            options["capacity"] = 20
        case "heavy tails":
            options["kernel"] = sf.StudentTKernel(64.0)
        case _:
            pass
    return options, call


def target(kind: str, options: dict[str, Any], move: Callable[[Any], Any], chunk_size: int) -> sf.StableTarget:
    options = dict(options)
    if kind == "DSM":
        return sf.DenoisingTarget(options["process"])
    if "pool" in options:
        pool = options.pop("pool")
        moved = {name: move(value) for name, value in pool.items() if kind != "host" or name != "data"}
        options["references"] = sf.Pool(**(pool | moved))
    return sf.StableTarget(**options, chunk_size=chunk_size)


def far(value: Any) -> Any:
    return value.to(FAR) if isinstance(value, Tensor) else value


def gap(found: sf.Target, truth: sf.Target) -> float:
    views = [(near(getattr(found, name)), getattr(truth, name)) for name in VIEWS]
    return max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in views)


def always_by_label(kind: str) -> ExitStack:
    """For the kind of this name, rows meet the references of their label even where all with all would be as fast."""
    stack = ExitStack()
    if kind == "by label":
        stack.enter_context(mock.patch.object(assembly, "_FEW", 0))
        stack.enter_context(mock.patch.object(label_index, "_PART", -(2**60)))
    return stack


def of_targets(kind: str) -> dict[str, Any]:
    options, call = case(kind)
    there = {name: far(value) for name, value in call.items()}
    found: dict[str, Any] = {"waits": {}, "gap": 0.0}
    for chunk_size in (300, 100, 30):
        drawn = {"generator": torch.Generator().manual_seed(1)} if kind == "drawn" else {}
        truth = target(kind, options, lambda value: value, chunk_size)(**call, **drawn)
        with always_by_label(kind):
            stable = target(kind, options, far, chunk_size)
            stable(**there)  # what is computed once: norms, tables
            again = {"generator": torch.Generator(FAR).manual_seed(1)} if kind == "drawn" else {}
            results: list[sf.Target] = []
            launches.clear()
            found["waits"][chunk_size] = waits(lambda s=stable, r=results, a=again: r.append(s(**there, **a)))
            found.setdefault("launches", launches.total())
            found["gap"] = max(found["gap"], gap(results[0], truth))
            found["waits of views"] = waits(lambda r=results: [getattr(r[0], name) for name in VIEWS])
    return found


class Event:
    """In place of a CUDA event; keeps how many copies were waited for, and how many were under way at once."""

    recorded = waited = most = 0

    def record(self, stream: object) -> None:  # noqa: ARG002
        Event.recorded += 1
        Event.most = max(Event.most, Event.recorded - Event.waited)

    def synchronize(self) -> None:
        Event.waited += 1


def of_a_staged_array() -> dict[str, Any]:
    """A pool in a file as a GPU gets it: through memory that is not pinned here, with events of no device."""
    empty, pinned = torch.empty, Counter[str]()

    def allocated(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        pinned["pages"] += pin_memory
        return empty(*shape, **options)

    with ExitStack() as patches:
        for patch in (
            mock.patch.multiple(torch.cuda, Event=Event, current_stream=lambda device: None),
            mock.patch.object(reference_matrix, "stages", lambda device: device.type == "far"),
            mock.patch.object(torch, "empty", allocated),
        ):
            patches.enter_context(patch)
        found = of_targets("array")
        patches.enter_context(mock.patch.object(reference_matrix, "PAGE", 7 * 3 * 8 * 8))
        small = of_targets("array")
        Event.recorded = Event.waited = Event.most = 0
        rows = np.arange(40.0).reshape(20, 2)
        sent = [near(part) for _, part in sent_ahead(rows, (slice(k, k + 1) for k in range(20)), FAR)]
    same = found["waits"] == small["waits"]
    return {
        **found,
        "gap of small pages": small["gap"],
        "same waits": same,
        "sent": torch.equal(torch.cat(sent), torch.from_numpy(rows)),
        "most": Event.most,
        "pages": pinned["pages"],
    }


def of_static_shapes(kind: str) -> dict[str, Any]:
    """As while a graph is captured: `readable` says no."""
    options, call = case(kind)
    there = {name: far(value) for name, value in call.items()}
    truth = target(kind, options, lambda value: value, 60)(**call)
    stable = target(kind, options, far, 60)
    stable(**there)
    results: list[sf.Target] = []
    with mock.patch.object(query, "readable", return_value=False):
        waited = waits(lambda: results.append(stable(**there)))
    return {"waits": waited, "gap": gap(results[0], truth)}


def of_steps(name: str) -> dict[str, Any]:
    """Whole steps, with what the loop adds up of each; and what of the waits comes once the network has begun."""
    found: dict[str, Any] = {"waits": [], "before the network": [], "losses": [], "truth": []}
    there, here = (stepper(RECIPES[name], device) for device in (FAR, torch.device("cpu")))
    meter = Meter((0.5, 1.0, 2.0), FAR, there.target_watch)
    begun: list[Counter[str]] = []
    there.trained.model.register_forward_pre_hook(lambda *_: begun.append(counts.copy()))
    for step in range(4):
        parts: list[Any] = []

        def take(parts: list[Any] = parts, step: int = step) -> None:
            parts.extend(there.take(step))
            meter.step(parts, RECIPES[name].batch)

        begun.clear()
        found["waits"].append(waits(take))
        found["before the network"].append([dict(one) for one in begun])
        found["losses"].append(sum(float(near(part.row_loss).sum()) for part in parts))
        found["truth"].append(sum(float(part.row_loss.detach().sum()) for part in here.take(step)))
    return found


@cache
def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """The same network there and here, as a sampler uses it."""
    there, here = (stepper(RECIPES[name], device).trained.model.eval() for device in (FAR, torch.device("cpu")))
    return there, here


def of_samplers(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # The network does not know by which sampler it is called: one of them with a large one.
    there, here = networks("unet" if name == "heun" else "perceptron")
    start = 80.0 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for steps in (3, 7):
        sigmas, drawn = sampling.edm_sigmas(steps), {}
        images: list[Tensor] = []
        x = start.to(FAR)
        if name not in ("euler", "heun", "dpmpp_2m"):
            drawn = {"noise": lambda x: torch.ones_like(x)}
        with torch.no_grad():
            found[str(steps)] = waits(
                lambda d=drawn, s=sigmas, x=x, out=images: out.append(getattr(sampling, name)(there, x, s, **d))
            )
            truth = getattr(sampling, name)(here, start, sigmas, **drawn)
        found["gap"] = float((near(images[0]) - truth).abs().max())
    return found


def of_the_gpu_benchmark() -> dict[str, Any]:
    """What benchmarks/gpu.py measures, in miniature: it must not fail where a GPU is at hand for minutes."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    gpu, quality = importlib.import_module("gpu"), importlib.import_module("quality")
    images = torch.randint(0, 256, (1100, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    there = images[:, :, :8, :8].contiguous().to(FAR)
    extractor = RandomConvolutions(device=FAR)
    budget = quality.Budget(
        seconds=0.05,
        marks=1,
        samples=4,
        batch=4,
        width=8,
        blocks=1,
        gradients=2,
        samplers=("heun",),
        variances=("stf",),
    )
    rows: list[dict[str, Any]] = []
    data = ImageSet(images=images[:100, :, :16, :16].numpy(), labels=None, class_names=None, name="noise", manifest={})
    grid = sampling.edm_sigmas
    recipe, *levels = quality.RECIPES["ve"]
    small = replace(recipe, network=replace(recipe.network, multipliers=(1,)))
    few_steps = mock.patch.object(sampling, "edm_sigmas", lambda _, **options: grid(2, **options))
    with few_steps, mock.patch.dict(quality.RECIPES, ve=(small, *levels)):
        quality.proof(data, extractor, "ve", budget, FAR, rows.append)
    smaller = partial(gpu.SongUNet.ddpmpp, multipliers=(1,), blocks=1)
    with mock.patch.object(gpu, "SongUNet", SimpleNamespace(ddpmpp=smaller)):
        throughput = gpu.throughput(there, 1, 8, 8, ("float32", "bf16"), warmup=0)
    return {
        "accuracy": max(row["relative_error"] for row in gpu.accuracy(there)),
        "cost": len(gpu.cost(there[:, :, :4, :4].contiguous(), 1)),  # its naive form takes long here
        "throughput": len(throughput),
        "sanity": quality.sanity(images[:300].to(FAR), images[300:500], extractor)["distance"],
        "proof": [row["target"] for row in rows],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with far_device():
        report = {
            "device": of_the_device(),
            "gpu benchmark": of_the_gpu_benchmark(),
            "targets": {kind: of_targets(kind) for kind in (*TARGETS, "array", "host")},
            "staged": of_a_staged_array(),
            "static": {kind: of_static_shapes(kind) for kind in TARGETS if kind != "drawn"},
            "samplers": {name: of_samplers(name) for name in SAMPLERS},
            "steps": {name: of_steps(name) for name in STEPS},
        }
    sys.stdout.write(json.dumps(report))
