"""Who made a socket, as the kernel tells.

All channels inside of apphost are socketpairs that the arbiter makes; they have no name that anybody could connect to.
The kernel keeps with each who made it, for `SO_PEERCRED`: so a process can see that a descriptor that it is handed is
such a channel, and not a socket of somebody else.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

_CREDENTIALS = struct.Struct("iII")  # struct ucred of Linux


class Peer(NamedTuple):
    """The process at the other end; of a socketpair, the one that made it, for both ends."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer | None:
    """None where the system does not tell (other than Linux), or tells nothing: it is no connected Unix socket."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        peer = Peer(*_CREDENTIALS.unpack(data))
    except (OSError, struct.error):
        return None
    return peer if peer.pid > 0 else None


def is_of_parent(sock: socket.socket) -> bool:
    """Whether the parent of this process made `sock`; True where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    peer = peer_of(sock)
    return peer is not None and peer.pid == os.getppid()


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
    return not hasattr(socket, "SO_PEERCRED") or (maker is not None and peer_of(sock) == maker)
