"""The time-outs of a connection, phase by phase: R7 R8 R9 P9 P10 P12 S13 S16."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from apphost.protocols.deadlines import RESOLUTION
from apphost.protocols.exchange import HIGH_WATER, Exchange
from apphost.protocols.kernel import taken
from apphost.protocols.strict import Limits
from apphost.protocols.wire import LOOK
from tests.peer import GET, OK, TIMEOUTS, Peer, post
from tests.support import linux


@pytest.fixture
def peer() -> Peer:
    return Peer()


RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close resets


@contextlib.contextmanager
def real_sockets(family: socket.AddressFamily) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server's end and the client's."""
    if family == socket.AF_UNIX:
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def fill(sock: socket.socket) -> None:
    """Until the kernel takes no more."""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))


def read_a_little(ours: socket.socket, theirs: socket.socket) -> None:
    """So that the other side hears of it: the kernels do not tell each other of every byte."""
    before = taken(ours)
    while taken(ours) == before:
        assert theirs.recv(4096)


def test_a_silent_connection_is_closed(peer: Peer) -> None:
    peer.nearly(TIMEOUTS.request_header)
    assert peer.open
    peer.past()
    assert peer.transport.closed
    assert peer.read() == b""  # nothing was asked, so nothing is answered


@pytest.mark.parametrize("beginning", [b"G", b"GET / HTTP/1.1\r\nHost: a\r\n", GET[:-1], b"\r\nGET /"])
def test_a_slow_head_is_answered_408(peer: Peer, beginning: bytes) -> None:
    """P10: and bytes that trickle in do not prolong it."""
    peer.after(3)
    peer.send(beginning)
    peer.after(6)
    if beginning[-1:] != b"\r":
        peer.send(b"X")
    peer.nearly(TIMEOUTS.request_header - 6)
    assert peer.open
    peer.past()
    assert peer.status() == 408
    assert not peer.open


def test_empty_lines_do_not_prolong_the_wait(peer: Peer) -> None:
    """P9"""
    for _ in range(9):
        peer.send(b"\r\n")
        peer.after(1)
    assert peer.open
    peer.after(1 + RESOLUTION)
    assert peer.transport.closed


@pytest.mark.parametrize("pieces", [(b"\r",), (b"\r", b"\n"), (b"\r\n\r", b"\n", b"\r")])
def test_empty_lines_in_pieces_are_no_request(peer: Peer, pieces: tuple[bytes, ...]) -> None:
    """P9 S13: so the idle time ends without an answer, and is as long as it would be without them."""
    peer.send(GET)
    peer.last.answer()
    peer.read()
    for piece in pieces:
        peer.after(1)
        peer.send(piece)
    peer.nearly(TIMEOUTS.keep_alive - len(pieces))
    assert peer.open
    peer.past()
    assert peer.transport.closed
    assert peer.read() == b""


@pytest.mark.parametrize("ends", [Peer.end, lambda peer: peer.connection.close_idle()])
def test_half_an_empty_line_holds_nothing_up(peer: Peer, ends: Callable[[Peer], None]) -> None:
    """P9 P11 S12"""
    peer.send(b"\r")
    ends(peer)
    assert peer.transport.closed
    assert peer.read() == b""


def test_an_idle_connection_is_closed_after_keep_alive(peer: Peer) -> None:
    """S13: silently, however many requests it has served."""
    for _ in range(3):
        peer.send(GET)
        peer.last.answer()
        assert peer.read() == OK
        peer.nearly(TIMEOUTS.keep_alive)
        assert peer.open
    peer.past()
    assert peer.transport.closed
    assert peer.read() == b""


def test_the_head_after_an_idle_time_has_its_own_time(peer: Peer) -> None:
    peer.send(GET)
    peer.last.answer()
    peer.read()
    peer.after(39)
    peer.send(b"GET")
    peer.nearly(TIMEOUTS.request_header)
    assert peer.open
    peer.past()
    assert peer.status() == 408


