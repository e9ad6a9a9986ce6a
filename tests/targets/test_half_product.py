"""Half-precision references: exact as they are stored, with products as accurate as float32's, from arrays of any kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield.targets._engine import matmul
from stablefield.targets._engine.half_product import available, errors, half_product

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_three_products_have_the_accuracy_of_one_in_float32(dtype: torch.dtype) -> None:
    # The same arithmetic as on a GPU: exact products, summed in float32.
    ours, plain = errors(torch.device("cpu"), dtype)
    assert 0 < ours.max() < 1.1 * plain.max()
    # Without rows of one value, whose sums round alike: the bound of the engine.
    different = torch.ones(64, dtype=torch.bool)
    different[32:48] = False
    assert ours[:24, different].max() < matmul.ULPS


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_rows_of_any_size_keep_their_digits(dtype: torch.dtype, scale: float, rng: torch.Generator) -> None:
    x = scale * torch.randn(16, 300, generator=rng)
    x[0], x[1, 0] = 0, 300 * scale
    matrix = torch.randn(300, 20, generator=rng).to(dtype)
    found = half_product(x, matrix).double()
    wide, references = x.double(), matrix.double()
    bound = 4 * torch.finfo(torch.float32).eps * wide.norm(dim=1)[:, None] * references.norm(dim=0)
    assert ((found - wide @ references).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_one_number_is_the_sum_of_its_three_parts(dtype: torch.dtype, rng: torch.Generator) -> None:
    # By products with 1: 24 bits of a number near the largest of its row, and as many fewer as it is smaller.
    x = torch.randn(50, 40, generator=rng)
    found = half_product(x, torch.eye(40).to(dtype))
    assert ((found - x).abs() <= 2.0**-24 * x.abs().amax(1, keepdim=True)).all()


def test_a_bfloat16_has_every_byte_and_float16_every_number_of_its_own() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(byte.to(torch.bfloat16).sub_(128).double(), byte.double() - 128)


def test_a_cpu_decodes() -> None:
    assert not available(torch.device("cpu"), torch.bfloat16, 10.0)
    assert not available(torch.device("meta"), torch.float16, 10.0)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Multiply halves as they are; the kinds of chunks that were made."""
    kinds: list[str] = []
    monkeypatch.setattr(matmul, "_stay_halves", lambda matrix, dtype: dtype == torch.float32)
    monkeypatch.setattr(matmul, "_stay_bytes", lambda *_: False)
    product = matmul.half_product

    def noted(x: Tensor, matrix: Tensor) -> Tensor:
        kinds.append(f"{matrix.dtype} {matrix.ndim}")
        return product(x, matrix)

    monkeypatch.setattr(matmul, "half_product", noted)
    return kinds


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "float16", "bfloat16"])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 5.0])
def test_the_target_over_halves_as_they_are_is_that_in_float64(
    kind: str,
    labelled: bool,
    sigma: float,
    as_on_a_gpu: list[str],
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if labelled:  # references by label, although they are few
        monkeypatch.setattr("stablefield.targets._engine.label_index._PART", 0)
        monkeypatch.setattr("stablefield.targets._engine.assembly._FEW", 0)
    data = torch.rand(120, 40, generator=rng) * 2 - 1
    data[60:] = data[:60] + 0.05 * torch.randn(60, 40, generator=rng)
    if kind == "uint8":
        data = ((data.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        values = data.double() / 127.5 - 1
    else:
        data = data.to(getattr(torch, kind))
        values = data.double()
    labels = torch.arange(120) % 4
    index = torch.arange(32)  # equally many rows of each label
    x0 = values[index].float()
    x_t = x0 + sigma * torch.randn(x0.shape, generator=rng)
    seen = labels[index].clone()
    seen[:8] = -1
    pool = sf.Pool(data, labels=labels if labelled else None)
    found = sf.StableTarget(sf.EDM(), references=pool)(x0, x_t, sigma, seen if labelled else None, index)
    logits = -(x_t.double()[:, None] - values).square().sum(2) / (2 * sigma**2)
    if labelled:
        logits[(seen[:, None] != labels) & (seen[:, None] != -1)] = -torch.inf
    torch.testing.assert_close(found.x0.double(), torch.softmax(logits, 1) @ values, rtol=0, atol=2e-5)
    assert as_on_a_gpu
    if labelled and kind != "uint8":
        assert f"torch.{kind} 3" in as_on_a_gpu


def bits(values: Tensor) -> np.ndarray:
    return values.to(torch.bfloat16).view(torch.uint16).numpy()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", ["bits", "map", "ml_dtypes", "float16", "float32"])
def test_an_array_of_half_precision_gives_the_target_of_the_tensor(
    kind: str, labelled: bool, tmp_path: Path, rng: torch.Generator
) -> None:
    data = torch.randn(90, 3, 4, generator=rng)
    tensor, dtype = data.to(torch.bfloat16), None
    if kind == "bits":
        array, dtype = bits(data), torch.bfloat16
    elif kind == "map":
        np.save(tmp_path / "data.npy", bits(data))
        array, dtype = np.load(tmp_path / "data.npy", mmap_mode="r"), torch.bfloat16
    elif kind == "ml_dtypes":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        array = bits(data).view(ml_dtypes.bfloat16)
    else:
        tensor = data.to(getattr(torch, kind))
        array = tensor.numpy()
    labels = torch.arange(90) % 3 if labelled else None
    index = torch.arange(30)
    x0 = tensor[:30].float()
    x_t = x0 + 0.8 * torch.randn(x0.shape, generator=rng)
    seen = None if labels is None else labels[index]
    found = [
        sf.StableTarget(sf.EDM(), references=pool)(x0, x_t, 0.8, seen, index)
        for pool in (sf.Pool(tensor, labels=labels), sf.Pool(array, labels=labels, dtype=dtype))
    ]
    torch.testing.assert_close(found[1].x0, found[0].x0, rtol=0, atol=1e-6)
    assert found[0].ess.max() > 1.1
    subset = sf.StableTarget(sf.EDM(), references=sf.Pool(array, 40, labels=labels, dtype=dtype))
    assert subset(x0, x_t, 0.8, seen, index).x0.isfinite().all()
    assert sf.pick_noise_band(sf.Pool(array, dtype=dtype)).level == sf.pick_noise_band(sf.Pool(tensor)).level


def test_bits_without_their_dtype_are_refused() -> None:
    array = bits(torch.randn(9, 3))
    with pytest.raises(ValueError, match=r"dtype uint16.*or dtype=torch.bfloat16 if these are its bits"):
        sf.Pool(array)
    with pytest.raises(ValueError, match=r"Pool dtype is torch.bfloat16, the data are float32"):
        sf.Pool(np.zeros((3, 2), np.float32), dtype=torch.bfloat16)
