import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import stablefield as sf
from stablefield.evaluation._extractor import Extractor, RandomConvolutions, RawPixels, full_precision
from stablefield.evaluation._torchscript import (
    AntialiasedBicubic,
    TensorFlowBilinear,
    TorchScriptExtractor,
    dinov2,
)


def images(n: int = 4, channels: int = 3, size: int = 16) -> Tensor:
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)
    )


class Pool(nn.Module):
    """Means of 4 x 4 patches, a stand-in for a network."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 4).flatten(1)


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[[nn.Module], Path]:
    def save(module: nn.Module) -> Path:
        path = tmp_path / f"{type(module).__name__}.pt"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
            torch.jit.save(torch.jit.script(module), str(path))
        return path

    return save


def test_raw_pixels_are_the_images_on_the_scale_of_the_models() -> None:
    x = images(channels=1, size=8)
    extract = RawPixels((1, 8, 8))
    torch.testing.assert_close(extract(x), (x.double() / 127.5 - 1).flatten(1).float(), rtol=0, atol=2e-7)
    assert (extract.dim, extract.name, extract.resize) == (64, "pixels", "none")
    assert extract.sha256 == hashlib.sha256(b"").hexdigest()


def test_raw_pixels_refuse_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"images have shape \(4, 3, 16, 16\), but these raw pixels take images"):
        RawPixels((3, 32, 32))(images())


def test_the_random_net_is_the_same_everywhere() -> None:
    first, second, other = RandomConvolutions(0), RandomConvolutions(0), RandomConvolutions(1)
    assert first.sha256 == second.sha256 == "bcf508b6286e646a197eaeb54bca777fa7b9231cc000b01f03fc25fb4e84ab52"
    assert other.sha256 != first.sha256
    got = first(images())
    assert got.shape == (4, first.dim)
    assert torch.equal(got, second(images()))
    torch.testing.assert_close(
        got[0, [0, 20, 60, 111]], torch.tensor([0.325019, 0.052609, -0.024128, 0.080122]), rtol=1e-4, atol=1e-5
    )


def test_the_random_net_is_three_convolutions_and_their_means() -> None:
    # Against float64 and explicit sums over the receptive field of one output pixel of the first layer.
    net, x = RandomConvolutions(0), images(size=8)
    weight = net._weights[0].double()
    padded = functional.pad(x.double() / 127.5 - 1, (1, 1, 1, 1))
    total = torch.zeros(4, 16, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            patch = padded[:, None, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            value = (patch * weight).sum(dim=(2, 3, 4))
            total += torch.where(value > 0, value, 0.2 * value)
    torch.testing.assert_close(net(x)[:, :16].double(), total / 16, rtol=1e-5, atol=1e-6)


def test_weights_of_the_random_net_keep_the_scale_of_rectified_layers() -> None:
    for weight in RandomConvolutions(3)._weights:
        fan_in = weight[0].numel()
        assert weight.double().var().item() == pytest.approx(2 / fan_in, rel=0.1)


@pytest.mark.parametrize("extract", [RandomConvolutions(), RawPixels((3, 16, 16))], ids=["net", "pixels"])
def test_features_belong_to_their_own_image_whatever_the_batch(extract: Extractor) -> None:
    x = images(9)
    whole = extract(x)
    torch.testing.assert_close(torch.cat([extract(part) for part in x.split(2)]), whole, rtol=1e-5, atol=1e-6)


def test_grey_images_are_colour_images_with_three_equal_channels() -> None:
    x = images(channels=1)
    net = RandomConvolutions()
    assert torch.equal(net(x), net(x.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.zeros(2, 3, 8, 8), "images have dtype torch.float32: pass uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"pass \(B, C, H, W\) with 1 or 3 channels .*permute"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"images have shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), r"images have shape \(2, 3, 0, 8\)"),
    ],
)
def test_everything_but_uint8_images_is_refused(bad: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RandomConvolutions()(bad)


def test_a_torchscript_file_gets_resized_and_normalised_images(scripted: Callable[[nn.Module], Path]) -> None:
    path, x = scripted(Pool()), images()
    extract = TorchScriptExtractor(
        path, name="pool", resize=TensorFlowBilinear(24), offset=(1.0, 2.0, 3.0), scale=(10.0, 20.0, 30.0)
    )
    normalised = (TensorFlowBilinear(24)(x.float()) - torch.tensor([1.0, 2.0, 3.0])[:, None, None]) / torch.tensor(
        [10.0, 20.0, 30.0]
    )[:, None, None]
    assert torch.equal(extract(x), Pool()(normalised))
    rule = "tensorflow1-bilinear-24x24, (x - (1, 2, 3)) / (10, 20, 30)"
    assert (extract.dim, extract.name, extract.resize) == (108, "pool", rule)
    kept = TorchScriptExtractor(path, name="pool", resize=None, offset=(0.0,) * 3, scale=(1.0,) * 3)
    assert torch.equal(kept(x), Pool()(x.float()))
    assert kept.resize == "none, (x - 0) / 1"
    assert extract.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_cached_features_of_another_normalisation_are_not_taken_for_these(
    scripted: Callable[[nn.Module], Path], tmp_path: Path
) -> None:
    """Features half as large have a quarter of the Frechet distance."""
    path = scripted(Pool())
    real, drawn = (part.numpy() for part in images(80).split(40))
    found = [
        sf.evaluate(
            drawn,
            data=real,
            metrics=["frechet"],
            extractor=TorchScriptExtractor(
                path, name="pool", resize=AntialiasedBicubic(16), offset=(0.0,) * 3, scale=(scale,) * 3
            ),
            cache=tmp_path / "cache",
            device="cpu",
        )
        for scale in (100.0, 200.0)
    ]
    first, second = (one.scores[0].mean for one in found)
    assert second == pytest.approx(first / 4, rel=1e-3)
    assert [one.scores[0].protocol.resize for one in found] == [
        f"antialiased-bicubic-16x16, (x - 0) / {scale}" for scale in (100, 200)
    ]


def test_dinov2_prepares_images_as_imagenet_networks_want_them(scripted: Callable[[nn.Module], Path]) -> None:
    x = images(2)
    resized = AntialiasedBicubic(224)(x.float() / 255)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = Pool()((resized - mean[:, None, None]) / deviation[:, None, None])
    extract = dinov2(scripted(Pool()))
    torch.testing.assert_close(extract(x), expected, rtol=1e-4, atol=1e-5)
    assert (extract.name, extract.resize, extract.dim) == ("DINOv2", "antialiased-bicubic-224x224", 3 * 56**2)


def test_files_that_are_no_feature_network_are_refused(tmp_path: Path, scripted: Callable[[nn.Module], Path]) -> None:
    def load(path: Path) -> TorchScriptExtractor:
        return TorchScriptExtractor(path, name="it", resize=None, offset=(0.0,) * 3, scale=(1.0,) * 3)

    with pytest.raises(ValueError, match=r"it: there is no file .*none\.pt"):
        load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(ValueError, match=r"text.pt is not a TorchScript file"):
        load(tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"does not map images .*returns shape \(1, 3, 64, 64\)"):
        load(scripted(nn.Identity()))
    with pytest.raises(ValueError, match="does not map images"):
        load(scripted(nn.Linear(5, 2)))


@pytest.fixture
def tensor_float_32() -> Iterator[None]:
    # monkeypatch cannot undo this attribute: it lives behind the class.
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "tf32"
    yield
    conv.fp32_precision = before


@pytest.mark.usefixtures("tensor_float_32")
def test_full_precision_restores_what_it_changes_also_after_an_error() -> None:
    inside: list[object] = []

    def fail() -> None:
        with full_precision(torch.device("cpu")):
            inside.extend([torch.backends.cudnn.conv.fp32_precision, torch.is_inference_mode_enabled()])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == ["ieee", True]
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
