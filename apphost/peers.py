"""Who is at the other end of a socket, as the kernel tells.

All channels inside of apphost are socketpairs that the arbiter makes; they have no name that anybody could connect to.
The kernel keeps with each who made it, for `SO_PEERCRED`: so a process can see that a descriptor that it is handed is
such a channel, and not a socket of somebody else.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import NamedTuple

_UCRED = struct.Struct("iII")  # struct ucred of Linux: pid, uid, gid
# macOS (sys/un.h): LOCAL_PEERCRED of SOL_LOCAL gives a struct xucred, whose first two members are version and uid, and
# LOCAL_PEERPID the pid.
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID, _XUCRED_SIZE = 0, 0x001, 0x002, 76


class Peer(NamedTuple):
    """The process at the other end: of a socketpair the one that made it, for both ends; for a client the one that has
    called `listen`. pid: 0 where it is not known, or not visible from our pid namespace."""

    pid: int
    uid: int

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}" if self.pid else f"uid {self.uid}"


def peer_of(sock: socket.socket) -> Peer | None:
    """Of a connected Unix socket; None where the system does not tell. Of any other socket the pid is 0, or None."""
    try:
        if hasattr(socket, "SO_PEERCRED"):
            pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            return Peer(pid, uid)
        if sys.platform == "darwin":
            _version, uid = struct.unpack_from("=II", sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_SIZE))
            return Peer(int(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID)), uid)
    except (OSError, struct.error):
        pass
    return None


def _tells_makers() -> bool:
    """Whether the system keeps who made a socketpair; macOS does not for both ends."""
    return hasattr(socket, "SO_PEERCRED")


def is_of_parent(sock: socket.socket) -> bool:
    """Whether the parent of this process made `sock`; True where the system does not tell."""
    if not _tells_makers():
        return True
    peer = peer_of(sock)
    return peer is not None and 0 < peer.pid == os.getppid()


def take_channels(fds: list[int], known: socket.socket) -> list[socket.socket] | None:
    """The channels `fds`, if the process that made `known` made each of them too; else None, and all are closed."""
    taken: list[socket.socket] = []
    for fd in fds:
        try:
            taken.append(socket.socket(fileno=fd))
        except OSError:  # it is no socket
            os.close(fd)
    if len(taken) == len(fds) and all(_is_like(sock, known) for sock in taken):
        return taken
    for sock in taken:
        sock.close()
    return None


def _is_like(sock: socket.socket, known: socket.socket) -> bool:
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        return False
    maker = peer_of(known)
    return not _tells_makers() or (maker is not None and maker.pid > 0 and peer_of(sock) == maker)
