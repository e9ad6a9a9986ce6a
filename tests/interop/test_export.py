"""Exports: loaded where this library is not, they give its samples."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import stablefield as sf
from commands import status
from stablefield.data._autoencoder import Autoencoder
from stablefield.data._digits import open_digits
from stablefield.data._scaling import Scaling
from stablefield.evaluation._protocol import Protocol, Score
from stablefield.interop import _source_bundle as source_bundle
from stablefield.interop._model_card import ModelCard
from stablefield.interop._pipeline_folder import write_pipeline
from stablefield.interop._published import read_published
from stablefield.networks import MLP, SiT, SongUNet
from stablefield.networks._diffusers_unet import DiffusersUNet
from stablefield.training._recipe import Recipe

LABELS = torch.tensor([0, 7, -1, 3])
# A process in which this library cannot be imported.
ALONE = "import sys; sys.modules['stablefield'] = None\n"


def python(code: str, folder: Path, **environment: str) -> str:
    """Run code in a process of its own, with what it caches under `folder`; return what it prints."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "PYTHONPATH"))
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**inherited, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trained(preconditioning, weighting, classes: int) -> sf.Denoiser:
    """A perceptron trained for a moment on the digits, so that its samples are images."""
    g = torch.Generator().manual_seed(0)
    data = open_digits()
    denoiser = sf.Denoiser(MLP((1, 8, 8), 64, 1, classes=classes, generator=g), preconditioning)
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    objective = sf.Objective(sf.EDM(), target=sf.DenoisingTarget(sf.EDM()), weighting=weighting, label_dropout=0.1)
    for _ in range(120):
        index = torch.randint(len(data), (128,), generator=g)
        x0 = torch.from_numpy(data.images[index.numpy()]).float() / 127.5 - 1
        labels = torch.from_numpy(data.labels)[index] if classes else None
        optimizer.zero_grad()
        objective(denoiser, x0, labels, generator=g).loss.backward()
        optimizer.step()
    return denoiser.eval()


def unet(make, **options) -> sf.Denoiser:
    denoiser = sf.Denoiser(make(16, 3, 8, (1, 2), 1, generator=torch.Generator().manual_seed(0), **options))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return denoiser.eval()


