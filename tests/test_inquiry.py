"""What a worker tells of itself: bounded, and without what may be secret."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from apphost.messages import MAX_MESSAGE, Channel
from apphost.protocols.exchange import Exchange, Progress
from apphost.protocols.wire import Phase
from apphost.worker import inquiry
from apphost.worker.inquiry import (
    CONNECTIONS_MAX,
    LOOK_MAX,
    METHOD_MAX,
    PATH_MAX,
    Inquiry,
    Oldest,
    describe,
    task_stacks,
    thread_stacks,
)
from tests.rawhttp import DEADLINE
from tests.support import wait_for


def exchange(path: bytes = b"/", started_at: float = 0.0, method: str = "GET") -> Any:
    return SimpleNamespace(head=SimpleNamespace(method=method, raw_path=path, query=b"secret=1"), started_at=started_at)


class Transport:
    def get_extra_info(self, _name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 0


def connection(request: Any = None, made_at: float = 0.0, **changes: Any) -> Any:
    fields = {
        "exchange": request, "websocket": None, "made_at": made_at, "requests": 1, "peer": "127.0.0.1:5",
        "phase": Phase.WAITING if request is None else Phase.BUSY, "transport": Transport(), "eof": False,
        "write_paused": False, "fixed": False, **changes,
    }  # fmt: skip
    return SimpleNamespace(**fields)


def answers(connections: list[Any], *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What an `Inquiry` says to each message."""
    ours, theirs = socket.socketpair()
    loop = SimpleNamespace(time=lambda: 10.0)
    theirs.setblocking(False)
    channel, arbiter = Channel(ours), Channel(theirs)
    try:
        told = []
        asked = Inquiry(loop, channel, SimpleNamespace(connections=connections))  # type: ignore[arg-type]
        for message in messages:
            asked.answer(message)
            while not (found := arbiter.receive() or []):
                channel.flush()
            told += [each for each, _ in found]
        return told
    finally:
        channel.close()
        arbiter.close()


def handler(path: bytes, started_at: float = 0.0, complete: bool = False) -> Any:
    """One whose stream is a real exchange, in progress or not."""
    stream = Exchange.__new__(Exchange)
    stream.head = exchange(path).head
    stream.started_at = started_at
    stream.progress = Progress.DONE if complete else Progress.NONE
    return SimpleNamespace(stream=stream)


def test_the_oldest_request_is_known_without_its_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiry.time, "perf_counter", lambda: 50.0)
    fresh, old = handler(b"/new"), handler(b"/old", 40.0)
    done = handler(b"/done", 10.0, complete=True)
    look = Oldest().look
    assert look({id(each): each for each in (done, fresh, old)}.values()) == [10.0, "GET /old"]
    assert fresh.stream.started_at == 50.0, "noted at the first look, for the next ones"
    assert look([fresh]) == [0.0, "GET /new"]
    assert look([done, SimpleNamespace()]) is None, "a handler of others need not have a stream"
    assert look([]) is None


def test_of_very_many_requests_each_look_takes_up_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """S10: no tick looks at thousands; after some ticks the oldest is known, and stays so while it goes on."""
    monkeypatch.setattr(inquiry.time, "perf_counter", lambda: 50.0)
    handlers = [handler(b"/old", 1.0), *(handler(b"/new") for _ in range(5 * LOOK_MAX))]
    oldest = Oldest()
    noted = 0
    for ticks in range(1, 7):
        found = oldest.look(handlers)
        before, noted = noted, sum(each.stream.started_at > 1.0 for each in handlers)
        assert noted - before <= LOOK_MAX
        assert found == ([49.0, "GET /old"] if ticks == 6 else None)
    assert oldest.look(handlers) == [49.0, "GET /old"]
    handlers[0].stream.become_websocket()
    assert oldest.look(handlers) is None


def test_long_paths_are_cut() -> None:
    assert len(describe(exchange(b"/" + b"x" * 9000))) == PATH_MAX + len("GET ...")


def test_long_methods_are_cut() -> None:
    """Any token is a method: some hundred clients could make the answer larger than a message."""
    assert describe(exchange(b"/", method="M" * 8000)) == "M" * METHOD_MAX + "... /"


def test_an_answer_that_fits_no_message_is_an_error_and_not_silence() -> None:
    rows = [connection(peer="x" * MAX_MESSAGE)]
    (answer,) = answers(rows, {"id": 4, "what": "connections"})
    assert answer == {"t": "answer", "id": 4, "error": "the answer is too large for a message"}


