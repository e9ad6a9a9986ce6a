import math

import numpy as np
import pytest
import torch

from stablefield.networks._blocks import self_attention
from stablefield.networks._embedding import FourierEmbedding, PositionalEmbedding, class_numbers, class_vectors
from stablefield.networks._layers import group_norm
from stablefield.networks._resample import ConvDown2d, downsample, resampling_filter, upsample

TAPS = pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def normalised(taps: tuple[int, ...]) -> np.ndarray:
    return np.array(taps) / sum(taps)


@TAPS
def test_downsampling_is_the_sum_of_its_definition(taps):
    x, f = image(2, 3, 6, 8), normalised(taps)
    p, expected = (len(taps) - 1) // 2, np.zeros((2, 3, 3, 4))
    for i, j, a, b in np.ndindex(3, 4, len(taps), len(taps)):
        row, column = 2 * i + a - p, 2 * j + b - p
        if 0 <= row < 6 and 0 <= column < 8:
            expected[:, :, i, j] += f[a] * f[b] * x.numpy()[:, :, row, column]
    actual = downsample(x, resampling_filter(taps))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


@TAPS
def test_upsampling_is_four_times_the_transpose_of_downsampling(taps):
    x, y, f = image(2, 3, 4, 6), image(2, 3, 8, 12), resampling_filter(taps)
    torch.testing.assert_close((upsample(x, f) * y).sum(), 4 * (x * downsample(y, f)).sum(), rtol=1e-12, atol=0)


@TAPS
def test_resampling_keeps_a_constant_away_from_the_border(taps):
    x, f = torch.ones(1, 2, 8, 8), resampling_filter(taps)
    assert f.shape == (1, 1, len(taps), len(taps))
    assert torch.equal(upsample(x, f)[..., 1:-1, 1:-1], torch.ones(1, 2, 14, 14))
    assert torch.equal(downsample(x, f)[..., 1:-1, 1:-1], torch.ones(1, 2, 2, 2))


def test_convolution_before_halving_sees_its_own_values_beyond_the_border():
    layer = ConvDown2d(2, 3, 3, (1, 3, 3, 1), torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        layer.bias.fill_(0.7)
        x = image(1, 2, 6, 6)
        wide = torch.nn.functional.conv2d(torch.nn.functional.pad(x, [2] * 4), layer.weight, layer.bias).numpy()
        f = normalised((1, 3, 3, 1))
        expected = np.zeros((1, 3, 3, 3))
        for i, j, a, b in np.ndindex(3, 3, 4, 4):
            expected[:, :, i, j] += f[a] * f[b] * wide[:, :, 2 * i + a, 2 * j + b]
        np.testing.assert_allclose(layer(x), expected, rtol=1e-10)


@pytest.mark.parametrize("taps", [(), (1, 2, 1), (1, -1)])
def test_taps_that_make_no_filter_are_refused(taps):
    with pytest.raises(ValueError, match="taps is"):
        resampling_filter(taps)


def test_positional_embedding_is_its_closed_form():
    labels = [0.0, 1.0, 73.5, 999.0]
    actual = PositionalEmbedding(128)(torch.tensor(labels))
    angles = np.outer(labels, [10000 ** (-k / 63) for k in range(64)])
    # A phase of 999 has a float32 spacing of 6e-5.
    np.testing.assert_allclose(actual, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=1e-4)
    assert actual.dtype == torch.float32
    assert PositionalEmbedding(128).state_dict() == {}


def test_fourier_embedding_is_its_closed_form_for_the_frequencies_it_stores():
    embedding = FourierEmbedding(256, generator=torch.Generator().manual_seed(0))
    stored = embedding.state_dict()["freqs"]
    assert stored.shape == (128,)
    labels = torch.tensor([-1.5, 0.0, 0.3])
    # 2 pi f rounds to float32 before it meets the label; from there on the reference is in float64.
    frequencies = (stored * np.float32(2 * math.pi)).double().numpy()
    angles = np.outer(labels.double(), frequencies)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(embedding(labels), expected, atol=3e-5)


def test_fourier_frequencies_are_normal_with_deviation_16():
    freqs = FourierEmbedding(20_000, generator=torch.Generator().manual_seed(0)).freqs
    # Standard errors: 0.16 of the mean, 0.11 of the deviation.
    assert abs(freqs.mean()) < 0.7
    assert abs(freqs.std() - 16) < 0.5


@pytest.mark.parametrize("width", [2, 7])
def test_embedding_widths_that_cannot_be_are_refused(width):
    with pytest.raises(ValueError, match=f"{width} wide"):
        PositionalEmbedding(width)


def test_attention_is_softmax_of_scaled_products_of_interleaved_channels():
    C, H, W = 5, 2, 3
    qkv = 2 * image(2, 3 * C, H, W)
    q, k, v = (qkv[:, j::3].reshape(2, C, H * W).numpy() for j in range(3))
    expected = np.zeros((2, C, H * W))
    for n, pixel in np.ndindex(2, H * W):
        weight = np.exp(k[n].T @ q[n, :, pixel] / math.sqrt(C))
        expected[n, :, pixel] = v[n] @ (weight / weight.sum())
    np.testing.assert_allclose(self_attention(qkv).reshape(2, C, -1), expected, rtol=1e-12)


def test_attention_is_computed_in_float32_under_autocast_and_in_half_precision():
    qkv = (4 * image(1, 24, 4, 4)).bfloat16()
    exact = self_attention(qkv.double())
    with torch.autocast("cpu", torch.bfloat16):
        half = self_attention(qkv)
        wide = self_attention(qkv.float())
    assert half.dtype == torch.bfloat16
    # Only the result is rounded: the inputs are bfloat16 numbers to begin with.
    assert torch.equal(half, exact.bfloat16())
    torch.testing.assert_close(wide, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (12, 3), (96, 24), (128, 32), (384, 32)])
def test_groups_are_a_quarter_of_the_channels_and_at_most_32(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.eps) == (groups, 1e-6)


@pytest.mark.parametrize("channels", [3, 9, 144])
def test_channels_that_do_not_divide_into_groups_are_refused(channels):
    with pytest.raises(ValueError, match=f"{channels} channels"):
        group_norm(channels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_class_labels_are_those_of_int64(dtype: torch.dtype) -> None:
    """The class 255 has the bits of -1, no class, in a uint8."""
    labels, x = torch.tensor([0, 254, 255]), torch.zeros(3, 1, 2, 2)
    assert torch.equal(class_vectors(labels.to(dtype), 256, x), torch.eye(256)[labels])
    assert torch.equal(class_numbers(labels.to(dtype), 256, x)[0], labels)
