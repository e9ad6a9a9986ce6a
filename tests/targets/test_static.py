"""The target with fixed shapes: in compiled functions and captured graphs, equal to the plain call, without a look."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stablefield as sf
from stablefield.targets._engine.assembly import compute
from stablefield.targets._engine.reference_matrix import ReferenceMatrix

SHAPE = (3, 4, 4)
TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
PROCESSES = [sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow(), sf.Discrete(TABLE)]


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a CUDA graph is captured."""
    monkeypatch.setattr("stablefield.targets._engine.query.readable", lambda device: False)


@pytest.fixture
def images(rng: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (200, *SHAPE), generator=rng, dtype=torch.uint8)


def case(process: sf.Process, images: Tensor, rng: torch.Generator, batch: int = 24) -> dict[str, Tensor]:
    """Rows from where the source has all the weight to where none has."""
    index = torch.randperm(len(images), generator=rng)[:batch]
    x0 = images[index] / 127.5 - 1
    t = process.time(torch.exp(torch.linspace(-2.5, 2.5, batch)))
    return {"x0": x0, "x_t": process.perturb(x0, t, generator=rng), "t": t, "index": index}


def assert_equal(found: sf.Target, truth: sf.Target, views: tuple[str, ...] = ("v", "velocity")) -> None:
    for name in ("x0", "noise", "source_weight", *views):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=0, atol=2e-5)
    torch.testing.assert_close(found.ess, truth.ess, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance, truth.variance, rtol=1e-4, atol=1e-4)


def compiled(function: Callable, backend: str = "aot_eager") -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_compiled_target_is_that_of_the_call(process: sf.Process, images: Tensor, rng: torch.Generator) -> None:
    stable = sf.StableTarget(process, references=sf.Pool(images))
    arguments = case(process, images, rng)
    views = ("v",) if isinstance(process, sf.Discrete) else ("v", "velocity")
    assert_equal(compiled(stable)(**arguments), stable(**arguments), views)


KINDS = (
    "in batch",
    "band",
    "capacity",
    "groups",
    "mirrored",
    "flips",
    "source_only",
    "alone in batch",
    "heavy tails",
    "DSM",
)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_with_every_option(kind: str, images: Tensor, rng: torch.Generator) -> None:
    label = torch.arange(len(images)) % 3
    pool = sf.Pool(images, labels=label if kind == "groups" else None, mirrored=kind == "mirrored")
    arguments: dict[str, object] = dict(case(sf.EDM(), images, rng))
    index, x0 = arguments["index"], arguments["x0"]
    flag = torch.arange(len(x0)) % 2 == 0
    options: dict[str, object] = {"references": pool}
    match kind:
        case "in batch":
            options, arguments["index"] = {"references": sf.InBatch()}, None
        case "band":
            options["noise_band"] = 0.8
        case "capacity":
            options |= {"noise_band": 0.8, "capacity": 5}
        case "groups":
            arguments["labels"] = torch.where(flag, label[index], -1)
        case "flips":
            for name in ("x0", "x_t"):
                arguments[name] = torch.where(flag[:, None, None, None], arguments[name].flip(-1), arguments[name])
            arguments["flip"] = flag
        case "source_only":
            arguments["source_only"] = flag
        case "alone in batch":
            options, arguments["index"], arguments["source_only"] = {"references": sf.InBatch()}, None, flag
        case "heavy tails":
            options["kernel"] = sf.StudentTKernel(64.0)
        case _:
            pass
    stable = sf.DenoisingTarget(sf.EDM()) if kind == "DSM" else sf.StableTarget(sf.EDM(), **options)
    truth = stable(**arguments)
    found = compiled(stable)(**arguments)
    assert_equal(found, truth)
    assert (truth.ess > 2).any() == (kind != "DSM")
    single = truth.source_weight == 1
    assert torch.equal(found.x0[single], arguments["x0"][single])


def test_what_is_not_finite_in_rows_that_are_alone_stays_there(images: Tensor, rng: torch.Generator) -> None:
    arguments = case(sf.EDM(), images, rng)
    arguments["index"] = None
    source_only = torch.arange(24) % 3 == 0
    truth = sf.StableTarget(sf.EDM(), references=sf.InBatch())(**arguments, source_only=source_only)
    arguments["x0"] = arguments["x0"].masked_fill(source_only[:, None, None, None], torch.nan)
    for stable in (
        sf.StableTarget(sf.EDM(), references=sf.InBatch()),
        compiled(sf.StableTarget(sf.EDM(), references=sf.InBatch())),
    ):
        found = stable(**arguments, source_only=source_only)
        assert found.x0[source_only].isnan().all()
        torch.testing.assert_close(found.x0[~source_only], truth.x0[~source_only], rtol=0, atol=2e-5)


