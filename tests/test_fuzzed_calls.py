"""2,000 calls of the public functions with good and bad arguments: a result, or one sentence that says what to pass.

A call is made of a state (a batch, its times, a pool, a data set, ...), from which every parameter has a good value that
fits the others. Half of the calls are good throughout, and their results are looked at: finite where they ought to be. In
the others one or two arguments are bad ones. All is drawn from a seed: call k of a function is the same every time.
"""

import contextlib
import dataclasses
import inspect
import math
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import stablefield as sf
from stablefield import data, networks, sampling
from stablefield.diffusion._objective import Draws
from stablefield.evaluation import _features as features
from stablefield.evaluation import _fid as fid
from stablefield.evaluation import _kid as kid
from stablefield.evaluation import _memorisation as memorisation
from stablefield.evaluation import _precision_recall as precision_recall
from stablefield.evaluation import inception_score
from stablefield.evaluation._extractor import RawPixels, RawValues
from stablefield.probing import _advice as advice
from stablefield.probing import _bias as bias
from stablefield.probing import _fit as fit
from stablefield.probing import _floor as floor
from stablefield.probing import _phases as phases
from stablefield.probing import _population as population
from stablefield.probing import _training as probe_training
from stablefield.probing import _variance as variance
from stablefield.probing import _variance_ledger as variance_ledger
from stablefield.training import _ema as ema
from stablefield.training import _post_hoc as post_hoc
from stablefield.training._recipe import MLPConfig, Recipe

CALLS = 2000
SECONDS = 20

# Public names that are not called here, and why.
NOT_CALLED = {
    "Process": "abstract",
    "Benchmark": "a result",
    "CheckUp": "a result",
    "NoiseBand": "a result",
    "ObjectiveValue": "a result",
    "Posterior": "a result",
    "Target": "a result",
    "Likelihood": "a result",
    "Counted": "made by counted",
    "RankError": "an error",
    "MissingSplitError": "an error",
    "Run": "tests/training/test_run.py",
    "benchmark": "takes seconds: tests/test_benchmarks.py and tests/cli/test_verbs_from_python.py",
    "check_machine": "takes no arguments",
    "compare": "trains: tests/training/test_comparison.py",
    "train": "trains: tests/training/test_run.py",
    "ShardedPool": "needs processes",
    "DiffusersUNet": "needs diffusers",
    "encode": "needs diffusers: tests/training/test_latents_of_images.py",
    "decode": "needs diffusers: tests/training/test_latents_of_images.py",
}


# --- good values ------------------------------------------------------------------------------------------------------


class Denoise:
    """A denoiser that is right for standard normal data, and counts no classes."""

    def __call__(self, x, sigma, *labels):  # noqa: ARG002
        return x / (1 + sigma.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) ** 2)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, noise_label, class_labels=None, augment_labels=None):  # noqa: ARG002
        return self.weight * x


class FakeScheduler:
    """As much of diffusers' DDPMScheduler as is asked for."""

    def __init__(self):
        self.config = type("Config", (), {"prediction_type": "epsilon", "num_train_timesteps": 5})()
        self.alphas_cumprod = torch.linspace(0.9, 0.1, 5)

    def add_noise(self, x0, noise, t):
        a = self.alphas_cumprod.to(x0.dtype)[t].reshape(-1, *(1,) * (x0.ndim - 1))
        return a**0.5 * x0 + (1 - a) ** 0.5 * noise


class State:
    """Values that fit each other: a batch with its noise and times, a pool, images, features."""

    def __init__(self, seed, tmp_path):
        r = self.random = random.Random(seed)
        g = self.generator = torch.Generator().manual_seed(seed % 2**31)
        self.tmp_path = tmp_path / str(seed)
        self.open = contextlib.ExitStack()
        self.rows = r.choice([1, 2, 5])
        self.shape = r.choice([(3,), (1, 4, 4), (2, 3)])
        self.dtype = r.choice([torch.float32, torch.float64])
        self.process = r.choice([sf.EDM(), sf.VE(), sf.VP(), sf.Cosine(), sf.RectifiedFlow()])
        self.x0 = self.normal(self.rows, *self.shape)
        self.noise = self.normal(self.rows, *self.shape)
        self.t = torch.rand(self.rows, generator=g) * 0.8 + 0.1
        self.x_t = self.process.perturb(self.x0, self.t, self.noise)
        self.data = torch.cat([self.x0, self.normal(7, *self.shape)])
        self.index = torch.arange(self.rows)
        self.row_labels = torch.arange(self.rows) % 2
        self.pool_labels = torch.cat([self.row_labels, torch.arange(7) % 2])
        self.images = torch.randint(256, (6, 1, 4, 4), generator=g).byte().numpy()
        self.labels = np.arange(6) % 3
        self.grid = torch.tensor([5.0, 2.0, 0.5, 0.0]) if r.random() < 0.5 else torch.tensor([5.0, 1.0, 0.1])
        in_batch = sf.StableTarget(self.process, references=sf.InBatch())
        self.objective = sf.Objective(self.process, target=in_batch, noise_levels=sf.LogNormal())

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=self.dtype)

    def image_set(self):
        return data.make_image_set(self.images, self.labels, data.Origin(name="a", source="b"))

    def image_set_of(self, split):
        images = self.images if split == "train" else 255 - self.images
        return data.make_image_set(images, self.labels, data.Origin(name=split, source="b"))

    def float_set(self):
        return data.make_image_set(self.normal(6, *self.shape).numpy(), self.labels, data.Origin(name="a", source="b"))

    def population(self):
        return population.Population(self.data)

    def curve(self):
        return variance.measure_variance(population.Population(self.data), [0.3, 1.0, 3.0], sizes=(2, 4), draws=2)

    def gaussian(self):
        return features.fit_features(self.normal(9, 4))

    def covariance(self):
        return torch.cov(self.normal(9, 4).T)

    def draws(self):
        return Draws(self.t, self.noise)

    def example(self):
        return self.objective.example(self.x0, self.draws())

    def grid_of(self, x):
        return self.grid.to(x.dtype)

    def writer(self):
        return self.open.enter_context(data.PackedWriter(self.tmp_path / "d.stablefield", (1, 4, 4)))

    def packed(self):
        path = self.tmp_path / "set.stablefield"
        if not path.exists():
            data.pack(self.image_set(), path)
        return path


def either(*values):
    """One of the values; those that can be called are called with the state."""

    def choose(state):
        value = state.random.choice(values)
        return value(state) if inspect.isfunction(value) else value

    return choose


