"""USR2: the arbiter replaces its own program, same pid, while its workers go on serving.

First a throw-away process runs the new program far enough to read the state; only when that works is the old program
replaced by exec, which keeps pid, children and descriptors. The new one finds the state through `RESUME_VARIABLE` and
rolls a new generation, so that fork servers and workers are of the new version too. Until the exec succeeds nothing
has been given up: whatever fails, the old program goes on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from apphost.arbiter.clock import Clock
from apphost.arbiter.processes import kill, make_dump_file
from apphost.arbiter.services import Happening, What
from apphost.arbiter.state import ArbiterState, OpenChannel, StateError
from apphost.footing import RESUME_VARIABLE
from apphost.messages import Channel
from apphost.sockets import Identity

if TYPE_CHECKING:
    from apphost.arbiter.admin import Admin
    from apphost.arbiter.arbiter import Arbiter
    from apphost.arbiter.control import Control
    from apphost.arbiter.history import History

TRIAL_TIMEOUT = 60.0  # s for the new program to show that it can start; the default of boot_timeout
_STATE_MAX = 1 << 26  # bytes: some hundred times the state of 1024 workers


class Upgrade:
    """The service that upgrades `arbiter`: `begin`, then `tried` with the trial's end.

    environment: variables that only an arbiter has, for the new one.
    """

    def __init__(
        self,
        arbiter: Arbiter,
        own_sockets: dict[str, Identity],
        pidfile: tuple[str, int] | None,
        control: Control | None,
        admin: Admin | None,
        history: History,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._arbiter = arbiter
        self._control = control
        self._admin = admin
        self._history = history
        self._own_sockets = own_sockets
        self._pidfile = pidfile
        self._environment = dict(environment or {})
        self._trial = 0
        self.deadline: float | None = None

    def begin(self) -> None:
        """Start the trial, unless one is running."""
        if self._trial:
            return
        try:
            self._trial = self._start_trial()
        except OSError as exc:
            self._say_failed(exc.strerror or str(exc))
            return
        self.deadline = time.monotonic() + TRIAL_TIMEOUT

    def expire(self, _now: float) -> None:
        self.deadline = None
        kill(self._trial, signal.SIGKILL)

    def notice(self, happening: Happening) -> None:
        pass

    def close(self) -> None:
        """The arbiter ends, and leaves no trial behind."""
        if self._trial:
            kill(self._trial, signal.SIGKILL)

    def tried(self, pid: int, status: int) -> bool:
        """A child has ended; whether it was the trial. When that has succeeded, this does not return."""
        if not self._trial or pid != self._trial:
            return False
        self._trial = 0
        expired, self.deadline = self.deadline is None, None
        arbiter = self._arbiter
        if arbiter.fleet.stopping:
            arbiter.log.info("the upgrade is dropped: this arbiter stops")
            arbiter.tell(What.UPGRADE_GIVEN_UP, text="this arbiter stops")
            return True
        if status != 0:
            late = f"the new program did not show within {TRIAL_TIMEOUT:g} s that it can start"
            self._say_failed(late if expired else f"the new program cannot start (its trial ended with {status})")
            return True
        channels = [worker.channel for worker in arbiter.workers.values()]
        channels += [server.channel for server in arbiter.fork_servers.running.values()]
        if any(channel.blocked for channel in channels):
            self._say_failed("a worker does not read its orders")
            return True
        try:
            self._exec()
        except OSError as exc:
            self._say_failed(exc.strerror or str(exc))
        return True

    def _say_failed(self, why: str) -> None:
        self._arbiter.log.error(f"the upgrade is given up: {why}. This arbiter goes on")
        self._arbiter.tell(What.UPGRADE_GIVEN_UP, text=why)

    def _start_trial(self) -> int:
        fd = write_state(self.state())
        # A signal for all programs of this name must not end the trial, nor be noted by our handlers in it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._become(fd, f"{fd}?")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(fd)
        return pid

    def _become(self, fd: int, resume: str) -> None:
        """In the trial's process: run the new program."""
        try:
            os.set_inheritable(fd, True)
            self._replace(resume)
        except BaseException as exc:
            os.write(2, f"apphost: cannot run {sys.executable}: {exc}\n".encode())
        finally:
            os._exit(127)

    def _exec(self) -> None:
        """Become the new program. Raises `OSError`; then everything is as before."""
        arbiter = self._arbiter
        state = self.state()
        fd = write_state(state)
        arbiter.log.info("the upgrade begins: this program is replaced, workers go on serving")
        # What comes meanwhile waits for the handlers of the new program; so must what has come and is not taken up yet.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for number in arbiter.hub.signals():
            os.kill(os.getpid(), number)
        descriptors = [fd, *state.descriptors]
        try:
            for each in descriptors:
                os.set_inheritable(each, True)
            self._replace(str(fd))
        finally:
            for each in descriptors:
                os.set_inheritable(each, False)
            os.close(fd)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def _replace(self, resume: str) -> None:
        """Run the command that this program was started with, from where the user started it."""
        try:
            os.chdir(self._arbiter.source.cwd)
        except OSError:
            pass  # it need not exist any more as long as the command does
        environment = {**os.environ, **self._environment, RESUME_VARIABLE: resume}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606

    def state(self) -> ArbiterState:
        arbiter = self._arbiter
        return ArbiterState(
            fleet=arbiter.fleet,
            settings=arbiter.settings,
            source=arbiter.source.to_wire(),
            listeners=[listener.fileno() for listener in arbiter.listeners],
            workers=list(arbiter.workers.values()),
            fork_servers=list(arbiter.fork_servers.running.values()),
            leaving=arbiter.fork_servers.leaving,
            own_sockets=self._own_sockets,
            pidfile=self._pidfile,
            plain=[listener.fileno() for listener in arbiter.listeners if listener.plain],
            control=self._control.fileno() if self._control is not None else -1,
            admin=[listener.fileno() for listener in self._admin.listeners] if self._admin is not None else [],
            history=self._history.to_wire(),
            clock=(arbiter.clock.now, arbiter.clock.at),
        )


