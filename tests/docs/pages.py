"""The site's pages as the tests see them: their blocks of code in order, and the commands in those."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "api")

# A comment before a block says what the tests do with its commands: `<!-- run: FLAGS -->` runs them with further flags
# that make them small, `<!-- parse -->` only reads them as the command would. `<!-- alone -->` hides
# stablefield from Python.
_BLOCK = re.compile(r"(?:^<!-- (run|parse|alone)(?:: (.*?))? -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: what stands behind its opening fence.
        text: what is in it.
        mark: "run", "parse", "alone" or "".
        flags: further flags for its commands.
    """

    language: str
    text: str
    mark: str
    flags: tuple[str, ...]

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of `stablefield` in each line that calls it."""
        lines = [line[2:] for line in self.text.splitlines() if line.startswith("$ stablefield ")]
        return [shlex.split(line, comments=True)[1:] for line in lines]

    @property
    def scripts(self) -> list[list[str]]:
        """A script of `examples` with its arguments, for each line that runs one."""
        lines = [line[2:] for line in self.text.splitlines() if line.startswith("$ python examples/")]
        return [shlex.split(line, comments=True)[1:] for line in lines]


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.finditer(page.read_text("utf-8"))
    return [Block(m[3], m[4], m[1] or "", tuple(shlex.split(m[2] or ""))) for m in found]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _BLOCK.sub("", page.read_text("utf-8"))
