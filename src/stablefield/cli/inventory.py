"""Makes the table of verbs and flags from the verbs' dataclasses.

`python -m stablefield.cli.inventory` writes it to flags.json.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from stablefield.cli.flags import FILE, Flag, Group, VerbFlags, record_of
from stablefield.cli.recipe_flags import BASES, RecipeFlags, TrainingFlags
from stablefield.cli.verbs import VERBS
from stablefield.training._recipe import Recipe

__all__ = ["inventory"]

# The most used flags, by verb; other verbs have few flags, and show them all at once.
_COMMON = {
    "train": "out recipe steps batch learning-rate resolution conditional target device resume",
    "compare": "out seeds recipe steps batch learning-rate resolution evaluations samples device",
    "sample": "out overwrite seeds sampler steps class guidance-scale ema checkpoint batch device",
    "evaluate": "data metrics samples repeats per-class extractor out overwrite report against sampler steps device",
    "probe": "references noise-levels plan batch aim by-class seed out device",
}
# The other flags, under these titles.
_GROUPS = {
    "Before a run": "time held-out dry-run print",
    "Real images": "split references held-out resolution resize colour background cache no-cache images-split",
    "Data": "resolution resize colour background skip-broken max-images sources augmentation mirror",
    "Model": "init conditional label-dropout ema checkpoint",
    "Latents of images": "latent-scaling vae no-decode",
    "Target": "references noise-band",
    "Variance of a batch": "draws-per-image antithetic importance-sampling",
    "Optimisation": (
        "learning-rate noise-distribution ramp-images decay-share max-grad-norm nan-to-num no-nan-to-num "
        "gradient-accumulation-steps seed precision compile exact fsdp"
    ),
    "Averages of the weights": "ema-half-life ema-ramp ema-snapshot-every",
    "Output, and how often": "log-every sample-every checkpoint-every keep-last keep-every tracker",
    "Measuring": "evaluate-every evaluate-samples extractor extractor-file extractor-size extractor-resize "
    "extractor-scale classifier feature-batch first-seed batch",
    "Noise levels of sampling": "grid sigma-min sigma-max rho",
    "Options of some samplers": "churn churn-range churn-noise eta predictor corrector-steps snr rtol atol",
    "Guidance": "class guidance-scale guidance-interval guide guide-ema",
    "Bias check": "check-bias false-alarm",
}
# Parts of a recipe that come in several kinds, with their own flags.
_PARTS = {
    "network": "Network",
    "process": "Process",
    "noise-levels": "Noise levels of training",
    "weighting": "Weights of the loss",
    "preconditioning": "Scalings around the network",
}
_OWNERS = {
    "Before a run": ("train",),
    "Real images": ("evaluate",),
    "Target": ("train", "compare"),
    "Variance of a batch": ("train", "compare"),
}
_MORE = "More"
# Flags that `compare` sets itself: it trains with both targets from several seeds, and saves with every score.
_NOT_IN = {"compare": ("target", "seed", "sample-every", "checkpoint-every", "exact", "fsdp")}


def inventory(recipe: Recipe | None = None) -> dict[str, VerbFlags]:
    """All verbs with their flags.

    Args:
        recipe: the recipe whose flags and defaults `train` and `compare` show; all recipes together if None.
    """
    bases = [recipe] if recipe else list(BASES.values())
    return {
        name: _verb(name, kind, bases if issubclass(kind, TrainingFlags) else [None]) for name, kind in VERBS.items()
    }


def _verb(name: str, kind: type, bases: Iterable[Recipe | None]) -> VerbFlags:
    arguments: dict[str, Flag] = {}
    by_title: dict[str, dict[str, list[Flag]]] = {}
    for base in bases:
        for part, flag in _flags(kind, dataclasses.MISSING if base is None else base, "", ""):
            if flag.name.removeprefix("--") in _NOT_IN.get(name, ()):
                continue
            if flag.name.startswith("--"):
                by_title.setdefault(_title(name, part, flag.name), {}).setdefault(flag.name, []).append(flag)
            else:
                arguments[flag.name] = flag
    common = {f"--{word}": place for place, word in enumerate(_COMMON.get(name, "").split())}
    parts = sorted(
        (title for title in by_title if title not in ("", _MORE, *_GROUPS)),
        key=lambda title: list(_PARTS.values()).index(title.partition(" (")[0]),
    )
    order = ["", *_GROUPS, *parts, _MORE]
    groups: list[Group] = []
    for title in order:
        flags = [_merged(variants) for variants in by_title.get(title, {}).values()]
        if not title:
            flags.sort(key=lambda flag: common.get(flag.name, len(common)))
        if flags:
            groups.append(Group(title, tuple(flags)))
    summary, *more = _paragraphs(kind)
    return VerbFlags(name, summary, tuple(more), tuple(arguments.values()), tuple(groups))


def _title(verb: str, part: str, name: str) -> str:
    word = name.removeprefix("--")
    if verb not in _COMMON or word in _COMMON[verb].split():
        return ""
    if part:
        return part
    for title, words in _GROUPS.items():
        if verb in _OWNERS.get(title, (verb,)) and word in words.split():
            return title
    return _MORE


def _merged(variants: list[Flag]) -> Flag:
    """The flag of all recipes; its default may depend on the recipe."""
    if len({flag.default for flag in variants}) == 1:
        return variants[0]
    return dataclasses.replace(variants[0], default="by the recipe")


def _flags(kind: type, base: Any, prefix: str, part: str) -> Iterator[tuple[str, Flag]]:
    """The flags of a dataclass, each with its part of a recipe.

    Args:
        kind: the dataclass.
        base: a recipe, for the field that takes one, or an instance of `kind`; MISSING for the fields' own defaults.
        prefix: prefix of the names.
        part: the part of a recipe that `kind` is.
    """
    hints, helps = get_type_hints(kind, include_extras=True), _helps(kind)
    for field in dataclasses.fields(kind):
        notes, bare = _notes(hints[field.name]), _bare(hints[field.name])
        if bare is RecipeFlags:
            yield from _flags(Recipe, base, "", "")
            continue
        name = next((note.name for note in notes if getattr(note, "name", None) is not None), field.name)
        label = name.replace("_", "-")
        value = getattr(base, field.name) if isinstance(base, kind) else _default(field)
        if _is_nested(bare):
            inner = type(value) if value is not dataclasses.MISSING else bare
            own = f"{_PARTS[label]} ({inner.__name__.removesuffix('Config')})" if label in _PARTS else part
            below = value if value is not dataclasses.MISSING else base
            yield from _flags(inner, below, f"{prefix}{label}." if label else prefix, own)
            continue
        takes, count = _takes(bare)
        text = helps.get(field.name, "")
        for sibling in helps if prefix else ():
            text = text.replace(f"--{sibling.replace('_', '-')}", f"--{prefix}{sibling.replace('_', '-')}")
        metavar = next((note.metavar for note in notes if getattr(note, "metavar", None)), "")
        if tyro.conf.Positional in notes:
            yield part, Flag(metavar, takes, count, text, required=value is dataclasses.MISSING)
        elif bare is bool and value is True:
            yield part, Flag(f"--{prefix}no-{label}", (), 0, _refused(text))
        else:
            yield part, Flag(f"--{prefix}{label}", takes, count, text, _shown(value), value is dataclasses.MISSING)


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING or value is None or value is False:
        return ""
    return " ".join(map(_shown, value)) if isinstance(value, tuple) else str(value)


def _refused(text: str) -> str:
    """The help of the switch that turns off what `text` describes."""
    text = text.removeprefix("Also ")
    return f"Do not {text[0].lower()}{text[1:]}"


def _notes(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _bare(hint: Any) -> Any:
    return getattr(hint, "__origin__", hint) if _notes(hint) else hint


def _options(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union; one kind alone otherwise."""
    return get_args(kind) if get_origin(kind) in (Union, type(int | str)) else (kind,)


