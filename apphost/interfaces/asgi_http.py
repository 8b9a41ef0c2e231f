"""One request as a call of an ASGI application: its scope, receive and send. Spec version 2.5."""

from __future__ import annotations

import asyncio
import builtins
import sys
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from apphost.errors import user_traceback
from apphost.logs import show_target
from apphost.protocols.base import ClientDisconnected, ResponseError, Stream
from apphost.protocols.response import ResponseHead
from apphost.protocols.strict import decode_path

if TYPE_CHECKING:
    from apphost.interfaces.asgi import AsgiInterface

SPEC_VERSION = "2.5"
MESSAGE_MAX = 1000  # characters of what an exception says, in one line of the log; its traceback has more

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Coroutine[Any, Any, Any]]

_TASK_NAME = "request"  # without a name asyncio makes one up, which takes 0.2 us

# From 3.12 on a task can take its first step at once; most applications answer in that step and never meet the loop.
if sys.version_info >= (3, 12):

    def _start(coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
        return asyncio.Task(coroutine, loop=loop, name=_TASK_NAME, eager_start=True)

else:

    def _start(coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
        return asyncio.Task(coroutine, loop=loop, name=_TASK_NAME)


class AsgiRequest:
    """One call of the application: a `Handler` to the stream, `receive` and `send` to the application."""

    __slots__ = ("body_done", "gone", "interface", "started", "stream", "task", "wakeup")

    def __init__(self, interface: AsgiInterface, stream: Stream) -> None:
        self.interface = interface
        self.stream = stream
        self.body_done = False  # the application has had the whole body
        self.gone = False  # the client has ended its side
        self.started = False  # the application has given a good http.response.start
        self.wakeup: asyncio.Event | None = None  # made when somebody must wait, for body, writability or the end
        interface.active.add(self)
        self.task = _start(self.run(), interface.loop)

    # -- Handler

    def body_arrived(self) -> None:
        self._wake()

    def disconnected(self) -> None:
        self.gone = True
        self._wake()

    def write_resumed(self) -> None:
        self._wake()

    def describe(self) -> str:
        head = self.stream.head
        return f"{head.method} {show_target(head.target)}"

    def _wake(self) -> None:
        wakeup = self.wakeup
        if wakeup is not None:
            # All who wait now look again; who waits later waits for the next time.
            wakeup.set()
            wakeup.clear()

    async def _wait(self) -> None:
        if self.wakeup is None:
            self.wakeup = asyncio.Event()
        await self.wakeup.wait()

    # -- the application's side

    async def run(self) -> None:
        """Call the application and see to it that the response comes to an end, a good one or a visible bad one."""
        interface = self.interface
        try:
            result = await interface.app(self.scope(), self.receive, self.send)
        except asyncio.CancelledError as exc:
            self._end(False)
            if self._is_cancelled():
                raise
            self._report(exc)  # one of the application's own: to us it is an error like any other
        except BaseException as exc:
            excused = False
            try:
                excused = self._over() and is_disconnect(exc)
                if not excused:
                    self._report(exc)
            finally:  # the client is answered whatever becomes of the report
                self._end(excused)
        else:
            if result is not None:
                self._say(f"returned {type(result).__name__} instead of None, which is ignored")
            self._returned()
        finally:
            interface.active.discard(self)

    def scope(self) -> dict[str, Any]:
        return http_scope(self.stream, self.interface.root_path, self.interface.state)

    def _returned(self) -> None:
        if not self.stream.complete:
            if self.stream.connected and not self.gone:
                self._say("returned without completing its response")
            self._end(self.gone)

    def _end(self, excused: bool) -> None:
        """There is no more to come of the application. `excused`: because there is no more client."""
        if excused:
            self.stream.abandon()
        else:
            self.stream.fail()
        self._wake()  # a task that the application has left behind may wait in `receive`

    def _over(self) -> bool:
        """Whether `send` raises `ClientDisconnected` by now, so that it may come back."""
        return self.gone or self.stream.complete or not self.stream.connected

    def _is_cancelled(self) -> bool:
        """Whether this task itself was cancelled, by the end of the worker (before Python 3.11 it cannot be told)."""
        task = asyncio.current_task()
        return task is None or not hasattr(task, "cancelling") or task.cancelling() > 0

    async def receive(self) -> Event:
        """The next event: `http.request` until the body is complete, `http.disconnect` from the end on."""
        stream = self.stream
        while not self.body_done and not stream.complete:
            data, more = stream.take_body()
            if data or not more:
                self.body_done = not more
                return {"type": "http.request", "body": data, "more_body": more}
            if self.gone:
                break
            await self._wait()
        while not self.gone and not stream.complete:
            await self._wait()
        return {"type": "http.disconnect"}

    async def send(self, event: Event) -> None:
        """Take an event of the application.

        Raises `ClientDisconnected` (an OSError) when the client is gone, `ResponseError`, `ValueError` or `TypeError`
        when the event breaks the rules; it has put nothing on the wire then.
        """
        kind = event["type"]
        stream = self.stream
        if kind == "http.response.body":
            body = event.get("body", b"")
            if type(body) is not bytes:
                body = as_bytes(body)
            more = bool(event.get("more_body", False))
            if self.gone and not stream.connected:
                raise ClientDisconnected("the client has closed the connection")
            stream.write(body, more)
            if not more:
                self._wake()
            elif not stream.connected:  # else one that only sends would never hear of it
                self.gone = True
                raise ClientDisconnected("the client has closed the connection")
            elif not stream.writable:
                await self._drained()
        elif kind == "http.response.start":
            if self.gone and not stream.connected:
                raise ClientDisconnected("the client has closed the connection")
            if self.started:
                raise ResponseError("http.response.start was sent twice")
            stream.start(ResponseHead(event["status"], event.get("headers", ())))
            self.started = True
        else:
            raise ResponseError(f"unknown event type {kind!r}; http.response.start or http.response.body was expected")

    async def _drained(self) -> None:
        """Until the client has read enough of what was written: the back-pressure of `send`."""
        stream = self.stream
        while not stream.writable and stream.connected and not stream.complete:
            await self._wait()

    # -- log

    def _report(self, exc: BaseException) -> None:
        self._say(self._failure(exc), user_traceback(exc))

    def _failure(self, exc: BaseException) -> str:
        return failure(exc, self.stream.started)

    def _say(self, what: str, detail: str = "") -> None:
        self.interface.log.error(f"{self.interface.worker}: the application {what}, in {self.describe()}", detail)


# To copy a dict and replace its values takes half the time of building one.
_ASGI = {"version": "3.0", "spec_version": SPEC_VERSION}
_SCOPE: dict[str, Any] = dict.fromkeys(
    ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
     "client", "server", "extensions")
)  # fmt: skip
_SCOPE["type"] = "http"


def http_scope(stream: Stream, root_path: str, state: dict[str, Any] | None) -> dict[str, Any]:
    """The scope of one request; nothing in it is shared with another request but the objects inside `state`."""
    head = stream.head
    raw_path = head.raw_path
    path = raw_path.decode("ascii")
    if "%" in path:
        path = decode_path(raw_path)
    if root_path and raw_path != b"*":
        path, raw_path = add_root_path(root_path, path, raw_path)
    scope = _SCOPE.copy()
    scope["asgi"] = _ASGI.copy()
    scope["http_version"] = head.version
    scope["method"] = head.method
    scope["scheme"] = stream.scheme
    scope["path"] = path
    scope["raw_path"] = raw_path
    scope["query_string"] = head.query
    scope["root_path"] = root_path
    scope["headers"] = head.headers.copy()  # other requests may share them
    scope["client"] = stream.client
    scope["server"] = stream.server
    scope["extensions"] = stream.extensions()
    if state is not None:
        scope["state"] = state.copy()
    return scope


def add_root_path(root_path: str, path: str, raw_path: bytes) -> tuple[str, bytes]:
    """`path` and `raw_path` with the root path in front, as the spec wants them.

    A proxy may have stripped the prefix or left it; a path that begins with it is taken as it is.
    """
    if path == root_path or path.startswith(root_path + "/"):
        return path, raw_path
    return root_path + path, _quoted(root_path) + raw_path


@lru_cache(maxsize=64)  # proxies tell some
def _quoted(root_path: str) -> bytes:
    return quote(root_path, safe="/!$&'()*+,;=:@").encode("ascii")  # RFC 3986, 3.3: what a path holds as it is


def failure(exc: BaseException, started: bool) -> str:
    """What an exception out of the application meant for the client, in a few words for the log."""
    return raised(exc, "the response was cut short" if started else "the client got a 500 answer")


def raised(exc: BaseException, outcome: str) -> str:
    """That `exc` was raised, and the `outcome`, in a few words for the log."""
    try:
        said = str(exc)[:MESSAGE_MAX]
    except BaseException:  # it is user code
        said = ""  # the traceback says so
    exits = "" if isinstance(exc, Exception) else "; it asked to end the process, but the worker goes on"
    return f"raised {type(exc).__name__}{f' ({said})' if said else ''}: {outcome}{exits}"


def is_disconnect(exc: BaseException) -> bool:
    """Whether `exc` is the `ClientDisconnected` that the application was given, or was raised because of it; of a group
    all members must be. Chains may be long, and may lead back to where they came from."""
    waiting: list[BaseException | None] = [exc]
    seen: set[int] = set()
    while waiting:
        link = waiting.pop()
        while not isinstance(link, ClientDisconnected):
            if link is None or id(link) in seen:
                return False
            seen.add(id(link))
            members = _members(link)
            if members:
                waiting += members
                break
            link = link.__cause__ or link.__context__
    return True


def _members(exc: BaseException) -> tuple[BaseException, ...]:
    """Of an exception group, which before Python 3.11 is that of the package of this name; else none."""
    kind: Any = getattr(builtins, "BaseExceptionGroup", None)
    if kind is None:
        kind = getattr(sys.modules.get("exceptiongroup"), "BaseExceptionGroup", ())
    return exc.exceptions if isinstance(exc, kind) else ()


def as_bytes(data: object) -> bytes:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise TypeError(f"bytes were expected, not {type(data).__name__}")
