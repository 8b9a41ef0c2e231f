"""The life of a worker: one enum and one table, used by the arbiter's fleet and by the worker itself.

          +---------> GONE
          |             ^
BOOTING --+--> READY ---+
    |            |      |
    +------------+--> DRAINING
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where a worker stands. The value is the word that messages, logs and `status` use."""

    BOOTING = "booting"  # forked; imports the application, runs lifespan startup; serves nothing
    READY = "ready"  # accepts connections
    DRAINING = "draining"  # accepts nothing new, finishes what it has
    GONE = "gone"  # the process has ended


TRANSITIONS: dict[State, frozenset[State]] = {
    State.BOOTING: frozenset({State.READY, State.DRAINING, State.GONE}),
    State.READY: frozenset({State.DRAINING, State.GONE}),
    State.DRAINING: frozenset({State.GONE}),
    State.GONE: frozenset(),
}


def allowed(old: State, new: State) -> bool:
    """Whether a worker may go from `old` to `new`. Staying where it is counts as allowed: orders are idempotent."""
    return old is new or new in TRANSITIONS[old]


class Policy(enum.Enum):
    """What becomes of an open socket when its worker is replaced: the words of `ws_on_reload`."""

    CLOSE = "close"  # closed with 1012: the client comes back by itself
    REJOIN = "rejoin"  # the application is called anew by the next worker, and the client does not notice
    RESUME = "resume"  # the same, and finds the state that it left before
