import numpy as np
import pytest
import torch
from PIL import Image

from stablefield.evaluation._torchscript import AntialiasedBicubic, TensorFlowBilinear


def image(h: int, w: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, h, w), generator=torch.Generator().manual_seed(h)).float()


@pytest.mark.parametrize("shape", [(32, 32), (8, 12), (40, 9), (1, 5)])
def test_tensorflow_bilinear_is_the_double_loop_over_the_kernels_definition(shape: tuple[int, int]) -> None:
    x, size = image(*shape), 19
    got = TensorFlowBilinear(size)(x.double())[0].numpy()
    source = x[0].double().numpy()
    h, w = shape
    for i in range(size):
        for j in range(size):
            y, z = i * h / size, j * w / size
            top, left = int(y), int(z)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            above = source[:, top, left] + (source[:, top, right] - source[:, top, left]) * (z - left)
            below = source[:, bottom, left] + (source[:, bottom, right] - source[:, bottom, left]) * (z - left)
            np.testing.assert_allclose(got[:, i, j], above + (below - above) * (y - top), atol=2e-3)


def test_tensorflow_bilinear_has_no_half_pixel_offset() -> None:
    # A ramp: at twice the size every other pixel is an input pixel, and the last one is repeated.
    ramp = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert TensorFlowBilinear(8)(ramp)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


def test_images_of_the_wanted_size_are_left_alone() -> None:
    x = image(16, 16)
    assert torch.equal(TensorFlowBilinear(16)(x), x)


@pytest.mark.parametrize(("n", "size"), [(32, 57), (64, 21)])
def test_antialiased_bicubic_is_pillows_kernel(n: int, size: int) -> None:
    x = image(n, n)
    expected = [
        np.asarray(Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BICUBIC)) for channel in x[0]
    ]
    np.testing.assert_allclose(AntialiasedBicubic(size)(x)[0].numpy(), np.stack(expected), atol=2e-3)


def test_rules_name_kernel_and_size() -> None:
    rules = [TensorFlowBilinear(299).rule, AntialiasedBicubic(224).rule]
    assert rules == ["tensorflow1-bilinear-299x299", "antialiased-bicubic-224x224"]
