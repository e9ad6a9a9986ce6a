"""Calls of an exported pipeline that would do something else than they say are errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler

import stablefield as sf
from stablefield.data._scaling import Scaling
from stablefield.networks import MLP, SiT, SongUNet
from stablefield.networks._diffusers_unet import DiffusersUNet
from stablefield.training._recipe import MLPConfig, Recipe, SiTConfig

SHAPE = (1, 8, 8)
NETWORKS: dict[str, Callable[[int], torch.nn.Module]] = {
    "perceptron": lambda classes: MLP(SHAPE, 8, 1, classes=classes),
    "unet": lambda classes: SongUNet.ddpmpp(8, 1, 8, (1, 1), 1, classes=classes),
    "sit": lambda classes: SiT((8, 8), 2, 1, 16, 1, 2, classes=classes),
    "diffusers": lambda classes: DiffusersUNet.sized(8, 1, (8, 8), 1, classes=classes, groups=4),
}


def loaded(folder: Path) -> Any:
    """The pipeline in a folder."""
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exported(folder: Path, kind: str, classes: int = 3, **options: Any) -> Any:
    """The pipeline of a network with random weights, of which none are 0."""
    torch.manual_seed(0)
    denoiser = sf.Denoiser(NETWORKS[kind](classes)).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    sf.interop.write_pipeline(folder, denoiser, SHAPE, **options)
    return loaded(folder)


def latents(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_class_that_the_network_does_not_have_is_refused_by_its_number(kind: str, tmp_path: Path) -> None:
    pipe = exported(tmp_path / kind, kind, class_names=("ant", "bee", "0"))
    options = {"latents": latents(3), "num_inference_steps": 1, "output_type": "pt"}
    expected = pipe(class_labels=[0, 2, -1], **options).images
    assert not torch.equal(pipe(class_labels=[0, 1, -1], **options).images, expected)
    for same in (torch.tensor([0, 2, -1]), np.array([0, 2, -1]), ("ant", np.int64(2), torch.tensor(-1))):
        assert torch.equal(pipe(class_labels=same, **options).images, expected)
    for wrong, told in (
        (3, "3"),
        (-2, "-2"),
        (-7, "-7"),
        ([0, 3, 1], "3"),
        (torch.tensor([0, 1, 4]), "4"),
        (np.array([0, -3, 1]), "-3"),
        (1.0, r"1\.0"),
        (torch.tensor([0.0, 1.0, 2.0]), r"0\.0"),
        ([[0, 1, 0]] * 3, r"\[0, 1, 0\]"),
    ):
        message = rf"^class_labels holds {told}: pass whole numbers from 0 to 2, or -1 for none\.$"
        with pytest.raises(ValueError, match=message):
            pipe(class_labels=wrong, **options)


def test_guidance_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    pipe = exported(tmp_path / "guided", "perceptron")
    options = {"latents": latents(2), "num_inference_steps": 2, "output_type": "pt", "class_labels": [0, 1]}
    plain = pipe(**options).images
    guided = pipe(guidance_scale=2.0, guidance_interval=(0.1, 100.0), **options).images
    assert not torch.allclose(guided, plain)
    message = (
        r"^guidance_interval is \(0\.1, 100\.0\) and does nothing at guidance_scale 1: pass a scale, such as guidance"
    )
    with pytest.raises(ValueError, match=message):
        pipe(guidance_interval=(0.1, 100.0), **options)
    for none in ((100, 1000), (0.0, 0.001)):
        with pytest.raises(
            ValueError, match=r"holds none of the grid's noise levels, 0\.002 to 80, so nothing is guided"
        ):
            pipe(guidance_scale=2.0, guidance_interval=none, **options)
    options["class_labels"] = [0, -1]
    assert not torch.allclose(pipe(guidance_scale=2.0, **options).images, pipe(**options).images)
    for none in (-1, [-1, -1], torch.tensor([-1, -1])):
        with pytest.raises(ValueError, match=r"^guidance_scale is 2\.0: .* and class_labels other than -1\.$"):
            pipe(**options | {"class_labels": none, "guidance_scale": 2.0})


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_generator_beside_latents_is_refused_unless_the_steps_add_its_noise(tmp_path: Path) -> None:
    pipe = exported(tmp_path / "seeded", "perceptron", 0)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    euler, given = pipe.scheduler, latents(2)
    dpm = EDMDPMSolverMultistepScheduler.from_config(euler.config)
    for solver, scheduler in (("heun", euler), ("scheduler", euler), ("scheduler", dpm)):
        pipe.scheduler = scheduler
        for generator in (seeded(1)[0], seeded(1, 2), seeded(1, 2, 3, 4, 5)):
            message = (
                rf"^generator draws nothing beside latents with solver {solver}, whose steps add no noise: leave one"
            )
            with pytest.raises(ValueError, match=message):
                pipe(latents=given, generator=generator, solver=solver, **options)
        # `batch_size` counts only without latents.
        assert len(pipe(batch_size=7, latents=given, solver=solver, **options).images) == 2
        # Without noise of the steps the latents are all that a generator draws.
        rows = torch.cat([torch.randn(1, *SHAPE, generator=one) for one in seeded(3, 4)])
        found = pipe(generator=seeded(3, 4), solver=solver, **options).images
        torch.testing.assert_close(found, pipe(latents=rows, solver=solver, **options).images)
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(euler.config, algorithm_type="sde-dpmsolver++")
    options["solver"] = "scheduler"
    found = pipe(latents=given, generator=seeded(3, 4), **options).images
    torch.testing.assert_close(pipe(latents=given, generator=seeded(3, 4), **options).images, found)
    torch.testing.assert_close(pipe(latents=given[1:], generator=seeded(4), **options).images, found[1:])
    assert not torch.allclose(pipe(latents=given, generator=seeded(5, 4), **options).images[0], found[0])
    one = [pipe(latents=given, generator=seeded(3)[0], **options).images for _ in range(2)]
    torch.testing.assert_close(*one)
    both = pipe(generator=seeded(3, 4), **options).images
    torch.testing.assert_close(pipe(generator=seeded(4), **options).images, both[1:])
    with pytest.raises(ValueError, match=r"^generator holds 5 generators for 2 images: pass one per image"):
        pipe(batch_size=5, latents=given, generator=seeded(1, 2, 3, 4, 5), **options)
    # Heun's method takes no steps of the scheduler.
    with pytest.raises(ValueError, match=r"^generator draws nothing beside latents with solver heun"):
        pipe(latents=given, generator=seeded(3, 4), **options | {"solver": "heun"})


NEVER = "was trained without dropping labels, so its network never learned to draw without a class"


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> sf.Run:
    """A run that saw the class of every image."""
    network = SiTConfig(patch_size=4, width=8, depth=1, heads=1)
    recipe = Recipe(
        network=network, steps=1, batch=4, sample_every=0, references=8, conditional=True, label_dropout=0.0
    )
    return sf.train("digits", recipe=recipe, out=tmp_path_factory.mktemp("taught") / "run", device="cpu")


def draws_with_classes_only(run: sf.Run) -> None:
    """The run draws its classes in turn, and refuses what takes a network that draws without them."""
    assert run.sample(3, steps=1, device="cpu").labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=f"^guidance_scale=2: the run {NEVER}, which guidance needs"):
        run.sample(2, steps=1, guidance_scale=2.0, device="cpu")
    for classes in (-1, [3, -1]):
        with pytest.raises(ValueError, match=f"^class_label=-1: the run {NEVER}: train with a label dropout"):
            run.sample(2, steps=1, class_label=classes, device="cpu")


def test_a_pipeline_of_a_network_that_always_saw_a_class_draws_none_without(taught: sf.Run, tmp_path: Path) -> None:
    taught.export(tmp_path / "never", samples=0)
    pipe = loaded(tmp_path / "never")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            # A longer training would make the classes differ.
            parameter.add_(0.1 * torch.randn(parameter.shape))
    options = {"num_inference_steps": 2, "output_type": "pt"}
    given = torch.cat([latents(6), latents(6)])
    found = pipe(latents=given, **options).images
    expected = pipe(latents=given, class_labels=[*range(10), 0, 1], **options).images
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found[1:10] - pipe(latents=given[1:10], class_labels=0, **options).images).abs().amax(
        (1, 2, 3)
    ).min() > 1e-3
    # As in `run.sample`, the class is that of the seed, whatever the batch.
    rows = pipe(generator=seeded(13, 4), **options).images
    expected = pipe(generator=seeded(13, 4), class_labels=[3, 4], **options).images
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    torch.testing.assert_close(pipe(generator=seeded(4), **options).images, rows[1:])
    one = [
        pipe(batch_size=3, generator=seeded(5)[0], **options, **more).images
        for more in ({}, {"class_labels": [0, 1, 2]})
    ]
    torch.testing.assert_close(*one, rtol=0, atol=0)
    message = f"guidance_scale is 3.0: the model {NEVER}, which guidance needs: leave it out"
    for classes in (3, None):
        with pytest.raises(ValueError, match=f"^{message}"):
            pipe(class_labels=classes, guidance_scale=3.0, **options)
    for classes in (-1, [2, -1], torch.tensor([-1])):
        with pytest.raises(
            ValueError, match=f"^class_labels holds -1: the model {NEVER}: pass whole numbers from 0 to 9"
        ):
            pipe(class_labels=classes, **options)
    with pytest.raises(ValueError, match=r"^class_labels holds 10: pass whole numbers from 0 to 9\.$"):
        pipe(class_labels=10, **options)
    card = (tmp_path / "never" / "README.md").read_text()
    assert "0 to 9.\n" in card
    assert "-1 for none" not in card
    assert "guidance_scale" not in card


def test_a_pipeline_takes_the_classes_in_turn_that_have_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), np.uint8)
    origin = sf.data.Origin(name="x", source="y", class_names=("a", "b", "c", "d"))
    data = sf.data.make_image_set(pixels, np.array([0, 2, 3] * 4), origin)
    recipe = Recipe(
        network=MLPConfig(width=8, depth=1),
        steps=1,
        batch=4,
        sample_every=0,
        conditional=True,
        label_dropout=0.0,
    )
    run = sf.train(data, recipe=recipe, out=tmp_path / "run", device="cpu")
    run.export(tmp_path / "pipe", samples=0)
    pipe = loaded(tmp_path / "pipe")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    options = {"num_inference_steps": 2, "output_type": "pt"}
    # Those that the run takes.
    assert run.sample(5, steps=1, device="cpu").labels.tolist() == [0, 2, 3, 0, 2]
    found, expected = (
        pipe(latents=latents(5), **options, **more).images for more in ({}, {"class_labels": [0, 2, 3, 0, 2]})
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, pipe(latents=latents(5), class_labels=[0, 1, 2, 3, 0], **options).images)
    rows = [pipe(generator=seeded(4, 8), **options, **more).images for more in ({}, {"class_labels": [2, 3]})]
    torch.testing.assert_close(*rows, rtol=0, atol=0)
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["learned_classes"] == [0, 2, 3]
    assert not [*(tmp_path / "again").rglob("*.py")]
    told = "copy this folder: `pipe.save_pretrained` writes neither `pipeline.py` nor `unet/network.py`"
    assert told in (tmp_path / "pipe" / "README.md").read_text()


def test_a_pipeline_that_does_not_state_the_label_dropout_draws_without_a_class(tmp_path: Path) -> None:
    options = {"latents": latents(2), "num_inference_steps": 2, "output_type": "pt"}
    for kind, stated in (("perceptron", {}), ("diffusers", {"label_dropout": 0.1})):
        pipe = exported(tmp_path / kind, kind, **stated)
        torch.testing.assert_close(pipe(**options).images, pipe(class_labels=-1, **options).images)
        assert not torch.allclose(pipe(**options).images, pipe(class_labels=[0, 1], **options).images)
    index = json.loads((tmp_path / "perceptron" / "model_index.json").read_text())
    assert not {"label_dropout", "learned_classes"} & set(index)


def test_diffusers_own_network_that_always_saw_a_class_takes_the_classes_in_turn(tmp_path: Path) -> None:
    pipe = exported(tmp_path / "turns", "diffusers", label_dropout=0.0)
    options = {"latents": latents(4), "num_inference_steps": 2, "output_type": "pt"}
    torch.testing.assert_close(pipe(**options).images, pipe(class_labels=[0, 1, 2, 0], **options).images)
    with pytest.raises(ValueError, match=f"^class_labels holds -1: the model {NEVER}"):
        pipe(class_labels=-1, **options)
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["label_dropout"] == 0


def test_an_import_reads_the_label_dropout_of_a_published_network(tmp_path: Path) -> None:
    network = SongUNet.ddpmpp(8, 1, 8, (1, 2), 1, classes=10, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "net.pkl"
    # The name and the default of the published network's attribute.
    file.write_bytes(foreign.edm_file(network, inner={"label_dropout": 0}))
    run = sf.interop.import_run(file, tmp_path / "never")
    draws_with_classes_only(run)
    run.export(tmp_path / "export", samples=0)
    assert "-1 for none" not in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(ValueError, match=f"guidance_scale is 2.0: the model {NEVER}"):
        loaded(tmp_path / "export")(class_labels=1, guidance_scale=2.0)
    for number, inner in enumerate(({"label_dropout": 0.1}, {}, {"label_dropout": None})):
        file.write_bytes(foreign.edm_file(network, inner=inner))
        run = sf.interop.import_run(file, tmp_path / str(number))
        assert run.config.label_dropout == (0.1 if number == 0 else None)
        drawn = run.sample(2, steps=1, class_label=[-1, 3], guidance_scale=2.0, device="cpu")
        assert drawn.labels.tolist() == [-1, 3]
    for odd in (2, float("nan"), "0", True):
        file.write_bytes(foreign.edm_file(network, inner={"label_dropout": odd}))
        with pytest.raises(ValueError, match=r"^net\.pkl is refused: its label_dropout is "):
            sf.interop.import_run(file, tmp_path / "odd")


@pytest.mark.parametrize("kind", ["plain", "diffusers"])
def test_an_import_knows_whether_the_network_always_saw_a_class(kind: str, taught: sf.Run, tmp_path: Path) -> None:
    draws_with_classes_only(taught)
    taught.export(tmp_path / "out", format=kind, samples=0)
    if kind == "plain":
        file, where, options = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json", {}
    else:
        file = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
        where, options = tmp_path / "out" / "model_index.json", {"preconditioning": "edm", "heads": 1}
    again = sf.interop.import_run(file, tmp_path / "run", **options)
    draws_with_classes_only(again)
    again.export(tmp_path / "second", format="plain", samples=0)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["label_dropout"] == 0
    assert "-1 for none" not in (tmp_path / "second" / "README.md").read_text()
    record = json.loads(where.read_text())
    assert record["label_dropout"] == 0
    # Files of earlier versions do not state it.
    where.write_text(json.dumps({key: value for key, value in record.items() if key != "label_dropout"}))
    silent = sf.interop.import_run(file, tmp_path / "silent", **options)
    assert silent.sample(2, steps=1, class_label=[-1, 3], guidance_scale=2.0, device="cpu").labels.tolist() == [-1, 3]
    silent.export(tmp_path / "third", format="plain", samples=0)
    assert "label_dropout" not in json.loads((tmp_path / "third" / "config.json").read_text())
    assert "or -1 for none" in (tmp_path / "third" / "README.md").read_text()
    for odd in (2, "0", [], True):
        where.write_text(json.dumps(record | {"label_dropout": odd}))
        with pytest.raises(ValueError, match=rf"{where.name} cannot be used: its label_dropout is"):
            sf.interop.import_run(file, tmp_path / "odd", **options)


@pytest.mark.parametrize("preconditioning", [sf.EDMPreconditioning(), sf.VPPreconditioning()], ids=["edm", "vp"])
@pytest.mark.parametrize("kind", ["perceptron", "unet", "sit"])
def test_weights_of_16_bits_see_noise_labels_and_frequencies_in_float32(kind, preconditioning, tmp_path: Path) -> None:
    # In bfloat16 a label of VP's, up to 999, would be off by 2, and a frequency by the 256th part.
    torch.manual_seed(0)
    sf.interop.write_pipeline(tmp_path / kind, sf.Denoiser(NETWORKS[kind](0), preconditioning).eval(), SHAPE)
    pipes = [loaded(tmp_path / kind) for _ in range(2)]
    pipes[1].to(torch.bfloat16)
    pipes.append(DiffusionPipeline.from_pretrained(tmp_path / kind, trust_remote_code=True, dtype=torch.bfloat16))
    seen: list[torch.Tensor] = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        first = next(
            module
            for name, module in pipe.unet.named_modules()
            if name.rpartition(".")[2] in ("map_noise", "embed", "t_embedder", "time_proj")
        )
        # What it is given, and of a Fourier or positional embedding what it makes of it.
        first.register_forward_hook(
            lambda module, given, out: seen.append(out if hasattr(module, "freqs") else given[0])
        )
        pipe(latents=latents(1), num_inference_steps=3, output_type="pt")
    each = len(seen) // 3
    for k in range(each):
        for other in (seen[each + k], seen[2 * each + k]):
            assert other.dtype == torch.float32
            torch.testing.assert_close(other, seen[k], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("solver", ["heun", "scheduler"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_data_far_from_zero_come_in_the_dtype_of_the_training_data(dtype: str, solver: str, tmp_path: Path) -> None:
    # Times in seconds: float32 tells none apart that are closer than 128.
    mean, std = (1.7e9, 4.0) if dtype == "float64" else (100.0, 4.0)
    plain = exported(tmp_path / "plain", "perceptron", scaling=Scaling(mean=(0.0,), std=(0.5,), dtype="float64"))
    pipe = exported(tmp_path / "times", "perceptron", scaling=Scaling(mean=(mean,), std=(std,), dtype=dtype))
    options = {"latents": latents(6), "num_inference_steps": 3, "output_type": "np", "solver": solver}
    # With mean 0 and deviation 1 / 2, the data are the network's own values.
    values, found = plain(**options).images, pipe(**options).images
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, (values.astype(np.float64) * 2 * std + mean).astype(dtype))
    assert len(np.unique(found)) > (30 if dtype == "float16" else 300)
