"""Development mode (`--reload`): the service that keeps a watcher process and asks for a reload when files change.

The watcher is a process of its own, since it uses threads and modules that the arbiter does without, and may take its
time. It ends with its channel, and so with the arbiter; when it dies it is started anew, and told since when it should
look for changes, so that none is lost.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apphost.arbiter.processes import Failure, kill, start_process
from apphost.arbiter.services import Happening, What
from apphost.arbiter.vocabulary import ReloadAsked
from apphost.errors import ExitCode
from apphost.messages import Channel, Message
from apphost.settings import Settings
from apphost.sockets import parse_bind
from apphost.sources import Source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apphost.arbiter.arbiter import Arbiter

COMMAND = (
    "import sys; sys.path.append(sys.path.pop(0)); from apphost.watcher.main import main; main(*map(int, sys.argv[1:]))"
)
BACKOFF_FIRST, BACKOFF_MAX = 0.1, 10.0  # s before a watcher that has died is started again; doubles each time
STEADY_AFTER = 10.0  # s after which its death no longer counts as one in a row
# s after a generation is complete, before the fork server of the next one is started: the browser that waits for the
# new code comes first.
SPARE_DELAY = 0.3
NAMED = 3  # of the files that have changed, in the log

_LOOPBACK = ("127.", "[::1]", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class _Watcher:
    pid: int
    channel: Channel
    born: float
    order: Message


class Development:
    """The service. `deadline` is that of what comes first: a watcher, or the spare fork server."""

    def __init__(self, arbiter: Arbiter) -> None:
        self._arbiter = arbiter
        self._watcher: _Watcher | None = None
        self._since = time.time_ns()  # what has changed after it may not be served
        self._start_at: float | None = time.monotonic()  # when a watcher is due
        self._spare_at: float | None = None  # when a spare fork server is
        self._deaths = 0  # in a row
        self._failure: tuple[int, Failure | None] = (0, None)  # the generation given up last, and why
        arbiter.fork_servers.extras = self._extras
        for warning in warnings(arbiter.settings, os.geteuid()):
            arbiter.log.warning(warning)

    @property
    def deadline(self) -> float | None:
        return min((due for due in (self._start_at, self._spare_at) if due is not None), default=None)

    def expire(self, now: float) -> None:
        if self._start_at is not None and self._start_at <= now:
            self._start_at = None
            self._start()
        if self._spare_at is not None and self._spare_at <= now:
            self._spare_at = None
            self._prepare()

    def notice(self, happening: Happening) -> None:
        what = happening.what
        if what is What.RELOAD_ASKED:
            self._since = time.time_ns()
            self._spare_at = None
        elif what is What.GIVEN_UP:
            self._failure = happening.generation, happening.failure
            self._spare_at = time.monotonic() + SPARE_DELAY
        elif what in (What.COMPLETE, What.STANDS_IN):
            self._spare_at = time.monotonic() + SPARE_DELAY
            if self._watcher is not None and self._order() != self._watcher.order:
                self._end()  # the settings say something else by now
                self._start_at = time.monotonic()
        elif what is What.STOP_ASKED:
            self.close()

    def close(self) -> None:
        self._start_at = self._spare_at = None
        self._end()
        self._arbiter.fork_servers.dismiss_spare()  # it holds the listeners open

    # -- the watcher

    def _order(self) -> Message:
        return watch_order(self._arbiter.settings, self._arbiter.source, os.environ)

    def _start(self) -> None:
        order = self._order()
        try:
            pid, channel, dump = start_process(COMMAND, self._arbiter.source.cwd, [])
        except OSError as exc:
            self._arbiter.log.error(f"the watcher of files could not be started: {exc.strerror}")
            self._try_again()
            return
        os.close(dump)
        self._watcher = _Watcher(pid, channel, time.monotonic(), order)
        self._arbiter.hub.listen(channel, self._hear, self._died)
        self._arbiter.hub.send(channel, {"t": "watch", **order, "since": self._since})

    def _hear(self, message: Message) -> None:
        kind = message["t"]
        if kind == "changed":
            paths, count = message["paths"][:NAMED], message["count"]
            cwd = os.path.join(self._arbiter.source.cwd, "")
            named = ", ".join(path.removeprefix(cwd) for path in paths)
            more = f" and {count - len(paths)} more" if count > len(paths) else ""
            self._arbiter.ask(ReloadAsked(), f"change of {named}{more}")
        elif kind == "watching":
            roots = ", ".join(self._watcher.order["roots"]) if self._watcher is not None else ""
            self._arbiter.log.info(f"watching {message['files']} files in {roots} ({message['how']})")
        elif kind == "note":
            self._arbiter.log.warning(message["text"])
            if message.get("fatal") is True:
                self._end()

    def _died(self) -> None:
        watcher = self._watcher
        if watcher is None:
            return
        steady = time.monotonic() - watcher.born >= STEADY_AFTER
        self._deaths = 0 if steady else self._deaths
        self._arbiter.log.warning("the watcher of files is gone; another one takes its place")
        self._end()
        self._try_again()

    def _try_again(self) -> None:
        self._start_at = time.monotonic() + min(BACKOFF_MAX, BACKOFF_FIRST * 2**self._deaths)
        self._deaths = min(self._deaths + 1, 16)

    def _end(self) -> None:
        if self._watcher is not None:
            self._arbiter.hub.forget(self._watcher.channel)
            kill(self._watcher.pid, signal.SIGKILL)
            self._watcher = None

    # -- fork servers

    def _prepare(self) -> None:
        try:
            self._arbiter.fork_servers.prepare(self._arbiter.settings)
        except OSError as exc:
            self._arbiter.log.debug(f"no fork server could be started in advance: {exc.strerror}")

    def _extras(self, generation: int) -> Message:
        """What the fork server of `generation` is told besides: of a stand-in, the failure that it shows."""
        if generation != self._arbiter.fleet.stand_in:
            return {}
        number, failure = self._failure
        failure = failure or Failure("the application could not be started; the log says why", "", ExitCode.APPLICATION)
        return {"failure": {"message": failure.message, "detail": failure.detail, "generation": number}}


def watch_order(settings: Settings, source: Source, environ: Mapping[str, str]) -> Message:
    """What the watcher is told to watch: paths as the user wrote them, with symbolic links. Pure."""
    directory = os.path.join(source.cwd, settings.chdir) if settings.chdir else source.cwd
    named = settings.reload_dir or ("", *settings.pythonpath)
    roots = dict.fromkeys(os.path.normpath(os.path.join(directory, each)) for each in named)
    return {
        "roots": list(roots),
        "files": list(source.files(environ)),
        "include": list(settings.reload_include),
        "exclude": list(settings.reload_exclude),
        "engine": settings.reload_engine,
        "user": settings.user,
        "group": settings.group,
    }


def warnings(settings: Settings, euid: int) -> list[str]:
    """What is unwise together with `reload`. Pure."""
    found = []
    hosts = [parse_bind(each).host for each in settings.bind]
    public = [host for host in hosts if host and not host.startswith(_LOOPBACK)]
    if public:
        found.append(
            f"reload is for development, and this listens at {public[0]}: whoever can connect sees the error page with "
            "its traceback"
        )
    if euid == 0 and not settings.user:
        found.append("reload is for development, and this runs as root: so does all code that is saved here")
    if settings.workers > 1:
        found.append(
            f"reload with {settings.workers} workers: a save is served by all of them only after each has booted"
        )
    return found
