"""What tells two deploys apart: a hash over the sources of the application's own modules.

Own are the modules whose files are outside of the Python installation and of its packages: what a deploy replaces. The
hash is over their names and contents, so the same code has the same hash on any machine, whatever the times of its
files. It is taken once, from the files as they are a moment after the worker has become ready, with `preload` after the
import; modules that are imported later are not part of it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import apphost

FILES_MAX = 5000  # more than that is no application's own code but a tree of packages in an unusual place
FILE_MAX = 1 << 22  # bytes read of each; generated modules have some hundred KiB
GIT_LEVELS = 10  # directories upwards in which .git is looked for


def fingerprint(app: str, modules: Mapping[str, ModuleType]) -> dict[str, Any]:
    """hash: 12 hex digits; files: how many; directory: of the application's module, without symlinks; commit: what git
    says is checked out there, if it does.

    `app`: the setting. `modules`: a copy of `sys.modules`. Reads files; raises nothing.
    """
    own = sorted(_own_files(modules))[:FILES_MAX]
    digest = hashlib.blake2b(digest_size=6)
    for name, path in own:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + _read(path) + b"\0")
    result: dict[str, Any] = {"hash": digest.hexdigest(), "files": len(own)}
    file = getattr(modules.get(app.partition(":")[0]), "__file__", None)
    if file:
        result["directory"] = os.path.dirname(os.path.realpath(file))
        commit = _commit(result["directory"])
        if commit:
            result["commit"] = commit
    return result


def _own_files(modules: Mapping[str, ModuleType]) -> Iterable[tuple[str, str]]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    foreign = [os.path.realpath(path) for path in {sysconfig.get_path(name) for name in names} if path]
    foreign.append(os.path.dirname(os.path.realpath(apphost.__file__)))
    folders: dict[str, str] = {}
    for name, module in modules.items():
        file = _file(module)
        if not isinstance(file, str) or name == "__main__":
            continue
        path = _real(file, folders)
        if "site-packages" in path or "dist-packages" in path or path.startswith(tuple(f + os.sep for f in foreign)):
            continue
        yield name, path


def _file(module: ModuleType) -> object:
    try:
        return getattr(module, "__file__", None)
    except Exception:  # one that is imported when it is first looked at, and cannot be
        return None


def _real(file: str, folders: dict[str, str]) -> str:
    """Without symlinks, as `os.path.realpath`, which asks the system about each directory on the way of each of a
    thousand modules: `folders` keeps what it said."""
    folder, name = os.path.split(file)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    path = os.path.join(folders[folder], name)
    return os.path.realpath(path) if os.path.islink(path) else path


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(FILE_MAX)
    except OSError:
        return b"?"


def _commit(directory: str) -> str:
    """The commit that HEAD names in the working tree around `directory`, empty where there is none (gitrepository-
    layout(5)). The tree may have changes that are not committed: the hash is what tells."""
    for _ in range(GIT_LEVELS):
        git = os.path.join(directory, ".git")
        if os.path.exists(git):
            return _head(git)
        parent = os.path.dirname(directory)
        if parent == directory:
            break
        directory = parent
    return ""


def _head(git: str) -> str:
    if os.path.isfile(git):  # a worktree or submodule: `gitdir: PATH`
        git = os.path.join(os.path.dirname(git), _text(git).removeprefix("gitdir:").strip())
    head = _text(os.path.join(git, "HEAD")).strip()
    if not head.startswith("ref:"):
        return head[:40]
    ref = head.removeprefix("ref:").strip()
    common = os.path.join(git, _text(os.path.join(git, "commondir")).strip())
    for place in (git, common):
        commit = _text(os.path.join(place, ref)).strip()
        if commit:
            return commit[:40]
    packed = _text(os.path.join(common, "packed-refs")).splitlines()
    return next((line.split()[0][:40] for line in packed if line.endswith(f" {ref}")), "")


def _text(path: str) -> str:
    return "" if not os.path.isfile(path) else _read(path).decode("utf-8", "replace")


def here(app: str) -> dict[str, Any]:
    """That of this process."""
    return fingerprint(app, dict(sys.modules))
