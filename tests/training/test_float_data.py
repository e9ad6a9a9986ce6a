"""Float data, from an array or a file through training to samples and their evaluation."""

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.numpy import save_file

import stablefield as sf
from stablefield.cli.entry import main
from stablefield.cli.extractors import ExtractorFlags
from stablefield.data._packed import open_tensors
from stablefield.data._scaling import Scaling
from stablefield.probing._probe import probe_data
from stablefield.sampling._noise import SampleNoise
from stablefield.training._feed import Feed
from stablefield.training._plan import make_plan
from stablefield.training._recipe import MLPConfig, Recipe, SongUNetConfig
from stablefield.training._recipes import named_recipe
from stablefield.training._sampler import SamplerOptions

RECIPE = Recipe(
    steps=120,
    batch=128,
    learning_rate=5e-3,
    ramp_images=1280,
    ema_half_life=1500,
    network=MLPConfig(width=32, depth=1),
    conditional=True,
    sample_every=0,
)
ORIGIN = sf.data.Origin(name="points", source="made up")
MEANS, STDS = np.array([[10.0, -2.0], [14.0, 3.0]]), np.array([0.5, 1.0])


def mixture(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points of two Gaussians in the plane, and which of the two."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return (MEANS[labels] + rng.normal(size=(n, 2)) * STDS).astype(np.float32), labels


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> sf.Run:
    values, labels = mixture(600)
    return sf.train(values, labels=labels, recipe=RECIPE, out=tmp_path_factory.mktemp("runs") / "points", device="cpu")


def test_points_of_a_known_mixture_are_learned_in_their_own_units(points):
    drawn = points.sample(400, device="cpu", steps=12)
    for label in (0, 1):
        own = drawn.images[drawn.labels == label].astype(np.float64)
        # The Frechet distance to the exact Gaussian of the class: of diagonal covariances a sum over the axes.
        distance = ((own.mean(0) - MEANS[label]) ** 2 + (own.std(0) - STDS) ** 2).sum()
        # 200 exact samples have 0.009 on average; the two classes are 6.4 apart.
        assert distance < 0.15


def test_a_run_keeps_the_scaling_and_draws_the_dtype_of_its_data(points):
    values, _ = mixture(600)
    scaling = points.config.scaling
    assert scaling.mean == pytest.approx(values.astype(np.float64).mean(0), rel=1e-12)
    assert scaling.std == pytest.approx(values.astype(np.float64).std(0), rel=1e-12)
    assert points.sample(3, device="cpu", steps=2).images.dtype == np.float32


def test_a_run_of_points_begins_with_the_weights_of_another_and_its_own_scaling(points, tmp_path):
    values, labels = mixture(200, seed=1)
    recipe = dataclasses.replace(RECIPE, steps=1, learning_rate=1e-30)
    run = sf.train(100 * values, labels=labels, recipe=recipe, init=points, out=tmp_path / "next", device="cpu")
    assert run.config.scaling.mean == pytest.approx(100 * values.astype(np.float64).mean(0), rel=1e-5)
    ours, theirs = (one.model(ema).denoiser.state_dict() for one, ema in ((run, "none"), (points, "half-life")))
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-6), name
    with pytest.raises(ValueError, match="train on samples of 2, as the source"):
        sf.train(np.random.randn(99, 3, 2), recipe=dataclasses.replace(recipe, batch=9, conditional=False), init=points)
    # Other units: the scaling of the source would be wrong, and both are named.
    note = run.config.initial.notes[-1]  # after that on classes by number
    assert "another scaling, mean 12" in note
    assert "than this run, mean 12" in note


