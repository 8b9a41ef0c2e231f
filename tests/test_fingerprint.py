"""The fingerprint of the code: what is in it, and what is not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import click
import pytest

import apphost.logs
from apphost.worker.fingerprint import fingerprint


def modules(folder: Path, **sources: str) -> dict[str, ModuleType]:
    found = {"apphost.logs": apphost.logs, "click": click, "os": os, "namespace": ModuleType("namespace")}
    for name, source in sources.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        found[name] = ModuleType(name)
        found[name].__file__ = str(path)
    return found


def test_the_same_code_has_the_same_hash_wherever_and_whenever(tmp_path: Path) -> None:
    one = fingerprint("app:app", modules(tmp_path / "one", app="x = 1", models="y = 2"))
    two = fingerprint("app:app", modules(tmp_path / "two", models="y = 2", app="x = 1"))
    assert one["hash"] == two["hash"]
    assert one["files"] == 2, "only what is the application's own"
    assert two["directory"] == str((tmp_path / "two").resolve())
    assert "commit" not in one
    assert len(one["hash"]) == 12


@pytest.mark.parametrize(
    "other", [{"app": "x = 2", "models": "y = 2"}, {"app": "x = 1"}, {"app": "x = 1", "other": "y = 2"}]
)
def test_other_code_has_another(tmp_path: Path, other: dict[str, str]) -> None:
    one = fingerprint("app:app", modules(tmp_path / "one", app="x = 1", models="y = 2"))
    assert fingerprint("app:app", modules(tmp_path / "two", **other))["hash"] != one["hash"]


def test_files_that_are_gone_and_modules_that_lie(tmp_path: Path) -> None:
    found = modules(tmp_path, app="x = 1")
    (tmp_path / "app.py").unlink()
    found["odd"] = ModuleType("odd")
    found["odd"].__file__ = 5  # type: ignore[assignment]
    assert fingerprint("app:app", found)["files"] == 1
    assert fingerprint("gone:app", {}) == {"hash": fingerprint("x", {})["hash"], "files": 0}


def test_a_module_that_is_imported_when_it_is_looked_at_and_fails(tmp_path: Path) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise ImportError(f"{name}: the extra that this needs is not installed")

    found = modules(tmp_path, app="x = 1")
    found["lazy"] = Lazy("lazy")
    del found["lazy"].__spec__
    assert fingerprint("app:app", found)["files"] == 1


def git(folder: Path, *args: str) -> str:
    name = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *name, *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit(tmp_path: Path) -> None:
    """On a branch, packed, detached, in a worktree, and with the application in a folder below."""
    project = tmp_path / "project"
    code = modules(project / "src", app="x = 1")
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "first")
    commit = git(project, "rev-parse", "HEAD")
    assert fingerprint("app:app", code)["commit"] == commit
    git(project, "pack-refs", "--all")
    assert fingerprint("app:app", code)["commit"] == commit
    git(project, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    assert fingerprint("app:app", modules(tmp_path / "tree" / "src", app="x = 1"))["commit"] == commit
    git(project, "checkout", "-q", "--detach")
    assert fingerprint("app:app", code)["commit"] == commit
    (project / ".git" / "HEAD").write_text("ref: refs/heads/nothing\n")
    assert "commit" not in fingerprint("app:app", code)
