"""`stablefield sample`: every sampler, grid, EMA, class and guide by its flag, and the same images from two processes."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stablefield as sf
from forks import Fork
from pictures import whole_pictures
from stablefield import sampling
from stablefield.cli.entry import main
from stablefield.data import open_images
from stablefield.data._image_set import renumbered
from stablefield.data._png import class_grid
from stablefield.sampling._noise import SampleNoise
from stablefield.sampling._seeded_images import to_uint8
from stablefield.training._model import open_model

TINY = ["--steps", "30", "--network.width", "16", "--network.depth", "1", "--sample-every", "0"]


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


def drawn(run: Path, out: Path, *flags: str) -> dict[str, np.ndarray]:
    assert status("sample", str(run), "--out", str(out), "--overwrite", *flags) == 0
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "plain"
    assert status("train", "digits", *TINY, "--out", str(path)) == 0
    return path


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "worse"
    assert status("train", "digits", *TINY, "--steps", "4", "--out", str(path)) == 0
    return path


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "conditional"
    assert status("train", "digits", "--conditional", *TINY, "--out", str(path)) == 0
    return path


@pytest.mark.parametrize(
    ("flags", "nfe"),
    [
        (["--sampler", "heun"], "35"),
        (["--sampler", "heun", "--churn", "20", "--churn-range", "0.05", "50", "--churn-noise", "1.003"], "35"),
        (["--sampler", "euler", "--steps", "7"], "7"),
        (["--sampler", "dpmpp-2m"], "18"),
        (["--sampler", "dpmpp-2m-sde", "--eta", "0.5"], "18"),
        (["--sampler", "euler-maruyama"], "1,000"),
        (["--sampler", "ancestral"], "18"),
        (["--sampler", "pc-ve", "--steps", "20"], "39"),
        (["--sampler", "pc-vp", "--steps", "20", "--predictor", "ancestral", "--corrector-steps", "2"], "58"),
        (["--grid", "ve"], "35"),
        (["--grid", "vp"], "35"),
        (["--grid", "cosine"], "35"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else value,
)
def test_every_sampler_and_grid_draws_and_says_its_evaluations(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], nfe: str
) -> None:
    arrays = drawn(run, tmp_path / "a.npz", "--seeds", "0-2", *flags)
    assert f": {nfe} network evaluations each (NFE)" in capsys.readouterr().out
    assert arrays["arr_0"].shape == (3, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_0"].std() > 5
    assert arrays["seeds"].tolist() == [0, 1, 2]


def test_a_flag_reaches_its_sampler(run: Path, tmp_path: Path) -> None:
    """Against the library's own sampler with the same noise."""
    denoiser = open_model(run).denoiser
    noise = SampleNoise([3, 8])
    start = noise.latents((1, 8, 8), dtype=torch.float64)
    cases = {
        "heun": (
            ["--churn", "9", "--churn-range", "0.1", "5", "--churn-noise", "1.1", "--rho", "5", "--sigma-max", "40"],
            lambda x, z, g: sampling.heun(denoiser, x, g, s_churn=9.0, s_min=0.1, s_max=5.0, s_noise=1.1, noise=z),
            sampling.edm_sigmas(12, rho=5, sigma_max=40),
        ),
        "pc-ve": (
            ["--snr", "0.1", "--corrector-steps", "2", "--sigma-min", "0.05"],
            lambda x, z, g: sampling.predictor_corrector(
                denoiser, x, g, corrector_steps=2, snr=0.1, average_norms=False, noise=z
            ),
            sampling.ve_sigmas(12, sigma_min=0.05),
        ),
        "pc-vp": (
            ["--predictor", "ancestral"],
            lambda x, z, g: sampling.predictor_corrector(
                denoiser, x, g, process="vp", predictor="ancestral", average_norms=False, noise=z
            ),
            sampling.vp_sigmas(12),
        ),
        "dpmpp-2m-sde": (
            ["--eta", "0.3", "--grid", "cosine"],
            lambda x, z, g: sampling.dpmpp_2m_sde(denoiser, x, g, eta=0.3, noise=z),
            sampling.cosine_sigmas(12),
        ),
    }
    for name, (flags, sampler, grid) in cases.items():
        noise = SampleNoise([3, 8])
        start = noise.latents((1, 8, 8), dtype=torch.float64)
        expected = to_uint8(sampler(start * grid[0], noise, grid)).permute(0, 2, 3, 1).numpy()
        got = drawn(run, tmp_path / "a.npz", "--seeds", "3,8", "--sampler", name, "--steps", "12", *flags)["arr_0"]
        assert np.array_equal(got, expected), name


