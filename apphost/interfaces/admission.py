"""`limit_requests`: how many calls of the application one worker has in progress at most.

Put around the interface when the worker starts, and only if there is a limit: without one a request meets none of it.
"""

from __future__ import annotations

from typing import Any

from apphost.logs import Log
from apphost.protocols.base import Handler, Interface, Stream
from apphost.protocols.exchange import NOBODY
from apphost.protocols.response import ResponseHead

RETRY_AFTER = 1  # s; a worker that is full now is seldom full for longer, and a client that is told more waits in vain
SILENCE = 10.0  # s between two lines in the log that say how many were turned away

_BODY = b"503 Service Unavailable: the server has as many requests in progress as it may have\n"
_FIELDS = (
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", b"%d" % len(_BODY)),
    (b"retry-after", b"%d" % RETRY_AFTER),
    # Whoever has a connection here asks here again; a balancer in front opens its next one where there is room.
    (b"connection", b"close"),
)


class Admission:
    """An interface in front of another: beyond `limit` requests in progress the answer is 503, and the application
    does not hear of it.

    In progress is what stands in `active`: calls that have not returned, with those that have answered and go on in the
    background, requests of WSGI that wait for their body or for a thread, and open WebSockets.
    """

    def __init__(self, interface: Interface, limit: int, active: set[Any], log: Log, worker: str) -> None:
        self.name = interface.name
        self.websockets = interface.websockets
        self._inner = interface
        self._limit = limit
        self._active = active
        self._log = log
        self._worker = worker
        self._turned_away = 0
        self._quiet_until = 0.0

    def handle(self, stream: Stream) -> Handler:
        if len(self._active) < self._limit:
            return self._inner.handle(stream)
        if stream.head.upgrade:
            if stream.opening.rejoins:  # an open socket of another worker: it has been let in long ago
                return self._inner.handle(stream)
            stream.opening.release()
        self._count(stream.context.loop.time())
        stream.start(ResponseHead(503, _FIELDS))
        stream.write(_BODY, False)
        return NOBODY

    def _count(self, now: float) -> None:
        self._turned_away += 1
        if now >= self._quiet_until:
            self._log.warning(
                f"{self._worker}: {self._limit} requests are in progress, as many as limit_requests allows; turned "
                f"away with 503: {self._turned_away}. More workers or a higher limit would let them in."
            )
            self._turned_away = 0
            self._quiet_until = now + SILENCE
