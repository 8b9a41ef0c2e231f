"""Addresses to listen at, and the listeners. The arbiter opens them once; workers inherit them.

A Unix socket is a file, with a few things to keep in mind:
- nobody can connect before `listen`, so what is set between that and `bind`, its mode and owner, is there in time;
- between them it also looks like the socket of a server that is gone, so whoever starts holds a lock on the folder;
- its inode number is free for others once the last descriptor is closed, so it alone does not tell whose a socket is.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apphost.errors import AddressError, PrivilegesError

_TCP = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^:\[\]/]*)):(?P<port>[0-9]{1,5})", re.ASCII)
_PROBE_TIMEOUT = 1.0  # s to find out whether somebody answers on a Unix socket that is in the way
# s for another starter to be done, which takes it no longer than its probe; who holds the lock longer is none
_LOCK_TIMEOUT = 2.0
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
    scheme: str = ""  # http or https, where the text says it
    name: str = ""


class Listener(socket.socket):
    """A listening socket. `plain`: no TLS here, whether there are certificates or not."""

    plain = False

    @property
    def may_tls(self) -> bool:
        """Whether TLS is spoken here where there are certificates. On a Unix socket it would protect nothing."""
        return not self.plain and self.family != socket.AF_UNIX


@dataclass(frozen=True, slots=True)
class Access:
    """Who may connect to a Unix socket. mode: None leaves it to the umask. uid, gid: -1 leaves them as they are."""

    mode: int | None = None
    uid: int = -1
    gid: int = -1


# What tells a file from others that have or had its name: device, inode number, time of the last change in ns.
Identity = tuple[int, int, int]


def parse_bind(text: str) -> Address:
    """Parse `HOST:PORT`, `[IPV6]:PORT`, `unix:PATH`, `fd://N` or `systemd:NAME`. Pure. Raises `ValueError` that says
    what is expected.

    An empty host or `*` means every IPv4 interface; port 0 lets the system choose one. `http://` in front of a host is
    no TLS in spite of certificates, `https://` insists on it.
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
    scheme, found, rest = text.partition("://")
    if not found or scheme not in ("http", "https"):
        scheme, rest = "", text
    match = _TCP.fullmatch(rest)
    if match is None:
        raise ValueError("expected HOST:PORT, [IPV6]:PORT, unix:PATH, fd://N or systemd:NAME, such as 127.0.0.1:8000")
    port = int(match["port"])
    if port > 65535:
        raise ValueError(f"a port is at most 65535, not {port}")
    host = match["v6"] or match["host"]
    return Address(text, host="0.0.0.0" if host in ("", "*") else host, port=port, scheme=scheme)


def _parse_unix(text: str) -> Address:
    path = text[5:].removeprefix("//") if text.startswith("unix://") else text[5:]
    if not path or "\0" in path:
        raise ValueError("expected unix:PATH with the path of the socket")
    if path.startswith("@"):
        raise ValueError(
            "an abstract socket (unix:@NAME) has no permissions, so every process of the machine could connect: "
            "give a path; for a file of that name, unix:./@NAME"
        )
    if len(os.fsencode(path)) > _UNIX_PATH_MAX:
        raise ValueError(f"the path of a Unix socket has at most {_UNIX_PATH_MAX} bytes")
    return Address(text, path=path)