def constant(value):
    return lambda state: value


GENERATOR = either(None, lambda s: s.generator)
DEVICE = either(None, "cpu", torch.device("cpu"))
DTYPE = either(torch.float32, torch.float64)
POSITIVE = either(0.5, 1.0, 2, np.float32(0.7))
FLAG = either(True, False)
CALLBACK = either(None, lambda s: lambda step, x, denoised: None)
NOISE = either(None, lambda s: sampling.SampleNoise(range(s.rows)))
DENOISER = either(lambda s: Denoise(), lambda s: sampling.counted(Denoise()))
X, GRID = (lambda s: s.x0 * 5), (lambda s: s.grid_of(s.x0))
WALK = {"denoiser": DENOISER, "x": X, "sigmas": GRID}
FEATURES = {"a": lambda s: s.normal(9, 4), "b": lambda s: s.normal(8, 4)}
SIDES = {"real": lambda s: s.normal(9, 4), "generated": lambda s: s.normal(8, 4), "k": either(1, 3)}
SIGMAS = {"sigma_min": either(0.002, 0.02), "sigma_max": either(80, 100.0)}
MADE = {"device": DEVICE, "dtype": DTYPE}
STEPS = {"steps": either(1, 2, 18, np.int64(5)), **MADE}
LABELS = either(None, lambda s: s.row_labels)
TIMES = either(lambda s: s.t, 0.5, lambda s: s.t[0])


@dataclasses.dataclass
class Case:
    """A function, good values of its parameters, and what may be said of its result.

    `make` gets the state; `finite` says whether good arguments give finite numbers, `local` whether what is not finite in
    an argument may stay so in the result (functions of every entry alone).
    """

    make: object
    good: dict
    local: bool = False
    needed: tuple = ()
    finite: bool = True


def method(make, name):
    return lambda s: getattr(make(s), name)


LEVEL = {"noise_level": lambda s: s.t + 0.1}
SIGMA = {"sigma": lambda s: s.t + 0.1}
MLP_GOOD = {
    "shape": lambda s: s.shape, "width": either(8, 16), "depth": either(1, 2), "dropout": either(0.0, 0.1),
    "classes": either(0, 3), "generator": GENERATOR,
}  # fmt: skip
UNET_GOOD = {
    "resolution": either(8), "channels": either(1), "base_channels": either(32), "multipliers": either((1, 1), [1]),
    "blocks": either(1), "augment_dim": either(0, 9), "classes": either(0, 3), "dropout": either(0.0, 0.1),
    "attention": either(None, (8,)), "generator": GENERATOR,
}  # fmt: skip
SIT_GOOD = {
    "input_size": either(8, (4, 8)), "patch_size": either(2), "channels": either(1), "classes": either(0, 3),
    "learn_sigma": FLAG, "checkpointing": FLAG, "generator": GENERATOR,
}  # fmt: skip
UNET_SMALL = ("base_channels", "multipliers", "blocks")
"""Without them, a network of 50 million weights would be drawn."""
TARGET_GOOD = {
    "references": either(
        lambda s: sf.InBatch(),
        lambda s: sf.Pool(s.data),
        lambda s: sf.Pool(s.data, size=6),
    ),
    "noise_band": either(0.0, 0.3, math.inf),
    "kernel": either(sf.GaussianKernel(), sf.StudentTKernel(64.0)),
    "chunk_size": either(None, 3),
    "capacity": either(None, 1, 4),
    "validate_args": FLAG,
}  # fmt: skip
CALL_GOOD = {
    "x0": lambda s: s.x0, "x_t": lambda s: s.x_t, "t": lambda s: s.t, "labels": LABELS, "index": lambda s: s.index,
    "noise": either(None, lambda s: s.noise), "reference_labels": either(None), "flip": either(None),
    "source_only": either(None, lambda s: torch.zeros(s.rows, dtype=torch.bool)), "generator": GENERATOR,
    "approximate_log_likelihood": either(None),
}  # fmt: skip
IMAGES = {"images": lambda s: s.image_set()}
SEED = {"seed": either(0, 5)}
LEVELS = either(lambda s: [0.3, 1.0], lambda s: torch.tensor([0.5, 2.0]), lambda s: np.array([1.0, 3.0]))