def transformer(preconditioning, **options) -> sf.Denoiser:
    network = SiT((8, 12), 2, 3, 16, 1, 2, generator=torch.Generator().manual_seed(0), **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return sf.Denoiser(network, preconditioning).eval()


def write_latents(folder: Path, sigmas: torch.Tensor) -> None:
    """A pipeline of latents with their autoencoder, and the images of ours for given noise."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, mid_block_add_attention=False, **blocks)
    denoiser = sf.Denoiser(MLP((4, 4, 6), 16, 1, classes=2, generator=torch.Generator().manual_seed(0))).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    scaling = Scaling(mean=(0.1, -2.0, 3.0, 0.0), std=(1.0, 0.5, 2.0, 4.0), dtype="float32")
    options = {"class_names": ("a", "b"), "scaling": scaling, "autoencoder": Autoencoder(model, device="cpu")}
    write_pipeline(folder / "latents", denoiser, (4, 4, 6), **options)
    z = torch.randn(4, 4, 4, 6, dtype=torch.float64)
    x = sf.sampling.heun(lambda x, s: denoiser(x, s, torch.tensor([1, 0, 1, 0])), 80 * z, sigmas)
    latents = scaling.undo(x)
    with torch.no_grad():
        images = model.decode(latents).sample
    torch.save({"z": z, "latents": latents, "images": images}, folder / "latents.pt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pipelines, the samples of ours for given latents, and those of a process with diffusers alone."""
    folder = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    denoisers = {
        "edm": (trained(sf.EDMPreconditioning(0.6), sf.EDMWeighting(0.6), 0), (1, 8, 8), None),
        "vp": (trained(sf.VPPreconditioning(), sf.SNRWeighting(), 0), (1, 8, 8), None),
        "ve": (trained(sf.VEPreconditioning(), sf.SNRWeighting(), 10), (1, 8, 8), LABELS),
        "ddpmpp": (unet(SongUNet.ddpmpp, classes=8, augment_dim=9), (3, 16, 16), LABELS),
        "ncsnpp": (unet(SongUNet.ncsnpp), (3, 16, 16), None),
        "sit": (transformer(sf.FlowPreconditioning(), classes=8), (3, 8, 12), LABELS),
        "dit": (transformer(sf.DDPMPreconditioning(), learn_sigma=True), (3, 8, 12), None),
        "diffusers": (sf.Denoiser(DiffusersUNet.sized(8, 1, (8, 8), 1, classes=8, groups=4)).eval(), (1, 8, 8), LABELS),
    }
    sigmas = sf.sampling.edm_sigmas(18)
    for name, (denoiser, shape, labels) in denoisers.items():
        write_pipeline(folder / name, denoiser, shape)
        z = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def told(x, s, denoiser=denoiser, labels=labels):
            return denoiser(x, s, labels)

        guided = {}
        if name in ("ve", "diffusers"):
            for solver in (sf.sampling.heun, sf.sampling.euler):
                extrapolated = sf.sampling.classifier_free(denoiser, labels, 2.5, (0.1, 5.0))
                guided[f"guided {solver.__name__}"] = solver(extrapolated, 80 * z, sigmas)
        torch.save(
            {"z": z, "labels": labels}
            | guided
            | {solver.__name__: solver(told, 80 * z, sigmas) for solver in (sf.sampling.heun, sf.sampling.euler)},
            folder / f"{name}.pt",
        )
    write_latents(folder, sigmas)
    python(
        ALONE
        + """
        import torch
        from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler

        try:
            DiffusionPipeline.from_pretrained("edm")
        except ValueError as error:
            distrusting = str(error)
        for name in ("edm", "vp", "ve", "ddpmpp", "ncsnpp", "sit", "dit", "diffusers"):
            ours = torch.load(name + ".pt")
            pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
            pipe.set_progress_bar_config(disable=True)
            options = dict(latents=ours["z"], class_labels=ours["labels"])
            found = {"heun": pipe(output_type="pt", **options).images}
            found["euler"] = pipe(output_type="pt", solver="scheduler", **options).images
            if name in ("ve", "diffusers"):
                options |= dict(guidance_scale=2.5, guidance_interval=(0.1, 5.0))
                found["guided heun"] = pipe(output_type="pt", **options).images
                found["guided euler"] = pipe(output_type="pt", solver="scheduler", **options).images
                options = dict(latents=ours["z"], class_labels=ours["labels"])
            found |= {"training": pipe.unet.training, "distrusting": distrusting}
            if name not in ("edm", "ddpmpp"):
                torch.save(found, name + "-alone.pt")
                continue
            found["np"] = pipe(output_type="np", **options).images
            for image, place in zip(pipe(**options).images, range(4)):
                image.save(f"{name}-{place}.png")
            generators = [torch.Generator().manual_seed(k) for k in (3, 4)]
            found["seeded"] = pipe(generator=generators, num_inference_steps=4, output_type="pt").images
            generators = [torch.Generator().manual_seed(k) for k in (4,)]
            found["again"] = pipe(generator=generators, num_inference_steps=4, output_type="pt").images
            pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
            found["dpm"] = pipe(output_type="pt", solver="scheduler", num_inference_steps=40, **options).images
            torch.save(found, name + "-alone.pt")

        z = torch.load("latents.pt")["z"]
        pipe = DiffusionPipeline.from_pretrained("latents", trust_remote_code=True)
        options = dict(latents=z, class_labels=["b", "a", "b", "a"])
        found = {kind: pipe(output_type=kind, **options).images for kind in ("pt", "np", "latent")}
        found["pil"] = [image.size for image in pipe(num_inference_steps=2, **options).images]
        torch.save(found, "latents-alone.pt")
        """.replace("\n        ", "\n"),
        folder,
    )
    return folder


NAMES = pytest.mark.parametrize("name", ["edm", "vp", "ve", "ddpmpp", "ncsnpp", "sit", "dit", "diffusers"])


def both(folder: Path, name: str) -> tuple[dict, dict]:
    return torch.load(folder / f"{name}.pt"), torch.load(folder / f"{name}-alone.pt", weights_only=False)


@pytest.mark.parametrize("solver", ["guided heun", "guided euler"])
@pytest.mark.parametrize("name", ["ve", "diffusers"])
def test_guidance_of_the_pipeline_is_ours_in_its_interval_to_1e_4(exported: Path, name: str, solver: str) -> None:
    ours, found = both(exported, name)
    torch.testing.assert_close(found[solver].double(), ours[solver], rtol=1e-4, atol=1e-4)
    assert (ours[solver] - ours[solver.removeprefix("guided ")]).abs().max() > 1e-2


@NAMES
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_process_with_diffusers_alone_draws_our_samples_to_1e_4(exported: Path, name: str, solver: str) -> None:
    ours, source_only = both(exported, name)
    assert ours[solver].std() > 0.1
    assert name in ("vp", "ve", "dit") or ours[solver].abs().max() < 4
    assert not source_only["training"]
    error = (source_only[solver].double() - ours[solver]).abs().max()
    # These predict noise, which a moment of training, or none, does not make precise enough for images in [-1, 1]: theirs
    # is a share of numbers that reach 160.
    assert error < (1e-5 * ours[solver].abs().max() if name in ("vp", "ve", "dit") else 1e-4)


@pytest.mark.parametrize("name", ["edm", "ddpmpp"])
def test_pictures_of_the_pipeline_are_those_of_its_numbers(exported: Path, name: str) -> None:
    ours, source_only = both(exported, name)
    expected = ((ours["heun"].float() + 1) * 127.5).round().clamp(0, 255).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(source_only["np"] * 255, expected, atol=0.51)
    for place in range(4):
        with Image.open(exported / f"{name}-{place}.png") as picture:
            pixels = np.asarray(picture).astype(int).reshape(expected.shape[1:])
        assert np.abs(pixels - expected[place]).max() <= 1


@pytest.mark.parametrize("name", ["edm", "ddpmpp"])
def test_image_of_a_generator_does_not_depend_on_its_batch(exported: Path, name: str) -> None:
    _, source_only = both(exported, name)
    torch.testing.assert_close(source_only["seeded"][1:], source_only["again"], rtol=0, atol=1e-4)


def test_a_pipeline_of_latents_holds_its_autoencoder_and_decodes_with_diffusers_alone(exported: Path) -> None:
    ours, found = both(exported, "latents")
    assert ours["images"].std() > 0.1
    torch.testing.assert_close(found["latent"], ours["latents"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["pt"], ours["images"], rtol=1e-3, atol=1e-3)
    expected = (ours["images"].permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).numpy()
    np.testing.assert_allclose(found["np"], expected, atol=1e-3)
    assert found["pil"] == [(12, 8)] * 4
    files = {str(path.relative_to(exported / "latents")) for path in (exported / "latents").rglob("*.*")}
    assert files >= {"vae/config.json", "vae/diffusion_pytorch_model.safetensors", "model_index.json", "pipeline.py"}
    assert "_name_or_path" not in json.loads((exported / "latents" / "vae" / "config.json").read_text())


def test_another_edm_scheduler_of_diffusers_takes_the_place_of_the_first(exported: Path) -> None:
    ours, source_only = both(exported, "edm")
    # Another solver of the same equation, at 40 steps: between them lies what is left of both errors.
    assert (source_only["dpm"].double() - ours["heun"]).abs().mean() < 0.05


def test_pipeline_is_not_loaded_before_its_code_is_trusted(exported: Path) -> None:
    _, source_only = both(exported, "edm")
    assert "trust_remote_code=True" in source_only["distrusting"]


def test_code_of_an_export_is_ours_without_its_imports_of_itself(exported: Path) -> None:
    code = (exported / "ncsnpp" / "unet" / "network.py").read_text()
    assert "from stablefield" not in code
    assert "class SongUNet(nn.Module)" in code
    assert "Apache-2.0" in code
    assert "stablefield" not in (exported / "ncsnpp" / "pipeline.py").read_text().replace("StablefieldPipeline", "")


def test_bundle_refuses_what_would_not_stand_alone() -> None:
    from stablefield.networks import _levels as levels
    from stablefield.networks import _resample as resample

    with pytest.raises(ValueError, match=r"imports stablefield\.networks\._blocks, which is not among"):
        source_bundle.bundle([levels], "A part.")
    with pytest.raises(ValueError, match=r"is defined in stablefield\.networks\._resample and in"):
        source_bundle.bundle([resample, resample], "Twice.", package="elsewhere")


def test_network_that_an_export_cannot_carry_is_refused(tmp_path: Path) -> None:
    vp = sf.Denoiser(DiffusersUNet.sized(8, 1, (8, 8), 1, groups=4), sf.VPPreconditioning())
    for denoiser, message in (
        (vp, "UNet2DModel .* cannot be exported"),
        (sf.Denoiser(torch.nn.Identity()), "an Identity|a Identity"),
    ):
        with pytest.raises(ValueError, match=message):
            write_pipeline(tmp_path / "out", denoiser, (1, 8, 8))
        assert not (tmp_path / "out").exists()


def test_unet_of_diffusers_is_exported_as_itself(exported: Path) -> None:
    assert json.loads((exported / "diffusers" / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    assert {path.name for path in (exported / "diffusers" / "unet").iterdir()} == {
        *("config.json", "diffusion_pytorch_model.safetensors")
    }


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    flags = ["--steps", 3, "--network.width", 16, "--network.depth", 1, "--sample-every", 0, "--conditional"]
    assert status("train", "digits", *flags, "--out", path) == 0
    return path


def test_export_writes_a_pipeline_with_samples_and_a_card(run: Path, tmp_path: Path, capsys) -> None:
    protocol = Protocol(
        metric="FID",
        extractor="pixels",
        extractor_sha256="0" * 64,
        resize="none",
        sample_count=500,
        reference="digits",
        reference_sha256="1" * 64,
        reference_count=1797,
        split="train",
        seeds=("0-499", "500-999"),
        sampler="heun",
        steps=18,
        nfe=35,
        ema="half-life",
    )
    (run / "evaluations").mkdir(exist_ok=True)
    record = {"format": 1, "subject": "x", "results": [Score(values=(1.25, 1.5), protocol=protocol).to_dict()]}
    (run / "evaluations" / "pixels.json").write_text(json.dumps(record))
    out = tmp_path / "pipe"
    assert status("export", run, "--out", out, "--samples", 20, "--steps", 2) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("model_index.json", "pipeline.py", "README.md", "samples.png", "scheduler", "unet")
    }
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "| FID | 1.25 | 1.375 | 0.25 | 2 | 500 | digits (train, 1,797) | pixels, none |" in card
    assert "3 of 128 images" in card
    assert "conditioned on one of 10 classes" in card
    with Image.open(out / "samples.png") as picture:
        assert picture.size[0] > 100
    assert status("export", run, "--out", out) == 2
    assert "is not empty" in capsys.readouterr().err


def test_exports_carry_the_names_of_the_classes(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    from stablefield.interop._plain_export import write_plain

    torch.manual_seed(0)
    denoiser = sf.Denoiser(DiffusersUNet.sized(8, 1, (8, 8), 1, classes=3, groups=4)).eval()
    write_plain(tmp_path / "plain", unet(SongUNet.ddpmpp, classes=3), (3, 16, 16), class_names=("ant", "bee", "0"))
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["class_names"] == ["ant", "bee", "0"]
    write_pipeline(tmp_path / "pipe", denoiser, (1, 8, 8), class_names=("ant", "bee", "0"))
    for step in ("pipe", "again"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / step, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.labels == {"ant": 0, "bee": 1, "0": 2}
        (tmp_path / "again").mkdir(exist_ok=True)
        pipe.save_pretrained(tmp_path / "again")
        # diffusers leaves the code of a pipeline where it was.
        (tmp_path / "again" / "pipeline.py").write_text((tmp_path / "pipe" / "pipeline.py").read_text())
        index = json.loads((tmp_path / "again" / "model_index.json").read_text())
        assert index["id2label"] == {"0": "ant", "1": "bee", "2": "0"}
        index["_class_name"] = ["pipeline", "StablefieldPipeline"]
        (tmp_path / "again" / "model_index.json").write_text(json.dumps(index))
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"latents": latents, "num_inference_steps": 2, "output_type": "pt"}
    named = pipe(class_labels=["bee", "0", -1], **options).images
    torch.testing.assert_close(named, pipe(class_labels=[1, 2, -1], **options).images, rtol=0, atol=0)
    torch.testing.assert_close(
        pipe(class_labels="bee", **options).images, pipe(class_labels=[1] * 3, **options).images, rtol=0, atol=0
    )
    assert len(pipe(class_labels=["bee", "0"], num_inference_steps=2).images) == 2
    with pytest.raises(ValueError, match=r"'beee': pass classes among ant, bee, 0\. Did you mean bee\?"):
        pipe(class_labels=["beee"])
    with pytest.raises(ValueError, match="holds 2 classes for 3 images"):
        pipe(class_labels=["bee", 0], **options)
    with pytest.raises(ValueError, match="generator holds 2 generators for 3 images: pass one per image"):
        pipe(batch_size=3, generator=[torch.Generator(), torch.Generator()])
    write_pipeline(tmp_path / "without", sf.Denoiser(MLP((1, 8, 8), 8, 1)).eval(), (1, 8, 8))
    without = DiffusionPipeline.from_pretrained(tmp_path / "without", trust_remote_code=True)
    with pytest.raises(ValueError, match="class_labels is 3, and this model has no classes: leave it out"):
        without(class_labels=3)
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0: guidance takes a network with classes"):
        pipe(guidance_scale=2.0, **options)


@pytest.mark.parametrize(
    ("kind", "make", "shape", "heads"),
    [
        (SongUNet, lambda: unet(SongUNet.ncsnpp, classes=3), (3, 16, 16), None),
        (SiT, lambda: transformer(sf.FlowPreconditioning(), classes=3), (3, 8, 12), 2),
        (SiT, lambda: transformer(sf.DDPMPreconditioning(), classes=3, learn_sigma=True), (3, 8, 12), 2),
    ],
)
def test_plain_export_is_safetensors_and_json_that_import_reads_back(kind, make, shape, heads, tmp_path: Path) -> None:
    from stablefield.interop._plain_export import write_plain

    denoiser = make()
    write_plain(tmp_path / "plain", denoiser, shape)
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"model.safetensors", "config.json"}
    record = json.loads((tmp_path / "plain" / "config.json").read_text())
    again = kind(**record["network"]["options"])
    again.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    found = read_published(tmp_path / "plain" / "model.safetensors", record["preconditioning"]["kind"], heads)
    with torch.no_grad():
        expected = denoiser(x, 2.0, torch.tensor([0, 2]))
        for other in (sf.Denoiser(again.eval(), denoiser.preconditioning), found.denoiser()):
            assert torch.equal(other(x, 2.0, torch.tensor([0, 2])), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--out", "x"], "nowhere is not a run"),
        (["{run}", "--out", "{file}/x"], "cannot be written"),
        (["{run}", "--out", "x", "--samples", "-1"], "--samples -1"),
        (["{run}", "--out", "x", "--ema", "0.1"], "--ema 0.1"),
        (["{run}", "--out", "x", "--push", "name"], "--push name is not the name of a repository"),
    ],
)
def test_wrong_use_of_export_is_told_and_writes_nothing(
    arguments, words, run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    places = {"run": run, "file": tmp_path / "file"}
    monkeypatch.chdir(tmp_path)
    assert status("export", *(argument.format(**places) for argument in arguments)) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_the_functions_take_a_place_as_a_string_or_a_path(tmp_path: Path) -> None:
    interop, denoiser = sf.interop, sf.Denoiser(MLP((1, 8, 8), 8, 1)).eval()
    plain, weights = str(tmp_path / "plain"), str(tmp_path / "plain" / "model.safetensors")
    interop.write_pipeline(str(tmp_path / "pipe"), denoiser, (1, 8, 8))
    assert (tmp_path / "pipe" / "model_index.json").exists()
    interop.write_plain(plain, transformer(sf.FlowPreconditioning()), (3, 8, 12))
    for kind in (str, Path):
        assert isinstance(interop.read_weight_file(kind(weights)), dict)
        read = interop.read_published(kind(weights))
        interop.write_imported_run(kind(tmp_path / kind.__name__), read, kind(weights))
        assert sf.Run(tmp_path / kind.__name__).config.data == "imported from model.safetensors"


def test_what_the_config_of_a_plain_export_states_is_imported_with_its_weights(tmp_path: Path) -> None:
    from stablefield.interop._plain_export import write_plain

    network = SiT((8, 12), 2, 3, 16, 1, 2, classes=2, generator=torch.Generator().manual_seed(0))
    denoiser = sf.Denoiser(network, sf.FlowPreconditioning(label_scale=1000.0)).eval()
    scaling = Scaling(mean=(0.5, 0.0, -1.0), std=(2.0, 1.0, 0.1), dtype="float32")
    write_plain(tmp_path / "plain", denoiser, (3, 8, 12), class_names=("ant", "bee"), scaling=scaling)
    file = tmp_path / "plain" / "model.safetensors"
    assert oct(file.stat().st_mode & 0o777) == oct((tmp_path / "plain" / "config.json").stat().st_mode & 0o777)
    run = sf.interop.import_run(file, tmp_path / "run")
    x, sigma, labels = torch.randn(2, 3, 8, 12), torch.tensor([0.5, 3.0]), torch.tensor([0, 1])
    torch.testing.assert_close(run.model().denoiser(x, sigma, labels), denoiser(x, sigma, labels))
    assert run.config.scaling == scaling
    assert run.config.class_names == ("ant", "bee")
    assert run.sample(2, steps=2, class_label="bee", device="cpu").images.dtype == np.float32
    with pytest.raises(ValueError, match=r"preconditioning=edm contradicts the config\.json beside model\.safetensors"):
        read_published(file, "edm")
    record = json.loads((tmp_path / "plain" / "config.json").read_text())
    for damage in (
        {"kind": "edm", "options": {"sigma_date": 1}},
        {"kind": "flow", "options": {"label_scale": -1}},
        {"kind": 3},
    ):
        (tmp_path / "plain" / "config.json").write_text(json.dumps(record | {"preconditioning": damage}))
        with pytest.raises(
            ValueError, match=r"config\.json cannot be used: .*move it away and name the preconditioning"
        ):
            read_published(file)
    damaged: list[dict[str, object]] = [
        {"network": {"kind": "sit"}},
        {"network": {"kind": "sit", "options": {"heads": "2"}}},
        {"scaling": {"mean": [0.0], "std": [1.0], "dtype": "float32"}},
        {"autoencoder": {"x": 1}},
        {"autoencoder": 3},
        {"shape": 3},
        {"label_dropout": 1.5},
        {"label_dropout": "0"},
        {"label_dropout": True},
    ]
    for change in damaged:
        (tmp_path / "plain" / "config.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=r"config\.json cannot be used: "):
            read_published(file)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(record | {"shape": [3, 8, 8]}))
    with pytest.raises(ValueError, match=r"states samples of \(3, 8, 8\), and the network takes \(3, 8, 12\)"):
        read_published(file)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=r"^heads=4 contradicts the config\.json beside model\.safetensors, which states 2"
    ):
        read_published(file, heads=4)
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "of another library"}')
    with pytest.raises(ValueError, match="holds only weights and does not state their preconditioning"):
        read_published(file, heads=2)


def test_what_the_files_of_a_pipeline_state_is_imported_with_its_weights(tmp_path: Path) -> None:
    # No published width shows its heads, and neither number is the default.
    network = SiT((8, 12), 2, 4, 16, 1, 2, classes=2, generator=torch.Generator().manual_seed(0))
    denoiser = sf.Denoiser(network, sf.EDMPreconditioning(1.0)).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    scaling = Scaling(mean=(0.5, 0.0, -1.0, 5.0), std=(2.0, 1.0, 0.1, 3.0), dtype="float64")
    write_pipeline(
        tmp_path / "pipe", denoiser, (4, 8, 12), class_names=("ant", "bee"), scaling=scaling, label_dropout=0.0
    )
    folder = tmp_path / "pipe" / "unet"
    file = folder / "diffusion_pytorch_model.safetensors"
    x, sigma, labels = torch.randn(2, 4, 8, 12), torch.tensor([0.5, 3.0]), torch.tensor([0, 1])
    expected = denoiser(x, sigma, labels)
    run = sf.interop.import_run(file, tmp_path / "run")
    assert torch.equal(run.model().denoiser(x, sigma, labels), expected)
    assert run.config.recipe.preconditioning == sf.EDMPreconditioning(1.0)
    assert (run.config.scaling, run.config.class_names, run.config.label_dropout) == (scaling, ("ant", "bee"), 0.0)
    assert run.sample(2, steps=2, class_label="bee", device="cpu").images.dtype == np.float64
    with pytest.raises(
        ValueError, match=r"^preconditioning=vp contradicts the config\.json beside .*, which states edm"
    ):
        read_published(file, "vp")
    with pytest.raises(ValueError, match=r"^heads=4 contradicts the config\.json beside .*, which states 2"):
        read_published(file, heads=4)
    # A copy of the folder has the network's own settings still.
    shutil.copytree(folder, tmp_path / "copy")
    alone = read_published(tmp_path / "copy" / file.name)
    assert torch.equal(alone.denoiser()(x, sigma, labels), expected)
    assert alone.manifest == {}
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    for change, words in (
        ({"id2label": {"1": "ant"}}, "model_index.json cannot be used: its id2label is"),
        (
            {"scaling": scaling.record | {"mean": [0.0], "std": [1.0]}},
            "its in_channels are 4, and the pipeline's scaling",
        ),
    ):
        (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=words):
            read_published(file)
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"options": config["options"] | {"heads": "2"}}))
    with pytest.raises(ValueError, match=r"config\.json cannot be used: its network has heads 2"):
        read_published(file)