def test_rows_without_noise_keep_their_sample(images: Tensor, rng: torch.Generator) -> None:
    arguments = case(sf.EDM(), images, rng)
    arguments["t"][::3] = 0
    arguments["x_t"][::3] = arguments["x0"][::3]
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images))
    for call in (stable, compiled(stable), sf.DenoisingTarget(sf.EDM()), replace(stable, noise_band=0.5)):
        found = call(**arguments)
        assert torch.equal(found.x0[::3], arguments["x0"][::3])
        assert torch.equal(found.source_weight[::3], torch.ones(8))
        assert found.x0.isfinite().all()
        # x_t says nothing of the noise there, so its expectation is what is right.
        assert torch.equal(found.noise[::3], torch.zeros(8, *SHAPE))
        assert found.velocity.isfinite().all()


def test_a_capacity_finds_rows_and_flips_in_any_order(images: Tensor, rng: torch.Generator) -> None:
    arguments = case(sf.EDM(), images, rng)
    arguments["t"] = torch.tensor([0.1, 4.0, 0.9, 4.1, 7.0, 4.2] * 4) * torch.linspace(1, 0.99, 24)
    flip = torch.rand(24, generator=rng) < 0.5
    x0 = torch.where(flip[:, None, None, None], arguments["x0"].flip(-1), arguments["x0"])
    arguments |= {"x0": x0, "x_t": sf.EDM().perturb(x0, arguments["t"], generator=rng), "flip": flip}
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images), noise_band=0.5, capacity=9)
    truth = stable(**arguments)
    used = truth.ess > 1.01
    assert used.nonzero()[:, 0].tolist() == [3, 4, 5, 10, 11, 16, 17, 22, 23]
    assert_equal(compiled(stable)(**arguments), truth)


