"""What apphost says: its own log on standard error, and the access log.

Not on top of `logging`: an application that configures logging may close, redirect or silence every logger of its
process, and the arbiter's and the workers' words must still come out. A record is one `write`, so that lines of many
processes do not mix.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from apphost.protocols.exchange import Exchange
    from apphost.protocols.http1 import Connection

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_STDERR = 2
_FLUSH_SIZE = 65536  # bytes of access log that are written out without waiting for the end of the loop's turn


def escape(text: str) -> str:
    """`text` with every control and every other unprintable character escaped: safe in one line of a log."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _with_query(target: bytes) -> str:
    return target.decode("latin-1")


def _without_query(target: bytes) -> str:
    path, question, _ = target.partition(b"?")
    return path.decode("latin-1") + ("?..." if question else "")


_show_target = _with_query


def hide_queries(hide: bool) -> None:
    """Whether this process leaves query strings out of all that it logs. Decided once, when a worker starts."""
    global _show_target
    _show_target = _without_query if hide else _with_query


def show_target(target: bytes) -> str:
    """The target of a request as the server's own log has it."""
    return escape(_show_target(target))


def _json(record: dict[str, Any]) -> str:
    """One line. JSON may hold DEL as it is, which to a terminal is a control as well."""
    return json.dumps(record, default=str).replace("\x7f", "\\u007f") + "\n"


def format_text(when: float, level: str, pid: int, message: str, detail: str, _fields: dict[str, Any]) -> str:
    """`2026-11-22 09:00:00.123 +0000 [4711] info worker 1 gen 1 ready in 0.41 s`, the detail below it, indented."""
    local = time.localtime(when)
    stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', local)}.{int(when % 1 * 1000):03d} {time.strftime('%z', local)}"
    line = f"{stamp} [{pid}] {level} {escape(message)}\n"
    return line + "".join(f"    {text}\n" for text in map(escape, detail.splitlines())) if detail else line


def format_json(when: float, level: str, pid: int, message: str, detail: str, fields: dict[str, Any]) -> str:
    """One JSON object a line: time (ISO 8601, UTC), level, pid, message, detail when there is one, then `fields`."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when)) + f".{int(when % 1 * 1000):03d}Z"
    record = {"time": stamp, "level": level, "pid": pid, "message": message}
    if detail:
        record["detail"] = detail
    return _json({**record, **fields})


FORMATS: dict[str, Callable[[float, str, int, str, str, dict[str, Any]], str]] = {
    "text": format_text,
    "json": format_json,
}


class Log:
    """The server's own log. `level` is the least that is written, `style` a key of `FORMATS`, `fd` where it goes."""

    def __init__(self, level: str = "info", style: str = "text", fd: int = _STDERR) -> None:
        self._least = LEVELS[level]
        self._format = FORMATS[style]
        self._fd = fd

    def write(self, level: str, message: str, detail: str = "", **fields: Any) -> None:
        """Write one record. `fields` are machine-readable extras that the text form leaves out."""
        if LEVELS[level] >= self._least:
            write_all(self._fd, self._format(time.time(), level, os.getpid(), message, detail, fields).encode())

    def debug(self, message: str, detail: str = "", **fields: Any) -> None:
        self.write("debug", message, detail, **fields)

    def info(self, message: str, detail: str = "", **fields: Any) -> None:
        self.write("info", message, detail, **fields)

    def warning(self, message: str, detail: str = "", **fields: Any) -> None:
        self.write("warning", message, detail, **fields)

    def error(self, message: str, detail: str = "", **fields: Any) -> None:
        self.write("error", message, detail, **fields)


def write_all(fd: int, data: bytes) -> None:
    """Write `data`, as far as the other end exists: a log that cannot be written never stops a server."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except OSError:
            return


class AccessLog:
    """One line a request, gathered during a turn of the loop and written at once after it.

    Text is the Common Log Format with the duration in seconds behind it:
    `127.0.0.1 - - [22/Nov/2026:09:00:00 +0000] "GET / HTTP/1.1" 200 13 0.000213`. Targets are visible ASCII (the strict
    layer sees to it) and still percent-encoded, so quotes and backslashes are all that must be escaped.
    """

    def __init__(self, fd: int, style: str, loop: asyncio.AbstractEventLoop) -> None:
        self._fd = fd
        self._show = _show_target
        self._line = self._json_line if style == "json" else self._text_line
        self._loop = loop
        self._lines: list[str] = []
        self._size = 0
        self._second = -1
        self._stamp = ""

    def write(self, exchange: Exchange, cut: bool = False) -> None:
        """Note a finished exchange; `cut`: its response is incomplete."""
        head = exchange.head
        target = self._show(head.target)
        client = exchange.client[0] if exchange.client else "-"
        duration = time.perf_counter() - exchange.started_at
        status = exchange.status or 499  # nginx's code for a client that left before it got an answer
        self._add(self._line(client, head.method, target, head.version, status, exchange.sent, duration, cut))

    def write_refusal(self, connection: Connection, status: int) -> None:
        """Note a request that was refused before it could be understood."""
        client = connection.client[0] if connection.client else "-"
        self._add(self._line(client, "-", "-", "-", status, 0, 0.0, False))

    def _add(self, line: str) -> None:
        if not self._lines:
            self._loop.call_soon(self.flush)
        self._lines.append(line)
        self._size += len(line)
        if self._size > _FLUSH_SIZE:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            data = "".join(self._lines).encode("latin-1", "backslashreplace")
            self._lines.clear()
            self._size = 0
            write_all(self._fd, data)

    def _text_line(
        self, client: str, method: str, target: str, version: str, status: int, sent: int, duration: float, cut: bool
    ) -> str:
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._stamp = time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(now))
        if '"' in target or "\\" in target:
            target = target.replace("\\", "\\x5c").replace('"', "\\x22")
        tail = " cut\n" if cut else "\n"
        request = f"{method} {target} HTTP/{version}" if method != "-" else "-"
        return f'{client} - - [{self._stamp}] "{request}" {status} {sent} {duration:.6f}{tail}'

    def _json_line(
        self, client: str, method: str, target: str, version: str, status: int, sent: int, duration: float, cut: bool
    ) -> str:
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": client,
            "method": method,
            "target": target,
            "version": version,
            "status": status,
            "bytes": sent,
            "duration": round(duration, 6),
            "cut": cut,
        }
        return _json(record)


# Names of descriptors that are there already. Opening them anew fails for a pipe of another user, and for a socket.
_STANDARD = {"-": 1, "/dev/stdout": 1, "/dev/fd/1": 1, "/dev/stderr": 2, "/dev/fd/2": 2}


def open_access_log(target: str, directory: str = "", follow: bool = True) -> int:
    """The descriptor for an access log: `-` is standard output, anything else a file below `directory` to append to.

    A new file is for its owner and group only, since query strings can hold secrets. follow: whether its name may be a
    symbolic link. Raises OSError.
    """
    if target in _STANDARD:
        return _STANDARD[target]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    return os.open(os.path.join(directory, target), flags, 0o640)