CASES = {
    "EDM": Case(lambda s: sf.EDM, {}),
    "VE": Case(lambda s: sf.VE, SIGMAS),
    "VP": Case(lambda s: sf.VP, {"beta_min": either(0.1), "beta_max": either(20.0, 12)}),
    "Cosine": Case(lambda s: sf.Cosine, {}),
    "RectifiedFlow": Case(lambda s: sf.RectifiedFlow, {}),
    "Discrete": Case(
        lambda s: sf.Discrete,
        {"alphas_cumprod": either(torch.linspace(0.9, 0.1, 5), np.linspace(0.9, 0.0, 4), [0.9, 0.5])},
    ),
    **{
        f"Process.{name}": Case(method(lambda s: s.process, name), {"t": lambda s: s.t}, local=True)
        for name in ("alpha", "sigma", "alpha_dot", "sigma_dot", "noise_level")
    },
    "Process.time": Case(method(lambda s: s.process, "time"), LEVEL, local=True),
    "Process.perturb": Case(
        method(lambda s: s.process, "perturb"),
        {"x0": lambda s: s.x0, "t": TIMES, "noise": either(None, lambda s: s.noise), "generator": GENERATOR},
        local=True,
    ),
    "Discrete.alpha": Case(
        method(lambda s: sf.Discrete(torch.linspace(0.9, 0.1, 5)), "alpha"), {"t": lambda s: s.index}, local=True
    ),
    "Discrete.time": Case(method(lambda s: sf.Discrete(torch.linspace(0.9, 0, 5)), "time"), LEVEL, local=True),
    "LogNormal": Case(lambda s: sf.LogNormal, {"mean": either(-1.2, 0), "std": POSITIVE, "stratified": FLAG}),
    "LogUniform": Case(
        lambda s: sf.LogUniform, {"minimum": either(0.02), "maximum": either(100.0), "stratified": FLAG}
    ),
    "Uniform": Case(lambda s: sf.Uniform, {"start": either(1e-5), "end": either(0.9), "stratified": FLAG}),
    "NoiseLevels.sample": Case(
        method(either(sf.LogNormal(), sf.LogUniform(stratified=True), sf.Uniform(0.1, 0.9)), "sample"),
        {"process": lambda s: s.process, "batch": either(1, 4), "generator": GENERATOR, "device": DEVICE},
    ),
    "NoiseLevels.quantile": Case(
        method(either(sf.LogNormal(), sf.LogUniform()), "quantile"),
        {"u": lambda s: s.t, "process": lambda s: s.process},
        local=True,
    ),
    "ImportanceSampling": Case(
        lambda s: sf.ImportanceSampling,
        {
            "noise_levels": either(sf.LogNormal(), sf.LogUniform()),
            "process": lambda s: s.process,
            "bins": either(4, 32),
            "uniform": either(0.2, 1.0),
            "half_life": POSITIVE,
            "scale": either(None, sf.EDMWeighting()),
        },
    ),
    "ImportanceSampling.__call__": Case(
        lambda s: sf.ImportanceSampling(sf.LogNormal(), s.process).forward, {"u": lambda s: s.t}, local=True
    ),
    "ImportanceSampling.sums": Case(
        lambda s: sf.ImportanceSampling(sf.LogNormal(), s.process).sums,
        {"noise_level": lambda s: s.t, "squares": lambda s: s.t},
        local=True,
    ),
    "ImportanceSampling.observe": Case(
        lambda s: sf.ImportanceSampling(sf.LogNormal(), s.process).observe,
        {"sums": either(lambda s: torch.ones(2, 32))},
    ),
    "EDMWeighting": Case(lambda s: sf.EDMWeighting, {"sigma_data": POSITIVE}),
    "SNRWeighting": Case(
        lambda s: sf.SNRWeighting, {"power": either(1.0, 0), "minimum": either(0.0, 1), "maximum": either(5.0, math.inf)}
    ),
    "FlowWeighting": Case(lambda s: sf.FlowWeighting, {}),
    "Weighting.__call__": Case(
        either(sf.EDMWeighting(), sf.SNRWeighting(maximum=5.0), sf.FlowWeighting()), LEVEL, local=True
    ),
    "EDMPreconditioning": Case(lambda s: sf.EDMPreconditioning, {"sigma_data": POSITIVE}),
    "VPPreconditioning": Case(
        lambda s: sf.VPPreconditioning, {"beta_min": either(0.1), "beta_slope": POSITIVE, "steps": either(1000)}
    ),
    "VEPreconditioning": Case(lambda s: sf.VEPreconditioning, {}),
    "FlowPreconditioning": Case(lambda s: sf.FlowPreconditioning, {"label_scale": POSITIVE}),
    "DDPMPreconditioning": Case(
        lambda s: sf.DDPMPreconditioning,
        {"beta_start": either(1e-4), "beta_end": either(0.02), "steps": either(1000, 50)},
    ),
    "Preconditioning.__call__": Case(
        either(
            sf.EDMPreconditioning(),
            sf.VPPreconditioning(),
            sf.VEPreconditioning(),
            sf.FlowPreconditioning(),
            sf.DDPMPreconditioning(),
        ),
        SIGMA,
        local=True,
    ),
    "Denoiser": Case(
        lambda s: sf.Denoiser,
        {"network": lambda s: Net(), "preconditioning": either(None, lambda s: sf.VPPreconditioning())},
    ),
    "Denoiser.__call__": Case(
        lambda s: sf.Denoiser(Net()).forward,
        {"x": X, "sigma": either(lambda s: s.t, 0.5), "class_labels": LABELS, "augment_labels": either(None)},
        local=True,
    ),
    "Objective": Case(
        lambda s: sf.Objective,
        {
            "process": lambda s: s.process,
            "noise_levels": either(sf.LogNormal(), sf.LogUniform()),
            "weighting": either(sf.EDMWeighting(), sf.FlowWeighting()),
            "target": either(
                lambda s: sf.DenoisingTarget(s.process), lambda s: sf.StableTarget(s.process, references=sf.InBatch())
            ),
            "label_dropout": either(0.0, 0.5),
            "draws_per_image": either(1),
            "antithetic": either(False),
            "importance": either(None),
        },
    ),
    "Objective.__call__": Case(
        lambda s: s.objective.__call__,
        {
            "denoiser": constant(Denoise()),
            "x0": lambda s: s.x0,
            "class_labels": LABELS,
            "index": either(None),
            "augment_labels": either(None),
            "flip": either(None),
            "source_only": either(None),
            "generator": GENERATOR,
        },
    ),
    "Objective.draw": Case(
        lambda s: s.objective.draw,
        {"shape": lambda s: s.x0.shape, "generator": GENERATOR, "labelled": FLAG, **MADE},
    ),
    "Objective.example": Case(
        lambda s: s.objective.example,
        {
            "x0": lambda s: s.x0,
            "draws": State.draws,
            "class_labels": LABELS,
            "index": either(None),
            "flip": either(None),
            "source_only": either(None),
            "generator": GENERATOR,
        },
    ),
    "Objective.evaluate": Case(
        lambda s: s.objective.evaluate,
        {"denoiser": constant(Denoise()), "example": State.example, "augment_labels": either(None)},
    ),
    "GaussianKernel": Case(lambda s: sf.GaussianKernel, {}),
    "StudentTKernel": Case(lambda s: sf.StudentTKernel, {"dof": POSITIVE}),
    "StudentTKernel.noise": Case(
        lambda s: sf.StudentTKernel(64.0).noise, {"like": lambda s: s.x0, "generator": GENERATOR}
    ),
    "pick_noise_band": Case(
        lambda s: sf.pick_noise_band,
        {
            "pool": either(lambda s: sf.Pool(s.data), lambda s: sf.Pool(s.data, labels=s.pool_labels)),
            "tolerance": either(0.1, 0.01),
            "rows": either(4, 256),
            "generator": GENERATOR,
            "total": either(None, 1000),
            "device": either(None, torch.device("cpu")),
        },
        finite=False,
    ),
    "posterior": Case(
        lambda s: sf.posterior,
        {
            "x_t": lambda s: s.x_t,
            "alpha": either(1.0, lambda s: s.process.alpha(s.t)),
            "sigma": either(0.5, lambda s: s.process.sigma(s.t)),
            "references": lambda s: s.data,
            "source": either(None, lambda s: s.index),
            "labels": lambda s: s.row_labels,
            "reference_labels": lambda s: s.pool_labels,
            "log_prior": either(None, lambda s: torch.zeros(len(s.data))),
            "chunk_size": either(None, 3),
            "kernel": either(None, sf.StudentTKernel(64.0)),
        },
        needed=("labels", "reference_labels"),
    ),
    "InBatch": Case(lambda s: sf.InBatch, {}),
    "Pool": Case(
        lambda s: sf.Pool,
        {
            "data": either(lambda s: s.data, lambda s: s.data.numpy(), lambda s: s.images),
            "size": either(None, 3),
            "labels": either(None),
            "mirrored": FLAG,
            "flipped": either(None),
            "label_size": either(None),
            "unlabelled_size": either(None),
            "resampled": either(False),
            "weights": either(None, lambda s: torch.rand(len(s.data)) + 0.1 if len(s.data) == 7 + s.rows else None),
            "dtype": either(None),
        },
    ),
    "Pool.from_moments": Case(
        lambda s: sf.Pool.from_moments,
        {
            "mean": lambda s: s.data,
            "std": lambda s: torch.rand_like(s.data),
            "labels": either(None, lambda s: s.pool_labels),
            "flipped_mean": either(None),
            "flipped_std": either(None),
            "label_size": either(None),
            "unlabelled_size": either(None),
            "weights": either(None, lambda s: torch.rand(len(s.data)) + 0.1 if len(s.data) == 7 + s.rows else None),
            "dtype": either(torch.float32, torch.float16),
            "seed": either(0, 5),
        },
    ),
    "Pool.refresh": Case(
        lambda s: sf.Pool.from_moments(s.data, torch.rand_like(s.data)).refresh, {"draw": either(None, 0, 3)}
    ),
    "StableTarget": Case(lambda s: sf.StableTarget, {"process": lambda s: s.process, **TARGET_GOOD}, finite=False),
    "DenoisingTarget": Case(
        lambda s: sf.DenoisingTarget, {"process": lambda s: s.process, "validate_args": FLAG}, finite=False
    ),
    "StableTarget.__call__": Case(lambda s: sf.StableTarget(s.process, references=sf.InBatch()).__call__, CALL_GOOD),
    "StableTarget.__call__ of a Pool": Case(
        lambda s: sf.StableTarget(s.process, references=sf.Pool(s.data, labels=s.pool_labels)).__call__,
        {**CALL_GOOD, "labels": lambda s: s.row_labels},
        needed=("index", "labels"),
    ),
    "DenoisingTarget.__call__": Case(lambda s: sf.DenoisingTarget(s.process).__call__, CALL_GOOD),
    "from_diffusers": Case(lambda s: sf.from_diffusers, {"scheduler": lambda s: FakeScheduler()}),
    "Regression": Case(
        lambda s: sf.Regression,
        {
            "process": lambda s: s.process,
            "view": either("x0", "noise"),
            "clock": either("step", "share"),
            "steps": either(1000),
            "timesteps": either(None),
            "times": either(None),
        },
    ),
    "Regression.time": Case(
        lambda s: sf.from_diffusers(FakeScheduler()).time, {"timesteps": lambda s: s.index}, local=True
    ),
    "Regression.__call__": Case(
        lambda s: sf.from_diffusers(FakeScheduler()),
        {"target": lambda s: sf.DenoisingTarget(s.process)(s.x0, s.x_t, s.t)},
    ),
    # Samplers.
    "edm_sigmas": Case(lambda s: sampling.edm_sigmas, {**STEPS, **SIGMAS, "rho": either(7, 1.0)}),
    "ve_sigmas": Case(lambda s: sampling.ve_sigmas, {**STEPS, **SIGMAS}),
    "cosine_sigmas": Case(lambda s: sampling.cosine_sigmas, {**STEPS, **SIGMAS}),
    "vp_sigmas": Case(
        lambda s: sampling.vp_sigmas,
        {**STEPS, "beta_min": either(0.1), "beta_max": either(20.0), "epsilon": either(1e-3, 1e-5)},
    ),
    "euler": Case(lambda s: sampling.euler, {**WALK, "callback": CALLBACK}),
    "heun": Case(
        lambda s: sampling.heun,
        {
            **WALK,
            "s_churn": either(0.0, 1),
            "s_min": either(0.0, 0.1),
            "s_max": either(math.inf, 50),
            "s_noise": either(1.0, 1.003),
            "noise": NOISE,
            "generator": either(None),
            "callback": CALLBACK,
        },
    ),
    "dpmpp_2m": Case(lambda s: sampling.dpmpp_2m, {**WALK, "callback": CALLBACK}),
    "dpmpp_2m_sde": Case(
        lambda s: sampling.dpmpp_2m_sde,
        {
            **WALK,
            "eta": either(0, 1.0),
            "s_noise": either(1.0),
            "noise": NOISE,
            "generator": either(None),
            "callback": CALLBACK,
        },
    ),
    "euler_maruyama": Case(
        lambda s: sampling.euler_maruyama,
        {**WALK, "noise": NOISE, "generator": either(None), "callback": CALLBACK},
    ),
    "ancestral": Case(
        lambda s: sampling.ancestral,
        {**WALK, "noise": either(None), "generator": GENERATOR, "callback": CALLBACK},
    ),
    "predictor_corrector": Case(
        lambda s: sampling.predictor_corrector,
        {
            **WALK,
            "process": either("ve", "vp"),
            "predictor": either("ancestral", "reverse_diffusion"),
            "corrector_steps": either(0, 1),
            "snr": either(0.16, 0.1),
            "average_norms": FLAG,
            "noise": NOISE,
            "generator": either(None),
            "callback": CALLBACK,
        },
    ),
    "rk45": Case(
        lambda s: sampling.rk45,
        {
            **WALK,
            "sigmas": constant(torch.tensor([5.0, 1.0, 0.1])),
            "rtol": either(1e-2),
            "atol": either(1e-2),
            "max_nfe": either(500),
        },
    ),
    "log_likelihood": Case(
        lambda s: sampling.log_likelihood,
        {
            **WALK,
            "sigmas": constant(torch.tensor([5.0, 1.0, 0.1])),
            # The exact trace takes no probes.
            "exact": lambda s: s.rows == 2,
            "probes": lambda s: 1 if s.rows == 2 else s.random.choice([1, 2]),
            "prior_std": either(None, 5.0),
            "rtol": either(1e-2),
            "atol": either(1e-2),
            "max_nfe": either(500),
            "noise": NOISE,
            "generator": either(None),
        },
    ),
    "Likelihood.bits_per_dimension": Case(
        lambda s: sampling.Likelihood(log_prob=s.t, latents=s.x0).bits_per_dimension,
        {"bin_width": either(1 / 127.5, 1)},
    ),
    "counted": Case(lambda s: sampling.counted, {"denoiser": DENOISER}),
    "classifier_free": Case(
        lambda s: sampling.classifier_free,
        {
            "denoiser": DENOISER,
            "class_labels": lambda s: s.row_labels,
            "scale": either(1.5, 1),
            "interval": either(None, (0.1, 5.0)),
        },
    ),
    "autoguidance": Case(
        lambda s: sampling.autoguidance,
        {
            "denoiser": DENOISER,
            "guide": DENOISER,
            "scale": either(1.5, 1),
            "interval": either(None, (0.1, 5.0)),
            "class_labels": LABELS,
        },
    ),
    "Guided.__call__": Case(
        lambda s: sampling.classifier_free(Denoise(), s.row_labels, 1.5),
        {"x": X, "sigma": lambda s: s.t, "class_labels": either(None)},
        local=True,
    ),
    "SampleNoise": Case(lambda s: sampling.SampleNoise, {"seeds": either([1, 2], range(3), np.arange(2))}),
    "SampleNoise.latents": Case(
        lambda s: sampling.SampleNoise([1, 2]).latents, {"shape": lambda s: s.shape, **MADE}
    ),
    "SampleNoise.__call__": Case(lambda s: sampling.SampleNoise(range(s.rows)), {"x": X}),
    # Networks.
    "MLP": Case(lambda s: networks.MLP, MLP_GOOD),
    "MLP.forward": Case(
        lambda s: networks.MLP(s.shape, 8, 1, classes=3).to(s.dtype).forward,
        {"x": X, "noise_label": lambda s: s.t, "class_labels": LABELS},
        local=True,
    ),
    "SiT": Case(
        lambda s: networks.SiT,
        {**SIT_GOOD, "width": either(16), "depth": either(1), "heads": either(2), "mlp_ratio": either(4.0, 1)},
    ),
    "SiT.sized": Case(lambda s: networks.SiT.sized, {**SIT_GOOD, "size": either("XXS")}),
    "SiT.forward": Case(
        lambda s: networks.SiT(8, 2, 1, 16, 1, 2, classes=3).forward,
        {
            "x": lambda s: torch.randn(2, 1, 8, 8, generator=s.generator),
            "noise_label": either(0.5, torch.tensor([0.1, 0.2])),
            "class_labels": either(None, torch.tensor([0, -1])),
        },
        local=True,
    ),
    "SongUNet": Case(
        lambda s: networks.SongUNet,
        {**UNET_GOOD, "fourier": FLAG, "residual_input": FLAG, "taps": either((1, 1), (1, 3, 3, 1))},
    ),
    "SongUNet.ddpmpp": Case(lambda s: networks.SongUNet.ddpmpp, UNET_GOOD, needed=UNET_SMALL),
    "SongUNet.ncsnpp": Case(lambda s: networks.SongUNet.ncsnpp, UNET_GOOD, needed=UNET_SMALL),
    "SongUNet.forward": Case(
        lambda s: networks.SongUNet.ddpmpp(8, 1, 32, (1,), 1, classes=3).forward,
        {
            "x": lambda s: torch.randn(2, 1, 8, 8, generator=s.generator),
            "noise_label": either(0.5, torch.tensor([0.1, 0.2])),
            "class_labels": either(None, torch.tensor([0, -1])),
            "augment_labels": either(None),
        },
        local=True,
    ),
    # Data.
    "Origin": Case(
        lambda s: data.Origin,
        {
            "name": either("a"),
            "source": either("b"),
            "class_names": either(None),
            "resized": either("no"),
            "conversions": either({}),
            "skipped": either(0),
            "skipped_files": either(()),
            "notes": either(()),
        },
    ),
    "make_image_set": Case(
        lambda s: data.make_image_set,
        {
            "images": either(lambda s: s.images, lambda s: s.float_set().images),
            "labels": either(None, lambda s: s.labels, lambda s: s.labels.tolist()),
            "origin": lambda s: data.Origin(name="a", source="b"),
        },
    ),
    "ImageSet": Case(
        lambda s: data.ImageSet,
        {
            "images": lambda s: s.images,
            "labels": either(None, lambda s: s.labels),
            "class_names": either(None, ("a", "b", "c")),
            "name": either("a"),
            "manifest": lambda s: {},
            "opening": either(None, {}),
            "scaling": either(None),
            "moments": either(None),
            "flipped": either(None),
        },
    ),
    "ImageSet.scaled": Case(
        lambda s: s.float_set().scaled, {"index": either([0, 2], np.array([1]), slice(None), slice(1, 4))}
    ),
    "ImageSet.batch": Case(lambda s: s.image_set().batch, {"index": either([0, 2], np.array([1]))}),
    "IndexStream": Case(lambda s: data.IndexStream, {"size": either(10), "batch": either(3), **SEED}),
    "IndexStream.batch_at": Case(lambda s: data.IndexStream(10, 3, 0).batch_at, {"step": either(0, 7)}),
    "summary": Case(lambda s: data.summary, IMAGES),
    "sample_grid": Case(lambda s: data.sample_grid, {**IMAGES, "count": either(4, 64), **SEED, "vae": either("")}),
    "tile": Case(
        lambda s: data.tile,
        {"images": lambda s: s.images, "columns": either(None, 2), "scale": either(None, 1), "padding": either(2, 0)},
    ),
    "write_png": Case(
        lambda s: data.write_png,
        {"path": lambda s: s.tmp_path / "a.png", "array": lambda s: s.images[0, 0]},
    ),
    "pack": Case(
        lambda s: data.pack,
        {**IMAGES, "destination": lambda s: s.tmp_path / "b.stablefield", "overwrite": FLAG},
    ),
    "open_packed": Case(lambda s: data.open_packed, {"path": State.packed, "verify": FLAG}),
    "open_images": Case(
        lambda s: data.open_images,
        {
            "source": either("digits", State.packed),
            "resolution": either(None, 4),
            "limit": either(None, 8),
            "resize": either("crop", "squash"),
            "colour": either("auto", "rgb", "grey"),
            "background": either("white", "#102030"),
            "split": either("train"),
            "skip_broken": FLAG,
            "progress": either(None),
            "memory_budget": either(2**30),
            "cache": lambda s: s.tmp_path,
        },
        needed=("cache",),
    ),
    "PackedWriter": Case(
        lambda s: data.PackedWriter,
        {
            "destination": lambda s: s.tmp_path / "c.stablefield",
            "shape": either((1, 4, 4)),
            "overwrite": FLAG,
            "room": either(4096),
        },
    ),
    "PackedWriter.append": Case(
        lambda s: s.writer().append, {"images": lambda s: s.images}
    ),
    # Metrics.
    "fit_features": Case(lambda s: features.fit_features, {"features": lambda s: s.normal(9, 4)}),
    "fit_moments": Case(
        lambda s: features.fit_moments,
        {"mean": lambda s: s.normal(4), "cov": State.covariance, "number": either(1)},
    ),
    "distance_between": Case(lambda s: fid.distance_between, {"a": State.gaussian, "b": State.gaussian}),
    "frechet_distance": Case(
        lambda s: fid.frechet_distance,
        {
            "mean1": lambda s: s.normal(4),
            "cov1": State.covariance,
            "mean2": lambda s: s.normal(4),
            "cov2": State.covariance,
        },
    ),
    "frechet_distance_from_features": Case(lambda s: fid.frechet_distance_from_features, FEATURES),
    "kernel_distance": Case(
        lambda s: kid.kernel_distance,
        {**FEATURES, "generator": lambda s: s.generator, "subsets": either(2, 5), "subset_size": either(None, 3)},
    ),
    "precision": Case(lambda s: precision_recall.precision, {**SIDES, "radii": either(None)}),
    "recall": Case(lambda s: precision_recall.recall, {**SIDES, "radii": either(None)}),
    "density": Case(lambda s: precision_recall.density, {**SIDES, "radii": either(None)}),
    "coverage": Case(lambda s: precision_recall.coverage, {**SIDES, "radii": either(None)}),
    "nearest_ratio": Case(
        lambda s: memorisation.nearest_ratio,
        {
            "samples": lambda s: s.normal(9, 4),
            "training": lambda s: s.normal(8, 4),
            "held_out": either(None, lambda s: s.normal(3, 4)),
            "threshold": either(1 / 3, 0.5),
            "mirrored": either(False, True),
        },
    ),
    "inception_score": Case(
        lambda s: inception_score,
        {"probabilities": lambda s: torch.softmax(s.normal(12, 4), 1), "splits": either(1, 4), "seed": either(0, None)},
    ),
    "evaluate": Case(
        lambda s: sf.evaluate,
        {
            "samples": either(lambda s: s.images, lambda s: torch.from_numpy(s.images), State.image_set),
            "data": either(lambda s: s.images, State.image_set, lambda s: s.image_set_of),
            "metrics": either(("frechet", "nearest"), ["nearest"], ("kernel",)),
            "extractor": lambda s: RawPixels((1, 4, 4)),
            "classifier": either(None),
            "count": either(None, 4),
            "references": either(None, 5),
            "split": either("train", "test"),
            "held_out": either(None, lambda s: 255 - s.images),
            "repeats": either(1),
            "seed": either(0, 5),
            "per_class": either(False),
            "device": either(None, "cpu"),
            "batch": either(2, 64),
            "cache": either(False, lambda s: s.tmp_path / "cache"),
            "progress": either(None, lambda s: lambda report: None),
            "on_estimate": either(None, lambda s: lambda estimate: None),
        },
        needed=("metrics", "extractor", "cache"),
    ),
    "RawValues": Case(lambda s: RawValues, {"shape": either((3,), (4, 2, 2))}),
    "RawValues.__call__": Case(lambda s: RawValues(s.shape), {"images": lambda s: s.x0}, local=True),
    "RawPixels": Case(lambda s: RawPixels, {"shape": either((1, 4, 4))}),
    "RawPixels.__call__": Case(lambda s: RawPixels((1, 4, 4)), {"images": lambda s: torch.from_numpy(s.images)}),
    # Probe.
    "Population": Case(
        lambda s: population.Population,
        {"data": lambda s: s.data, "labels": either(None, lambda s: s.pool_labels), "drawn_from": either(None, 100)},
    ),
    "draw_population": Case(
        lambda s: population.draw_population,
        {
            **IMAGES,
            "labels": either(None, lambda s: s.labels),
            "max_images": either(4, 100),
            "by_class": either(False),
            **SEED,
        },
    ),
    "probe": Case(
        lambda s: sf.probe,
        {
            "data": either(lambda s: s.image_set(), lambda s: torch.from_numpy(s.images), lambda s: s.images / 127.5 - 1),
            "network": either(None, lambda s: Denoise(), lambda s: Net()),
            "labels": either(None),
            "by_class": either(False),
            "training": either(None, lambda s: probe_training.Training(process=sf.VE(), batch=4)),
            "batch": either(None, 4),
            "references": either((2, 4), [3]),
            "noise_levels": LEVELS,
            "aim": either(0.2),
            "max_images": either(5, 100),
            "sources": either(4),
            **SEED,
            "device": either("cpu"),
            "progress": either(None),
        },
        needed=("noise_levels", "sources", "batch"),
    ),
    "measure_variance": Case(
        lambda s: variance.measure_variance,
        {
            "population": State.population,
            "noise_levels": LEVELS,
            "process": either(None, sf.RectifiedFlow()),
            "sizes": either((2, 4), [3]),
            "sources": either(None, 4),
            "draws": either(2),
            **SEED,
            "progress": either(None),
        },
        needed=("draws", "noise_levels"),
    ),
    "find_noise_levels": Case(
        lambda s: variance.find_noise_levels, {"population": State.population, "count": either(3), **SEED}
    ),
    "find_phases": Case(
        lambda s: phases.find_phases, {"curve": State.curve, "tolerance": either(0.01, 0.1)}, finite=False
    ),
    "share_above": Case(
        lambda s: phases.share_above,
        {"level": POSITIVE, "noise_levels": either(sf.LogNormal()), "process": lambda s: s.process},
    ),
    "Training": Case(
        lambda s: advice.Training,
        {
            "process": lambda s: s.process,
            "noise_levels": either(sf.LogNormal()),
            "weighting": either(sf.EDMWeighting()),
            "batch": either(8),
        },
    ),
    "advise": Case(
        lambda s: advice.advise,
        {
            "curve": State.curve,
            "training": either(lambda s: advice.Training(noise_levels=sf.LogUniform(1.0, 1.0 + 1e-6))),
            "band": either(0.3, 0.0),
            "batch": either(None),
            "aim": either(0.1),
        },
        finite=False,
    ),
    "LossFloor.of": Case(
        lambda s: floor.LossFloor.of,
        {"curve": State.curve, "weighting": either(sf.EDMWeighting()), "size": either(1, 2)},
    ),
    "ExcessLoss": Case(
        lambda s: sf.ExcessLoss,
        {
            "data": either(lambda s: s.data, lambda s: s.data.numpy(), State.image_set),
            "process": either(None, sf.EDM(), sf.RectifiedFlow()),
            "noise_levels": either(None, sf.LogNormal()),
            "weighting": either(None, sf.EDMWeighting()),
            "prediction": either(None, "denoiser", "v", "velocity"),
            "held_out": either(None),
            "labels": either(None),
            "held_out_labels": either(None),
            "levels": either(1, 3),
            "rows": either(2, 5),
            "sample": either(None, 4),
            "batch": either(2, 256),
            **SEED,
            "device": either(None, "cpu"),
            "progress": either(None),
        },
    ),
    "ExcessLoss.__call__": Case(
        lambda s: sf.ExcessLoss(s.data, levels=2, rows=4),
        {"model": DENOISER, "progress": either(None)},
    ),
    "ExcessLoss.of": Case(
        lambda s: sf.ExcessLoss(s.data, levels=2, rows=4).of,
        {"row_loss": lambda s: s.t, "noise_level": lambda s: s.t + 0.1, "labels": either(None)},
        local=True,
    ),
    "check_bias": Case(
        lambda s: bias.check_bias,
        {
            "target": lambda s: sf.StableTarget(sf.EDM(), references=sf.InBatch()),
            "population": State.population,
            "process": either(None),
            "noise_levels": LEVELS,
            "batch": either(4),
            "batches": either(20),
            "label_dropout": either(0.0),
            "false_alarm": either(0.001),
            **SEED,
        },
        needed=("batches", "noise_levels"),
    ),
    "measure_fit": Case(
        lambda s: fit.measure_fit,
        {
            "denoiser": DENOISER,
            "population": State.population,
            "noise_levels": LEVELS,
            "labelled": either(False),
            "rows": either(4),
            "batch": either(2),
            **SEED,
            "progress": either(None),
        },
    ),
    "measure_ledger": Case(
        lambda s: variance_ledger.measure_ledger,
        {
            "network": lambda s: Net(),
            "population": State.population,
            "training": lambda s: probe_training.Training(process=s.process, batch=3),
            "labelled": either(False),
            "groups": either(3, 4),
            **SEED,
            "progress": either(None),
        },
        needed=("groups",),
    ),
    # Training.
    "Recipe": Case(
        lambda s: Recipe,
        {
            **{field.name: either(field.default) for field in dataclasses.fields(Recipe)
               if field.default is not dataclasses.MISSING and field.name != "precision"},
            "network": lambda s: MLPConfig(), "process": either(sf.EDM()), "noise_levels": either(sf.LogNormal()),
            "weighting": either(sf.EDMWeighting()), "preconditioning": either(sf.EDMPreconditioning()),
            "precision": either("float32", "bf16"), "steps": either(10), "batch": either(4),
        },
        finite=False,
    ),
    "power_exponent": Case(lambda s: ema.power_exponent, {"length": either(0.1, 0.05)}),
    "mixture": Case(
        lambda s: post_hoc.mixture,
        {
            "snapshots": constant([post_hoc.Profile(10, 0.05), post_hoc.Profile(10, 0.1)]),
            "wanted": constant(post_hoc.Profile(10, 0.07)),
        },
    ),
}  # fmt: skip


