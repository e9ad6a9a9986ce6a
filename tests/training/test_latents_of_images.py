"""Latents of images: encoded once, trained on with fresh draws, sampled and evaluated as images."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.numpy import load_file
from safetensors.torch import save_file as save_tensors

import stablefield as sf
from stablefield._progress import Progress
from stablefield.cli.entry import main
from stablefield.data._augmentation import Augmentation
from stablefield.data._autoencoder import Autoencoder, AutoencoderRecord
from stablefield.data._latent_folder import open_latents
from stablefield.data._latents import encode
from stablefield.evaluation import RandomConvolutions
from stablefield.sampling._noise import SampleNoise
from stablefield.targets._moments import Moments
from stablefield.training._accelerator import make_accelerator
from stablefield.training._feed import Feed
from stablefield.training._held_out_loss import _mirrored
from stablefield.training._plan import make_plan
from stablefield.training._recipe import MLPConfig, Recipe
from stablefield.training._sampler import SamplerOptions
from stablefield.training._seeding import Purpose, generator_for
from stablefield.training._stepper import Stepper
from stablefield.training._weight_source import open_weights

RECIPE = Recipe(
    steps=4,
    batch=16,
    network=MLPConfig(width=16, depth=1),
    conditional=True,
    mirror=True,
    checkpoint_every=2,
    sample_every=0,
    noise_band=0.0,
)


def autoencoder(seed: int = 0, **options) -> AutoencoderKL:
    """An untrained one of two levels, whose standard deviations are far from 0."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        mid_block_add_attention=False,
        **options,
    ).eval()


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    return autoencoder(scaling_factor=0.7, shift_factor=0.2)


