"""Bytecode that may belong to older source is not run.

Python takes a .pyc file for fresh when the source has the size and the modification time, in whole seconds, that are
noted in it. A deploy can fail that test's purpose: an edit of the same length within the same second, or a tool that
sets all times to one value (rsync --times, archives with fixed dates). The new code would be on disk, and the old code
would go on running.

What no tool can set is the time of a file's last *change* (ctime). So for the application's own files bytecode counts
only when it was written clearly after the source got its present content; otherwise the source is compiled again.
Installed packages are left to Python: their installers write new files, and images often carry their bytecode.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sysconfig
from typing import Any

GRANULARITY = 20_000_000  # ns; file systems stamp with the kernel's coarse clock: a tick of at most 10 ms (HZ=100)


def is_trustworthy(source_ctime: int, bytecode_mtime: int) -> bool:
    """Whether bytecode of `bytecode_mtime` was made of source that has not changed since `source_ctime`; both in ns."""
    return bytecode_mtime > source_ctime + GRANULARITY


def distrust_stale_bytecode() -> None:
    """From now on imports of this process, and of those forked from it, follow the rule above. Once per process."""
    installed = _installed_places()
    original = importlib.machinery.SourceFileLoader.get_data

    def get_data(self: Any, path: str) -> bytes:
        if path.endswith(".pyc") and not path.startswith(installed) and not _is_fresh(path):
            raise OSError("the bytecode may be older than its source")
        return original(self, path)

    importlib.machinery.SourceFileLoader.get_data = get_data  # type: ignore[method-assign]


def _installed_places() -> tuple[str, ...]:
    """Where the interpreter and its packages live."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    places = {os.path.join(path, "") for name in names if (path := sysconfig.get_paths().get(name))}
    return tuple(places)


def _is_fresh(bytecode: str) -> bool:
    try:
        source = importlib.util.source_from_cache(bytecode)
        return is_trustworthy(os.stat(source).st_ctime_ns, os.stat(bytecode).st_mtime_ns)
    except (ValueError, NotImplementedError):
        return True  # no cache file of the usual form: not ours to judge
    except OSError:
        return True  # not there: reading it will say so