def edm_loss(denoiser, x: np.ndarray, labels: np.ndarray) -> float:
    """EDM's loss of scaled values (n, 2), on noise that depends on nothing else."""
    rng = np.random.default_rng(0)
    sigma = np.exp(rng.normal(-1.2, 1.2, len(x)))[:, None]
    noisy = torch.from_numpy(x + sigma * rng.normal(size=x.shape)).float()
    with torch.no_grad():
        found = denoiser(noisy, torch.from_numpy(sigma[:, 0]).float(), class_labels=torch.from_numpy(labels)).numpy()
    return float(((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (found - x) ** 2).mean())


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda x: x, True),
        (lambda x: x[:60], True),
        (lambda x: 0.2 * (x - x.mean(0)) + x.mean(0) + x.std(0), True),  # a narrow part of the source's data
        (lambda x: x + 2 * x.std(0), True),
        (lambda x: x * [1, 1e-3], False),  # a column in other units
        (lambda x: x * [1, 1e3], False),
        (lambda x: x + [0, 6] * x.std(0), False),
    ],
    ids=["same", "part", "narrow", "moved", "smaller column", "larger column", "far column"],
)
def test_the_scaling_of_a_source_is_taken_for_channels_in_its_units_each(points, tmp_path, change, taken):
    values, labels = mixture(600, seed=2)
    values = change(values).astype(np.float32)
    recipe = dataclasses.replace(RECIPE, steps=1, batch=32, learning_rate=1e-30)
    plan = make_plan(sf.data.make_image_set(values, labels[: len(values)], ORIGIN), recipe, init=points, device="cpu")
    assert (plan.config.scaling.mean == points.config.scaling.mean) == taken
    assert (plan.config.scaling.std == points.config.scaling.std) == taken


@pytest.mark.parametrize("source", ["run", "export"])
def test_copied_weights_see_data_in_the_same_units_as_their_source_saw_its_own(source, points, tmp_path):
    values, labels = mixture(400, seed=1)
    part = values[labels == 1] + np.float32(0.3)
    init = points if source == "run" else points.export(tmp_path / "export", format="plain", samples=0)
    recipe = dataclasses.replace(RECIPE, steps=1, batch=64, learning_rate=1e-30)
    ones = np.ones(len(part), np.int64)
    run = sf.train(make_array_set(part, ones), recipe=recipe, init=init, out=tmp_path / "next", device="cpu")
    theirs, data = points.config.scaling, run.config.numbered(make_array_set(part))
    seen = data.scaled(slice(None))
    old, new = points.model().denoiser, run.model("none").denoiser
    expected, own = (
        edm_loss(old, (part.astype(np.float64) - mean) / (2 * std), ones)
        for mean, std in ((np.array(theirs.mean), np.array(theirs.std)), (part.mean(0), part.std(0)))
    )
    assert edm_loss(new, seen, ones) == pytest.approx(expected, rel=1e-4)
    assert expected < own / 2
    # So it draws what the source draws, in the units of the data.
    one, two = (each.sample(8, class_label=1, steps=6, device="cpu").images for each in (points, run))
    np.testing.assert_allclose(one, two, rtol=1e-4)
    note = run.config.initial.notes[-1]  # after that on classes by number
    assert note.startswith(f"scaling: that of the source, mean {theirs.mean[0]:.4g}, {theirs.mean[1]:.4g}, std ")
    assert f"that of the data alone would be mean {part[:, 0].mean():.4g}, " in note
    assert run.resume(steps=2, data=make_array_set(part, ones)).config.scaling.std == theirs.std


def make_array_set(values: np.ndarray, labels: np.ndarray | None = None) -> sf.data.ImageSet:
    return sf.data.make_image_set(values, labels, sf.data.Origin(name="x", source="y"))


def test_weights_of_images_on_float_data_and_the_reverse_are_noted(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 3, 4, 4), np.uint8)
    recipe = Recipe(steps=1, batch=8, noise_band=0.0, sample_every=0, network=MLPConfig(width=8, depth=1))
    kinds = {"images": make_array_set(pixels), "floats": make_array_set(pixels.astype(np.float32) / 127.5 - 1)}
    runs = {name: sf.train(data, recipe=recipe, out=tmp_path / name, device="cpu") for name, data in kinds.items()}
    for name, other in (("images", "floats"), ("floats", "images")):
        for init in (runs[name], runs[name].export(tmp_path / f"{name}-export", format="plain", samples=0)):
            notes = make_plan(kinds[other], recipe, init=init, device="cpu").config.initial.notes
            assert len(notes) == 1
            assert "images, whose bytes v mean v / 127.5 - 1" in notes[0], notes
            assert "float data, scaled from mean " in notes[0]
            assert make_plan(kinds[name], recipe, init=init, device="cpu").config.initial.notes == ()


