"""When to look at the tree again: when the system tells of a change, or after a while."""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

from apphost.errors import SettingsError
from apphost.watcher.rules import Rules
from apphost.watcher.tree import Tree

# Polling takes a twentieth of a processor at most, whatever the size of the tree, and sees a save of a small
# application within a fifth of a second.
POLL_SHORTEST, POLL_LONGEST, POLL_SHARE = 0.2, 5.0, 20

# s; with notifications, still look that often: they get lost when a queue runs over, and know nothing of a symbolic
# link that leads elsewhere. At most a hundredth of a processor.
LOOK_ANYWAY, LOOK_SHARE = 5.0, 100

# ms; the library collects what comes within `_STEP` of each other. The rest of a burst is ours to wait for.
_STEP, _COLLECT = 10, 50


class Engine(Protocol):
    name: str

    def wait(self, cost: float) -> None:
        """Return when it is time for another look; `cost`: s that the last one took. Raises `OSError`."""

    def follow(self, tree: Tree) -> bool:
        """The tree may have other directories by now. Whether that needs another look. Raises `OSError`."""


class Polling:
    """Looks a few times a second."""

    name = "polling"

    def wait(self, cost: float) -> None:
        time.sleep(min(POLL_LONGEST, max(POLL_SHORTEST, cost * POLL_SHARE)))

    def follow(self, tree: Tree) -> bool:
        return False


class Notified:
    """Looks when the system tells of a change, through watchfiles. Raises `ModuleNotFoundError` without it.

    Only directories that the tree enters are watched, so that what is ignored costs nothing.
    """

    name = "watchfiles"

    def __init__(self, rules: Rules) -> None:
        from watchfiles._rust_notify import RustNotify  # where its own documents import it from

        self._make = RustNotify
        self._rules = rules
        self._watch: Any = None
        self._places: dict[str, tuple[int, int]] = {}

    def wait(self, cost: float) -> None:
        deadline = time.monotonic() + max(LOOK_ANYWAY, cost * LOOK_SHARE)
        while (left := deadline - time.monotonic()) > 0:
            news = self._watch.watch(_COLLECT, _STEP, max(1, int(1000 * left)), None)
            if isinstance(news, str) or any(self._rules.may_matter(os.path.basename(path)) for _, path in news):
                return

    def follow(self, tree: Tree) -> bool:
        places = tree.places
        if self._places == places:
            return False
        old, self._watch = self._watch, None
        if old is not None:
            old.close()
        # Not recursive: on Linux each directory costs a watch of the kernel, of which there are only so many.
        self._watch = self._make(list(places), False, False, 300, False, True)
        self._places = places
        return True


def choose(wanted: str, rules: Rules) -> Engine:
    """For the setting `reload_engine`. Raises `SettingsError` when it is not installed."""
    if wanted == "polling":
        return Polling()
    try:
        return Notified(rules)
    except ImportError:
        if wanted == "auto":
            return Polling()
        raise SettingsError("the engine 'watchfiles' needs watchfiles: pip install 'apphost[reload]'") from None
