"""On a GPU itself: what `test_far_device.py` says of waiting, by torch's own alarm."""

import numpy as np
import pytest
import torch
from names import STEPS
from steps import RECIPES, stepper

import stablefield as sf
from stablefield.training._meter import Meter


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


@pytest.mark.gpu
def test_a_pool_in_a_file_is_that_on_the_device(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stablefield.targets._engine.reference_matrix.PAGE", 2**20
    )  # 200 pages, each of which could come too early
    images = torch.randint(0, 256, (60_000, 3, 34, 34), generator=rng, dtype=torch.uint8)
    index = torch.randint(len(images), (256,), generator=rng)
    x0 = images[index] / 127.5 - 1
    x_t = sf.EDM().perturb(x0, 20.0, generator=rng)
    x0, x_t, t, index = x0.cuda(), x_t.cuda(), torch.full((256,), 20.0).cuda(), index.cuda()
    truth = sf.StableTarget(sf.EDM(), references=sf.Pool(images.cuda()))(x0, x_t, t, index=index)
    for data in (images.numpy(), images[:20_000].numpy().astype(np.float32)):
        pool = sf.Pool(data)
        if data.dtype == np.uint8:
            found = sf.StableTarget(sf.EDM(), references=pool)(x0, x_t, t, index=index)
            torch.testing.assert_close(found.x0, truth.x0, rtol=0, atol=1e-5)
        norms = pool.matrix(torch.device("cuda")).norms(torch.float32).squares.cpu()
        wide = data.astype(np.float64) / 127.5 - 1 if data.dtype == np.uint8 else data.astype(np.float64)
        np.testing.assert_allclose(norms.numpy(), np.square(wide).sum((1, 2, 3)), rtol=1e-5)
