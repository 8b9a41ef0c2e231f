"""The words of the fleet: what can happen to it (events), what it wants done (actions), what it keeps in mind (config).

Plain data: nothing here decides or performs.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from apphost.errors import ExitCode


class Reason(str, enum.Enum):
    """Why a worker leaves. The value is the word in logs and `status`."""

    RELOAD = "reload"
    SCALE_DOWN = "scale-down"
    STOP = "stop"
    RECYCLE = "recycle"
    STUCK = "stuck"
    BOOT_TIMEOUT = "boot timeout"
    SUPERSEDED = "superseded"
    GIVEN_UP = "generation given up"
    LEFT = "left by itself"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Config:
    """What the fleet needs of the settings; times in seconds."""

    size: int = 1
    boot_timeout: float = 60.0
    timeout: float = 30.0  # 0: a silent worker is left alone
    graceful_timeout: float = 30.0
    stop_timeout: float = 8.0
    shutdown_delay: float = 0.0  # between the order to stop and the stop
    canary: float = 0.0  # for which the first worker of new code serves alone of its kind; 0: it need not
    stand_in: bool = False  # where a target is given up, a generation that only shows why takes its place
    keep_good: bool = False  # but not where good code can go on


# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class ReloadAsked:
    """New code, please: a new generation."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Graceful stop; a second one, or `now`, kills."""

    now: bool = False


@dataclass(frozen=True, slots=True)
class ScaleAsked:
    """TTIN (+1), TTOU (-1)."""

    delta: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """`config`: the settings of its generation, which count from now on if this is what proves it."""

    wid: int
    config: Config | None = None


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    """A worker is well, and has so many `connections`."""

    wid: int
    connections: int = 0


@dataclass(frozen=True, slots=True)
class WorkerAsksReplacement:
    """A worker has served enough (max_requests) and wants a successor before it drains."""

    wid: int


@dataclass(frozen=True, slots=True)
class CanaryFailed:
    """The first worker of this generation answers too many requests with errors."""

    generation: int


@dataclass(frozen=True, slots=True)
class WorkerLeaves:
    """A worker drains on its own account (a stray TERM, a lost channel): it accepts nothing any more."""

    wid: int


@dataclass(frozen=True, slots=True)
class WorkerGone:
    wid: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    ReloadAsked
    | StopAsked
    | ScaleAsked
    | WorkerReady
    | WorkerBeat
    | WorkerAsksReplacement
    | CanaryFailed
    | WorkerLeaves
    | WorkerGone
    | Tick
)

# --------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Spawn:
    wid: int
    generation: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Tell a worker to finish within `seconds` and go; `successors` are the ready workers that take its connections."""

    wid: int
    seconds: float
    reason: Reason
    successors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StopListening:
    """The stop begins: give up the listeners; the workers, each with its own copy, take what still waits there."""


@dataclass(frozen=True, slots=True)
class CanaryStarted:
    """The first worker of a new generation serves, and is watched for `seconds`."""

    generation: int
    wid: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Dump:
    """Make a stuck worker write down its stacks and requests; a Kill follows."""

    wid: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Kill:
    wid: int
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class GenerationComplete:
    """Every serving worker is of this generation."""

    generation: int


@dataclass(frozen=True, slots=True)
class GenerationGivenUp:
    """This generation was not proven; `keeping` goes on serving, until `stand_in` is ready, if there is one (not 0)."""

    generation: int
    keeping: int
    stand_in: int = 0


@dataclass(frozen=True, slots=True)
class Halt:
    """Nothing is left to do: end the arbiter with `code`."""

    code: ExitCode


Action = (
    Spawn | Drain | StopListening | CanaryStarted | Dump | Kill | GenerationComplete | GenerationGivenUp | Halt
)  # fmt: skip