def write_state(state: ArbiterState) -> int:
    """The descriptor of an unnamed file with the state."""
    fd = make_dump_file()
    data = json.dumps(state.to_wire()).encode()
    while data:
        data = data[os.write(fd, data) :]
    return fd


def read_state(fd: int, open_channel: OpenChannel) -> ArbiterState:
    """The state in the file `fd`. Raises `StateError`."""
    try:
        size = os.fstat(fd).st_size
        if size > _STATE_MAX:
            raise StateError(f"{size} bytes")
        wire = json.loads(os.pread(fd, size, 0))
    except (OSError, ValueError, RecursionError) as exc:  # the latter for deep nesting
        raise StateError(str(exc)) from None
    return ArbiterState.from_wire(wire, open_channel)


def open_inherited(fd: int, rest: bytes) -> Channel:
    """A channel of the program before this one. One that it had closed has no descriptor; nothing will come from it."""
    sock = socket.socket(fileno=fd) if fd >= 0 else socket.socketpair()[0]
    return Channel(sock, rest)


def open_nothing(_fd: int, rest: bytes) -> Channel:
    """In a trial, in place of a channel that was not inherited."""
    return Channel(socket.socketpair()[0], rest)


def take_over(arbiter: Arbiter, state: ArbiterState) -> None:
    """Have a new arbiter go on where the program before it stopped: its fleet, processes and channels."""
    arbiter.fleet = state.fleet
    if state.clock is not None:
        arbiter.clock = Clock(*state.clock)
    arbiter.fork_servers.leaving = state.leaving
    for server in state.fork_servers:
        arbiter.fork_servers.adopt(server)
    for worker in state.workers:
        arbiter.workers[worker.wid] = worker
        arbiter.listen_to_worker(worker)
    if state.fleet.canary_until is not None:
        for worker in state.workers:
            if worker.generation == state.fleet.target and worker.ready_at is not None:
                arbiter.watch_canary(worker.wid)
