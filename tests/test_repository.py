"""What the repository tells contributors and GitHub: the workflow, the forms and the policy name what exists."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import stablefield
from stablefield.cli.verbs import parse
from stablefield.data import _image_loader as image_loader
from stablefield.interop import _weight_files as weight_files

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def targets() -> set[str]:
    return set(re.findall(r"^([\w$()./]+):", MAKEFILE.replace("$(VENV)", ".venv"), re.M))


@pytest.fixture
def steps() -> list[dict[str, Any]]:
    (job,) = read(GITHUB / "workflows/ci.yml")["jobs"].values()
    return job["steps"]


def test_the_workflow_runs_the_tests_and_builds_the_docs_as_contributors_do(steps: list[dict[str, Any]]) -> None:
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    assert lines.index("make .venv/.base") < lines.index("make test") < lines.index("make docs")
    assert {line.removeprefix("make ") for line in lines if line.startswith("make ")} <= targets()
    assert "    make test " in (ROOT / "README.md").read_text("utf-8")
    assert not any(step.get("continue-on-error") for step in steps)


def test_the_workflow_uses_the_oldest_python_and_lets_the_owner_choose_where_torch_is_from(
    steps: list[dict[str, Any]],
) -> None:
    (install,) = [step for step in steps if "env" in step]
    assert install["env"] == {"PIP_EXTRA_INDEX_URL": "${{ vars.TORCH_INDEX }}"}
    assert install["run"] == "make .venv/.base"
    (python,) = [step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["requires-python"] == f">={python}"


def test_every_action_is_pinned_to_a_commit_and_may_only_read(steps: list[dict[str, Any]]) -> None:
    text = (GITHUB / "workflows/ci.yml").read_text("utf-8")
    uses = re.findall(r"uses: (\S+)(.*)", text)
    assert len(uses) == sum("uses" in step for step in steps) > 1
    for action, comment in uses:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)
    assert read(GITHUB / "workflows/ci.yml")["permissions"] == {"contents": "read"}
    assert all(step["with"]["persist-credentials"] is False for step in steps if "checkout@" in step.get("uses", ""))


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_the_forms_are_forms_that_github_accepts(name: str) -> None:
    form = read(GITHUB / f"ISSUE_TEMPLATE/{name}.yml")
    assert set(form) == {"name", "description", "labels", "body"}
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 1
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert set(part) <= {"type", "id", "attributes", "validations"}
        assert part["attributes"]["value" if part["type"] == "markdown" else "label"]
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_commands_and_files_that_the_texts_name_exist() -> None:
    texts = [ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", GITHUB / "pull_request_template.md"]
    seen = 0
    for path in [*texts, *(GITHUB / "ISSUE_TEMPLATE").glob("*.yml")]:
        text = path.read_text("utf-8")
        for target in re.findall(r"`make (\w+)`", text):
            assert target in targets(), f"{path.name}: make {target}"
            seen += 1
        for verb in re.findall(r"`stablefield (doctor)`", text):
            parse([verb])
            seen += 1
        for name in re.findall(r"\b([A-Z]{4,}\.md)\b", text):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"
            seen += 1
    assert seen > 8


def test_the_group_dev_has_all_others_and_is_what_make_and_the_guide_install() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    assert {part["include-group"] for part in groups["dev"]} == set(groups) - {"dev"}
    asked = r"--group dev (?:\\\n\s*)?--editable \"(\.\[[\w,]+\])\""
    (made,), (told,) = (re.findall(asked, text) for text in (MAKEFILE, (ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    assert made == told


def test_the_policy_names_this_version_and_the_bounds_that_the_readers_keep() -> None:
    policy = " ".join((ROOT / "SECURITY.md").read_text("utf-8").split())
    assert f"| {stablefield.__version__.rpartition('.')[0]}.x, the newest release | yes |" in policy
    for module, bound in ((weight_files, "eight times its size and 256 MiB"), (image_loader, "more than 1 GiB")):
        assert bound in policy
        assert bound in " ".join((module.__doc__ or "").split())


def test_nothing_lies_beside_the_files_and_folders_that_the_project_has() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("there is no repository")
    folders = "benchmarks docs examples experiments src tests .ci .github"
    files = (
        "CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE Makefile README.md SECURITY.md constraints.txt mkdocs.yml"
    )
    known = {*folders.split(), *files.split(), "pyproject.toml", ".gitignore", ".pre-commit-config.yaml"}
    assert {path.partition("/")[0] for path in listed.stdout.splitlines()} <= known