def open_listeners(address: Address, backlog: int, access: Access = Access()) -> list[Listener]:
    """Listening, non-blocking, close-on-exec sockets for `address`, which is not the name of a passed one (see
    `arbiter.activation` for those); a host name can stand for several.

    `access` is for Unix sockets that are made. Raises `AddressError` with a paragraph that says what is in the way.
    """
    if address.fd >= 0:
        return [_adopt(address)]
    if address.path:
        return [_listen_unix(address, backlog, access)]
    try:
        found = _look_up(address.host, address.port)
    except socket.gaierror as exc:
        raise AddressError(f"cannot listen at {address.text}: {address.host!r} is unknown ({exc.strerror})") from None
    listeners: list[Listener] = []
    try:
        for family, sockaddr in dict.fromkeys((entry[0], entry[4]) for entry in found):
            listeners.append(_listen_tcp(address, family, sockaddr, backlog))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _look_up(host: str, port: int) -> list[Any]:
    """The addresses of a host. Raises `socket.gaierror`.

    Signals are obeyed meanwhile: what asks name servers does not return for one, so it must not run in this thread.
    """

    def ask(flags: int) -> list[Any]:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | flags)

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the other thread's
        try:
            answers.append(ask(0))
        except BaseException as exc:
            answers.append(exc)
        finally:
            answered.release()

    try:
        return ask(socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass
    answers: list[list[Any] | BaseException] = []
    answered = _thread.allocate_lock()
    answered.acquire()
    _thread.start_new_thread(run, ())
    answered.acquire()
    (answer,) = answers
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _listen_tcp(address: Address, family: socket.AddressFamily, sockaddr: tuple[object, ...], backlog: int) -> Listener:
    sock = Listener(family, socket.SOCK_STREAM)
    sock.plain = address.scheme == "http"
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


def _adopt(address: Address) -> Listener:
    try:
        sock = Listener(fileno=address.fd)
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


def _listen_unix(address: Address, backlog: int, access: Access) -> Listener:
    sock = Listener(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _folder_lock(os.path.dirname(address.path) or "."):
            _make_room(address)
            _bind_unix(sock, address.path, access.mode)
            _give(address, access)
            sock.listen(backlog)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise AddressError(f"cannot listen at {address.text}: {_why(exc, address)}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(sock: socket.socket, path: str, mode: int | None) -> None:
    """Bind with the mode: the kernel makes the file with all permissions less the umask (Linux, BSD)."""
    if mode is None:
        sock.bind(path)
        return
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def _give(address: Address, access: Access) -> None:
    if access.uid < 0 and access.gid < 0:
        return
    try:
        os.chown(address.path, access.uid, access.gid, follow_symlinks=False)
    except OSError as exc:
        os.unlink(address.path)
        raise PrivilegesError(
            f"cannot give the socket {address.path} to user {access.uid}, group {access.gid} (-1: as it is): "
            f"{exc.strerror}. Without root a file can only be given to a group that one is in"
        ) from None


@contextlib.contextmanager
def _folder_lock(folder: str) -> Iterator[None]:
    """Wait for another starter that makes room in the same folder; where it cannot be locked, do without."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # bind says what is wrong, or nothing is
        return
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while not _try_lock(fd) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    """Whether there is nothing to wait for: it is locked, or the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


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
        except FileNotFoundError:
            return  # its owner has removed it just now
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.path)
            return
        except OSError as exc:
            raise AddressError(
                f"cannot listen at {address.text}: {exc.strerror or 'the socket there is busy'}"
            ) from None
    raise AddressError(f"cannot listen at {address.text}: another process is listening there already")


def describe(sock: Listener, tls: bool = False) -> str:
    """Where a listener really listens: `http://127.0.0.1:8000`, `http://[::1]:8000`, `unix:/run/app.sock`.

    `tls`: there are certificates.
    """
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name)}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"{'https' if tls and sock.may_tls else 'http'}://{host}:{name[1]}"


def identify(path: str) -> Identity:
    """Of the file at `path`, a symbolic link not being followed. Raises OSError."""
    info = os.lstat(path)
    return info.st_dev, info.st_ino, info.st_ctime_ns


def unlink_own(path: str, own: Identity) -> None:
    """Remove the Unix socket at `path` if it still is the one that `own` identifies.

    One whose mode or owner was changed by hand stays: the next start finds nobody behind it, and replaces it.
    """
    with _folder_lock(os.path.dirname(path) or "."):
        try:
            if identify(path) == own:
                os.unlink(path)
        except OSError:
            pass
