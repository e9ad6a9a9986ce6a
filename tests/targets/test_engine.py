"""What is computed and what is not: skipped products, reused buffers, chunks by the memory at hand, no look per chunk."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stablefield as sf
from stablefield.targets._engine.reference_matrix import ReferenceMatrix, squared_norms

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
LOOKS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class Operations(TorchDispatchMode):
    """Counts operations, the flops of matrix products, and the storages that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[object] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket] += 1
        if func.overloadpacket in PRODUCTS:
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result

    @property
    def looks(self) -> int:
        return sum(self.calls[name] for name in LOOKS)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a device that must not be waited for, on this one."""
    monkeypatch.setattr("stablefield.targets._engine.query._shares_memory", lambda device: False)


def case(sigma: float, rng: torch.Generator, n: int = 900, d: int = 256, b: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randn(n, d, generator=rng)
    y[n // 2 :] = y[: n - n // 2] + 1.2 * sigma / d**0.5 * torch.randn(n - n // 2, d, generator=rng)
    index = torch.randperm(n, generator=rng)[:b]
    return y[index] + sigma * torch.randn(b, d, generator=rng), y, index


def test_rows_whose_source_has_all_the_weight_are_in_no_second_product(rng: torch.Generator) -> None:
    y = torch.randn(500, 128, generator=rng)
    level = torch.tensor([0.1] * 30 + [20.0] * 10)
    index = torch.arange(40)
    x_t = sf.EDM().perturb(y[:40], level, generator=rng)
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(y), chunk_size=100)
    with Operations() as seen:
        found = target(y[:40], x_t, level, index=index)
    assert seen.flops == 2 * 500 * 128 * (40 + 10)
    assert torch.equal(found.x0[:30], y[:30])
    assert torch.equal(found.source_weight[:30], torch.ones(30))
    assert found.ess[30:].min() > 50


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0, 30.0])
@pytest.mark.parametrize("with_source", [True, False])
def test_what_is_skipped_does_not_show(
    sigma: float, with_source: bool, rng: torch.Generator, exact: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_t, y, index = case(sigma, rng)
    prior = 3 * torch.randn(len(y), generator=rng)
    labels, groups = torch.arange(32) % 3 - 1, torch.full((len(y),), 2)
    groups[index[labels >= 0]] = labels[labels >= 0]
    groups[::5] = torch.arange(len(groups[::5])) % 2
    groups[index[labels >= 0]] = labels[labels >= 0]
    source = index if with_source else None
    arguments = (x_t, 1.0, sigma, y, source, labels, groups, prior, 50)
    found = sf.posterior(*arguments)
    allowed = (labels[:, None] == groups) | (labels == -1)[:, None]
    truth = exact(x_t, 1.0, sigma, y, allowed, prior)
    torch.testing.assert_close(found.mean.double(), truth.mean, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.ess.double(), truth.ess, rtol=2e-3, atol=0)
    torch.testing.assert_close(found.log_evidence.double(), truth.log_evidence, rtol=2e-6, atol=1e-3)
    # And without a look at values, as on a GPU.
    monkeypatch.setattr("stablefield.targets._engine.query._shares_memory", lambda device: False)
    dense = sf.posterior(*arguments)
    torch.testing.assert_close(dense.mean.double(), truth.mean, rtol=0, atol=2e-4)
    torch.testing.assert_close(dense.ess.double(), truth.ess, rtol=2e-3, atol=0)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("sigma", [0.02, 2.0])
@pytest.mark.parametrize("kind", ["pool", "mirrored", "posterior", "groups"])
def test_a_device_is_not_waited_for_once_per_chunk(sigma: float, kind: str, rng: torch.Generator) -> None:
    x_t, y, index = case(sigma, rng, d=48)
    shape = (-1, 3, 4, 4)
    x_t, y = x_t.reshape(shape), y.reshape(shape)
    pool = sf.Pool(y, mirrored=kind == "mirrored", labels=torch.arange(len(y)) % 2 if kind == "groups" else None)
    labels = index % 2 if kind == "groups" else None

    def looks(chunk_size: int) -> int:
        target = sf.StableTarget(sf.EDM(), references=pool, chunk_size=chunk_size)
        with Operations() as seen:
            if kind == "posterior":
                sf.posterior(x_t, 1.0, sigma, y, chunk_size=chunk_size)
            else:
                target(y[index], x_t, sigma, labels, index)
        return seen.looks

    looks(900)  # the pool's norms
    assert looks(20) == looks(900) > 0


def test_a_row_above_the_band_has_the_target_that_it_has_without_one(
    rng: torch.Generator, smooth_images: Callable
) -> None:
    images = ((smooth_images(800, rng, size=8) + 1) * 127.5).round().to(torch.uint8)
    pool = sf.Pool(images)
    band = sf.pick_noise_band(pool).level
    index = torch.randperm(800, generator=rng)[:256]
    x0 = images[index] / 127.5 - 1
    level = band * torch.exp(torch.randn(256, generator=rng))
    x_t = sf.EDM().perturb(x0, level, generator=rng)
    full = sf.StableTarget(sf.EDM(), references=pool)(x0, x_t, level, index=index)
    some = sf.StableTarget(sf.EDM(), references=pool, noise_band=band)(x0, x_t, level, index=index)
    above = level >= band
    assert 50 < above.sum() < 200
    torch.testing.assert_close(some.x0[above], full.x0[above], rtol=0, atol=1e-5)
    assert torch.equal(some.x0[~above], x0[~above])


@pytest.mark.parametrize("kind", ["uint8", "channels_last", "array"])
def test_chunks_are_decoded_into_one_buffer(kind: str, rng: torch.Generator) -> None:
    data = torch.randint(0, 256, (50, 3, 4, 4), generator=rng, dtype=torch.uint8)
    values = (data / 127.5 - 1).flatten(1)
    if kind == "channels_last":
        held = (data / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    else:
        held = data.numpy() if kind == "array" else data
    where, rows, places = [], [], set()
    for part, chunk in ReferenceMatrix(held).chunks(16, torch.float32):
        where.append(part)
        rows.append(chunk.clone())
        places.add(chunk.data_ptr())
    assert len(places) == 1
    assert [(part.start, part.stop) for part in where] == [(0, 16), (16, 32), (32, 48), (48, 50)]
    # Bytes are decoded by one multiply-add, which rounds once where this rounds twice.
    torch.testing.assert_close(torch.cat(rows), values, rtol=0, atol=2**-23 if kind != "channels_last" else 0)


@pytest.mark.parametrize("dim", [1, 100, 128, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squared_norms_are_good_to_an_ulp_or_two(dim: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    rows = torch.randn(70, dim, generator=rng, dtype=torch.float64).to(dtype)
    truth = rows.double().square().sum(1)
    torch.testing.assert_close(squared_norms(rows), truth, rtol=3 * torch.finfo(dtype).eps, atol=0)


def test_chunks_keep_to_the_memory_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_size(batch: int, dim: int, n: int) -> int:
        return ReferenceMatrix(torch.zeros(1, 1).expand(n, dim)).chunk_size(batch)

    # In the cache if there is plenty; all of it if that is little.
    assert 2**19 < chunk_size(64, 3072, 50_000) * 3072 <= 2**21
    assert chunk_size(128, 64, 1797) == 1797
    assert chunk_size(0, 64, 10) == 10
    # Long rows are not taken singly, for each chunk costs a pass over the sums.
    assert chunk_size(8, 3 * 512 * 512, 50_000) == 128
    for free in (2**30, 2**26, 2**20, 0):
        monkeypatch.setattr("stablefield.targets._engine.reference_matrix.free_bytes", lambda device, free=free: free)
        for batch, dim in ((64, 786_432), (100_000, 3072), (512, 3072)):
            rows = chunk_size(batch, dim, 50_000)
            assert rows >= 1
            assert rows == 1 or 4 * rows * max(batch, dim) <= free / 16


def test_an_array_is_a_pool_like_the_tensor(rng: torch.Generator, tmp_path: Path) -> None:
    data = torch.randint(0, 256, (90, 3, 4, 4), generator=rng, dtype=torch.uint8)
    np.save(tmp_path / "data.npy", data.numpy())
    mapped = np.load(tmp_path / "data.npy", mmap_mode="r")
    index = torch.randperm(90, generator=rng)[:20]
    x0 = data[index] / 127.5 - 1
    x_t = x0 + 2 * torch.randn(x0.shape, generator=rng)
    labels = torch.arange(90) % 3
    for size, mirrored, chunk_size in ((None, False, None), (None, True, 7), (40, False, None)):
        found = [
            sf.StableTarget(sf.EDM(), references=sf.Pool(held, size, labels, mirrored=mirrored), chunk_size=chunk_size)(
                x0, x_t, 2.0, labels[index], index, generator=torch.Generator().manual_seed(1)
            )
            for held in (data, mapped)
        ]
        for name in ("x0", "variance", "ess", "source_weight"):
            assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name


def test_arrays_of_other_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="Pool data have dtype int64"):
        sf.Pool(np.zeros((3, 2), np.int64))


PROGRAM = """
import resource, sys
import numpy as np
import torch
import stablefield as sf
torch.set_num_threads(1)
n, d = 40_000, 3 * 64 * 64
data = np.memmap(sys.argv[1], np.uint8, "r", shape=(n, d))
index = torch.tensor([3, n - 1])
x0 = torch.from_numpy(np.array(data[index.numpy()])) / 127.5 - 1
x_t = x0 + 200 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
target = sf.StableTarget(sf.EDM(), references=sf.Pool(data))
small = sf.Pool(np.array(data[[3, n - 1]]))
sf.StableTarget(sf.EDM(), references=small)(x0, x_t, 200.0, index=torch.arange(2))
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**27, used + 2**27))
try:
    np.array(data)
except MemoryError:
    print("too large for memory")
found = target(x0, x_t, 200.0, index=index)
print(float(found.source_weight.sum()), float(found.x0.mean()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to bound the memory of a process")
def test_a_file_larger_than_memory_is_walked(tmp_path: Path) -> None:
    n, d = 40_000, 3 * 64 * 64
    # A file with holes: 490 MB of zeros (that is, of -1) that take no space, and one white image at the end.
    path = tmp_path / "data"
    with path.open("wb") as file:
        file.truncate(n * d)
        file.seek((n - 1) * d)
        file.write(b"\xff" * d)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "too large for memory"
    own, mean = (float(value) for value in second.split())
    # One row is black like all others but one, the other is white: |x - y|^2 / 2 sigma^2 differ by 4 d / 2 sigma^2 = 0.61.
    assert 0 < own < 1e-3
    assert -1 < mean < -0.999
