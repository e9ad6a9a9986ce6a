"""A command line is read once for each flag, and the one on record asks for the same."""

import dataclasses
import shlex

import pytest

from stablefield.cli.compare import Compare
from stablefield.cli.probe import Probe
from stablefield.cli.verbs import parse


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--seeds 0,4 --steps 30 --batch 32 --evaluations 2 --samples 300",
        "--recipe digits --network.width 64 --mirror --learning-rate 0.002 --extractor random",
        "--recipe imagefolder --resolution 16 --network.base-channels 16 --network.multipliers 1 2 --no-augmentation",
        "--conditional --weighting.sigma-data 0.25 --noise-levels.mean -1.5 --references 256",
    ],
)
def test_command_of_a_comparison_is_read_back_as_the_same(flags: str) -> None:
    flags = flags.replace("--no-augmentation", "--augmentation 0")
    verb = parse(["compare", "digits", *flags.split()])
    assert isinstance(verb, Compare)
    chosen = verb.chosen()
    words = shlex.split(verb.command(chosen))
    assert words[:3] == ["stablefield", "compare", "digits"]
    again = parse(words[1:])
    assert isinstance(again, Compare)
    assert dataclasses.replace(again, config=verb.config) == verb
    assert again.chosen().recipe == chosen.recipe
    if flags:
        assert len(words) > 4


@pytest.mark.parametrize(
    "flags", ["", "--references 4,all --plan ve --by-class --aim 0.2", "--resolution 8x12 --colour grey --skip-broken"]
)
def test_command_of_a_probe_is_read_back_as_the_same(flags: str) -> None:
    verb = parse(["probe", "my photos", *flags.split()])
    assert isinstance(verb, Probe)
    words = shlex.split(verb._command)
    assert words[:3] == ["stablefield", "probe", "my photos"]
    assert parse(words[1:]) == verb
    assert len(words) == 3 + len(flags.split())