def _is_nested(kind: Any) -> bool:
    return all(dataclasses.is_dataclass(option) for option in _options(kind))


def _takes(kind: Any) -> tuple[tuple[str, ...], int]:
    """The types and the number of a field's values."""
    takes: list[str] = []
    count = 1
    for option in _options(kind):
        if get_origin(option) is tuple:
            items = get_args(option)
            count = -1 if items[-1] is Ellipsis else len(items)
            takes += ["True", "False"] if items[0] is bool else _takes(items[0])[0]
        elif get_origin(option) is Literal:
            takes += [str(word) for word in get_args(option)]
        elif option is bool:
            return (), 0
        elif option is not NoneType:
            takes.append({int: "int", float: "float", str: "text", Path: "path"}[option])
    return tuple(takes), count


@functools.cache
def _helps(kind: type) -> dict[str, str]:
    """The help texts of a dataclass's fields: the docstring below a field, or its line under Args of the class."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        _, _, section = inspect.cleandoc(ast.get_docstring(tree) or "").partition("Args:\n")
        for match in re.finditer(r"^    (\w+): (.*(?:\n {8,}.*)*)", section.partition("\n\n")[0], re.M):
            text = " ".join(match[2].split())
            found[match[1]] = text[0].upper() + text[1:]
        for item, following in zip(tree.body, tree.body[1:], strict=False):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Constant):
                assert isinstance(item.target, ast.Name)
                found[item.target.id] = " ".join(str(text.value).split())
    return found


def _paragraphs(kind: type) -> list[str]:
    text = inspect.cleandoc(kind.__doc__ or "").partition("\n\nReferences:")[0]
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


if __name__ == "__main__":
    FILE.write_text(record_of(inventory()), encoding="utf-8")
    sys.stdout.write(f"written: {FILE}\n")
