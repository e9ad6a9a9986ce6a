"""The products of the engine: right to their stated bound, whether references are floats or bytes in integer arithmetic."""

import pytest
import torch

import stablefield as sf
from stablefield.targets._engine.matmul import _LONGEST as LONGEST
from stablefield.targets._engine.matmul import ULPS, ByteChunk, Chunk, Digits, Operand, available, chunks
from stablefield.targets._engine.reference_matrix import ReferenceMatrix, largest_magnitude

EPS = torch.finfo(torch.float32).eps
# The digits need no special instructions, so they are tested everywhere.


def of(rows: torch.Tensor) -> Digits:
    return Digits.of(rows, largest_magnitude(rows))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 300.0, 1e30])
def test_digits_keep_24_bits_of_the_largest_number(scale: float, rng: torch.Generator) -> None:
    rows = scale * torch.randn(5, 300, generator=rng)
    rows[0, 0] = -4 * scale
    digits = of(rows)
    values = sum(digits.digits[5 * k : 5 * k + 5].double() * 256**k for k in range(3)) * digits.scale.double()[:, None]
    error = (values - rows.double()).abs().amax(1) / rows.abs().amax(1).double()
    assert error.max() < 1.1 * 2.0**-23
    assert error.max() > 0


def test_digits_of_zeros_and_of_the_extremes_are_exact() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, -3.0], [1e-42, 0.0]])
    digits = of(rows)
    assert digits.scale.isfinite().all()
    values = sum(digits.digits[3 * k : 3 * k + 3].double() * 256**k for k in range(3)) * digits.scale.double()[:, None]
    torch.testing.assert_close(values, rows.double(), rtol=1e-7, atol=1e-40)


@pytest.mark.parametrize("kind", ["images", "dark", "light", "equal"])
@pytest.mark.parametrize("dim", [256, 784, 3072])
def test_inner_products_with_bytes_keep_to_the_bound_of_products_with_floats(
    kind: str, dim: int, rng: torch.Generator
) -> None:
    low, high = {"images": (0, 256), "dark": (0, 5), "light": (250, 256), "equal": (200, 201)}[kind]
    images = torch.randint(low, high, (70, dim), generator=rng, dtype=torch.uint8)
    chunk = ByteChunk((images ^ 128).view(torch.int8))
    truth = images.double() / 127.5 - 1
    x = truth[:30].float() + 0.001 * torch.randn(30, dim, generator=rng)
    expected = x.double() @ truth.T
    norms = x.double().norm(dim=1)[:, None] * truth.norm(dim=1)
    assert 0 < ((chunk.inner(Operand(x)) - expected) / norms).abs().max() < ULPS * EPS


@pytest.mark.parametrize("batch", [1, 3, 24])
@pytest.mark.parametrize("count", [1, 37, 700])
def test_weighted_sums_of_bytes_are_those_of_the_images(batch: int, count: int, rng: torch.Generator) -> None:
    images = torch.randint(0, 256, (count, 768), generator=rng, dtype=torch.uint8)
    chunk = ByteChunk((images ^ 128).view(torch.int8))
    truth = images.double() / 127.5 - 1
    # Weights of all sizes, with a level far from the largest, as they come while sums are made.
    weights = torch.exp(16 - 20 * torch.rand(batch, count, generator=rng))
    weights[0] = 0
    expected = weights.double() @ truth
    scale = weights.double().sum(1, keepdim=True).clamp(min=1)
    assert ((chunk.weighted(weights) - expected) / scale).abs().max() < 2e-6
    total = torch.ones(batch, 768)
    chunk.add_weighted(total, weights)
    assert ((total - 1 - expected) / scale).abs().max() < 2e-6
    torch.testing.assert_close(chunk.wide, truth, rtol=0, atol=1e-7)
    assert torch.equal(chunk.at(torch.tensor([count - 1]), torch.tensor([0])).double(), chunk.wide[-1:])


@pytest.mark.parametrize("form", ["tensor", "array", "channels last"])
@pytest.mark.parametrize("level", [0.3, 3.0, 30.0])
def test_a_posterior_over_bytes_is_that_over_the_decoded_images(
    form: str, level: float, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(600, 3, 4, 4, generator=rng), size=16, mode="bilinear")
    images = (255 * smooth).round().to(torch.uint8)
    held = {
        "tensor": images,
        "array": images.numpy(),
        "channels last": images.contiguous(memory_format=torch.channels_last),
    }[form]
    index = torch.arange(64)
    x0 = images[index] / 127.5 - 1
    x_t = sf.EDM().perturb(x0, level, generator=rng)

    def target() -> sf.Target:
        pool = sf.Pool(held, mirrored=True)
        return sf.StableTarget(sf.EDM(), references=pool, chunk_size=130)(x0, x_t, level, index=index)

    monkeypatch.setattr("stablefield.targets._engine.matmul.available", lambda: True)
    kinds = {type(chunk) for _, chunk in chunks(ReferenceMatrix(held), 130, 64, torch.float32)}
    assert kinds == {ByteChunk}
    by_bytes = target()
    monkeypatch.setattr("stablefield.targets._engine.matmul.available", lambda: False)
    kinds = {type(chunk) for _, chunk in chunks(ReferenceMatrix(held), 130, 64, torch.float32)}
    assert kinds == {Chunk}
    decoded = target()
    torch.testing.assert_close(by_bytes.x0, decoded.x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_bytes.ess, decoded.ess, rtol=1e-3, atol=0)
    assert level < 1 or decoded.ess.max() > 1.5


