"""`stablefield import`: from a published file to a run that the other verbs open."""

from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from PIL import Image

import stablefield as sf
from commands import status
from stablefield.networks import SongUNet
from stablefield.training._model import open_model


def published(path: Path, make=SongUNet.ncsnpp, class_name: str = "EDMPrecond", **options) -> SongUNet:
    network = make(16, 1, 8, (1, 2), 1, generator=torch.Generator().manual_seed(0), **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    path.write_bytes(foreign.edm_file(network, class_name))
    return network


def test_imported_network_is_described_and_sampled_from_like_a_run(tmp_path: Path, capsys) -> None:
    network = published(tmp_path / "net.pkl", augment_dim=9)
    assert status("import", tmp_path / "net.pkl", "--out", tmp_path / "run") == 0
    told = " ".join(capsys.readouterr().out.split())
    count = sum(parameter.numel() for parameter in network.parameters())
    for words in ("architecture NCSN++", "images 1 x 16 x 16", "augmentation labels 9 wide", f"parameters {count:,}"):
        assert words in told
    assert "preconditioning EDMPreconditioning(sigma_data=0.5)" in told
    assert status("sample", tmp_path / "run", "--seeds", "0-1", "--steps", 5, "--out", tmp_path / "images") == 0
    noise = sf.sampling.SampleNoise([0, 1]).latents((1, 16, 16), dtype=torch.float64)
    expected = sf.sampling.heun(sf.Denoiser(network), 80 * noise, sf.sampling.edm_sigmas(5))
    for k in range(2):
        with Image.open(tmp_path / "images" / f"00000{k}.png") as picture:
            pixels = np.asarray(picture).astype(float)
        ours = ((expected[k, 0] + 1) * 127.5).clamp(0, 255).round().numpy()
        assert np.abs(pixels - ours).max() <= 1


@pytest.mark.parametrize("make", [SongUNet.ddpmpp, SongUNet.ncsnpp])
@pytest.mark.parametrize(
    ("class_name", "preconditioning"),
    [
        ("EDMPrecond", sf.EDMPreconditioning()),
        ("VPPrecond", sf.VPPreconditioning()),
        ("VEPrecond", sf.VEPreconditioning()),
    ],
)
def test_run_of_an_import_opens_with_the_same_outputs(make, class_name, preconditioning, tmp_path: Path) -> None:
    network = published(tmp_path / "net.pkl", make, class_name, classes=3)
    assert status("import", tmp_path / "net.pkl", "--out", tmp_path / "run") == 0
    for ema in ("half-life", "none"):
        model = open_model(tmp_path / "run", ema)
        assert (model.step, model.config.classes, model.config.shape) == (0, 3, (1, 16, 16))
        x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = sf.Denoiser(network, preconditioning)(x, 3.0, torch.tensor([1, -1]))
            torch.testing.assert_close(model.denoiser(x, 3.0, torch.tensor([1, -1])), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["os.system by REDUCE", "zip file", "nested pickle in a storage"])
def test_hostile_file_is_one_paragraph_status_2_and_no_folder(name, tmp_path: Path, capsys) -> None:
    (tmp_path / "net.pkl").write_bytes(foreign.hostile(str(tmp_path / "canary"))[name])
    assert status("import", tmp_path / "net.pkl", "--out", tmp_path / "run") == 2
    told = capsys.readouterr()
    assert "net.pkl is refused: it refers to os.system" in told.err
    assert "\n" not in told.err.strip()
    assert told.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["net.pkl"]


def test_network_that_no_recipe_describes_is_refused_before_a_folder_is_made(tmp_path: Path, capsys) -> None:
    published(tmp_path / "net.pkl", attention=(8,))
    assert status("import", tmp_path / "net.pkl", "--out", tmp_path / "run") == 2
    assert "attention at" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folder_in_use_is_never_written_to(tmp_path: Path, capsys) -> None:
    published(tmp_path / "net.pkl")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert status("import", tmp_path / "net.pkl", "--out", tmp_path / "run") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
