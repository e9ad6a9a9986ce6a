"""Import public names on first access (PEP 562), as listed in a package's stub.

Type checkers and editors read the same stub, `__init__.pyi`, so there is one list of names. Importing a package stays cheap,
and you can use one part of the library without the dependencies of another.
"""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["attach"]


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package from the imports in its stub.

    Args:
        package: its `__name__`.
        file: its `__file__`; the stub is beside it.

    Returns:
        Both functions. The first one also knows `__all__`.
    """
    listed: dict[str, str] = {}

    def places() -> dict[str, str]:
        if not listed:
            stub = ast.parse(Path(file).with_suffix(".pyi").read_text("utf-8"))
            for node in stub.body:
                if isinstance(node, ast.ImportFrom):
                    # `from . import part` names the package itself.
                    listed.update({alias.name: node.module or package for alias in node.names})
        return listed

    def public(name: str) -> Any:
        if name == "__all__":
            return sorted(places())
        if name.startswith("_") or name not in places():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place = places()[name]
        if place == package:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(place), name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *places()})

    return public, names