# --- bad values -------------------------------------------------------------------------------------------------------


class First(torch.nn.Module):
    """A network that gives its first argument back."""

    def forward(self, *values):
        return values[0] if values else None


class Samples:
    """A data set of torch's kind."""

    def __len__(self):
        return 4

    def __getitem__(self, k):
        return torch.zeros(3)


BAD = {
    "None": lambda s: None,
    "string": lambda s: "auto",
    "empty string": lambda s: "",
    "bytes": lambda s: b"x",
    "bool": lambda s: True,
    "complex": lambda s: 1 + 2j,
    "object": lambda s: object(),
    "dict": lambda s: {"a": 1},
    "list": lambda s: [0.1, 0.2],
    "list of tensors": lambda s: [torch.zeros(3), torch.zeros(3)],
    "empty list": lambda s: [],
    "nested list": lambda s: [[1.0], [1.0, 2.0]],
    "array": lambda s: s.x0.numpy(),
    "array of objects": lambda s: np.array(["a", None], dtype=object),
    "data set": lambda s: Samples(),
    "function": lambda s: lambda *a: None,
    "class": lambda s: sf.EDM,
    "process": lambda s: sf.EDM(),
    "module": lambda s: First(),
    "negative": lambda s: -1,
    "negative float": lambda s: -0.5,
    "zero": lambda s: 0,
    "half": lambda s: 1.5,
    "tiny": lambda s: 1e-300,
    "huge": lambda s: 1e30,
    "huge integer": lambda s: 10**400,
    "large integer": lambda s: 2**70,
    "nan": lambda s: math.nan,
    "inf": lambda s: math.inf,
    "-inf": lambda s: -math.inf,
    "zero-dim": lambda s: torch.tensor(0.5),
    "zero-dim integer": lambda s: torch.tensor(3),
    "empty tensor": lambda s: torch.empty(0),
    "no rows": lambda s: s.x0[:0],
    "other shape": lambda s: torch.zeros(4, 5, 6, 7),
    "more rows": lambda s: torch.cat([s.x0, s.x0]),
    "integers": lambda s: torch.ones(s.rows, dtype=torch.int64),
    "integers out of range": lambda s: torch.full((s.rows,), 10**6),
    "negative integers": lambda s: torch.full((s.rows,), -7),
    "bool tensor": lambda s: torch.ones(s.rows, dtype=torch.bool),
    "bool batch": lambda s: s.x0 > 0,
    "bytes tensor": lambda s: torch.zeros(s.rows, *s.shape, dtype=torch.uint8),
    "complex tensor": lambda s: s.x0.to(torch.complex64),
    "complex times": lambda s: s.t.to(torch.complex64),
    "half tensor": lambda s: s.x0.half(),
    "sparse tensor": lambda s: s.x0.to_sparse(),
    "sparse times": lambda s: s.t.to_sparse(),
    "meta tensor": lambda s: s.x0.to("meta"),
    "meta times": lambda s: s.t.to("meta"),
    "nan tensor": lambda s: torch.full_like(s.x0, math.nan),
    "nan times": lambda s: torch.full_like(s.t, math.nan),
    "inf tensor": lambda s: torch.full_like(s.x0, math.inf),
    "huge tensor": lambda s: torch.full_like(s.x0, 1e38),
    "zero times": lambda s: torch.zeros_like(s.t),
    "integer dtype": lambda s: torch.int64,
    "half dtype": lambda s: torch.float16,
    "no device": lambda s: "gpu:x",
    "cuda": lambda s: "cuda:7",
    "device meta": lambda s: "meta",
    "path": lambda s: s.tmp_path / "nothing-here",
    "folder": lambda s: s.tmp_path,
    "range": lambda s: range(3),
    "generator": lambda s: np.random.default_rng(0),
}


