"""Dropout with shared random numbers is dropout: independent values, its probability, mean and gradient; and cheaper."""

import time
from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from stablefield.networks._dropout import dropout


@pytest.mark.parametrize("probability", [0.05, 0.13, 0.5, 0.9])
def test_values_are_dropped_with_the_probability_and_scaled_so_that_the_mean_stays(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000_003)
    found = dropout(x, probability, True)
    share = float((found == 0).float().mean())
    assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / len(x)) ** 0.5)
    kept = found[found != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert float(kept[0]) == pytest.approx(1 / (1 - probability), rel=2e-4)
    # A multiple of 2^-16 is what it is exactly.
    dropped = round(probability * 2**16)
    assert float(kept[0]) == pytest.approx(2**16 / (2**16 - dropped), rel=1e-7)


def test_values_of_one_random_number_are_independent() -> None:
    torch.manual_seed(1)
    n = 400_000
    bits = (dropout(torch.ones(n, 4), 0.3, True) == 0).double()
    patterns = (bits @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)).long().bincount(minlength=16)
    ones = torch.tensor([bin(k).count("1") for k in range(16)])
    expected = n * 0.3**ones * 0.7 ** (4 - ones)
    # Chi-square with 15 degrees of freedom exceeds 44 once in 10,000 times.
    assert float(((patterns - expected) ** 2 / expected).sum()) < 44
    # And of its neighbours.
    flat = bits.flatten() - bits.mean()
    for lag in range(1, 9):
        assert abs(float((flat[:-lag] * flat[lag:]).mean())) < 5 * 0.21 / (4 * n) ** 0.5


def test_the_gradient_is_that_of_the_mask() -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    found = dropout(x, 0.4, True)
    found.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(found, x.detach() * x.grad)
    assert 0 < int((x.grad == 0).sum()) < x.numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided", "odd", "empty", "bf16", "float64"])
def test_any_layout_and_dtype_keeps_its_shape_and_repeats_with_its_seed(layout: str) -> None:
    x = torch.ones(4, 6, 8, 8)
    match layout:
        case "channels last":
            x = x.to(memory_format=torch.channels_last)
        case "strided":
            x = torch.ones(4, 8, 6, 8).transpose(1, 2)
        case "odd":
            x = torch.ones(7)
        case "empty":
            x = torch.ones(0, 3)
        case "bf16":
            x = x.bfloat16()
        case "float64":
            x = x.double()
        case _:
            pass
    torch.manual_seed(3)
    found = dropout(x, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5, True), found)
    assert (found.shape, found.dtype, found.stride()) == (x.shape, x.dtype, x.stride())
    assert set(found.unique().tolist()) <= {0.0, 2.0}


def test_nothing_happens_in_evaluation_or_with_probability_0() -> None:
    x = torch.ones(5)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x


def test_a_probability_next_to_1_is_finite() -> None:
    assert dropout(torch.ones(100_000), 1 - 1e-9, True).isfinite().all()


def test_functions_of_functions_traces_and_graphs_have_the_dropout_of_torch() -> None:
    x = torch.ones(5, 100)

    def loss(row: torch.Tensor) -> torch.Tensor:
        return dropout(row, 0.5, True).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), randomness="different")(x)
    assert set(gradients.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(gradients[0], gradients[1])
    graph = make_fx(lambda row: dropout(row, 0.5, True))(x)
    assert set(graph(x).unique().tolist()) == {0.0, 2.0}


def test_masks_take_a_quarter_of_the_random_numbers_of_those_of_torch() -> None:
    """By where the generator is afterwards."""

    def next_after(draw: Callable[[], object]) -> float:
        torch.manual_seed(0)
        draw()
        return torch.rand(1).item()

    def words(count: int) -> float:
        return next_after(lambda: torch.empty(count, dtype=torch.int64).random_(-(2**63), None))

    x = torch.randn(4, 8, 16, 16)
    assert next_after(lambda: functional.dropout(x, 0.13, True)) == words(x.numel())
    assert next_after(lambda: dropout(x, 0.13, True)) == words(x.numel() // 4)


@pytest.mark.timed
def test_masks_take_less_than_half_of_the_time_of_those_of_torch() -> None:
    # Small enough for a core's cache: memory that a machine shares with others is no part of the claim.
    x = torch.randn(2, 64, 32, 32)

    def seconds(function: Callable[[torch.Tensor, float, bool], torch.Tensor]) -> float:
        began = time.process_time()
        function(x, 0.13, True)
        return time.process_time() - began

    # With one thread: others that wait for work use the processor, too.
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # In turn, and the shortest of each: what else the machine does only ever adds time.
        pairs = [(seconds(dropout), seconds(functional.dropout)) for _ in range(40)]
    finally:
        torch.set_num_threads(found)
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    assert ours < 0.5 * theirs