def test_a_pipeline_of_latents_is_imported_with_its_autoencoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, mid_block_add_attention=False, **blocks)
    denoiser = sf.Denoiser(SiT((4, 6), 2, 4, 16, 1, 2), sf.FlowPreconditioning()).eval()
    scaling = Scaling(mean=(0.1, -2.0, 3.0, 0.0), std=(1.0, 0.5, 2.0, 4.0), dtype="float32")
    autoencoder = Autoencoder(model, device="cpu")
    write_pipeline(tmp_path / "pipe", denoiser, (4, 4, 6), scaling=scaling, autoencoder=autoencoder)
    file = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    # As diffusers writes a pipeline that has no autoencoder.
    write_pipeline(tmp_path / "none", denoiser, (4, 4, 6), scaling=scaling)
    index = json.loads((tmp_path / "none" / "model_index.json").read_text())
    (tmp_path / "none" / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    alone = read_published(tmp_path / "none" / "unet" / "diffusion_pytorch_model.safetensors")
    assert "autoencoder" not in alone.manifest
    assert alone.manifest["scaling"] == scaling.record
    # Latents of 16 bits are what the pipeline's own autoencoder takes.
    from diffusers import DiffusionPipeline

    half = dataclasses.replace(scaling, dtype="float16")
    write_pipeline(tmp_path / "half", denoiser, (4, 4, 6), scaling=half, autoencoder=autoencoder)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "half", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(num_inference_steps=1, output_type="latent").images
    assert found.dtype == pipe.vae.decode(found).sample.dtype == torch.float32
    run = sf.interop.import_run(file, tmp_path / "run")
    record = run.config.autoencoder
    assert record is not None
    assert (record.place, record.sha256) == (str((tmp_path / "pipe" / "vae").resolve()), autoencoder.sha256)
    latents = run.sample(4, steps=2, device="cpu", decode=False).images
    assert (latents.dtype, latents.shape) == (np.float32, (4, 4, 4, 6))
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(latents)).sample.clamp(-1, 1)
    drawn = run.sample(4, steps=2, device="cpu").images
    np.testing.assert_allclose(drawn / 127.5 - 1, expected.numpy(), rtol=0, atol=0.51 / 127.5)


def test_card_of_an_imported_network_claims_nothing_of_its_training() -> None:
    card = ModelCard(
        name="net",
        data="imported from net.pkl",
        shape=(3, 32, 32),
        classes=0,
        parameters=10,
        recipe=Recipe(),
        step=0,
        ema="half-life",
        version="0",
        pipeline=False,
    ).text()
    assert "imported from net.pkl" in card
    assert "trained on" not in card
    assert "regressed" not in card
    assert "None: `stablefield evaluate` was not run" in card
    assert "stablefield import model.safetensors" in card
