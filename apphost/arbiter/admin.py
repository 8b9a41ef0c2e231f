"""The service behind `admin`: it starts and restarts the process that answers there, and keeps it informed.

That process cannot hold up the arbiter: what it does not read in time it does not get, and one that reads nothing for a
while, or ends, is replaced.
"""

from __future__ import annotations

import signal
import socket
import time
from typing import TYPE_CHECKING

from apphost.arbiter.history import History
from apphost.arbiter.processes import WorkerProcess, kill, spawn_python
from apphost.arbiter.services import Happening, What, guarded
from apphost.arbiter.status import Status, status
from apphost.logs import Log
from apphost.measures import add, zero
from apphost.messages import Channel
from apphost.settings import Settings
from apphost.sockets import Access, Identity, Listener, describe, identify, open_listeners, parse_bind

if TYPE_CHECKING:
    from apphost.arbiter.arbiter import Arbiter

BACKLOG = 64  # a scraper, probes and some people
INTERVAL = 0.5  # s between two snapshots: what a worker tells is no newer, it beats twice a second
# A snapshot costs some 100 us for each worker: two files of /proc, and adding up what it has counted. With many it
# comes less often, down to one in 2 s from 64 workers on, which is still below what `/healthz` takes for stale.
WORKERS_AT_ONCE = 16
INTERVAL_MAX = 2.0
BLOCKED_MAX = 10.0  # s without reading after which the process is stuck
BACKOFF_FIRST, BACKOFF_MAX = 0.5, 30.0  # s before it is started again; doubles with each end in a row
STEADY_AFTER = 10.0  # s of life after which an end is not one in a row

# As for fork servers: the directory of the start must not shadow a module.
COMMAND = "import sys; sys.path.append(sys.path.pop(0)); from apphost.admin.process import main; main(int(sys.argv[1]))"

# What is told of a worker. Not what it is doing: the paths of requests are for whoever may use the control socket.
_TOLD = (
    "worker", "generation", "pid", "state", "reason", "age", "serving", "silent", "drain_left", "boot_left", "requests",
    "errors", "in_progress", "connections", "rss", "cpu",
)  # fmt: skip
_TOLD_OF_ALL = (
    "version", "python", "pid", "app", "uptime", "state", "ok", "what", "target", "good", "complete", "size",
    "canary_left", "stop_in", "pause_left", "replaced",
)  # fmt: skip


def open_admin(settings: Settings, access: Access, own: dict[str, Identity], log: Log) -> list[Listener]:
    """The listeners for the setting `admin`; `own` notes a Unix socket for removal. Raises `AddressError`."""
    if not settings.admin:
        return []
    address = parse_bind(settings.admin)
    listeners = open_listeners(address, BACKLOG, access)
    if address.path:
        own[address.path] = identify(address.path)
    for listener in listeners:
        log.info(f"admin listener at {describe(listener)}", admin=describe(listener))
    return listeners


