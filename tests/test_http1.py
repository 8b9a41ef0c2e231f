"""The phases of a connection: R5 R7 R8 R9 P6 P8 P9 P10 P11 S7 S12 S14 S16 S17 S18, A6."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from apphost.protocols.exchange import DISCARD_MAX, HIGH_WATER
from apphost.protocols.http1 import Connection
from apphost.protocols.response import ResponseHead
from apphost.protocols.strict import Limits
from tests.peer import GET, LAST_OK, OK, TIMEOUTS, FakeTransport, Peer, post


@pytest.fixture
def peer() -> Peer:
    return Peer()


# -- requests one after the other


def test_a_request_byte_by_byte(peer: Peer) -> None:
    for byte in post(3) + b"abc":
        peer.send(bytes([byte]))
    data = b""
    while not data.endswith(b"c"):
        data += peer.last.stream.take_body()[0]
    assert data == b"abc"
    assert peer.last.stream.take_body() == (b"", False)
    peer.last.answer()
    assert peer.read() == OK


def test_pipelined_requests_wait_for_their_turn(peer: Peer) -> None:
    """S14"""
    peer.send(GET + post(3) + b"abc" + GET)
    for number in range(3):
        assert len(peer.requests) == number + 1
        assert peer.read() == b""
        peer.last.answer()
        assert peer.read() == OK
        assert len(peer.requests) == number + 1  # not from within the answer: that could nest without end
        peer.loop.turn()
    assert [request.stream.head.method for request in peer.requests] == ["GET", "POST", "GET"]
    assert peer.requests[1].stream.take_body() == (b"abc", False)


def test_pipelined_requests_are_bounded(peer: Peer) -> None:
    """S14 R7: more than a window of them is left in the socket."""
    peer.send(GET)
    many = Limits().pipelined // len(GET) + 1
    peer.send(GET * many)
    assert peer.transport.paused
    for _ in range(many):
        peer.last.answer()
        peer.loop.turn()
    assert not peer.transport.paused
    assert len(peer.requests) == many + 1


@pytest.mark.parametrize("most", [0, 1, len(GET), 1000])
def test_how_much_may_wait_is_a_setting(most: int) -> None:
    """S14: 0 is one request after the other, and all of them are answered in the end."""
    peer = Peer(limits=Limits(pipelined=most))
    peer.send(GET)
    sent = 0
    while not peer.transport.paused:
        peer.send(GET)
        sent += 1
        assert (sent - 1) * len(GET) <= most
    assert sent * len(GET) > most
    for _ in range(sent):
        peer.last.answer()
        peer.loop.turn()
    assert not peer.transport.paused
    assert len(peer.requests) == sent + 1


def test_a_client_that_pipelines_and_does_not_read_waits(peer: Peer) -> None:
    """S14 A8: no answer is made while the earlier ones are not taken."""
    peer.send(GET)
    peer.connection.pause_writing()
    peer.last.answer()
    peer.send(GET + GET)
    assert len(peer.requests) == 1
    peer.connection.resume_writing()
    peer.loop.turn()
    assert len(peer.requests) == 2


@pytest.mark.parametrize("most", [0, 3, 1000])
def test_a_head_in_pieces_behind_an_unread_answer(most: int) -> None:
    """S14: what may wait of it is a setting, but its rest is read when the answer has been."""
    peer = Peer(limits=Limits(pipelined=most))
    peer.send(GET)
    peer.connection.pause_writing()
    peer.last.answer()
    peer.send(GET[:9])
    assert peer.transport.paused == (most < 9)
    peer.connection.resume_writing()
    peer.loop.turn()
    assert not peer.transport.paused
    peer.send(GET[9:])
    assert len(peer.requests) == 2


def test_nothing_is_served_after_the_last_answer(peer: Peer) -> None:
    """S12 S13"""
    peer.send(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + GET)
    peer.last.answer()
    peer.loop.turn()
    assert peer.read() == LAST_OK
    assert not peer.open
    peer.send(GET)
    assert len(peer.requests) == 1


def test_a_worker_that_closes_says_so(peer: Peer) -> None:
    """S12"""
    peer.send(GET)
    peer.context.draining = peer.context.closing = True
    peer.last.answer()
    assert peer.read() == LAST_OK
    assert not peer.open


@pytest.mark.parametrize("request_", [GET, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", post(2) + b"hi"])
@pytest.mark.parametrize("more", [False, True])
def test_without_keep_alive_every_answer_says_so(request_: bytes, more: bool) -> None:
    """S12: RFC 9112, 9.6. Also those whose like came before."""
    peer = Peer(timeouts=replace(TIMEOUTS, keep_alive=0))
    for before in range(3):
        peer.transport = FakeTransport()
        peer.connection = Connection(peer.context)
        peer.connection.connection_made(cast(asyncio.Transport, peer.transport))
        peer.send(request_ + GET)
        peer.last.answer(b"ok", more=more)
        if more:
            peer.last.answer()
        peer.loop.turn()
        wire = peer.read()
        assert b"\r\nconnection: close\r\n" in wire
        assert b"keep-alive" not in wire
        assert not peer.open
        assert len(peer.requests) == before + 1


@pytest.mark.parametrize("leading", [b"\r\n", b"\r\n\r\n", b"\r\n" * 30])
def test_leading_empty_lines(peer: Peer, leading: bytes) -> None:
    """P9: in one piece, and byte by byte."""
    peer.send(leading + GET)
    peer.last.answer()
    for byte in leading + GET:
        peer.send(bytes([byte]))
    peer.last.answer()
    assert peer.read() == OK + OK


@pytest.mark.parametrize("wire", [b"\n" + GET, b"\r" + GET, b"\r\n\n" + GET, b" \r\n" + GET])
def test_other_leading_bytes(peer: Peer, wire: bytes) -> None:
    """P9 P5"""
    peer.send(wire)
    assert peer.status() == 400


# -- bodies


def test_a_body_is_paused_and_resumed(peer: Peer) -> None:
    """R7: never much more than a window is held."""
    total, piece = 10 * HIGH_WATER, HIGH_WATER // 2
    peer.send(post(total))
    sent = taken = 0
    while taken < total:
        while sent < total and not peer.transport.paused:
            peer.send(bytes(piece))
            sent += piece
        assert sent - taken <= HIGH_WATER + piece
        data, more = peer.last.stream.take_body()
        taken += len(data)
    assert not more
    assert peer.last.stream.body_complete


@pytest.mark.parametrize(("length", "kept"), [(DISCARD_MAX, True), (DISCARD_MAX + 1, False)])
def test_how_much_of_an_unread_body_is_read_away(peer: Peer, length: int, kept: bool) -> None:
    """R8: the rest is never taken for a request."""
    peer.send(post(length))
    peer.last.answer()
    assert peer.read() == (OK if kept else LAST_OK)
    rest = GET * (length // len(GET) + 1)
    peer.send(rest[:length])
    assert len(peer.requests) == 1
    peer.send(GET)
    assert len(peer.requests) == (2 if kept else 1)


def test_an_unread_chunked_body_is_read_away_within_a_bound(peer: Peer) -> None:
    """R8"""
    peer.send(post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
    peer.last.answer()
    chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    for _ in range(DISCARD_MAX // 0x4000):
        peer.send(chunk)
        assert peer.open
    peer.send(chunk)
    assert not peer.open
    assert peer.read() == OK


def test_a_bad_chunk_of_an_unread_body_ends_the_connection(peer: Peer) -> None:
    """R8 P6"""
    peer.send(post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
    peer.last.answer()
    peer.send(b"nonsense\r\n" + GET)
    assert not peer.open
    assert peer.read() == OK
    assert len(peer.requests) == 1


def test_a_bad_chunk_is_refused(peer: Peer) -> None:
    """P6 P10: the application is told, and what it still says goes nowhere."""
    peer.send(post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n")
    peer.send(b"nonsense\r\n")
    assert peer.status() == 400
    assert peer.last.told == ["disconnected"]
    assert not peer.last.stream.connected
    peer.last.stream.fail()
    assert peer.read() == b""


def test_a_bad_chunk_right_behind_the_head_never_reaches_the_application(peer: Peer) -> None:
    """P6"""
    peer.send(post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"nonsense\r\n")
    assert peer.status() == 400
    assert peer.requests == []


def test_limits_of_bodies() -> None:
    """P8: declared, and counted."""
    declared, counted = Peer(limits=Limits(body=10)), Peer(limits=Limits(body=10))
    declared.send(post(11))
    assert declared.status() == 413
    assert declared.requests == []
    counted.send(post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"A\r\n0123456789\r\n")
    counted.send(b"1\r\n")
    assert counted.status() == 413
    assert counted.last.told == ["disconnected"]


def test_an_unanswered_expectation_ends_the_connection(peer: Peer) -> None:
    """R9: nobody can tell whether the body will come."""
    peer.send(post(4, "Expect: 100-continue"))
    peer.last.answer()
    assert peer.read() == LAST_OK
    assert not peer.open


def test_a_body_that_is_here_needs_no_continue(peer: Peer) -> None:
    """R9"""
    peer.send(post(4, "Expect: 100-continue") + b"da")
    assert peer.last.stream.take_body() == (b"da", True)
    assert peer.last.stream.take_body() == (b"", True)
    peer.send(b"ta")
    assert peer.last.stream.take_body() == (b"ta", False)
    peer.last.answer()
    assert peer.read() == OK


# -- the client's end


@pytest.mark.parametrize("before", [b"", b"G", b"\r\n", b"\r", GET[:-2]])
def test_the_end_between_requests(peer: Peer, before: bytes) -> None:
    """P11: nothing was asked for, so nothing is answered."""
    if before:
        peer.send(before)
    peer.end()
    assert peer.transport.closed
    assert peer.read() == b""


def test_the_end_while_a_request_is_answered(peer: Peer) -> None:
    """P11 R4: the application is told, and its answer still goes out."""
    peer.send(GET)
    peer.end()
    assert peer.last.told == ["disconnected"]
    assert peer.last.stream.connected
    peer.last.answer(b"o", more=True)
    peer.last.answer(b"k")
    assert peer.read().endswith(b"1\r\no\r\n1\r\nk\r\n0\r\n\r\n")
    assert peer.transport.closed
    assert not peer.transport.aborted


@pytest.mark.parametrize("rest", [b"", b"\r\n", b"\r", b"GET / HT"])
def test_the_end_behind_pipelined_requests(peer: Peer, rest: bytes) -> None:
    """P11 S14: each application is told, also one that begins after the end; then the connection is closed."""
    peer.send(GET + GET + GET + rest)
    peer.end()
    for number in range(3):
        assert len(peer.requests) == number + 1
        assert peer.last.told == ["disconnected"]
        assert not peer.transport.closed
        peer.last.answer()
        peer.loop.turn()
    assert peer.read() == OK * 3
    assert peer.transport.closed


def test_the_end_within_a_pipelined_body(peer: Peer) -> None:
    """R5 P11: that came before its request began."""
    peer.send(GET + post(9) + b"abc")
    peer.end()
    peer.last.answer()
    peer.loop.turn()
    assert len(peer.requests) == 2
    assert peer.last.told == ["disconnected"]
    assert not peer.last.stream.connected
    assert peer.transport.closed
    assert peer.read() == OK


def test_the_end_within_a_body(peer: Peer) -> None:
    """R5"""
    peer.send(post(9) + b"abc")
    peer.end()
    assert peer.transport.closed
    assert peer.last.told == ["disconnected"]
    assert not peer.last.stream.body_complete
    assert peer.read() == b""


def test_a_lost_connection(peer: Peer) -> None:
    """R5 S16: the request is told once and for all, and nothing is watched any more."""
    peer.send(GET + GET)
    peer.lose()
    peer.loop.turn()
    assert len(peer.requests) == 1
    assert peer.last.told == ["disconnected"]
    assert (peer.last.stream.connected, peer.last.stream.complete) == (False, True)
    peer.last.stream.fail()
    peer.after(3600)
    assert peer.read() == b""
    assert not peer.transport.aborted
    assert peer.context.connections == set()


def test_a_finished_request_hears_nothing_any_more(peer: Peer) -> None:
    """S18: of the requests that come after it."""
    peer.send(GET)
    first = peer.last
    first.answer()
    peer.send(post(3) + b"a")
    peer.send(b"bc")
    assert first.told == []
    assert not any(request is first for request in peer.requests[1:])
    peer.lose()
    assert first.told == []


# -- the application's failures


def test_failing_before_and_within_a_response(peer: Peer) -> None:
    """A6 S17"""
    peer.send(GET + GET)
    peer.last.answer()
    peer.loop.turn()
    peer.read()
    peer.last.stream.start(ResponseHead(200, []))
    peer.last.stream.fail()
    assert peer.status() == 500
    assert not peer.open
    other = Peer()
    other.send(GET)
    other.last.answer(b"part", more=True)
    other.last.stream.fail()
    assert other.read().endswith(b"4\r\npart\r\n")
    assert not other.open
    assert not other.transport.aborted


def test_failing_within_a_response_that_ends_with_the_connection(peer: Peer) -> None:
    """A6: only a reset can tell it from a complete one."""
    peer.send(b"GET / HTTP/1.0\r\n\r\n")
    peer.last.answer(b"part", more=True)
    peer.last.stream.fail()
    assert peer.transport.aborted


def test_failing_at_a_head_request(peer: Peer) -> None:
    """S7"""
    peer.send(GET.replace(b"GET", b"HEAD"))
    peer.last.stream.fail()
    wire = peer.read()
    assert wire.startswith(b"HTTP/1.1 500 ")
    assert wire.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("started", [False, True])
def test_abandoning_a_client_that_has_ended_its_side(peer: Peer, started: bool) -> None:
    """R4 P11: the connection ends, not like a whole answer, and nobody's failure is counted."""
    peer.send(GET)
    peer.connection.eof_received()
    assert peer.last.told == ["disconnected"]
    if started:
        peer.last.answer(b"part", more=True)
    peer.last.stream.abandon()
    assert peer.read().endswith(b"4\r\npart\r\n" if started else b"")
    assert (peer.open, peer.context.errors, peer.context.requests) == (False, 0, 1)
    peer.last.stream.abandon()
    peer.last.stream.fail()
    assert (peer.context.errors, peer.context.requests) == (0, 1)


