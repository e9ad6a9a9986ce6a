"""Schedulers of diffusers as processes: the same noise to the last bit, the same target with one reference."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)

import stablefield as sf

TABLES = {
    "ddpm": DDPMScheduler(),
    "ddpm cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "ddpm scaled": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "ddim": DDIMScheduler(num_train_timesteps=100),
    "pndm": PNDMScheduler(),
    "zero snr": DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


@pytest.fixture
def batch(rng):
    x0 = torch.rand(64, 3, 4, 4, generator=rng) * 2 - 1
    return x0, torch.randn(x0.shape, generator=rng)


@pytest.mark.parametrize("name", TABLES)
def test_process_of_a_table_noises_as_the_scheduler_does_to_the_last_bit(name, batch, rng):
    scheduler, (x0, noise) = TABLES[name], batch
    process = sf.from_diffusers(scheduler).process
    t = torch.randint(scheduler.config.num_train_timesteps, (64,), generator=rng)
    t[0], t[1] = 0, scheduler.config.num_train_timesteps - 1
    assert torch.equal(process.perturb(x0, t, noise), scheduler.add_noise(x0, noise, t))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddpm", "ddpm cosine", "ddim"])
def test_target_with_one_reference_is_that_of_the_loop_to_the_last_bit(name, prediction_type, batch, rng):
    scheduler = type(TABLES[name]).from_config(TABLES[name].config, prediction_type=prediction_type)
    x0, noise = batch
    t = torch.randint(scheduler.config.num_train_timesteps, (64,), generator=rng)
    before = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[prediction_type]
    regression = sf.from_diffusers(scheduler)
    noisy = scheduler.add_noise(x0, noise, t)
    source_only = sf.DenoisingTarget(regression.process)(x0, noisy, regression.time(t), noise=noise)
    assert torch.equal(regression(source_only), before)
    # And a stable target is another one, but for its mean over draws.
    assert not torch.equal(
        regression(sf.StableTarget(regression.process, references=sf.InBatch())(x0, noisy, t, noise=noise)), before
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_stable_target_in_every_view_is_the_posterior_mean_by_its_definition(prediction_type, batch, exact, rng):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x0, noise = batch
    regression = sf.from_diffusers(scheduler)
    t = torch.randint(200, 1000, (64,), generator=rng)
    noisy = scheduler.add_noise(x0, noise, t)
    found = regression(
        sf.StableTarget(regression.process, references=sf.InBatch())(x0, noisy, regression.time(t), noise=noise)
    )
    alpha, sigma = scheduler.alphas_cumprod[t].double().sqrt(), (1 - scheduler.alphas_cumprod[t].double()).sqrt()
    mean = exact(noisy, alpha, sigma, x0).mean.reshape(x0.shape)
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    eps = (noisy.double() - a * mean) / s
    expected = {"epsilon": eps, "sample": mean, "v_prediction": a * eps - s * mean}[prediction_type]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_last_step_without_signal_has_the_mean_of_the_references_for_target(batch):
    scheduler, (x0, noise) = TABLES["zero snr"], batch
    regression = sf.from_diffusers(scheduler)
    t = torch.full((64,), 999)
    target = sf.StableTarget(regression.process, references=sf.InBatch())(
        x0, scheduler.add_noise(x0, noise, t), t, noise=noise
    )
    torch.testing.assert_close(target.x0, x0.mean(0).expand_as(x0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(regression(target), -target.x0)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_edm_scheduler_is_noise_added_at_the_level_of_its_timestep(kind, batch, rng):
    scheduler, (x0, noise) = kind(sigma_data=0.5), batch
    regression = sf.from_diffusers(scheduler)
    assert (regression.process, regression.view) == (sf.EDM(), "x0")
    index = torch.randint(len(scheduler.timesteps), (64,), generator=rng)
    t = scheduler.timesteps[index]
    torch.testing.assert_close(regression.time(t), scheduler.sigmas[index], rtol=2e-6, atol=0)
    noisy = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(regression.process.perturb(x0, regression.time(t), noise), noisy, rtol=1e-5, atol=1e-5)
    assert torch.equal(regression(sf.DenoisingTarget(sf.EDM())(x0, noisy, regression.time(t), noise=noise)), x0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_scheduler_is_a_rectified_flow_whatever_its_shift(kind, shift, batch, rng):
    scheduler, (x0, noise) = kind(shift=shift), batch
    regression = sf.from_diffusers(scheduler)
    t = scheduler.timesteps[torch.randint(1000, (64,), generator=rng)]
    # The second kind noises one time only, once.
    rows = [kind(shift=shift).scale_noise(x0[k : k + 1], t[k : k + 1], noise[k : k + 1]) for k in range(64)]
    noisy = torch.cat(rows)
    torch.testing.assert_close(regression.process.perturb(x0, regression.time(t), noise), noisy, rtol=1e-5, atol=1e-6)
    source_only = sf.DenoisingTarget(regression.process)(x0, noisy, regression.time(t), noise=noise)
    assert torch.equal(regression(source_only), noise - x0)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "made for sampling. Train with DDPMScheduler.from_config"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "inverts its noise levels"),
        (diffusers.ScoreSdeVeScheduler(), "neither DDPM-like"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "FlowMatch"),
        (torch.nn.Identity(), "scheduler is a Identity"),
    ],
)
def test_scheduler_that_means_something_else_is_refused_with_what_to_use(scheduler, message):
    with pytest.raises(ValueError, match=message):
        sf.from_diffusers(scheduler)


def test_step_out_of_the_table_is_named():
    process = sf.from_diffusers(DDPMScheduler()).process
    with pytest.raises(ValueError, match="from 0 to 999, got 0 to 1000"):
        process.alpha(torch.tensor([0, 1000]))
    with pytest.raises(ValueError, match="no time derivative"):
        process.alpha_dot(torch.tensor([0]))
    with pytest.raises(ValueError, match="must decrease"):
        sf.Discrete(torch.tensor([0.1, 0.2]))


def test_nearest_step_of_a_noise_level_is_the_inverse_of_the_table():
    process = sf.from_diffusers(DDPMScheduler()).process
    t = torch.tensor([0, 17, 500, 999])
    assert torch.equal(process.time(process.noise_level(t)), t)
