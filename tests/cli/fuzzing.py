"""Command lines at random, in part wrong: a seed gives the same ones everywhere."""

import random
from collections.abc import Sequence
from pathlib import Path

from stablefield.cli.flags import Flag, all_verbs

WORDS = [
    "",
    "-",
    "--",
    "x" * 300,
    "[red]",
    "[/x]",
    "a b",
    "\x1b[31mred",
    "ä\u202e",
    "..",
    "~",
    "0",
    "-1",
    "1e400",
    "nan",
    "None",
]
NUMBERS = ["0", "1", "2", "3", "-1", "7", "1e400", "nan", "inf", "-inf", "0.5", "x", "", "99999999999999999999", "1_0"]
# What makes a command small; at random places, other values of these are left out, since they decide how long it takes.
SMALL = {
    "train": "--steps 2 --batch 4 --network.width 8 --network.depth 1 --sample-every 0 --device cpu",
    "compare": "--steps 2 --batch 4 --network.width 8 --network.depth 1 --looks 1 --samples 40 --seeds 0 --device cpu",
    "sample": "--seeds 0-2 --steps 2 --batch 4 --device cpu",
    "evaluate": "--samples 40 --references 40 --steps 2 --extractor pixels --device cpu --metrics frechet nearest",
    "probe": "--max-images 40 --sources 8 --references 4 --device cpu",
    "bench": "--batch 2 --references 8 --pairs 1 --no-growth --no-step --device cpu",
    "export": "--samples 2 --steps 2 --format plain",
}
COSTLY = set(" ".join(SMALL.values()).split()) | {
    "--push", "--network.blocks", "--network.widths", "--resolution", "--extractor", "--evaluate-samples", "--repeats",
    "--network.multipliers", "--network.base-channels", "--recipe", "--compile", "--tracker", "--corrector-steps",
    "--growth", "--step", "--rtol", "--atol", "--ema-snapshot-every", "--count", "--sampler", "--evaluate-every",
}  # fmt: skip


def commands(count: int, seed: int, places: Sequence[Path], run: Path, out: Path) -> list[list[str]]:
    """Command lines of all verbs.

    Args:
        count: how many.
        seed: of the draws.
        places: files and folders, good and bad, to be named as data and the like.
        run: a run's folder.
        out: a folder in which things may be written.
    """
    rng = random.Random(seed)
    return [_command(rng, k, places, run, out) for k in range(count)]


# How often a verb is drawn; those that take longest, least.
OFTEN = {"compare": 1, "bench": 1, "evaluate": 2, "probe": 3, "doctor": 1}


def _command(rng: random.Random, k: int, places: Sequence[Path], run: Path, out: Path) -> list[str]:
    verbs = all_verbs()
    verb = verbs[rng.choices(list(verbs), [OFTEN.get(name, 6) for name in verbs])[0]]
    words = [*verb.name.split()]
    for argument in verb.arguments:
        likely = str(run) if "RUN" in argument.name else "digits"
        if argument.name == "DEST":
            likely = str(out / f"{k}.safetensors")
        words.append(likely if rng.random() < 0.7 else rng.choice([*map(str, places), *WORDS]))
    words += SMALL.get(verb.name, "").split()
    flags = [flag for group in verb.groups for flag in group.flags]
    if any(flag.name == "--out" for flag in flags):
        suffix = {
            "data inspect": ".png",
            "sample": rng.choice([".jpg", ".npz", ""]),
            "evaluate": ".json",
            "report": ".json",
        }.get(verb.name, "")
        words += ["--out", str(out / f"{k}{suffix}") if rng.random() < 0.8 else str(rng.choice(places))]
    for flag in rng.sample(flags, min(len(flags), rng.choice([0, 1, 1, 2, 3]))):
        if flag.name not in COSTLY and flag.name != "--out":
            words += [flag.name, *_values(rng, flag, places)]
    for _ in range(rng.choice([0, 0, 0, 0, 1, 2])):
        _spoil(rng, words)
    return words


def _values(rng: random.Random, flag: Flag, places: Sequence[Path]) -> list[str]:
    if not flag.count:
        return []
    count = rng.choice([0, 1, 2]) if flag.count < 0 else flag.count
    return [_value(rng, flag, places) for _ in range(count)]


def _value(rng: random.Random, flag: Flag, places: Sequence[Path]) -> str:
    kind = rng.choice(flag.takes)
    if rng.random() < 0.1:
        return rng.choice(WORDS)
    if kind in ("int", "float"):
        return rng.choice(NUMBERS)
    if kind in ("text", "path"):
        return rng.choice([*map(str, places), *WORDS, "0", "1,2", "half-life"])
    return kind


def _spoil(rng: random.Random, words: list[str]) -> None:
    place = rng.randrange(len(words))
    kind = rng.randrange(5)
    if kind == 0:
        del words[place]
        words[:] = words or ["train"]
    elif kind == 1:
        words.insert(place, rng.choice(WORDS))
    elif kind == 2 and len(words[place]) > 2:
        at = rng.randrange(len(words[place]))
        words[place] = words[place][:at] + words[place][at + 1 :]
    elif kind == 3:
        words.append(
            rng.choice(["--lr", "--help", "--epochs", "--version", "-h", "--debugg", "-x", "--out", "--no-mirror"])
        )
    else:
        other = rng.randrange(len(words))
        words[place], words[other] = words[other], words[place]
