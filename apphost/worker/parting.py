"""How the WebSockets of a draining worker leave it: to its successor, or closed, but not all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from apphost.protocols.http1 import Connection
from apphost.protocols.websocket import Policy, WebSocket

# Seconds between two sockets. Clients come back at once, each with a handshake and whatever the application does for a
# new client; 200 a second are a moderate load for one worker.
CLOSE_PACE = 0.005
# An application parts and is called anew for each of them, so a few at a time keep the gap short that its client could
# notice; a thousand take a second.
MOVE_PACE = 0.001
PATIENCE = 5.0  # s that an application gets to finish with a socket that moves
SHARE = 0.3  # of the drain, at most, for each: the first to the last, the application's part, the move

RESTART, GOING_AWAY = 1012, 1001  # RFC 6455, 7.4.1, and the registry of close codes


class Parting:
    """The plan for the sockets that are left. A new plan replaces the one before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._steps: list[asyncio.TimerHandle] = []

    def cancel(self) -> None:
        for step in self._steps:
            step.cancel()
        self._steps.clear()

    def move(self, connections: Iterable[Connection], seconds: float) -> None:
        """Within `seconds`, move those that may move, and close the others as a restart."""
        self.cancel()
        sockets = _sockets(connections)
        moving = [socket for socket in sockets if socket.policy is not Policy.CLOSE]
        share = seconds * SHARE
        pace = min(MOVE_PACE, share / max(len(moving), 1))
        for number, socket in enumerate(moving):
            self._steps.append(self._loop.call_later(number * pace, socket.leave, min(PATIENCE, share), share))
        self._close([socket for socket in sockets if socket.policy is Policy.CLOSE], seconds)

    def close(self, connections: Iterable[Connection], seconds: float) -> None:
        """Close all, because there is nobody to move them to, within `seconds`."""
        self.cancel()
        self._close(_sockets(connections), seconds)

    def end(self, connections: Iterable[Connection]) -> None:
        """Close all at once: the server stops, so nobody comes back to it."""
        self.cancel()
        for socket in _sockets(connections):
            socket.dismiss(GOING_AWAY, "the server stops")

    def _close(self, sockets: list[WebSocket], seconds: float) -> None:
        pace = min(CLOSE_PACE, seconds * SHARE / max(len(sockets), 1))
        for number, socket in enumerate(sockets):
            self._steps.append(self._loop.call_later(number * pace, socket.dismiss, RESTART, "its worker goes"))


def _sockets(connections: Iterable[Connection]) -> list[WebSocket]:
    return [each.websocket for each in connections if each.websocket is not None and each.websocket.open]
