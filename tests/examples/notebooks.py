"""Notebooks without Jupyter: run their cells in order, and keep what they print and show in the file.

`python tests/examples/notebooks.py` runs the notebooks of examples/ in an empty folder and writes their outputs anew.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def code(notebook: dict[str, Any]) -> list[str]:
    """The sources of its cells of code, in order."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def shown(value: object, count: int) -> dict[str, Any]:
    """A value as a notebook shows it: as a picture, if it is one, and in words."""
    data: dict[str, Any] = {"text/plain": lines(repr(value))}
    picture = value._repr_png_() if hasattr(value, "_repr_png_") else None
    if picture is not None:
        data = {"image/png": base64.b64encode(picture).decode(), **data}
    return {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}


def execute(sources: list[str]) -> list[list[dict[str, Any]]]:
    """Run cells in one namespace, in the folder where we are: the outputs of each.

    Warnings are errors where they are made so; nothing is caught.
    """
    space: dict[str, Any] = {"__name__": "__main__"}
    found: list[list[dict[str, Any]]] = []
    for count, source in enumerate(sources, 1):
        body = ast.parse(source).body
        end = body[-1]
        last = ast.Expression(end.value) if isinstance(end, ast.Expr) else None
        body = body if last is None else body[:-1]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(body, []), f"<cell {count}>", "exec"), space)
            value = None if last is None else eval(compile(last, f"<cell {count}>", "eval"), space)
        outputs: list[dict[str, Any]] = []
        if printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
        if value is not None:
            outputs.append(shown(value, count))
        found.append(outputs)
    return found


def refresh(path: Path) -> None:
    """Run a notebook and write its outputs into its file."""
    notebook = read(path)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["XDG_CACHE_HOME"] = folder
        outputs = execute(code(notebook))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (cell, found) in enumerate(zip(cells, outputs, strict=True), 1):
        cell["execution_count"], cell["outputs"] = count, found
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or NOTEBOOKS:
        refresh(Path(name).resolve())
