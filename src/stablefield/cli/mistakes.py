"""Finds mistakes in a command line by the table of flags alone, before importing torch or reading any file."""

import difflib
import re
from collections.abc import Sequence

from stablefield.cli.flags import Flag, VerbFlags, all_verbs
from stablefield.cli.usage import expects

__all__ = ["checked"]

# Names of the same flags in other programs.
_SAME = {
    "--learning-rate": "--lr",
    "--batch": "--batch-size --batchsize --bs --train-batch-size",
    "--steps": "--max-steps --num-steps --n-steps --train-steps --max-train-steps --total-steps --iterations --iters "
    "--num-iterations --num-inference-steps",
    "--out": "-o --output --output-dir --output-path --out-dir --outdir --save-dir",
    "--resolution": "--image-size --img-size --imgsize --size --res",
    "--colour": "--color --color-mode --colour-mode --mode",
    "--background": "--background-color --background-colour --bg --bg-color --alpha-color",
    "--max-grad-norm": "--clip --grad-clip --clip-grad --gradient-clip --gradient-clip-val",
    "--gradient-accumulation-steps": "--accumulate --grad-accum --accumulation-steps --accumulate-grad-batches",
    "--nan-to-num": "--mend-gradients",
    "--mirror": "--flip --hflip --xflip --random-flip --horizontal-flip",
    "--conditional": "--cond --class-cond --class-conditional",
    "--label-dropout": "--class-dropout --class-dropout-prob --cfg-dropout",
    "--guidance-scale": "--guidance --cfg --cfg-scale",
    "--guidance-interval": "--interval",
    "--class": "--class-label --class-labels --classes --class-idx --class-name --label",
    "--evaluations": "--looks --num-evaluations",
    "--sampler": "--solver",
    "--checkpoint-every": "--save-every --save-interval --checkpoint-interval --checkpointing-steps",
    "--log-every": "--log-interval --logging-steps",
    "--sample-every": "--sample-interval",
    "--tracker": "--logger --report-to",
    "--metrics": "--metric",
    "--data": "--dataset --data-dir --data-path --real",
    "--samples": "--num-samples --n-samples",
    "--references": "--refs --num-references",
    "--overwrite": "--force",
    "--dry-run": "--dryrun",
    "--time": "--max-time --time-limit --time-budget --max-train-time --duration",
    "--held-out": "--holdout --hold-out --val --val-data --val-split --validation --validation-split",
    "--init": "--init-from --pretrained --finetune --fine-tune --finetune-from --transfer",
    "--compile": "--torch-compile",
    "--extractor": "--features",
    "--max-images": "--images --num-images --max-samples",
}
# Flags of other programs without an equal here: the flag to use instead, and how.
_OTHER = {
    "--epochs --num-epochs --max-epochs --n-epochs --num-train-epochs": (
        "--steps",
        "give --steps, images x epochs / batch size; --dry-run shows the epochs",
    ),
    "--data --dataset --data-dir --data-path --path --input -i": ("DATA", "name the data without a flag"),
    "--run --model --checkpoint --ckpt --network-pkl": ("RUN", "name the run's folder without a flag"),
    "--gpu --gpus --cuda --accelerator": ("--device", "give --device cuda; start several processes with torchrun"),
    "--cpu --no-cuda": ("--device", "give --device cpu"),
    "--fp16 --bf16 --amp --half --mixed-precision --dtype": ("--precision", "give --precision bf16"),
    "--num-workers --workers --dataloader-num-workers": (
        "--gradient-accumulation-steps",
        "leave it out: the trainer always reads images ahead",
    ),
    "--wandb --use-wandb": ("--tracker", "give --tracker wandb"),
    "--tensorboard --logdir": ("--tracker", "give --tracker tensorboard"),
    "--ema --ema-decay --ema-rate --use-ema": (
        "--ema-half-life",
        "give --ema-half-life, in images; the trainer always averages the weights",
    ),
    "--grayscale --greyscale --grey --gray": ("--colour", "give --colour grey"),
    "--rgb": ("--colour", "give --colour rgb"),
    "--warmup --warmup-steps --lr-warmup-steps --lr-warmup": (
        "--ramp-images",
        "give --ramp-images, steps x batch size",
    ),
    "--optimizer --optim --weight-decay --beta1 --betas": ("--learning-rate", "leave it out: the optimiser is Adam"),
    "--num-samples --n-samples --num-images --samples --count --num --n -n": (
        "--seeds",
        "give --seeds, such as --seeds 0-63 for 64 images",
    ),
    "--seed": ("--seeds", "give --seeds"),
    "--out --output -o --dest --destination": ("DEST", "name it after DATA, without a flag"),
    "--resume-from --resume-from-checkpoint --checkpoint --ckpt": ("--resume", "give --resume --out RUN"),
    "--arch --architecture --model --network": ("--recipe", "give --recipe, or the flags that begin with --network"),
    "--target": ("--evaluations", "leave it out: compare trains with both targets"),
    "--sample-every --checkpoint-every": (
        "--evaluations",
        "give --evaluations, the number of scores and checkpoints of each run",
    ),
}
_VERBS = {
    "fit": "train",
    "training": "train",
    "resume": "train",
    "generate": "sample",
    "samples": "sample",
    "draw": "sample",
    "eval": "evaluate",
    "fid": "evaluate",
    "plot": "report",
    "page": "report",
    "benchmark": "bench",
    "convert": "import",
    "pack": "data pack",
    "inspect": "data inspect",
    "encode": "data encode",
    "check": "doctor",
}
_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


