"""Recipes: checked, scheduled, seeded, and the same after a journey through JSON."""

import dataclasses
import json

import pytest
import torch

import stablefield as sf
from stablefield.training._config import decode, encode
from stablefield.training._recipe import DiffusersUNetConfig, MLPConfig, Recipe, SongUNetConfig
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
