"""What the connections of one worker share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from apphost.logs import Log
from apphost.protocols.base import Handler, HeadParser, Interface
from apphost.protocols.deadlines import Deadlines
from apphost.protocols.heads import HeadReader
from apphost.protocols.response import ServerFields
from apphost.protocols.strict import Limits

if TYPE_CHECKING:
    from apphost.protocols.exchange import Exchange
    from apphost.protocols.http1 import Connection
    from apphost.protocols.proxies import HostList, ProxyRules
    from apphost.protocols.request_ids import RequestIds
    from apphost.protocols.websocket import WebSocketOptions
    from apphost.protocols.wire import Wire


BATCH = 128  # connections that are looked at for their time-out in one turn of the loop; 4 ms if all end


class Recorder(Protocol):
    """Whom a connection tells of its requests: the access log, or what stands before it."""

    def write(self, exchange: Exchange, cut: bool = False) -> None:
        """One is finished; `cut`: its response is incomplete."""

    def write_refusal(self, connection: Connection, status: int) -> None:
        """One was refused before it could be understood."""

    def flush(self) -> None:
        """Nothing more comes."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds; each ends one kind of waiting for a client."""

    keep_alive: float = 75.0  # for the next request; 0: there is none
    request_header: float = 15.0  # for the first byte of the first request, and for the rest of any head
    request_body: float = 30.0  # for the next byte of a body
    write: float = 60.0  # for the client to read on
    linger: float = 5.0  # for the client's end of the connection after the last answer (nginx: lingering_timeout 5 s)
    linger_draining: float = 1.0  # the same while the worker wants to go


class Context:
    """Shared by all connections of a worker; the worker makes one. Event loop only.

    interface: to be set before the first connection is made.
    websockets: what holds for them; None where they are not served.
    proxies: which peers are believed, None: none. hosts: names that the Host field may have, None: any.
    request_ids: of requests, None: they have none.
    draining: the worker wants to go; responses say `Connection: close` where the connection can never move.
    closing: they all say it.
    on_idle: called with each connection that has come to wait for a request (so that it can move), None: not wanted.
    on_socket: called with each connection that becomes a WebSocket, None: not wanted.
    requests: responses finished so far, of all connections; errors: those of them that were 5xx or cut short.
    adopted: connections that have come from other workers.
    on_enough: called when `requests` reaches `requests_wanted`. on_closed: called after a connection has ended, or
    has not come about.
    """

    __slots__ = (
        "access_log",
        "active",
        "adopted",
        "closing",
        "connections",
        "deadlines",
        "draining",
        "errors",
        "heads",
        "hosts",
        "interface",
        "keep_alive",
        "limits",
        "log",
        "loop",
        "on_closed",
        "on_enough",
        "on_idle",
        "on_socket",
        "proxies",
        "request_ids",
        "requests",
        "requests_wanted",
        "server_fields",
        "timeouts",
        "websockets",
    )

    interface: Interface

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        parser: HeadParser,
        log: Log,
        *,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        server_fields: ServerFields | None = None,
        access_log: Recorder | None = None,
        underscores: str = "drop",
        websockets: WebSocketOptions | None = None,
        proxies: ProxyRules | None = None,
        hosts: HostList | None = None,
        request_ids: RequestIds | None = None,
    ) -> None:
        self.loop = loop
        self.log = log
        self.limits = limits or Limits()
        self.timeouts = timeouts or Timeouts()
        self.heads = HeadReader(parser, self.limits, underscores, persistent=self.timeouts.keep_alive > 0)
        self.server_fields = server_fields or ServerFields(date=True, server=True)
        self.access_log = access_log
        self.websockets = websockets
        self.proxies = proxies
        self.hosts = hosts
        self.request_ids = request_ids
        self.deadlines: Deadlines[Wire] = Deadlines()
        self.connections: set[Connection] = set()
        self.active: set[Handler] = set()
        self.draining = False
        self.closing = False
        self.on_idle: Callable[[Connection], None] | None = None
        self.on_socket: Callable[[Connection], None] | None = None
        self.requests = 0
        self.errors = 0
        self.adopted = 0
        self.keep_alive = self.timeouts.keep_alive
        self.requests_wanted = -1
        self.on_enough: Callable[[], None] = _nothing
        self.on_closed: Callable[[], None] = _nothing

    def tick(self, now: float) -> None:
        """End what has timed out at the loop's time `now`. The worker calls this about twice a second."""
        self.server_fields.refresh(time.time())
        self._expire(now)

    def _expire(self, now: float) -> None:
        """A batch in each turn of the loop: thousands that came together time out together."""
        for connection in self.deadlines.due(now, BATCH):
            connection.timed_out(now)
        if self.deadlines.late(now):
            self.loop.call_soon(self._expire, now)


def _nothing() -> None:
    pass