def checked(arguments: Sequence[str]) -> list[str]:
    """The arguments under the verb's own names, those without a flag first.

    It also accepts the usual names of other programs.

    Raises:
        ValueError: if a verb, flag or value is unknown, or something is missing; suggests the likely one.
    """
    verb, rest = _verb(arguments)
    flags = verb.flags()
    found: list[str] = []
    plain: list[str] = []
    given: set[str] = set()
    greedy = ""
    place = 0
    while place < len(rest):
        word = rest[place]
        place += 1
        if not _is_flag(word):
            plain.append(word)
            continue
        name, equals, value = word.partition("=")
        name = _known(name, verb, flags)
        if not equals:
            found.append(name)
        if name in given and (flags.get(name) or flags[_opposite(name)])[0].count not in (0, 1):
            raise ValueError(f"{name} is given twice: give all of its values after one, such as {name} A B.")
        given.add(name)
        variants = flags.get(name) or flags[_opposite(name)]
        values = [value] if equals else []
        many = variants[0].count
        if many == 0 and equals:
            raise ValueError(f"{name}={value}: {name} takes no value; give {name} alone.")
        while not equals and place < len(rest) and not _is_flag(rest[place]) and len(values) != many:
            values.append(rest[place])
            found.append(rest[place])
            place += 1
        if many < 0 and len(values) > 1:
            greedy = f" {name} took {values[-1]}, too: name what has no flag first."
        if equals:
            found.append(f"{name}={value}")
        else:
            _check_count(name, variants, values, rest[place:])
        for value in values:
            if not any(_takes(flag, value) for flag in variants):
                raise ValueError(f"{name} is {value}: it takes {expects(variants[0])}.")
    _check_rest(verb, plain, given, greedy)
    return [*verb.name.split(), *plain, *found]


def _verb(arguments: Sequence[str]) -> tuple[VerbFlags, list[str]]:
    verbs = all_verbs()
    for name, verb in verbs.items():
        words = name.split()
        if list(arguments[: len(words)]) == words:
            return verb, list(arguments[len(words) :])
    first = arguments[0]
    heads = dict.fromkeys(name.split()[0] for name in verbs)
    if first in heads:
        below = [name.split()[1] for name in verbs if name.startswith(f"{first} ")]
        other = arguments[1] if len(arguments) > 1 else "nothing"
        nearest = _nearest(other, below)
        hint = f" Did you mean {first} {nearest[0]}?" if nearest else ""
        raise ValueError(f"{first} takes {', '.join(below[:-1])} or {below[-1]}, not {other}.{hint}")
    if first.startswith("-"):
        raise ValueError(
            f"{first} stands before the verb: name the verb first, such as stablefield train. {_all(heads)}"
        )
    meant = [_VERBS[first.lower()]] if first.lower() in _VERBS else _nearest(first.lower(), list(heads))
    hint = f"Did you mean {' or '.join(meant)}? " if meant else ""
    raise ValueError(f"there is no verb {first}. {hint}{_all(heads)}")


def _all(heads: "dict[str, None]") -> str:
    return f"The verbs: {', '.join(heads)}. Their descriptions: stablefield --help"


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and not _NUMBER.match(word)


