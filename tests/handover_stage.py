"""A stage for the hand-over of connections: workers' serving sides and their clients in one process, on one loop.

The application answers `NAME NUMBER METHOD TARGET DIGEST CLIENT SERVER`: which side has answered, how many calls all
sides have had before, what was asked with the SHA-256 of the body, and the addresses of the scope. `/wait` answers when
`Stage.release` is set, `/big/N` with N bytes of padding behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import socket
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from apphost.interfaces.asgi import AsgiInterface
from apphost.logs import Log
from apphost.messages import Channel, Message
from apphost.protocols.base import HeadParser
from apphost.protocols.context import Context
from apphost.protocols.http1 import Connection
from apphost.protocols.wire import Phase
from apphost.worker.handover import Receiver, Sender
from apphost.worker.loading import choose_parser

T = TypeVar("T")

PATIENCE = 60.0  # s until a wait has failed


def request(target: str = "/", body: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    method = b"POST" if body else b"GET"
    return b"%b %b HTTP/1.1\r\nHost: a\r\n%b\r\n%b" % (method, target.encode(), length, body)


@dataclass(frozen=True)
class Answer:
    side: str
    number: int
    method: str
    target: str
    digest: str
    client: str
    server: str
    closes: bool

    def fits(self, target: str = "/", body: bytes = b"") -> bool:
        asked = ("POST" if body else "GET", target, hashlib.sha256(body).hexdigest())
        return (self.method, self.target, self.digest) == asked


class Client:
    """The client's end of one connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.loop = loop
        self.sock = sock
        self.received = b""

    def push(self, data: bytes) -> None:
        """Send without giving the loop a turn."""
        assert self.sock.send(data) == len(data)

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    async def _more(self) -> bool:
        data = await asyncio.wait_for(self.loop.sock_recv(self.sock, 1 << 20), PATIENCE)
        self.received += data
        return bool(data)

    async def answer(self) -> Answer:
        """The next one, which must be a 200."""
        while (end := self.received.find(b"\r\n\r\n")) < 0:
            assert await self._more(), f"the connection ended within {self.received!r}"
        head = self.received[:end].decode().split("\r\n")
        assert head[0] == "HTTP/1.1 200 OK", head
        fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:])}
        size = end + 4 + int(fields["content-length"])
        while len(self.received) < size:
            assert await self._more(), "the connection ended within a body"
        body, self.received = self.received[end + 4 : size], self.received[size:]
        side, number, method, target, digest, client, server = body.decode().rstrip(".").split(" ")
        return Answer(side, int(number), method, target, digest, client, server, fields.get("connection") == "close")

    async def ask(self, target: str = "/", body: bytes = b"") -> Answer:
        """A request and its answer, with nothing before and nothing behind it."""
        assert not self.received
        await self.send(request(target, body))
        answer = await self.answer()
        assert answer.fits(target, body), answer
        assert not self.received
        return answer

    async def ended(self) -> bool:
        """Whether the next that comes is the end of the connection."""
        try:
            return not self.received and not await self._more()
        except ConnectionResetError:
            return True


