"""Which files count, which directories are looked into, and how saves close together become one. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

QUIET = 0.05  # s without another change after which a burst is over: editors write, rename and touch within a few ms
LONGEST = 0.3  # s after which a burst is told of in any case, so that what is written all the time cannot hide a save

ALWAYS = ("*.py",)
GITIGNORE = ".gitignore"  # looked at, since it says what counts, but no reason to reload

# Never looked into, whatever git says: what tools write, and much of it. A name that begins with a dot is none of an
# application either, but for what the user names.
TOOLS = (
    "__pycache__", "node_modules", "site-packages", "venv", "env", "virtualenv", "build", "dist", "htmlcov",
    "*.egg-info", "__pypackages__",
)  # fmt: skip
GENERATED = ("__pycache__", "node_modules", "site-packages", "*.egg-info")  # the ones of these that git need not know


class Stamp(NamedTuple):
    """What changes when a file does. The inode: of a file that another was renamed over."""

    inode: int
    size: int
    modified: int  # ns
    changed: int  # ns, when its content or its name last changed, which no tool can set


class Names:
    """Patterns of names, as one regular expression."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._matches = re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)").match

    def __contains__(self, name: str) -> bool:
        return self._matches(name) is not None


class Rules:
    """What the user wants watched.

    named: names of files that are watched wherever they are. by_git: git is there and says what else to ignore.
    """

    def __init__(
        self,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        named: Iterable[str] = (),
        by_git: bool = False,
    ) -> None:
        self._named = frozenset((GITIGNORE, *named))
        self._include = Names((*ALWAYS, *include))
        self._exclude = Names(exclude)
        self._tools = Names(GENERATED if by_git else TOOLS)

    def enters(self, name: str) -> bool:
        """Whether to look into a directory of this name."""
        return not name.startswith(".") and name not in self._tools and name not in self._exclude

    def counts(self, name: str) -> bool:
        """Whether a file of this name is watched."""
        return name in self._include and name not in self._exclude

    def may_matter(self, name: str) -> bool:
        """Whether to look at the tree when the system tells of a change of something with this name.

        A name without a dot may be a directory.
        """
        return name in self._named or self.counts(name) or ("." not in name and self.enters(name))


def differences(before: Mapping[str, Stamp], after: Mapping[str, Stamp]) -> set[str]:
    """Paths of the files that are new, gone or another."""
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def changed_since(files: Mapping[str, Stamp], since: int) -> set[str]:
    """Paths of the files that have changed after `since`, in ns of the wall clock."""
    return {path for path, stamp in files.items() if stamp.changed > since}


class Burst:
    """Changes close together, which are one reason to reload. Times are seconds of any monotonic clock."""

    def __init__(self, now: float, paths: Iterable[str]) -> None:
        self._since = self._latest = now
        self.paths = set(paths)

    def add(self, now: float, paths: Iterable[str]) -> None:
        """What another look has found; nothing, perhaps."""
        found = set(paths)
        if found:
            self.paths |= found
            self._latest = now

    def left(self, now: float) -> float:
        """Seconds until it is over if nothing else changes; 0: it is."""
        return max(0.0, min(self._latest + QUIET, self._since + LONGEST) - now)
