"""Opening logs for the settings: files, standard descriptors, syslog. Done while the process still may (root).

An arbiter opens its own log at its start, and again at each order to reload; a fork server opens both logs for the
workers of its generation. So each generation has what the names mean at its start, and a file that was renamed keeps
the lines of the workers that drain.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from apphost.access import FileSink, Sink, describe_error
from apphost.errors import PrivilegesError, SettingsError
from apphost.logs import Log, open_log
from apphost.privileges import Account
from apphost.settings import Settings

DEV_LOG = "/dev/log"
_SYSLOG_PORT = 514  # RFC 5426, 3.3
# RFC 5424, 6.1: a receiver should take 2048 bytes and may take more; rsyslog's `maxMessageSize` is 8 KiB.
SYSLOG_MAX = 8192
SILENCE = 10.0  # s between two lines in the log that say how many were dropped
_USER_INFO = 1 * 8 + 6  # facility user, severity info: what syslog(3) and gunicorn take


def open_log_file(what: str, target: str, directory: str, account: Account | None) -> int:
    """The descriptor of `target`; `what` is its name for people. Raises `PrivilegesError`."""
    as_root = account is not None and account.uid != 0 and os.geteuid() == 0
    try:
        return open_log(target, directory, follow=not as_root)
    except OSError as exc:
        why = exc.strerror
        if as_root and exc.errno in (errno.ELOOP, errno.EMLINK):  # the latter on BSDs
            why = "it is a symbolic link, and root follows none where the workers have another user"
        raise PrivilegesError(f"cannot open the {what} log {target}: {why}") from None


def open_own_log(settings: Settings, directory: str, account: Account | None) -> Log:
    """The server's own log. `directory`: where relative names begin. Raises `PrivilegesError`."""
    fd = open_log_file("error", settings.error_log or "/dev/stderr", directory, account)
    return Log(settings.log_level, settings.log_format, fd)


def open_access_sink(settings: Settings, directory: str, account: Account | None, log: Log) -> Sink | None:
    """Where the access log goes, for all workers of a generation; None without one. Raises `ApphostError`."""
    target = settings.access_log
    if not target:
        return None
    if target.startswith("syslog:"):
        return open_syslog(target.removeprefix("syslog:"), log)
    return FileSink(open_log_file("access", target, directory, account), log)


def parse_syslog(where: str) -> str | tuple[str, int]:
    """`` or `PATH` to the path of a socket, `udp://HOST[:PORT]` to (host, port). Raises `ValueError`."""
    if not where.startswith("udp:"):
        if where and not where.startswith("/"):
            raise ValueError("expected syslog:, syslog:/PATH or syslog:udp://HOST:PORT")
        return where or DEV_LOG
    host, colon, port = where.removeprefix("udp://").rpartition(":")
    if not where.startswith("udp://") or (colon and not port.isdecimal() and not port.endswith("]")):
        raise ValueError("expected syslog:udp://HOST:PORT")
    if not colon or port.endswith("]"):
        host, port = where.removeprefix("udp://"), str(_SYSLOG_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not 0 < int(port) < 65536:
        raise ValueError("expected syslog:udp://HOST:PORT")
    return host, int(port)


def open_syslog(where: str, log: Log) -> SyslogSink:
    """Raises `SettingsError`. A daemon that is not there is no error: it may come, and lines wait for nobody."""
    place = parse_syslog(where)
    if isinstance(place, str):
        return SyslogSink(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), place, _local_header, log)
    try:
        found = socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)
    except OSError as exc:
        raise SettingsError(
            f"the access log cannot go to syslog at {place[0]}: that name has no address ({describe_error(exc)})"
        ) from None
    family, kind, protocol, _, address = found[0]
    return SyslogSink(socket.socket(family, kind, protocol), address, _network_header, log)


def _local_header() -> str:
    """What syslog(3) writes to the socket of this machine's daemon (RFC 3164, without the host)."""
    return f"<{_USER_INFO}>{time.strftime('%b %e %H:%M:%S')} apphost[{os.getpid()}]: "


def _network_header() -> str:
    """RFC 5424, 6.2: version, time, host, name of the application, process, kind of message, no structured data."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    host = "".join(char for char in socket.gethostname() if "!" <= char <= "~")[:255] or "-"
    return f"<{_USER_INFO}>1 {stamp} {host} apphost {os.getpid()} access - "


class SyslogSink:
    """A datagram for each line. What the daemon does not take at once is dropped and counted: a worker waits for no
    log. Nothing is connected, so that a daemon which starts anew is found again."""

    def __init__(self, sock: socket.socket, address: Any, header: Callable[[], str], log: Log) -> None:
        self._sock = sock
        sock.setblocking(False)
        self._address = address
        self._header = header
        self._log = log
        self._dropped = 0
        self._quiet_until = 0.0

    def close(self) -> None:
        self._sock.close()

    def write(self, lines: list[str]) -> None:
        header = self._header()
        why = ""
        for line in lines:
            try:
                self._sock.sendto((header + line).encode("utf-8", "backslashreplace")[:SYSLOG_MAX], self._address)
            except OSError as exc:
                self._dropped += 1
                why = describe_error(exc)
        if why and time.monotonic() >= self._quiet_until:
            self._log.warning(
                f"syslog at {self._address} does not take the access log ({why}); lines dropped: {self._dropped}"
            )
            self._dropped = 0
            self._quiet_until = time.monotonic() + SILENCE