def test_a_channel_that_was_constant_in_the_source_keeps_what_it_holds_now(tmp_path):
    values = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    constant = values * np.float32([1, 1, 0])
    recipe = Recipe(steps=1, batch=8, noise_band=0.0, sample_every=0, network=MLPConfig(width=8, depth=1))
    source = sf.train(constant, recipe=recipe, out=tmp_path / "source", device="cpu")
    plan = make_plan(make_array_set(values), recipe, init=source, device="cpu")
    assert plan.config.scaling.std == pytest.approx(values.astype(np.float64).std(0), rel=1e-6)
    assert "another scaling" in plan.config.initial.notes[0]
    # The reverse is a constant of the source's scaling.
    varied = sf.train(values, recipe=recipe, out=tmp_path / "varied", device="cpu")
    plan = make_plan(make_array_set(constant), recipe, init=varied, device="cpu")
    assert plan.config.scaling == varied.config.scaling


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 5)])
def test_scaling_gives_channels_mean_0_and_std_a_half_and_is_undone_to_the_last_bit(dtype, shape, monkeypatch):
    monkeypatch.setattr("stablefield.data._scaling.CHUNK_BYTES", 3000)
    rng = np.random.default_rng(0)
    offsets = np.array([5.0, -0.1, 300.0]).reshape(-1, *(1,) * (len(shape) - 1))
    values = (rng.normal(size=(500, *shape)) * (1 + abs(offsets) / 9) + offsets).astype(dtype)
    scaling, _ = Scaling.measure(values, "values")
    axes = (0, *range(2, values.ndim))
    assert scaling.mean == pytest.approx(values.astype(np.float64).mean(axes), rel=1e-12)
    assert scaling.std == pytest.approx(values.astype(np.float64).std(axes), rel=1e-12)
    seen = scaling.apply(values, np.float64)
    assert np.abs(seen.mean(axes)).max() < 1e-12
    assert seen.std(axes) == pytest.approx(0.5)
    restored = scaling.undo(torch.from_numpy(seen)).numpy()
    assert restored.dtype == values.dtype
    if dtype == "float64":
        assert np.abs(restored - values).max() < 1e-12
    else:
        np.testing.assert_array_equal(restored, values)
    half = scaling.apply(values)
    assert half.dtype == (np.float16 if dtype == "float16" else np.float32)
    assert np.abs(half - seen).max() < (2e-3 if dtype == "float16" else 1e-6)


def test_a_constant_channel_is_0_to_the_network_and_itself_in_samples():
    values = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    values[:, 1] = 0.1
    scaling, _ = Scaling.measure(values, "values")
    assert (scaling.apply(values)[:, 1] == 0).all()
    assert (scaling.undo(torch.randn(9, 2))[:, 1] == np.float32(0.1)).all()


def test_half_precision_files_stay_half_and_are_mapped(tmp_path):
    values = np.random.default_rng(0).normal(size=(64, 4, 8, 16)).astype(np.float16)
    np.save(tmp_path / "latents.npy", values)
    found = sf.data.open_images(tmp_path / "latents.npy")
    assert found.images.dtype == np.float16
    assert found.file == tmp_path / "latents.npy"
    recipe = Recipe(batch=8, references="all")
    feed = Feed(found, recipe, torch.device("cpu"), labelled=False, placement="resident")
    assert feed.whole is not None
    assert feed.whole.data.dtype == torch.float16
    few = dataclasses.replace(recipe, references=24)
    resident, loaded = (
        Feed(found, few, torch.device("cpu"), labelled=False, placement=placement)
        for placement in ("resident", "loaded")
    )
    for step in range(3):
        one, other = (feed.rows(step, slice(None)) for feed in (resident, loaded))
        assert one.pixels.dtype == other.pixels.dtype == torch.float16
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.pool.data, other.pool.data)
    loaded.close()
    # Latents are never resized: the U-Net gets as many levels as they can be halved, and no flips.
    name, recipe = named_recipe("auto", found, accelerated=True)
    assert (name, recipe.augmentation) == ("imagefolder", 0.0)
    for shape, levels in (((4, 16, 24), 2), ((4, 32, 32), 3), ((4, 18, 20), 2), ((4, 17, 16), 1)):
        data = sf.data.make_image_set(np.random.randn(4, *shape), None, sf.data.Origin(name="z", source="drawn"))
        network = named_recipe("auto", data, accelerated=False)[1].network
        assert isinstance(network, SongUNetConfig)
        assert len(network.multipliers) == levels


