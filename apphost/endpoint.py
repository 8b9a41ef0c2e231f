"""Where an arbiter's control socket is and who may command there: what the arbiter and its commands must agree on.

On Linux the socket is an abstract one (unix(7)): it needs no file system and ends with its process. Its name is
`\\0apphost/PID/TOKEN`, PID as the arbiter sees itself. Abstract names belong to the network namespace, which containers
may share while both are process 1; so TOKEN is the inode of the pid namespace, or random where that is taken or
unknown. Nobody computes the name: a client reads /proc/net/unix and asks the kernel (SO_PEERCRED, which translates
between pid namespaces) whose socket it has reached. A name proves nothing, since every user may bind any.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from typing import NamedTuple

from apphost.peers import Peer

AUTO, OFF = "auto", "off"
PREFIX = "apphost/"
BACKLOG = 64
LINE_MAX = 8192  # bytes of a request; the longest real one has some 100
_TRIES = 8  # names; the second is random already, so more than two are needed by bad luck only
_LISTENING = 0x10000  # __SO_ACCEPTCON in the flags of /proc/net/unix
_OVERFLOW_UID = 65534  # the default of /proc/sys/kernel/overflowuid: how a user of another user namespace is shown


class Found(NamedTuple):
    """The name of a listening control socket, and the pid that it names."""

    address: bytes
    pid: int


def abstract_sockets() -> bool:
    """Whether the system has abstract sockets."""
    return sys.platform.startswith("linux")


def may_command(peer: Peer | None) -> bool:
    """Whether the arbiter, which is us, obeys this client: the same user, or root.

    Where the system does not tell who it is, the mode of the socket's file has decided.
    """
    if peer is None:
        return not abstract_sockets()
    if peer.uid == 0:
        return True
    if peer.uid != os.geteuid():
        return False
    # All strangers of other user namespaces share this number; a process that we can see is none of them.
    return peer.uid != _OVERFLOW_UID or peer.pid > 0


def open_abstract() -> socket.socket:
    """A listening, non-blocking abstract socket. Raises `OSError`."""
    for number in range(_TRIES):
        token = _pid_namespace() if number == 0 else os.urandom(8).hex()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(f"\0{PREFIX}{os.getpid()}/{token}".encode("ascii"))
            sock.listen(BACKLOG)
            sock.setblocking(False)
            return sock
        except OSError as exc:
            sock.close()
            if exc.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _pid_namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return os.urandom(8).hex()


def listed(table: str) -> Iterator[Found]:
    """The control sockets in the text of /proc/net/unix. Pure.

    Accepted connections bear the name of their listener, so only sockets that listen count.
    """
    for line in table.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) < 8 or not fields[7].startswith(f"@{PREFIX}"):
            continue
        pid = fields[7].split("/")[1]
        try:
            listening = int(fields[3], 16) & _LISTENING
        except ValueError:
            continue
        if listening and pid.isascii() and pid.isdigit():
            yield Found(b"\0" + os.fsencode(fields[7][1:]), int(pid))


def find_abstract() -> list[Found]:
    """All control sockets of this network namespace. Raises `OSError` where the system does not list them."""
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        return list(listed(file.read()))
