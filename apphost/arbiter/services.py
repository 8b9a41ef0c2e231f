"""What runs in the arbiter beside the serving: it is told what happens, and it has its own time.

A service may watch descriptors through the arbiter's hub, give orders through `Arbiter.ask`, and must never block.
"""

from __future__ import annotations

import enum
import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from apphost.arbiter.processes import Failure, WorkerProcess
from apphost.logs import Log
from apphost.messages import Message


class What(enum.Enum):
    """What can happen; the fields of `Happening` that each one fills."""

    BOOTING = "booting"  # worker
    READY = "ready"  # worker
    DRAINING = "draining"  # worker, text: why
    GONE = "gone"  # worker, status, text and detail: as in the log
    ANSWER = "answer"  # worker, message: what it says when a service has asked it something
    RELOAD_ASKED = "reload asked"  # text: by whom
    PROBATION = "probation"  # generation, worker
    COMPLETE = "complete"  # generation, text
    GIVEN_UP = "given up"  # generation, text, failure
    STANDS_IN = "stands in"  # generation, text: it serves the page that shows why the one before was given up
    STOP_ASKED = "stop asked"  # text: by whom
    UPGRADE_GIVEN_UP = "upgrade given up"  # text: why


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    what: What
    worker: WorkerProcess | None = None
    generation: int = 0
    status: int | None = None
    text: str = ""
    detail: str = ""
    failure: Failure | None = None
    message: Message | None = None


class Service(Protocol):
    @property
    def deadline(self) -> float | None:
        """Monotonic time at which `expire` is to be called; None: not at all."""

    def expire(self, now: float) -> None:
        """`deadline` has come; it must be moved, or cleared."""

    def notice(self, happening: Happening) -> None:
        """This has happened just now."""

    def close(self) -> None:
        """The arbiter ends: everything has stopped."""


class Guarded(Protocol):
    """A service that many lines of code serve, for strangers: one wrong line there must not end the arbiter."""

    title: str  # for the log

    @property
    def log(self) -> Log: ...

    def settle(self, failed: bool) -> None:
        """The end of every call from outside; `failed`: it ended with a defect."""


T = TypeVar("T", bound=Callable[..., None])


def guarded(method: T) -> T:
    """For methods of a `Guarded` that are called from outside: a defect in one is logged, and the arbiter goes on."""

    @functools.wraps(method)
    def wrapper(self: Guarded, *args: Any) -> None:
        failed = False
        try:
            method(self, *args)
        except Exception:
            failed = True
            self.log.write("error", f"internal error in the {self.title}; it goes on", traceback.format_exc())
        self.settle(failed)

    return wrapper  # type: ignore[return-value]