@pytest.fixture(scope="module")
def vae(model: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> sf.data.ImageSet:
    """Colour images of 8 x 12 pixels, in classes with names."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 45)
    pixels = rng.integers(0, 256, (45, 3, 8, 12), np.uint8) // 2 + (40 * labels[:, None, None, None]).astype(np.uint8)
    return sf.data.make_image_set(pixels, labels, sf.data.Origin(name="x", source="y", class_names=("a", "b", "c")))


@pytest.fixture(scope="module")
def latents(images, vae, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "latents"
    encode(images, out, vae=vae, batch=16, mirror=True, device="cpu")
    return out


@pytest.fixture(scope="module")
def run(latents, tmp_path_factory) -> sf.Run:
    # The set itself knows its place, too.
    latents = open_latents(latents)
    return sf.train(latents, recipe=RECIPE, out=tmp_path_factory.mktemp("runs") / "run", device="cpu")


def moments(model: AutoencoderKL, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        found = model.encode(torch.from_numpy(pixels.copy()).float() / 127.5 - 1).latent_dist
    return found.mean.numpy(), found.std.numpy()


def decoded(model: AutoencoderKL, values: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model.decode(torch.from_numpy(np.array(values)).float()).sample.numpy()
    return ((found + 1) * 127.5).round().clip(0, 255)


def test_moments_are_those_of_diffusers_and_of_the_mirrored_images_rounded_to_half_precision(images, latents, model):
    found = sf.data.open_images(latents)
    assert (found.shape, found.images.dtype, found.file.parent) == ((4, 4, 6), np.float16, latents)
    assert found.class_names == images.class_names
    np.testing.assert_array_equal(found.labels, images.labels)
    for moments_, pixels in ((found.moments, images.images), (found.flipped, images.images[..., ::-1])):
        for ours, theirs in zip((moments_.mean, moments_.std), moments(model, pixels), strict=True):
            # Half precision rounds by at most the 2048th part.
            assert np.abs(ours - theirs).max() <= 2**-11 * np.abs(theirs).max() + 1e-5
            assert ours.dtype == np.float16
    # The latent of a mirrored image is not the mirror image of its latent.
    assert np.abs(found.flipped.mean - found.moments.mean[..., ::-1]).max() > 0.1
    # `images` is a draw: in units of the deviations it is standard normal.
    normal = ((found.images - found.moments.mean.astype(np.float64)) / found.moments.std).ravel()
    assert abs(normal.mean()) < 4 / len(normal) ** 0.5
    assert abs(normal.std() - 1) < 3 / len(normal) ** 0.5
    found.verify()
    file = load_file(latents / "latents.safetensors")
    assert set(file) == {"mean", "std", "draws", "flipped_mean", "flipped_std", "labels"}
    np.testing.assert_array_equal(file["mean"], found.moments.mean)


def test_an_encoding_that_was_stopped_does_not_open_and_goes_on_to_the_same_bytes(images, latents, vae, tmp_path):
    def killed(progress: Progress) -> None:
        if progress.done == 32:
            raise KeyboardInterrupt

    arguments = {"vae": Autoencoder.open(vae, "cpu"), "batch": 16, "mirror": True}
    with pytest.raises(KeyboardInterrupt):
        encode(images, tmp_path / "out", **arguments, progress=killed)
    with pytest.raises(ValueError, match="is not complete: 32 of 45 images are encoded; call encode again"):
        sf.data.open_images(tmp_path / "out")
    with pytest.raises(ValueError, match="not a packed image set"):
        sf.data.open_images(tmp_path / "out" / "latents.safetensors")
    # What a kill may leave in the place of the next batch does not count.
    with (tmp_path / "out" / "latents.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\xff" * 100)
    counted = []
    encode(images, tmp_path / "out", **arguments, progress=lambda progress: counted.append(progress.done))
    assert counted == [45]
    for name in ("latents.safetensors", "latents.json"):
        assert (tmp_path / "out" / name).read_bytes() == (latents / name).read_bytes().replace(
            b'"name": "latents"', b'"name": "out"'
        )
    # A third call finds all done.
    encode(images, tmp_path / "out", **arguments, progress=lambda _: pytest.fail("encoded again"))


def test_a_second_call_that_begins_and_stops_takes_nothing_from_the_first(images, latents, vae, tmp_path, monkeypatch):
    """It begins when the first batch is written and not yet recorded."""
    arguments = {"vae": Autoencoder.open(vae, "cpu"), "batch": 16, "mirror": True}
    fsync, seen = os.fsync, []

    def second(descriptor: int) -> None:
        fsync(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").resolve().name == "latents.safetensors":
            seen.append(descriptor)
        if len(seen) == 2:  # the file was made, and then its first batch written
            monkeypatch.setattr("stablefield.data._latent_folder.LatentFolder.encode", stopped)
            with pytest.raises(KeyboardInterrupt):
                encode(images, tmp_path / "out", **arguments)
            monkeypatch.undo()

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stablefield.data._latent_folder.os.fsync", second)
    encode(images, tmp_path / "out", **arguments)
    assert len(seen) >= 2
    assert (tmp_path / "out" / "latents.safetensors").read_bytes() == (latents / "latents.safetensors").read_bytes()


def test_latents_that_know_no_place_of_their_autoencoder_ask_for_it(latents):
    record = sf.data.open_images(latents).autoencoder
    assert record is not None
    with pytest.raises(
        ValueError, match=r"^vae is missing: these latents were imported without the place .*: name it\."
    ):
        dataclasses.replace(record, place="").open(device="cpu")


@pytest.mark.parametrize("changed", ["images", "labels", "vae", "mirror", "dtype"])
def test_a_folder_of_other_latents_is_refused(changed, images, latents, vae, tmp_path):
    arguments = {"vae": vae, "mirror": True, "dtype": "float16", "device": "cpu"}
    other = images
    if changed == "images":
        other = sf.data.make_image_set(255 - images.images, images.labels, sf.data.Origin(name="x", source="y"))
    elif changed == "labels":
        other = dataclasses.replace(images, manifest=images.manifest | {"labels_sha256": "0" * 64})
    elif changed == "vae":
        arguments["vae"] = Autoencoder(autoencoder(seed=1), device="cpu")
    else:
        arguments[changed] = {"mirror": False, "dtype": "float32"}[changed]
    with pytest.raises(
        ValueError, match=r"holds latents of .*, and these have .*: pass the same, or name a new folder"
    ):
        encode(other, latents, **arguments)
    sf.data.open_images(latents)


def test_what_is_no_autoencoder_or_does_not_take_the_images_is_refused(images, vae, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match=r"cannot be used \(its config.json is of VQModel"):
        encode(images, tmp_path / "out", vae=tmp_path)
    with pytest.raises(ValueError, match="is not there: name the folder"):
        encode(images, tmp_path / "out", vae="nowhere")
    odd = sf.data.make_image_set(images.images[..., :11], None, sf.data.Origin(name="x", source="y"))
    with pytest.raises(ValueError, match=r"images of 11 x 8 pixels do not fit the autoencoder.*pass resolution=8"):
        encode(odd, tmp_path / "out", vae=vae)
    # Weights are safetensors alone.
    shutil.copytree(vae, tmp_path / "pickled")
    (tmp_path / "pickled" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be used"):
        encode(images, tmp_path / "out", vae=tmp_path / "pickled")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.update(encoded=3),
        lambda record: record.update(format="other"),
        lambda record: record["settings"].update(count=46),
        lambda record: record["manifest"].update(labels_sha256=None),
        lambda record: record["manifest"]["autoencoder"].update(shape=[3, 8]),
        lambda record: record["manifest"].pop("scaling"),
        lambda record: record.update(latent=[4, 4, 7]),
    ],
)
def test_a_damaged_record_is_refused(damage: Callable, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "latents.json").read_text())
    damage(record)
    (tmp_path / "out" / "latents.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is damaged"):
        sf.data.open_images(tmp_path / "out")


def feed_of(latents: Path, placement: str = "resident", **changes) -> Feed:
    recipe = dataclasses.replace(RECIPE, **({"references": "all"} | changes))
    return Feed(sf.data.open_images(latents), recipe, torch.device("cpu"), labelled=True, placement=placement)


def test_rows_and_references_are_draws_with_the_mean_and_std_of_their_images(latents):
    found = sf.data.open_images(latents)
    mean, std = (
        np.stack(
            [found.scaled_moments(slice(None), flipped=flipped)[k].astype(np.float64) for flipped in (False, True)]
        )
        for k in (0, 1)
    )
    # The scaling is that of a draw: the network sees (z - m) / (2 s).
    m, s = (np.array(values).reshape(-1, 1, 1) for values in (found.scaling.mean, found.scaling.std))
    assert np.abs(mean[0] - (found.moments.mean.astype(np.float64) - m) / (2 * s)).max() < 3e-3
    assert np.abs(std[0] - found.moments.std.astype(np.float64) / (2 * s)).max() < 3e-3
    feed, flips = feed_of(latents), torch.arange(16) % 2 == 1
    assert feed.rows(0, slice(None), flips).pool.resampled
    rows, references, steps = [], [], 400
    for step in range(steps):
        given = feed.rows(step, slice(None), flips)
        index = given.index.numpy()
        rows.append((given.pixels.numpy() - mean[flips.long(), index]) / std[flips.long(), index])
        if step % 2 == 0:  # an epoch has 2 steps
            drawn = np.stack([given.pool.data.numpy(), given.pool.flipped.numpy()])
            references.append((drawn - mean) / std)
    for normal in (np.stack(rows), np.stack(references)):
        n = normal.size
        assert abs(normal.mean()) < 5 / n**0.5 + 1e-3
        assert abs(normal.std() - 1) < 5 / n**0.5 + 1e-3
        # Rows, or images, are independent.
        assert normal.mean(-4).std() * normal.shape[-4] ** 0.5 == pytest.approx(1, abs=0.1)
        # One number has the same spread over steps: it is drawn anew each time.
        assert np.abs(normal.std(0) - 1).max() < 0.4


@pytest.mark.parametrize("references", ["all", 20])
def test_draws_are_functions_of_the_step_wherever_the_moments_are(references, latents):
    flips = torch.arange(16) % 3 == 0
    first, again = feed_of(latents, references=references), feed_of(latents, references=references)
    others = [again] if references == "all" else [again, feed_of(latents, "loaded", references=references)]
    found = {step: first.rows(step, slice(None), flips) for step in (0, 1, 2, 3)}
    for other in others:
        for step in (3, 0, 2):
            parts = [other.rows(step, part, flips[part]) for part in (slice(0, 5), slice(5, 16))]
            assert torch.equal(torch.cat([part.pixels for part in parts]), found[step].pixels)
        other.close()
    with pytest.raises(ValueError, match="references=sharded: latents of images are drawn anew"):
        make_plan(sf.data.open_images(latents), dataclasses.replace(RECIPE, references="sharded"), device="cpu")


@pytest.mark.parametrize("references", ["all", 20])
def test_a_step_regresses_on_the_posterior_mean_over_draws_with_the_row_itself_in_place_of_its_sample(
    references, latents
):
    recipe = dataclasses.replace(RECIPE, references=references, conditional=False)
    config = make_plan(sf.data.open_images(latents), recipe, device="cpu").config
    feed = Feed(sf.data.open_images(latents), recipe, torch.device("cpu"), labelled=False, placement="resident")
    stepper = Stepper(config, feed, make_accelerator(torch.device("cpu")))
    ((example, _),) = stepper.examples(1)
    flips = Augmentation(probability=0.0, flip_y=False).draw(16, generator_for(0, Purpose.AUGMENTATION, 1)).flips[:, 0]
    assert 0 < flips.sum() < 16
    rows = feed.rows(1, slice(None), flips)
    both = torch.stack([rows.pool.data, rows.pool.flipped]).double().flatten(2)
    for k in range(16):
        own = both.clone()
        own[int(flips[k]), rows.index[k]] = rows.pixels[k].half().double().flatten()
        square = (example.x[k].double().flatten() - own).square().sum(2)
        weights = (-square / (2 * example.noise_level[k].double() ** 2)).flatten().softmax(0)
        expected = weights @ own.flatten(0, 1)
        assert example.target.x0[k].double().flatten() == pytest.approx(expected, abs=2e-3)


def test_a_run_on_latents_resumes_bit_for_bit_and_shows_decoded_images(run, latents, tmp_path):
    assert run.config.autoencoder.shape == (3, 8, 12)
    assert run.drawn.suffix == ".png"
    assert run.drawn.is_file()
    for references in ("auto", 20):
        recipe = dataclasses.replace(RECIPE, references=references)
        whole = run if references == "auto" else sf.train(latents, recipe=recipe, out=tmp_path / "whole", device="cpu")
        stops = iter([False, False, True])
        out = tmp_path / str(references)
        stopped = sf.train(latents, recipe=recipe, out=out, device="cpu", stop=lambda stops=stops: next(stops))
        assert stopped.step == 3
        stopped.resume(device="cpu")
        for ema in ("none", "half-life"):
            ours, theirs = (one.model(ema).denoiser.state_dict() for one in (stopped, whole))
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_held_out_latents_are_never_drawn_from_and_looks_take_the_mirrored_images_latents(latents, tmp_path):
    found = open_latents(latents)
    run = sf.train(found, recipe=RECIPE, held_out=0.2, out=tmp_path / "run", device="cpu")
    assert run.metrics()[-1]["held_out_loss"] > 0
    rows, own = run.config.held_out.split(len(found), 0)
    assert (len(rows), len(own)) == (36, 9)
    # Of what is held out nothing is read: NaN there would show.
    gone = np.isin(np.arange(45), own)[:, None, None, None]
    moments, flipped = (
        Moments(np.where(gone, np.nan, one.mean), np.where(gone, np.nan, one.std))
        for one in (found.moments, found.flipped)
    )
    found = dataclasses.replace(found, moments=moments, flipped=flipped)
    for references, placement in (("all", "resident"), (20, "resident"), (20, "loaded")):
        recipe = dataclasses.replace(RECIPE, references=references)
        feed = Feed(found, recipe, torch.device("cpu"), labelled=True, placement=placement, rows=rows)
        given = feed.rows(0, slice(None), torch.arange(16) % 2 == 0)
        feed.close()
        assert all(value.isfinite().all() for value in (given.pixels, given.pool.data, given.pool.flipped))
    mirrored = _mirrored(open_latents(latents), rows, torch.empty(0), seed=0)
    mean, std = (torch.from_numpy(value).double() for value in open_latents(latents).scaled_moments(rows, flipped=True))
    assert ((mirrored - mean) / std).std() == pytest.approx(1, abs=0.1)


def test_samples_are_the_decoded_latents(run, model, tmp_path):
    images = run.sample(5, steps=3, device="cpu")
    raw = run.sample(5, steps=3, decode=False, device="cpu")
    assert (images.images.dtype, images.images.shape) == (np.uint8, (5, 3, 8, 12))
    assert (raw.images.dtype, raw.images.shape) == (np.float16, (5, 4, 4, 6))
    assert np.abs(images.images.astype(int) - decoded(model, raw.images)).max() <= 1
    assert images.class_names == ("a", "b", "c")
    flags = ("--steps", "3", "--seeds", "0-4", "--device", "cpu")
    for name, more in (("a.npz", ()), ("b.npy", ("--no-decode",)), ("c.png", ())):
        with pytest.raises(SystemExit) as exit_:
            main(["sample", str(run.path), "--out", str(tmp_path / name), *flags, *more])
        assert not exit_.value.code
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["arr_0"].transpose(0, 3, 1, 2), images.images)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), raw.images)


def test_evaluation_measures_decoded_images_against_decodings_or_given_images_or_the_latents(
    run, images, latents, model
):
    extractor = RandomConvolutions()
    options = {"samples": 20, "metrics": ["frechet"], "cache": False, "device": "cpu"}
    options["sampler"] = SamplerOptions(steps=2)

    def value(found) -> float:
        return found.scores[0].mean

    ours = run.evaluate(extractor=extractor, **options)
    assert ours.scores[0].protocol.reference == "latents, decoded"
    real = decoded(model, sf.data.open_images(latents).images).astype(np.uint8)
    drawn = run.sample(20, steps=2, device="cpu").images
    by_hand = sf.evaluate(drawn, data=real, extractor=extractor, metrics=["frechet"], cache=False, device="cpu")
    assert value(ours) == pytest.approx(value(by_hand), rel=0.02)
    given = run.evaluate(extractor=extractor, data=images, **options)
    by_hand = sf.evaluate(drawn, data=images, extractor=extractor, metrics=["frechet"], cache=False, device="cpu")
    assert value(given) == pytest.approx(value(by_hand), rel=1e-4)
    raw = run.evaluate(**options | {"sampler": SamplerOptions(steps=2, decode=False)})
    by_hand = sf.evaluate(
        run.sample(20, steps=2, decode=False, device="cpu").images, data=latents, metrics=["frechet"], cache=False
    )
    assert value(raw) == pytest.approx(value(by_hand), rel=1e-4)


def test_an_autoencoder_that_has_moved_is_named_anew_and_another_one_is_refused(run, vae, images, latents, tmp_path):
    expected = run.sample(2, steps=2, device="cpu").images
    shutil.move(vae, tmp_path / "moved")
    try:
        for call in (
            lambda **vae: run.sample(2, steps=2, device="cpu", **vae).images,
            lambda **vae: sf.train(latents, recipe=RECIPE, out=tmp_path / f"run{len(vae)}", device="cpu", **vae).drawn,
        ):
            with pytest.raises(
                ValueError, match=r"vae is missing: the autoencoder of these latents was .*, which is gone: name its"
            ):
                call()
            found = call(vae=tmp_path / "moved")
        assert found.is_file()
        np.testing.assert_array_equal(run.sample(2, steps=2, vae=tmp_path / "moved", device="cpu").images, expected)
        # Encoding again encodes nothing, and notes the place.
        shutil.copytree(latents, tmp_path / "noted")
        encode(images, tmp_path / "noted", vae=tmp_path / "moved", mirror=True, device="cpu", progress=pytest.fail)
        noted = sf.data.open_images(tmp_path / "noted")
        assert noted.autoencoder.place == str(tmp_path / "moved")
        assert sf.data.sample_grid(noted, 4).shape[2] == 3
        autoencoder(seed=1).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="has weights or settings of sha256"):
            run.sample(2, vae=tmp_path / "other", device="cpu")
    finally:
        shutil.move(tmp_path / "moved", vae)


def test_an_imported_network_is_decoded_by_the_autoencoder_that_the_caller_names(run, latents, vae, model, tmp_path):
    network = sf.networks.SiT((4, 6), 2, 4, 16, 1, 2, classes=3, generator=torch.Generator().manual_seed(0))
    save_tensors(network.state_dict(), tmp_path / "sit.safetensors")
    file = tmp_path / "sit.safetensors"
    imported = sf.interop.import_run(file, tmp_path / "sit", preconditioning="flow", heads=2)
    assert imported.sample(2, steps=2, vae=vae, device="cpu").images.shape == (2, 3, 8, 12)
    # Such networks see (latent - shift_factor) * scaling_factor.
    x = torch.randn(3, 4, 4, 6)
    found = imported.sampler(vae=vae, device="cpu").finish(x).numpy().astype(int)
    assert np.abs(found - decoded(model, x.numpy() / 0.7 + 0.2)).max() <= 1
    # A run that begins with them sees latents in that scaling, in which they were trained.
    data = sf.data.open_images(latents)
    found = [open_weights(source).recipe_for(data).latent_scaling for source in (imported, run)]
    assert found == ["autoencoder", "measured"]
    # The pipeline of an export includes it, and draws the same images.
    folder = imported.export(tmp_path / "exported", samples=2, steps=2, vae=vae)
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    z = SampleNoise((0, 1)).latents((4, 4, 6), dtype=torch.float64)
    theirs = pipe(latents=z, class_labels=[0, 1], num_inference_steps=3, output_type="np").images
    ours = imported.sample(2, steps=3, vae=vae, device="cpu").images.transpose(0, 2, 3, 1)
    assert np.abs(255 * theirs - ours).max() < 2
    assert "decoded to images of 3 x 8 x 12" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"vae=.* does nothing with decode=False"):
        run.sample(2, vae=vae, decode=False)
    autoencoder(latent_channels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="decodes latents of 3 channels, and the run's samples, 4 x 4 x 6, are no"):
        imported.sample(2, vae=tmp_path / "three")


def test_an_open_autoencoder_decodes_only_its_own_latents(latents, vae, model, tmp_path):
    data = open_latents(latents)
    own, other = Autoencoder.open(vae, "cpu"), Autoencoder(autoencoder(1), device="cpu")
    for budget in (2**31, 0):  # in memory, and by the file in the cache
        options = {"cache": tmp_path, "memory_budget": budget}
        found = sf.data.decode(data, vae=own, **options).images
        assert np.abs(np.array(found).astype(int) - decoded(model, data.images)).max() <= 1
        with pytest.raises(
            ValueError, match=rf"^vae has weights or settings of sha256 {other.sha256:.12}, and the lat"
        ):
            sf.data.decode(data, vae=other, **options)


def test_a_run_that_begins_with_one_on_latents_keeps_its_scaling_unless_asked_for_the_autoencoders(
    run, latents, tmp_path
):
    data = sf.data.open_images(latents)
    plain = sf.data.make_image_set(
        2 * data.images.astype(np.float32) + 0.3,
        data.labels,
        sf.data.Origin(name="x", source="y", class_names=("a", "b", "c")),
    )
    recipe = dataclasses.replace(RECIPE, mirror=False)
    other = sf.train(plain, recipe=recipe, out=tmp_path / "other", device="cpu", stop=lambda: True)
    plan = make_plan(data, RECIPE, init=other, device="cpu")
    assert (plan.config.scaling.mean, plan.config.scaling.std) == (other.config.scaling.mean, other.config.scaling.std)
    assert plan.config.scaling.dtype == "float16"
    assert plan.config.initial.notes[0].startswith("scaling: that of the source, mean ")
    asked = dataclasses.replace(RECIPE, latent_scaling="autoencoder")
    plan = make_plan(data, asked, init=other, device="cpu")
    assert (plan.config.scaling.mean, plan.config.scaling.std) == ((0.2,) * 4, (0.5 / 0.7,) * 4)
    assert "than this run, mean 0.2, std 0.7143" in plan.config.initial.notes[0]
    # Data that are no latents of images have no autoencoder to ask for.
    scaled = sf.train(data, recipe=asked, out=tmp_path / "scaled", device="cpu", stop=lambda: True)
    found = open_weights(scaled).recipe_for(plain)
    assert found.latent_scaling == "measured"
    plan = make_plan(plain, recipe, init=scaled, device="cpu")
    assert plan.config.scaling.std == (0.5 / 0.7,) * 4


def test_a_resume_that_refuses_the_autoencoder_leaves_the_configuration_as_it_was(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    autoencoder(seed=1).save_pretrained(tmp_path / "other")
    before = (tmp_path / "copy" / "config.json").read_bytes()
    for vae, words in ((tmp_path / "other", "has weights or settings of sha256"), (tmp_path / "none", "none")):
        with pytest.raises(ValueError, match=words):
            sf.Run(tmp_path / "copy").resume(steps=9, vae=vae, device="cpu")
        assert (tmp_path / "copy" / "config.json").read_bytes() == before


def test_exports_hold_the_autoencoder_or_name_it(run, vae, tmp_path):
    folder = run.export(tmp_path / "pipeline", samples=6, steps=2)
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    z = SampleNoise((0, 1, 2)).latents((4, 4, 6), dtype=torch.float64)
    theirs = pipe(latents=z, class_labels=["a", "b", "c"], num_inference_steps=5, output_type="np").images
    ours = run.sample(3, steps=5, device="cpu").images.transpose(0, 2, 3, 1)
    # Ours are rounded to the half precision of the data before they are decoded.
    assert np.abs(255 * theirs - ours).max() < 3
    sha256 = run.config.autoencoder.sha256
    assert Autoencoder.open(folder, "cpu").sha256 == Autoencoder.open(folder / "vae", "cpu").sha256 == sha256
    card = (folder / "README.md").read_text()
    assert "decoded to images of 3 x 8 x 12" in card
    assert "`vae/` holds it" in card
    assert str(vae.parent) not in card
    assert (folder / "samples.png").is_file()
    plain = run.export(tmp_path / "plain", format="plain", samples=0)
    record = json.loads((plain / "config.json").read_text())["autoencoder"]
    assert record == {"sha256": sha256, "scaling_factor": 0.7, "shift_factor": 0.2, "shape": [3, 8, 12]}
    card = (plain / "README.md").read_text()
    assert sha256 in card
    assert "This folder does not hold it" in card


def test_scaling_by_the_autoencoders_own_factor_is_that_of_published_networks(latents):
    plan = make_plan(
        sf.data.open_images(latents), dataclasses.replace(RECIPE, latent_scaling="autoencoder"), device="cpu"
    )
    values = np.random.default_rng(0).normal(size=(3, 4, 4, 6))
    # diffusers: latents = (z - shift_factor) * scaling_factor.
    assert plan.config.scaling.apply(values) == pytest.approx((values - 0.2) * 0.7, abs=1e-6)
    assert plan.data.scaling == plan.config.scaling
    with pytest.raises(ValueError, match="latent_scaling=autoencoder is for latents of images"):
        make_plan(sf.data.open_images("digits"), Recipe(latent_scaling="autoencoder"), device="cpu")


def test_the_autoencoders_own_scaling_takes_its_statistics_of_each_channel(images, tmp_path):
    mean, std = [1.0, -2.0, 0.0, 4.0], [2.0, 0.5, 1.0, 3.0]
    model = autoencoder(scaling_factor=0.7, shift_factor=9.0, latents_mean=mean, latents_std=std)
    model.save_pretrained(tmp_path / "vae")
    data = encode(images, tmp_path / "latents", vae=tmp_path / "vae", mirror=True, device="cpu")
    z = np.random.default_rng(0).normal(size=(3, 4, 4, 6))
    # diffusers, as in StableDiffusionXLPipeline: z = x * latents_std / scaling_factor + latents_mean, without shift_factor.
    centre, spread = (np.array(values)[:, None, None] for values in (mean, std))
    x = (z - centre) * 0.7 / spread
    plan = make_plan(data, dataclasses.replace(RECIPE, latent_scaling="autoencoder"), device="cpu")
    np.testing.assert_allclose(plan.config.scaling.apply(z), x, atol=1e-5)
    found = Autoencoder.open(tmp_path / "vae", "cpu")
    np.testing.assert_allclose(found.unscaled(torch.from_numpy(x)).numpy(), z, atol=1e-5)
    # The record is the same after JSON, and that of other autoencoders what earlier versions read.
    assert open_latents(tmp_path / "latents").autoencoder == found.record((3, 8, 12))
    assert not {"latents_mean", "latents_std"} & set(Autoencoder(autoencoder(), device="cpu").record((3, 8, 12)).record)
    assert ("  its scaling", "0.7, of channels of mean 1, -2, 0, 4; std 2, 0.5, 1, 3") in sf.data.summary(data)

    network = sf.networks.SiT((4, 6), 2, 4, 16, 1, 2, classes=3, generator=torch.Generator().manual_seed(0))
    save_tensors(network.state_dict(), tmp_path / "sit.safetensors")
    file = tmp_path / "sit.safetensors"
    imported = sf.interop.import_run(file, tmp_path / "sit", preconditioning="flow", heads=2)
    x = torch.randn(3, 4, 4, 6)
    drawn = imported.sampler(vae=tmp_path / "vae", device="cpu").finish(x).numpy().astype(int)
    assert np.abs(drawn - decoded(model, x.numpy() * spread / 0.7 + centre)).max() <= 1
    folder = imported.export(tmp_path / "pipe", samples=0, vae=tmp_path / "vae")
    scaling = json.loads((folder / "model_index.json").read_text())["scaling"]
    np.testing.assert_allclose(scaling["mean"], mean)
    np.testing.assert_allclose(2 * np.array(scaling["std"]), np.array(std) / 0.7)
    # Statistics of another number of channels are refused.
    autoencoder(latents_mean=[0.0], latents_std=[1.0]).save_pretrained(tmp_path / "one")
    with pytest.raises(
        ValueError, match=r"one: its config\.json has latents_mean .*: repair it, .* each of the 4 channels"
    ):
        imported.export(tmp_path / "no", samples=0, vae=tmp_path / "one")
    for mean, std in (([[1.0] * 4], [1.0] * 4), ([1.0] * 4, [1.0] * 3), ([1.0] * 4, [0.0] + [1.0] * 3)):
        with pytest.raises(ValueError, match=r"^vae=.*: its config\.json has latents_mean .*: repair it"):
            Autoencoder(autoencoder(latents_mean=mean, latents_std=std), device="cpu").record((3, 8, 12))
    record = found.record((3, 8, 12)).record | {"latents_mean": None, "latents_std": None}
    assert AutoencoderRecord.of_manifest({"autoencoder": record}).latents_std == ()


def test_a_run_within_a_time_leaves_time_to_decode_its_pictures(latents, monkeypatch):
    def slow(self, latents):
        time.sleep(0.02 * len(latents))
        return plain(self, latents)

    plain = Autoencoder.decode
    plan = make_plan(sf.data.open_images(latents), RECIPE, device="cpu")
    monkeypatch.setattr(Autoencoder, "decode", slow)
    assert plan.within("100s", "cpu").costs.picture > 64 * 0.02


def test_mirrored_latents_must_be_encoded(images, vae, tmp_path):
    plain = encode(images, tmp_path / "plain", vae=vae, dtype="float32", device="cpu")
    assert (plain.images.dtype, plain.flipped) == (np.float32, None)
    with pytest.raises(
        ValueError, match="mirror=True needs the latents of the mirrored images: encode the images with"
    ):
        make_plan(plain, RECIPE, device="cpu")
    with pytest.raises(ValueError, match="the data are latents of images: pass augmentation=0"):
        make_plan(plain, dataclasses.replace(RECIPE, mirror=False, augmentation=0.1), device="cpu")
    with pytest.raises(ValueError, match="has no moments of mirrored images"):
        plain.scaled_moments(slice(None), flipped=True)


def test_the_command_encodes_a_folder_with_a_bar_and_shows_it(vae, tmp_path, capsys):
    def command(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return f"{exit_.value.code} {' '.join((found.out + found.err).split())}"

    rng = np.random.default_rng(0)
    np.savez(tmp_path / "grey.npz", images=rng.integers(0, 256, (90, 8, 8), np.uint8), labels=np.arange(90) % 3)
    encoded = ("data", "encode", tmp_path / "grey.npz", tmp_path / "out", "--vae", vae, "--device", "cpu")
    out = command(*encoded, "--batch", 30)
    assert "90 latents of 4 x 4 x 4 float16 values, 3 classes" in out
    out = command("data", "inspect", tmp_path / "out", "--out", tmp_path / "grid.png")
    assert f"autoencoder {vae}" in out
    assert (tmp_path / "grid.png").is_file()
    out = command(*encoded, "--mirror")
    assert out.startswith(f"2 stablefield: DEST {tmp_path / 'out'} holds latents of mirror False, and these have True")
    probe = sf.probe(tmp_path / "out", sources=64, references=(16, 64), device="cpu")
    assert "64" in str(probe)


def test_latents_of_another_autoencoder_are_refused_or_noted(run, images, latents, vae, tmp_path):
    # Of the same images, shape and dtype, by other weights.
    autoencoder(1).save_pretrained(tmp_path / "vae")
    other = encode(images, tmp_path / "other", vae=tmp_path / "vae", mirror=True, device="cpu")
    own = open_latents(latents)
    theirs, ours = other.autoencoder.sha256[:12], own.autoencoder.sha256[:12]
    assert theirs != ours
    origin = sf.data.Origin(name="part", source="y", class_names=images.class_names)
    part = sf.data.make_image_set(255 - images.images[::2], images.labels[::2], origin)
    for fits in (False, True):
        place = vae if fits else tmp_path / "vae"
        outside = encode(part, tmp_path / f"part{fits}", vae=place, mirror=True, device="cpu")
        if fits:
            assert make_plan(own, RECIPE, held_out=outside, device="cpu").config.held_out.count == 23
            continue
        with pytest.raises(ValueError, match=f"^held_out=part.* {theirs}, the training data of {ours}: encode both"):
            make_plan(own, RECIPE, held_out=outside, device="cpu")
        with pytest.raises(ValueError, match=f"^held_out=part.* {theirs}, data of {ours}: encode both with one"):
            sf.ExcessLoss(own, held_out=outside)

    begun = sf.train(other, recipe=RECIPE, init=run, out=tmp_path / "begun", device="cpu")
    told = (
        f"the source was trained on latents of the autoencoder {ours}, this run trains on those of {theirs}: the copied "
        "weights see other values than they were trained on."
    )
    assert told in begun.config.initial.notes
    for format_ in ("run", "plain"):
        source = run if format_ == "run" else run.export(tmp_path / "plain", format="plain", samples=0)
        for data, noted in ((other, True), (own, False)):
            assert (told in make_plan(data, RECIPE, init=source, device="cpu").config.initial.notes) == noted

    # The same scaling, so that nothing but the autoencoder differs.
    assert begun.config.scaling == run.config.scaling
    with pytest.raises(
        ValueError, match=f"^guide=.*latents of the autoencoder {theirs}, the run of {ours}: take a run"
    ):
        run.sample(2, sampler=SamplerOptions(guide=begun.path, guidance_scale=2.0), device="cpu")

    options = {"samples": 20, "metrics": ["frechet"], "cache": False, "device": "cpu"}
    for decode in (True, False):
        options["sampler"] = SamplerOptions(steps=2, decode=decode)
        with pytest.raises(
            ValueError, match=f"^data=.* latents of the autoencoder {theirs}, and the samples of {ours}"
        ):
            run.evaluate(data=other, extractor=RandomConvolutions() if decode else None, **options)
    with pytest.raises(ValueError, match=f"^held_out=.* of the autoencoder {theirs}, and the samples of {ours}"):
        run.evaluate(held_out=other, **options | {"metrics": ["nearest"]})
    with pytest.raises(ValueError, match=f"^data=.* latents of the autoencoder {theirs}, and the samples of {ours}"):
        sf.evaluate(own, data=other, metrics=["frechet"], cache=False)

    network = sf.networks.SiT((4, 6), 2, 4, 16, 1, 2, classes=3, generator=torch.Generator().manual_seed(0))
    save_tensors(network.state_dict(), tmp_path / "sit.safetensors")
    file = tmp_path / "sit.safetensors"
    imported = sf.interop.import_run(file, tmp_path / "sit", preconditioning="flow", heads=2)
    with pytest.raises(ValueError, match=r"^vae is missing: data=.* in the units of their autoencoder, and the run"):
        imported.evaluate(data=own, **options)
    assert imported.evaluate(data=np.asarray(own.images), **options).scores
    options["sampler"] = SamplerOptions(steps=2)
    with pytest.raises(
        ValueError, match=r"^vae is missing: data=.* holds images, and the run was imported without one"
    ):
        imported.evaluate(data=images, **options)
    options["extractor"] = RandomConvolutions()
    assert imported.evaluate(data=images, **options | {"sampler": SamplerOptions(steps=2, vae=str(vae))}).scores
    grey = sf.data.make_image_set(images.images[:, :1], None, origin)
    with pytest.raises(
        ValueError, match=r"has images of 1 x 8 x 12 .* are 3 x 8 x 12: .*; open them with colour=rgb\.$"
    ):
        run.evaluate(data=grey, **options)
