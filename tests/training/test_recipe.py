"""Recipes: checked, scheduled, seeded, and the same after a journey through JSON."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

import stablefield as sf
from stablefield.training._config import decode, encode
from stablefield.training._recipe import DiffusersUNetConfig, MLPConfig, Recipe, SiTConfig, SongUNetConfig
from stablefield.training._recipes import DIGITS
from stablefield.training._seeding import Purpose, generator_for, seed_for


@pytest.mark.parametrize(
    "recipe",
    [
        DIGITS,
        Recipe(process=sf.VE(0.01, 50.0), noise_levels=sf.LogUniform(stratified=True), weighting=sf.SNRWeighting()),
        Recipe(process=sf.VP(), noise_levels=sf.Uniform(), preconditioning=sf.VPPreconditioning(), references=300),
        Recipe(process=sf.RectifiedFlow(), weighting=sf.FlowWeighting(), network=MLPConfig(width=64)),
        Recipe(process=sf.Cosine(), preconditioning=sf.VEPreconditioning(), conditional=True),
    ],
)
def test_recipe_is_the_same_after_json(recipe: Recipe) -> None:
    assert decode(json.loads(json.dumps(encode(recipe), allow_nan=False))) == recipe


def test_config_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="Trojan"):
        decode({"kind": "Trojan", "steps": 1})
    with pytest.raises(ValueError, match="stepz"):
        decode({"kind": "Recipe", "stepz": 1})


def test_learning_rate_ramps_up_stays_and_falls_to_zero() -> None:
    recipe = Recipe(steps=1000, batch=10, ramp_images=1000, decay_share=0.5, learning_rate=2.0)
    assert recipe.learning_rate_at(0) == pytest.approx(2.0 / 100)
    assert recipe.learning_rate_at(99) == recipe.learning_rate_at(500) == 2.0
    assert recipe.learning_rate_at(750) == pytest.approx(1.0)
    assert 0 < recipe.learning_rate_at(999) < 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"learning_rate": -1.0},
        {"references": 0},
        {"noise_band": float("nan")},
        {"label_dropout": 1.5},
        {"seed": -1},
    ],
)
def test_recipe_out_of_range_names_the_field(change: dict[str, float]) -> None:
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"^{name} is"):
        dataclasses.replace(DIGITS, **change)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longer(Recipe):
    """A recipe with numbers that no rule names."""

    patience: int = 5
    warmth: float = 0.5


@pytest.mark.parametrize("kind", [int, float])
def test_negative_number_is_refused_in_every_field_whatever_its_name(kind: type[float]) -> None:
    names = [field.name for field in dataclasses.fields(Longer) if field.type is kind]
    assert {"patience", "warmth"} & set(names)
    for name in names:
        for value in (-1, kind("nan")) if kind is float else (-1,):
            with pytest.raises(ValueError, match=f"^{name} is {value}: "):
                dataclasses.replace(Longer(), **{name: value})


@dataclasses.dataclass(frozen=True)
class Squared(sf.NoiseLevels):
    """A distribution that no file can name."""

    def quantile(self, u: torch.Tensor, process: sf.Process) -> torch.Tensor:  # noqa: ARG002
        return u**2


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"references": 20.0}, ValueError, "references=20.0: .*, or auto, all or sharded"),
        ({"references": "20"}, ValueError, "references is '20': pass a whole number, auto, all or sharded"),
        ({"references": "ALL"}, ValueError, "references is 'ALL': .* Did you mean all"),
        ({"references": None}, TypeError, "references is None: .* auto, all or sharded"),
        ({"references": True}, TypeError, "references is the bool True: "),
        ({"noise_band": "Auto"}, ValueError, "noise_band is 'Auto': pass a number or auto. Did you mean auto"),
        ({"noise_band": None}, TypeError, "noise_band is None: pass a number, or auto"),
        ({"target": "DSM"}, ValueError, "target is 'DSM': pass stf or dsm. Did you mean dsm"),
        ({"target": None}, TypeError, "target is None: pass stf or dsm"),
        ({"precision": "fp64"}, ValueError, "precision is 'fp64': pass float32 or bf16"),
        ({"latent_scaling": "x"}, ValueError, "latent_scaling is 'x': pass measured or autoencoder"),
        ({"network": {"width": 8}}, TypeError, r"network is a dict: pass MLPConfig\(...\), SongUNetConfig\(...\)"),
        ({"network": torch.nn.Linear(1, 1)}, TypeError, "network is a Linear: pass MLPConfig"),
        ({"network": MLPConfig}, TypeError, "network is the class MLPConfig: pass MLPConfig"),
        ({"noise_levels": Squared()}, TypeError, r"noise_levels is a Squared: pass LogNormal\(...\)"),
        ({"process": "vp"}, TypeError, r"process is the string 'vp': pass EDM\(...\), VE\(...\)"),
        ({"preconditioning": sf.VPPreconditioning(steps=9.5)}, ValueError, "preconditioning.steps=9.5: "),
    ],
)
def test_value_of_another_type_names_the_field_and_its_choices(change: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=f"^{said}"):
        Recipe(**change)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (SongUNetConfig, {"architecture": "NCSNPP"}, "architecture is 'NCSNPP': .* Did you mean ncsnpp"),
        (SongUNetConfig, {"architecture": "ddpm"}, "architecture is 'ddpm': .* Did you mean ddpmpp"),
        (SongUNetConfig, {"multipliers": 2}, "multipliers is an int: pass a tuple"),
        (SongUNetConfig, {"multipliers": (1, 2.5)}, r"multipliers\[1\]=2.5: pass a whole number"),
        (MLPConfig, {"depth": "4"}, "depth is the string '4': pass a whole number"),
        (DiffusersUNetConfig, {"attention": (1, 0, 0)}, r"attention\[0\] is an int: pass True or False"),
        (SiTConfig, {"mlp_ratio": None}, "mlp_ratio is None: pass a number"),
    ],
)
def test_network_of_a_wrong_type_names_the_field(kind: type, change: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^network.{said}"):
        kind(**change)


def test_numbers_of_numpy_and_lists_are_those_of_a_recipe_in_plain_python() -> None:
    given: Any = {
        "references": np.int64(64),
        "noise_band": torch.tensor(0.5),
        "seed": np.int64(3),
        "learning_rate": np.float32(2**-10),
        "ema_half_life": 10**30,
        "mirror": np.bool_(True),
        "target": np.str_("dsm"),
        "network": SongUNetConfig(multipliers=[1, np.int64(2)], dropout=np.float32(0.5)),
        "process": sf.VE(np.float64(0.5), np.int32(50)),
        "noise_levels": sf.LogNormal(np.float32(-1), torch.tensor(2.0)),
    }
    plain = Recipe(
        references=64,
        noise_band=0.5,
        seed=3,
        learning_rate=2**-10,
        ema_half_life=1e30,
        mirror=True,
        target="dsm",
        network=SongUNetConfig(multipliers=(1, 2), dropout=0.5),
        process=sf.VE(0.5, 50),
        noise_levels=sf.LogNormal(-1, 2.0),
    )
    recipe = Recipe(**given)
    assert recipe == plain
    assert decode(json.loads(json.dumps(encode(recipe), allow_nan=False))) == plain


def test_seeds_of_purposes_and_steps_are_all_different() -> None:
    seeds = {seed_for(seed, purpose, step) for seed in range(3) for purpose in Purpose for step in range(300)}
    assert len(seeds) == 3 * len(Purpose) * 300
    a, b = generator_for(1, Purpose.OBJECTIVE, 7), generator_for(1, Purpose.OBJECTIVE, 7)
    assert torch.equal(torch.randn(5, generator=a), torch.randn(5, generator=b))


def test_recipes_written_with_names_from_before_still_open():
    old = {"kind": "Recipe", "clip": 2.0, "accumulate": 3, "mend_gradients": True}
    assert decode(old) == Recipe(max_grad_norm=2.0, gradient_accumulation_steps=3, nan_to_num=True, exact=True)
    networks = {
        "Perceptron": ({"width": 32}, MLPConfig(width=32)),
        "UNet": ({"base_channels": 16, "multipliers": [1, 2]}, SongUNetConfig(base_channels=16, multipliers=(1, 2))),
        "UNet2D": ({"widths": [32, 64]}, DiffusersUNetConfig(widths=(32, 64))),
    }
    for kind, (options, network) in networks.items():
        assert decode({"kind": "Recipe", "network": {"kind": kind, **options}}) == Recipe(network=network, exact=True)
