"""The table of verbs and flags: current, the parser's own, read without torch, and told in 80 columns."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest

import stablefield
from stablefield.cli.entry import main
from stablefield.cli.flags import FILE, all_verbs, record_of
from stablefield.cli.inventory import inventory
from stablefield.cli.recipe_flags import TrainingFlags
from stablefield.cli.verbs import VERBS
from stablefield.training._recipe import Recipe
from stablefield.training._recipes import DIGITS, RECIPES

TEN = "--out --recipe --steps --batch --learning-rate --resolution --conditional --target --device --resume"


def told(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    return out.getvalue()


def test_the_table_is_that_of_the_verbs() -> None:
    assert FILE.read_text("utf-8") == record_of(inventory()), "run python -m stablefield.cli.inventory"
    assert all_verbs() == inventory()


def test_every_word_of_the_groups_is_a_flag_that_stands_there() -> None:
    from stablefield.cli import inventory as module

    shown = {name: verb.groups for name, verb in inventory().items()}
    for title, words in module._GROUPS.items():
        groups = [group for verb in shown.values() for group in verb if group.title in ("", title)]
        flags = {flag.name for group in groups for flag in group.flags}
        assert {f"--{word}" for word in words.split()} <= flags, title
    for name, words in module._COMMON.items():
        first = {flag.name for group in shown[name] if not group.title for flag in group.flags}
        assert {f"--{word}" for word in words.split()} == first, name


@pytest.mark.parametrize("recipe", [DIGITS, RECIPES["cifar10-ve"], RECIPES["cifar10-vp"]], ids=["digits", "ve", "vp"])
def test_the_flags_are_those_that_the_parser_takes(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    import tyro

    decided_by_compare = {"--target", "--seed", "--sample-every", "--checkpoint-every"}
    decided_by_compare |= {"--exact", "--no-exact", "--fsdp", "--no-fsdp"}  # of many processes
    for name, verb in inventory(recipe).items():
        calls = [(VERBS[name], {})]
        if issubclass(VERBS[name], TrainingFlags):
            calls.append((Recipe, {"default": recipe}))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            for kind, default in calls:
                with pytest.raises(SystemExit):
                    tyro.cli(kind, args=["--help"], config=(tyro.conf.AvoidSubcommands,), **default)
        lines = re.findall(r"^\W? {0,2}(--[a-z][\w.-]*)(?:, (--[\w.-]+))?", out.getvalue(), re.M)
        taken = {flag for line in lines for flag in line if flag}
        here = set(verb.flags())
        # A switch can be turned off too; the table has the one of both that changes something.
        both = {flag for flag in taken if verbs_opposite(flag) in here}
        assert here <= taken, name
        assert taken - here - both - (decided_by_compare if name == "compare" else set()) == set(), name


def verbs_opposite(flag: str) -> str:
    prefix, dot, last = flag.removeprefix("--").rpartition(".")
    return f"--{prefix}{dot}{last.removeprefix('no-') if last.startswith('no-') else f'no-{last}'}"


def test_every_flag_says_what_it_is_for() -> None:
    for verb in all_verbs().values():
        for flag in [*verb.arguments, *(flag for group in verb.groups for flag in group.flags)]:
            assert flag.help, f"{verb.name} {flag.name}"
            assert all(group.title != "More" for group in verb.groups), verb.name


def test_help_of_train_opens_with_the_ten_flags_that_people_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = told("train", "--help")
    parts = re.split(r"\n\n(?=\S)", text)
    first = next(part for part in parts if part.startswith("The flags most used"))
    assert re.findall(r"^  (--[\w.-]+)", first, re.M) == TEN.split()
    assert text.index(first) < 700  # on the first page of a terminal
    assert set(re.findall(r"^  (--[\w.-]+)", text, re.M)) == set(all_verbs()["train"].flags())


@pytest.mark.parametrize("name", ["", *all_verbs(), "data"])
def test_help_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = told(*name.split(), "--help").splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_help_of_one_recipe_shows_its_own_flags_and_defaults() -> None:
    text = " ".join(told("train", "--recipe", "cifar10-ve", "--help").split())
    assert "--process.sigma-max FLOAT Noise at t = 1. Default: 100.0." in text
    assert "--network.architecture ddpmpp|ncsnpp" in text
    assert "--network.width INT" not in text
    assert "Default: 390625." in text
    assert "--network.width INT" in told("train", "digits", "--help")


def test_version_and_overview() -> None:
    assert told("--version") == f"stablefield {stablefield.__version__}\n"
    for call in ([], ["--help"], ["-h"], ["help"]):
        text = told(*call)
        assert all(f"  {verb.split()[0]}" in text for verb in all_verbs())
    assert told("help", "sample") == told("sample", "--help")
    assert "pack" in told("data")
    assert "inspect" in told("data", "--help")


@pytest.mark.timed
def test_what_needs_no_torch_is_answered_within_half_a_second_and_without_it() -> None:
    calls = [
        [],
        ["--help"],
        ["--version"],
        ["trian", "digits"],
        ["train", "digits", "--stepz", "3"],
        ["train", "--help"],
    ]
    calls += [["sample"], ["train", "digits", "--steps", "many"], ["data"]]
    code = f"""
import sys, time
start = time.perf_counter()
from stablefield.cli.entry import main
for call in {calls!r}:
    try:
        main(call)
    except SystemExit as end:
        print("END", end.code, time.perf_counter() - start, "torch" in sys.modules, file=sys.stderr)
    start = time.perf_counter()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    ends = re.findall(r"END (\d) (\S+) (\w+)", done.stderr)
    assert [end[0] for end in ends] == ["0", "0", "0", "2", "2", "0", "2", "2", "0"]
    assert all(float(end[1]) < 0.5 for end in ends), ends
    assert {end[2] for end in ends} == {"False"}