# --- calls ------------------------------------------------------------------------------------------------------------


class TooLongError(Exception):
    pass


@contextlib.contextmanager
def limited(seconds):
    """Stop what takes longer, where the system has alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def numbers_of(thing, depth=0):
    """All numbers in a result, as float64 arrays."""
    if isinstance(thing, bool | str | bytes | Path) or thing is None or depth > 4:
        return
    if isinstance(thing, Tensor):
        if thing.layout == torch.strided and thing.is_floating_point() and thing.device.type != "meta":
            yield thing.detach().double().numpy()
    elif isinstance(thing, np.ndarray):
        if thing.dtype.kind == "f":
            yield thing.astype(np.float64)
    elif isinstance(thing, int | float):
        yield np.array(float(thing) if abs(thing) < 1e300 else math.inf)
    elif isinstance(thing, tuple | list):
        for part in thing:
            yield from numbers_of(part, depth + 1)
    elif isinstance(thing, dict):
        yield from numbers_of(list(thing.values()), depth + 1)
    elif isinstance(thing, torch.nn.Module):
        yield from numbers_of(list(thing.parameters()), depth)


def fields_of(thing):
    """The parts of a result that is no setting."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return [getattr(thing, field.name) for field in dataclasses.fields(thing)]
    return thing


def drawn(name, case, state):
    """A call's arguments, and the bad ones among them by their names."""
    r = state.random
    function = case.make(state)
    parameters = inspect.signature(function).parameters
    taken = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments, bad = {}, {}
    for parameter in taken:
        must = parameters[parameter].default is inspect.Parameter.empty or parameter in case.needed
        if must or r.random() < 0.5:
            arguments[parameter] = case.good[parameter](state)
    amount = r.choices([0, 1, 2], [0.4, 0.48, 0.12])[0]
    for parameter in r.sample(taken, min(amount, len(taken))):
        kind = r.choice(list(BAD))
        bad[parameter] = kind
        arguments[parameter] = BAD[kind](state)
    return function, arguments, bad


