"""Claims on the house itself: which way imports point, what an import costs, and what the sources may hold."""

import ast
import functools
import graphlib
import importlib
import importlib.metadata
import inspect
import os
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import stablefield

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "stablefield"

# Rooms by floor: a room may import from lower floors only. "" is the package itself, `stablefield/__init__.py`, which offers
# the core's names.
FLOORS = [
    {"_lazy"},
    {
        "_shapes",
        "_modules",
        "_precision",
        "_reading",
        "_regular_file",
        "_atomic_file",
        "_progress",
        "_wait_report",
        "_warning",
    },
    {"_memory", "_distributed"},
    {"targets"},
    {"diffusion"},
    {"networks", "sampling"},
    {"_cost"},
    {""},
    {"_commit", "_doctor"},
    {"data"},
    {"report"},
    {"_bench"},
    {"evaluation"},
    {"probing"},
    {"training"},
    {"interop"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# A target is made for a process, which imports nothing of targets.
# A run is exported by a method of its own, which imports the exporter when it is called.
# A run may begin with weights of other programs, and the reader of their files is imported when there is such a file.
EXCEPTIONS = {
    ("targets", "stablefield.diffusion._process"),
    ("training", "stablefield.interop._export"),
    ("training", "stablefield.interop._published"),
}


def module_name(path, source):
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(source):
    return {module_name(path, source): path for path in sorted(source.rglob("*.py"))}


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text("utf-8"))


def imports_of(name, path, modules):
    """Modules of ours that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return {target for target in found if target.split(".")[0] == "stablefield"}


def room_of(name):
    return name.split(".")[1] if "." in name else ""


def violations(source):
    modules = modules_of(source)
    wrong = []
    for name, path in modules.items():
        here = room_of(name)
        if here not in FLOOR:
            wrong.append(f"{name} is in a room that has no floor")
            continue
        for target in sorted(imports_of(name, path, modules)):
            there = room_of(target)
            if there == here or (here, target) in EXCEPTIONS:
                continue
            if there not in FLOOR or FLOOR[there] >= FLOOR[here]:
                wrong.append(f"{name} imports {target}")
    return wrong


def test_imports_point_one_way():
    assert len(modules_of(SOURCE)) > 20
    assert violations(SOURCE) == []


def test_no_module_imports_itself_through_others():
    modules = modules_of(SOURCE)
    graph = {name: imports_of(name, path, modules) - {name} for name, path in modules.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("room", "line", "wrong"),
    [
        ("targets", "from stablefield.diffusion._process import Process", False),
        ("targets", "from stablefield.diffusion import _process", False),
        ("targets", "from stablefield.diffusion._weighting import EDMWeighting", True),
        ("targets", "import stablefield", True),
        ("diffusion", "from stablefield.targets._target import Target", False),
        ("diffusion", "def f():\n    import stablefield.sampling", True),
        ("diffusion", "from ..sampling import heun", True),
        ("diffusion", "from . import _process", False),
        ("sampling", "from stablefield.networks import MLP", True),
        ("networks", "from stablefield import __version__", True),
        ("data", "from stablefield._shapes import per_row", False),
        ("data", "from stablefield.evaluation import fid", True),
        ("evaluation", "from stablefield.probing import variance", True),
        ("training", "from stablefield.probing import variance", False),
        ("training", "if True:\n    from stablefield.cli.entry import main", True),
        ("probing", "from stablefield.training._loop import train", True),
        ("report", "from stablefield.interop import diffusers", True),
        ("cli", "import stablefield.report._page, stablefield", False),
        ("_shapes", "import stablefield.targets", True),
        ("attic", "import torch", True),
    ],
)
def test_an_import_that_points_up_would_be_noticed(tmp_path, room, line, wrong):
    source = tmp_path / "stablefield"
    for place in ("diffusion/_process", "targets/_target"):
        (source / place).parent.mkdir(parents=True)
        (source / place).with_suffix(".py").touch()
    (source / "__init__.py").touch()
    (source / room).mkdir(exist_ok=True)
    (source / room / "planted.py").write_text(line)
    assert bool(violations(source)) == wrong


# --- what an import needs and costs -----------------------------------------------------------------------------------


def core_dependencies():
    """Import names of torch, numpy and what torch itself requires, all the way down."""
    pending, seen = ["torch", "numpy"], set()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in seen:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        seen.add(name)
        pending += [re.match(r"[\w.-]+", line)[0] for line in required if "extra ==" not in line]
    tops = importlib.metadata.packages_distributions()
    names = {re.sub(r"[-_.]+", "-", dist).lower(): dist for dists in tops.values() for dist in dists}
    assert {"torch", "numpy"} <= set(names)
    return {top for top, dists in tops.items() if any(re.sub(r"[-_.]+", "-", d).lower() in seen for d in dists)}


# Whatever is not allowed is not found, as if it were not installed.
GUARD = """
import sys
allowed = set({allowed!r}) | set(sys.stdlib_module_names) | {{"stablefield"}}

class Guarded:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

before = set(sys.modules)
sys.meta_path[:] = [Guarded(finder) for finder in sys.meta_path]
"""


def run_python(code, *flags):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=ROOT,
        check=False,
    )


def test_the_library_imports_with_torch_and_numpy_alone():
    allowed = core_dependencies()
    assert not {"scipy", "pytest", "PIL", "hypothesis"} & allowed
    guard = GUARD.format(allowed=sorted(allowed))
    core = [name for name in modules_of(SOURCE) if room_of(name) in {"targets", "diffusion", "networks", "sampling"}]
    assert len(core) > 20
    code = f"""
import importlib, stablefield
for name in {core!r}:
    importlib.import_module(name)
target = stablefield.DenoisingTarget(stablefield.VP())
x0 = stablefield.LogNormal().sample(stablefield.VP(), 8)[:, None]
value = stablefield.Objective(stablefield.VP(), target=target)(lambda x, s: x, x0)
assert value.loss > 0
foreign = {{name.partition(".")[0] for name in set(sys.modules) - before}} - allowed
print("foreign:", sorted(name for name in foreign if getattr(sys.modules.get(name), "__spec__", None)))
"""
    done = run_python(guard + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "foreign: []\n"
    # The guard does guard: what is installed here is not found behind it.
    refused = run_python(guard + "import stablefield\nimport scipy\n")
    assert refused.returncode == 1
    assert "ModuleNotFoundError: No module named 'scipy'" in refused.stderr


def timed_imports(count=1):
    """Seconds that importing the library takes beyond torch and numpy, `count` times, and the modules that it brought.

    Each time in a fork of one interpreter that has imported torch and numpy.
    """
    code = f"""
import os, sys, time, torch, numpy
before = set(sys.modules)
for _ in range({count}):
    if os.fork() == 0:
        status, start = 1, time.perf_counter()
        try:
            import stablefield
            stablefield.posterior  # the public names are imported when the first is asked for
            print(time.perf_counter() - start, *set(sys.modules) - before, flush=True)
            status = 0
        finally:
            os._exit(status)
    assert os.wait()[1] == 0
"""
    lines = [line.split() for line in run_python(code).stdout.splitlines()]
    assert len(lines) == count
    return [float(line[0]) for line in lines], set(lines[0][1:])


@pytest.mark.timed
def test_the_import_takes_no_more_than_0_3_seconds_beyond_torch_and_numpy():
    assert 0 < statistics.median(timed_imports(5)[0]) < 0.3


def test_the_import_brings_nothing_but_the_core():
    _, modules = timed_imports()
    assert "stablefield.targets._posterior" in modules
    rooms = {room_of(name) for name in modules if name.partition(".")[0] == "stablefield"}
    own = {
        "_lazy",
        "_shapes",
        "_modules",
        "_precision",
        "_reading",
        "_memory",
        "_distributed",
        "_wait_report",
        "_warning",
    }
    assert rooms <= {"", "targets", "diffusion", "networks", "sampling"} | own
    others = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert others <= {"stablefield", "torch", "numpy"}


# --- what is public ---------------------------------------------------------------------------------------------------


PACKAGES = ("data", "evaluation", "interop", "networks", "probing", "sampling", "training")


def test_the_public_names_are_those_of_the_stubs():
    assert set(PACKAGES) <= set(stablefield.__all__)
    for package in (stablefield, *(getattr(stablefield, name) for name in PACKAGES)):
        assert len(set(package.__all__)) == len(package.__all__) > 2
        assert set(package.__all__) <= set(dir(package))
        assert all(hasattr(package, name) for name in package.__all__)
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            _ = package.nothing


def test_sub_packages_load_on_first_touch():
    code = """
import sys
import stablefield as sf
assert not any(name.startswith("stablefield.") and name != "stablefield._lazy" for name in sys.modules)
assert "torch" not in sys.modules
for name in sys.argv[1:]:
    assert f"stablefield.{name}" not in sys.modules or name in ("sampling", "networks"), name
    assert getattr(sf, name).__name__ == f"stablefield.{name}"
sf.networks.SongUNet, sf.data.open_images, sf.training.Recipe
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "networks", "sampling", "evaluation", "training", "probing", "interop"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", stablefield.__all__)
def test_every_public_name_exists_and_has_a_docstring_of_its_own(name):
    thing = getattr(stablefield, name)
    text = inspect.getdoc(thing)
    assert text
    # Not the signature that a dataclass writes for itself, nor what a class inherits.
    assert not text.startswith(f"{name}(")
    if inspect.isclass(thing):
        assert thing.__doc__
        assert all(thing.__doc__ != base.__doc__ for base in thing.__mro__[1:])


@pytest.mark.parametrize("path", [pytest.param(p, id=n) for n, p in modules_of(SOURCE).items()])
def test_every_module_says_what_it_is_and_exports_names_that_it_has(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    defined = set()
    exported = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    defined.add(target.id)
                    if target.id == "__all__":
                        exported = ast.literal_eval(node.value)
    assert set(exported) <= defined


# --- what the sources hold --------------------------------------------------------------------------------------------


def tracked_texts():
    """The project's text files: those that git knows or would take, or all where there is no repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0 and (ROOT / ".git").exists():
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        paths = [path for top in ("src", "tests") for path in (ROOT / top).rglob("*") if path.is_file()]
        paths += [path for path in ROOT.iterdir() if path.is_file()]
    for path in paths:
        if not path.is_file():
            continue
        try:
            yield path, path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def lines_with(pattern, texts):
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path, text in texts
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


# Written in pieces, so that this file does not hold what it looks for.
MACHINE_PATH = r"(?<![\w.~/-])(?:/(?:home|Users|root|work|mnt|scratch|workspace)/\w|[A-Z]:\\Users\\)"
FOREIGN_LICENCE = "(?i)" + "|".join(
    [
        "nv" + "idia source code license",
        "copyright.{0,40}" + "nv" + "idia",
        "non-?" + "commercial",
        "CC[- ]BY[- ]" + "NC",
        "dnn" + "lib",
        "persistence[.]" + "persistent_class",
    ]
)


def test_no_source_names_a_path_of_a_machine():
    assert lines_with(MACHINE_PATH, tracked_texts()) == []


def test_no_code_carries_a_mark_of_a_licence_that_forbids_commercial_use():
    code = [(path, text) for path, text in tracked_texts() if path.suffix in {".py", ".toml", ".yaml", ".yml", ".cff"}]
    assert len(code) > 20
    assert lines_with(FOREIGN_LICENCE, code) == []


@pytest.mark.parametrize(
    ("pattern", "line", "found"),
    [
        (MACHINE_PATH, "data = '/" + "home/ada/cifar'", True),
        (MACHINE_PATH, "see /" + "work/shared", True),
        (MACHINE_PATH, "C:" + r"\Users\ada", True),
        (MACHINE_PATH, "https://example.org/work/of/others", False),
        (MACHINE_PATH, "path/to/" + "home/run, ~/" + "work/data", False),
        (FOREIGN_LICENCE, "# Copyright (c) 2022, NV" + "IDIA CORPORATION & AFFILIATES.", True),
        (FOREIGN_LICENCE, "Creative Commons CC BY-" + "NC-SA 4.0", True),
        (FOREIGN_LICENCE, "import dnn" + "lib", True),
        (FOREIGN_LICENCE, "an NV" + "IDIA device", False),
        (FOREIGN_LICENCE, "Apache-2.0", False),
    ],
)
def test_the_patterns_find_what_they_are_meant_to_find(pattern, line, found):
    assert bool(re.search(pattern, line)) == found


def reached(text, modules=()):
    """Private names that a module reads or imports, and defines nowhere: somebody else's."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = [node for node in nodes if isinstance(node, ast.Attribute)]
    own |= {
        node.attr
        for node in used
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    private = {node.attr for node in used if node.attr.startswith("_") and not node.attr.endswith("__")}
    private |= {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.endswith("__") and f"{node.module}.{alias.name}" not in modules
    }
    return private - own


def test_no_module_reaches_into_the_private_names_of_another():
    # torch, diffusers and the standard library have no public name for these.
    theirs = (
        "_C _functorch _int_mm _is_vnni_supported _is_amx_tile_supported _standard_gamma _version _execution_device"
    )
    theirs = {*theirs.split(), "_shutdown", "_run_exitfuncs", "_exit", "_fields"}
    modules = modules_of(SOURCE)
    found = {name: wrong for name, path in modules.items() if (wrong := reached(path.read_text(), modules) - theirs)}
    assert found == {}
    assert reached("class A:\n    def f(self, other):\n        self._x = other._y") == {"_y"}
    assert reached("from a.b import _c, d") == {"_c"}


def test_the_version_is_written_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", stablefield.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"]
    assert "version" in project["project"]["dynamic"]
    assert ROOT / project["tool"]["hatch"]["version"]["path"] == SOURCE / "__init__.py"
    found = lines_with(
        r"(?i)\b_*version_*\b\W{1,6}" + re.escape(stablefield.__version__) + r"(?![\w.])",
        ((path, text) for path, text in tracked_texts() if path.name != "CHANGELOG.md"),
    )
    assert [line.partition(":")[0] for line in found] == ["src/stablefield/__init__.py"]
    assert found[0].endswith(f'__version__ = "{stablefield.__version__}"')


def strings_of(path):
    """The string constants of a module that are no docstrings, with their lines."""
    tree = tree_of(path)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    described = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            yield node.lineno, node.value


def test_no_message_of_the_library_names_a_flag():
    # Commands of other programs have flags of their own.
    others = re.compile(r"pip install|hf download|--error-unmatch|--porcelain|^--$|var\(--|--repo-type")
    named = [
        f"{path.relative_to(SOURCE)}:{line}: {text}"
        for path in modules_of(SOURCE).values()
        if "cli" not in path.relative_to(SOURCE).parts
        for line, text in strings_of(path)
        if re.search(r"(?<![\w-])--[a-z]", text) and not others.search(text)
    ]
    assert named == []
