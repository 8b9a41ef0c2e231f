"""The file-like objects of WSGI: `wsgi.input` of a streamed body, `wsgi.errors`, `wsgi.file_wrapper`."""

from __future__ import annotations

import io
import os
import select
import stat
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from apphost.logs import Log
from apphost.protocols.base import ClientDisconnected
from apphost.protocols.kernel import taken_through
from apphost.protocols.response import ResponseHead

if TYPE_CHECKING:
    from apphost.interfaces.wsgi import WsgiRequest

SENDFILE_MAX = 1 << 20  # bytes a system call: long enough to be cheap, short enough to notice a client that is gone


class BodyInput(io.RawIOBase):
    """`wsgi.input` for a body that is still arriving. Read by the application's thread, filled by the event loop.

    Never reads past the body; b"" from its end on. Raises `ClientDisconnected` when the client goes before the end, and
    when the response is complete and the rest is thrown away: never a body that only looks complete.
    """

    def __init__(self, request: WsgiRequest, start: bytes) -> None:
        self._request = request
        self._ready = threading.Condition()
        self._buffer = start  # emptied when it is used up, so that it is true as long as there is something in it
        self._position = 0  # where the application has read to in it
        self._more = True
        self._asked = False

    # -- the loop's side

    def arrived(self) -> None:
        """There may be more body, its end, or no more client. Takes over only what the application waits for."""
        with self._ready:
            if self._asked:
                self._take()
            if not self._asked or self._request.gone:
                self._ready.notify()

    def _ask(self) -> None:
        """The application wants more: runs on the loop, so the stream may send `100 Continue` and read on."""
        with self._ready:
            self._asked = True
            self._take()

    def _take(self) -> None:
        if self._over:
            self._asked = False
            self._ready.notify()
            return
        data, more = self._request.stream.take_body()
        if data or not more:
            self._buffer += data
            self._more = more
            self._asked = False
            self._ready.notify()

    # -- the application's side

    def _fill(self) -> bool:
        """Wait for more body; False at its end."""
        with self._ready:
            if not self._more:
                return False
            before = len(self._buffer)
            self._request.interface.pool.post(self._ask)
            while len(self._buffer) == before and self._more:
                if self._over:
                    raise ClientDisconnected(self._over)
                self._ready.wait()
            return True

    @property
    def _over(self) -> str:
        """Why nothing of the body comes any more, empty as long as it may."""
        if self._request.gone:
            return "the client closed the connection before its request body was complete"
        if self._request.stream.complete:
            return "the response is complete, and what was left of the request body is thrown away"
        return ""

    def _pop(self, size: int) -> bytes:
        start = self._position
        self._position = end = start + size
        data = self._buffer[start:end]
        if end >= len(self._buffer):
            self._buffer = b""
            self._position = 0
        return data

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Exactly `size` bytes if the body has them, the whole rest for None or a negative size."""
        if size is None or size < 0:
            return self.readall()
        parts: list[bytes] = []
        missing = size
        while missing > 0 and (self._buffer or self._fill()):
            parts.append(self._pop(missing))
            missing -= len(parts[-1])
        return b"".join(parts)

    def readall(self) -> bytes:
        parts: list[bytes] = []
        while self._buffer or self._fill():
            parts.append(self._pop(len(self._buffer)))
        return b"".join(parts)

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readline(self, size: int | None = -1, /) -> bytes:
        limit = -1 if size is None else size
        parts: list[bytes] = []
        length = 0
        while (limit < 0 or length < limit) and (self._buffer or self._fill()):
            end = self._buffer.find(b"\n", self._position) + 1
            want = (end or len(self._buffer)) - self._position
            if limit >= 0:
                want = min(want, limit - length)
            parts.append(self._pop(want))
            length += want
            if parts[-1].endswith(b"\n"):
                break
        return b"".join(parts)

    def readlines(self, hint: int | None = -1, /) -> list[bytes]:
        lines: list[bytes] = []
        size = 0
        while line := self.readline():
            lines.append(line)
            size += len(line)
            if hint is not None and 0 < hint <= size:
                break
        return lines

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


class ErrorLog(io.TextIOBase):
    """`wsgi.errors`: text, any Unicode, whole lines into the server's log."""

    def __init__(self, log: Log, worker: str) -> None:
        self._log = log
        self._worker = worker
        self.unfinished: dict[int, str] = {}  # thread to the beginning of its line; empty, nearly always

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """PEP 3333 forbids it, and it belongs to all requests of the worker."""

    def write(self, text: str, /) -> int:
        thread = threading.get_ident()
        whole, newline, rest = (self.unfinished.pop(thread, "") + text).rpartition("\n")
        if rest:
            self.unfinished[thread] = rest
        if newline:
            self._say(whole)
        return len(text)

    def _say(self, text: str) -> None:
        first, _, more = text.partition("\n")
        self._log.error(f"{self._worker}: wsgi.errors: {first}", more)

    def flush(self) -> None:
        rest = self.unfinished.pop(threading.get_ident(), "")
        if rest:
            self._say(rest)


