"""Distributions of the project, and empty environments to install them into."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

__all__ = ["ROOT", "build", "create", "smoke"]

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist as a registry's users would; their paths."""
    _run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
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
