"""What `apphost status` tells, as one JSON-safe object; docs/control.md has the keys. Reads, and changes nothing."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import apphost
from apphost.arbiter.clock import Clock
from apphost.arbiter.fleet import KILL_GRACE
from apphost.arbiter.fleet import Worker as Member
from apphost.arbiter.history import History
from apphost.arbiter.processes import WorkerProcess
from apphost.arbiter.reports import counted
from apphost.lifecycle import State
from apphost.settings import SETTINGS
from apphost.sockets import describe

if TYPE_CHECKING:
    from apphost.arbiter.arbiter import Arbiter

SILENT_AFTER = 2.0  # s without a beat, which comes twice a second, before a worker is said to be silent

Status = dict[str, Any]


def status(arbiter: Arbiter, history: History, now: float) -> Status:
    """`now`: monotonic. Times are seconds, sizes bytes; `at` is Unix time."""
    fleet = arbiter.fleet
    settings = arbiter.settings
    clock = arbiter.clock
    workers = [worker_status(worker, fleet.workers.get(wid), now, clock) for wid, worker in arbiter.workers.items()]
    state, what = _state(arbiter, workers)
    given_up = history.given_up
    ok = state == "serving" and not given_up and not _silent(workers)
    if state == "serving" and given_up:
        serves = "an error page is served" if fleet.good == fleet.stand_in else f"generation {fleet.good} serves on"
        what = f"the last reload was given up, {serves}"
    return {
        "version": apphost.__version__,
        "python": platform.python_version(),
        "pid": os.getpid(),
        "app": settings.app,
        "cwd": arbiter.source.cwd,
        "uptime": round(now - history.started, 3),
        "state": state,
        "ok": ok,
        "what": what,
        "target": fleet.target,
        "good": fleet.good,
        "complete": fleet.complete,
        "reload_waits": fleet.again,
        "size": fleet.size,
        "canary_left": _left(fleet.canary_until, clock),
        "stop_in": None if fleet.stopping else _left(fleet.stop_at, clock),
        "pause_left": _left(fleet.not_before, clock),
        "listening": [
            describe(listener, bool(settings.tls_certfile)) for listener in arbiter.listeners if listener.fileno() >= 0
        ],
        "workers": workers,
        "fork_servers": [{"generation": g, "pid": server.pid} for g, server in arbiter.fork_servers.running.items()],
        "figures": figures(os.getpid()),
        "replaced": dict(history.replaced),
        "ends": list(history.ends),
        "given_up": given_up,
        "settings": {
            name: value
            for name, value in settings.to_wire().items()
            if getattr(settings, name) != SETTINGS[name].default
        },
    }


def _state(arbiter: Arbiter, workers: list[Status]) -> tuple[str, str]:
    """One word for machines, and a few for people."""
    fleet = arbiter.fleet
    ready = sum(worker["state"] == State.READY.value for worker in workers)
    if fleet.stopping:
        return "stopping", f"stopping, {counted(len(workers), 'worker')} left"
    if fleet.stop_at is not None:
        return "stopping", "told to stop; serving on for shutdown_delay"
    if not fleet.good:
        return "starting", "starting, nothing is ready yet"
    if fleet.complete != fleet.target:
        fresh = sum(worker["state"] == State.READY.value and worker["generation"] == fleet.target for worker in workers)
        probation = ", on probation" if fleet.canary_until is not None else ""
        return "reloading", f"reloading: {fresh} of {fleet.size} workers are of generation {fleet.target}{probation}"
    if ready < fleet.size:
        return "short", f"only {ready} of {fleet.size} workers are ready"
    silent = _silent(workers)
    if silent:
        return "serving", f"serving, but worker {', '.join(map(str, silent))} does not answer"
    return "serving", "serving, all is well"


def _silent(workers: list[Status]) -> list[int]:
    """Those that should serve and do not answer; one that drains is on its way out anyhow."""
    return [worker["worker"] for worker in workers if "silent" in worker and worker["state"] == State.READY.value]


def worker_status(worker: WorkerProcess, member: Member | None, now: float, clock: Clock) -> Status:
    """`member`: what the fleet knows of it; its deadline is of the `clock`."""
    result: Status = {
        "worker": worker.wid,
        "generation": worker.generation,
        "pid": worker.pid,
        "state": (member.state if member is not None else State.GONE).value,
        "age": round(now - worker.born, 3),
        "serving": None if worker.ready_at is None else round(now - worker.ready_at, 3),
        "requests": worker.requests,
        "errors": worker.errors,
        "in_progress": worker.active,
        "connections": worker.connections,
        "oldest": _oldest(worker, now),
        "code": worker.code,
        **worker.names,
        **figures(worker.pid),
    }
    if member is not None:
        result["reason"] = str(member.reason) if member.reason is not None else None
        if member.state is State.DRAINING and not member.killed:
            result["drain_left"] = _left((member.deadline or clock.now) - KILL_GRACE, clock)
        elif member.state is State.BOOTING:
            result["boot_left"] = _left(member.deadline, clock)
        if worker.ready_at is not None and worker.beat_at is not None and now - worker.beat_at > SILENT_AFTER:
            result["silent"] = round(now - worker.beat_at, 3)
    return result


def _left(deadline: float | None, clock: Clock) -> float | None:
    return None if deadline is None else round(max(0.0, clock.until(deadline)), 3)


def _oldest(worker: WorkerProcess, now: float) -> Status | None:
    """The request that has been in progress for the longest time, as of the last beat."""
    if not worker.oldest or worker.beat_at is None:
        return None
    seconds, what = worker.oldest
    return {"seconds": round(float(seconds) + now - worker.beat_at, 3), "request": str(what)}


def figures(pid: int) -> dict[str, Any]:
    """`rss` (bytes) and `cpu` (s, user and system) of a process, None where the system does not tell.

    Both files are cheap for the kernel. PSS is not: it walks all pages, so the command that wants it reads it itself.
    """
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with open(f"/proc/{pid}/stat", "rb") as file:  # proc(5): the name, in brackets, may contain anything
            fields = file.read().rpartition(b")")[2].split()
        return {"rss": rss, "cpu": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")}
    except (OSError, ValueError, IndexError):
        return {"rss": None, "cpu": None}