class FileWrapper:
    """`wsgi.file_wrapper`: an iterable over a file-like object; a real file in it is sent by the kernel."""

    def __init__(self, filelike: Any, blksize: int = 65536) -> None:
        self.filelike = filelike
        self.blksize = blksize
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.filelike.read(self.blksize), b"")


def file_to_send(result: FileWrapper, headers_sent: bool) -> tuple[int, int, int] | None:
    """(descriptor, offset, bytes to the end) of a regular file in `result`, or None when it must be iterated."""
    if headers_sent or not hasattr(os, "sendfile"):
        return None
    try:
        file = plain_file(result.filelike)
        if file is None:
            return None
        if type(file) is io.BufferedRandom:
            file.flush()  # or the kernel would send what was there before the application has written
        fd = file.fileno()
        info = os.fstat(fd)
        # Where the application has read to, which for a buffered file is not where the descriptor stands.
        offset = file.tell()
    except (AttributeError, OSError, ValueError):
        return None
    if not stat.S_ISREG(info.st_mode) or not isinstance(offset, int) or offset >= info.st_size:
        return None
    return fd, offset, info.st_size - offset


def plain_file(filelike: Any) -> io.IOBase | None:
    """The binary file of the system whose own `read` is the one of `filelike`, else None.

    That there is a `fileno` is not enough: a `GzipFile` has one, and what it reads is not what its descriptor has. What
    only passes the `read` of a real file on, such as those of tempfile and of Django, counts as that file.
    """
    read = filelike.read
    file = getattr(getattr(read, "__wrapped__", read), "__self__", None)
    kind = type(file)
    if kind is io.FileIO or (kind in _BUFFERED and type(cast(Any, file).raw) is io.FileIO):
        return cast(io.IOBase, file)
    return None


_BUFFERED = (io.BufferedReader, io.BufferedRandom)


def send_file(request: WsgiRequest, file: tuple[int, int, int], head: ResponseHead) -> bool:
    """Send a response whose body is a file, by `sendfile`. Of the application's thread. False when it cannot be done
    this way: nothing has gone out then. Raises `ClientDisconnected`, and `OSError` for a file that cannot be read."""
    fd, offset, available = file
    count = available if head.content_length is None else head.content_length
    if count > available or head.status in (204, 304) or head.status < 200:
        return False  # the ordinary way finds the words for it
    lent = _Loan(request, head, count).wait()
    if lent is None:
        return False
    sock, head_bytes = lent
    request.headers_sent = True
    try:
        _copy(request, sock, head_bytes, fd, offset, count)
    finally:
        os.close(sock)
    request.interface.pool.post(lambda: _give_back(request, count))
    return True


class _Loan:
    """Has the loop lend the socket; the application's thread waits, for no longer than the loop's next turn."""

    def __init__(self, request: WsgiRequest, head: ResponseHead, count: int) -> None:
        self._request = request
        self._head = head
        self._count = count
        self._done = threading.Event()
        self._lent: tuple[int, bytes] | None = None

    def wait(self) -> tuple[int, bytes] | None:
        self._request.interface.pool.post(self._lend)
        self._done.wait()
        return self._lent

    def _lend(self) -> None:
        try:
            self._lent = self._request.stream.lend_socket(self._head, self._count)
        finally:
            self._done.set()


def _give_back(request: WsgiRequest, count: int) -> None:
    request.stream.return_socket(count)
    request.interface.active.discard(request)


def _copy(request: WsgiRequest, sock: int, head: bytes, fd: int, offset: int, count: int) -> None:
    end = offset + count
    writable = select.poll()
    writable.register(sock, select.POLLOUT)
    while head or offset < end:
        try:
            if head:
                head = head[os.write(sock, head) :]
                continue
            sent = os.sendfile(sock, fd, offset, min(end - offset, SENDFILE_MAX))
        except BlockingIOError:
            _wait_writable(request, writable, sock)
            continue
        except (ConnectionError, TimeoutError):  # the latter: nothing was acknowledged for long (tcp(7), ETIMEDOUT)
            request.gone = True  # the loop may not have noticed yet
            raise ClientDisconnected("the client has closed the connection") from None
        if sent == 0:
            raise OSError("the file became shorter while it was sent")
        offset += sent


def _wait_writable(request: WsgiRequest, writable: select.poll, sock: int) -> None:
    patience = request.stream.context.timeouts.write
    before, deadline = taken_through(sock), time.monotonic() + patience
    while not request.gone:
        if writable.poll(500):
            return
        if time.monotonic() >= deadline:
            now = taken_through(sock)
            if now <= before:
                break
            before, deadline = now, time.monotonic() + patience  # it reads, and the kernel does not want more yet
    request.gone = True
    raise ClientDisconnected("the client does not read any more")
