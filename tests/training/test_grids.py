"""Sample grids: where the first ones come, what their rows are named, and that trackers get them."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import WandBTracker
from PIL import Image

import stablefield as sf
from pictures import whole_pictures
from stablefield.data._png import class_grid
from stablefield.training._accelerator import make_accelerator
from stablefield.training._loop import fit
from stablefield.training._plan import make_plan
from stablefield.training._recipe import MLPConfig, Recipe
from stablefield.training._run_folder import RunFolder

TINY = Recipe(
    steps=2, batch=8, noise_band=1.0, network=MLPConfig(width=8, depth=1), conditional=True, checkpoint_every=500
)


def test_early_grids_are_at_most_four_and_no_more_than_come_later() -> None:
    for steps, every, expected in (
        (4000, 1000, {62, 250, 500}),
        (200_000, 2000, {125, 250, 500, 1000}),
        (4000, 4000, {250}),
        (300, 1000, {18}),
        (40, 5, set()),
        (4000, 0, set()),
    ):
        recipe = dataclasses.replace(TINY, steps=steps, sample_every=every)
        assert recipe.early_grids == expected
        drawn = {step for step in range(1, steps + 1) if recipe.draws_grid(step)}
        assert drawn == expected | {step for step in range(1, steps + 1) if every and step % every == 0} | {steps}


def test_a_grid_names_its_classes_and_goes_to_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("shoes", "a coat with a name that is far too long for its row" * 3)
    images = np.random.default_rng(0).integers(0, 255, (20, 1, 8, 8), np.uint8)
    origin = sf.data.Origin(name="clothes", source="made up", class_names=names)
    data = sf.data.make_image_set(images, np.arange(20) % 2, origin)
    plan = make_plan(data, TINY, device="cpu")
    folder = RunFolder.create(tmp_path / "run", plan.config)
    accelerator = make_accelerator(torch.device("cpu"))
    logged: list[tuple[dict[str, Any], int]] = []
    tracker = WandBTracker("test")
    tracker.run = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=np.asarray))
    monkeypatch.setattr(accelerator, "trackers", [tracker])
    with whole_pictures():
        fit(folder, plan.config, data, device=torch.device("cpu"), accelerator=accelerator)
    run = sf.Run(folder.path)
    samples = run.sample(64, device="cpu")
    with Image.open(folder.picture(2)) as picture:
        grid = np.asarray(picture)
    np.testing.assert_array_equal(grid, class_grid(samples.images, np.arange(64) % 2, names)[:, :, 0])
    # The caption of the first class is there, and is not that of a run without names.
    assert (grid != class_grid(samples.images, np.arange(64) % 2)[:, :, 0]).any()
    ((values, step),) = [(values, step) for values, step in logged if "samples" in values]
    assert step == 2
    (shown,) = values["samples"]
    np.testing.assert_array_equal(shown, grid[:, :, None].repeat(3, axis=2))
