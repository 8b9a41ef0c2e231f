"""What git ignores, asked of git itself, for many paths at once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterable

TIMEOUT = 5.0  # s for git to answer: it takes milliseconds, but for a repository on a network that hangs
_ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
_NONE_IGNORED, _SOME_IGNORED = 1, 0  # exit codes of git-check-ignore(1)


def is_in_repository(directory: str) -> bool:
    """Whether there is git, and it takes `directory` for a part of a repository that this user may use."""
    answer = _git(directory, ["rev-parse", "--is-inside-work-tree"], "")
    return answer is not None and answer[1].strip() == "true"


def ignored(root: str, paths: Collection[str]) -> set[str]:
    """Those of `paths`, absolute ones below `root`, that git ignores. What it tracks it does not ignore.

    A path that git has no answer for (in a submodule, behind a symbolic link) spoils the answer to all; then each
    directory is asked about on its own.
    """
    if not paths:
        return set()
    answer = _check(root, paths)
    if answer is not None:
        return answer
    by_directory: dict[str, list[str]] = {}
    for path in paths:
        by_directory.setdefault(os.path.dirname(path), []).append(path)
    found: set[str] = set()
    for directory, group in by_directory.items():
        found |= _check(directory, group) or set()
    return found


def _check(directory: str, paths: Iterable[str]) -> set[str] | None:
    relative = {os.path.relpath(path, directory): path for path in paths}
    answer = _git(directory, ["check-ignore", "--stdin", "-z"], "".join(f"./{name}\0" for name in relative))
    if answer is None or answer[0] not in (_NONE_IGNORED, _SOME_IGNORED):
        return None
    names = (name.removeprefix("./") for name in answer[1].split("\0"))
    return {relative[name] for name in names if name in relative}


def _git(directory: str, arguments: list[str], text: str) -> tuple[int, str] | None:
    """(exit code, standard output); None when there is no git, or no answer."""
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", directory, *arguments],  # noqa: S607 - the git that the user has
            input=os.fsencode(text),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT,
            env={**os.environ, **_ENVIRONMENT},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode, os.fsdecode(done.stdout)
