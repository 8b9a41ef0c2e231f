"""The arbiter: a select loop that feeds events to the fleet and performs the actions that the fleet answers.

It never waits for a process, reads no application code, and speaks no protocol but that of its channels.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from apphost.arbiter import vocabulary as v
from apphost.arbiter.fleet import Fleet, next_deadline, step
from apphost.arbiter.processes import (
    Failure,
    ForkServer,
    WorkerProcess,
    become_subreaper,
    describe_exit,
    kill,
    make_dump_file,
    read_last_words,
    reap,
    start_fork_server,
)
from apphost.errors import ExitCode
from apphost.logs import Log
from apphost.messages import MAX_FDS, Channel, Message, ProtocolError
from apphost.settings import Loaded, Settings, Source, restart_needed

DUMP_SIGNAL = signal.SIGUSR2  # the worker's handler writes its stacks and requests into its dump file
LOST_GRACE = 1.0  # s between the end of a worker's channel and the report of its exit, when all is well
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


def fleet_config(settings: Settings) -> v.Config:
    return v.Config(
        size=settings.workers,
        boot_timeout=settings.boot_timeout,
        timeout=settings.timeout,
        graceful_timeout=settings.graceful_timeout,
        stop_timeout=settings.stop_timeout,
    )


class Arbiter:
    """One arbiter. `on_ready` is called when a worker has become ready, with its handle (for `apphost check`)."""

    def __init__(
        self,
        loaded: Loaded,
        source: Source,
        listeners: list[socket.socket],
        log: Log,
        on_ready: Callable[[WorkerProcess], None] | None = None,
    ) -> None:
        self.settings = loaded.settings
        self.source = source
        self.listeners = listeners
        self.log = log
        self.fleet = Fleet(fleet_config(loaded.settings))
        self.workers: dict[int, WorkerProcess] = {}
        self.fork_servers: dict[int, ForkServer] = {}
        self._on_ready = on_ready
        self._selector = selectors.DefaultSelector()
        self._signals: deque[int] = deque()
        self._asked_at: dict[int, float] = {}  # generation to the moment its first worker was asked for
        self._exit: ExitCode | None = None
        self._first_failure: Failure | None = None
        self._subreaper = become_subreaper()

    # -- the loop

    def run(self) -> int:
        """Run until there is nothing left to do; the exit code."""
        self._catch_signals()
        self._feed(v.Tick())
        while self._exit is None:
            for key, mask in self._selector.select(self._timeout()):
                key.data(mask)
            self._take_signals()
            self._reap()
            self._notice_lost_workers()
            self._feed(v.Tick())
            self._retire_fork_servers()
        self._end()
        return self._exit

    def _timeout(self) -> float | None:
        deadlines = [w.lost_at + LOST_GRACE for w in self.workers.values() if w.lost_at is not None]
        due = next_deadline(self.fleet)
        if due is not None:
            deadlines.append(due)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _feed(self, event: v.Event) -> None:
        """Tell the fleet, and do what it says."""
        for action in step(self.fleet, event, time.monotonic()):
            _PERFORM[type(action)](self, action)

    # -- signals and children

    def _catch_signals(self) -> None:
        reader, writer = os.pipe()
        for fd in (reader, writer):
            os.set_blocking(fd, False)
        self._wakeup = reader
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._selector.register(reader, selectors.EVENT_READ, self._drain_wakeup)
        for number in (*_SIGNALS, signal.SIGUSR2, signal.SIGCHLD):
            signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _drain_wakeup(self, _mask: int) -> None:
        try:
            while os.read(self._wakeup, 4096):
                pass
        except BlockingIOError:
            pass

    def _take_signals(self) -> None:
        while self._signals:
            number = signal.Signals(self._signals.popleft())
            event = _SIGNALS.get(number)
            if event is not None:
                self.log.info(f"{number.name} received")
                if isinstance(event, v.StopAsked):
                    self._stop_listening()
                self._feed(event)
            elif number == signal.SIGUSR2:
                self.log.warning("SIGUSR2 received: an upgrade in place is not possible yet; USR1 reloads")

    def _stop_listening(self) -> None:
        """From now on the workers decide how long connections are accepted, each closing its own copy in the end."""
        for listener in self.listeners:
            listener.close()
        for server in self.fork_servers.values():
            self._send(server.channel, {"t": "stop_listening"})

    def _reap(self) -> None:
        for pid, status in reap():
            server = next((s for s in self.fork_servers.values() if s.pid == pid), None)
            if server is not None:
                self._fork_server_ended(server, status)
                continue
            worker = next((w for w in self.workers.values() if w.pid == pid), None)
            if worker is not None:  # its fork server died before it
                self._worker_ended(worker, status)

    def _notice_lost_workers(self) -> None:
        """A worker whose channel has ended without its exit being reported."""
        now = time.monotonic()
        for worker in list(self.workers.values()):
            if worker.lost_at is None or now < worker.lost_at + LOST_GRACE:
                continue
            if worker.generation not in self.fork_servers and not self._subreaper:
                self._worker_ended(worker, None)
            else:
                worker.lost_at = None
                self.log.warning(f"{worker.name} has lost its channel and must go")
                worker.expected = True
                self._feed(v.WorkerLeaves(worker.wid))

    # -- channels

    def _listen(self, channel: Channel, handle: Callable[[Message], None], at_end: Callable[[], None]) -> None:
        def ready(mask: int) -> None:
            if mask & selectors.EVENT_WRITE:
                channel.flush()
                self._watch(channel, ready)
            if not mask & selectors.EVENT_READ:
                return
            try:
                messages = channel.receive()
            except ProtocolError as exc:
                self.log.error(f"a channel is closed: {exc}")
                messages = None
            if messages is None:
                self._selector.unregister(channel)
                at_end()
                return
            for message, fds in messages:
                for fd in fds:
                    os.close(fd)
                handle(message)

        self._selector.register(channel, selectors.EVENT_READ, ready)

    def _watch(self, channel: Channel, ready: Any) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.blocked else 0)
        self._selector.modify(channel, events, ready)

    def _send(self, channel: Channel, message: Message, fds: list[int] | None = None) -> None:
        channel.send(message, fds)
        key = self._selector.get_map().get(channel)
        if channel.blocked and key is not None:
            self._watch(channel, key.data)

    def _forget(self, channel: Channel) -> None:
        if self._selector.get_map().get(channel) is not None:
            self._selector.unregister(channel)
        channel.close()

    # -- fork servers

    def _fork_server(self, generation: int) -> ForkServer:
        server = self.fork_servers.get(generation)
        if server is None:
            server = start_fork_server(generation, self.source, self.listeners)
            self.fork_servers[generation] = server
            self._listen(
                server.channel, lambda message: self._hear_fork_server(server, message), lambda: self._lose(server)
            )
            self.log.debug(f"fork server of generation {generation} started, pid {server.pid}")
        return server

    def _hear_fork_server(self, server: ForkServer, message: Message) -> None:
        kind = message["t"]
        worker = self.workers.get(message.get("wid", 0))
        if kind == "settings":
            server.settings = Settings.from_wire(message["settings"])
        elif kind == "failed":
            server.failure = _failure(message)
        elif kind == "forked" and worker is not None:
            worker.pid = int(message["pid"])
            self.log.info(f"{worker.name} booting, pid {worker.pid}", **_who(worker))
            if worker.expected:  # it was told to go before it was there
                kill(worker.pid, signal.SIGKILL)
        elif kind == "exited" and worker is not None:
            self._worker_ended(worker, int(message["status"]))

    def _lose(self, server: ForkServer) -> None:
        """Its channel has ended; its exit will be reaped. Until then it is not asked for workers any more."""
        if self.fork_servers.get(server.generation) is server:
            del self.fork_servers[server.generation]
        server.channel.close()
        for worker in [w for w in self.workers.values() if w.generation == server.generation and not w.pid]:
            worker.failure = worker.failure or server.failure
            self._worker_ended(worker, None)

    def _fork_server_ended(self, server: ForkServer, status: int) -> None:
        if server.failure is None:
            self.log.warning(f"the fork server of generation {server.generation} is gone: {describe_exit(status)}")
        if server.channel in self._selector.get_map():
            # What it said last may still be unread: its channel's end comes through the selector.
            return
        self._lose(server)

    def _retire_fork_servers(self) -> None:
        for generation in self.fork_servers.keys() - self.fleet.generations:
            server = self.fork_servers.pop(generation)
            self._forget(server.channel)

    # -- workers

    def _hear_worker(self, worker: WorkerProcess, message: Message) -> None:
        kind = message["t"]
        if kind == "beat":
            worker.requests = int(message["requests"])
            worker.connections = int(message["connections"])
            worker.active = int(message["active"])
            self._feed(v.WorkerBeat(worker.wid))
        elif kind == "ready":
            self._worker_ready(worker, message)
        elif kind == "failed":
            worker.failure = _failure(message)
        elif kind == "replace":
            self.log.info(f"{worker.name} asks to be replaced: {message['why']}", **_who(worker))
            self._feed(v.WorkerAsksReplacement(worker.wid))
        elif kind == "leaving":
            self.log.info(f"{worker.name} draining: it received {message['why']}", **_who(worker))
            worker.expected = True
            self._feed(v.WorkerLeaves(worker.wid))

    def _worker_ready(self, worker: WorkerProcess, message: Message) -> None:
        worker.ready_at = time.monotonic()
        worker.names = {name: str(message.get(name, "?")) for name in ("interface", "parser", "loop")}
        what = ", ".join(worker.names.values())
        self.log.info(f"{worker.name} ready in {message['seconds']:.2f} s ({what})", **_who(worker), **worker.names)
        proven = worker.generation > self.fleet.good
        self._feed(v.WorkerReady(worker.wid))
        if proven:
            self._adopt_settings(worker.generation)
        if self._on_ready is not None:
            self._on_ready(worker)

    def _adopt_settings(self, generation: int) -> None:
        """A generation works, so its settings are the ones that count from now on."""
        server = self.fork_servers.get(generation)
        new = server.settings if server is not None else None
        if new is None or new == self.settings:
            return
        fixed = restart_needed(self.settings, new)
        if fixed:
            self.log.warning(f"settings that need a restart have changed and stay as they were: {', '.join(fixed)}")
        self.settings = new
        self.log = Log(new.log_level, new.log_format)
        self._feed(v.Configured(fleet_config(new)))

    def _worker_lost(self, worker: WorkerProcess) -> None:
        if worker.wid in self.workers:
            worker.lost_at = time.monotonic()

    def _worker_ended(self, worker: WorkerProcess, status: int | None) -> None:
        if self.workers.pop(worker.wid, None) is None:
            return
        self._hear_rest(worker)
        self._forget(worker.channel)
        last_words = read_last_words(worker.dump)
        os.close(worker.dump)
        self._report_end(worker, status, last_words)
        self._feed(v.WorkerGone(worker.wid))

    def _hear_rest(self, worker: WorkerProcess) -> None:
        """The reasons of a worker may still be on the way when its exit is reported."""
        try:
            while messages := worker.channel.receive():
                for message, _ in messages:
                    if message["t"] == "failed":
                        worker.failure = _failure(message)
        except ProtocolError:
            pass

    def _report_end(self, worker: WorkerProcess, status: int | None, last_words: str) -> None:
        age = time.monotonic() - worker.born
        figures = {**_who(worker), "status": status, "seconds": round(age, 3), "requests": worker.requests}
        how = describe_exit(status)
        if worker.ready_at is None and not worker.expected:
            failure = worker.failure or Failure(f"its process ended early ({how})", last_words, ExitCode.APPLICATION)
            self._first_failure = self._first_failure or failure
            self.log.error(f"{worker.name} could not boot: {failure.message}", failure.detail, **figures)
        elif worker.expected and not last_words:
            self.log.info(f"{worker.name} gone: {how} after {age:.1f} s, {worker.requests} requests", **figures)
        else:
            why = f" ({worker.failure.message})" if worker.failure else ""
            detail = last_words or (worker.failure.detail if worker.failure else "")
            self.log.error(
                f"{worker.name} gone: {how}{why} after {age:.1f} s; the requests that it had in progress are lost",
                detail,
                **figures,
            )

    # -- actions

    def _spawn(self, action: v.Spawn) -> None:
        self._asked_at.setdefault(action.generation, time.monotonic())
        server = self._fork_server(action.generation)
        ours, theirs = socket.socketpair()
        worker = WorkerProcess(action.wid, action.generation, Channel(ours), make_dump_file(), time.monotonic())
        self.workers[action.wid] = worker
        self._listen(
            worker.channel, lambda message: self._hear_worker(worker, message), lambda: self._worker_lost(worker)
        )
        self._send(server.channel, {"t": "spawn", "wid": action.wid}, [theirs.fileno(), worker.dump])
        theirs.close()

    def _drain(self, action: v.Drain) -> None:
        worker = self.workers.get(action.wid)
        if worker is None:
            return
        if not worker.expected:
            self.log.info(f"{worker.name} draining: {action.reason}", **_who(worker), reason=str(action.reason))
        worker.expected = True
        order = {"t": "drain", "seconds": action.seconds, "reason": str(action.reason)}
        successors = [self.workers[wid] for wid in action.successors if wid in self.workers]
        ours: list[socket.socket] = []
        for successor in successors[:MAX_FDS]:
            one, other = socket.socketpair()
            ours.append(one)
            self._send(successor.channel, {"t": "adopt", "from": action.wid}, [other.fileno()])
            other.close()
        self._send(worker.channel, order, [sock.fileno() for sock in ours])
        for sock in ours:
            sock.close()

    def _dump(self, action: v.Dump) -> None:
        worker = self.workers.get(action.wid)
        if worker is None:
            return
        if action.reason is v.Reason.BOOT_TIMEOUT:
            limit = f"it was not ready within boot_timeout, {self.settings.boot_timeout:g} s"
            what = "the application hangs while it is imported or started"
        else:
            limit = f"its event loop did not answer for timeout, {self.settings.timeout:g} s"
            what = "code of the application blocks it"
        text = f"{limit}: {what}; it is killed, its stacks follow"
        worker.failure = Failure(text, "", ExitCode.APPLICATION)
        self.log.error(f"{worker.name} is stuck: {text}", **_who(worker))
        kill(worker.pid, DUMP_SIGNAL)

    def _kill(self, action: v.Kill) -> None:
        worker = self.workers.get(action.wid)
        if worker is not None:
            if worker.ready_at is not None and action.reason is not v.Reason.STUCK:
                self.log.warning(
                    f"{worker.name} is killed: it did not finish in time ({action.reason})", **_who(worker)
                )
            worker.expected = worker.expected or worker.failure is None
            kill(worker.pid, signal.SIGKILL)

    def _complete(self, action: v.GenerationComplete) -> None:
        seconds = time.monotonic() - self._asked_at.get(action.generation, time.monotonic())
        count = self.fleet.size
        workers = f"{count} worker{'s' if count != 1 else ''}"
        self.log.info(
            f"generation {action.generation} is serving {self.settings.app} with {workers}, {seconds:.2f} s after it "
            "was asked for",
            generation=action.generation,
            workers=count,
        )

    def _given_up(self, action: v.GenerationGivenUp) -> None:
        why = self._first_failure.message if self._first_failure else "it could not boot"
        self._first_failure = None
        self.log.error(
            f"generation {action.generation} given up: {why}. Generation {action.keeping} keeps serving; "
            "mend the new code or settings and reload again",
            generation=action.generation,
            keeping=action.keeping,
        )

    def _halt(self, action: v.Halt) -> None:
        code = action.code
        if code is ExitCode.APPLICATION and self._first_failure is not None:
            code = ExitCode(self._first_failure.code)
        self._exit = code

    def _end(self) -> None:
        """Nothing serves any more: let the fork servers go, and leave no process behind."""
        deadline = time.monotonic() + END_GRACE
        pids = {server.pid for server in self.fork_servers.values()}
        for server in self.fork_servers.values():
            self._forget(server.channel)
        while pids and time.monotonic() < deadline:
            pids -= {pid for pid, _ in reap()}
            if pids:
                self._selector.select(0.01)
        for pid in pids:
            kill(pid, signal.SIGKILL)
        signal.set_wakeup_fd(-1)


_PERFORM: dict[type, Callable[[Arbiter, Any], None]] = {
    v.Spawn: Arbiter._spawn,
    v.Drain: Arbiter._drain,
    v.Dump: Arbiter._dump,
    v.Kill: Arbiter._kill,
    v.GenerationComplete: Arbiter._complete,
    v.GenerationGivenUp: Arbiter._given_up,
    v.Halt: Arbiter._halt,
}


def _failure(message: Message) -> Failure:
    return Failure(str(message["message"]), str(message["detail"]), int(message.get("code", ExitCode.APPLICATION)))


def _who(worker: WorkerProcess) -> dict[str, Any]:
    return {"worker": worker.wid, "generation": worker.generation, "worker_pid": worker.pid}
