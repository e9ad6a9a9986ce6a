"""Help texts, from the table of verbs and flags."""

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence

from stablefield.cli.flags import Flag, VerbFlags, all_verbs

__all__ = ["DESCRIPTION", "answer", "as_flags", "expects", "overview", "usage"]

DESCRIPTION = "Low-variance training targets for diffusion and flow models, and a trainer that uses them."

_WIDEST = 100
_LEFT = 26
_HELP = ("-h", "--help", "help")
_VERSION = ("--version", "-V", "version")
_NAMES = {"int": "INT", "float": "FLOAT", "text": "TEXT", "path": "PATH"}
_PARTS = (
    "The recipe chooses the network, the process and the noise levels: stablefield {verb} --recipe NAME --help shows the "
    "flags and defaults of one."
)
# Arguments whose flags have other names: `class` is a word of Python.
_RENAMED = {"class_label": "--class"}
# If a flag's words are longer than this, list them in its help text.
_FEW = 24


def answer(arguments: Sequence[str]) -> str | None:
    """The answer to a call that asks for help or the version; None for any other call."""
    verbs = all_verbs()
    if not arguments or arguments[0] in _HELP:
        name = " ".join(word for word in arguments[1:] if word not in _HELP)
        return usage(verbs[name]) if name in verbs else overview(name if _below(name) else "")
    if arguments[0] in _VERSION:
        import stablefield

        return f"stablefield {stablefield.__version__}"
    wants_help = any(argument in _HELP[:2] for argument in arguments)
    for name, verb in verbs.items():
        words = name.split()
        if list(arguments[: len(words)]) == words:
            return usage(verb) if wants_help else None
    if _below(arguments[0]) and (wants_help or len(arguments) == 1):
        return overview(arguments[0])
    return None


def overview(verb: str = "") -> str:
    """The list of verbs, or of those below one of them, such as `data`."""
    verbs = _below(verb) if verb else all_verbs()
    prog = f"stablefield {verb}".strip()
    width = _width()
    lines = [f"usage: {prog} VERB ...", ""]
    if not verb:
        lines += [*textwrap.wrap(DESCRIPTION, width), "", "Verbs:"]
    left = max(map(len, verbs)) + 4
    for name, found in verbs.items():
        lines += _entry(name, found.summary, left, width)
    lines += ["", *textwrap.wrap(f"{prog} VERB --help lists the flags of a verb.", width)]
    if not verb:
        lines += [
            "stablefield --version prints the version.",
            "--debug, with any verb, shows the traceback of an error.",
            "",
            "To start: stablefield train digits",
        ]
    return "\n".join(lines)


def usage(verb: VerbFlags) -> str:
    """The help of a verb: its most used flags first, the others in groups."""
    width = _width()
    needed = [flag for group in verb.groups for flag in group.flags if flag.required]
    words = ["usage: stablefield", verb.name, *(a.name if a.required else f"[{a.name}]" for a in verb.arguments)]
    words += [f"{flag.name} {_metavar(flag)}" for flag in needed]
    lines = [" ".join([*words, "[flags]"] if verb.groups else words), ""]
    for paragraph in (verb.summary, *verb.more):
        lines += [*textwrap.wrap(paragraph, width, break_on_hyphens=False), ""]
    for argument in verb.arguments:
        lines += _entry(argument.name, argument.help, _LEFT, width)
    if verb.arguments:
        lines.append("")
    several = len(verb.groups) > 1
    for group in verb.groups:
        lines.append(f"{group.title or ('The flags most used' if several else 'Flags')}:")
        for flag in group.flags:
            lines += _entry(f"{flag.name} {_metavar(flag)}".rstrip(), text_of(flag), _LEFT, width)
        lines.append("")
    if any("(" in group.title for group in verb.groups):
        lines += textwrap.wrap(_PARTS.format(verb=verb.name), width, break_on_hyphens=False)
    return "\n".join(lines).rstrip()


