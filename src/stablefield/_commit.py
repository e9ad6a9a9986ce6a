"""Which code runs: its commit, for the record of what it made."""

import importlib.metadata
import json
import subprocess
from pathlib import Path

import stablefield

__all__ = ["running_commit"]


def running_commit() -> str:
    """The commit, with "-dirty" if files under the package were changed since; else "version NUMBER"."""
    package = Path(stablefield.__file__).resolve().parent
    # Only a checkout whose tracked files these are: the package may lie inside somebody else's repository.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        head = _git(package, "rev-parse", "HEAD")
        if head:
            return head + ("-dirty" if _git(package, "status", "--porcelain", "--", ".") else "")
    return _installed_commit() or f"version {stablefield.__version__}"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit() -> str | None:
    """The commit that pip notes for a package installed from a repository."""
    try:
        text = importlib.metadata.distribution("stablefield").read_text("direct_url.json")
        return str(json.loads(text)["vcs_info"]["commit_id"]) if text else None
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
