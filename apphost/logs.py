"""What apphost says: its own log, on standard error or in a file. (The access log is in `access`.)

Not on top of `logging`: an application that configures logging may close, redirect or silence every logger of its
process, and the arbiter's and the workers' words must still come out. A record is one `write`, so that lines of many
processes do not mix.
"""

from __future__ import annotations

import json
import os
import select
import stat
import time
from collections.abc import Callable, Mapping
from typing import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_STDERR = 2
PATIENCE = 1.0  # s; a reader that is only busy comes back sooner, and a worker that hangs longer misses its beats
_PIECE = 4096  # bytes that a pipe takes at once when it is ready to take any: PIPE_BUF of Linux


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


def show_raw() -> Callable[[bytes], str]:
    """How this process shows targets, not yet escaped."""
    return _show_target


def query_hidden() -> bool:
    return _show_target is _without_query


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


# Levels as journald takes them in front of a line (sd-daemon(3)): those of syslog.
_PRIORITIES = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}


def is_journal(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `fd` is the stream to journald that systemd has made for this service (systemd.exec(5))."""
    stream = environ.get("JOURNAL_STREAM", "")
    if not stream:
        return False
    try:
        stat = os.fstat(fd)
    except OSError:
        return False
    return stream == f"{stat.st_dev}:{stat.st_ino}"


def format_journal(_when: float, level: str, pid: int, message: str, detail: str, _fields: dict[str, Any]) -> str:
    """`<6>[4711] worker 1 gen 1 ready in 0.41 s`: journald has the time already. Each line of the detail has the
    priority again, as journald makes a record of each line."""
    priority = _PRIORITIES[level]
    line = f"{priority}[{pid}] {escape(message)}\n"
    return line + "".join(f"{priority}    {text}\n" for text in map(escape, detail.splitlines())) if detail else line


def _format_journal_json(when: float, level: str, pid: int, message: str, detail: str, fields: dict[str, Any]) -> str:
    return _PRIORITIES[level] + format_json(when, level, pid, message, detail, fields)


_JOURNAL_FORMATS = {"text": format_journal, "json": _format_journal_json}


class Log:
    """The server's own log. `level` is the least that is written, `style` a key of `FORMATS`, `fd` where it goes.

    relay: also called with (level, message, detail) of each record, from any thread; None: nobody.
    """

    relay: Callable[[str, str, str], None] | None = None

    def __init__(self, level: str = "info", style: str = "text", fd: int = _STDERR) -> None:
        self.fd = fd
        self._outlet = Outlet(fd)
        self.adopt(level, style)

    def adopt(self, level: str, style: str) -> None:
        """Go on with another level and style."""
        self._least = LEVELS[level]
        self._format = (_JOURNAL_FORMATS if is_journal(self.fd) else FORMATS)[style]

    def write(self, level: str, message: str, detail: str = "", **fields: Any) -> None:
        """Write one record. `fields` are machine-readable extras that the text form leaves out."""
        if LEVELS[level] >= self._least:
            lost = self._outlet.take_lost()
            if lost:
                self.warning(
                    f"{lost} records of this log were dropped here: nobody read them for more than {PATIENCE:g} s"
                )
            self._outlet.write(self._format(time.time(), level, os.getpid(), message, detail, fields).encode())
            if self.relay is not None:
                self.relay(level, message, detail)

    def debug(self, message: str, detail: str = "", **fields: Any) -> None:
        self.write("debug", message, detail, **fields)

    def info(self, message: str, detail: str = "", **fields: Any) -> None:
        self.write("info", message, detail, **fields)

    def warning(self, message: str, detail: str = "", **fields: Any) -> None:
        self.write("warning", message, detail, **fields)

    def error(self, message: str, detail: str = "", **fields: Any) -> None:
        self.write("error", message, detail, **fields)


class Outlet:
    """A descriptor that logs go to, and that nobody waits for long.

    A pipe whose reader has stopped (a pager, a collector that hangs, a parent that never reads) is waited for once, for
    `PATIENCE`. From then on records are dropped and counted in `lost` until it takes some again: a log must not stop a
    server, and least of all one that is told to end.
    """

    __slots__ = ("_torn", "fd", "lost")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.lost = 0
        self._torn = False  # the last record is there in part

    def write(self, data: bytes, records: int = 1) -> None:
        """Write `data`, which is so many `records`. Without a word if its reader is gone for good."""
        if self._torn and self.flows(0):
            data = b"\n" + data
            self._torn = False
        began = len(data)
        while data:
            if not self.flows(0 if self.lost else PATIENCE):
                self.lost += records
                self._torn = self._torn or len(data) < began
                return
            try:
                data = data[os.write(self.fd, data if len(data) <= _PIECE else self._piece(data)) :]
            except OSError:
                return

    def flows(self, patience: float) -> bool:
        """Whether a write of `_PIECE` bytes would not block, now or within so many seconds."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(patience * 1000))  # an error is for the write to find

    def take_lost(self) -> int:
        """How many records were dropped, to be told once now that it flows again; 0 as long as it does not."""
        if not self.lost or not self.flows(0):
            return 0
        lost, self.lost = self.lost, 0
        return lost

    def _piece(self, data: bytes) -> bytes:
        try:
            return data if stat.S_ISREG(os.fstat(self.fd).st_mode) else data[:_PIECE]
        except OSError:
            return data


# Names of descriptors that are there already. Opening them anew fails for a pipe of another user, and for a socket.
_STANDARD = {"-": 1, "/dev/stdout": 1, "/dev/fd/1": 1, "/dev/stderr": 2, "/dev/fd/2": 2}


def open_log(target: str, directory: str = "", follow: bool = True) -> int:
    """A descriptor of its own for a log: `-` is standard output, anything else a file below `directory` to append to.

    Of its own, so that an application that closes or redirects its standard output neither takes the log away nor gets
    its lines into a file that has come to have the number. A new file is for its owner and group only, since query
    strings can hold secrets. follow: whether its name may be a symbolic link. Raises OSError.
    """
    if target in _STANDARD:
        try:
            return os.dup(_STANDARD[target])
        except OSError:  # it was closed by whoever has started us: there is nobody to read
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    return os.open(os.path.join(directory, target), flags, 0o640)
