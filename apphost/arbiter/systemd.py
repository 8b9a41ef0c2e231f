"""What a service manager is told: sd_notify(3), and the watchdog of sd_watchdog_enabled(3).

One datagram to the socket that NOTIFY_SOCKET names, with lines of `NAME=value`; by hand, since that is all of it.
Without that variable nothing of this runs. Any supervisor that speaks the protocol will do.

    STARTING --- the first worker is ready ---> SERVING <--- complete, given up --- RELOADING
                                                   +----------- a reload is asked for ---^
    any -------- a stop is asked for ---------> STOPPING
"""

from __future__ import annotations

import enum
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apphost.arbiter.fleet import KILL_GRACE
from apphost.arbiter.services import Happening, What
from apphost.lifecycle import State
from apphost.logs import Log

if TYPE_CHECKING:
    from apphost.arbiter.arbiter import Arbiter

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
STATUS_MAX = 1024  # characters; systemd takes datagrams of one page (4096 bytes), and `systemctl status` shows a line
UNSENT_MAX = 32  # datagrams kept for a manager that does not read; some reloads' worth
RETRY_AFTER = 0.2  # s
# s more than our own deadlines, before the manager may act: between our clock and its, on a busy machine.
MARGIN = 5.0


class Phase(enum.Enum):
    """Where the service stands, as the manager sees it. The value is the word in the status line."""

    STARTING = "starting"
    SERVING = "serving"
    RELOADING = "reloading"
    STOPPING = "stopping"


# READY with the first worker, not the last: from then on requests are answered, and what waits for this service can go
# on. The listeners have been open before.
MOVES: Mapping[tuple[Phase, What], Phase] = {
    (Phase.STARTING, What.READY): Phase.SERVING,
    (Phase.STARTING, What.STOP_ASKED): Phase.STOPPING,
    (Phase.SERVING, What.RELOAD_ASKED): Phase.RELOADING,
    (Phase.SERVING, What.STOP_ASKED): Phase.STOPPING,
    (Phase.RELOADING, What.RELOAD_ASKED): Phase.RELOADING,  # said again: whoever asked waits for a later timestamp
    (Phase.RELOADING, What.COMPLETE): Phase.SERVING,
    (Phase.RELOADING, What.GIVEN_UP): Phase.SERVING,
    (Phase.RELOADING, What.STANDS_IN): Phase.SERVING,
    (Phase.RELOADING, What.STOP_ASKED): Phase.STOPPING,
}


@dataclass(frozen=True, slots=True)
class Manager:
    """What a service manager has said about itself.

    address: of its socket, empty: there is none. watchdog: s within which it wants to hear of us, 0: it does not.
    environment: the variables that said so, for a program that takes the place of this one.
    """

    address: str = ""
    watchdog: float = 0.0
    environment: Mapping[str, str] | None = None

    @classmethod
    def take(cls, environ: MutableMapping[str, str], pid: int) -> Manager:
        """What `environ` says, for the process `pid`. The variables are removed: they are not for the application."""
        found = {name: environ.pop(name) for name in VARIABLES if name in environ}
        address = found.get("NOTIFY_SOCKET", "")
        if address[:1] not in ("/", "@"):  # others (vsock:) are for virtual machines
            return cls(environment=found)
        micros = found.get("WATCHDOG_USEC", "")
        ours = found.get("WATCHDOG_PID", str(pid)) == str(pid)
        watched = ours and micros.isascii() and micros.isdigit() and len(micros) < 16
        return cls(address, int(micros) / 1e6 if watched else 0.0, found)


class NotifySocket:
    """Where datagrams for the manager go. Never blocks and never raises."""

    def __init__(self, address: str, log: Log) -> None:
        """`address`: a path, or `@` and an abstract name (Linux)."""
        self._log = log
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, text: str) -> bool:
        """False when the manager does not read just now: then try again. Any other failure is final, and no news."""
        try:
            self._socket.sendto(text.encode("utf-8", "replace"), self._address)
        except BlockingIOError:
            return False
        except OSError as exc:
            self._log.debug(f"the service manager cannot be told: {exc.strerror or exc}")
        return True

    def close(self) -> None:
        self._socket.close()


