"""`limit_requests` and the turns of streamed WSGI bodies: what is let in, what waits, what is turned away."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from apphost.interfaces.admission import SILENCE, Admission
from apphost.interfaces.wsgi import SMALL_BODY, WsgiInterface, WsgiRequest
from apphost.protocols.exchange import PIECES_MAX
from tests.corpus_driver import RecordingLog
from tests.peer import GET, OK, Peer, post


class Limited(Peer):
    """Lets one request in at a time; what the application has in progress is in `context.active`."""

    name = "limited"
    websockets = True

    def __init__(self) -> None:
        super().__init__()
        self.log = RecordingLog()
        self.context.interface = Admission(self, 1, self.context.active, self.log, "worker 1")


@pytest.fixture
def peer() -> Limited:
    return Limited()


@pytest.mark.parametrize("request_", [GET, post(3) + b"abc", post(10**6)])
def test_beyond_the_limit_the_answer_is_503(peer: Limited, request_: bytes) -> None:
    """The application hears nothing of it; the connection ends, and its other requests are for somebody else."""
    peer.context.active.add(cast(Any, "a request of another connection"))
    peer.send(request_ + GET)
    wire = peer.read()
    assert wire.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"\r\nretry-after: 1\r\n" in wire
    assert b"\r\nconnection: close\r\n" in wire
    assert wire.count(b"HTTP/1.1 ") == 1
    assert peer.requests == []
    assert not peer.open


def test_within_the_limit_nothing_is_different(peer: Limited) -> None:
    for _ in range(3):
        peer.send(GET)
        peer.last.answer()
        assert peer.read() == OK
    assert len(peer.requests) == 3


def test_an_open_websocket_that_moves_here_is_let_in(peer: Limited) -> None:
    """Its client was promised that it stays open; a new handshake is turned away."""
    peer.context.active.add(cast(Any, "a request"))
    released: list[bool] = []
    opening = SimpleNamespace(rejoins=True, release=lambda: released.append(True))
    stream: Any = SimpleNamespace(head=SimpleNamespace(upgrade=True), opening=opening, context=peer.context)
    peer.context.interface.handle(stream)
    assert [request.stream for request in peer.requests] == [stream]
    opening.rejoins = False
    sent: list[object] = []
    stream.start = lambda head: sent.append(head.status)
    stream.write = lambda data, more: sent.append(more)
    peer.context.interface.handle(stream)
    assert (sent, released, len(peer.requests)) == ([503, False], [True], 1)


def test_the_log_says_it_now_and_then(peer: Limited) -> None:
    """At once, and then how many there were since, not a line for each."""
    context = peer.context
    context.active.add(cast(Any, "a request"))
    stream: Any = SimpleNamespace(head=SimpleNamespace(upgrade=False), context=context)
    stream.start = stream.write = lambda *_: None
    for _ in range(5):
        context.interface.handle(stream)
    peer.loop.now += SILENCE
    context.interface.handle(stream)
    first, second = peer.log.complaints
    assert "with 503: 1." in first
    assert "with 503: 5." in second


# -- WSGI: threads for bodies that still arrive


class Site:
    """A WSGI interface on a pool whose threads never run by themselves."""

    def __init__(self, threads: int) -> None:
        self.jobs: list[Callable[[], None]] = []
        pool: Any = SimpleNamespace(threads=[None] * threads, submit=self.jobs.append, post=lambda job: job())
        self.interface = WsgiInterface(cast(Any, None), pool, RecordingLog(), set())

    def client(self) -> tuple[Peer, Callable[[], WsgiRequest]]:
        peer = Peer()
        peer.context.interface = self.interface
        before = set(self.interface.active)
        return peer, lambda: (self.interface.active - before).pop()


LARGE = post(10**6)


@pytest.mark.parametrize("head", [LARGE, LARGE.replace(b"Content-Length: 1000000", b"Transfer-Encoding: chunked")])
def test_a_large_body_gets_a_thread_when_there_is_enough_of_it(head: bytes) -> None:
    """G5: a client that dribbles sends that much in days."""
    site = Site(4)
    peer, _ = site.client()
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n" if b"chunked" in head else bytes(0x8000)
    peer.send(head)
    for _ in range(SMALL_BODY // 0x8000):
        peer.send(chunk)
        assert site.jobs == []
    peer.send(chunk)
    assert len(site.jobs) == 1


@pytest.mark.parametrize(("threads", "most"), [(1, 1), (2, 1), (4, 2), (5, 2)])
def test_streamed_bodies_have_half_of_the_threads(threads: int, most: int) -> None:
    """G5: others wait for their turn, in order, and may leave before it comes."""
    site = Site(threads)
    peers = [site.client()[0] for _ in range(most + 3)]
    for peer in peers:
        peer.send(LARGE + bytes(SMALL_BODY + 1))
    assert len(site.jobs) == most
    peers[most].end()  # it was the next
    assert len(site.interface.active) == most + 2
    ordinary, _ = site.client()
    ordinary.send(GET)
    assert len(site.jobs) == most + 1
    for number in (1, 2, 3):
        site.interface.uploads.end()
        assert len(site.jobs) == most + 1 + min(number, 2)


@pytest.mark.parametrize("fields", [(), ("Expect: 100-continue",)])
def test_a_body_that_is_complete_needs_no_turn(fields: tuple[str, ...]) -> None:
    """G5, G7: also one that becomes complete while it waits; those that dribble cannot hold it up."""
    site = Site(2)
    blocking, _ = site.client()
    blocking.send(LARGE + bytes(SMALL_BODY + 1))
    peer, request = site.client()
    size = SMALL_BODY + 1000
    peer.send(post(size, *fields) + bytes(SMALL_BODY + 1))
    assert len(site.jobs) == 1
    peer.send(bytes(size - SMALL_BODY - 1))
    assert len(site.jobs) == 2
    assert len(b"".join(request()._body)) == size
    assert request().input is None
    peer, _ = site.client()
    peer.send(post(3, *fields) + b"abc")
    assert len(site.jobs) == 3
    site.interface.uploads.end()
    assert len(site.jobs) == 3


def test_a_body_in_splinters_takes_no_more_than_its_bytes() -> None:
    """G5: here, and in the stream."""
    peer = Peer()
    peer.send(post(60_000))
    stream: Any = peer.last.stream
    site = Site(1)
    other, request = site.client()
    other.send(post(60_000))
    for _ in range(29_999):
        peer.send(b"ab")
        other.send(b"ab")
        assert len(stream._chunks) <= PIECES_MAX
        assert len(request()._body) <= PIECES_MAX
    assert stream.take_body() == (b"ab" * 29_999, True)
    assert b"".join(request()._body) == b"ab" * 29_999
