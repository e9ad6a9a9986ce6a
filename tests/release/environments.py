"""Distributions of the project, and empty environments to install them into."""

import email
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

__all__ = ["ROOT", "build", "create", "install", "linked", "smoke"]

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist as a registry's users would; their paths."""
    _run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Python 3.11 has filters from its fourth release on; the archive is our own.
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder / "source", **safely)
    (source,) = (folder / "source").iterdir()
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def create(folder: Path, packages: list[str], python: str = sys.executable) -> Path:
    """Make an environment with `packages` alone, in that order; its interpreter."""
    _run(python, "-m", "venv", str(folder), cwd=folder.parent)
    interpreter = folder / "bin" / "python"
    for package in packages:
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
        _run(str(interpreter), *pip, package, cwd=folder)
    return interpreter


def linked(folder: Path) -> Path:
    """Make an environment without any package, not even pip; its interpreter."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    return folder / "bin" / "python"


def install(interpreter: Path, wheel: Path, extra: str = "") -> None:
    """Install a wheel into an environment of `linked`, and by links what it requires, as it is installed here.

    Unpacking torch takes most of a minute, and another version of a package would make another test.

    Raises:
        RuntimeError: if what the wheel requires is not all that its requirements require.
    """
    (site,) = (interpreter.parents[1] / "lib").glob("python*/site-packages")
    for name in _required(wheel, extra):
        found = distribution(name)
        for entry in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(Path(str(found.locate_file(entry))).resolve())
    asked = f"{wheel}[{extra}]" if extra else str(wheel)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-compile", "--force-reinstall", "--no-deps")
    pip = (sys.executable, "-m", "pip", "--python", str(interpreter))
    if not list(site.glob(f"{wheel.name.partition('-')[0]}-*.dist-info")):
        _run(*pip, "install", *quiet, str(wheel), cwd=site)
    # All that is asked for is there, so pip has nothing to fetch.
    _run(*pip, "install", "--quiet", "--disable-pip-version-check", "--no-index", asked, cwd=site)


def _required(wheel: Path, extra: str) -> set[str]:
    """The packages that a wheel requires with an extra, and those that they require."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        requires = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    found: set[str] = set()
    waiting = list(_applying(requires, {extra}))
    while waiting:
        one = waiting.pop()
        if one.name not in found:
            found.add(one.name)
            waiting += _applying(distribution(one.name).requires or (), one.extras)
    return found


def _applying(requires: Sequence[str], extras: set[str]) -> Iterator[Requirement]:
    for text in requires:
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield one


def smoke(interpreter: Path) -> dict[str, str]:
    """Run `smoke.py` by that interpreter, away from the sources; the versions that it met."""
    script = (ROOT / "tests/release/smoke.py").read_text()
    printed = _run(str(interpreter), "-I", "-W", "error", "-c", script, cwd=interpreter.parent)
    found: dict[str, str] = json.loads(printed.splitlines()[-1])
    return found


def _run(*command: str, cwd: Path) -> str:
    # Nothing of the environment that the tests run in may be found from another one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