class Notifier:
    """The service that tells the manager how `arbiter` does. `send` takes a text and answers whether it could go.

    What could not go is kept and tried again. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        arbiter: Arbiter,
        watchdog: float,
        send: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arbiter = arbiter
        self._interval = watchdog / 2  # sd_watchdog_enabled(3) asks for half of the time
        self._send = send
        self._clock = clock
        self._unsent: deque[str] = deque(maxlen=UNSENT_MAX)
        self._beat_at: float | None = None
        self._retry_at: float | None = None
        self._status = ""
        self._outcome = ""  # of the last reload, when it was given up
        self.phase = Phase.STARTING

    @property
    def deadline(self) -> float | None:
        return min((due for due in (self._beat_at, self._retry_at) if due is not None), default=None)

    def begin(self, resumed: bool = False) -> None:
        """The first words, before anything happens. `resumed`: of a program that has taken the place of another one.

        That one rolls a new generation, so to the manager it is a reload. The pid is the same; it is said all the same,
        as the manager may have been told another one than ours by whoever started us.
        """
        fleet = self._arbiter.fleet
        if fleet.stop_at is not None or fleet.stopping:
            self.phase = Phase.STOPPING
        elif fleet.good:
            self.phase = Phase.RELOADING
        told = [f"MAINPID={os.getpid()}"] if resumed else []
        if self.phase is Phase.RELOADING:
            told.append(self._reloading())
        elif self.phase is Phase.STARTING:
            told.append(self._extend())
        self._tell(*told, *self._news())
        if self._interval:
            self._beat()

    # -- as a service

    def expire(self, now: float) -> None:
        if self._retry_at is not None and self._retry_at <= now:
            self._retry_at = None
            self._flush()
        if self._beat_at is not None and self._beat_at <= now:
            self._beat()

    def notice(self, happening: Happening) -> None:
        what = happening.what
        if what is What.GIVEN_UP:
            self._outcome = happening.text
        elif what in (What.COMPLETE, What.RELOAD_ASKED):
            self._outcome = ""
        told: list[str] = []
        phase = MOVES.get((self.phase, what))
        if phase is not None and not (what is What.GIVEN_UP and self._reload_runs()):
            self.phase = phase
            told.append(self._entered(phase))
            if what is What.READY and self._reload_runs():  # it was asked for before anything was ready
                self._tell(*told)
                self.phase = Phase.RELOADING
                told = [self._reloading()]
        elif what in (What.BOOTING, What.PROBATION) and self.phase in (Phase.STARTING, Phase.RELOADING):
            told.append(self._extend())
        gone = happening.worker.wid if what is What.GONE and happening.worker is not None else 0
        self._tell(*told, *self._news(gone))

    def close(self) -> None:
        if self.phase is not Phase.STOPPING:
            self.phase = Phase.STOPPING
            self._tell("STOPPING=1", *self._news())

    # -- words

    def _entered(self, phase: Phase) -> str:
        if phase is Phase.SERVING:
            return "READY=1"
        if phase is Phase.RELOADING:
            return self._reloading()
        return f"STOPPING=1\n{self._extend()}"

    def _reloading(self) -> str:
        """With the time at which it began: a `Type=notify-reload` unit ignores words that are older than its signal."""
        return f"RELOADING=1\nMONOTONIC_USEC={int(self._clock() * 1e6)}\n{self._extend()}"

    def _extend(self) -> str:
        """What we allow ourselves for the next step, so that the manager's own limit does not cut it short.

        Also when nothing boots yet: the fork server comes first, and with `preload` it imports the application.
        """
        settings = self._arbiter.settings
        seconds = settings.boot_timeout
        if self.phase is Phase.RELOADING:  # the next worker may wait for the drains of those before it
            seconds += settings.graceful_timeout + KILL_GRACE + settings.canary
        elif self.phase is Phase.STOPPING:
            seconds = settings.shutdown_delay + settings.stop_timeout + KILL_GRACE
        return f"EXTEND_TIMEOUT_USEC={int((seconds + MARGIN) * 1e6)}"

    def _news(self, gone: int = 0) -> list[str]:
        """The status line, if it has changed. `gone`: a worker that is no more, though the fleet has it still."""
        status = self._describe(gone)[:STATUS_MAX].replace("\n", " ")
        if status == self._status:
            return []
        self._status = status
        return [f"STATUS={status}"]

    def _describe(self, gone: int) -> str:
        fleet = self._arbiter.fleet
        ready = [worker for worker in fleet.having(State.READY) if worker.wid != gone]
        text = f"{self.phase.value} {self._arbiter.settings.app}"
        if self.phase is Phase.STOPPING:
            return text
        text += f", {len(ready)} of {fleet.size} workers ready, generation {fleet.good or fleet.target}"
        if self.phase is Phase.RELOADING and fleet.target != fleet.good:
            text += f"; generation {fleet.target} boots"
        return f"{text}; {self._outcome}" if self._outcome else text

    def _reload_runs(self) -> bool:
        fleet = self._arbiter.fleet
        return fleet.again or fleet.target != fleet.good

    # -- sending

    def _beat(self) -> None:
        self._beat_at = self._clock() + self._interval
        if not self._unsent:  # else there is no point in one more, and it might push out what matters
            self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if lines:
            self._unsent.append("\n".join(lines))
            self._flush()

    def _flush(self) -> None:
        while self._unsent:
            if not self._send(self._unsent[0]):
                self._retry_at = self._retry_at or self._clock() + RETRY_AFTER
                return
            self._unsent.popleft()