def fault_of_call(name, number, tmp_path, counts):
    """Make one call; what is wrong with its outcome, or None."""
    state = State(10_007 * number + sum(map(ord, name)), tmp_path)
    state.tmp_path.mkdir(parents=True)
    with state.open:
        return fault_with(state, name, number, counts)


def fault_with(state, name, number, counts):
    case = CASES[name]
    with limited(SECONDS):
        function, arguments, bad = drawn(name, case, state)
    told = f"{name}({', '.join(f'{k}={bad[k]!r}' for k in bad) or 'good arguments'}), call {number}"
    try:
        with limited(SECONDS):
            result = function(**arguments)
    except TooLongError:
        return f"{told}: took more than {SECONDS} s"
    except (ValueError, TypeError) as error:
        message = str(error)
        counts["refused"] += 1
        if not bad:
            return f"{told}: {type(error).__name__}: {message}"
        if "() got " in message or ("takes " in message and "positional argument" in message):
            return f"{told}: {message}"
        if not message.rstrip().endswith(".") or " " not in message or "\n" in message.strip():
            return f"{told}: no sentence: {message}"
        values = [str(arguments[parameter]) for parameter in bad if isinstance(arguments[parameter], str | Path)]
        if not any(said(word, message) for word in (*inspect.signature(function).parameters, *values)):
            return f"{told}: names no argument: {message}"
        return None
    except Exception as error:
        return f"{told}: {type(error).__name__}: {error}"
    counts["good" if not bad else "accepted"] += 1
    if case.finite and not (case.local and bad):
        for values in numbers_of(fields_of(result)):
            if not np.isfinite(values).all() and not isinstance(result, sf.SNRWeighting):
                return f"{told}: not finite: {values.ravel()[:3]}"
    if isinstance(result, data.PackedWriter):
        state.open.enter_context(result)
    return None


