"""How what a draining worker holds leaves it: not all at once. WebSockets go to its successor, or are closed."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TypeVar

from apphost.lifecycle import Policy
from apphost.protocols.http1 import Connection
from apphost.protocols.websocket import WebSocket

# Seconds between two sockets. Clients come back at once, each with a handshake and whatever the application does for a
# new client; 200 a second are a moderate load for one worker.
CLOSE_PACE = 0.005
# An application parts and is called anew for each of them, so a few at a time keep the gap short that its client could
# notice; a thousand take a second.
MOVE_PACE = 0.001
PATIENCE = 5.0  # s that an application gets to finish with a socket that moves
SHARE = 0.3  # of the drain, at most, for each: the first to the last, the application's part, the move

BATCH = 64  # connections closed in one turn of the loop: some 2 ms, for which requests wait

T = TypeVar("T")

RESTART, GOING_AWAY = 1012, 1001  # RFC 6455, 7.4.1, and the registry of close codes


def in_turns(loop: asyncio.AbstractEventLoop, items: Sequence[T], do: Callable[[T], object]) -> None:
    """Call `do` for each of many, a batch in each turn of the loop, so that requests have theirs in between."""
    rest = iter(items)

    def do_some() -> None:
        count = 0
        for item in islice(rest, BATCH):
            do(item)
            count += 1
        if count == BATCH:
            loop.call_soon(do_some)

    do_some()


class Ways(enum.Enum):
    """How the sockets leave."""

    MOVE = enum.auto()  # to a successor, where the application has agreed; else as a restart
    CLOSE = enum.auto()  # as a restart, because there is nobody to move them to
    END = enum.auto()  # at once: the server stops, so nobody comes back to it


class Parting:
    """The plan for the sockets that are left. A new plan replaces the one before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._steps: dict[WebSocket, asyncio.TimerHandle] = {}  # of those whose turn has not come
        self._ways = Ways.CLOSE
        self._seconds = 0.0

    def plan(self, connections: Iterable[Connection], ways: Ways, seconds: float) -> None:
        """Have all go within `seconds`."""
        for step in self._steps.values():
            step.cancel()
        self._steps.clear()
        self._ways, self._seconds = ways, seconds
        sockets = [each.websocket for each in connections if each.websocket is not None and each.websocket.open]
        moving = [socket for socket in sockets if self._moves(socket)]
        closing = [socket for socket in sockets if not self._moves(socket)]
        self._spread(moving, MOVE_PACE)
        self._spread(closing, CLOSE_PACE)

    def add(self, connection: Connection) -> None:
        """One more; or one that nobody has taken, which does not matter unless the plan has changed."""
        if connection.websocket is not None:
            self._spread([connection.websocket], 0.0)

    def _moves(self, socket: WebSocket) -> bool:
        return self._ways is Ways.MOVE and socket.policy is not Policy.CLOSE

    def _spread(self, sockets: Sequence[WebSocket], pace: float) -> None:
        if self._ways is Ways.END:
            pace = 0.0
        pace = min(pace, self._seconds * SHARE / max(len(sockets), 1))
        for number, socket in enumerate(sockets):
            if (step := self._steps.get(socket)) is not None:
                step.cancel()
            self._steps[socket] = self._loop.call_later(number * pace, self._go, socket)

    def _go(self, socket: WebSocket) -> None:
        del self._steps[socket]
        if self._moves(socket):
            share = self._seconds * SHARE
            socket.leave(min(PATIENCE, share), share)
        elif self._ways is Ways.END:
            socket.dismiss(GOING_AWAY, "the server stops")
        else:
            socket.dismiss(RESTART, "its worker goes")