def _opposite(name: str) -> str:
    """The opposite of a switch, such as --no-mirror."""
    prefix, dot, last = name.removeprefix("--").rpartition(".")
    return f"--{prefix}{dot}{last.removeprefix('no-') if last.startswith('no-') else f'no-{last}'}"


def _known(name: str, verb: VerbFlags, flags: "dict[str, list[Flag]]") -> str:
    """The verb's own name of a flag.

    Raises:
        ValueError: if it has none; suggests the nearest.
    """
    own = name.replace("_", "-").lower() if name.startswith("--") else name
    own = f"-{own}" if re.fullmatch(r"-[a-z][\w-]+", own) else own  # -steps, with one dash
    opposite = flags.get(_opposite(own), [])
    if own in flags or (opposite and opposite[0].count == 0):
        return own
    for there, names in _SAME.items():
        if own in names.split() and there in flags:
            return there
    raise ValueError(f"{verb.name} has no flag {name}: {_meant(own, verb, flags)}")


def _meant(name: str, verb: VerbFlags, flags: "dict[str, list[Flag]]") -> str:
    everything = f"All of its flags: stablefield {verb.name} --help"
    names = {*flags, *(argument.name for argument in verb.arguments)}
    for others, (needed, way) in _OTHER.items():
        if name in others.split() and needed in names:
            return f"{way}. {everything}"
    last = name.removeprefix("--")
    same = [flag for flag in flags if flag.rpartition(".")[2] == last]
    # Names of other programs may have typos, too.
    others = {other: flag for flag, text in _SAME.items() if flag in flags for other in text.split()}
    near = same or list(dict.fromkeys(others.get(one, one) for one in _nearest(name, [*flags, *others])))
    if not near:
        return f"there is none like it. {everything}"
    suggested = " or ".join(f"{flag} ({flags[flag][0].help.partition('. ')[0].rstrip('.')})" for flag in near[:2])
    return f"did you mean {suggested}? {everything}"


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    bare = {name.lstrip("-"): name for name in known}
    word = word.lstrip("-")
    near = difflib.get_close_matches(word, list(bare), n=3, cutoff=0.65)
    if not near and len(word) > 3:
        near = [name for name in bare if word in name or (name in word and len(name) > 3)]
    return [bare[name] for name in near]


def _check_count(name: str, variants: Sequence[Flag], values: Sequence[str], after: Sequence[str]) -> None:
    many = variants[0].count
    if many >= 0 and len(values) < many:
        followed = f", and {after[0]} is a flag; write {name}={after[0]} to pass it" if after else ""
        lacks = "its value" if many == 1 else "values"
        raise ValueError(f"{name} lacks {lacks}: it takes {expects(variants[0])}{followed}.")


def _takes(flag: Flag, value: str) -> bool:
    for kind in flag.takes:
        if kind in ("text", "path") or kind == value:
            return True
        if kind in ("int", "float"):
            try:
                int(value) if kind == "int" else float(value)
            except ValueError:
                continue
            return True
    return False


def _flag_for(verb: VerbFlags, extra: str) -> str:
    """Advice on an extra argument: the flag that it probably belongs to."""
    meant = {"evaluate": "--data", "export": "--out", "sample": "--out"}.get(verb.name)
    return f"give {meant} {extra}, " if meant is not None else ""


def _check_rest(verb: VerbFlags, plain: Sequence[str], given: "set[str]", greedy: str) -> None:
    """Check the arguments without a flag, and that all required ones are present.

    Args:
        verb: the verb.
        plain: the arguments without a flag.
        given: the flags.
        greedy: what to say of a flag that may have taken an argument as one of its values.
    """
    if len(plain) > len(verb.arguments):
        extra = plain[len(verb.arguments)]
        if not verb.arguments:
            raise ValueError(f"{verb.name} takes no {extra}: leave it out.")
        names = " and ".join(argument.name for argument in verb.arguments)
        raise ValueError(
            f"{verb.name} takes {names}, so {extra} is one too many: {_flag_for(verb, extra)}leave it out, or put quotes "
            "around a name with spaces."
        )
    for argument in verb.arguments[len(plain) :]:
        if argument.required:
            raise ValueError(
                f"{argument.name} is missing: {argument.help}{greedy} Help: stablefield {verb.name} --help"
            )
    for group in verb.groups:
        for flag in group.flags:
            if flag.required and flag.name not in given:
                raise ValueError(f"{flag.name} is missing. {flag.help} More: stablefield {verb.name} --help")