def as_flags(message: str, renamed: Mapping[str, str] | None = None, verb: str = "") -> str:
    """Translate an error of the library for the command: "samples=5: ..." becomes "--samples 5: ...".

    Args:
        message: names an argument with its value, as in name=value; at its start also as in "name is missing".
        renamed: flags, or words such as DATA, for arguments with another name. Any other argument changes only if a flag
            has its name.
        verb: the verb whose flags to use; all if empty.
    """
    verbs = all_verbs()
    known = {name for one in ([verbs[verb]] if verb in verbs else verbs.values()) for name in one.flags()}

    others = _RENAMED | dict(renamed or {})

    def flag_of(argument: str) -> str | None:
        name = others.get(argument) or f"--{argument.replace('_', '-')}"
        return name if name in known or argument in (renamed or {}) else None

    message = re.sub(r"^([a-z][\w.]*)(?= (is|has|and|needs) )", lambda found: flag_of(found[0]) or found[0], message)
    # A switch has no value. Folders may be called `runs/seed=0,width=8`: nothing changes after a slash, or a comma alone.
    message = re.sub(r"(?<![\w./,-])([a-z][\w.]*)=True\b", lambda found: flag_of(found[1]) or found[0], message)
    message = re.sub(
        r"(?<![\w./,-])([a-z]\w*)=False\b",
        lambda found: flag_of(f"no_{found[1]}") or flag_of(found[1]) or found[0],
        message,
    )
    # Without a space before the value: `a = b` is a formula.
    message = re.sub(
        r"(?<![\w./,-])([a-z][\w.]*)=(?=[^\s=])",
        lambda found: found[0] if (flag := flag_of(found[1])) is None else f"{flag} ",
        message,
    )
    message = re.sub(r"(?<!\S)(--[\w.-]+|[A-Z]+) '([^'\s]*)'", r"\1 \2", message)  # as the user typed it
    # A height and a width, as --resolution takes them.
    message = re.sub(r"(?<=--resolution )\((\d+), (\d+)\)", r"\1x\2", message)
    # Words with underscores are always names.
    return re.sub(r"(?<![\w./-])[a-z]+(?:_[a-z]+)+(?![\w./(-])", lambda found: flag_of(found[0]) or found[0], message)


def text_of(flag: Flag) -> str:
    """A flag's help, its words if they are many, and its default."""
    words = "" if not _listed(flag) else f" One of {', '.join(_words(flag))}."
    default = "" if not flag.default else f" Default: {flag.default}."
    needed = " Required." if flag.required else ""
    return f"{flag.help}{words}{default}{needed}".strip()


def _words(flag: Flag) -> list[str]:
    return [word for word in flag.takes if word not in _NAMES]


def _listed(flag: Flag) -> bool:
    return len("|".join(_words(flag))) > _FEW


def _metavar(flag: Flag) -> str:
    if not flag.count:
        return ""
    kinds = [_NAMES[word] for word in flag.takes if word in _NAMES]
    one = "|".join([*kinds, *(["NAME"] if _listed(flag) else _words(flag))])
    return f"{one} ..." if flag.count < 0 else " ".join([one] * flag.count)


def expects(flag: Flag) -> str:
    """The values that a flag takes, in words."""
    kinds = {"int": "a whole number", "float": "a number", "text": "a word", "path": "a path"}
    choices = [kinds.get(word, word) for word in flag.takes]
    one = choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    if abs(flag.count) == 1 or flag.count == 0:
        return one
    return f"{flag.count} values, each {one}"


def _entry(name: str, text: str, left: int, width: int) -> list[str]:
    """A line or several: the name, and beside it the text."""
    beside = textwrap.wrap(text, width - left, break_long_words=False, break_on_hyphens=False) or [""]
    head = f"  {name}"
    if len(head) + 2 > left:
        return [head, *(" " * left + line for line in beside)]
    return [head.ljust(left) + beside[0], *(" " * left + line for line in beside[1:])]


def _below(name: str) -> Mapping[str, VerbFlags]:
    """The verbs of two words that begin with one."""
    return {full.split()[1]: verb for full, verb in all_verbs().items() if full.split()[:-1] == [name]}


def _width() -> int:
    return max(40, min(_WIDEST, shutil.get_terminal_size().columns))