def test_an_idle_time_does_not_end_the_request_after_it(peer: Peer) -> None:
    """S13, uvicorn#824: the time that was set while it waited is not the request's."""
    for _ in range(2):
        peer.send(GET)
        peer.after(TIMEOUTS.keep_alive + 1)
        assert peer.open
        peer.last.answer()
        assert peer.read() == OK
        peer.nearly(TIMEOUTS.keep_alive)


def test_a_request_may_take_any_time(peer: Peer) -> None:
    peer.send(GET)
    peer.after(3600)
    peer.last.answer(b"o", more=True)
    peer.after(3600)
    peer.last.answer(b"k")
    assert peer.open
    assert peer.last.told == []


@pytest.mark.parametrize("framing", ["Content-Length: 9\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n9\r\nabc"])
def test_a_body_that_stalls_is_answered_408(peer: Peer, framing: str) -> None:
    """P10: each byte gives it new time; the application is told, and its answer is not wanted any more."""
    peer.send(f"POST / HTTP/1.1\r\nHost: a\r\n{framing}".encode())
    for _ in range(3):
        peer.nearly(TIMEOUTS.request_body)
        peer.send(b"x")
    peer.nearly(TIMEOUTS.request_body)
    assert peer.open
    peer.past()
    assert peer.status() == 408
    assert not peer.open
    assert peer.last.told == ["body", "body", "body", "disconnected"]
    assert not peer.last.stream.connected
    assert peer.last.stream.complete


def test_asking_for_a_body_does_not_prolong_its_time(peer: Peer) -> None:
    """P10: only bytes do, whatever the application does while it waits for them."""
    peer.send(post(9) + b"abc")
    for _ in range(int(TIMEOUTS.request_body)):
        peer.last.stream.take_body()
        assert peer.open
        peer.after(1)
    peer.after(RESOLUTION)
    assert peer.status() == 408


def test_a_body_that_stalls_within_the_response_ends_it(peer: Peer) -> None:
    """A6: there can be no second answer."""
    peer.send(post(9) + b"abc")
    peer.last.answer(b"part", more=True)
    peer.after(TIMEOUTS.request_body + RESOLUTION)
    assert peer.read().endswith(b"\r\n\r\n4\r\npart\r\n")
    assert not peer.open
    assert peer.last.told == ["disconnected"]


def test_a_client_that_waits_for_continue_does_not_stall(peer: Peer) -> None:
    """R9: from the moment on that the body was asked for it may."""
    peer.send(post(9, "Expect: 100-continue"))
    peer.after(3600)
    assert peer.read() == b""
    assert peer.last.stream.take_body() == (b"", True)
    assert peer.last.stream.take_body() == (b"", True)
    assert peer.read() == b"HTTP/1.1 100 Continue\r\n\r\n"
    peer.nearly(TIMEOUTS.request_body)
    assert peer.open
    peer.past()
    assert peer.status() == 408


def test_a_body_that_was_not_asked_for_does_not_stall(peer: Peer) -> None:
    """R9: RFC 9110, 10.1.1: with the final status before it the client may keep its body, whoever still waits for it.
    If it comes, it comes under the usual rule."""
    peer.send(post(9, "Expect: 100-continue"))
    peer.last.answer(b"first", more=True)
    assert peer.last.stream.take_body() == (b"", True)
    peer.after(3600)
    peer.last.answer(b"second", more=True)
    assert b"100 Continue" not in peer.read()
    peer.send(b"body")
    assert peer.last.stream.take_body() == (b"body", True)
    peer.nearly(TIMEOUTS.request_body)
    assert peer.open
    peer.past()
    assert not peer.open


@linux
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
@pytest.mark.parametrize("end", ["reset", "half", "none"])
def test_the_end_of_a_client_that_is_not_read_from(family: socket.AddressFamily, end: str) -> None:
    """R4 S14: behind more requests than may wait its end is not read, but it is looked for."""
    peer = Peer(limits=Limits(pipelined=0))
    with real_sockets(family) as (ours, theirs):
        peer.transport.sock = ours
        peer.send(GET)
        peer.send(GET)
        assert peer.transport.paused
        theirs.send(GET)
        peer.after(3600)
        assert peer.last.told == []
        if end == "reset":
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            theirs.close()
        elif end == "half":
            theirs.shutdown(socket.SHUT_WR)
        peer.after(LOOK + RESOLUTION)
        assert peer.transport.aborted == (end == "reset")
        assert peer.last.told == (["disconnected"] if end == "half" else [])
        if peer.open:
            peer.last.answer()
            peer.loop.turn()
            peer.after(LOOK + RESOLUTION)
            assert peer.read() == OK
            assert len(peer.requests) == 2
            assert peer.last.told == []  # what comes next is read


