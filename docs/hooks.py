"""What the site takes from the project's own files: the changes of the examples, measured numbers, and formulas.

mkdocs calls the functions named `on_...`. On a page, a comment of its own line stands for what a file holds:

    <!-- changes: examples/accelerate_loop.py -->   the lines of a script that stable targets change, as a diff
    <!-- script: examples/accelerate_loop.py -->    the whole script
    <!-- own weight -->                             the table of benchmarks/results/own_weight.json
"""

import difflib
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

__all__ = [
    "changes",
    "formulas",
    "on_page_content",
    "on_page_markdown",
    "on_post_page",
    "on_post_template",
    "own_weight",
    "script",
]

ROOT = Path(__file__).resolve().parents[1]
# As the theme's plugin `offline` writes it.
_WORKER = re.compile(r'https://[^"]*/iframe-worker/shim')


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what the project's files hold in the place of the comments."""
    markdown = re.sub(r"^<!-- changes: (\S+) -->$", lambda m: changes(ROOT / m[1]), markdown, flags=re.M)
    markdown = re.sub(r"^<!-- script: (\S+) -->$", lambda m: script(ROOT / m[1]), markdown, flags=re.M)
    return re.sub(r"^<!-- own weight -->$", lambda _: own_weight(), markdown, flags=re.M)


def on_page_content(html: str, **_: Any) -> str:
    """Turn the formulas of a page into MathML, which browsers draw by themselves."""
    return formulas(html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Load the search's worker from the site itself: the theme names a copy of it elsewhere."""
    return _WORKER.sub("../" * page.url.count("/") + "assets/iframe-worker.js", output)


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for the page of what is not found, whose addresses begin at the site's root."""
    return _WORKER.sub("/assets/iframe-worker.js", output_content)


def script(path: Path) -> str:
    """A script as a block of code."""
    return f"```python\n{path.read_text('utf-8')}```"


def changes(script: Path) -> str:
    """What stable targets change in an example, as a diff: lines marked `# +` came, those behind `# -` went."""
    source = script.read_text("utf-8").splitlines()
    before = [re.sub(r"^(\s*)# - ", r"\1", line) for line in source if not line.endswith("# +")]
    after = [re.sub(r"\s*# \+$", "", line) for line in source if not re.match(r"\s*# - ", line)]
    # The first lines are the names of the two files.
    lines = list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]
    shown = ["..." if line.startswith("@@") else line for line in lines]
    return "\n".join(["```diff", *shown[shown[0] == "..." :], "```"])


def own_weight() -> str:
    """The committed measurement of the source's own weight on CIFAR-10, as a table."""
    record = json.loads((ROOT / "benchmarks/results/own_weight.json").read_text("utf-8"))
    rows = ["| noise level | n = 1,024 | n = 4,096 | n = 50,000 | variance removed, n = 50,000 |", "|" + "--:|" * 5]
    for level in record["levels"]:
        own = (f"{level[f'own_weight_{n}']:.4f}" for n in (1024, 4096, 50000))
        cells = [f"{level['noise_level']:g}", *own, f"{level['variance_removed_50000']:.3g}"]
        rows.append(f"| {' | '.join(cells)} |")
    said = f"`{record['command']}`, {record['rows_per_level']} rows a level, torch {record['torch']}, {record['date']}."
    return "\n".join([*rows, "", said])


def formulas(page: str) -> str:
    """The formulas that the Markdown extension has marked, as MathML."""

    def mathml(found: re.Match[str]) -> str:
        text = html.unescape(found[2]).strip()
        return convert(text[2:-2], display="block" if text.startswith(r"\[") else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', mathml, page, flags=re.S)
