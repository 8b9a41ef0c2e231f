"""The HTTP/1.1 connection: the only one, whatever parser reads its heads and whatever interface answers.

Requests on a connection are served strictly one after the other; pipelined ones wait in a bounded buffer. What arrives
is handled according to the phase that the connection is in; the table `_BEHAVIOUR` says how.

    WAITING --> HEAD --> BUSY --> WAITING ...            the life of a keep-alive connection
                           +----> DISCARDING --> WAITING  an unread body is read away first
                           +----> UPGRADED                it is a WebSocket, until its end
    WAITING or HEAD --> MOVING --> CLOSED                 to another worker, or back if that does not take it
    any -----------------------> LINGERING --> CLOSED     an early answer: ours is said, the client may still talk
    any -----------------------> CLOSED
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import cast

from apphost.protocols import strict
from apphost.protocols.base import BadRequest
from apphost.protocols.body import decoder_for
from apphost.protocols.capsule import Capsule
from apphost.protocols.context import Context
from apphost.protocols.deadlines import NEVER
from apphost.protocols.exchange import DISCARD_MAX, HIGH_WATER, Exchange
from apphost.protocols.handshake import read_handshake
from apphost.protocols.kernel import Peer
from apphost.protocols.opening import Opening, restore_websocket
from apphost.protocols.websocket import WebSocket
from apphost.protocols.wire import LOOK, Phase, Wire, addresses

_LEADING_CRLF = re.compile(rb"(?:\r\n)+")  # RFC 9112, 2.2: some old clients send CRLF after a body
_NO_REQUEST = (b"", b"\r")  # the latter may be half of such a CRLF

# Looking a member up in its enum costs 0.1 us before Python 3.12.
_WAITING, _HEAD, _BUSY, _MOVING = Phase.WAITING, Phase.HEAD, Phase.BUSY, Phase.MOVING
_DISCARDING, _CLOSED = Phase.DISCARDING, Phase.CLOSED


class Connection(Wire):
    """One client connection. Event loop only; the loop calls the `asyncio.Protocol` methods.

    `capsule`: it has a past, in another worker or at a proxy, and goes on where it was.
    """

    __slots__ = ("_capsule",)
    exchange_type = Exchange  # what its requests are

    def __init__(self, context: Context, capsule: Capsule | None = None) -> None:
        super().__init__(context)
        self._capsule = capsule

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        context = self.context
        context.connections.add(self)
        if self._capsule is not None:
            self._unpack(self._capsule)
        else:
            self.client, self.server = addresses(transport)
            self._arm(context.loop.time() + context.timeouts.request_header)
        if context.on_idle is not None:
            # Not at once: the transport begins to read after this method, also one that was paused in it.
            context.loop.call_soon(context.on_idle, self)

    def _unpack(self, capsule: Capsule) -> None:
        """Go on where another worker has stopped."""
        self._capsule = None
        self.client, self.server, self.scheme = capsule.client, capsule.server, capsule.scheme
        self.anonymous, self.requests = capsule.anonymous, capsule.requests
        if capsule.socket is not None:
            try:
                websocket = restore_websocket(self, capsule.socket)
            except BadRequest:  # from an apphost with other rules
                self.abort()
                return
            self._go_on_as(websocket)
            websocket.unpack(capsule.socket, capsule.data, capsule.left)
            # uvloop begins to read after `connection_made`, whatever was said in it.
            self.context.loop.call_soon(self.pause_again)
            return
        self.buffer = capsule.data
        self.phase = _HEAD if capsule.half else _WAITING
        self._arm(self.context.loop.time() + capsule.left)
        self._pump_later()

    def _pump_later(self) -> None:
        """Look at what is in the buffer, but not at once: answers to pipelined requests must not nest, and other
        connections want their turn."""
        if self.buffer and self.phase is _WAITING:
            self.context.loop.call_soon(self._pump)

    def stay(self) -> None:
        """No other worker has taken it: go on here, where it was."""
        if self.phase is not _MOVING:
            return
        self.phase = _WAITING if self.websocket is None else Phase.UPGRADED
        self._arm(self.context.loop.time() if self.read_deadline == NEVER else self.read_deadline)
        if self.websocket is not None:
            data, self.buffer = self.buffer, b""
            self.websocket.stay(data)
            if self.eof:
                self._eof_upgraded()
            elif self.context.on_socket is not None:
                self.context.on_socket(self)
            return
        self._resume()
        self.scanned = 0
        self._pump()
        if self.eof and self.phase is _WAITING:
            _BEHAVIOUR[self.phase].eof(self)

    def eof_received(self) -> bool:
        """The client has ended its side. It may still read (RFC 9112, 9.6), so what was asked for is answered."""
        self.eof = True
        _BEHAVIOUR[self.phase].eof(self)
        return True  # the transport stays open until we close it

    def resume_writing(self) -> None:
        self.write_paused = False
        self.write_deadline = NEVER
        if self.exchange is not None and self.phase is _BUSY:
            self.exchange.handler.write_resumed()
        elif self.websocket is not None:
            self.websocket.write_resumed()
        elif self.phase is _WAITING or self.phase is _HEAD:
            self._resume()
            self._await_request()
            self._pump()
            if self.context.on_idle is not None:
                self.context.on_idle(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        context = self.context
        phase = self.phase
        self.phase = _CLOSED
        context.connections.discard(self)
        context.deadlines.forget(self)
        exchange = self.exchange
        self.exchange = None
        self.buffer = b""
        if self.websocket is not None:
            self.websocket.lost()
            self.websocket = None
        if exchange is not None and phase is not _DISCARDING:
            self._lose(exchange)
        context.on_closed()

    # -- request heads

    def data_received(self, data: bytes) -> None:
        """Bytes of the client; while no request is in progress, begin one if its head is complete."""
        phase = self.phase
        if phase is not _WAITING and phase is not _HEAD:
            _BEHAVIOUR[phase].data(self, data)
            return
        if self.buffer:
            data = self.buffer + data
        if self.write_paused:  # the client pipelines without reading the answers
            self._keep(data)
            return
        if data[0] == 0x0D and (leading := _LEADING_CRLF.match(data)) is not None:
            data = data[leading.end() :]
            self.scanned = 0
        end = data.find(b"\r\n\r\n", self.scanned) + 4
        if end < 4:
            self._take_partial(data)
            return
        raw, rest = (data, b"") if end == len(data) else (data[:end], data[end:])
        self.scanned = 0
        context = self.context
        try:
            head = context.heads.read(raw)
            decoder = None
            if head.content_length or head.chunked:
                decoder = decoder_for(head.content_length, head.chunked, context.limits)
            exchange = self.exchange_type(self, head, decoder)
            if head.upgrade:
                self._read_handshake(exchange)
            if rest and decoder is not None:
                rest = exchange.feed(rest)
        except BadRequest as refusal:
            self.refuse(refusal, raw)
            return
        self.buffer = rest
        self.exchange = exchange
        self.phase = _BUSY
        self.requests += 1
        self.read_deadline = NEVER
        if decoder is not None:
            self._mind_body(exchange)
        if context.access_log is not None:
            exchange.started_at = time.perf_counter()
        handler = context.interface.handle(exchange)
        if not exchange.complete:  # an application may answer at once
            exchange.handler = handler

    def _take_partial(self, data: bytes) -> None:
        self.buffer = data
        if data not in _NO_REQUEST:
            try:
                strict.check_partial(data, self.scanned, self.context.limits)
            except BadRequest as refusal:
                self.refuse(refusal, data)
                return
        self.scanned = max(len(data) - 3, 0)
        if self.eof:
            self.close()
        elif data in _NO_REQUEST:
            self.phase = _WAITING  # for no longer than before
        elif self.phase is _WAITING:
            self.phase = _HEAD
            self._arm(self.context.loop.time() + self.context.timeouts.request_header)

    # -- request bodies

    def _take_busy(self, data: bytes) -> None:
        """Bytes while a request is in progress: its body, or requests that must wait."""
        exchange = self.exchange
        assert exchange is not None
        if exchange.body_complete:
            self._keep(self.buffer + data)
            if self.read_paused:
                self.expect_within(LOOK)
            return
        try:
            self.buffer = exchange.feed(data)
        except BadRequest as refusal:
            self._refuse_body(exchange, refusal)
            return
        self._mind_body(exchange)
        exchange.handler.body_arrived()

    def _mind_body(self, exchange: Exchange) -> None:
        """Pause when the application does not take the body as fast as it comes; else expect the next byte soon."""
        if exchange.body_complete or exchange.expect:
            self.read_deadline = NEVER
        elif exchange.buffered > HIGH_WATER:
            self.read_deadline = NEVER
            self._pause()
        else:
            self._arm(self.context.loop.time() + self.context.timeouts.request_body)

    def body_taken(self) -> None:
        """The application has taken, or waits for, what there is of the body."""
        exchange = self.exchange
        if exchange is not None and not exchange.body_complete:
            if self.read_deadline == NEVER:  # else it asks again, and the client is no less late for that
                self.expect_within(self.context.timeouts.request_body)
            self._resume()

    def _refuse_body(self, exchange: Exchange, refusal: BadRequest) -> None:
        """The body of a request in progress is wrong: an answer if that is still possible, and the end."""
        if exchange.started:
            self._cut(exchange)
            self._lose(exchange)
        else:
            self.refuse(refusal, exchange.head.method.encode() + b" ")
            exchange.client_gone()

    def _discard(self, data: bytes) -> None:
        """Bytes of a body that nobody will read."""
        exchange = self.exchange
        assert exchange is not None
        try:
            self.buffer = exchange.feed(data)
        except BadRequest:
            self.linger()
            return
        if exchange.body_complete:
            self._next()
        elif exchange.buffered > DISCARD_MAX:
            self.linger()

    def _keep(self, data: bytes) -> None:
        self.buffer = data
        if len(data) > self.context.limits.pipelined:
            self._pause()

    # -- WebSockets

    def _read_handshake(self, exchange: Exchange) -> None:
        """Raises `BadRequest`. Where WebSockets are not served, the request is one like any other (RFC 9110, 7.8)."""
        exchange.head.upgrade = self.context.websockets is not None
        if exchange.head.upgrade:
            exchange.opening = Opening(exchange, read_handshake(exchange.head))
            exchange.keep_alive = False  # nobody can tell what a client that was denied has sent behind its handshake

    def upgrade(self, exchange: Exchange, websocket: WebSocket) -> None:
        """`exchange` was answered with `websocket`."""
        exchange.become_websocket()
        self._account(exchange)
        self.exchange = None
        early, self.buffer = self.buffer, b""
        self._go_on_as(websocket)
        websocket.begin(early)
        if self.eof:
            websocket.eof()

    def _go_on_as(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.phase = Phase.UPGRADED
        if self.context.on_socket is not None:
            self.context.on_socket(self)

    def _take_frames(self, data: bytes) -> None:
        if self.websocket is not None:
            self.websocket.feed(data)

    def _eof_upgraded(self) -> None:
        if self.websocket is not None:
            self.websocket.eof()

    def _timeout_upgraded(self) -> None:
        if self.websocket is not None:
            self.websocket.timed_out()

    # -- responses

    @property
    def connected(self) -> bool:
        return self.phase is _BUSY and not self.transport.is_closing()

    def response_done(self, exchange: Exchange) -> None:
        """The response is complete; the application may go on working, the connection does not wait for it."""
        if exchange.status >= 500:
            self.context.errors += 1
        if not exchange.keep_alive:
            self.linger()
        elif exchange.decoder is None or exchange.decoder.done:
            self._next()
        else:
            self.phase = _DISCARDING
            exchange.buffered = 0
            self._arm(self.context.loop.time() + self.context.timeouts.request_body)
            self._resume()
        self._account(exchange)

    def response_failed(self, exchange: Exchange, started: bool) -> None:
        """The application failed: 500 if its head is not out yet, else never a clean end (ASGI, PEP 3333)."""
        if self.phase is not _BUSY:
            return
        if started:
            self._cut(exchange)
        else:
            exchange.status = 500
            self._answer(500, "the application failed", exchange.head.method, exchange.fields)
        self.context.errors += 1
        self._account(exchange, cut=started)

    def response_abandoned(self, exchange: Exchange, started: bool) -> None:
        """The application has left out what nobody waits for, as the client has ended its side."""
        if self.phase is not _BUSY:
            return
        if started:
            self._cut(exchange)
        else:
            self.linger()
        self._account(exchange, cut=True)

    def _account(self, exchange: Exchange, cut: bool = False) -> None:
        context = self.context
        context.requests += 1
        if context.access_log is not None:
            context.access_log.write(exchange, cut)
        if context.requests == context.requests_wanted:
            context.on_enough()

    def _next(self) -> None:
        """Ready for the next request."""
        context = self.context
        self.exchange = None
        self.phase = _WAITING
        self._arm(context.loop.time() + context.keep_alive)
        if self.buffer:
            self._pump_later()
        elif self.eof:
            self.close()
        if self.read_paused:
            self._resume()
        if context.on_idle is not None:
            context.on_idle(self)

    def _pump(self) -> None:
        if (self.phase is _WAITING or self.phase is _HEAD) and self.buffer and not self.write_paused:
            data, self.buffer = self.buffer, b""
            self.data_received(data)
            if self.eof:  # that came before this request began
                _BEHAVIOUR[self.phase].eof(self)

    # -- ends

    def refuse(self, refusal: BadRequest, begun: bytes) -> None:
        """Answer a request that breaks the rules, and whose first bytes are `begun`; nothing after it is processed."""
        self.context.log.debug(f"refused a request from {self.peer}: {refusal.status} {refusal.why}")
        if self.context.access_log is not None:
            self.context.access_log.write_refusal(self, refusal.status)
        self._answer(refusal.status, refusal.why, "HEAD" if begun.startswith(b"HEAD ") else "", refusal.fields)

    def close_idle(self) -> None:
        """The worker wants to go: close the connection if nothing of a request is there."""
        if self.phase is _WAITING and self.buffer in _NO_REQUEST:
            self.close()

    # -- the end of the client's side

    def _eof_idle(self) -> None:
        if self.buffer in _NO_REQUEST or self.phase is _HEAD:
            self.close()

    def _eof_busy(self) -> None:
        exchange = self.exchange
        assert exchange is not None
        if exchange.body_complete:
            exchange.handler.disconnected()
        else:
            self.close()
            self._lose(exchange)

    # -- time-outs

    def timed_out(self, now: float) -> None:
        if self.write_deadline <= now and self._reads_on():
            self.pause_writing()
        elif self.write_deadline <= now:
            exchange = self.exchange if self.phase is _BUSY else None
            self.abort()
            if exchange is not None:
                self._lose(exchange)
        else:
            self.read_deadline = NEVER
            _BEHAVIOUR[self.phase].timeout(self)

    def _await_request(self) -> None:
        """Give the client its whole time for what it has begun."""
        timeouts = self.context.timeouts
        self.expect_within(self.context.keep_alive if self.phase is _WAITING else timeouts.request_header)

    def _timeout_idle(self) -> None:
        if self.write_paused:  # it reads its last answer, and its next request may be here
            self._await_request()
        else:
            self.close()

    def _timeout_head(self) -> None:
        if self.write_paused:  # what is missing of the head may be here
            self._await_request()
        else:
            self.refuse(BadRequest(408, "the request head did not come in time"), self.buffer)

    def _timeout_busy(self) -> None:
        exchange = self.exchange
        assert exchange is not None
        if not exchange.body_complete:
            self._refuse_body(exchange, BadRequest(408, "the request body did not come in time"))
            return
        self.expect_within(LOOK)
        if self.look_at_client() is Peer.ENDED:  # what it has asked for before is still answered
            exchange.handler.disconnected()

    def _keep_moving(self, data: bytes) -> None:
        """Bytes in spite of the pause: read, so whoever goes on with the connection must get them. We do: the sender
        sees that there are more than it has offered, and takes its offer back."""
        self.buffer += data

    def _ignore(self, _data: bytes = b"") -> None:
        pass


class _Behaviour:
    """What a connection does in one phase when bytes come, when the client ends its side, when its time is up."""

    __slots__ = ("data", "eof", "timeout")

    def __init__(
        self,
        data: Callable[[Connection, bytes], None],
        eof: Callable[[Connection], None],
        timeout: Callable[[Connection], None],
    ) -> None:
        self.data = data
        self.eof = eof
        self.timeout = timeout


_BEHAVIOUR = {
    Phase.WAITING: _Behaviour(Connection.data_received, Connection._eof_idle, Connection._timeout_idle),
    Phase.HEAD: _Behaviour(Connection.data_received, Connection._eof_idle, Connection._timeout_head),
    Phase.BUSY: _Behaviour(Connection._take_busy, Connection._eof_busy, Connection._timeout_busy),
    Phase.UPGRADED: _Behaviour(Connection._take_frames, Connection._eof_upgraded, Connection._timeout_upgraded),
    Phase.DISCARDING: _Behaviour(Connection._discard, Connection.close, Connection.linger),
    Phase.MOVING: _Behaviour(Connection._keep_moving, Connection._ignore, Connection._ignore),
    Phase.LINGERING: _Behaviour(Connection._ignore, Connection.close, Connection.close),
    Phase.CLOSED: _Behaviour(Connection._ignore, Connection._ignore, Connection.overdue),
}
