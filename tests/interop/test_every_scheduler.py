"""Every scheduler of the installed diffusers is asked what it does: read as that, or refused with what to use instead."""

import copy
import importlib.util
import inspect
import pkgutil
import sys
import types
import warnings

import diffusers.schedulers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import stablefield as sf

STEPS = 16
# Arguments without a default.
NEEDED = {
    "mask_token_id": 5,
    "num_vec_classes": 7,
    "schedule_mode": "log",
    "noise_mode": "tan",
    "tsr_k": 1.0,
    "tsr_sigma": 1.0,
}
# What a user may set; each is tried alone where the scheduler has it.
OPTIONS = [
    ("beta_schedule", "squaredcos_cap_v2"),
    ("beta_schedule", "scaled_linear"),
    ("trained_betas", [0.01 + 0.001 * k for k in range(STEPS)]),
    ("prediction_type", "v_prediction"),
    ("prediction_type", "sample"),
    ("prediction_type", "flow_prediction"),
    ("rescale_betas_zero_snr", True),
    ("thresholding", True),
    ("clip_sample", False),
    ("snr_shift_scale", 1.0),
    ("timestep_spacing", "trailing"),
    ("steps_offset", 1),
    ("set_alpha_to_one", False),
    ("variance_type", "learned_range"),
    ("final_sigmas_type", "sigma_min"),
    ("use_karras_sigmas", True),
    ("use_exponential_sigmas", True),
    ("use_beta_sigmas", True),
    ("use_flow_sigmas", True),
    ("sigma_schedule", "exponential"),
    ("sigma_data", 1.0),
    ("shift", 3.0),
    ("shift_terminal", 0.1),
    ("use_dynamic_shifting", True),
    ("stochastic_sampling", True),
    ("invert_sigmas", True),
]
READ = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
}


def kinds():
    """All classes of schedulers in diffusers, by their names; two need torchsde to be imported, and not to be asked."""
    stood_in = "torchsde" not in sys.modules and importlib.util.find_spec("torchsde") is None
    if stood_in:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        found = {}
        for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
            try:
                names = vars(importlib.import_module(module.name))
            except ImportError:  # flax
                continue
            for name, kind in names.items():
                own = inspect.isclass(kind) and kind.__module__ == module.name
                if own and name.endswith("Scheduler") and not name.startswith("Flax"):
                    found[name] = kind
        return found
    finally:
        if stood_in:
            del sys.modules["torchsde"]


KINDS = kinds()


def variants(kind):
    """The scheduler with its defaults, and with every option that it has."""
    parameters = inspect.signature(kind.__init__).parameters
    needed = {name: value for name, value in NEEDED.items() if name in parameters}
    if "num_train_timesteps" in parameters:
        needed["num_train_timesteps"] = STEPS
    yield "", kind(**needed)
    for name, value in OPTIONS:
        if name in parameters:
            try:
                yield f"{name}={value}", kind(**{**needed, name: value})
            except (ValueError, NotImplementedError, TypeError):
                continue


def states(scheduler):
    """The scheduler as it is made, and as sampling leaves it."""
    yield "new", scheduler
    for name, call in {
        "set": lambda s: s.set_timesteps(7),
        "set with mu": lambda s: s.set_timesteps(7, mu=0.7),
        "set by hand": lambda s: s.set_timesteps(timesteps=[13, 9, 3]),
        "set by noise": lambda s: s.set_timesteps(sigmas=[0.9, 0.5, 0.1]),
        "begun": lambda s: (s.set_timesteps(7), s.set_begin_index(2)),
    }.items():
        later = copy.deepcopy(scheduler)
        try:
            call(later)
        except Exception:  # not every one can
            continue
        yield name, later


def settings(scheduler):
    """All that a scheduler keeps, but for tensors, which reading might only move."""
    return {key: value for key, value in vars(scheduler).items() if not isinstance(value, torch.Tensor)}


