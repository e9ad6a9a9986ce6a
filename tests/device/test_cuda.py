"""On a GPU itself: what `test_far_device.py` says of waiting, by torch's own alarm, and steps replayed as CUDA graphs."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from names import STEPS
from steps import RECIPES, UNET, stepper
from torch import Tensor

import stablefield as sf
from stablefield.training._meter import Meter
from stablefield.training._stepper import Stepper


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


REPLAYED = {
    **RECIPES,
    "antithetic": replace(RECIPES["perceptron"], draws_per_image=2, antithetic=True, importance_sampling=True),
    "dropout": replace(RECIPES["unet"], network=replace(UNET, dropout=0.3), precision="bf16"),
}


def weights(taken: Stepper) -> Tensor:
    return torch.cat([p.detach().flatten() for p in taken.trained.model.parameters()])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["perceptron", "accumulated", "augmented"])
def test_a_replayed_step_has_the_gradient_of_the_plain_one(name: str) -> None:
    plain, replayed = (
        stepper(replace(REPLAYED[name], compile=compiled, max_grad_norm=float("inf")), torch.device("cuda"))
        for compiled in (False, True)
    )
    for step in range(4):
        # Adam's first steps are signs of gradients: from there on, both would go their own ways.
        replayed.trained.model.load_state_dict(plain.trained.model.state_dict())
        truth, found = plain.take(step), replayed.take(step)
        for one, other in zip(truth, found, strict=True):
            torch.testing.assert_close(other.row_loss, one.row_loss, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(other.noise_level, one.noise_level, rtol=1e-6, atol=0)
            torch.testing.assert_close(other.variance_removed, one.variance_removed, rtol=1e-3, atol=1e-6)
        gradients = [
            [p.grad for p in taken.trained.model.parameters() if p.grad is not None] for taken in (plain, replayed)
        ]
        assert len(gradients[0]) == len(gradients[1])
        joined = [torch.cat([g.flatten() for g in some]) for some in gradients]
        assert float((joined[1] - joined[0]).norm() / joined[0].norm()) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["antithetic", "dropout"])
def test_a_replayed_step_waits_for_nothing_and_resumes_bit_for_bit(name: str) -> None:
    device = torch.device("cuda")
    recipe = replace(REPLAYED[name], compile=True)
    whole, resumed = stepper(recipe, device), stepper(recipe, device)
    for step in range(2):
        whole.take(step)
    for module, other in zip(whole.trained.modules().values(), resumed.trained.modules().values(), strict=True):
        other.load_state_dict(module.state_dict())
    assert whole.trained.optimizer is not None
    assert resumed.trained.optimizer is not None
    resumed.trained.optimizer.load_state_dict(copy.deepcopy(whole.trained.optimizer.state_dict()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (2, 3):
            whole.take(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.randn(7, device=device)  # what else was drawn changes nothing
    for step in (2, 3):
        resumed.take(step)
    assert torch.equal(weights(whole), weights(resumed))
    assert weights(whole).isfinite().all()
