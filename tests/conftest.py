"""What all tests share: a bound on threads, seeded draws, and a posterior written in the plainest way."""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Processes that tests start are to compute with as many threads as the tests, or their bytes differ.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from forks import Fork, Server, group_of
from pictures import draw_small_pictures, empty_charts

draw_small_pictures()
# Nothing is garbage until all tests are collected.
gc.disable()


@dataclass(frozen=True)
class Exact:
    """A posterior by its definition, in float64: weights (B, n), mean (B, d), variance, ess, log_evidence (B,)."""

    weights: Tensor
    mean: Tensor
    variance: Tensor
    ess: Tensor
    log_evidence: Tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first: no process then works on a long one after the others have ended.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def at_most_two_threads() -> Iterator[None]:
    found = torch.get_num_threads()
    # Several processes share the cores: see the Makefile.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(found, 2))
    yield
    torch.set_num_threads(found)


@pytest.fixture
def without_charts() -> Iterator[None]:
    """For tests of the numbers of a command that also draws them."""
    with empty_charts():
        yield


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def exact() -> Callable[..., Exact]:
    def compute(x_t, alpha, sigma, references, allowed=None, log_prior=None, log_kernel=None) -> Exact:
        """No product form, no anchor, no chunks: every difference vector is formed, in float64.

        `log_kernel(square, sigma, dim)` is the log density of the noise; Gaussian if not given.
        """
        x, y = x_t.reshape(len(x_t), -1).double(), references.reshape(len(references), -1).double()
        alpha = torch.as_tensor(alpha, dtype=torch.float64).expand(len(x))
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))[:, None]
        square = torch.stack([((x[i] - alpha[i] * y) ** 2).sum(1) for i in range(len(x))])
        if log_kernel is None:
            log_density = -square / (2 * sigma**2) - x.shape[1] * torch.log(sigma * (2 * torch.pi) ** 0.5)
        else:
            log_density = log_kernel(square, sigma, x.shape[1])
        prior = torch.zeros(len(x), len(y), dtype=torch.float64)
        if log_prior is not None:
            prior = prior + log_prior.double()
        if allowed is not None:
            prior = prior.masked_fill(~allowed, -torch.inf)
        joint = prior.log_softmax(1) + log_density
        weights = joint.softmax(1)
        mean = weights @ y
        spread = torch.stack([((y - mean[i]) ** 2).sum(1) for i in range(len(x))])
        return Exact(weights, mean, (weights * spread).sum(1), 1 / (weights**2).sum(1), joint.logsumexp(1))

    return compute


@pytest.fixture(scope="session")
def smooth_images() -> Callable[..., Tensor]:
    def make(n: int, generator: torch.Generator, size: int = 32) -> Tensor:
        """Random images in [-1, 1], shape (n, 3, size, size), whose power falls with frequency as in photographs."""
        octaves = [
            torch.nn.functional.interpolate(
                torch.randn(n, 3, cells, cells, generator=generator) * 1.2 / cells**0.5, size=size, mode="bilinear"
            )
            for cells in (2, 4, 8, 16)
        ]
        return sum(octaves[1:], octaves[0]).clamp(-1, 1)

    return make


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def fork(fork_server: Server) -> Iterator[Callable[..., Fork]]:
    """Start `code` in a process of its own, see `forks`; what still runs at the test's end is killed."""
    begun: list[Fork] = []

    def start(code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> Fork:
        begun.append(fork_server.start(code, [str(argument) for argument in arguments], cwd, environment))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()


@pytest.fixture
def fork_ranks(fork: Callable[..., Fork]) -> Callable[..., list[Fork]]:
    """Start `code` in a number of processes of one group, with the environment that torchrun gives them."""

    def start(count: int, code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> list[Fork]:
        return [fork(code, *arguments, cwd=cwd, **{**rank, **environment}) for rank in group_of(count)]

    return start