def noised(scheduler, x0, noise, timesteps):
    """What the scheduler makes of each row, one at a time, each by a scheduler as new."""
    rows = []
    for k in range(len(timesteps)):
        row, fresh = slice(k, k + 1), copy.deepcopy(scheduler)
        if hasattr(fresh, "scale_noise"):
            rows.append(fresh.scale_noise(x0[row], timesteps[row], noise[row]))
        else:
            rows.append(fresh.add_noise(x0[row], noise[row], timesteps[row]))
    return torch.cat(rows)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_scheduler_is_read_as_it_noises_or_refused_with_a_remedy(name, rng):
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options, made in variants(KINDS[name]):
            for state, scheduler in states(made):
                case = f"{name}({options}), {state}"
                before, regression, refusal = settings(scheduler), None, ""
                try:
                    regression = sf.from_diffusers(scheduler)
                except ValueError as error:
                    refusal = str(error)
                assert settings(scheduler) == before, case
                if regression is None:
                    remedies = ("Train with ", "or train with a DDPMScheduler", "pass a FlowMatch", "pass a scheduler")
                    assert any(remedy in refusal for remedy in remedies), f"{case}: {refusal}"
                    assert refusal.endswith("."), f"{case}: {refusal}"
                    continue
                read += 1
                t = torch.arange(STEPS) if regression.clock == "step" else scheduler.timesteps
                x0, noise = torch.randn(2, len(t), 3, 2, 2, dtype=torch.float64, generator=rng)
                expected = noised(scheduler, x0, noise, t)
                found = regression.process.perturb(x0, regression.time(t), noise)
                # A table knows its steps in float32, EDM's clock is a logarithm in float32.
                scale = 1 + expected.abs().amax((1, 2, 3), keepdim=True)
                assert float(((found - expected) / scale).abs().max()) < 3e-6, case
    assert name not in READ or read >= 3


def test_all_kinds_are_found():
    assert set(KINDS) >= READ | {"ScoreSdeVeScheduler", "UniPCMultistepScheduler", "DPMSolverSDEScheduler"}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_class_in_place_of_a_scheduler_is_named(name):
    with pytest.raises(ValueError, match=rf"scheduler is the class {name}: pass an instance, such as {name}\(\)\.$"):
        sf.from_diffusers(KINDS[name])


@pytest.mark.parametrize("thing", [None, "ddpm", {"alphas_cumprod": 1}, torch.zeros(3), 3.0, diffusers])
def test_anything_else_in_place_of_a_scheduler_is_named(thing):
    with pytest.raises(
        ValueError, match=r"scheduler is a \w+: pass a scheduler of diffusers, such as DDPMScheduler\(\)\.$"
    ):
        sf.from_diffusers(thing)


def test_own_timesteps_with_a_shift_have_the_noise_that_the_scheduler_adds():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[900.0, 700.0, 100.0])
    regression = sf.from_diffusers(scheduler)
    assert regression.clock == "table"
    # 3 * 0.7 / (1 + 2 * 0.7), by the definition of the shift.
    assert regression.time(torch.tensor([700.0])).item() == pytest.approx(0.875, rel=1e-6)
    one = torch.ones(1, 1)
    assert scheduler.scale_noise(0 * one, torch.tensor([700.0]), one).item() == pytest.approx(0.875, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"timesteps hold 500, which is not one of the scheduler's 3 timesteps .* again"
    ):
        regression.time(torch.tensor([700.0, 500.0]))
    with pytest.raises(TypeError, match=r"timesteps is a list: pass a tensor"):
        regression.time([700.0])
    with pytest.raises(TypeError, match=r"target is a Tensor of shape .*: pass the Target"):
        regression(one)


def test_clock_of_the_cosine_solver_is_its_own():
    scheduler = KINDS["CosineDPMSolverMultistepScheduler"](sigma_max=500.0)
    regression = sf.from_diffusers(scheduler)
    assert (regression.process, regression.view, regression.clock) == (sf.EDM(), "x0", "table")
    torch.testing.assert_close(regression.time(scheduler.timesteps), scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    assert regression.time(scheduler.timesteps).max().item() == pytest.approx(500.0)


def test_scheduler_in_the_middle_of_sampling_is_refused():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    with pytest.raises(ValueError, match="whatever the timestep: it is in the middle of sampling"):
        sf.from_diffusers(scheduler)
    used = FlowMatchHeunDiscreteScheduler()
    used.scale_noise(torch.zeros(1, 1), used.timesteps[:1], torch.zeros(1, 1))
    with pytest.raises(ValueError, match="in the middle of sampling"):
        sf.from_diffusers(used)
