"""On a GPU itself: what `test_far_device.py` says of waiting, by torch's own alarm."""

import pytest
import torch
from names import STEPS
from steps import RECIPES, stepper

from stablefield.training.meter import Meter


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in STEPS if name != "accumulated"])
def test_once_its_network_runs_a_step_waits_for_nothing(name: str) -> None:
    device = torch.device("cuda")
    taken = stepper(RECIPES[name], device)
    meter = Meter((0.5, 1.0, 2.0), device, taken.target_watch)
    taken.take(0)  # what is made once
    taken.trained.model.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    try:
        for step in (1, 2):
            meter.step(taken.take(step), RECIPES[name].batch)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.report(3).loss > 0
