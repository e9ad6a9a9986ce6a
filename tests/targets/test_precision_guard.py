"""The posterior is computed in full precision, and the user's switches are found again as they were left."""

import os
from collections.abc import Iterator
from threading import Event, Thread

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stablefield as sf
from stablefield.targets._engine.matmul import full_precision

FIELDS = ("mean", "variance", "ess", "source_weight", "log_evidence")


def switches() -> tuple[str | bool, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_tf32,
    )


@pytest.fixture(autouse=True)
def highest_again() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def case(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, references, source) at which a product in bfloat16 would show: 300 references, one third of them near."""
    y = torch.randn(300, 256, generator=rng)
    return y[:64] + 4 * torch.randn(64, 256, generator=rng), y, torch.arange(64)


class Products(TorchDispatchMode):
    """Records, at every matrix product, whether a switch or autocast would have rounded it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, bool, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        onednn = func.namespace == "mkldnn"
        if onednn or func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.append(
                (
                    torch.backends.cuda.matmul.fp32_precision,
                    torch.backends.mkldnn.matmul.fp32_precision,
                    torch.is_autocast_enabled("cpu"),
                    args[0 if onednn else -1].dtype,
                )
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", ["high", "medium"])
@pytest.mark.parametrize("sigma", [0.05, 4.0])
@pytest.mark.parametrize("with_source", [True, False])
def test_results_are_bitwise_those_of_the_highest_precision(
    case, setting: str, sigma: float, with_source: bool
) -> None:
    x_t, y, source = case
    source = source if with_source else None
    truth = sf.posterior(x_t, 1.0, sigma, y, source)
    torch.set_float32_matmul_precision(setting)
    found = sf.posterior(x_t, 1.0, sigma, y, source)
    for name in FIELDS:
        left, right = getattr(found, name), getattr(truth, name)
        assert left is right is None or torch.equal(left, right), name


@pytest.mark.parametrize("sigma", [0.05, 4.0])
@pytest.mark.parametrize("with_source", [True, False])
def test_results_under_autocast_are_bitwise_those_without(case, sigma: float, with_source: bool) -> None:
    x_t, y, source = case
    source = source if with_source else None
    truth = sf.posterior(x_t, 1.0, sigma, y, source)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x_t @ y.T).dtype == torch.bfloat16
        found = sf.posterior(x_t, 1.0, sigma, y, source)
    for name in FIELDS:
        left, right = getattr(found, name), getattr(truth, name)
        assert left is right is None or torch.equal(left, right), name


@pytest.mark.parametrize("references", [sf.InBatch(), None], ids=["batch", "mirrored pool"])
def test_targets_and_their_views_under_autocast_are_bitwise_those_without(case, references) -> None:
    x_t, y, _ = case
    pool = references or sf.Pool(y, mirrored=True)
    target = sf.StableTarget(sf.VP(), references=pool, validate_args=False)
    arguments = (y[:64], x_t, 0.7)
    truth = target(*arguments, index=torch.arange(64))
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        found = target(*arguments, index=torch.arange(64))
        views = [getattr(found, name) for name in ("x0", "noise", "score", "v", "velocity")]
    for view, name in zip(views, ("x0", "noise", "score", "v", "velocity"), strict=True):
        assert torch.equal(view, getattr(truth, name)), name
    assert torch.equal(found.variance, truth.variance)


@pytest.mark.parametrize("sigma", [0.05, 4.0])
def test_every_matrix_product_is_made_with_the_switches_off(case, sigma: float) -> None:
    # On machines without bfloat16 products the bitwise tests cannot fail; this one can on all.
    x_t, y, source = case
    torch.set_float32_matmul_precision("medium")
    target = sf.StableTarget(sf.EDM(), references=sf.Pool(y, mirrored=True), validate_args=False)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        sf.posterior(x_t, 1.0, sigma, y, source)
        sf.posterior(x_t, 1.0, sigma, y)
        target(y[:64], x_t, sigma, index=source)
    assert len(products.seen) >= 6  # second products that no row needs are not made
    assert set(products.seen) == {("ieee", "ieee", False, torch.float32)}


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_switches_are_found_as_they_were_left(case, setting: str) -> None:
    x_t, y, source = case
    torch.set_float32_matmul_precision(setting)
    before = switches()
    with torch.autocast("cpu", torch.bfloat16):
        sf.posterior(x_t, 1.0, 4.0, y, source)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    assert switches() == before


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_switches_are_found_as_they_were_left_after_an_error(case, setting: str) -> None:
    x_t, y, _ = case
    torch.set_float32_matmul_precision(setting)
    before = switches()
    nobody = {"labels": torch.ones(64, dtype=torch.long), "reference_labels": torch.zeros(300, dtype=torch.long)}
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="no reference may serve"):
            sf.posterior(x_t, 1.0, 4.0, y, **nobody)
        assert torch.is_autocast_enabled("cpu")
    assert switches() == before


@pytest.mark.gpu
def test_tf32_and_autocast_do_not_reach_the_posterior_on_cuda(case) -> None:
    x_t, y, source = (value.cuda() for value in case)
    truth = sf.posterior(x_t, 1.0, 4.0, y, source)
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cuda", torch.bfloat16):
        found = sf.posterior(x_t, 1.0, 4.0, y, source)
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(truth, name)), name


def test_blocks_of_two_threads_that_overlap_keep_full_precision_and_the_users_switches() -> None:
    torch.set_float32_matmul_precision("high")
    before = switches()
    begun, entered, left = Event(), Event(), Event()
    seen: list[str | bool] = []

    def first() -> None:
        with full_precision(torch.device("cpu")):
            begun.set()
            assert entered.wait(10)
        left.set()

    def second() -> None:
        with full_precision(torch.device("cpu")):
            entered.set()
            assert left.wait(10)
            seen.extend([torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision])

    threads = [Thread(target=one) for one in (first, second)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert seen == ["ieee", "ieee"]
    assert switches() == before


def test_posteriors_of_two_threads_leave_the_users_switches(case: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.set_float32_matmul_precision("high")
    before, (x_t, y, _) = switches(), case
    threads = [Thread(target=lambda: [sf.posterior(x_t, 1.0, 1.0, y) for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert switches() == before


def test_what_the_user_sets_within_a_block_stays_and_later_blocks_are_at_full_precision() -> None:
    torch.set_float32_matmul_precision("highest")
    with full_precision(torch.device("cpu")):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_from_a_block_has_the_users_switches() -> None:
    torch.set_float32_matmul_precision("high")
    before = torch.backends.cuda.matmul.fp32_precision
    with full_precision(torch.device("cpu")):
        pid = os.fork()
        if pid == 0:
            same = torch.backends.cuda.matmul.fp32_precision == before
            with full_precision(torch.device("cpu")):
                same &= torch.backends.cuda.matmul.fp32_precision == "ieee"
            os._exit(0 if same and torch.backends.cuda.matmul.fp32_precision == before else 1)
        assert os.waitpid(pid, 0)[1] == 0