@pytest.mark.parametrize(
    ("method", "wire"),
    [
        ("HEAD", b" / HTTP/1.1\r\n\r\n"),
        ("HEAD", b" / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n"),
        ("HEAD", b" / HTTP/1.1\r\nHost : a\r\n\r\n"),
        ("HEAD", b" / HTTP/1.1\r\nHost: a\n"),
        ("HEAD", b" / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"ZZ\r\n"),
        ("HEAD", b" / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("HEAD", b" / HTTP/1.1\r\nHost: a\r\n"),
        ("HEADS", b" / HTTP/1.1\r\n\r\n"),
        ("GET", b" / HTTP/1.1\r\n\r\n"),
    ],
)
def test_refusals_of_head_requests_have_no_body(peer: Peer, method: str, wire: bytes) -> None:
    """S7: RFC 9110, 9.3.2. At once, at a bad chunk, and when time is up."""
    peer.send(b"\r\n" + method.encode() + wire)
    if peer.requests:
        peer.send(b"nonsense\r\n")
    peer.after(TIMEOUTS.request_header + 1)
    head, end, body = peer.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4")
    assert b"\r\ncontent-length: " in head
    assert (bool(end), bool(body)) == (True, method != "HEAD")


def test_the_count_of_requests_calls_for_a_successor(peer: Peer) -> None:
    """S12: failures count, refusals do not."""
    calls: list[int] = []
    peer.context.requests_wanted = 2
    peer.context.on_enough = lambda: calls.append(peer.context.requests)
    peer.send(GET)
    peer.last.answer()
    assert calls == []
    peer.send(GET)
    peer.last.stream.fail()
    assert calls == [2]