def test_a_paused_body_does_not_stall(peer: Peer) -> None:
    """R7: it is the application that lets it wait."""
    peer.send(post(10 * HIGH_WATER) + bytes(HIGH_WATER + 1))
    assert peer.transport.paused
    peer.after(3600)
    assert peer.open
    assert peer.last.stream.take_body() == (bytes(HIGH_WATER + 1), True)
    assert not peer.transport.paused
    peer.after(TIMEOUTS.request_body + RESOLUTION)
    assert peer.status() == 408


def test_a_client_that_does_not_read_is_cut_off(peer: Peer) -> None:
    """S16: with a reset; the application is told."""
    peer.send(GET)
    peer.last.answer(bytes(100), more=True)
    peer.connection.pause_writing()
    assert not peer.last.stream.writable
    peer.nearly(TIMEOUTS.write)
    assert not peer.transport.aborted
    peer.past()
    assert peer.transport.aborted
    assert peer.last.told == ["disconnected"]
    assert not peer.last.stream.connected


def test_a_client_that_reads_on_in_time_is_not_cut_off(peer: Peer) -> None:
    peer.send(GET)
    for _ in range(3):
        peer.last.answer(bytes(100), more=True)
        peer.connection.pause_writing()
        peer.nearly(TIMEOUTS.write)
        peer.connection.resume_writing()
        assert peer.last.stream.writable
    peer.after(3600)
    assert peer.open
    assert peer.last.told == ["resumed"] * 3


@linux
@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_client_that_reads_slowly_is_not_cut_off(peer: Peer, family: socket.AddressFamily, closing: bool) -> None:
    """S16: the kernel asks for more only when megabytes are gone, so what it has got rid of counts, too; also behind
    the last answer. One that stops has one period more, as what it took at first counts."""
    with real_sockets(family) as (ours, theirs):
        fill(ours)
        peer.transport.sock, peer.transport.unsent = ours, 2**20
        peer.send(GET)
        if closing:
            peer.last.answer(headers=[(b"connection", b"close")])
            peer.end()
            assert peer.transport.closed
        else:
            peer.last.answer(bytes(100), more=True)
            peer.connection.pause_writing()
        for _ in range(4):
            read_a_little(ours, theirs)
            peer.after(TIMEOUTS.write + RESOLUTION)
            assert not peer.transport.aborted
        peer.after(2 * TIMEOUTS.write + RESOLUTION)
        assert peer.transport.aborted


@pytest.mark.parametrize("sent", [GET, GET[:9], b""])
def test_who_still_reads_an_answer_is_not_idle(peer: Peer, sent: bytes) -> None:
    """S13 S14: however long it takes, what it has asked for behind it is answered; the idle time begins then."""
    peer.send(GET)
    peer.connection.pause_writing()
    peer.last.answer()
    if sent:
        peer.send(sent)
    for _ in range(4):
        peer.transport.unsent += 2
        peer.connection.pause_writing()
        peer.transport.unsent -= 1
        peer.nearly(TIMEOUTS.write)
    assert peer.open
    peer.connection.resume_writing()
    peer.loop.turn()
    if sent != GET:
        peer.nearly(TIMEOUTS.request_header if sent else TIMEOUTS.keep_alive)
        peer.send(GET[len(sent) :])
    assert len(peer.requests) == 2


def test_a_head_begun_before_an_unread_answer_is_not_late(peer: Peer) -> None:
    """S14: its rest may be here, and is looked at when the answer has been read."""
    peer.send(GET)
    peer.last.answer()
    peer.send(GET[:9])
    peer.connection.pause_writing()  # uvloop says so late
    peer.send(GET[9:])
    peer.after(TIMEOUTS.request_header + 1)
    assert peer.read() == OK
    peer.connection.resume_writing()
    assert len(peer.requests) == 2