class Side:
    """One worker: a context with the application, its sender, its receivers."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.name = name
        self.room = True
        self.failed = 0  # times that nothing could be moved any more
        self.receivers: set[Receiver] = set()
        self.sender: Sender | None = None
        self.context = Context(stage.loop, stage.parser, stage.log)
        self.context.interface = AsgiInterface(self._app, stage.loop, stage.log, self.context.active)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        number = len(self.stage.calls)
        self.stage.calls.append(scope["path"])
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        if scope["path"] == "/wait":
            await self.stage.release.wait()
        addresses = ["-".join(map(str, scope[key] or ["nobody"])) for key in ("client", "server")]
        words = (self.name, str(number), scope["method"], scope["path"], hashlib.sha256(body).hexdigest(), *addresses)
        text = " ".join(words).encode()
        if scope["path"].startswith("/big/"):
            text += b"." * int(scope["path"][5:])
        headers = [(b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    @property
    def connections(self) -> list[Connection]:
        return list(self.context.connections)

    # -- as the worker does it

    def drain_to(self, *channels: socket.socket) -> Sender:
        """Begin to move everything over these channels."""
        self.sender = Sender(self.stage.loop, self.stage.log, self.name, self._nobody_left)
        self.context.on_idle = self.sender.offer
        for channel in channels:
            self.sender.add(channel)
        self.sender.offer_all(self.connections)
        return self.sender

    def _nobody_left(self) -> None:
        self.failed += 1
        self.context.on_idle = None

    def serve_on(self) -> None:
        """End the drain: this side may receive again."""
        if self.sender is not None:
            self.sender.close()
        self.context.on_idle = None

    def receive_from(self, channel: socket.socket) -> Receiver:
        stage = self.stage
        receiver = Receiver(stage.loop, stage.log, self.context, channel, lambda: self.room, self.receivers.discard)
        self.receivers.add(receiver)
        return receiver

    async def accept(self, sock: socket.socket) -> Connection:
        sock.setblocking(False)
        _, connection = await self.stage.loop.connect_accepted_socket(lambda: Connection(self.context), sock)
        return connection


class Stage:
    def __init__(self, loop: asyncio.AbstractEventLoop, parser: HeadParser, folder: Path) -> None:
        self.loop = loop
        self.parser = parser
        self.folder = folder
        self.log = Log("error")
        self.calls: list[str] = []  # paths that any application was called with, in order
        self.release = asyncio.Event()
        self.sides: list[Side] = []
        self.clients: list[Client] = []
        self.channels: list[socket.socket] = []

    def side(self, name: str) -> Side:
        side = Side(self, name)
        self.sides.append(side)
        return side

    def pair(self) -> tuple[socket.socket, socket.socket]:
        return socket.socketpair()

    def connect(self, source: Side, *targets: Side) -> Receiver:
        """Let `source` drain to `targets`, all real, offering to the first one first; the receiver of the last one."""
        ours, theirs = zip(*(self.pair() for _ in targets), strict=True)
        receivers = [target.receive_from(sock) for target, sock in zip(targets, theirs, strict=True)]
        source.drain_to(*ours)
        return receivers[-1]

    def full_sides(self, count: int) -> list[Side]:
        """Workers that refuse whatever they are offered."""
        sides = [self.side(f"full {number}") for number in range(count)]
        for side in sides:
            side.room = False
        return sides

    def by_hand(self, side: Side) -> Channel:
        """Let `side` drain to a successor that the test plays."""
        ours, theirs = self.pair()
        self.channels.append(theirs)
        side.drain_to(ours)
        return Channel(theirs)

    def sockets(self, kind: str) -> tuple[socket.socket, socket.socket]:
        """Both ends of a connection, the client's first. `kind`: tcp or unix."""
        if kind == "tcp":
            listener = socket.create_server(("127.0.0.1", 0))
        else:
            listener = socket.socket(socket.AF_UNIX)
            path = self.folder / f"{len(self.clients)}.sock"
            listener.bind(str(path))
            listener.listen()
        with listener:
            ours = socket.socket(listener.family)
            ours.connect(listener.getsockname())
            return ours, listener.accept()[0]

    async def client(self, side: Side, kind: str = "tcp") -> tuple[Client, Connection]:
        """A new connection, served by `side`."""
        ours, theirs = self.sockets(kind)
        client = Client(self.loop, ours)
        self.clients.append(client)
        return client, await side.accept(theirs)

    async def close(self) -> None:
        for client in self.clients:
            client.sock.close()
        for channel in self.channels:
            channel.close()
        for side in self.sides:
            if side.sender is not None:
                side.sender.close()
            for receiver in side.receivers:
                receiver.close()
        await until(lambda: not any(side.context.active for side in self.sides), "the applications to end")
        for side in self.sides:
            for connection in side.connections:
                connection.abort()
        await until(lambda: not any(side.connections for side in self.sides), "the connections to end")


async def until(predicate: Callable[[], T], what: str = "") -> T:
    """Let the loop run until `predicate` is true."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not (value := predicate()):
        assert asyncio.get_running_loop().time() < deadline, f"not within {PATIENCE} s: {what or predicate}"
        await asyncio.sleep(0.001)
    return value


async def turns(count: int = 5) -> None:
    """Let the loop look at everything that is readable, `count` times."""
    for _ in range(count):
        await asyncio.sleep(0.0005)


async def messages(channel: Channel, count: int = 1) -> list[tuple[Message, list[int]]]:
    """The next `count` messages of a channel played by hand; it must not have more than those."""
    found: list[tuple[Message, list[int]]] = []

    def enough() -> bool:
        found.extend(channel.receive() or [])
        return len(found) >= count

    await until(enough, f"{count} messages")
    assert len(found) == count, found
    return found


def moving(connection: Connection) -> bool:
    return connection.phase is Phase.MOVING


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))


@contextlib.contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    gc.collect()
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before, "descriptors are left open"


class Theatre:
    """Runs plays: `theatre(play)` gives `play` a stage and returns what it returns, the stage cleared, no fd left."""

    def __init__(self, loop_name: str, parser_name: str) -> None:
        self.loop_name = loop_name
        self.parser_name = parser_name
        self._new_loop().close()  # the first of its kind opens descriptors for good

    def __call__(self, play: Callable[[Stage], Coroutine[Any, Any, T]]) -> T:
        trouble: list[dict[str, Any]] = []
        with no_descriptor_leaks(), tempfile.TemporaryDirectory(prefix="ho-") as folder:
            loop = self._new_loop()
            loop.set_exception_handler(lambda _, context: trouble.append(context))
            try:
                return loop.run_until_complete(self._perform(play, loop, Path(folder)))
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()
                assert not trouble, trouble

    async def _perform(
        self, play: Callable[[Stage], Coroutine[Any, Any, T]], loop: asyncio.AbstractEventLoop, folder: Path
    ) -> T:
        _, parser = choose_parser(self.parser_name)
        stage = Stage(loop, parser, folder)
        try:
            return await play(stage)
        finally:
            await stage.close()

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        if self.loop_name == "uvloop":
            uvloop = pytest.importorskip("uvloop")
            return uvloop.new_event_loop()  # type: ignore[no-any-return]
        return asyncio.new_event_loop()
