import subprocess
from pathlib import Path

import pytest

from stablefield import _commit
from stablefield._commit import running_commit


def test_the_commit_is_gits_and_says_whether_files_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git("init", "-q")
    monkeypatch.setattr("stablefield.__file__", str(package / "__init__.py"))
    # Inside a repository, but not of it.
    monkeypatch.setattr(_commit, "_installed_commit", lambda: None)
    assert running_commit().startswith("version ")
    git("add", "-A")
    git("commit", "-qm", "x")
    assert running_commit() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("1")
    assert running_commit() == git("rev-parse", "HEAD") + "-dirty"