def test_float_arrays_that_may_be_meant_as_images_come_with_the_remedy(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((4, 5, 6)))
    (note,) = sf.data.open_images(tmp_path / "a.npy").notes
    assert "here as 5 channels of 6 values" in note
    assert "(x * 255).round().clip(0, 255).astype('uint8')" in note


def test_npz_and_safetensors_files_hold_data_and_labels(tmp_path):
    values, labels = mixture(50)
    np.savez_compressed(tmp_path / "a.npz", data=values, labels=labels)
    save_file({"latents": values, "labels": labels.astype(np.int32)}, tmp_path / "b.safetensors")
    first, second = (sf.data.open_images(tmp_path / name) for name in ("a.npz", "b.safetensors"))
    for found in (first, second):
        np.testing.assert_array_equal(found.images, values)
        np.testing.assert_array_equal(found.labels, labels)
        assert found.classes == 2
        assert found.scaling == first.scaling
        assert found.manifest["sha256"] == first.manifest["sha256"]
    assert second.file == tmp_path / "b.safetensors"


def test_a_resumed_run_has_the_same_weights_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=(128, 2, 6)).astype(np.float16)
    np.save(tmp_path / "signals.npy", values)
    recipe = Recipe(
        steps=6, batch=16, network=MLPConfig(width=16, depth=1), checkpoint_every=3, log_every=1, references=32
    )
    whole = sf.train(tmp_path / "signals.npy", recipe=recipe, out=tmp_path / "whole", device="cpu")
    calls = iter(range(99))
    stopped = sf.train(
        tmp_path / "signals.npy", recipe=recipe, out=tmp_path / "part", device="cpu", stop=lambda: next(calls) >= 2
    )
    assert stopped.step == 3
    stopped.resume(device="cpu")
    for a, b in zip(*(run.model("none").denoiser.state_dict().values() for run in (whole, stopped)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.zeros((5, 2), np.float32), "all 5 samples are equal"),
        (np.ones((1, 2), np.float32), "1 samples: pass at least 2"),
        (np.array([1.0, 2.0]), r"shape \(2,\): float data are vectors"),
        (np.zeros((2, 1, 1, 1, 1)), "flatten the axes after the second"),
        (np.array([[1.0, 2.0], [3.0, np.nan]]), r"sample 1 is nan at \[1\]: leave such samples out"),
        (np.array([[1.0, np.inf], [3.0, 1.0]]), r"sample 0 is inf at \[1\]"),
        (np.zeros((9, 8, 8, 3)), r"channels last: move them to axis 1"),
        (np.array([[1e300], [-1e300]]), "pass values below 1e150"),
    ],
)
def test_data_that_cannot_be_learned_are_refused_by_file_value_and_remedy(values, problem, tmp_path):
    np.save(tmp_path / "bad.npy", values)
    with pytest.raises(ValueError, match=rf"bad.*{problem}"):
        sf.data.open_images(tmp_path / "bad.npy")
    with pytest.raises(ValueError, match=problem):
        sf.train(values, device="cpu")


