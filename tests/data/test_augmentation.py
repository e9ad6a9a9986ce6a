import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from stablefield.data._affine import warp
from stablefield.data._augmentation import LABEL_WIDTH, Augmentation, AugmentationParameters, flip

FULL = Augmentation()
SIDE = 64  # large enough that the mirror images of `blobs` stay out of sight


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(rows: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return 2 * torch.rand(rows, 3, height, width, generator=generator(seed)) - 1


def row(
    flip_x: bool = False,
    flip_y: bool = False,
    scale: float = 0.0,
    angle: float = 0.0,
    anisotropy: float = 0.0,
    axis: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> AugmentationParameters:
    return AugmentationParameters(
        flips=torch.tensor([[flip_x, flip_y]]),
        scale=torch.tensor([scale]),
        angle=torch.tensor([angle]),
        anisotropy=torch.tensor([anisotropy]),
        axis=torch.tensor([axis]),
        shift=torch.tensor([shift]),
    )


Picture = Callable[[np.ndarray, np.ndarray], np.ndarray]


def blobs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A picture without symmetry, within 15 pixels of the centre: x to the right, y down, in pixels from the centre."""
    spots = [(-4.0, -3.0, 3.0, 1.0), (5.0, -1.0, 2.5, -0.8), (1.0, 5.0, 3.5, 0.6)]
    return sum(h * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * s**2)) for a, b, s, h in spots) * np.ones_like(x * y)


def sampled(picture: Picture, height: int = SIDE, width: int = SIDE) -> Tensor:
    y, x = np.mgrid[:height, :width].astype(float)
    return torch.from_numpy(picture(x - (width - 1) / 2, y - (height - 1) / 2))[None, None]


def rotated(picture: Picture, angle: float) -> Picture:
    # What is seen at (x, y) was, before a counterclockwise turn, at (x, y) turned clockwise; y points down.
    c, s = math.cos(angle), math.sin(angle)
    return lambda x, y: picture(c * x - s * y, s * x + c * y)


def stretched(picture: Picture, x_factor: float, y_factor: float) -> Picture:
    return lambda x, y: picture(x / x_factor, y / y_factor)


def shifted(picture: Picture, right: float, down: float) -> Picture:
    return lambda x, y: picture(x - right, y - down)


# Flips.


@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
def test_rows_that_are_only_flipped_move_pixels_bit_for_bit(flip_x, flip_y):
    images = noise_images(1, 7, 10)
    expected = images.numpy()[..., :: -1 if flip_y else 1, :: -1 if flip_x else 1]
    parameters = row(flip_x, flip_y)
    assert not parameters.own.any()
    actual = FULL.apply(images, parameters)
    assert np.array_equal(actual.numpy(), expected)
    assert actual.data_ptr() != images.data_ptr()
    assert torch.equal(flip(actual, parameters.flips), images)


def test_rows_of_a_batch_do_not_touch_each_other():
    images, parameters = noise_images(64), Augmentation(probability=0.3).draw(64, generator())
    before = images.clone()
    together = FULL.apply(images, parameters)
    assert torch.equal(images, before)
    assert 10 < parameters.own.sum() < 54
    for i in range(64):
        source_only = FULL.apply(images[i : i + 1], parameters[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], source_only, rtol=0, atol=2e-5)
        if not parameters.own[i]:
            assert torch.equal(together[i : i + 1], flip(images[i : i + 1], parameters.flips[i : i + 1]))


# Resampling.


def test_identity_map_gives_the_image_also_through_the_resampler():
    images = noise_images(2, 9, 12)
    transform = FULL.transform(row(), 9, 12).expand(2, 2, 3)
    assert torch.equal(transform[0], torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    torch.testing.assert_close(warp(images, transform), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -5), (-7, 2), (20, 31), (40, 0)])
def test_shift_by_whole_pixels_moves_the_mirrored_image_without_changing_it(right, down):
    images = noise_images(2, 32, 24)
    mirrored = np.pad(images.numpy(), ((0, 0), (0, 0), (64, 64), (64, 64)), mode="reflect")
    expected = mirrored[:, :, 64 - down : 96 - down, 64 - right : 88 - right]
    transform = torch.tensor([[1.0, 0, right], [0, 1, down]]).expand(2, 2, 3)
    actual = warp(images, transform)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    rolled = images.roll((down, right), (-2, -1))
    inside = np.s_[..., max(down, 0) : 32 + min(down, 0), max(right, 0) : 24 + min(right, 0)]
    torch.testing.assert_close(actual[inside], rolled[inside], rtol=0, atol=2e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_of_a_square_move_pixels_without_changing_them(quarters):
    images = noise_images(1)
    actual = FULL.apply(images, row(angle=quarters * math.pi / 2))
    torch.testing.assert_close(actual, images.rot90(quarters, (-2, -1)), rtol=0, atol=2e-5)


TRANSFORMED = [
    ({"scale": 1.5}, stretched(blobs, 2**0.3, 2**0.3)),
    ({"scale": -2.0}, stretched(blobs, 2**-0.4, 2**-0.4)),
    ({"angle": 0.7}, rotated(blobs, 0.7)),
    ({"angle": -2.5}, rotated(blobs, -2.5)),
    ({"anisotropy": 1.5}, stretched(blobs, 2**0.3, 2**-0.3)),
    ({"anisotropy": 1.5, "axis": 0.6}, rotated(stretched(rotated(blobs, -0.6), 2**0.3, 2**-0.3), 0.6)),
    ({"shift": (0.73, -0.41)}, shifted(blobs, 0.73 * 0.125 * SIDE, -0.41 * 0.125 * SIDE)),
]


@pytest.mark.parametrize(("drawn", "expected"), TRANSFORMED, ids=[str(drawn) for drawn, _ in TRANSFORMED])
def test_each_transformation_of_a_smooth_picture_is_the_picture_of_transformed_coordinates(drawn, expected):
    parameters = row(**drawn)
    assert parameters.own.all()
    actual = FULL.apply(sampled(blobs), parameters)
    difference = (actual - sampled(expected)).abs().max()
    assert difference < 5e-4
    # The bound tells the transformation from none.
    assert (actual - sampled(blobs)).abs().max() > 0.2


def test_transformations_are_composed_in_the_documented_order():
    parameters = row(True, False, 0.9, 1.1, -1.2, 0.5, (0.6, -0.9))
    picture: Picture = lambda x, y: blobs(-x, y)  # noqa: E731
    picture = rotated(stretched(picture, 2**0.18, 2**0.18), 1.1)
    picture = rotated(stretched(rotated(picture, -0.5), 2**-0.24, 2**0.24), 0.5)
    picture = shifted(picture, 0.6 * 0.125 * 72, -0.9 * 0.125 * SIDE)
    actual = FULL.apply(sampled(blobs, SIDE, 72), parameters)
    assert (actual - sampled(picture, SIDE, 72)).abs().max() < 5e-4


def test_polynomials_of_second_degree_in_each_axis_are_transformed_exactly_inside():
    def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 0.3 - 0.02 * x + 1e-3 * x * y - 2e-3 * y**2 + 1e-5 * x**2 * y**2

    def moved(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        source = np.linalg.inv(matrix) @ np.stack([x.ravel() - 1.3, y.ravel() + 0.7])
        return polynomial(*source).reshape(x.shape)

    matrix = np.array([[1.05, 0.3], [-0.25, 0.9]])
    transform = torch.from_numpy(np.column_stack([matrix, [1.3, -0.7]]))[None]
    error = (warp(sampled(polynomial), transform) - sampled(moved))[..., 24:-24, 24:-24]
    assert error.abs().max() < 1e-12


def test_scaling_up_agrees_with_scipy_up_to_the_mirrored_border():
    image = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((24, 30)), 2.5, mode="mirror")
    image = image / np.abs(image).max()
    matrix = np.array([[1.1, 0.2], [-0.15, 0.9]])  # content, in (x, y)
    shift = np.array([2.3, -1.7])
    inverse = np.linalg.inv(matrix)[::-1, ::-1]  # in (row, column)
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - inverse @ (centre + shift[::-1])
    expected = ndimage.affine_transform(image, inverse, offset, order=5, mode="mirror")
    transform = torch.from_numpy(np.column_stack([matrix, shift]))[None]
    actual = warp(torch.from_numpy(image)[None, None], transform)[0, 0]
    assert np.abs(actual.numpy() - expected).max() < 1e-3


def test_shrinking_removes_what_would_fold_into_the_image():
    # 0.45 cycles per pixel shrunk to 0.6 of its size is 0.75 cycles per pixel, which folds to 0.25.
    x = np.arange(64.0)
    image = torch.from_numpy(np.cos(2 * np.pi * 0.45 * x) * np.ones((64, 1)))[None, None]
    transform = torch.tensor([[[0.6, 0, 0], [0, 0.6, 0]]], dtype=torch.float64)
    folded = np.cos(2 * np.pi * 0.75 * x)
    assert folded.std() > 0.7
    assert warp(image, transform)[0, 0, 16:48, 16:48].std() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_images_is_kept(dtype):
    images, parameters = noise_images(1), row(True, scale=1.0, angle=0.3)
    actual = FULL.apply(images.to(dtype), parameters)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), FULL.apply(images, parameters), rtol=0, atol=2e-2)


# What is drawn.


def test_each_transformation_is_drawn_with_its_probability():
    n, p = 40_000, 0.12
    drawn = FULL.draw(n, generator())
    shares = {
        "flip x": (drawn.flips[:, 0], 0.5),
        "flip y": (drawn.flips[:, 1], p / 2),
        "scale": (drawn.scale != 0, p),
        "rotation": (drawn.angle != 0, p),
        "anisotropy": (drawn.anisotropy != 0, p),
        "turned axis": (drawn.axis != 0, p / 2),
        "shift right": (drawn.shift[:, 0] != 0, p),
        "shift down": (drawn.shift[:, 1] != 0, p),
        "own": (drawn.own, 1 - (1 - p) ** 4),
        "scale and rotation": ((drawn.scale != 0) & (drawn.angle != 0), p**2),
        "both flips": (drawn.flips.all(-1), p / 4),
    }
    for name, (chosen, expected) in shares.items():
        assert abs(chosen.float().mean() - expected) < 4 * (expected * (1 - expected) / n) ** 0.5, name
    # Right and down are shifted together; an axis belongs to a stretch.
    assert torch.equal(drawn.shift[:, 0] != 0, drawn.shift[:, 1] != 0)
    assert not ((drawn.axis != 0) & (drawn.anisotropy == 0)).any()


def test_strengths_are_normal_and_angles_uniform():
    drawn = Augmentation(probability=1.0, axis_probability=1.0).draw(20_000, generator())
    for w in (drawn.scale, drawn.anisotropy, drawn.shift[:, 0], drawn.shift[:, 1]):
        share = torch.tensor([(w < edge).float().mean() for edge in (-2.0, -1.0, 0.0, 1.0, 2.0)])
        expected = torch.distributions.Normal(0, 1).cdf(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]))
        torch.testing.assert_close(share, expected, rtol=0, atol=0.015)
    for angle in (drawn.angle, drawn.axis):
        assert angle.abs().max() <= math.pi
        counts = torch.histc(angle, 8, -math.pi, math.pi)
        assert (counts - 2500).abs().max() < 5 * 47
    columns = torch.stack([drawn.scale, drawn.angle, drawn.anisotropy, drawn.axis, *drawn.shift.unbind(-1)])
    assert (torch.corrcoef(columns) - torch.eye(6)).abs().max() < 0.03


def test_probability_zero_still_flips_every_other_image_horizontally_and_does_nothing_else():
    drawn = Augmentation(probability=0.0).draw(10_000, generator())
    assert abs(drawn.flips[:, 0].float().mean() - 0.5) < 0.02
    assert not drawn.flips[:, 1].any()
    assert not drawn.own.any()
    assert not drawn.labels[:, 1:].any()
    assert torch.equal(drawn.labels[:, 0], drawn.flips[:, 0].float())


def test_labels_are_the_nine_published_numbers():
    parameters = row(True, False, 0.9, 1.1, -1.2, 0.5, (0.6, -0.7))
    expected = [1, 0, 0.9, math.cos(1.1) - 1, math.sin(1.1), -1.2 * math.cos(0.5), -1.2 * math.sin(0.5), 0.6, -0.7]
    assert parameters.labels.shape == (1, LABEL_WIDTH)
    assert parameters.labels.dtype == torch.float32
    torch.testing.assert_close(parameters.labels[0], torch.tensor(expected))
    assert torch.equal(row(flip_y=True).labels, torch.eye(9)[1:2])


def test_rows_are_a_function_of_the_generator_and_their_place():
    many, few, other = FULL.draw(300, generator(1)), FULL.draw(7, generator(1)), FULL.draw(300, generator(2))
    assert torch.equal(many[:7].labels, few.labels)
    assert torch.equal(many[torch.arange(7)].labels, few.labels)
    assert len(many[100:]) == 200
    assert not torch.equal(many.labels, other.labels)


def test_settings_change_only_what_they_name():
    settings = {"flip_x": False, "scale": 0.0, "shift": 0.0}
    drawn, full = Augmentation(probability=0.5, **settings).draw(500, generator()), Augmentation(probability=0.5)
    full = full.draw(500, generator())
    assert not drawn.flips[:, 0].any()
    assert not drawn.scale.any()
    assert not drawn.shift.any()
    assert torch.equal(drawn.flips[:, 1], full.flips[:, 1])
    assert torch.equal(drawn.angle, full.angle)
    assert torch.equal(drawn.anisotropy, full.anisotropy)
    assert drawn.own.sum() < full.own.sum()


def test_an_empty_batch_is_drawn_and_applied():
    assert FULL.apply(torch.zeros(0, 3, 8, 8), FULL.draw(0, generator())).shape == (0, 3, 8, 8)


# Wrong use.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": 1.5}, "probability is 1.5"),
        ({"axis_probability": -0.1}, "axis_probability is -0.1"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"shift": math.nan}, "shift is nan"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"torch.uint8.*x / 127.5 - 1"),
        (torch.zeros(3, 8, 8), r"images has shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), "parameters has 1 rows for 2 images"),
        (torch.zeros(1, 3, 8, 3), "at least 4x4"),
    ],
)
def test_images_that_cannot_be_transformed_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        FULL.apply(images, row(scale=1.0))


def test_flips_that_are_not_one_pair_of_booleans_per_image_are_refused():
    for flips in (torch.zeros(3, 2), torch.zeros(2, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="flips has shape"):
            flip(torch.zeros(3, 1, 4, 4), flips)


def test_a_negative_batch_is_refused():
    with pytest.raises(ValueError, match="batch is -1"):
        FULL.draw(-1, generator())


def test_a_map_per_image_is_asked_for():
    with pytest.raises(ValueError, match=r"transform has shape \(2, 3\)"):
        warp(torch.zeros(1, 1, 8, 8), torch.eye(2, 3))