def test_connections_are_told_the_busy_ones_first() -> None:
    rows = [connection(made_at=1.0), connection(exchange(b"/a"), made_at=5.0), connection(exchange(b"/b"), made_at=2.0)]
    (answer,) = answers(rows, {"id": 7, "what": "connections"})
    assert (answer["t"], answer["id"], answer["left_out"]) == ("answer", 7, 0)
    assert [row.get("request") for row in answer["connections"]] == ["GET /b", "GET /a", None]
    assert [row["age"] for row in answer["connections"]] == [8.0, 5.0, 9.0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"phase": Phase.HEAD}, None),
        ({"phase": Phase.BUSY}, "after its answer"),
        ({"phase": Phase.LINGERING}, "it ends"),
        ({"fixed": True}, "TLS"),
        ({"eof": True}, "the client has ended its side"),
        ({"write_paused": True}, "the client does not read its answer"),
    ],
)
def test_why_a_connection_stays(changes: dict[str, Any], why: str | None) -> None:
    (answer,) = answers([connection(**changes)], {"id": 1, "what": "connections"})
    (row,) = answer["connections"]
    assert (row["movable"], row.get("why")) == (why is None, why)


def test_what_this_version_does_not_know() -> None:
    (answer,) = answers([], {"id": 1, "what": "dreams"})
    assert answer == {"t": "answer", "id": 1, "error": "this version knows nothing of dreams"}


def test_the_largest_answers_fit_into_a_message() -> None:
    many = [
        connection(exchange(b"/" + b"\xff" * 500, method="M" * 8000), peer="[" + "f" * 39 + "]:65535")
        for _ in range(3000)
    ]
    asked = Inquiry(SimpleNamespace(time=lambda: 1e9), None, SimpleNamespace(connections=many))  # type: ignore[arg-type]
    answer = asked._connections()
    assert (len(answer["connections"]), answer["left_out"]) == (CONNECTIONS_MAX, 2000)
    assert len(json.dumps(answer)) < MAX_MESSAGE


def test_stacks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiry, "thread_stacks", lambda: iter(["\U0001f600" * 500 + "\x1b"] * 10**6))
    answer = Inquiry(None, None, None)._stacks()  # type: ignore[arg-type]
    assert answer["stacks"][-1] == "(more was left out)"
    assert len(json.dumps(answer)) < MAX_MESSAGE


def test_stacks_of_threads() -> None:
    """Whoever is busy comes first; a pool that waits is one stack."""
    ready, done = threading.Barrier(4), threading.Event()

    def waits_here() -> None:
        ready.wait(DEADLINE)
        done.wait(DEADLINE)

    def is_busy() -> None:
        ready.wait(DEADLINE)
        while not done.is_set():
            time.sleep(0.001)

    threads = [threading.Thread(target=waits_here, name=f"pool-{number}") for number in (2, 1)]
    threads.append(threading.Thread(target=is_busy, name="busy"))
    for thread in threads:
        thread.start()
    try:
        ready.wait(DEADLINE)
        assert wait_for(lambda: "2 threads, pool-1, pool-2:" in thread_stacks())
        lines = list(thread_stacks())
    finally:
        done.set()
        for thread in threads:
            thread.join()
    busy, pool = lines.index("thread busy:"), lines.index("2 threads, pool-1, pool-2:")
    assert busy < pool
    assert lines[busy + 1].endswith("in is_busy"), "the frames that start a thread tell nothing"
    assert lines[pool + 1].endswith("in waits_here")
    assert any("runs the event loop" in line for line in lines)


def test_stacks_of_tasks() -> None:
    async def inner() -> None:
        await asyncio.sleep(10)

    async def outer() -> None:
        await inner()

    async def main() -> list[str]:
        task = asyncio.get_running_loop().create_task(outer(), name="the-task")
        await asyncio.sleep(0)
        lines = list(task_stacks(asyncio.get_running_loop()))
        task.cancel()
        return lines

    lines = asyncio.run(main())
    at = next(n for n, line in enumerate(lines) if line.startswith("task the-task test_stacks_of_tasks"))
    assert [line.rpartition(" ")[2] for line in lines[at + 1 : at + 4]] == ["outer", "inner", "sleep"]


def test_code_that_is_known_is_told_at_once() -> None:
    """With `preload` the fork server has found out: looking at all modules would make copies of their memory."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    channel, arbiter = Channel(ours), Channel(theirs)
    try:
        threads = threading.active_count()
        Inquiry(SimpleNamespace(), channel, SimpleNamespace()).tell_code("app", {"hash": "x"})  # type: ignore[arg-type]
        assert arbiter.receive() == [({"t": "code", "facts": {"hash": "x"}}, [])]
        assert threading.active_count() == threads
    finally:
        channel.close()
        arbiter.close()