def test_labels_of_another_length_and_flips_of_latents_are_refused(tmp_path):
    values, labels = mixture(50)
    with pytest.raises(ValueError, match=r"labels has dtype int64 and shape \(49,\)"):
        sf.train(values, labels=labels[1:], device="cpu")
    save_file({"data": values, "labels": labels[1:]}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="one class number per sample"):
        sf.data.open_images(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="mirror=True flips and turns pictures"):
        sf.train(values, recipe=Recipe(mirror=True, batch=16), device="cpu")
    with pytest.raises(ValueError, match="take a perceptron"):
        sf.train(values, recipe=Recipe(batch=16, network=SongUNetConfig()), device="cpu")
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match="never resized"):
        sf.data.open_images(tmp_path / "a.npy", resolution=8)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"dtype": "F32", "shape": [2**40, 2], "data_offsets": [0, 16]}, "cut short or damaged"),
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]}, "cut short or damaged"),
        ({"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]}, "save it as F16, F32, F64"),
        ({"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]}, "is damaged"),
        ({"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}, "is damaged"),
        ({"dtype": "F32", "shape": "2", "data_offsets": None}, "is damaged"),
        (7, "is damaged"),
    ],
)
def test_hostile_safetensors_files_are_refused_before_their_data_are_read(entry, problem, tmp_path):
    text = json.dumps({"data": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=problem):
        open_tensors(tmp_path / "a.safetensors")


def test_a_changed_or_hostile_scaling_in_a_run_is_refused(points, tmp_path):
    record = json.loads((points.path / "config.json").read_text())
    record.pop("checksum")
    for change, problem in (
        ({"mean": [1.0], "std": [1.0]}, "its shape is"),
        ({"std": [-1.0, 1.0]}, "its scaling is damaged"),
        ({"mean": "no"}, "its scaling is damaged"),
        ({"dtype": "int8"}, "its scaling is damaged"),
    ):
        manifest = record["manifest"] | {"scaling": record["manifest"]["scaling"] | change}
        (tmp_path / "config.json").write_text(json.dumps(record | {"manifest": manifest}))
        with pytest.raises(ValueError, match=rf"config\.json cannot be used: {problem}"):
            sf.Run(tmp_path).model()


def test_an_npz_beyond_the_memory_budget_is_refused_with_the_remedy(tmp_path):
    np.savez(tmp_path / "a.npz", data=np.random.default_rng(0).normal(size=(100, 4)))
    with pytest.raises(ValueError, match=r"3\.1 KiB, above the 3\.0 KiB.*save it as a \.npy"):
        sf.data.open_images(tmp_path / "a.npz", memory_budget=3072)


def test_samples_are_written_as_arrays_and_as_pictures_where_they_are_pictures(points, tmp_path):
    drawn = points.sample(6, device="cpu", steps=2)
    with np.load(drawn.save(tmp_path / "a.npz")) as found:
        np.testing.assert_array_equal(found["data"], drawn.images)
        np.testing.assert_array_equal(found["labels"], drawn.labels)
    np.testing.assert_array_equal(np.load(drawn.save(tmp_path / "a.npy")), drawn.images)
    drawn.save(tmp_path / "all")
    np.testing.assert_array_equal(np.load(tmp_path / "all" / "000004.npy"), drawn.images[4])
    with pytest.raises(ValueError, match=r"a picture is \(1, H, W\) or \(3, H, W\)"):
        drawn.save(tmp_path / "a.png")
    assert "<pre>" in drawn._repr_html_()
    grey = dataclasses.replace(drawn, images=np.random.randn(6, 1, 4, 4), labels=None)
    assert grey.save(tmp_path / "b.png").is_file()


def test_evaluate_measures_the_values_themselves(points):
    values, _ = mixture(600)
    found = points.evaluate(
        samples=200, data=values, sampler=dataclasses.replace(SamplerOptions(), steps=6), cache=False
    )
    by_name = {score.protocol.metric: score for score in found.scores}
    frechet = by_name["Frechet distance (values)"]
    drawn = points.sampler(device="cpu", steps=6).in_proportion().sample(200).images
    expected = sf.evaluation.frechet_distance_from_features(torch.from_numpy(drawn), torch.from_numpy(values))
    assert frechet.values[0] == pytest.approx(expected.value, rel=1e-5)
    assert by_name["memorised share"].protocol.extractor == "values"
    assert found.samples is None
    with pytest.raises(ValueError, match=r"random convolutions.* measures 8-bit images, and these are float32 data"):
        sf.evaluate(values, data=values, extractor=sf.evaluation.RandomConvolutions(), metrics=["frechet"])
    with pytest.raises(ValueError, match="data has dtype uint8: pass floats"):
        sf.evaluate(values, data="digits", metrics=["frechet"])


def test_probe_and_train_see_the_same_scaled_values(tmp_path):
    values, labels = mixture(300)
    data = sf.data.make_image_set(values, labels, sf.data.Origin(name="points", source="drawn"))
    found = probe_data(data, sources=16, references=[16], noise_levels=[0.5, 1e4], device="cpu")
    # Two axes of variance 1/4 each.
    assert float(found.curve.dsm.mean[-1]) == pytest.approx(0.5, rel=0.2)
    assert (
        found.noise_band.level
        == make_plan(data, dataclasses.replace(RECIPE, conditional=False)).config.recipe.noise_band
    )


@pytest.mark.parametrize("format", ["plain", "diffusers"])
def test_an_export_undoes_the_scaling(format, points, tmp_path):  # noqa: A002
    folder = points.export(tmp_path / "out", format=format)
    assert "float data of 2 values" in (folder / "README.md").read_text()
    if format == "plain":
        assert json.loads((folder / "config.json").read_text())["scaling"]["mean"] == list(points.config.scaling.mean)
        return
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    latents = torch.stack([SampleNoise([seed]).latents((2,), dtype=torch.float64)[0] for seed in range(4)])
    drawn = pipe(latents=latents, class_labels=[0, 1, 0, 1], num_inference_steps=6).images
    expected = points.sample(4, device="cpu", steps=6).images
    assert drawn.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_extractor_by_default_is_inception_for_images_or_with_a_file_and_the_values_of_float_data():
    flags = ExtractorFlags()
    assert [flags.named(floating=floating) for floating in (False, True)] == ["inception", "pixels"]
    assert flags.named(floating=False, usual="random") == "random"
    named = ExtractorFlags(extractor_file=Path("network.pt"))
    named.check()
    assert named.named(floating=False, usual="random") == "inception"


def status(line: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    return end.value.code


def test_every_verb_of_the_command_takes_float_data(points, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    values, labels = mixture(200)
    np.savez("points.npz", data=values, labels=labels)
    tiny = "--steps 3 --batch 32 --network.width 16 --network.depth 1 --device cpu"
    for line, words in (
        (
            f"train points.npz {tiny} --out run --evaluate-every 3 --evaluate-samples 40",
            "run/samples/step-00000003.npz",
        ),
        ("sample run --seeds 0-9 --steps 2", "10 samples of step 3"),
        ("sample run --seeds 0-1 --steps 2 --out each --device cpu", "written: each"),
        ("evaluate run --samples 50 --steps 2 --metrics frechet --no-cache", "Frechet distance (values)"),
        ("probe points.npz --sources 16 --references 16 --noise-levels 1", "written to probes/points"),
        (f"compare points.npz {tiny} --seeds 0 --evaluations 1 --samples 40", "report: compare/points/report.html"),
        ("data inspect points.npz", "no picture"),
        ("bench points.npz --batch 4 --references 64 --pairs 1 --no-growth --device cpu", "with 200 references above"),
    ):
        assert status(line) == 0
        assert words in " ".join(capsys.readouterr().out.split())
    assert sorted(path.name for path in Path("each").iterdir()) == ["000000.npy", "000001.npy"]
    with np.load("run/samples/heun-2.npz") as found:
        assert found["data"].dtype == np.float32
    for line, words in (
        ("evaluate run --samples 50 --extractor inception", "--extractor inception measures 8-bit images"),
        ("sample run --out grid.png", "has the suffix .npz or .npy"),
        ("train points.npz --mirror", "flips and turns pictures"),
    ):
        assert status(line) == 2
        assert words in " ".join(capsys.readouterr().err.split())
