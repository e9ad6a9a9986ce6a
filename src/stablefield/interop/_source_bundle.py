"""Bundle modules into one self-contained source file: their texts one after another, without imports of each other.

So an export holds the code of its network, and it is exactly the code that trained it.
"""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

__all__ = ["bundle"]

_HEAD = '''"""{docstring}"""

# Written by stablefield, Apache-2.0: the modules {names}.

'''


def bundle(modules: Sequence[ModuleType], docstring: str, package: str = "stablefield") -> str:
    """The source of `modules` as one module.

    Args:
        modules: in an order in which each uses names only of those before it.
        docstring: of the result.
        package: omit imports from this package, because the text holds what they import.

    Raises:
        ValueError: if two of them define the same name, or one imports another module of the package.
    """
    names = [module.__name__ for module in modules]
    imports: dict[str, None] = {}
    bodies: list[str] = []
    defined: dict[str, str] = {}
    for module in modules:
        assert module.__file__ is not None
        source = Path(module.__file__).read_text("utf-8")
        tree, lines = ast.parse(source), source.splitlines()
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
                    if node.module not in names:
                        raise ValueError(f"{module.__name__} imports {node.module}, which is not among {names}.")
                else:
                    imports[ast.unparse(node)] = None
                _blank(lines, node)
            elif _is_docstring(node, tree) or _assigns(node, "__all__"):
                _blank(lines, node)
            for name in _names(node):
                if name in defined:
                    raise ValueError(f"{name} is defined in {defined[name]} and in {module.__name__}: rename one.")
                defined[name] = module.__name__
        bodies.append("\n".join(lines).strip("\n"))
    head = _HEAD.format(docstring=docstring, names=", ".join(names))
    return head + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


def _blank(lines: list[str], node: ast.stmt) -> None:
    assert node.end_lineno is not None
    for number in range(node.lineno - 1, node.end_lineno):
        lines[number] = ""


def _is_docstring(node: ast.stmt, tree: ast.Module) -> bool:
    return node is tree.body[0] and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign) and not _assigns(node, "__all__"):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