class Admin:
    """The service. `history` counts what has become of workers that are gone."""

    title = "admin service"

    def __init__(self, arbiter: Arbiter, listeners: list[Listener], history: History) -> None:
        self.deadline: float | None = time.monotonic()
        self.listeners = listeners
        self._arbiter = arbiter
        self._history = history
        self._cpu: dict[int, float] = {}  # s that each worker had used when it was last looked at
        self._channel: Channel | None = None
        self._pid = 0
        self._started = 0.0
        self._blocked_since: float | None = None
        self._pause = BACKOFF_FIRST
        self._moved_before = self._moved()  # connections that had moved when the last reload was asked for

    # -- the service

    @property
    def log(self) -> Log:
        return self._arbiter.log

    def settle(self, failed: bool) -> None:
        if failed:
            self.deadline = time.monotonic() + BACKOFF_MAX

    @guarded
    def notice(self, happening: Happening) -> None:
        worker = happening.worker
        if happening.what is What.GONE and worker is not None:
            add(self._history.measures, worker.measures)
            self._history.cpu += self._cpu.pop(worker.wid, 0.0)
            if worker.generation == self._arbiter.fleet.target:
                self._moved_before += _moved(worker)  # not because of the reload
        elif happening.what is What.RELOAD_ASKED:
            self._moved_before = self._moved()

    @guarded
    def expire(self, now: float) -> None:
        if self._channel is None:
            self._start(now)
        elif self._channel.blocked:
            self._blocked_since = self._blocked_since or now
            if now - self._blocked_since > BLOCKED_MAX:
                self._arbiter.log.warning(f"the admin process has read nothing for {BLOCKED_MAX:.0f} s")
                self._lost()
                return
        else:
            self._blocked_since = None
            self._arbiter.hub.send(self._channel, {"t": "snapshot", "snapshot": self.snapshot(now)})
        many = len(self._arbiter.workers) / WORKERS_AT_ONCE
        if self._channel is not None:
            self.deadline = now + min(INTERVAL_MAX, INTERVAL * max(1.0, many))

    def close(self) -> None:
        self.deadline = None
        if self._channel is not None:
            self._arbiter.hub.forget(self._channel)
            self._channel = None
        kill(self._pid, signal.SIGKILL)  # it has nothing to finish
        for listener in self.listeners:
            listener.close()

    # -- the process

    def _start(self, now: float) -> None:
        self._started = now
        self._blocked_since = None
        settings = self._arbiter.settings
        fds = [listener.fileno() for listener in self.listeners]
        try:
            self._pid, self._channel = start_process(self._arbiter.source.cwd, fds)
        except OSError as exc:
            self._arbiter.log.error(f"the admin process cannot be started: {exc.strerror}")
            self._retry(now)
            return
        self._arbiter.log.debug(f"admin process started, pid {self._pid}")
        self._arbiter.hub.listen(self._channel, lambda _: None, self._lost)
        account = {"user": settings.user, "group": settings.group}
        logs = {"log_level": settings.log_level, "log_format": settings.log_format}
        self._arbiter.hub.send(self._channel, {"t": "config", "listeners": fds, **account, **logs})
        self._arbiter.hub.send(self._channel, {"t": "snapshot", "snapshot": self.snapshot(now)})

    @guarded
    def _lost(self) -> None:
        """The process is gone, or must go."""
        if self._channel is None:
            return
        self._arbiter.hub.forget(self._channel)
        self._channel = None
        kill(self._pid, signal.SIGKILL)
        self._pid = 0
        now = time.monotonic()
        if now - self._started >= STEADY_AFTER:
            self._pause = BACKOFF_FIRST
        self._arbiter.log.warning(
            f"the admin process is gone; it is started again in {self._pause:.1f} s. Workers are not concerned"
        )
        self._retry(now)

    def _retry(self, now: float) -> None:
        self.deadline = now + self._pause
        self._pause = min(BACKOFF_MAX, self._pause * 2)

    # -- what it is told

    def snapshot(self, now: float) -> Status:
        """JSON-safe; docs/metrics.md names the parts that are shown."""
        arbiter, history = self._arbiter, self._history
        full = status(arbiter, history, now)
        workers = []
        total = zero()
        add(total, history.measures)
        for told in full["workers"]:
            process = arbiter.workers[told["worker"]]
            add(total, process.measures)
            if told["cpu"] is not None:
                self._cpu[process.wid] = told["cpu"]
            names = {name: told[name] for name in _TOLD if name in told}
            phases = process.measures.get("phases", [])
            moves = {"moved": _moved(process), "adopted": sum(process.measures.get("adopted", ()))}
            workers.append({**names, **moves, "phases": phases})
        given_up = full["given_up"]
        return {
            **{name: full[name] for name in _TOLD_OF_ALL},
            "at": round(time.time(), 3),
            "started": round(time.time() - full["uptime"], 3),
            "arbiter": full["figures"],
            "workers": workers,
            "workers_cpu": round(history.cpu + sum(self._cpu.values()), 3),
            "measures": total,
            "reloads": dict(history.reloads),
            "moved_in_reload": max(0, self._moved() - self._moved_before),
            "given_up": None
            if given_up is None
            else {name: given_up.get(name) for name in ("generation", "at", "reason")},
            "ends": [{name: end.get(name) for name in ("at", "worker", "generation", "why")} for end in history.ends],
        }

    def _moved(self) -> int:
        """Connections that have moved because workers of other than the newest code had to go."""
        target = self._arbiter.fleet.target
        living = (worker for worker in self._arbiter.workers.values() if worker.generation != target)
        return self._history.measures["moved"][0] + sum(map(_moved, living))


def _moved(worker: WorkerProcess) -> int:
    return sum(worker.measures.get("moved", ()))


def start_process(cwd: str, listeners: list[int]) -> tuple[int, Channel]:
    """(pid, channel) of a fresh interpreter that serves at `listeners`. Raises `OSError`."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return spawn_python(cwd, COMMAND, [theirs.fileno()], listeners), Channel(ours)
        except OSError:
            ours.close()
            raise