def test_an_answer_that_nobody_reads_is_given_up(peer: Peer) -> None:
    """The response is complete, but not gone out: keep-alive must not hide that."""
    peer.send(GET)
    peer.connection.pause_writing()
    peer.last.answer()
    peer.after(TIMEOUTS.write + RESOLUTION)
    assert peer.transport.aborted


def test_closing_does_not_wait_for_ever(peer: Peer) -> None:
    """What is left to write when the connection is closed has its time, too."""
    peer.after(TIMEOUTS.request_header + RESOLUTION)
    assert peer.transport.closed
    assert not peer.transport.aborted
    peer.after(TIMEOUTS.write + 1)
    assert peer.transport.aborted


def test_closing_waits_for_a_client_that_reads_slowly(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last answer may be long: it is cut only when nothing of it goes out any more."""
    left = 1000
    monkeypatch.setattr(peer.transport, "get_write_buffer_size", lambda: left)
    peer.send(GET.replace(b"Host", b"Connection: close\r\nHost"))
    peer.last.answer()
    peer.after(TIMEOUTS.linger + RESOLUTION)
    assert peer.transport.closed
    for _ in range(5):
        left -= 100
        peer.after(TIMEOUTS.write + RESOLUTION)
        assert not peer.transport.aborted
    peer.after(TIMEOUTS.write + RESOLUTION)
    assert peer.transport.aborted


@pytest.mark.parametrize(("draining", "patience"), [(False, TIMEOUTS.linger), (True, TIMEOUTS.linger_draining)])
def test_lingering_ends(peer: Peer, draining: bool, patience: float) -> None:
    """P12: after its time, though the client goes on sending."""
    peer.context.draining = draining
    peer.send(b"nonsense\r\n\r\n")
    assert peer.transport.ended
    for _ in range(int(patience)):
        assert not peer.transport.closed
        peer.send(b"more and more")
        peer.after(1)
    peer.after(RESOLUTION)
    assert peer.transport.closed
    assert peer.status() == 400


def test_lingering_ends_with_the_client(peer: Peer) -> None:
    """P12"""
    peer.send(b"nonsense\r\n\r\n" + GET)
    peer.send(GET)
    assert not peer.transport.closed
    peer.end()
    assert peer.transport.closed
    assert peer.status() == 400
    assert peer.requests == []


def test_an_unread_body_that_stalls_ends_the_connection(peer: Peer) -> None:
    """R8"""
    peer.send(post(9))
    peer.last.answer()
    assert peer.read() == OK
    peer.nearly(TIMEOUTS.request_body)
    assert peer.open
    peer.past()
    assert not peer.open
    assert peer.read() == b""


def _vanish(peer: Peer) -> None:
    peer.lose()


def _end_within_the_body(peer: Peer) -> None:
    peer.end()


def _read_nothing(peer: Peer) -> None:
    peer.connection.pause_writing()
    peer.after(TIMEOUTS.write + RESOLUTION)


def _send_nothing(peer: Peer) -> None:
    peer.after(TIMEOUTS.request_body + RESOLUTION)


def _send_nonsense(peer: Peer) -> None:
    peer.send(b"nonsense\r\n")


@pytest.mark.parametrize("way", [_vanish, _end_within_the_body, _read_nothing, _send_nothing, _send_nonsense])
def test_an_answer_that_is_cut_short_has_its_line(peer: Peer, way: Callable[[Peer], None]) -> None:
    """In the access log, once, whatever has cut it."""
    lines: list[tuple[int, int, bool]] = []

    class Recorder:
        def write(self, exchange: Exchange, cut: bool = False) -> None:
            lines.append((exchange.status, exchange.sent, cut))

    peer.context.access_log = Recorder()  # type: ignore[assignment]
    peer.send(post(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n")
    peer.last.answer(b"part", more=True)
    way(peer)
    peer.after(TIMEOUTS.linger + RESOLUTION)
    if way is not _vanish:
        peer.lose()
    assert lines == [(200, 4, True)]
    assert peer.last.told[-1] == "disconnected"
