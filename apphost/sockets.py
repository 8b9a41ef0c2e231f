"""Addresses to listen at, and the listeners. The arbiter opens them once; workers inherit them."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from dataclasses import dataclass

from apphost.errors import AddressError

_TCP = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^:\[\]/]*)):(?P<port>[0-9]{1,5})", re.ASCII)
_PROBE_TIMEOUT = 1.0  # s to find out whether somebody answers on a Unix socket that is in the way
_UNIX_PATH_MAX = 107  # bytes: sockaddr_un.sun_path on Linux, less its NUL (macOS: 103; the kernel says so there)


@dataclass(frozen=True, slots=True)
class Address:
    """One value of `bind`: TCP (host and port), a Unix socket (path), an inherited descriptor (fd), or the name of one
    that a service manager has passed (name)."""

    text: str
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1
    name: str = ""


def parse_bind(text: str) -> Address:
    """Parse `HOST:PORT`, `[IPV6]:PORT`, `unix:PATH`, `fd://N` or `systemd:NAME`. Pure. Raises `ValueError` that says
    what is expected.

    An empty host or `*` means every IPv4 interface; port 0 lets the system choose one.
    """
    if text.startswith("unix:"):
        return _parse_unix(text)
    if text.startswith("systemd:"):
        name = text.removeprefix("systemd:")
        if not name or ":" in name or not name.isprintable():
            raise ValueError("expected systemd:NAME with the name of a socket that systemd passes")
        return Address(text, name=name)
    if text.startswith("fd://"):
        number = text[5:]
        if not (number.isascii() and number.isdigit()):
            raise ValueError("expected fd://N with the number of an open descriptor")
        return Address(text, fd=int(number))
    match = _TCP.fullmatch(text)
    if match is None:
        raise ValueError("expected HOST:PORT, [IPV6]:PORT, unix:PATH, fd://N or systemd:NAME, such as 127.0.0.1:8000")
    port = int(match["port"])
    if port > 65535:
        raise ValueError(f"a port is at most 65535, not {port}")
    host = match["v6"] or match["host"]
    return Address(text, host="0.0.0.0" if host in ("", "*") else host, port=port)


def _parse_unix(text: str) -> Address:
    path = text[5:].removeprefix("//") if text.startswith("unix://") else text[5:]
    if not path or "\0" in path:
        raise ValueError("expected unix:PATH with the path of the socket")
    if len(os.fsencode(path)) > _UNIX_PATH_MAX:
        raise ValueError(f"the path of a Unix socket has at most {_UNIX_PATH_MAX} bytes")
    return Address(text, path=path)


def open_listeners(address: Address, backlog: int) -> list[socket.socket]:
    """Listening, non-blocking, close-on-exec sockets for `address`, which is not the name of a passed one (see
    `arbiter.activation` for those); a host name can stand for several.

    Raises `AddressError` with a paragraph that says what is in the way.
    """
    if address.fd >= 0:
        return [_adopt(address)]
    if address.path:
        return [_listen_unix(address, backlog)]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as exc:
        raise AddressError(f"cannot listen at {address.text}: {address.host!r} is unknown ({exc.strerror})") from None
    listeners: list[socket.socket] = []
    try:
        for family, sockaddr in dict.fromkeys((entry[0], entry[4]) for entry in found):
            listeners.append(_listen_tcp(address, family, sockaddr, backlog))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen_tcp(
    address: Address, family: socket.AddressFamily, sockaddr: tuple[object, ...], backlog: int
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(sockaddr)
        # Accepted sockets inherit it. asyncio sets it only on sockets that were made with an explicit protocol.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise AddressError(f"cannot listen at {address.text}: {_why(exc, address)}") from None
    return sock


def _why(exc: OSError, address: Address) -> str:
    if exc.errno == errno.EADDRINUSE:
        return "another process is listening there already"
    if exc.errno == errno.EACCES and address.port and address.port < 1024:
        return "a port below 1024 needs root or the capability CAP_NET_BIND_SERVICE"
    if exc.errno == errno.EADDRNOTAVAIL:
        return f"this machine has no address {address.host}"
    return exc.strerror or str(exc)


def _adopt(address: Address) -> socket.socket:
    try:
        sock = socket.socket(fileno=address.fd)
        listening = sock.getsockopt(socket.SOL_SOCKET, getattr(socket, "SO_ACCEPTCONN", 30))
    except OSError as exc:
        raise AddressError(
            f"cannot use {address.text}: descriptor {address.fd} is no socket ({exc.strerror})"
        ) from None
    if sock.type != socket.SOCK_STREAM or not listening:
        sock.detach()
        raise AddressError(f"cannot use {address.text}: it is not a listening stream socket")
    os.set_inheritable(address.fd, False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


def _listen_unix(address: Address, backlog: int) -> socket.socket:
    _make_room(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(address.path)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise AddressError(f"cannot listen at {address.text}: {_why(exc, address)}") from None
    return sock


def _make_room(address: Address) -> None:
    """Remove the socket of a server that is gone; leave everything else alone."""
    try:
        mode = os.lstat(address.path).st_mode
    except OSError:
        return  # nothing there; or bind will say what is wrong
    if not stat.S_ISSOCK(mode):
        raise AddressError(f"cannot listen at {address.text}: there is a file of that name that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT)
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            os.unlink(address.path)
            return
        except OSError as exc:
            raise AddressError(
                f"cannot listen at {address.text}: {exc.strerror or 'the socket there is busy'}"
            ) from None
    raise AddressError(f"cannot listen at {address.text}: another process is listening there already")


def describe(sock: socket.socket) -> str:
    """Where a listener really listens: `http://127.0.0.1:8000`, `http://[::1]:8000`, `unix:/run/app.sock`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name)}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"http://{host}:{name[1]}"


def unlink_own(path: str, inode: tuple[int, int]) -> None:
    """Remove the Unix socket at `path` if it still is the one with this (device, inode)."""
    try:
        info = os.lstat(path)
        if (info.st_dev, info.st_ino) == inode:
            os.unlink(path)
    except OSError:
        pass
