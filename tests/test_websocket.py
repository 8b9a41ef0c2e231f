"""One socket without a network: its life, step by step, and what the application hears of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from apphost.interfaces.asgi import AsgiInterface
from apphost.logs import Log
from apphost.protocols.base import Stream
from apphost.protocols.context import Context
from apphost.protocols.exchange import HIGH_WATER
from apphost.protocols.frames import TEXT
from apphost.protocols.h11_parser import H11Parser
from apphost.protocols.http1 import Connection
from apphost.protocols.websocket import TRANSITIONS, Life, WebSocket, WebSocketOptions, read_on_reload
from apphost.protocols.wire import Phase
from tests.peer import Peer, Request
from tests.support import linux
from tests.transport import FakeTransport

HANDSHAKE = (
    b"GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
OPTIONS = WebSocketOptions(ping_interval=0, close_timeout=10, on_reload=read_on_reload(["rejoin"]))


def text(message: str) -> bytes:
    """A frame of a client, masked with zeros."""
    return bytes((TEXT, 0x80 | len(message), 0, 0, 0, 0)) + message.encode()


def close(code: int) -> bytes:
    return bytes((0x88, 0x82, 0, 0, 0, 0)) + code.to_bytes(2, "big")


class Chat(Peer):
    """A client that has a socket, and the socket."""

    socket: WebSocket

    def __init__(self) -> None:
        super().__init__()
        self.context.websockets = OPTIONS
        self.send(HANDSHAKE)
        assert self.read().startswith(b"HTTP/1.1 101 ")

    def handle(self, stream: Stream) -> Request:
        request = super().handle(stream)
        self.socket = stream.opening.accept(request, None, ())
        return request

    def leave(self) -> None:
        self.socket.leave(5.0, 5.0)

    def part(self) -> None:
        self.socket.part(None)

    def offer(self) -> None:
        assert self.connection.movable
        self.connection.pack()

    def stay(self) -> None:
        self.connection.stay()


# How a socket comes to each of its lives.
WAYS: dict[Life, list[Callable[[Chat], None]]] = {
    Life.OPEN: [],
    Life.LEAVING: [Chat.leave],
    Life.RESTING: [Chat.leave, Chat.part],
    Life.OFFERED: [Chat.leave, Chat.part, Chat.offer],
    Life.CLOSING: [lambda chat: chat.socket.close(1000)],
    Life.DISMISSED: [lambda chat: chat.socket.dismiss(1012, "")],
    Life.CLOSED: [lambda chat: chat.send(close(1000))],
}


def chat_in(life: Life) -> Chat:
    chat = Chat()
    for step in WAYS[life]:
        step(chat)
    assert chat.socket.life is life
    chat.read()
    return chat


# What may be asked of a socket at any time, and where that leads from where it is allowed.
ORDERS: list[tuple[Life, Callable[[WebSocket], None]]] = [
    (Life.LEAVING, lambda socket: socket.leave(5.0, 5.0)),
    (Life.CLOSING, lambda socket: socket.close(1000)),
    (Life.DISMISSED, lambda socket: socket.dismiss(1012, "")),
    (Life.CLOSED, WebSocket.lost),
]


@pytest.mark.parametrize("life", Life)
@pytest.mark.parametrize(("to", "order"), ORDERS, ids=[to.name for to, _ in ORDERS])
def test_an_order_is_obeyed_where_the_table_allows_it_and_else_changes_nothing(
    life: Life, to: Life, order: Callable[[WebSocket], None]
) -> None:
    chat = chat_in(life)
    order(chat.socket)
    allowed = to in TRANSITIONS[life]
    assert chat.socket.life is (to if allowed else life)
    says_last = allowed and to in (Life.CLOSING, Life.DISMISSED)
    assert chat.read()[:1] == (b"\x88" if says_last else b"")


@pytest.mark.parametrize("life", Life)
def test_every_life_ends(life: Life) -> None:
    seen = {life}
    while more := {after for each in seen for after in TRANSITIONS[each]} - seen:
        seen |= more
    assert Life.CLOSED in seen


def test_a_reason_that_is_no_text_changes_nothing() -> None:
    """A5: the application is told, and can still close the socket."""
    chat = Chat()
    with pytest.raises(UnicodeEncodeError):
        chat.socket.close(1000, "\ud800")
    assert chat.socket.life is Life.OPEN
    assert chat.read() == b""


def test_nobody_took_it() -> None:
    """It rests again, can be offered again, and is closed with 1012 when its time is up."""
    chat = chat_in(Life.OFFERED)
    assert chat.connection.phase is Phase.MOVING
    chat.stay()
    assert chat.socket.life is Life.RESTING
    assert chat.connection.movable
    chat.offer()
    chat.stay()
    chat.after(6.0)
    assert chat.socket.life is Life.DISMISSED
    assert chat.read() == b"\x88\x02\x03\xf4"  # 1012


def test_the_application_does_not_finish() -> None:
    chat = chat_in(Life.LEAVING)
    chat.after(6.0)
    assert chat.socket.life is Life.DISMISSED
    assert chat.read() == b"\x88\x02\x03\xf4"


def test_a_message_that_is_half_read_keeps_it_from_being_offered() -> None:
    chat = Chat()
    chat.send(text("abc")[:3])
    assert chat.socket.reader.at_boundary, "less than a frame can travel"
    chat.send(b"\x00\x00\x00abc" + b"\x01\x81\x00\x00\x00\x00d")  # the rest, and the first fragment of the next
    chat.leave()
    chat.part()
    assert chat.socket.life is Life.RESTING
    assert not chat.connection.movable
    chat.send(b"\x80\x81\x00\x00\x00\x00e")
    assert chat.connection.movable
    capsule = chat.connection.pack()
    assert capsule.socket is not None
    assert capsule.socket.messages == ["abc", "de"]


# ------------------------------------------------------------------------------------------- with an ASGI application


class Play:
    """An application at a real loop; `told` is what it has received."""

    def __init__(self, app: Callable[[Play, Any, Any], Any]) -> None:
        self.app = app
        self.told: list[tuple[str, Any]] = []
        self.go_on = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.context = Context(loop, H11Parser(), Log("error"), websockets=OPTIONS)
        self.context.interface = AsgiInterface(self._call, loop, self.context.log, self.context.active)
        self.connection = Connection(self.context)
        self.transport = FakeTransport(loop, self.connection)

    async def _call(self, _scope: Any, receive: Any, send: Any) -> None:
        async def hear() -> str:
            event = await receive()
            kind = event["type"].removeprefix("websocket.")
            self.told.append((kind, event.get("text", event.get("code"))))
            return str(kind)

        assert await hear() == "connect"
        await send({"type": "websocket.accept"})
        await self.app(self, hear, send)

    async def turns(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def open(self) -> WebSocket:
        self.connection.connection_made(self.transport)
        self.connection.data_received(HANDSHAKE)
        await self.turns()
        assert self.connection.websocket is not None
        return self.connection.websocket

    async def say(self, data: bytes) -> None:
        self.connection.data_received(data)
        await self.turns()

    async def end(self) -> list[tuple[str, Any]]:
        self.transport.abort()
        await self.turns()
        assert not self.context.active
        return self.told


def test_no_message_comes_behind_the_disconnect() -> None:
    """W12: an application that takes too long to finish with a socket that was to move is told of the end again,
    not of the messages that were kept for its successor."""

    async def app(play: Play, hear: Any, _send: Any) -> None:
        assert await hear() == "disconnect"
        await play.go_on.wait()
        await hear()

    async def run() -> list[tuple[str, Any]]:
        play = Play(app)
        socket = await play.open()
        socket.leave(5.0, 5.0)
        await play.turns()
        await play.say(text("for the next one"))
        socket.dismiss(1012, "the application has not parted in time")
        play.go_on.set()
        await play.turns()
        return await play.end()

    assert asyncio.run(run()) == [("connect", None), ("disconnect", 1012), ("disconnect", 1012)]


def test_what_a_client_says_before_it_closes_is_heard_though_the_socket_was_to_move() -> None:
    """W8: no other worker takes a socket that its client has closed, so nobody else would get the message."""

    async def app(play: Play, hear: Any, _send: Any) -> None:
        await play.go_on.wait()
        while await hear() != "disconnect":
            pass

    async def run() -> list[tuple[str, Any]]:
        play = Play(app)
        socket = await play.open()
        socket.leave(5.0, 5.0)
        await play.say(text("bye") + close(3000))
        play.go_on.set()
        await play.turns()
        return await play.end()

    assert asyncio.run(run()) == [("connect", None), ("receive", "bye"), ("disconnect", 3000)]


@linux
def test_a_client_that_is_lost_while_nobody_reads() -> None:
    """W16: its ping has no answer, which may be unread, so the socket is looked at itself."""
    chat = Chat()
    ours, theirs = socket.socketpair()
    chat.transport.sock = ours
    with ours, theirs:
        for _ in range(HIGH_WATER // 100 + 1):
            chat.send(text("x" * 100))
        assert chat.transport.paused
        for _ in range(3):
            chat.socket.timed_out()
        assert not chat.transport.aborted
        theirs.close()
        chat.socket.timed_out()
        assert chat.transport.aborted
