"""From a request that asks for a WebSocket to the open socket, also to one that another worker has had."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from apphost.lifecycle import Policy
from apphost.protocols.base import Handler, RequestHead, ResponseError
from apphost.protocols.capsule import Socket
from apphost.protocols.deflate import Deflate, negotiate
from apphost.protocols.exchange import NOBODY, Exchange, Progress
from apphost.protocols.handshake import Handshake, accept_response
from apphost.protocols.strict import decode_path, examine
from apphost.protocols.websocket import WebSocket, WebSocketOptions

if TYPE_CHECKING:
    from apphost.protocols.http1 import Connection


class Opening:
    """The handshake of a WebSocket while it waits for the application's answer; `accept` opens the socket.

    A denial is an ordinary response, on the stream. A socket that comes from another worker is open already
    (`rejoins`): it can be accepted as it was before, or be abandoned. `state`: what the application has left there.
    """

    __slots__ = ("_exchange", "_handshake", "head", "options", "policy", "rejoined", "state")

    def __init__(self, exchange: Exchange, handshake: Handshake) -> None:
        self.options = exchange.context.websockets or WebSocketOptions()
        self._exchange: Exchange | None = exchange
        self._handshake = handshake
        self.head = exchange.head
        self.policy = Policy.CLOSE
        if not exchange.connection.fixed:
            self.policy = self.options.policy(decode_path(exchange.head.raw_path))
        self.rejoined: WebSocket | None = None
        self.state: bytes | None = None

    @property
    def subprotocols(self) -> list[str]:
        """Those that the client offers, best first."""
        return self._handshake.subprotocols

    @property
    def rejoins(self) -> bool:
        return self.rejoined is not None

    def accept(self, handler: Handler, subprotocol: str | None, headers: Iterable[tuple[bytes, bytes]]) -> WebSocket:
        """Open the socket; from then on `handler` hears of it. Raises `ResponseError`, `ValueError` or `TypeError` for
        what the application may not do or say; nothing was sent then."""
        exchange = self._exchange
        if exchange is None or exchange.progress is not Progress.NONE:
            raise ResponseError("the handshake was answered already")
        if self.rejoined is not None:
            return self._accept_again(exchange, self.rejoined, handler, subprotocol)
        options = self.options
        deflate, extension = None, b""
        if options.compression:
            # One that may move agrees to no window that it would have to take along.
            stays = self.policy is Policy.CLOSE
            deflate, extension = negotiate(self._handshake.offers, options.message, stays)
        headers = exchange.with_fields(headers)
        response = accept_response(self._handshake, subprotocol, headers, extension, exchange.context.server_fields)
        websocket = WebSocket(exchange.connection, options, deflate, self, subprotocol)
        websocket.handler = handler
        exchange.connection.write(response)
        exchange.connection.upgrade(exchange, websocket)
        return websocket

    def _accept_again(
        self, exchange: Exchange, websocket: WebSocket, handler: Handler, subprotocol: str | None
    ) -> WebSocket:
        if subprotocol != websocket.subprotocol:
            self.abandon(1012)
            told = websocket.subprotocol
            raise ResponseError(f"a client that was told subprotocol {told!r} cannot go on with {subprotocol!r}")
        exchange.become_websocket()
        self.rejoined = None
        if not websocket.ended:
            websocket.handler = handler
        return websocket

    def abandon(self, code: int) -> None:
        """Close a socket that rejoins, in place of `accept`."""
        if self.rejoined is not None and self._exchange is not None:
            self._exchange.become_websocket()
            self.rejoined.close(code)
            self.rejoined = None

    def release(self) -> None:
        """The application has ended. They refer to each other: without this all would wait for the collector."""
        self._exchange = None


def restore_websocket(connection: Connection, socket: Socket) -> WebSocket:
    """The socket that another worker has had, with the application called for it anew. Raises `BadRequest`."""
    head = RequestHead("GET", socket.target, "1.1", socket.headers)
    examine(head, "allow")
    head.upgrade = True
    exchange = connection.exchange_type(connection, head, None)
    exchange.go_on(socket.headers)
    exchange.keep_alive = False
    exchange.opening = opening = Opening(exchange, Handshake(b"", socket.offered, []))
    opening.state = socket.state
    options = opening.options
    deflate = None
    if socket.window is not None:
        ours, theirs, keep_ours = socket.window
        deflate = Deflate(options.message, ours, theirs, keep_ours, False)
    websocket = opening.rejoined = WebSocket(connection, options, deflate, opening, socket.subprotocol)
    websocket.handler = NOBODY
    handler = connection.context.interface.handle(exchange)
    if not exchange.complete:  # an application may answer at once
        websocket.handler = handler
    return websocket
