"""What an answer on the control socket waits for: a reload, a stop, an upgrade, workers. None of it blocks.

A job is told what happens (`notice`), looks at how things are after it (`settle`), and has its own time (`deadline`,
`expire`). It says lines to its client and finishes with the last one.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from apphost.arbiter.processes import WorkerProcess, forget_dump, read_last_words
from apphost.arbiter.services import Happening, What
from apphost.logs import escape
from apphost.messages import DUMP_SIGNAL

if TYPE_CHECKING:
    from apphost.arbiter.arbiter import Arbiter
    from apphost.arbiter.history import History

ANSWER_TIMEOUT = 1.0  # s for a worker to answer; its loop does in milliseconds unless it is blocked
DUMP_TIME = 0.3  # s to write down the stacks of some hundred threads: milliseconds, on a busy machine more
OUT_PAUSE = 65536  # bytes that a client has not read, above which the next worker is not asked yet


class Requester(Protocol):
    """The client, as a job sees it."""

    @property
    def unread(self) -> int:
        """Bytes that it has not taken yet."""

    def say(self, line: dict[str, Any]) -> None:
        """One line of the answer."""

    def finish(self, line: dict[str, Any]) -> None:
        """The last one: `done` is added, and the job is over."""


class Job(ABC):
    """Does nothing until something happens."""

    deadline: float | None = None

    def __init__(self, arbiter: Arbiter, history: History, client: Requester) -> None:
        self.arbiter = arbiter
        self.history = history
        self.client = client

    def begin(self) -> None:  # noqa: B027 - most need nothing
        """Called once, when the client has this job."""

    def notice(self, happening: Happening) -> None:
        """Tell the client of what happens; decide nothing, since more may happen in the same step."""
        if happening.what is not What.ANSWER:
            self.client.say(progress(happening))

    def settle(self) -> None:  # noqa: B027
        """Something has happened, and the fleet has come to rest: see whether that is what was waited for."""

    def expire(self, now: float) -> None:  # noqa: B027
        """`deadline` has come."""

    @abstractmethod
    def closing(self) -> dict[str, Any]:
        """The last line when the arbiter ends before the job does."""


def progress(happening: Happening) -> dict[str, Any]:
    """A happening for a client: event, at, and what else is known of worker, generation, pid, text, detail."""
    line: dict[str, Any] = {"event": happening.what.value, "at": round(time.time(), 3)}
    worker = happening.worker
    if worker is not None:
        line |= {"worker": worker.wid, "generation": worker.generation, "pid": worker.pid}
    if happening.generation:
        line["generation"] = happening.generation
    line |= {key: value for key in ("text", "detail") if (value := getattr(happening, key))}
    return line


class Rollout(Job):
    """Until a generation is complete, given up or superseded."""

    def __init__(self, arbiter: Arbiter, history: History, client: Requester, generation: int) -> None:
        super().__init__(arbiter, history, client)
        self.generation = generation

    def begin(self) -> None:
        self.client.say({"event": "waiting", "generation": self.generation, "at": round(time.time(), 3)})
        self.settle()

    def settle(self) -> None:
        fleet = self.arbiter.fleet
        outcome = self.history.outcome(self.generation, fleet.target)
        if outcome is not None:
            self.client.finish(outcome)
        elif fleet.stopping or fleet.stop_at is not None:
            self.client.finish(self.closing())

    def closing(self) -> dict[str, Any]:
        text = f"the arbiter stops before generation {self.generation} is complete"
        return {"outcome": "stopping", "generation": self.generation, "text": text}


class Stop(Job):
    def closing(self) -> dict[str, Any]:
        return {"outcome": "stopped", "text": "all workers have gone"}


class UpgradeWait(Job):
    """Ends with the connection when the upgrade goes through: then ask for the outcome with `wait`."""

    def notice(self, happening: Happening) -> None:
        super().notice(happening)
        if happening.what is What.UPGRADE_GIVEN_UP:
            why = happening.text
            self.client.finish({"outcome": "given up", "text": f"the upgrade is given up: {why}", "reason": why})

    def closing(self) -> dict[str, Any]:
        return {"outcome": "stopping", "text": "the arbiter stops before the upgrade"}


class Ask(Job):
    """Ask workers, one after the other, so that no more than one answer waits for the client to read.

    `what`: connections or stacks. A worker that does not answer is said to be silent; of its stacks the arbiter then
    tells what the worker's signal handler writes down.
    """

    _next_id = 0

    def __init__(self, arbiter: Arbiter, history: History, client: Requester, what: str, wids: list[int]) -> None:
        super().__init__(arbiter, history, client)
        self.what = what
        self.left = deque(wids)
        self.asked: WorkerProcess | None = None
        self.id = 0
        self.dump_from: int | None = None  # size of the dump file before the signal, while its stacks are awaited

    def begin(self) -> None:
        self._ask_next()

    def notice(self, happening: Happening) -> None:
        worker, message = happening.worker, happening.message
        if self.asked is None or worker is not self.asked:
            return
        if happening.what is What.GONE:
            self._tell({"error": "it has ended before it answered"})
        elif happening.what is What.ANSWER and message is not None and message.get("id") == self.id:
            if self.dump_from is not None:  # it was slow, not stuck; what it has written down is the better picture
                return
            self._tell({key: value for key, value in message.items() if key not in ("t", "id")})

    def expire(self, now: float) -> None:
        worker = self.asked
        if worker is None:
            self._ask_next()
        elif self.dump_from is not None:
            self._tell_dump(worker)
        elif self.what == "stacks" and catches(worker.pid, DUMP_SIGNAL):
            worker.dumped = True
            self.dump_from = os.fstat(worker.dump).st_size
            self.deadline = now + DUMP_TIME
            worker.signal(DUMP_SIGNAL)
        else:
            more = "" if self.what != "stacks" or not worker.pid else ", and does not catch the signal for its stacks"
            self._tell({"error": f"no answer within {ANSWER_TIMEOUT:g} s: its event loop is blocked{more}"})

    def _ask_next(self) -> None:
        self.asked = None
        if self.client.unread > OUT_PAUSE:
            self.deadline = time.monotonic() + 0.05
            return
        while self.left:
            worker = self.arbiter.workers.get(self.left.popleft())
            if worker is None:
                continue  # gone meanwhile
            Ask._next_id += 1
            self.asked, self.id = worker, Ask._next_id
            self.deadline = time.monotonic() + ANSWER_TIMEOUT
            self.arbiter.hub.send(worker.channel, {"t": "ask", "id": self.id, "what": self.what})
            return
        self.deadline = None
        self.client.finish({})

    def _tell_dump(self, worker: WorkerProcess) -> None:
        size, self.dump_from = self.dump_from or 0, None
        lines = read_last_words(worker.dump, size).splitlines()
        if worker.failure is None:  # else it is about to be killed, and these are its last words
            forget_dump(worker.dump)
        silent = f"no answer within {ANSWER_TIMEOUT:g} s: its event loop is blocked, or it still boots"
        self._tell({"silent": silent, "stacks": [escape(line) for line in lines]})

    def _tell(self, answer: dict[str, Any]) -> None:
        worker = self.asked
        assert worker is not None
        who = {"worker": worker.wid, "generation": worker.generation, "pid": worker.pid}
        self.asked = None
        self.client.say({**answer, **who})
        self._ask_next()

    def closing(self) -> dict[str, Any]:
        return {"error": "the arbiter stops"}


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: one without would die of it. Where nobody tells, we trust it."""
    if not sys.platform.startswith("linux"):
        return pid > 0
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            caught = next(line.split()[1] for line in file if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (number - 1) & 1)
    except (OSError, ValueError, StopIteration, IndexError):
        return False