@pytest.mark.parametrize("sampler", ["heun", "rk45"])
def test_image_k_is_the_same_in_every_call_whatever_the_batch(run: Path, tmp_path: Path, sampler: str) -> None:
    flags = ("--sampler", sampler)
    whole = drawn(run, tmp_path / "a.npz", "--seeds", "0-39", "--batch", "40", *flags)["arr_0"]
    some = drawn(run, tmp_path / "b.npz", "--seeds", "35,3,4", "--batch", "2", *flags)
    assert some["seeds"].tolist() == [35, 3, 4]
    difference = np.abs(whole[[35, 3, 4]].astype(int) - some["arr_0"])
    # rk45 always solves the same rows together; elsewhere a network's rounding may turn a grey level.
    assert difference.max() <= (0 if sampler == "rk45" else 1)


def test_rk45_keeps_its_tolerance_and_tells_what_that_took(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = drawn(run, tmp_path / "a.npz", "--sampler", "rk45", "--rtol", "1e-8", "--atol", "1e-8")["arr_0"].astype(int)
    usual = drawn(run, tmp_path / "b.npz", "--sampler", "rk45")["arr_0"]
    rough = drawn(run, tmp_path / "c.npz", "--sampler", "rk45", "--rtol", "0.05", "--atol", "0.05")["arr_0"]
    assert np.abs(exact - usual).max() <= 1
    assert np.abs(exact - rough).max() > 1
    nfe = [
        float(line.split(" network")[0].split()[-1]) for line in capsys.readouterr().out.splitlines() if "NFE" in line
    ]
    assert nfe[0] > 2 * nfe[1] > 2 * nfe[2]


def test_a_grid_a_folder_and_an_npz_file_hold_the_same_images(run: Path, tmp_path: Path) -> None:
    seeds = ("--seeds", "4,2")
    arrays = drawn(run, tmp_path / "a.npz", *seeds)["arr_0"]
    assert status("sample", str(run), *seeds, "--out", str(tmp_path / "folder")) == 0
    assert status("sample", str(run), *seeds, "--out", str(tmp_path / "grid.png")) == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["000002.png", "000004.png"]
    for place, name in ((0, "000004.png"), (1, "000002.png")):
        with Image.open(tmp_path / "folder" / name) as picture:
            assert np.array_equal(np.asarray(picture), arrays[place, :, :, 0])
    with Image.open(tmp_path / "grid.png") as picture:
        grid = np.asarray(picture)
    scale = (grid.shape[1] - 6) // 16
    assert np.array_equal(grid[2 : 2 + 8 * scale : scale, 2 : 2 + 8 * scale : scale], arrays[0, :, :, 0])
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_average_and_the_last_weights_draw_different_images(run: Path, tmp_path: Path) -> None:
    average = drawn(run, tmp_path / "a.npz", "--ema", "half-life")["arr_0"]
    last = drawn(run, tmp_path / "b.npz", "--ema", "none")["arr_0"]
    assert np.array_equal(average, drawn(run, tmp_path / "c.npz")["arr_0"])
    assert (average != last).any()


def test_averages_of_other_lengths_are_made_of_a_runs_snapshots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert status("train", "digits", *TINY, "--ema-snapshot-every", "5", "--out", str(path)) == 0
    capsys.readouterr()
    half_life, short, long = (
        drawn(path, tmp_path / "a.npz", "--seeds", "0-3", "--ema", ema)["arr_0"]
        for ema in ("half-life", "0.05", "0.10")
    )
    assert (half_life != long).any()
    assert (short != long).any()
    shown = capsys.readouterr().out
    assert "(EMA 0.10)" in shown
    assert "warning" not in shown
    # One of a kept length is exact, and one far from them is told with its error.
    drawn(path, tmp_path / "b.npz", "--seeds", "0-3", "--ema", "0.25")
    shown = capsys.readouterr().out
    error = open_model(path, "0.25").ema_error
    assert 0.2 < error < 0.3
    assert f"warning: --ema 0.25: the average of the run's snapshots differs by {error:.1%} from one of that" in shown
    assert "train with a smaller --ema-snapshot-every, or pass a length nearer to 0.05 or 0.1" in shown
    assert f"(EMA 0.25 (profile {error:.1%} off))" in shown


def test_a_conditional_run_draws_the_class_of_the_seed_or_the_one_asked_for(conditional: Path, tmp_path: Path) -> None:
    arrays = drawn(conditional, tmp_path / "a.npz", "--seeds", "0-29")
    assert arrays["labels"].tolist() == [seed % 10 for seed in range(30)]
    sevens = drawn(conditional, tmp_path / "b.npz", "--seeds", "0-29", "--class", "7")
    assert set(sevens["labels"].tolist()) == {7}
    same = (arrays["arr_0"] == sevens["arr_0"]).all((1, 2, 3))
    assert same[[7, 17, 27]].all()
    assert not same.all()


def test_classifier_free_guidance_acts_in_its_interval_and_counts_both_evaluations(
    conditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = drawn(conditional, tmp_path / "a.npz")["arr_0"]
    guided = drawn(conditional, tmp_path / "b.npz", "--guidance-scale", "3")["arr_0"]
    assert ": 70 network evaluations" in capsys.readouterr().out
    assert (plain != guided).any()
    interval = ["--guidance-scale", "3", "--guidance-interval"]
    first = drawn(conditional, tmp_path / "c.npz", *interval, "79", "81")["arr_0"]
    assert ": 36 network evaluations" in capsys.readouterr().out  # the grid's first level alone
    assert (first != guided).any()
    assert status("sample", str(conditional), *interval, "100", "200") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--guidance-interval 100.0 200.0 holds none of the grid's noise levels, 0.002 to 80, so nothing" in told


def test_guidance_of_a_run_that_never_dropped_a_label_is_refused(
    conditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(conditional, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["recipe"]["label_dropout"] = 0.0
    del record["checksum"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    never = "the run was trained without dropping labels, so its network never learned to draw without a class"
    assert status("sample", str(tmp_path / "run"), "--guidance-scale", "2") == 2
    assert f"--guidance-scale 2: {never}" in " ".join(capsys.readouterr().err.split())
    for classes in (["-1"], ["3", "-1"]):
        assert status("sample", str(tmp_path / "run"), "--class", *classes) == 2
        assert f"--class -1: {never}" in " ".join(capsys.readouterr().err.split())
    guide = ["--guide", str(tmp_path / "run"), "--guidance-scale", "2", "--class"]
    assert status("sample", str(conditional), *guide, "3", "-1") == 2
    assert "was trained without dropping labels" in " ".join(capsys.readouterr().err.split())
    assert status("sample", str(tmp_path / "run"), "--class", "10") == 2
    assert "-1" not in capsys.readouterr().err


def test_autoguidance_extrapolates_from_the_guides_run(run: Path, worse: Path, tmp_path: Path) -> None:
    arrays = drawn(run, tmp_path / "a.npz", "--seeds", "5", "--guidance-scale", "2", "--guide", str(worse))
    good, bad = open_model(run).denoiser, open_model(worse).denoiser
    grid, noise = sampling.edm_sigmas(18), SampleNoise([5])
    start = noise.latents((1, 8, 8), dtype=torch.float64) * 80
    with torch.no_grad():
        expected = sampling.heun(lambda x, s: 2 * good(x, s) - bad(x, s), start, grid)
    assert np.abs(arrays["arr_0"].transpose(0, 3, 1, 2).astype(int) - to_uint8(expected).numpy()).max() <= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ema", "0.25"], ["--ema 0.25", "half-life", "none"]),
        (["--sampler", "euler", "--churn", "3"], ["--churn 3.0 is an option of heun, not of euler"]),
        (["--snr", "0.1"], ["--snr 0.1 is an option of pc-ve and pc-vp, not of heun"]),
        (["--sampler", "rk45", "--steps", "9"], ["--steps 9", "--rtol"]),
        (["--grid", "vp", "--sigma-min", "0.1"], ["--sigma-min 0.1", "--grid vp"]),
        (["--grid", "ve", "--rho", "3"], ["--rho 3 is an option of --grid edm, not of --grid ve: leave it out"]),
        (["--sampler", "pc-vp", "--rho", "3"], ["--rho 3 is an option of --grid edm, not of --grid vp: leave it out"]),
        (
            ["--sampler", "rk45", "--rho", "3"],
            ["--rho 3 does nothing with rk45, which chooses its steps: leave it out"],
        ),
        (
            ["--sampler", "rk45", "--grid", "cosine"],
            ["--grid cosine does nothing with rk45, which chooses its steps between the same ends: leave it out"],
        ),
        (
            ["--guidance-scale", "2", "--guidance-interval", "2", "1"],
            ["--guidance-interval 2.0 1.0 holds no noise level: pass the lower one first, such as"],
        ),
        (["--churn-noise", "1.007"], ["--churn-noise 1.007 does nothing at --churn 0: pass more, such as --churn 40"]),
        (["--churn-range", "0.05", "50"], ["--churn-range 0.05 50.0 does nothing at --churn 0: pass more"]),
        (
            ["--churn", "40", "--churn-range", "50", "0.05"],
            ["--churn-range 50.0 0.05 holds no noise level: pass the lower one first"],
        ),
        (
            ["--sampler", "pc-ve", "--corrector-steps", "0", "--snr", "0.1"],
            ["--snr 0.1 does nothing at --corrector-steps 0: pass more, such as --corrector-steps 1"],
        ),
        (
            ["--churn", "40", "--churn-range", "100", "200"],
            ["--churn-range 100.0 200.0 holds none of the grid's noise levels, 0.002 to 80, so there is no churn"],
        ),
        (["--guide-ema", "none"], ["--guide-ema none does nothing without a guide: name its run, --guide RUN"]),
        (["--sigma-min", "90"], ["--sigma-min 90.0", "--sigma-max 80.0"]),
        (["--class", "3"], ["--class 3", "leave it out"]),
        (["--guidance-scale", "2"], ["--guidance-scale 2", "--guide RUN"]),
        (["--guidance-interval", "1", "2"], ["--guidance-interval 1.0 2.0 does nothing at --guidance-scale 1"]),
        (["--guide", "{run}"], ["--guide", "does nothing at --guidance-scale 1"]),
        (["--guidance-scale", "2", "--guide", "nowhere"], ["nowhere is not a run"]),
        (["--guidance-scale", "2", "--guide", "{conditional}"], ["10 classes", "a run of the same data"]),
        (["--seeds", "4294967296"], ["2^32 - 1"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--out", "{folder}.npz"], ["is a folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_is_one_paragraph_that_says_what_to_do(
    run: Path, conditional: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    (tmp_path / "x.npz").mkdir()
    places = {"run": run, "conditional": conditional, "folder": tmp_path / "x"}
    assert status("sample", str(run), *(flag.format(**places) for flag in flags)) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert "Traceback" not in told


def test_a_class_that_the_run_does_not_know_is_refused(conditional: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("sample", str(conditional), "--class", "10") == 2
    assert "--class 10: the run has classes 0 to 9, or -1 for none" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional run on the classes 1, 2, ... 10 and [red]cat, as folders; it lies beside them."""
    folder = tmp_path_factory.mktemp("pets")
    for shade, name in enumerate([*map(str, range(1, 11)), "[red]cat"]):
        for number in range(4):
            place = folder / "data" / name / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 20 * shade + number, np.uint8)).save(place)
    flags = ["--conditional", "--batch", "8", *TINY, "--sample-every", "1000", "--out", str(folder / "run")]
    with whole_pictures():
        assert status("train", str(folder / "data"), *flags) == 0
    return folder


def test_a_class_is_named_by_its_name_or_else_its_number_and_told_by_both(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pets / "run"
    for name, number, told in (
        ("[red]cat", 10, "class 10 ([red]cat)"),
        ("10", 9, "class 9 (10)"),
        ("1", 0, "class 0 (1)"),
        ("0", 0, "class 0 (1)"),
        ("-1", -1, "no class"),
    ):
        arrays = drawn(run, tmp_path / "a.npz", "--seeds", "0-3", "--steps", "2", "--class", name)
        assert arrays["labels"].tolist() == [number] * 4
        assert arrays["class_names"].tolist() == [*map(str, range(1, 11)), "[red]cat"]
        assert told in capsys.readouterr().out.splitlines()
    assert status("sample", str(run), "--class", "redcat") == 2
    message = capsys.readouterr().err
    assert "--class redcat: the run has classes 0 (1), 1 (2), " in message
    assert "10 ([red]cat), or -1 for none. Did you mean [red]cat?" in message
    assert status("sample", str(run), "--class", "11") == 2


def test_several_classes_take_turns_and_their_images_are_those_of_each_class_alone(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--seeds", "0-5", "--steps", "2", "--class")
    both = drawn(pets / "run", tmp_path / "a.npz", *words, "[red]cat", "1")
    assert both["labels"].tolist() == [10, 0] * 3
    assert "classes 10 ([red]cat), 0 (1) in turn: seed k has the one at place k modulo 2" in capsys.readouterr().out
    for name, place in (("[red]cat", 0), ("1", 1)):
        alone = drawn(pets / "run", tmp_path / "b.npz", *words, name)["arr_0"]
        assert np.array_equal(both["arr_0"][place::2], alone[place::2])
    found = sf.Run(pets / "run").sample(6, steps=2, class_label=("[red]cat", 0), device="cpu")
    assert np.array_equal(found.images.transpose(0, 2, 3, 1), both["arr_0"])
    with pytest.raises(ValueError, match=r"class_label=\[red\]cats: .* Did you mean \[red\]cat\?"):
        sf.Run(pets / "run").sample(6, class_label=["1", "[red]cats"])


def test_a_folder_with_classes_says_so_with_names_counts_and_the_flags_that_use_them(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("data", "inspect", str(pets / "data"), "--out", str(tmp_path / "a.png")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"class {number} ({number + 1}) 4" in told for number in range(1, 10))
    assert "class 10 ([red]cat) 4" in told
    assert "train --conditional, then sample --class" in told
    with whole_pictures():
        assert status("train", str(pets / "data"), "--recipe", "digits", "--print") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "classes: 11: 1, 2, 3, 4, 5, 6, 7, 8, ... (4 images each); not" in told
    assert "to draw by class: --conditional" in told


def test_grids_of_a_conditional_run_are_in_the_order_of_the_classes_with_the_names(pets: Path, tmp_path: Path) -> None:
    run = pets / "run"
    names = (*map(str, range(1, 11)), "[red]cat")
    arrays = drawn(run, tmp_path / "a.npz", "--seeds", "0-63")
    labels = np.arange(64) % 11
    assert arrays["labels"].tolist() == labels.tolist()
    images = arrays["arr_0"].transpose(0, 3, 1, 2)
    assert status("sample", str(run), "--seeds", "0-63", "--out", str(tmp_path / "a.png")) == 0
    # What training shows is what the command draws.
    for picture in (tmp_path / "a.png", run / "samples" / "step-00000030.png"):
        with Image.open(picture) as image:
            np.testing.assert_array_equal(np.asarray(image), class_grid(images, labels, names)[:, :, 0])


def test_a_run_whose_classes_were_numbered_by_their_letters_goes_on_with_these_numbers(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "old"
    shutil.copytree(pets / "run", run)
    record = json.loads((run / "config.json").read_text())
    # As version 0.1 wrote it: 1, 10, 2, ..., and the labels that this gives.
    names = sorted([*map(str, range(1, 11)), "[red]cat"])
    record["manifest"]["class_names"] = names
    data = renumbered(open_images(pets / "data"), names)
    record["manifest"]["labels_sha256"] = data.manifest["labels_sha256"]
    record["recipe"]["steps"] = 31
    del record["checksum"]
    (run / "config.json").write_text(json.dumps(record))
    assert drawn(run, tmp_path / "a.npz", "--class", "10", "--seeds", "0-1")["labels"].tolist() == [1, 1]
    assert status("sample", str(run), "--guidance-scale", "2", "--guide", str(pets / "run")) == 2
    assert "numbers its classes differently, 0 (1), 1 (2), 2 (3)" in capsys.readouterr().err
    assert status("train", "--resume", "--out", str(run)) == 0
    # Other labels for the same pixels are not the data of the run.
    record["manifest"]["labels_sha256"] = "0" * 64
    record["recipe"]["steps"] = 32
    (run / "config.json").write_text(json.dumps(record))
    assert status("train", "--resume", "--out", str(run)) == 2
    assert "its labels' sha256 differs" in capsys.readouterr().err


BOTH = """
import os, sys, torch
from stablefield.cli.entry import main
torch.set_num_threads(1)
run, out, *ports = sys.argv[1:]
draw = ["sample", run, "--seeds", "0-12,70", "--batch", "3"]
measure = ["evaluate", run, "--samples", "30", "--batch", "8", "--feature-batch", "500", "--extractor", "random",
           "--no-cache", "--out", out + "/r.json"]
for port, arguments in zip(ports, ([*draw, "--out", out + "/a.npz"], [*draw, "--out", out + "/images"], measure)):
    os.environ["MASTER_PORT"] = port
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code == 0, done.code
sys.stdout.flush()
os._exit(0)  # as a program of several processes ends
"""


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [str(free.getsockname()[1]) for free in sockets]
    for free in sockets:
        free.close()
    return ports


@pytest.mark.slow
def test_two_processes_draw_and_measure_what_one_does(run: Path, tmp_path: Path, fork: Callable[..., Fork]) -> None:
    ports = free_ports(3)
    outputs: dict[int, list[str]] = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        started = [
            fork(BOTH, run, out, *ports, RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
            for rank in range(count)
        ]
        outputs[count] = [process.communicate(200)[0] for process in started]
        assert [process.returncode for process in started] == [0] * count, started[0].stderr
    assert outputs[2][1] == ""  # the first process tells
    assert "in 2 processes" in outputs[2][0]
    one, two = (dict(np.load(tmp_path / str(count) / "a.npz")) for count in (1, 2))
    assert one["seeds"].tolist() == [*range(13), 70]
    assert np.array_equal(one["arr_0"], two["arr_0"])
    files = [sorted((tmp_path / str(count) / "images").iterdir()) for count in (1, 2)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 14
    results = [json.loads((tmp_path / str(count) / "r.json").read_text())["results"] for count in (1, 2)]
    assert len(results[0]) == 7
    for source_only, together in zip(*results, strict=True):
        assert together["values"] == pytest.approx(source_only["values"], rel=1e-9, abs=1e-12)
        assert together["protocol"] == source_only["protocol"]
