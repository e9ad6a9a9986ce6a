"""The probe as one call: of images, tensors and runs, with results that print, save and show themselves."""

import csv
import dataclasses
import functools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import stablefield as sf
from stablefield._progress import Progress
from stablefield.data._image_set import Origin, make_image_set
from stablefield.probing import _batch as batch
from stablefield.probing import _bias_probe as bias_probe
from stablefield.probing._floor import LossFloor
from stablefield.probing._population import Population
from stablefield.probing._variance import find_noise_levels, measure_variance
from stablefield.report import render_page
from stablefield.training._run_probe import usual_training

FEW = {"references": (4, 16), "noise_levels": [0.5, 2.0, 30.0], "sources": 16, "device": "cpu"}


@pytest.fixture(autouse=True, scope="module")
def fewest_batches():
    """As of data so large that more would take too long: the tests of `measure_batch` hold what the batches show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "_MOST", batch._FEWEST)
        yield


@pytest.fixture(scope="module")
def found(digits):
    return sf.probe(digits, **FEW)


def test_the_function_probes_and_the_package_stays_a_package(found, digits):
    assert isinstance(found, sf.probing.Probe)
    assert sf.probing.__name__ == "stablefield.probing"
    assert found.training.batch == 128  # as train chooses it
    assert found.references is None
    assert sorted(found.curve.stf) == [4, 16]
    assert found.advice.band == found.noise_band.level == sf.pick_noise_band(sf.Pool(torch.tensor(digits.images))).level


def test_a_name_is_opened_and_says_the_same_as_its_images(found):
    named = sf.probe("digits", **FEW)
    assert (named.summary, named.name) == (found.summary, "digits")
    torch.testing.assert_close(named.curve.dsm.mean, found.curve.dsm.mean)


def test_tensors_and_arrays_of_any_shape_are_probed():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(200, 4, 3, 3, generator=generator)
    one = sf.probe(latents, **FEW)
    two = sf.probe(latents.numpy(), **FEW)
    assert one.to_dict()["data"] == {"count": 200, "shape": [4, 3, 3], "dtype": "float32"}
    torch.testing.assert_close(one.curve.dsm.mean, two.curve.dsm.mean)
    rows = sf.probe(latents.flatten(1), **FEW)
    torch.testing.assert_close(one.curve.dsm.mean, rows.curve.dsm.mean)
    part = sf.probe(latents, **FEW, max_images=50)
    assert (part.curve.samples, part.curve.drawn_from) == (50, 200)
    assert "sampled: 50 of 200 images represent the data set" in str(part)


def test_float_data_are_measured_as_they_are_and_said_to_be_unless_train_would_not_scale_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = 7 + 3 * torch.randn(200, 2, 3, 3, generator=generator)
    np.save(tmp_path / "values.npy", values.numpy())
    opened = sf.data.open_images(tmp_path / "values.npy")
    as_given, scaled = sf.probe(values, **FEW), sf.probe(opened, **FEW)
    assert as_given.noise_band.level > 3 * scaled.noise_band.level
    for found, said in (
        (as_given, "Noise band for these values as they are; train scales float data first, as open_images does:"),
        (scaled, "Noise band that train uses:"),
        (sf.probe(torch.tensor(opened.scaled(slice(None))), **FEW), "Noise band that train uses:"),
        (sf.probe(torch.randint(256, (50, 1, 4, 4), dtype=torch.uint8), **FEW), "Noise band that train uses:"),
    ):
        assert said in " ".join(str(found).split())
        assert found.to_dict()["values_as_given"] == found.as_given == ("as they are" in said)
        assert str(found).count("Noise band") == 1
    notes = [figure.note for figure in as_given.page().blocks[0].figures]
    assert notes[0] == "for these values as they are"


@pytest.mark.usefixtures("without_charts")
def test_a_sample_of_the_data_is_never_called_all_of_them(digits):
    """With 200 of the 1,797 digits, which no measured size stands for, the advice is the whole set or as many as fit."""
    found = sf.probe(digits, **FEW, max_images=200)
    text, page = " ".join(str(found).split()), render_page(found.page())
    assert "batches of 128, all 1,797 references: " in text
    assert "of the single sample's, by a sample of 200." in text
    assert "Take all 1,797 references, or as many as fit: a sample of 200 cannot say how many are enough" in text
    assert re.search(r"% with the batch alone, [\d.]+ ± [\d.]+ % with the 200 sampled\.", text)
    for words in (text, page):
        assert "all 200" not in words
        assert "leave none" not in words
        assert "remains with them" not in words
    assert "all samples as references it is 0" not in page
    assert found.advice.recommended.size == found.advice.sizes[-1].size == 1797
    # Of the cost of the whole set, and not that of the sample.
    small, whole = found.advice.sizes[0], found.advice.recommended
    assert whole.seconds / small.seconds == pytest.approx(1797 / 4)
    record = found.to_dict()["advice"]
    assert record["recommended_references"] == record["sizes"][-1]["references"] == 1797
    # A size that is enough for the sample is recommended as before.
    few = sf.probe(digits, **FEW, max_images=200, aim=0.9, batch=4)
    text = " ".join(str(few).split())
    assert re.search(r"Take 16 references: they leave [\d.]+% \(±", text)
    assert "% with 16, " in text
    assert "all 200" not in text
    assert "leave none" not in text


def test_two_trainings_of_one_name_are_told_apart_by_their_noise_levels(digits):
    edm, mild = (
        sf.probe(digits, training=sf.probing.Training(noise_levels=levels, batch=128), **FEW)
        for levels in (sf.LogNormal(stratified=True), sf.LogNormal(-0.4, 1.0))
    )
    assert edm.summary.startswith("EDM, LogNormal(-1.2, 1.2), batches of 128, ")
    assert mild.summary.startswith("EDM, LogNormal(-0.4, 1), batches of 128, ")
    # Stratified or not, the levels are equal.
    assert re.search(r"can gain: \d+ %; VE \d+ %, VP \d+ %, flow \d+ %\.$", edm.summary)
    shown = re.search(r"can gain: \d+ %; usual EDM (\d+) %, VE \d+ %, VP \d+ %, flow \d+ %\.$", mild.summary)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(100 * edm.advice.share, abs=0.5)


def test_labels_keep_posteriors_within_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    data = torch.randn(120, 6, generator=generator) + 8.0 * labels[:, None]
    apart, together = sf.probe(data, labels=labels, **FEW), sf.probe(data, **FEW)
    # With all noise, what is left is the variance within classes, or that of all.
    assert float(apart.curve.dsm.mean[-1]) < 0.2 * float(together.curve.dsm.mean[-1])
    images = make_image_set(
        np.random.default_rng(0).integers(0, 256, (60, 1, 4, 4), np.uint8),
        labels[:60].numpy(),
        Origin(name="x", source="x"),
    )
    assert sf.probe(images, by_class=True, **FEW).curve.total < sf.probe(images, **FEW).curve.total


def test_a_training_of_ones_own_is_advised_on(found, digits):
    training = sf.probing.Training(process=sf.VE(), noise_levels=sf.LogUniform(), weighting=sf.SNRWeighting(), batch=32)
    other = sf.probe(digits, training=training, **FEW)
    assert other.summary.startswith("VE, LogUniform(0.02, 100), batches of 32, all 1,797 references")
    # Of noise levels log-uniform from 0.02 to 100, and of ln sigma ~ N(-0.4, 1), those above the band.
    band = other.advice.band
    assert other.advice.share == pytest.approx(math.log(100 / band) / math.log(100 / 0.02), abs=1e-3)
    assert found.advice.share == pytest.approx(math.erfc((math.log(found.advice.band) + 0.4) / 2**0.5) / 2, abs=1e-3)
    assert sf.probe(digits, training=training, batch=16, **FEW).batch.batch == 16
    assert usual_training(digits, torch.device("cpu")).batch == 128


def test_what_is_printed_fits_a_terminal(found):
    lines = str(found).splitlines()
    first = " ".join(lines[:2])
    assert first.startswith("EDM, LogNormal(-0.4, 1), batches of 128, all 1,797 references: ")
    assert any(re.match(r"Gradient's variance when training starts: [\d.]+ ± [\d.]+ % of the single", x) for x in lines)
    assert len(lines) > 10
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.usefixtures("without_charts")
def test_a_probe_saves_itself_and_shows_itself_in_a_notebook(found, tmp_path):
    record = json.loads(found.save(tmp_path / "probe.json").read_text())
    assert record == json.loads(json.dumps(found.to_dict()))
    assert record["advice"]["recommended_references"] == found.advice.recommended.size
    assert found.save(tmp_path / "probe.html").read_text().count("<svg") == 3
    assert found.save(tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    names = [path.name for path in found.save_all(tmp_path / "new", "probe")]
    assert names == ["probe.json", "variance.csv", "variance.png", "phases.png", "references.png", "report.html"]
    assert found.save(tmp_path / "probe.csv").read_bytes() == (tmp_path / "new" / "variance.csv").read_bytes()
    with (tmp_path / "new" / "variance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["noise_level"]) for row in rows] == pytest.approx(FEW["noise_levels"])
    assert found._repr_html_().startswith("<iframe srcdoc=")
    assert repr(found) == str(found)
    with pytest.raises(ValueError, match=r"probe\.txt.*name a \.json file"):
        found.save(tmp_path / "probe.txt")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_a_name_of_data_that_is_markup_stays_text_in_the_report():
    name = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), np.uint8)
    images = make_image_set(pixels, None, Origin(name=name, source="a test"))
    found = sf.probe(images, **FEW)
    reader = Tags()
    reader.feed(render_page(found.page()))
    assert not {"script", "img"} & set(reader.tags)
    assert name in reader.text


def test_progress_is_told_stage_by_stage_to_the_end(digits):
    seen: list[Progress] = []
    sf.probe(digits, **FEW, progress=seen.append)
    stages = list(dict.fromkeys(report.stage for report in seen))
    assert stages == ["measuring the variance", "measuring batches"]
    for stage in stages:
        last = [report for report in seen if report.stage == stage][-1]
        assert last.done == last.total > 0


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"references": (0,)}, r"^references is \(0,\): pass sizes of at least 1"),
        ({"aim": 2.0}, "^aim is 2"),
        ({"max_images": 1}, "^max_images is 1"),
        ({"batch": 0}, "^batch is 0"),
        ({"noise_levels": [-1.0]}, "^noise_levels="),
        ({"sources": 1}, "^sources is 1"),
        ({"device": "abacus"}, "^device='abacus'"),
        ({"by_class": True}, "^by_class is set, but samples has no classes"),
    ],
)
def test_errors_name_the_argument(named, message):
    with pytest.raises(ValueError, match=message):
        sf.probe(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), **{**FEW, **named})
    with pytest.raises(TypeError, match="data is "):
        sf.probe(7)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        sf.probe("nowhere")


def test_the_floor_of_a_log_with_dropped_labels_is_that_of_the_run(tmp_path) -> None:
    """Rows whose label was dropped have all classes for their posterior: the run's own log mixes both floors."""
    recipe = dataclasses.replace(
        sf.training.DIGITS,
        steps=4,
        batch=512,
        log_every=2,
        sample_every=0,
        conditional=True,
        label_dropout=0.5,
        network=sf.training.MLPConfig(width=8, depth=1),
    )
    run = sf.train("digits", out=tmp_path / "run", recipe=recipe, held_out=0.1, device="cpu")
    own = run.metrics()[-1]["loss_minus_floor"]
    found = sf.probe(run.path, sources=300, device="cpu")
    assert isinstance(found, sf.probing.NetworkProbe)
    line = run.metrics()[-1]
    edges = torch.tensor(line["bin_edges"], dtype=torch.float64)
    levels = recipe.process.noise_level(
        recipe.noise_levels.quantile((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096, recipe.process)
    )
    weights = torch.bincount(torch.bucketize(levels, edges), minlength=len(edges) + 1) / len(levels)
    mean = sum(float(w) * e for w, e in zip(weights, found.logged[-1].excess, strict=True) if e is not None)
    assert mean == pytest.approx(own, abs=0.02)
    augmented = dataclasses.replace(
        recipe,
        augmentation=0.1,
        conditional=False,
        label_dropout=0.0,
        steps=2,
        batch=16,
        network=sf.training.SongUNetConfig(base_channels=8, multipliers=(1,), blocks=1),
    )
    other = sf.train("digits", out=tmp_path / "other", recipe=augmented, device="cpu")
    found = sf.probe(other.path, sources=32, device="cpu")
    assert found.logged == ()
    assert "augmentation changes the data" in str(found)


def test_the_record_says_for_which_training_the_advice_is(digits) -> None:
    records = [
        sf.probe(digits, **FEW, training=sf.probing.Training(noise_levels=levels, batch=16)).to_dict()
        for levels in (sf.LogNormal(), sf.LogNormal(-0.4, 1.0))
    ]
    assert [record["training"]["noise_levels"] for record in records] == [
        str(sf.LogNormal()),
        str(sf.LogNormal(-0.4, 1.0)),
    ]
    assert all({"process", "weighting", "batch"} < set(record["training"]) for record in records)
    assert all(record["noise_band"]["level"] > 0 for record in records)


def test_labels_of_the_callers_have_no_names_of_the_sets_classes(digits) -> None:
    few = sf.data.make_image_set(
        digits.images[:120],
        digits.labels[:120] % 2,
        sf.data.Origin(name="pets", source="made", class_names=("cat", "dog")),
    )
    dark = (few.images.mean((1, 2, 3)) > few.images.mean()).astype(np.int64)
    named = sf.probe(few, **FEW, by_class=True)
    mine = sf.probe(few, **FEW, labels=dark)
    assert [label.name for label in named.labels[:2]] == ["cat", "dog"]
    assert [label.name for label in mine.labels[:2]] == ["0", "1"]


@pytest.mark.usefixtures("without_charts")
def test_a_network_of_ones_own_is_held_against_the_optimum(digits, tmp_path):
    class Mean:
        """D(x, sigma) = 0: far from the optimum where noise is small, at it where only the mean is left."""

        def __call__(self, x, sigma, class_labels=None):  # noqa: ARG002
            return torch.zeros_like(x)

    data = torch.tensor(digits.images[:100]).float() / 127.5 - 1
    data -= data.mean(0)
    seen: list[Progress] = []
    found = sf.probing.probe_network(
        Mean(), data, noise_levels=[0.1, 200.0], sources=50, name="zero", device="cpu", progress=seen.append
    )
    assert [(report.stage, report.done, report.total) for report in seen] == [
        ("measuring the optimum", 50, 50),
        ("measuring the network", 1, 1),
    ]
    near, far = (found.fit.distance.mean / found.fit.loss.mean).tolist()
    assert near > 0.9
    assert far < 0.01
    assert found.summary.startswith("The network is farthest from the optimum at noise level 0.1")
    assert all(len(line) <= 80 for line in str(found).splitlines())
    names = [path.name for path in found.save_all(tmp_path, "probe")]
    assert names == ["probe.json", "fit.csv", "distance.png", "excess.png", "report.html"]


def test_a_network_is_measured_where_its_training_has_noise(rng):
    """Samples so far from each other that they have no variance at nine tenths of EDM's noise levels."""
    data = 3 * torch.randn(64, 3, 8, 8, generator=rng)
    few = {"sources": 16, "device": "cpu"}
    one_of_100, one_of_1000 = math.exp(-1.2 - 1.2 * 2.3263), math.exp(-1.2 + 1.2 * 3.0902)

    def wrong_at_high_noise(x, sigma, class_labels=None):
        return x + sigma[:, None, None, None]

    levels = find_noise_levels(Population(data))
    assert float(levels[0]) > 1
    assert float(levels[-1]) > 2 * one_of_1000
    found = sf.probing.probe_network(wrong_at_high_noise, data, **few)
    measured = found.fit.noise_level
    assert float(measured[0]) == pytest.approx(one_of_100, rel=1e-3)
    assert measured[-len(levels) :].tolist() == levels.tolist()
    assert float((measured[1:] / measured[:-1]).max()) < 1.91
    assert found.trained == pytest.approx((one_of_100, one_of_1000), rel=1e-3)
    inside = measured[measured <= one_of_1000]
    assert f"farthest from the optimum at noise level {float(inside[-1]):.2g}," in found.summary
    assert f"at noise level {float(inside[-1]):.2g}" in str(found.page().blocks[0])
    # A wider training, whose end lies beyond the data's levels.
    flow = sf.probing.Training(process=sf.RectifiedFlow(), noise_levels=sf.Uniform(0.0, 1.0))
    wide = sf.probing.probe_network(wrong_at_high_noise, data, training=flow, **few)
    assert wide.trained == pytest.approx((1 / 99, 999), rel=1e-3)
    assert float(wide.fit.noise_level[-1]) == pytest.approx(999, rel=1e-3)
    # Levels that are given remain as they are; of these only the second is in the training, of those none.
    given = sf.probing.probe_network(wrong_at_high_noise, data, noise_levels=[0.001, 5.0, 80.0], **few)
    assert given.fit.noise_level.tolist() == [0.001, 5.0, 80.0]
    assert "at noise level 5," in given.summary
    assert "training hardly draws" not in str(given)
    outside = sf.probing.probe_network(wrong_at_high_noise, data, noise_levels=[60.0, 80.0], **few)
    assert "note: training hardly draws these noise levels: it draws 0.018 to 12" in str(outside).splitlines()
    assert "at noise level 80," in outside.summary


def test_the_loss_above_the_floor_over_training_does_not_depend_on_the_levels_that_are_shown(two_gaussians):
    """A network off by 0.2 in every number has an excess of 0.04 at any level; a log of its floor has one of 0.04, too."""
    population = Population(two_gaussians[:400])
    training = sf.probing.Training(noise_levels=sf.LogUniform(0.3, 5), weighting=sf.SNRWeighting(power=0), batch=32)
    curve = measure_variance(population, torch.logspace(-1.2, 1.2, 60), sizes=(), sources=400, draws=8)
    edges = (0.6, 1.5)
    floor = LossFloor.of(curve, training.weighting).bins(edges, training)
    log = [{"step": 3, "bin_edges": list(edges), "bin_loss": (floor + 0.04).tolist()}]
    for levels in (None, [1.0], [0.4, 2.0]):
        found = sf.probing.probe_network(
            lambda x, sigma, class_labels=None: x,
            two_gaussians[:400],
            training=training,
            noise_levels=levels,
            sources=400,
            log=log,
            device="cpu",
        )
        assert found.logged[0].excess == pytest.approx((0.04,) * 3, abs=0.02), levels


def test_the_bias_check_is_one_call(tmp_path, monkeypatch):
    """With a tenth of its rows; with all of them every fault is seen, as the test of the command holds."""
    monkeypatch.setattr(bias_probe, "check_bias", functools.partial(bias_probe.check_bias, batches=30))
    labels = np.arange(90) % 3
    noise = np.random.default_rng(0).normal(60, 40, (90, 4, 4))
    data = np.clip(70 * labels[:, None, None] + noise, 0, 255).astype(np.uint8)
    found = sf.probing.probe_bias(data, labels=labels, device="cpu")
    assert found.passed
    assert found.planted == ("source left out", "source included twice", "classes mixed")
    assert not found.checks["source left out"].passed
    assert "fault: source left out" in str(found)
    assert "BIASED" in found.save(tmp_path / "bias.html").read_text()
    assert json.loads(found.save(tmp_path / "bias.json").read_text())["checks"]["the batch"]["passed"]


def test_a_labelled_set_says_what_each_label_can_gain_at_uniform_and_logit_normal_times(rng) -> None:
    # Latents: floats of any shape. Label 1 is denser than label 0, and label 2 has one sample.
    labels = torch.tensor([0] * 40 + [1] * 59 + [2])
    data = torch.randn(100, 2, 3, 3, generator=rng) * torch.tensor([1.0, 0.3, 1.0])[labels][:, None, None, None]
    found = sf.probe(data, labels=labels, **FEW)
    band = found.noise_band
    assert band.by_label is not None
    assert [one.label for one in found.labels] == [0, 1, 2, None]
    assert [one.samples for one in found.labels] == [40, 59, 1, 100]
    for one, level in zip(found.labels, (*band.by_label, band.unlabelled), strict=True):
        assert level is not None
        # sigma / alpha = t / (1 - t).
        assert one.shares["flow at uniform times"] == pytest.approx(1 / (1 + level), abs=1e-6)
        normal = 0.5 * math.erfc(math.log(level) / math.sqrt(2)) if level < math.inf else 0.0
        assert one.shares["flow at logit-normal times"] == pytest.approx(normal, abs=1e-6)
    assert found.labels[1].level < found.labels[0].level < found.labels[2].level == math.inf
    text = str(found)
    sentence = next(line for line in found.findings if "by label" in line)
    shares = [100 * one.shares["flow at uniform times"] for one in found.labels[:3]]
    assert f"by label: flow {shares[2]:.0f} % (2) to {shares[1]:.0f} % (1); logit-normal 0 % to" in sentence
    assert max(map(len, text.splitlines())) <= 80
    assert [one["name"] for one in found.to_dict()["labels"]] == ["0", "1", "2", "no label"]
    assert any(getattr(block, "title", "") == "Labels" for block in found.page().blocks)
    assert sf.probe(data, **FEW).labels == ()