def test_what_is_not_made_for_it_is_decoded(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablefield.targets._engine.matmul.available", lambda: True)
    images = torch.randint(0, 256, (200, 3072), generator=rng, dtype=torch.uint8)

    def kind(data: torch.Tensor, batch: int = 64, dtype: torch.dtype = torch.float32) -> type:
        return type(next(chunks(ReferenceMatrix(data), 50, batch, dtype))[1])

    assert kind(images) is ByteChunk
    assert kind(images.float()) is Chunk
    assert kind(images, dtype=torch.float64) is Chunk
    assert kind(images[:, :64]) is Chunk
    assert kind(images, batch=2) is Chunk


def test_without_the_instructions_bytes_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    available.cache_clear()
    try:
        assert not available()
    finally:
        available.cache_clear()


def test_a_product_that_overflows_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    # As libraries do without VNNI: pairs of products saturate at 16 bits.
    monkeypatch.setattr("torch._int_mm", lambda a, b: (a.int() @ b.int()).clamp(max=2**15 - 1))
    available.cache_clear()
    try:
        assert not available()
    finally:
        available.cache_clear()


@pytest.mark.parametrize("byte", [-128, 127])
@pytest.mark.parametrize("number", [1.0, -1.0])
def test_the_longest_sums_do_not_overflow(byte: int, number: float) -> None:
    # Digits of 127 or -127 in the first place, and of -128 in the others, with bytes of one sign.
    for rest in (0.0, -0x8080 / 2**23):
        rows = torch.full((2, LONGEST), number + rest)
        rows[0, 0] = 1 + 1 / 127
        values = torch.full((LONGEST, 3), byte, dtype=torch.int8)
        found = of(rows).times(values) * of(rows).scale[:, None]
        torch.testing.assert_close(found.double(), rows.double() @ values.double(), rtol=1e-6, atol=0)


def test_no_chunk_of_bytes_is_longer_than_its_sums_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablefield.targets._engine.matmul.available", lambda: True)
    # Black images of equal weight: a sum over all of them in one chunk would leave 32 bits.
    images = torch.zeros(150_000, 256, dtype=torch.uint8)
    found = sf.posterior(torch.zeros(2, 256), 1.0, 1e3, images, chunk_size=len(images))
    torch.testing.assert_close(found.mean, torch.full((2, 256), -1.0), rtol=0, atol=1e-5)
    assert found.ess == pytest.approx([150_000] * 2, rel=1e-4)


@pytest.mark.parametrize("dim", [64, 784, 3072, 12288])
@pytest.mark.parametrize("kind", ["images", "positive", "constant"])
def test_errors_keep_to_the_stated_bound(kind: str, dim: int, rng: torch.Generator) -> None:
    y = torch.rand(512, dim, generator=rng)
    y = {"images": 2 * y - 1, "positive": y, "constant": 0.37 + 0.01 * y}[kind]
    # Rows with themselves: all terms have one sign, so that what is rounded is largest.
    x = y[:64] + 0.001 * torch.randn(64, dim, generator=rng)
    truth = x.double() @ y.double().T
    norms = x.double().norm(dim=1)[:, None] * y.double().norm(dim=1)
    assert 0 < ((Chunk(y).inner(Operand(x)) - truth) / norms).abs().max() < ULPS * EPS


@pytest.mark.parametrize("batch", [1, 3, 4, 23, 64])
@pytest.mark.parametrize("count", [1, 37, 682])
def test_products_have_their_values_for_any_shape(batch: int, count: int, rng: torch.Generator) -> None:
    x, rows = torch.randn(batch, 3072, generator=rng), torch.randn(count, 3072, generator=rng)
    weights, chunk = torch.rand(batch, count, generator=rng), Chunk(rows)
    torch.testing.assert_close(chunk.inner(Operand(x)).double(), x.double() @ rows.double().T, rtol=0, atol=2e-3)
    expected, total = weights.double() @ rows.double(), torch.ones(batch, 3072)
    torch.testing.assert_close(chunk.weighted(weights).double(), expected, rtol=0, atol=1e-3)
    chunk.add_weighted(total, weights)
    torch.testing.assert_close(total.double() - 1, expected, rtol=0, atol=1e-3)


def test_float64_stays_float64(rng: torch.Generator) -> None:
    x = torch.randn(64, 3072, generator=rng, dtype=torch.float64)
    y = torch.randn(682, 3072, generator=rng, dtype=torch.float64)
    assert Chunk(y).inner(Operand(x)).dtype == Chunk(y[:64]).weighted(x[:, :64]).dtype == torch.float64


@pytest.mark.parametrize("kind", ["floats", "bytes"])
def test_results_do_not_share_memory_with_what_they_are_made_of(kind: str, rng: torch.Generator) -> None:
    x, images = torch.randn(24, 3072, generator=rng), torch.randint(0, 256, (682, 3072), generator=rng).to(torch.uint8)
    chunk = Chunk(images / 127.5 - 1) if kind == "floats" else ByteChunk((images ^ 128).view(torch.int8))
    first = chunk.inner(Operand(x))
    kept = first.clone()
    chunk.inner(Operand(x + 1)).zero_()
    assert torch.equal(first, kept)
