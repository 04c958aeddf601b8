"""The repository as it would be committed, and a way to run a fresh interpreter in it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def _git(root: Path, *arguments: str) -> str:
    # the checkout may belong to another user than the one who runs the tests
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def committed(root: Path) -> list[Path]:
    """Return every file that git tracks or would add, relative to the root; links are listed, not followed."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return sorted({Path(name) for name in listed if name and os.path.lexists(root / name)})


@pytest.fixture(scope="session")
def clean_copy(root: Path, committed: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository without anything that git ignores, links kept."""
    target = tmp_path_factory.mktemp("clean") / "raymem"
    for name in committed:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="session")
def without_links(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clone made as on a system that can't make symlinks."""
    target = tmp_path_factory.mktemp("hollow") / "raymem"
    _git(root, "-c", "core.symlinks=false", "clone", "-q", "--no-hardlinks", str(root), str(target))
    return target


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a fresh interpreter with these arguments, importing raymem from folder `at`."""

    def run(*arguments: str, at: Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(at), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, timeout=120)

    return run
