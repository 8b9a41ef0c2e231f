"""The arbiter: feeds events to the fleet and performs the actions that the fleet answers.

It never waits for a process, reads no application code, and speaks no protocol but that of its channels.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from apphost.arbiter import canary, reports, successors
from apphost.arbiter import vocabulary as v
from apphost.arbiter.clock import NAP, Clock
from apphost.arbiter.fleet import Fleet, next_deadline, step
from apphost.arbiter.forkservers import REST_READS, ForkServers
from apphost.arbiter.hub import Hub
from apphost.arbiter.processes import (
    Failure,
    ForkServer,
    WorkerProcess,
    become_subreaper,
    kill,
    make_dump_file,
    reap,
)
from apphost.arbiter.reports import Report, fleet_config, who
from apphost.arbiter.services import Happening, Service, What
from apphost.arbiter.upgrade import Upgrade
from apphost.errors import ExitCode
from apphost.lifecycle import State
from apphost.logs import Log
from apphost.messages import DUMP_SIGNAL, Channel, Message
from apphost.settings import Settings
from apphost.sockets import Listener
from apphost.sources import Loaded, Source

LOST_GRACE = 1.0  # s between the end of a worker's channel and the report of its exit, when all is well
NEVER = float("inf")
MANY = 16  # workers; the beats of so many come at the same moments (`worker/server.py`), some milliseconds apart
GATHER = 0.005  # s for which the arbiter lets them come, after one, to take up all with one waking
END_GRACE = 1.0  # s that fork servers get to end after the last worker

_SIGNALS: dict[signal.Signals, v.Event] = {
    signal.SIGHUP: v.ReloadAsked(),
    signal.SIGUSR1: v.ReloadAsked(),
    signal.SIGTERM: v.StopAsked(),
    signal.SIGINT: v.StopAsked(),
    signal.SIGQUIT: v.StopAsked(now=True),
    signal.SIGTTIN: v.ScaleAsked(+1),
    signal.SIGTTOU: v.ScaleAsked(-1),
}


class Arbiter:
    """One arbiter. What is in `services` when it runs is told of everything that happens."""

    def __init__(
        self,
        loaded: Loaded,
        source: Source,
        listeners: list[Listener],
        log: Log,
    ) -> None:
        self.upgrade: Upgrade | None = None  # None: it cannot replace its program
        self.settings = loaded.settings
        self.source = source
        self.listeners = listeners
        self.log = log
        self.hub = Hub(log)
        self.clock = Clock()
        self.fleet = Fleet(fleet_config(loaded.settings))
        self.workers: dict[int, WorkerProcess] = {}
        self.fork_servers = ForkServers(self.hub, source, listeners, self._hear_of_worker)
        self.services: list[Service] = []
        self._events: deque[v.Event] = deque()
        self._asked_at: dict[int, float] = {}  # generation to the moment its first worker was asked for
        self._stirred = True  # something has happened, other than beats, since `_settle`
        self._due = 0.0  # by the clock; nothing needs to be settled before, unless something happens
        self._exit: ExitCode | None = None
        self._failures: dict[int, Failure] = {}  # generation to why its first worker failed
        self._canary: tuple[int, dict[int, canary.Answers]] | None = None  # its wid; the old workers' counts before it
        self._subreaper = become_subreaper()

    # -- the loop

    def run(self, first: v.Event = v.Tick()) -> int:  # noqa: B008 - immutable
        """Run until there is nothing left to do; the exit code."""
        self.hub.catch((*_SIGNALS, signal.SIGUSR2, signal.SIGCHLD))
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self.clock.turn()
        self._feed(first)
        while self._exit is None:
            todo = self.hub.wait(self._timeout())
            if lost := self.clock.turn():
                self.log.warning(f"the arbiter stood still for {lost:.1f} s; no deadline of a worker counts that")
            # First: a TERM that everybody has got must not be taken for the death of a worker that was quicker.
            self._take_signals()
            for do in todo:
                do()
            self._reap()
            if not self._settle() and len(self.workers) >= MANY:
                self.hub.gather(GATHER)
            self._expire()
        self._end()
        return self._exit

    def _settle(self) -> bool:
        """Do what is due, and what follows from all that has happened in this turn; whether there was anything.

        Not after mere beats, which move deadlines away: 64 workers send 128 a second, and this looks at all of them.
        """
        if not self._stirred and self.clock.now < self._due:
            return False
        self._notice_lost_workers()
        self._feed(v.Tick())
        self.fork_servers.retire(self.fleet.generations)
        deadlines = [w.lost_at + LOST_GRACE for w in self.workers.values() if w.lost_at is not None]
        self._due = min((*deadlines, next_deadline(self.fleet) or NEVER))
        self._stirred = False
        return True

    def _timeout(self) -> float:
        if self._stirred:
            return 0.0
        due = min((each.deadline for each in self.services if each.deadline is not None), default=NEVER)
        return max(0.0, min(NAP, self.clock.until(self._due), due - time.monotonic()))

    def _expire(self) -> None:
        now = time.monotonic()
        for service in self.services:
            if service.deadline is not None and service.deadline <= now:
                service.expire(now)

    def ask(self, event: v.Event, by: str) -> None:
        """An order for the fleet. `by`: who gave it, for the log, as in `SIGTERM` or `apphost stop`."""
        self.log.info(f"{by} received")
        if not self.fleet.stopping and isinstance(event, (v.ReloadAsked, v.StopAsked)):
            self.tell(What.RELOAD_ASKED if isinstance(event, v.ReloadAsked) else What.STOP_ASKED, text=by)
        self._feed(event)

    def tell(self, what: What, **about: Any) -> None:
        """Have every service know that this has happened."""
        happening = Happening(what=what, **about)
        for service in self.services:
            service.notice(happening)

    def _feed(self, event: v.Event) -> None:
        """Tell the fleet, and do what it says. What happens while it is done comes after it."""
        self._stirred = self._stirred or type(event) is not v.WorkerBeat
        self._events.append(event)
        if len(self._events) > 1:
            return
        while self._events:
            event = self._events[0]
            actions = step(self.fleet, event, self.clock.now)
            if isinstance(event, v.WorkerReady):  # before what follows from it is told
                self.tell(What.READY, worker=self.workers.get(event.wid))
            for action in actions:
                _PERFORM[type(action)](self, action)
            self._events.popleft()

    def _say(self, report: Report, **fields: Any) -> None:
        self.log.write(report.level, report.message, report.detail, **fields)

    # -- signals and children

    def _take_signals(self) -> None:
        for number in self.hub.signals():
            event = _SIGNALS.get(number)
            if event is not None:
                self.ask(event, number.name)
            elif number == signal.SIGUSR2 and self.upgrade is not None and not self.fleet.stopping:
                self.log.info("SIGUSR2 received: the new program is tried")
                self.upgrade.begin()

    def _reap(self) -> None:
        for pid, status in reap():
            if self.upgrade is not None and self.upgrade.tried(pid, status):
                continue
            server = self.fork_servers.by_pid(pid)
            if server is not None:
                self._fork_server_ended(server, status)
                continue
            worker = next((w for w in self.workers.values() if w.pid == pid), None)
            if worker is not None:  # its fork server died before it
                self._worker_ended(worker, status)

    def _notice_lost_workers(self) -> None:
        """A worker whose channel has ended without its exit being reported."""
        for worker in list(self.workers.values()):
            if worker.lost_at is None or self.clock.now < worker.lost_at + LOST_GRACE:
                continue
            if self.fork_servers.get(worker.generation) is None and not self._subreaper:
                self._worker_ended(worker, None)
            else:
                worker.lost_at = None
                self.log.warning(f"{worker.name} has lost its channel and must go")
                worker.expected = True
                self._feed(v.WorkerLeaves(worker.wid))

    def _fork_server_ended(self, server: ForkServer, status: int) -> None:
        last_words = self.fork_servers.ended(server)
        how = reports.describe_exit(status)
        unborn = [w for w in self.workers.values() if w.generation == server.generation and not w.pid]
        ended_by_us = unborn and all(worker.expected for worker in unborn)  # it was in the way of a newer generation
        if server.failure is None and server.generation in self.fleet.generations and not ended_by_us:
            self.log.warning(f"the fork server of generation {server.generation} is gone: {how}")
        for worker in unborn:
            what = f"the fork server of its generation ended early ({how})"
            worker.failure = server.failure or worker.failure or Failure(what, last_words, ExitCode.APPLICATION)
            worker.failure.detail = worker.failure.detail or last_words
            self._worker_ended(worker, None)

    # -- workers

    def _hear_of_worker(self, server: ForkServer, message: Message) -> None:
        """What a fork server tells."""
        worker = self.workers.get(message.get("wid", 0))
        if worker is None:
            return
        if message["t"] == "forked":
            worker.pid, worker.parent = message["pid"], server.pid
            self.log.info(f"{worker.name} booting, pid {worker.pid}", **who(worker))
            self.tell(What.BOOTING, worker=worker)
            if worker.expected:  # it was told to go before it was there
                worker.signal(signal.SIGKILL)
        elif message["t"] == "exited":
            self._worker_ended(worker, int(message["status"]))

    def _hear_worker(self, worker: WorkerProcess, message: Message) -> None:
        kind = message["t"]
        if kind == "beat":
            self._hear_beat(worker, message)
        elif kind == "ready":
            self._worker_ready(worker, message)
        elif kind == "failed":
            worker.failure = Failure.told(message)
        elif kind == "replace":
            self.log.info(f"{worker.name} asks to be replaced: {message['why']}", **who(worker))
            self._feed(v.WorkerAsksReplacement(worker.wid))
        elif kind == "leaving":
            self.log.info(f"{worker.name} draining: it received {message['why']}", **who(worker))
            worker.expected = True
            self.tell(What.DRAINING, worker=worker, text=str(message["why"]))
            self._feed(v.WorkerLeaves(worker.wid))
        elif kind == "code":
            worker.code = message["facts"]
        elif kind == "answer":
            self.tell(What.ANSWER, worker=worker, message=message)

    def _hear_beat(self, worker: WorkerProcess, message: Message) -> None:
        worker.take_beat(message, time.monotonic())
        self._feed(v.WorkerBeat(worker.wid, worker.connections))
        member = self.fleet.workers.get(worker.wid)
        if member is not None and member.deadline is not None:
            self._due = min(self._due, member.deadline)  # nearer than before only if `timeout` has become shorter
        if self._canary is not None and self._canary[0] == worker.wid:
            self._judge_canary()

    def _worker_ready(self, worker: WorkerProcess, message: Message) -> None:
        known = self.fleet.workers.get(worker.wid)
        if known is None or known.state is not State.BOOTING:
            return  # told to leave while it said this: nobody's successor, and no news
        worker.ready_at = time.monotonic()
        worker.names = {name: str(message.get(name, "?")) for name in ("interface", "parser", "loop")}
        what = ", ".join(worker.names.values())
        self.log.info(f"{worker.name} ready in {message['seconds']:.2f} s ({what})", **who(worker), **worker.names)
        settings = self.fork_servers.settings(worker.generation) or self.settings
        self._feed(v.WorkerReady(worker.wid, fleet_config(settings)))
        self._adopt_settings(settings, worker.generation)
        successors.introduce(self, worker)

    def _adopt_settings(self, new: Settings, generation: int) -> None:
        """A generation works, so its settings are the ones that count from now on; those of an error page never are."""
        if new == self.settings or self.fleet.good != generation or generation == self.fleet.stand_in:
            return
        self.settings = new
        self.log.adopt(new.log_level, new.log_format)

    def _judge_canary(self) -> None:
        if self._canary is None or self.fleet.canary_until is None:
            return
        wid, before = self._canary
        worker = self.workers.get(wid)
        if worker is None:
            return
        now = self._answers()
        why = canary.verdict(now[wid], before, now)
        if why:
            self._failures.setdefault(worker.generation, Failure(why, "", ExitCode.APPLICATION))
            self._feed(v.CanaryFailed(worker.generation))

    def _worker_lost(self, worker: WorkerProcess) -> None:
        if worker.wid in self.workers:
            worker.lost_at = self.clock.now
            self._stirred = True

    def _worker_ended(self, worker: WorkerProcess, status: int | None) -> None:
        if self.workers.pop(worker.wid, None) is None:
            return
        # Its reasons may still be on the way when its exit is reported.
        self.hub.read_rest(worker.channel, lambda message: self._hear_last(worker, message), REST_READS)
        self.hub.forget(worker.channel)
        last_words = worker.last_words()
        os.close(worker.dump)
        age = time.monotonic() - worker.born
        figures = {**who(worker), "status": status, "seconds": round(age, 3), "requests": worker.requests}
        failure = reports.boot_failure(worker, status, last_words)
        if failure is not None:
            self._failures.setdefault(worker.generation, failure)
        elif worker.generation > self.fleet.good and not worker.expected:
            how = f"its canary ended early ({reports.describe_exit(status)})"
            self._failures.setdefault(worker.generation, worker.failure or Failure(how, "", ExitCode.APPLICATION))
        report = reports.end_of_worker(worker, status, last_words, age)
        self._say(report, **figures)
        self.tell(What.GONE, worker=worker, status=status, text=report.message, detail=report.detail)
        self._feed(v.WorkerGone(worker.wid))

    def _hear_last(self, worker: WorkerProcess, message: Message) -> None:
        if message["t"] == "failed":
            worker.failure = Failure.told(message)
        elif message["t"] == "beat":
            worker.take_beat(message, time.monotonic())

    # -- actions

    def _spawn(self, action: v.Spawn) -> None:
        self._asked_at.setdefault(action.generation, time.monotonic())
        try:
            self._start_worker(action)
        except OSError as exc:
            self.log.error(f"worker {action.wid} gen {action.generation} could not be started: {exc.strerror}")
            self.workers.pop(action.wid, None)
            self._feed(v.WorkerGone(action.wid))

    def _start_worker(self, action: v.Spawn) -> None:
        """Raises `OSError` when the system has no descriptors or processes left."""
        server = self.fork_servers.provide(action.generation, self.settings)
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        try:
            worker = WorkerProcess(action.wid, action.generation, channel, make_dump_file(), time.monotonic())
            self.hub.send(server.channel, {"t": "spawn", "wid": action.wid}, [theirs.fileno(), worker.dump])
        except OSError:
            channel.close()
            raise
        finally:
            theirs.close()
        self.workers[action.wid] = worker
        self.listen_to_worker(worker)

    def listen_to_worker(self, worker: WorkerProcess) -> None:
        self.hub.listen(
            worker.channel, lambda message: self._hear_worker(worker, message), lambda: self._worker_lost(worker)
        )

    def _drain(self, action: v.Drain) -> None:
        worker = self.workers.get(action.wid)
        if worker is None:
            return
        if not worker.expected:
            self.log.info(f"{worker.name} draining: {action.reason}", **who(worker), reason=str(action.reason))
            self.tell(What.DRAINING, worker=worker, text=str(action.reason))
        worker.expected = True
        order = {"t": "drain", "seconds": action.seconds, "reason": str(action.reason)}
        successors.order_drain(self, worker, order, action.successors)

    def _stop_listening(self, _action: v.StopListening) -> None:
        """From now on the workers decide how long connections are accepted, each closing its own copy in the end."""
        for listener in self.listeners:
            listener.close()
        self.fork_servers.order({"t": "stop_listening"})

    def watch_canary(self, wid: int) -> None:
        """Judge this worker by all of its answers, and by those that the other ones give from now on."""
        before = self._answers()
        before.pop(wid, None)
        self._canary = (wid, before)

    def _answers(self) -> dict[int, canary.Answers]:
        return {wid: canary.Answers(worker.requests, worker.errors) for wid, worker in self.workers.items()}

    def _canary_started(self, action: v.CanaryStarted) -> None:
        self.watch_canary(action.wid)
        self.log.info(
            f"generation {action.generation} is on probation for {action.seconds:g} s with worker {action.wid}",
            generation=action.generation,
            worker=action.wid,
        )
        self.tell(What.PROBATION, generation=action.generation, worker=self.workers.get(action.wid))

    def _dump(self, action: v.Dump) -> None:
        worker = self.workers.get(action.wid)
        if worker is None:
            return
        what = reports.stuck(action.reason, self.settings)
        worker.failure = Failure(what, "", ExitCode.APPLICATION)
        self._failures.setdefault(worker.generation, worker.failure)
        self.log.error(f"{worker.name} is stuck: {what}; it is killed, its stacks follow", **who(worker))
        self._signal(worker, DUMP_SIGNAL)

    def _kill(self, action: v.Kill) -> None:
        worker = self.workers.get(action.wid)
        if worker is None:
            return
        if worker.ready_at is not None and action.reason is not v.Reason.STUCK:
            self.log.warning(f"{worker.name} is killed: it did not finish in time ({action.reason})", **who(worker))
        worker.expected = worker.expected or worker.failure is None
        server = self.fork_servers.get(worker.generation)
        if worker.killed and server is not None:
            # Nobody survives the first one, so it is the fork server that does not tell; then we hear of it ourselves.
            self.log.warning(f"the fork server of generation {server.generation} does not answer and is killed")
            kill(server.pid, signal.SIGKILL)
            worker.lost_at = self.clock.now
        worker.killed = True
        self._signal(worker, signal.SIGKILL)

    def _signal(self, worker: WorkerProcess, number: signal.Signals) -> None:
        """Signal a worker; one that is not forked yet waits for its fork server, so that is what hangs."""
        server = self.fork_servers.get(worker.generation)
        if worker.pid:
            worker.signal(number)
        elif server is not None and server.settings is None:
            kill(server.pid, number)

    def _complete(self, action: v.GenerationComplete) -> None:
        seconds = time.monotonic() - self._asked_at.get(action.generation, time.monotonic())
        server = self.fork_servers.get(action.generation)
        if server is not None and server.settings is not None:
            self._adopt_settings(server.settings, action.generation)
            if server.ignored:
                named = ", ".join(server.ignored)
                self.log.warning(f"settings that need a restart have changed and stay as they were: {named}")
        stand_in = action.generation == self.fleet.stand_in
        report = reports.complete(action.generation, self.settings, self.fleet.size, seconds, stand_in)
        self._say(report, generation=action.generation, workers=self.fleet.size)
        what = What.STANDS_IN if stand_in else What.COMPLETE
        self.tell(what, generation=action.generation, text=report.message)
        self._asked_at.clear()

    def _given_up(self, action: v.GenerationGivenUp) -> None:
        failure = self._failures.get(action.generation)
        report = reports.given_up(action, failure)
        # What is said later of this one, by a worker that must be killed, is not the reason of the next.
        self._failures = {number: known for number, known in self._failures.items() if number > action.generation}
        self._say(report, generation=action.generation, keeping=action.keeping)
        self.tell(What.GIVEN_UP, generation=action.generation, text=report.message, failure=failure)

    def _halt(self, action: v.Halt) -> None:
        code = action.code
        failure = self._failures.get(self.fleet.target)
        if code is ExitCode.APPLICATION and failure is not None:
            code = ExitCode(failure.code)
        self._exit = code

    def _end(self) -> None:
        """Nothing serves any more: let the fork servers go, and leave no process behind."""
        deadline = time.monotonic() + END_GRACE
        for service in self.services:
            service.close()
        self.fork_servers.retire(())
        pids = set(self.fork_servers.pids())
        while pids and time.monotonic() < deadline:
            pids -= {pid for pid, _ in reap()}
            if pids:
                self.hub.wait(0.01)
        for pid in pids:
            kill(pid, signal.SIGKILL)
        # Python would restore the default, which kills, on its way out: the exit code is already decided.
        for number in (*_SIGNALS, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)


_PERFORM: dict[type, Callable[[Arbiter, Any], None]] = {
    v.Spawn: Arbiter._spawn,
    v.Drain: Arbiter._drain,
    v.StopListening: Arbiter._stop_listening,
    v.CanaryStarted: Arbiter._canary_started,
    v.Dump: Arbiter._dump,
    v.Kill: Arbiter._kill,
    v.GenerationComplete: Arbiter._complete,
    v.GenerationGivenUp: Arbiter._given_up,
    v.Halt: Arbiter._halt,
}