def said(parameter, message):
    """Whether a message has the name of a parameter, as a flag or in words, or the value that it names."""
    return plain(parameter) in plain(message)


def plain(text):
    return text.replace("_", "").replace("-", "").replace(" ", "")


@pytest.mark.parametrize("name", CASES)
def test_every_call_gives_a_result_or_one_sentence(name, tmp_path):
    counts = {"good": 0, "refused": 0, "accepted": 0}
    share = -(-CALLS // len(CASES))
    torch.manual_seed(0)
    faults = [fault_of_call(name, number, tmp_path, counts) for number in range(share)]
    assert [fault for fault in faults if fault is not None] == []
    # Enough calls are good that results are looked at, and, where there is an argument, enough are not.
    assert counts["good"] >= share // 6
    assert counts["refused"] >= share // 12 or not CASES[name].good


def test_every_public_name_is_called_or_has_a_reason():
    public = {*sf.__all__, *sampling.__all__, *networks.__all__, *data.__all__}
    public -= {name for name in sf.__all__ if inspect.ismodule(getattr(sf, name))}
    called = {name.partition(".")[0].partition(" ")[0] for name in CASES}
    assert called & set(NOT_CALLED) <= {"Process", "Likelihood"}
    assert public - called == set(NOT_CALLED) - {"Process", "Likelihood"}


def test_every_parameter_has_good_values(tmp_path):
    state = State(0, tmp_path)
    state.tmp_path.mkdir()
    with state.open:
        for name, case in CASES.items():
            assert set(inspect.signature(case.make(state)).parameters) == set(case.good), name


def test_enough_calls_are_made():
    assert -(-CALLS // len(CASES)) * len(CASES) >= CALLS
