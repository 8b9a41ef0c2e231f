"""What the kernel knows of a connection, and neither the loop nor its transport tell. Each question is a system call or
two, some 2 us, so none is asked for every request."""

from __future__ import annotations

import enum
import fcntl
import select
import socket
import struct
import sys
import termios

_TCP_BYTES = 120  # offset in struct tcp_info of tcpi_bytes_acked and, behind it, tcpi_bytes_received (linux/tcp.h)
_SO_NWRITE = 0x1024  # macOS (sys/socket.h): bytes in the send buffer
_POLLRDHUP: int = getattr(select, "POLLRDHUP", 0)  # Linux


def byte_counts(sock: socket.socket | None) -> tuple[int, int] | None:
    """Bytes received, and sent and acknowledged, since the client connected, in whatever worker; None where the system
    does not tell: all but Linux and TCP."""
    if not sys.platform.startswith("linux") or sock is None or sock.family == socket.AF_UNIX:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_BYTES + 16)
        acked, received = struct.unpack_from("=QQ", info, _TCP_BYTES)
    except (OSError, struct.error):
        return None
    # The SYN of either side counts as one byte in the kernel, until data is acknowledged.
    return received, max(0, acked - 1)


def taken(sock: socket.socket | None) -> int:
    """A number that grows when the peer takes what waits in the kernel for it; always 0 where the system does not tell.

    The kernel holds megabytes for each connection, and asks for more only when a third of them has gone, so of a slow
    client the loop hears nothing for minutes. On Unix sockets and macOS the number shrinks when more is written.
    """
    counts = byte_counts(sock)
    if counts is not None:
        return counts[1]
    if sock is None:
        return 0
    try:
        if sys.platform == "darwin":
            return -sock.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
        waiting: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    except (OSError, ValueError):  # the latter for one that is closed
        return 0
    return -waiting


def taken_through(fd: int) -> int:
    """The same for a descriptor."""
    sock = socket.socket(fileno=fd)
    try:
        return taken(sock)
    finally:
        sock.detach()


class Peer(enum.Enum):
    THERE = enum.auto()
    ENDED = enum.auto()  # it has ended its side, and may still read
    LOST = enum.auto()  # nothing reaches it any more


def look_at_peer(sock: socket.socket | None) -> Peer:
    """How the peer is, without reading what may wait before the news."""
    if sock is None:
        return Peer.THERE
    poll = select.poll()
    poll.register(sock.fileno(), _POLLRDHUP)
    events = sum(event for _, event in poll.poll(0))
    if events & select.POLLERR or (events & select.POLLHUP and _POLLRDHUP):
        return Peer.LOST
    # Elsewhere than on Linux POLLHUP may be the end of one side.
    return Peer.ENDED if events & (_POLLRDHUP | select.POLLHUP) else Peer.THERE
