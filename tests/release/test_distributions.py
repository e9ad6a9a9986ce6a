"""What is released: an sdist that builds, and a wheel that works where there is nothing but what it asks for."""

import email
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from environments import ROOT, build, install, linked, smoke

import stablefield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def empty(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and what it requires."""
    interpreter = linked(tmp_path_factory.mktemp("environment") / "venv")
    install(interpreter, built[1])
    return interpreter


def test_sdist_has_sources_tests_and_documents(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "src/stablefield/py.typed",
        "tests/conftest.py",
    ):
        assert path in names
    assert not [name for name in names if re.search(r"\.(pyc|safetensors|zip)$|(^|/)(\.venv|runs)/", name)]


def test_wheel_has_the_package_and_no_more(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
    tracked = subprocess.run(["git", "ls-files", "src/stablefield"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0 and tracked.stdout:
        expected = {name.removeprefix("src/") for name in tracked.stdout.split()}
        assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"stablefield"}
    assert fields["Version"] == stablefield.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    core = [value for value in fields.get_all("Requires-Dist", []) if "extra ==" not in value]
    assert sorted(re.split(r"\W", value)[0] for value in core) == ["numpy", "torch"]


def test_wheel_works_in_an_empty_environment(empty: Path) -> None:
    found = smoke(empty)
    assert found["stablefield"] == stablefield.__version__
    pip = [sys.executable, "-m", "pip", "--python", empty]
    listed = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True)
    assert "torch==" in listed.stdout
    for absent in ("accelerate", "pillow", "rich", "tyro", "safetensors"):
        assert f"\n{absent}==" not in f"\n{listed.stdout.lower()}"


def test_command_without_its_extra_says_how_to_get_it(empty: Path) -> None:
    done = subprocess.run([empty.parent / "stablefield", "train", "digits"], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "stablefield[train]"' in done.stderr


@pytest.mark.slow
def test_quick_start_runs_from_the_wheel(built: tuple[Path, Path], empty: Path, tmp_path: Path) -> None:
    # After the tests of the bare environment, to which it adds.
    install(empty, built[1], "train")
    command = empty.parent / "stablefield"
    subprocess.run(
        [command, "train", "digits", "--steps", "8", "--out", tmp_path / "run"], check=True, capture_output=True
    )
    subprocess.run([command, "sample", tmp_path / "run", "--seeds", "0-3"], check=True, capture_output=True)
    assert list((tmp_path / "run").rglob("*.png"))


def test_supported_versions_are_those_of_the_matrix() -> None:
    record = json.loads(Path(__file__).with_name("matrix.json").read_text())
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for one in record:
        assert f"| {one['python']} | {one['torch']} | {one['numpy']} |" in contributing
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(value.split(">=") for value in project["dependencies"])
    for name, floor in floors.items():
        assert any(f"{one[name]}.".startswith(f"{floor}.") for one in record), f"nothing ran on {name} {floor}"
    pythons = {one["python"].rpartition(".")[0] for one in record}
    assert {f"Programming Language :: Python :: {version}" for version in pythons} <= set(project["classifiers"])
    assert project["requires-python"] == f">={min(pythons, key=lambda v: int(v.partition('.')[2]))}"
