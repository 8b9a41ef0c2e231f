"""What a worker tells of itself when the arbiter asks: its connections, its stacks; and its oldest request, in beats.

Nothing is counted on the request path for this. Bytes come from the kernel; when a request began is noted at the
worker's tick, half a second late at most, unless the access log has noted it already.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from types import CodeType, FrameType
from typing import Any

from apphost.lifecycle import Policy
from apphost.logs import escape
from apphost.messages import Channel, Message
from apphost.protocols.context import Context
from apphost.protocols.exchange import Exchange
from apphost.protocols.http1 import Connection
from apphost.protocols.kernel import byte_counts
from apphost.protocols.wire import Phase
from apphost.worker import fingerprint

# A message has at most 1 MiB, and making it takes the event loop's time: 1000 connections are some 250 KiB and 10 ms.
CONNECTIONS_MAX = 1000
TASKS_MAX = 200
FRAMES_MAX = 50  # of a stack, the innermost
STACKS_MAX = 1 << 19  # bytes of JSON
LINE_MAX = 200  # characters
PATH_MAX = 200  # characters of a request path
METHOD_MAX = 20  # characters of a method; the longest registered one has 17, and a client may send thousands
LOOK_MAX = 1024  # requests in progress that a tick looks at, some 0.2 ms


def describe(exchange: Exchange) -> str:
    """`GET /path`, without the query, which may hold secrets."""
    head = exchange.head
    path = head.raw_path.decode("ascii", "backslashreplace")
    return escape(f"{_cut(head.method, METHOD_MAX)} {_cut(path, PATH_MAX)}")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."


class Oldest:
    """Finds the request that has taken longest among those in progress, and notes when each began.

    Idle connections cost nothing here. Of very many requests and WebSockets each look takes up a part, so the answer
    is some seconds late then.
    """

    def __init__(self) -> None:
        self._left: list[Any] = []  # handlers that this round has not come to
        self._found: Exchange | None = None  # the oldest of this round
        self._known: Exchange | None = None  # the oldest of the round before

    def look(self, active: Collection[Any]) -> list[Any] | None:
        """[s in progress, which]. Called at every tick with the handlers of all requests in progress."""
        now = time.perf_counter()
        if not self._left:
            self._left = list(active)
        for handler in self._left[-LOOK_MAX:]:
            exchange = getattr(handler, "stream", None)  # an interface of others may keep its stream elsewhere
            if not isinstance(exchange, Exchange) or exchange.complete:
                continue
            if not exchange.started_at:
                exchange.started_at = now
            if self._found is None or self._found.complete or exchange.started_at < self._found.started_at:
                self._found = exchange
        del self._left[-LOOK_MAX:]
        if not self._left:
            self._known, self._found = self._found, None
        known = self._known
        if known is None or known.complete:
            return None
        return [round(now - known.started_at, 3), describe(known)]


class Inquiry:
    """Answers the arbiter. Event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: Channel, context: Context) -> None:
        self._loop = loop
        self._channel = channel
        self._context = context
        self._answers: dict[str, Callable[[], Message]] = {"connections": self._connections, "stacks": self._stacks}

    def answer(self, message: Message) -> None:
        """Obey `ask`: id, what."""
        what = str(message.get("what"))
        make = self._answers.get(what)
        answer = make() if make is not None else {"error": f"this version knows nothing of {what}"}
        told = {"t": "answer", "id": message.get("id")}
        if not self._channel.send({**told, **answer}):
            self._channel.send({**told, "error": "the answer is too large for a message"})

    def tell_code(self, app: str, known: Message | None) -> None:
        """Tell the arbiter what code this is; when it is not known, find out beside the event loop."""
        if known is not None:
            self._channel.send({"t": "code", "facts": known})
            return

        def find_out() -> None:
            facts = fingerprint.here(app)
            try:
                self._loop.call_soon_threadsafe(self._channel.send, {"t": "code", "facts": facts})
            except RuntimeError:
                pass  # the loop is closed: the worker ends

        threading.Thread(target=find_out, name="apphost-fingerprint", daemon=True).start()

    # -- connections

    def _connections(self) -> Message:
        """The busy ones first, each kind by age."""
        now = self._loop.time()
        ordered = sorted(self._context.connections, key=lambda each: (each.exchange is None, each.made_at))
        rows = [describe_connection(connection, now) for connection in ordered[:CONNECTIONS_MAX]]
        return {"connections": rows, "left_out": max(0, len(ordered) - CONNECTIONS_MAX)}

    # -- stacks

    def _stacks(self) -> Message:
        lines: list[str] = []
        left = STACKS_MAX
        for line in itertools.chain(thread_stacks(), task_stacks(self._loop)):
            lines.append(escape(line[:LINE_MAX]))
            left -= len(json.dumps(lines[-1])) + 1
            if left < 0:
                lines.append("(more was left out)")
                break
        return {"stacks": lines}


