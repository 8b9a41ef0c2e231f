"""The watched files as they are on disk: one look at them, and what differs from the look before."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator

from apphost.watcher.rules import GITIGNORE, Rules, Stamp, changed_since, differences

MOST = 50_000  # files and directories; more is a mistaken directory, such as / or a home, and would take all memory

Ignored = Callable[[str, Collection[str]], set[str]]  # root, paths: those of them that are ignored


class Tree:
    """The files below `roots` that count, and single `files` besides.

    Directories behind symbolic links are not followed: they may lead round in a circle. Files are.
    ignored: asked about paths that are seen for the first time, for a whole level of directories at once.
    """

    def __init__(
        self, roots: Iterable[str], files: Iterable[str], rules: Rules, ignored: Ignored | None = None
    ) -> None:
        self._roots = tuple(dict.fromkeys(roots))
        self._single = tuple(files)
        self._rules = rules
        self._ignored = ignored
        self._verdicts: dict[str, bool] = {}  # path to whether it is ignored
        self._excludes: dict[str, Stamp] = {}  # the files that say what git ignores
        self.files: dict[str, Stamp] = {}
        self.directories: dict[str, tuple[int, int]] = {}
        self.full = False  # there was more than `MOST`

    def look(self) -> set[str]:
        """Look at everything; the paths that differ from the look before."""
        before = self.files
        self._scan()
        if self._verdicts and self._excludes != (excludes := self._find_excludes()):
            self._excludes = excludes
            self._verdicts.clear()
            self._scan()
            # What has only come to be ignored, or no longer is, has not changed.
            known = before.keys() & self.files.keys()
            return {path for path in known if before[path] != self.files[path]}
        return differences(before, self.files)

    def first_look(self, since: int) -> set[str]:
        """The same for the first time: what has changed after `since`, in ns of the wall clock."""
        self._scan()
        self._excludes = self._find_excludes()
        return changed_since(self.files, since)

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """The directories in which something may change, each with device and inode: a switched link is another one."""
        found = {}
        for directory in (*self.directories, *map(os.path.dirname, self._single)):
            if (known := self.directories.get(directory) or _identity(directory)) is not None:
                found[directory] = known
        return found

    def _scan(self) -> None:
        self.files, self.directories, self.full = {}, {}, False
        for path in self._single:
            self._note(path)
        for root in self._roots:
            level = [root]
            while level and not self.full:
                level = self._look_into(root, level)

    def _look_into(self, root: str, level: list[str]) -> list[str]:
        """Note the files of the directories in `level`, and return the directories in those."""
        files: list[str] = []
        directories: list[str] = []
        for directory in level:
            if not self._enter(directory):
                continue
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            if self._rules.enters(entry.name):
                                directories.append(entry.path)
                        elif self._rules.counts(entry.name):
                            files.append(entry.path)
            except OSError:
                continue  # gone, or not for us to read
        ignored = self._sift(root, [*files, *directories])
        for path in files:
            if path not in ignored:
                self._note(path)
        return [path for path in directories if path not in ignored]

    def _enter(self, directory: str) -> bool:
        if directory in self.directories or self._is_full():  # the former: it is below two of the roots
            return False
        identity = _identity(directory)
        if identity is not None:
            self.directories[directory] = identity
        return identity is not None

    def _sift(self, root: str, paths: list[str]) -> set[str]:
        if self._ignored is None:
            return set()
        unknown = [path for path in paths if path not in self._verdicts]
        if len(self._verdicts) + len(unknown) > 2 * MOST:
            self._verdicts.clear()  # of a long day with many short-lived files
            unknown = paths
        found = self._ignored(root, unknown) if unknown else set()
        self._verdicts.update((path, path in found) for path in unknown)
        return {path for path in paths if self._verdicts[path]}

    def _note(self, path: str) -> None:
        if self._is_full():
            return
        stamp = _stamp(path)
        if stamp is not None:
            self.files[path] = stamp

    def _is_full(self) -> bool:
        self.full = self.full or len(self.files) + len(self.directories) >= MOST
        return self.full

    def _find_excludes(self) -> dict[str, Stamp]:
        places = {*self.directories, *(above for root in self._roots for above in _above(root))}
        found = ((path, _stamp(path)) for path in (os.path.join(each, GITIGNORE) for each in places))
        return {path: stamp for path, stamp in found if stamp is not None}


def _above(root: str) -> Iterator[str]:
    """The directories above `root` up to that of its repository."""
    while not os.path.exists(os.path.join(root, ".git")) and root != os.path.dirname(root):
        root = os.path.dirname(root)
        yield root


def _identity(directory: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(directory)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _stamp(path: str) -> Stamp | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return Stamp(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
