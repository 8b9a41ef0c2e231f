"""The ASGI interface on a stream without a connection: A3 to A8, H4 to H7, H12, R4 to R6, S15 to S17."""

from __future__ import annotations

import asyncio
import builtins
import importlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from apphost.interfaces.asgi import AsgiInterface
from apphost.interfaces.asgi_http import (
    AsgiRequest,
    add_root_path,
    failure,
    http_scope,
    is_disconnect,
)
from apphost.logs import Log
from apphost.protocols.base import ClientDisconnected, RequestHead, ResponseError, Stream
from apphost.protocols.response import ResponseHead
from apphost.protocols.strict import examine
from tests.rawhttp import DEADLINE

START = {"type": "http.response.start", "status": 200, "headers": []}
DISCONNECT = {"type": "http.disconnect"}


def part(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class RecordingLog(Log):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def write(self, level: str, message: str, detail: str = "", **fields: Any) -> None:
        self.said.append(f"{level}: {message}")


class FakeStream(Stream):
    """A stream that keeps what it is given. `arrived` is the body that has come, None its end."""

    scheme = "http"
    client = ("127.0.0.1", 50000)
    server = ("127.0.0.1", 8000)

    def __init__(self, target: str = "/", *arrived: bytes | None) -> None:
        self.head = RequestHead("GET", target.encode(), "1.1", [(b"host", b"a")])
        examine(self.head)
        self.arrived = list(arrived)
        self.asked = 0
        self.out: list[Any] = []
        self.may_write = self.is_connected = True
        self.failed = self.abandoned = self.is_complete = False

    def take_body(self) -> tuple[bytes, bool]:
        self.asked += 1
        data = b"".join(piece for piece in self.arrived if piece is not None)
        more = None not in self.arrived
        self.arrived = [] if more else [None]
        return data, more

    @property
    def body_complete(self) -> bool:
        return None in self.arrived

    @property
    def writable(self) -> bool:
        return self.may_write

    @property
    def connected(self) -> bool:
        return self.is_connected

    @property
    def started(self) -> bool:
        return any(isinstance(piece, bytes) for piece in self.out)

    @property
    def complete(self) -> bool:
        return self.is_complete

    def start(self, head: ResponseHead) -> None:
        self.out.append(head.status)

    def write(self, data: bytes, more: bool) -> None:
        if self.is_complete or not self.out:
            raise ResponseError("out of order")
        self.out.append(data)
        self.is_complete = not more

    def fail(self) -> None:
        self.failed = True
        self.is_complete = True

    def abandon(self) -> None:
        self.abandoned = True
        self.is_complete = True

    def lose(self, request: AsgiRequest) -> None:
        """The client is gone."""
        self.is_connected = False
        self.is_complete = True
        request.disconnected()


App = Callable[[Any, Any, Any], Awaitable[Any]]


class Call:
    """One call of an application. Inside of a running loop only."""

    def __init__(self, app: App, stream: FakeStream | None = None) -> None:
        self.stream = stream or FakeStream("/", None)
        self.log = RecordingLog()
        self.active: set[Any] = set()
        interface = AsgiInterface(app, asyncio.get_running_loop(), self.log, self.active, worker="w")  # type: ignore[arg-type]
        self.request = interface.handle(self.stream)

    async def end(self) -> None:
        await asyncio.wait([self.request.task], timeout=DEADLINE)
        assert self.request.task.done()
        assert self.active == set()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# -- the scope


@pytest.mark.parametrize(
    ("target", "path", "raw_path"),
    [
        ("/a/b", "/a/b", b"/a/b"),
        ("/%C3%BC%2F", "/ü/", b"/%C3%BC%2F"),
        ("/%ff", "/\ufffd", b"/%ff"),
        ("/%", "/%", b"/%"),
        ("/%00%0a", "/\0\n", b"/%00%0a"),
    ],
)
def test_paths(target: str, path: str, raw_path: bytes) -> None:
    """H4 H5"""
    scope = http_scope(FakeStream(target + "?q=%20"), "", None)
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == (path, raw_path, b"q=%20")
    assert (scope["root_path"], "state" in scope) == ("", False)


@pytest.mark.parametrize(
    ("path", "with_root"),
    [("/", "/r/"), ("/a", "/r/a"), ("/r", "/r"), ("/r/", "/r/"), ("/r/a", "/r/a"), ("/rr", "/r/rr"), ("//r", "/r//r")],
)
def test_root_path(path: str, with_root: str) -> None:
    """H7 H5: the same for both, unless the decoded path has it already."""
    assert add_root_path("/r", path, path.encode()) == (with_root, with_root.encode())


def test_a_root_path_is_encoded_where_the_path_is() -> None:
    """H5: RFC 3986, 3.3."""
    assert add_root_path("/é x", "/a", b"/a") == ("/é x/a", b"/%C3%A9%20x/a")
    assert add_root_path("/a:b@c;d", "/a", b"/a") == ("/a:b@c;d/a", b"/a:b@c;d/a")


def test_scopes_share_only_what_is_inside_of_the_state() -> None:
    """A3 H12"""
    state: dict[str, Any] = {"pool": []}
    one, two = (http_scope(FakeStream("/"), "", state) for _ in range(2))
    assert one == two
    for key in ("asgi", "headers", "extensions", "state"):
        assert one[key] is not two[key]
    assert one["state"] is not state
    assert one["state"]["pool"] is state["pool"]


# -- receiving


def test_a_body_in_pieces() -> None:
    """R1 R3 R4"""
    got: list[Any] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        while len(got) < 4:
            got.append(await receive())

    async def main() -> None:
        call = Call(app, FakeStream("/", b"one"))
        await turns()
        assert [event["body"] for event in got] == [b"one"]
        for piece in (b"two", b"three", None):
            call.stream.arrived.append(piece)
        call.request.body_arrived()
        await turns()
        assert got[1:] == [{"type": "http.request", "body": b"twothree", "more_body": False}]
        call.request.disconnected()
        await call.end()
        assert got[2:] == [DISCONNECT] * 2

    asyncio.run(main())


def test_the_body_is_not_asked_for_before_the_application_asks() -> None:
    """R9: asking is what sends `100 Continue`."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send(START)
        await send(part(b"answer"))

    async def main() -> None:
        call = Call(app, FakeStream("/", b"body", None))
        await call.end()
        assert call.stream.asked == 0
        assert call.stream.out == [200, b"answer"]

    asyncio.run(main())


def test_several_tasks_may_receive() -> None:
    """A8 R6: and one that is cancelled takes nothing with it."""
    got: list[Any] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        async def one() -> None:
            got.append((await receive())["type"])

        tasks = [asyncio.ensure_future(one()) for _ in range(3)]
        await turns()
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()
        await send(START)
        await send(part(b""))

    async def main() -> None:
        call = Call(app, FakeStream("/"))
        await turns(10)
        call.stream.arrived += [b"all", None]
        call.request.body_arrived()
        await turns()
        assert got == ["http.request"]
        call.request.disconnected()
        await call.end()
        assert got == ["http.request", "http.disconnect"]

    asyncio.run(main())


def test_a_body_that_breaks_off() -> None:
    """R5: what has come, then a disconnect, and never an end."""
    got: list[Any] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        while not got or got[-1]["type"] != "http.disconnect":
            got.append(await receive())

    async def main() -> None:
        call = Call(app, FakeStream("/", b"part"))
        await turns()
        call.stream.lose(call.request)
        await call.end()
        assert got == [{"type": "http.request", "body": b"part", "more_body": True}, DISCONNECT]
        assert call.log.said == []

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_the_response_wakes_who_receives(fails: bool) -> None:
    """R4 A6: in a task of its own."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        waiting.append(asyncio.ensure_future(receive()))
        await turns()
        if fails:
            raise ValueError
        await send(START)
        await send(part(b""))

    waiting: list[asyncio.Future[Any]] = []

    async def main() -> None:
        await Call(app).end()
        assert await asyncio.wait_for(waiting[0], DEADLINE) == DISCONNECT

    asyncio.run(main())


# -- sending


def test_send_waits_for_the_client() -> None:
    """A8: several at once, and none is left behind."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send(START)
        await asyncio.gather(*(send(part(b"x", True)) for _ in range(3)))
        await send(part(b""))

    async def main() -> None:
        stream = FakeStream("/", None)
        stream.may_write = False
        call = Call(app, stream)
        await turns(10)
        assert stream.out == [200, b"x", b"x", b"x"]
        call.request.write_resumed()  # and paused again at once
        await turns(10)
        assert not stream.complete
        stream.may_write = True
        call.request.write_resumed()
        await call.end()
        assert stream.out[-1] == b""

    asyncio.run(main())


def test_a_client_that_goes_ends_the_waiting() -> None:
    """S16 A7: the next `send` raises, and that coming back is no failure."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send(START)
        await send(part(b"x", True))
        for event in (part(b"y", True), part(b""), START):
            with pytest.raises(ClientDisconnected) as caught:
                await send(event)
            assert isinstance(caught.value, OSError)
        await send(part(b""))

    async def main() -> None:
        stream = FakeStream("/", None)
        stream.may_write = False
        call = Call(app, stream)
        await turns()
        stream.lose(call.request)
        await call.end()
        assert (stream.out, call.log.said) == ([200, b"x"], [])

    asyncio.run(main())


def test_a_half_closed_client_can_be_answered() -> None:
    """P11 R4"""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        assert await receive() == DISCONNECT
        await send(START)
        await send(part(b"answer"))

    async def main() -> None:
        call = Call(app)
        call.request.disconnected()
        await call.end()
        assert (call.stream.out, call.stream.failed, call.log.said) == ([200, b"answer"], False, [])

    asyncio.run(main())


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_leaving_a_client_that_is_gone_is_no_failure(started: bool, raises: bool) -> None:
    """R4 S17: told that the client has ended its side, an application may leave it at that, as Django does."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert await receive() == DISCONNECT
        if started:
            await send(START)
            await send(part(b"some", True))
        if raises:
            raise RuntimeError from ClientDisconnected("gone")

    async def main() -> None:
        call = Call(app)
        call.request.disconnected()
        await call.end()
        assert (call.stream.abandoned, call.stream.failed, call.log.said) == (True, False, [])

    asyncio.run(main())


def test_an_error_behind_a_disconnect_is_a_failure() -> None:
    """A6: one that has nothing to do with it."""

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()
        await receive()
        raise ValueError("mine")

    async def main() -> None:
        call = Call(app)
        call.request.disconnected()
        await call.end()
        assert (call.stream.abandoned, call.stream.failed) == (False, True)
        assert "raised ValueError (mine)" in call.log.said[0]

    asyncio.run(main())


@pytest.mark.parametrize(
    "events",
    [
        [START, START],
        [START, part(b"", True), START],
        [START, part(b""), START],
        [START, part(b""), part(b"")],
        [part(b"")],
        [{"type": "http.response.trailers"}],
        [{"type": 1}],
        [{**START, "status": "200"}],
        [START, part("text")],  # type: ignore[arg-type]
    ],
)
def test_a_wrong_event_raises_and_goes_nowhere(events: list[dict[str, Any]]) -> None:
    """S15 A5"""
    raised: list[Exception] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for event in events[:-1]:
            await send(event)
        before = list(stream.out)
        try:
            await send(events[-1])
        except Exception as exc:
            raised.append(exc)
        assert stream.out == before

    async def main() -> None:
        await Call(app, stream).end()
        assert isinstance(raised[0], (ResponseError, TypeError))

    stream = FakeStream("/", None)
    asyncio.run(main())


# -- the end of a call


@pytest.mark.parametrize("error", [ValueError("why"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
@pytest.mark.parametrize("started", [False, True])
def test_an_exception_is_logged_and_fails_the_response(error: BaseException, started: bool) -> None:
    """A6 G20: none of them ends the loop."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        if started:
            await send(START)
            await send(part(b"x", True))
        raise error

    async def main() -> None:
        call = Call(app)
        await call.end()
        assert call.stream.failed
        (said,) = call.log.said
        assert said.startswith(f"error: w: the application raised {type(error).__name__}")
        assert ("was cut short" in said) is started

    asyncio.run(main())


def test_returning_too_early_or_too_much() -> None:
    """S17"""

    async def nothing(_scope: Any, _receive: Any, _send: Any) -> None:
        pass

    async def something(_scope: Any, _receive: Any, send: Any) -> int:
        await send(START)
        await send(part(b""))
        return 1

    async def main() -> None:
        first, second = Call(nothing), Call(something)
        await first.end()
        await second.end()
        assert (first.stream.failed, second.stream.failed) == (True, False)
        assert "returned without completing its response" in first.log.said[0]
        assert "returned int instead of None" in second.log.said[0]

    asyncio.run(main())


def test_a_disconnect_explains_an_error_only_if_there_was_one() -> None:
    """A7: raised by the application itself, it is a failure like any other."""

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ClientDisconnected("made up")

    async def main() -> None:
        call = Call(app)
        await call.end()
        assert "raised ClientDisconnected" in call.log.said[0]

    asyncio.run(main())


def group(*members: BaseException) -> BaseException:
    """Before Python 3.11 of the package that anyio uses."""
    kind: Any = getattr(builtins, "BaseExceptionGroup", None)
    if kind is None:
        kind = importlib.import_module("exceptiongroup").BaseExceptionGroup
    made: BaseException = kind("group", members)
    return made


class Listing(Exception):
    """Not a group, though it has an attribute of that name."""

    exceptions = ("time-out in shard 3",)


def chained(cause: BaseException, *, implicit: bool = False) -> BaseException:
    error = RuntimeError("wrapped")
    if implicit:
        error.__context__ = cause
    else:
        error.__cause__ = cause
    return error


GONE = ClientDisconnected("gone")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GONE, True),
        (OSError("other"), False),
        (ValueError(), False),
        (chained(GONE), True),
        (chained(chained(GONE), implicit=True), True),
        (chained(ValueError()), False),
        (group(GONE, chained(GONE)), True),
        (group(GONE, ValueError()), False),
        (chained(group(group(GONE))), True),
        (Listing(), False),
        (chained(Listing()), False),
    ],
)
def test_is_disconnect(error: BaseException, expected: bool) -> None:
    """A7: also wrapped, and in groups of nothing else."""
    assert is_disconnect(error) is expected


def test_is_disconnect_ends_where_exceptions_go_in_circles() -> None:
    one, two = ValueError(), ValueError()
    one.__context__, two.__context__ = two, one
    assert not is_disconnect(one)
    members = [ValueError(str(number)) for number in range(8)]
    ring = group(*members)
    for each in members:
        each.__context__ = ring
    assert not is_disconnect(ring)


def test_is_disconnect_has_no_longest_chain() -> None:
    """However deep the stack was that an application has wrapped its errors in."""
    error: BaseException = GONE
    for _ in range(3000):
        error = chained(error)
    assert is_disconnect(error)
    error = ValueError()
    for _ in range(3000):
        error = chained(group(GONE, error))
    assert not is_disconnect(error)


def test_failures_in_words() -> None:
    assert failure(ValueError("why"), False) == "raised ValueError (why): the client got a 500 answer"
    assert failure(ValueError(), True) == "raised ValueError: the response was cut short"
    assert failure(SystemExit(), False).endswith("it asked to end the process, but the worker goes on")