def describe_connection(connection: Connection, now: float) -> dict[str, Any]:
    """peer, protocol, state, age (s, in this worker), requests, request, received and sent (bytes, None: the system
    does not tell), movable, and why it is not."""
    websocket = connection.websocket
    exchange = connection.exchange
    received, sent = byte_counts(connection.transport.get_extra_info("socket")) or (None, None)
    why = _stays(connection)
    protocol = "websocket" if websocket is not None else "http/1.1"
    row: dict[str, Any] = {"peer": escape(connection.peer), "protocol": protocol, "state": connection.phase.value}
    row |= {"age": round(now - connection.made_at, 3), "requests": connection.requests}
    if exchange is not None:
        row["request"] = describe(exchange)
    elif websocket is not None:
        row["request"] = escape(f"WebSocket {websocket.head.raw_path.decode('ascii', 'backslashreplace')[:PATH_MAX]}")
    row |= {"received": received, "sent": sent, "movable": not why}
    if why:
        row["why"] = why
    return row


def _stays(connection: Connection) -> str:
    """Why it would not move in a reload at this moment, empty if it would."""
    if connection.fixed:
        return "TLS"
    if connection.websocket is not None:
        return "its path says close" if connection.websocket.policy is Policy.CLOSE else ""
    if connection.phase in (Phase.BUSY, Phase.DISCARDING):
        return "after its answer"
    if connection.phase in (Phase.LINGERING, Phase.CLOSED):
        return "it ends"
    if connection.eof:
        return "the client has ended its side"
    if connection.write_paused or connection.transport.get_write_buffer_size():
        return "the client does not read its answer"
    return ""


# -- stacks


def thread_stacks() -> Iterable[str]:
    """All threads, ours included: a line of what it is, then its frames, innermost last.

    Those that are at the same place, as a pool that waits for work, are told together, and after the others.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    alike: dict[tuple[str, ...], list[str]] = {}
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            alike.setdefault(tuple(_frames(frame)), []).append(str(names.get(ident, ident)))
    for frames, which in sorted(alike.items(), key=lambda item: len(item[1])):
        yield f"thread {which[0]}:" if len(which) == 1 else f"{len(which)} threads, {', '.join(sorted(which))}:"
        yield from frames
    own = threading.current_thread().name
    yield f"thread {own}: runs the event loop, which has just answered; see the tasks"


def _frames(frame: FrameType | None) -> list[str]:
    """Innermost last, without those of `threading` that every thread begins with."""
    places: list[tuple[CodeType, int]] = []
    while frame is not None and len(places) < FRAMES_MAX:
        places.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    while len(places) > 1 and places[-1][0].co_filename == threading.__file__:
        places.pop()
    return [_place(code, line) for code, line in reversed(places)]


def _place(code: CodeType, line: int) -> str:
    return f'  File "{code.co_filename}", line {line}, in {code.co_name}'


def task_stacks(loop: asyncio.AbstractEventLoop) -> Iterable[str]:
    """All tasks of the loop: name and coroutine, then the frames of what it awaits, innermost last."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    for task in tasks[:TASKS_MAX]:
        coroutine = task.get_coro()
        yield f"task {task.get_name()} {getattr(coroutine, '__qualname__', type(coroutine).__name__)}:"
        yield from _awaited(coroutine)
    if len(tasks) > TASKS_MAX:
        yield f"({len(tasks) - TASKS_MAX} more tasks were left out)"


def _awaited(awaitable: Any) -> list[str]:
    """The chain of coroutines and generators, from the outermost to what it waits for."""
    lines: list[str] = []
    while awaitable is not None and len(lines) < FRAMES_MAX:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaitable, f"{kind}_frame", None)
            if frame is not None:
                lines.append(_place(frame.f_code, frame.f_lineno))
                awaitable = getattr(awaitable, f"{kind}_await" if kind != "gi" else "gi_yieldfrom", None)
                break
        else:
            break
    return lines