def test_batches_of_many_sizes_need_few_graphs(images: Tensor, rng: torch.Generator) -> None:
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images))
    function = compiled(stable)
    sizes = (24, 25, 26, 27, 28, 30, 32, 40, 41, 50)  # above torch's limit of eight
    for size in sizes:
        arguments = case(sf.EDM(), images, rng, size)
        assert_equal(function(**arguments), stable(**arguments))


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("sigma", [0.002, 0.1, 2.0, 30.0])
def test_compiled_weights_are_as_exact_as_the_plain_ones(
    sigma: float, with_source: bool, rng: torch.Generator, exact: Callable
) -> None:
    y = torch.randn(300, 768, generator=rng)
    y[150:] = y[:150] + 1.5 * sigma / 768**0.5 * torch.randn(150, 768, generator=rng)
    index = torch.randperm(300, generator=rng)[:16]
    x_t = y[index] + sigma * torch.randn(16, 768, generator=rng)
    truth = exact(x_t, 1.0, sigma, y)
    source = index if with_source else None
    found = compiled(sf.posterior)(x_t, 1.0, sigma, y, source, chunk_size=90)
    torch.testing.assert_close(found.mean.double(), truth.mean, rtol=0, atol=1e-3 * min(sigma, 1))
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=2e-3, atol=0)
    torch.testing.assert_close(found.log_evidence.double(), truth.log_evidence, rtol=2e-6, atol=1e-3)
    if with_source:
        own = truth.weights[torch.arange(16), index]
        torch.testing.assert_close(found.source_weight.double(), own, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_whole_training_step_is_one_graph(images: Tensor, rng: torch.Generator) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.SiLU(), nn.Linear(32, 48))
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images), noise_band=0.8, capacity=16)

    def loss(x0: Tensor, x_t: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return (network(x_t) - stable(x0, x_t, t, index=index).x0.flatten(1)).square().mean()

    def gradient(function: Callable, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        network.zero_grad()
        value = function(**arguments)
        value.backward()
        return value.detach(), network[1].weight.grad.clone()

    step = compiled(loss, "inductor")
    stable(**case(sf.EDM(), images, rng))
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The number of rows in the band is another each time.
        for scale in (0.3, 1.0, 3.0):
            arguments = case(sf.EDM(), images, rng)
            arguments["t"] = arguments["t"] * scale
            arguments["x_t"] = sf.EDM().perturb(arguments["x0"], arguments["t"], generator=rng)
            for found, truth in zip(gradient(step, arguments), gradient(loss, arguments), strict=True):
                torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


class Looks(TorchDispatchMode):
    """Counts operations that need a value, and float64 products."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "unique", "masked_select", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[str] = []
        self.wide_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "posterior":
            with self:  # look inside
                return compute(*args, **(kwargs or {}))
        # A mask as an index is a hidden nonzero.
        index = args[1] if name == "index" else ()
        if name.startswith(self.NAMES) or any(one is not None and one.dtype == torch.bool for one in index):
            self.looks.append(name)
        if name in ("mm", "addmm") and args[-1].dtype == torch.float64:
            self.wide_products += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("mirrored", [False, True])
def test_nothing_is_looked_at(mirrored: bool, images: Tensor, rng: torch.Generator) -> None:
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images, mirrored=mirrored), capacity=9, chunk_size=30)
    arguments = case(sf.EDM(), images, rng)
    with Looks() as seen:
        stable(**arguments, flip=arguments["index"] % 2 == 0, source_only=arguments["index"] % 3 == 0)
        sf.posterior(arguments["x_t"], 1.0, arguments["t"], images, chunk_size=30)
    assert seen.looks == []


def test_a_plain_call_looks(images: Tensor, rng: torch.Generator) -> None:
    with Looks() as seen:
        sf.StableTarget(sf.EDM(), references=sf.Pool(images))(**case(sf.EDM(), images, rng))
    assert {"_local_scalar_dense", "nonzero"} <= set(seen.looks)


def test_a_band_spares_the_float64_of_a_compiled_target(
    images: Tensor, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = sf.Pool(images)
    arguments = case(sf.EDM(), images, rng)

    def wide_products(band: float) -> int:
        with Looks() as seen:
            sf.StableTarget(sf.EDM(), references=pool, noise_band=band)(**arguments)
        return seen.wide_products

    with monkeypatch.context() as patch:
        patch.setattr("stablefield.targets._engine.query.readable", lambda device: False)
        assert wide_products(2.3) > 0  # nobody knows how large the references are
    sf.StableTarget(sf.EDM(), references=pool)(**arguments)
    monkeypatch.setattr("stablefield.targets._engine.query.readable", lambda device: False)
    assert wide_products(0.01) > 0
    # Nor are the pool's norms computed anew.
    monkeypatch.setattr(ReferenceMatrix, "_squares", None)
    assert wide_products(2.3) == 0


class NoCopies(TorchDispatchMode):
    """Fails where a tensor on the CPU is an operand of an operation on meta tensors, or copied to their device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        flat = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        on_meta = any(one.is_meta for one in (*flat, *tree_leaves(result)) if isinstance(one, Tensor))
        assert not on_meta or all(one.is_meta for one in flat), func
        return result


def test_on_another_device_nothing_is_looked_at_or_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    # Meta tensors have a device and a shape, and no values: what asks for one, or mixes devices, fails. Copies do not,
    # and a copy of memory that is not pinned is what a capture refuses.
    monkeypatch.setattr("stablefield.targets._engine.assembly.full_precision", lambda device: nullcontext())
    x_t, y, y8 = (torch.empty(n, *SHAPE, device="meta") for n in (8, 50, 50))
    one, place = torch.ones(8, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    labels, prior = torch.zeros(50, dtype=torch.long, device="meta"), torch.zeros(50, device="meta")
    known = (torch.empty(50, device="meta", dtype=torch.float64), torch.empty(48, device="meta"))
    for references, wide, mirrored in product((y, y8.to(torch.uint8)), (False, True), (False, True)):
        for anchor, source in ((x_t, place), (None, None)):
            for conditions in ((place, labels, prior), (None, None, None)):
                options = (*conditions, 0.0, mirrored, 25, wide)  # two chunks
                # Of these and of known norms, every two meet in all their combinations.
                norms = known if wide == ((source is None) == (conditions[0] is None)) else (None, None)
                with NoCopies():
                    found = compute(x_t, one, one, references, *norms, anchor, source, *options)
            assert {value.device.type for value in found} == {"meta"}
            assert found[0].shape == x_t.shape


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_around_the_operator_nothing_is_looked_at_or_copied_either(process: sf.Process) -> None:
    x0, images = torch.empty(8, *SHAPE, device="meta"), torch.empty(50, *SHAPE, device="meta", dtype=torch.uint8)
    index, flag = torch.empty(8, device="meta", dtype=torch.long), torch.empty(8, device="meta", dtype=torch.bool)
    label = torch.empty(50, device="meta", dtype=torch.long)
    pools = [sf.Pool(images), sf.Pool(images, mirrored=True), sf.Pool(images, labels=torch.zeros(50).long())]
    targets = [sf.StableTarget(process, references=pool, noise_band=0.5, capacity=5) for pool in pools]
    process.alpha(index)  # a table goes to the device once
    for target in (*targets, sf.StableTarget(process, references=sf.InBatch()), sf.DenoisingTarget(process)):
        labels = None if target is not targets[2] else label[:8]
        if labels is not None:
            pools[2]._on("labels", x0.device)  # once, too
        with NoCopies():
            found = target(x0, x0, index, labels, index, flip=flag, source_only=flag)
            views = [found.x0, found.noise, found.v, found.score, found.variance, found.ess]
        assert all(view.is_meta for view in views)


def test_norms_made_while_compiling_are_not_kept(images: Tensor, rng: torch.Generator) -> None:
    pool = sf.Pool(images)
    compiled(sf.StableTarget(sf.EDM(), references=pool))(**case(sf.EDM(), images, rng))
    assert pool.matrix(torch.device("cpu")).known_norms(torch.float32) is None


def test_rows_beyond_the_capacity_have_their_own_sample(images: Tensor, rng: torch.Generator) -> None:
    arguments = case(sf.EDM(), images, rng)
    shuffle = torch.randperm(24, generator=rng)
    arguments = {name: value[shuffle] for name, value in arguments.items()}
    pool = sf.Pool(images)
    some = sf.StableTarget(sf.EDM(), references=pool, capacity=7)(**arguments)
    whole = sf.StableTarget(sf.EDM(), references=pool)(**arguments)
    noisiest = arguments["t"] >= arguments["t"].sort().values[-7]
    torch.testing.assert_close(some.x0[noisiest], whole.x0[noisiest], rtol=0, atol=1e-6)
    assert torch.equal(some.x0[~noisiest], arguments["x0"][~noisiest])
    assert torch.equal(some.source_weight[~noisiest], torch.ones(17))
    assert some.ess[noisiest].min() > 1.5


@pytest.mark.parametrize("capacity", [0, 2.5, float("nan"), True, "3"])
def test_a_capacity_that_is_no_number_of_rows_is_refused(capacity: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"capacity.*: pass a whole number"):
        sf.StableTarget(sf.EDM(), references=sf.InBatch(), capacity=capacity)


class Unknown(sf.GaussianKernel):
    """Whatever it changes would not reach the operator."""


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 50}, r"the Pool's size is 50: .*size=None"),
        ({"array": True}, r"references, of shape \(200, 3, 4, 4\), are in a numpy array"),
        ({"kernel": Unknown()}, r"kernel is Unknown.*GaussianKernel or StudentTKernel"),
    ],
    ids=["size", "array", "kernel"],
)
def test_what_cannot_be_compiled_is_refused(options, message: str, images: Tensor, rng: torch.Generator) -> None:
    pool = sf.Pool(images.numpy() if "array" in options else images, options.get("size"))
    kernel = options.get("kernel", sf.GaussianKernel())
    with pytest.raises(ValueError, match=message):
        sf.StableTarget(sf.EDM(), references=pool, kernel=kernel)(**case(sf.EDM(), images, rng))


@pytest.mark.gpu
def test_a_captured_target_is_that_of_the_call(images: Tensor, rng: torch.Generator) -> None:
    stable = sf.StableTarget(sf.EDM(), references=sf.Pool(images.cuda()), noise_band=0.8, capacity=16)
    arguments = {name: value.cuda() for name, value in case(sf.EDM(), images, rng).items()}
    truth = stable(**arguments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stable(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = stable(**arguments)
    for value in (found.x0, found.ess):
        value.zero_()
    graph.replay()
    assert_equal(found, truth)
