"""The fleet: which workers there should be, as a pure function of events and time.

`step(fleet, event, now)` moves at most one worker through `lifecycle.TRANSITIONS`, then `_reconcile` compares what is
wanted (size, generation, stopping) with what there is and answers the difference as a list of actions; whoever calls
performs them. `next_deadline(fleet)` says when to come back with a `Tick` if nothing else happens. Times are seconds of
any monotonic clock; the fleet reads no clock, knows no process and imports nothing that could.

"Reloading" is not a stored mode: it is what reconciling looks like while ready workers are of an older generation than
the target.

Vocabulary: a generation is *proven* once one of its workers was ready, or with `canary`, where there is proven code to
fall back to, once that worker has served on probation. The *target* is the generation asked for last; `good` is the
newest proven one. A target that fails before it is proven is given up; the target falls back to `good`, or moves on
to a *stand-in*, a generation that shows why (development).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from apphost.arbiter.vocabulary import (
    Action,
    CanaryFailed,
    CanaryStarted,
    Config,
    Drain,
    Dump,
    Event,
    GenerationComplete,
    GenerationGivenUp,
    Halt,
    Kill,
    Reason,
    ReloadAsked,
    ScaleAsked,
    Spawn,
    StopAsked,
    StopListening,
    Tick,
    WorkerAsksReplacement,
    WorkerBeat,
    WorkerGone,
    WorkerLeaves,
    WorkerReady,
)
from apphost.errors import ExitCode
from apphost.lifecycle import State, allowed

BACKOFF_FIRST = 0.1  # s before a crashed worker's successor boots; doubles with every crash in a row
BACKOFF_MAX = 30.0  # s
STEADY_AFTER = 10.0  # s of service after which a crash no longer counts as one "in a row"
BOOT_STOP_GRACE = 0.25  # s that a booting worker gets to end after it was told to stop: it serves nobody yet
DUMP_GRACE = 1.0  # s that a stuck worker gets to write down its stacks before it is killed
KILL_GRACE = 1.0  # s between the moment a worker should have finished its drain and the moment it is killed
REKILL_AFTER = 5.0  # s until a kill is sent again to a worker that is still there (SIGKILL can be late, never lost)
SUPERSEDE_AFTER = 5.0  # s of boot after which a newer reload ends an unproven generation instead of waiting for it
SURGE = 1  # workers more than `size` while one is being replaced
DRAINING_EXTRA = 3  # workers more than `size` that may drain before an upgrade waits: bounds memory in a reload storm


@dataclass(slots=True)
class Worker:
    wid: int
    generation: int
    born: float
    state: State = State.BOOTING
    ready_at: float = 0.0
    deadline: float | None = None  # when the fleet must act on this worker if nothing is heard
    reason: Reason | None = None  # why it leaves
    stale: bool = False  # asked to be replaced (recycling)
    killed: bool = False
    connections: int = 0  # at its last beat


# ----------------------------------------------------------------------------------------------------------- fleet


@dataclass(slots=True)
class Fleet:
    """All there is to know. `Fleet(config)` makes one; `step(fleet, Tick(), now)` then spawns the first workers."""

    config: Config
    size: int = -1  # wanted workers: config.size, moved by ScaleAsked
    target: int = 1
    good: int = 0  # newest proven generation, 0: none yet
    newest: int = 1  # highest generation number handed out
    complete: int = 0  # generation that GenerationComplete was said of last
    again: bool = False  # a reload came while the target was unproven
    stand_in: int = 0  # the newest generation that only shows why the one before it was given up
    target_since: float = 0.0
    canary_until: float | None = None  # while the first worker of the target serves on probation
    canary_config: Config | None = None  # the settings that count once it has passed
    stop_at: float | None = None  # when the stop that was asked for begins (shutdown_delay)
    stopping: bool = False
    stop_deadline: float = 0.0
    exit_code: ExitCode = ExitCode.OK
    halted: bool = False
    crashes: int = 0  # in a row
    not_before: float | None = None  # back-off: nothing is spawned earlier than this
    next_wid: int = 1
    workers: dict[int, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 0:
            self.size = self.config.size

    def having(self, *states: State) -> list[Worker]:
        """The workers in any of `states`, oldest first."""
        return [w for w in self.workers.values() if w.state in states]

    def is_fresh(self, worker: Worker) -> bool:
        return worker.generation == self.target and not worker.stale

    @property
    def generations(self) -> set[int]:
        """The generations that may still be asked for a worker or that still have one."""
        return {self.target, self.good, *(w.generation for w in self.workers.values())} - {0}


def step(fleet: Fleet, event: Event, now: float) -> list[Action]:
    """Take in one event and answer what to do. After `Halt` every event answers nothing."""
    if fleet.halted:
        return []
    if type(event) is WorkerBeat:  # the most frequent event, and one that never asks for anything
        return _worker_beat(fleet, event, now)
    actions = _HANDLERS[type(event)](fleet, event, now)
    actions += _expire(fleet, now)
    actions += _reconcile(fleet, now)
    return actions


def next_deadline(fleet: Fleet) -> float | None:
    """When a `Tick` is due at the latest, or None when only an event can change anything."""
    if fleet.halted:
        return None
    deadlines = [w.deadline for w in fleet.workers.values() if w.deadline is not None]
    if not fleet.stopping:
        deadlines += [due for due in (fleet.not_before, fleet.canary_until, fleet.stop_at) if due is not None]
        if fleet.again:
            deadlines.append(fleet.target_since + SUPERSEDE_AFTER)
    return min(deadlines, default=None)


# -------------------------------------------------------------------------------------------------- one event each


def _reload_asked(fleet: Fleet, _event: ReloadAsked, now: float) -> list[Action]:
    if fleet.stop_at is not None:
        return []
    fleet.crashes = 0
    fleet.not_before = None
    if fleet.target != fleet.good:
        fleet.again = True
    elif not fleet.stopping:
        _new_target(fleet, now)
    return []


def _stop_asked(fleet: Fleet, event: StopAsked, now: float) -> list[Action]:
    if fleet.stopping or event.now or fleet.stop_at is not None:
        fleet.stopping = True
        return [_kill(w, Reason.STOP, now) for w in fleet.workers.values()]
    fleet.stop_at = now + fleet.config.shutdown_delay
    return []  # `_expire` begins the stop, at once where there is no delay


def _begin_stop(fleet: Fleet, now: float) -> list[Action]:
    fleet.stopping = True
    fleet.stop_deadline = now + fleet.config.stop_timeout
    draining = fleet.having(State.DRAINING)
    actions: list[Action] = [StopListening()]
    actions += [_drain(fleet, w, Reason.STOP, now) for w in fleet.having(State.BOOTING, State.READY)]
    for worker in draining:
        worker.deadline = min(worker.deadline or fleet.stop_deadline, fleet.stop_deadline)
        actions.append(_drain_order(worker, Reason.STOP, now, ()))
    return actions


def _scale_asked(fleet: Fleet, event: ScaleAsked, _now: float) -> list[Action]:
    fleet.size = max(1, fleet.size + event.delta)
    return []


def _adopt(fleet: Fleet, config: Config) -> None:
    # A size that TTIN/TTOU chose is kept unless the settings themselves say something new.
    if config.size != fleet.config.size:
        fleet.size = config.size
    fleet.config = config


def _worker_ready(fleet: Fleet, event: WorkerReady, now: float) -> list[Action]:
    worker = fleet.workers.get(event.wid)
    if worker is None or worker.state is not State.BOOTING:
        return []
    _move(worker, State.READY)
    worker.ready_at = now
    worker.deadline = now + fleet.config.timeout if fleet.config.timeout else None
    if worker.generation <= fleet.good:
        return []
    config = event.config or fleet.config
    if not config.canary or not fleet.good:
        _prove(fleet, worker.generation, config, now)
        return []
    if fleet.again:
        return _supersede(fleet, now)
    fleet.canary_until = now + config.canary
    fleet.canary_config = config
    return [CanaryStarted(worker.generation, worker.wid, config.canary)]


def _prove(fleet: Fleet, generation: int, config: Config, now: float) -> None:
    """New code works: from now on it is what counts, and its settings with it.

    In one step: else old code would be spawned for the new size, or new code be complete with the old one.
    """
    _adopt(fleet, config)
    fleet.good = generation
    fleet.canary_until = None
    if fleet.again:
        _new_target(fleet, now)


def _canary_failed(fleet: Fleet, event: CanaryFailed, now: float) -> list[Action]:
    if fleet.canary_until is None or event.generation != fleet.target:
        return []
    return _give_up(fleet, event.generation, now)


def _worker_beat(fleet: Fleet, event: WorkerBeat, now: float) -> list[Action]:
    worker = fleet.workers.get(event.wid)
    if worker is not None and worker.state is State.READY:
        worker.deadline = now + fleet.config.timeout if fleet.config.timeout else None
        worker.connections = event.connections
    return []


def _worker_asks_replacement(fleet: Fleet, event: WorkerAsksReplacement, _now: float) -> list[Action]:
    worker = fleet.workers.get(event.wid)
    if worker is not None and worker.state is State.READY:
        worker.stale = True
        worker.reason = Reason.RECYCLE
    return []


def _worker_leaves(fleet: Fleet, event: WorkerLeaves, now: float) -> list[Action]:
    worker = fleet.workers.get(event.wid)
    if worker is not None and worker.state in (State.BOOTING, State.READY):
        _count_crash(fleet, _is_steady(worker, now), now)  # else one that always leaves is forked without a pause
        _move(worker, State.DRAINING)
        worker.deadline = now + fleet.config.graceful_timeout + KILL_GRACE
        worker.reason = Reason.LEFT
    return []


def _worker_gone(fleet: Fleet, event: WorkerGone, now: float) -> list[Action]:
    worker = fleet.workers.pop(event.wid, None)
    if worker is None:
        return []
    was, steady = worker.state, _is_steady(worker, now)
    _move(worker, State.GONE)
    if fleet.stopping or (was is State.DRAINING and worker.reason is not Reason.LEFT):
        return []
    if worker.generation > fleet.good:
        return _give_up(fleet, worker.generation, now)
    if was is not State.DRAINING:
        _count_crash(fleet, steady, now)
    return []


def _is_steady(worker: Worker, now: float) -> bool:
    return worker.state is State.READY and now - worker.ready_at >= STEADY_AFTER


def _count_crash(fleet: Fleet, steady: bool, now: float) -> None:
    """A worker that had served for a while is replaced at once; one that had not, after a pause that doubles.

    Workers that end during a pause end for the reason that it is for: they neither count nor lengthen it.
    """
    if steady:
        fleet.crashes = 0
    elif fleet.not_before is None or fleet.not_before <= now:
        fleet.crashes += 1
        fleet.not_before = now + min(BACKOFF_MAX, BACKOFF_FIRST * 2 ** min(fleet.crashes - 1, 16))


_HANDLERS: dict[type, Callable[..., list[Action]]] = {
    ReloadAsked: _reload_asked,
    StopAsked: _stop_asked,
    ScaleAsked: _scale_asked,
    WorkerReady: _worker_ready,
    WorkerAsksReplacement: _worker_asks_replacement,
    CanaryFailed: _canary_failed,
    WorkerLeaves: _worker_leaves,
    WorkerGone: _worker_gone,
    Tick: lambda _fleet, _event, _now: [],  # it is for what is due
}

# ------------------------------------------------------------------------------------------------------- deadlines


def _expire(fleet: Fleet, now: float) -> list[Action]:
    """What is due because time has passed."""
    actions: list[Action] = []
    if fleet.not_before is not None and now >= fleet.not_before:
        fleet.not_before = None
    if fleet.stop_at is not None and not fleet.stopping and now >= fleet.stop_at:
        actions += _begin_stop(fleet, now)
    for worker in list(fleet.workers.values()):
        if worker.deadline is None or worker.deadline > now:
            continue
        if worker.state is State.BOOTING:
            actions.append(_dump(worker, Reason.BOOT_TIMEOUT, now))
            if worker.generation > fleet.good:
                actions += _give_up(fleet, worker.generation, now)
            else:
                _count_crash(fleet, False, now)
        elif worker.state is State.READY:
            actions.append(_dump(worker, Reason.STUCK, now))
            if worker.generation > fleet.good:
                actions += _give_up(fleet, worker.generation, now)
        else:
            actions.append(_kill(worker, worker.reason, now))
    if fleet.canary_until is not None and not fleet.stopping and now >= fleet.canary_until:
        if any(w.generation == fleet.target for w in fleet.having(State.READY)):
            _prove(fleet, fleet.target, fleet.canary_config or fleet.config, now)
        else:  # it has left, and is only not gone yet
            actions += _give_up(fleet, fleet.target, now)
    if fleet.again and not fleet.stopping and now >= fleet.target_since + SUPERSEDE_AFTER:
        actions += _supersede(fleet, now)
    return actions


def _supersede(fleet: Fleet, now: float) -> list[Action]:
    """A newer reload is asked for: do not wait for the unproven target any longer."""
    actions = _drain_unproven(fleet, fleet.target, Reason.SUPERSEDED, now)
    _new_target(fleet, now)
    return actions


def _drain_unproven(fleet: Fleet, generation: int, reason: Reason, now: float) -> list[Action]:
    workers = [w for w in fleet.having(State.BOOTING, State.READY) if w.generation == generation]
    return [_drain(fleet, w, reason, now) for w in workers]


# ------------------------------------------------------------------------------------------------------- reconcile


def _reconcile(fleet: Fleet, now: float) -> list[Action]:
    if fleet.stopping:
        if fleet.workers:
            return []
        fleet.halted = True
        return [Halt(fleet.exit_code)]
    actions: list[Action] = []
    # Each pass changes the fleet and so brings it nearer to what is wanted; none left means a fixed point.
    while action := _respawn(fleet, now) or _upgrade(fleet, now) or _retire(fleet, now):
        actions.append(action)
    serving = fleet.having(State.READY)
    if (
        fleet.complete != fleet.target
        and fleet.good == fleet.target
        and len(serving) >= fleet.size
        and all(w.generation == fleet.target for w in fleet.having(State.READY, State.BOOTING))
    ):
        fleet.complete = fleet.target
        actions.append(GenerationComplete(fleet.target))
    return actions


def _respawn(fleet: Fleet, now: float) -> Spawn | None:
    """Too few workers: one more, of code that is known to boot if there is any."""
    # Code that never was ready is no capacity: if it hangs, the site must not wait for its boot timeout.
    alive = [w for w in fleet.having(State.BOOTING, State.READY) if w.generation <= fleet.good or not fleet.good]
    if len(alive) >= fleet.size or fleet.not_before is not None:
        return None
    return _spawn(fleet, fleet.good or fleet.target, now)


def _upgrade(fleet: Fleet, now: float) -> Spawn | None:
    """A worker of old code serves: boot a fresh one beside it, within the surge."""
    alive = fleet.having(State.BOOTING, State.READY)
    outdated = [w for w in alive if not fleet.is_fresh(w)]
    booting_fresh = [w for w in alive if w.state is State.BOOTING and fleet.is_fresh(w)]
    if not outdated or booting_fresh or len(alive) >= fleet.size + SURGE or fleet.not_before is not None:
        return None
    if fleet.canary_until is not None or len(fleet.having(State.DRAINING)) >= fleet.size + DRAINING_EXTRA:
        return None
    return _spawn(fleet, fleet.target, now)


def _retire(fleet: Fleet, now: float) -> Action | None:
    """More ready workers than wanted: drain one, old code first, then who asked for it, then the emptiest.

    So the connections of the full ones move when there are more to share them.
    """
    # A worker on probation is extra until it has passed: nothing old retires for it.
    ready = [w for w in fleet.having(State.READY) if fleet.canary_until is None or w.generation <= fleet.good]
    if len(ready) <= fleet.size:
        boots = fleet.having(State.BOOTING)
        surplus = len(fleet.having(State.BOOTING, State.READY)) > fleet.size + SURGE
        return _drain(fleet, boots[-1], Reason.SCALE_DOWN, now) if surplus else None
    victim = min(ready, key=lambda w: (fleet.is_fresh(w), w.generation, not w.stale, w.connections, w.wid))
    replaced = any(w.generation > victim.generation for w in ready)
    return _drain(fleet, victim, victim.reason or (Reason.RELOAD if replaced else Reason.SCALE_DOWN), now)


# --------------------------------------------------------------------------------------------- moves of one worker


def _move(worker: Worker, state: State) -> None:
    assert allowed(worker.state, state), f"worker {worker.wid} cannot go from {worker.state} to {state}"
    worker.state = state


def _spawn(fleet: Fleet, generation: int, now: float) -> Spawn:
    worker = Worker(fleet.next_wid, generation, now, deadline=now + fleet.config.boot_timeout)
    if not fleet.workers and not fleet.good:
        fleet.target_since = now  # the first generation of all: nobody asked for it through `_new_target`
    fleet.next_wid += 1
    fleet.workers[worker.wid] = worker
    return Spawn(worker.wid, generation)


def _drain(fleet: Fleet, worker: Worker, reason: Reason, now: float) -> Action:
    booting = worker.state is State.BOOTING
    _move(worker, State.DRAINING)
    worker.reason = reason
    if booting:
        worker.deadline = now + BOOT_STOP_GRACE
    elif fleet.stopping:
        worker.deadline = fleet.stop_deadline
    else:
        worker.deadline = now + fleet.config.graceful_timeout + KILL_GRACE
    return _drain_order(worker, reason, now, () if fleet.stopping or booting else _successors(fleet, worker))


def _successors(fleet: Fleet, worker: Worker) -> list[int]:
    """Who may take over the connections of `worker`: what is newest among the ready, which need not be the target.

    Only proven code; and older code only where the worker's own has been given up. The emptiest first.
    """
    given_up = worker.generation > fleet.good
    ready = [w for w in fleet.having(State.READY) if w.generation <= fleet.good]
    ready = [w for w in ready if given_up or w.generation >= worker.generation]
    ready = [w for w in ready if not w.stale] or ready
    newest = max((w.generation for w in ready), default=0)
    ready.sort(key=lambda w: w.connections)
    return [w.wid for w in ready if w.generation == newest]


def _drain_order(worker: Worker, reason: Reason, now: float, successors: Iterable[int]) -> Drain:
    assert worker.deadline is not None
    return Drain(worker.wid, max(0.0, worker.deadline - now - KILL_GRACE), reason, tuple(successors))


def _dump(worker: Worker, reason: Reason, now: float) -> Dump:
    _move(worker, State.DRAINING)
    worker.reason = reason
    worker.deadline = now + DUMP_GRACE
    return Dump(worker.wid, reason)


def _kill(worker: Worker, reason: Reason | None, now: float) -> Kill:
    _move(worker, State.DRAINING)
    worker.reason = worker.reason or reason
    worker.deadline = now + REKILL_AFTER
    worker.killed = True
    return Kill(worker.wid, reason)


def _new_target(fleet: Fleet, now: float) -> None:
    fleet.newest += 1
    fleet.target = fleet.newest
    fleet.target_since = now
    fleet.again = False
    fleet.canary_until = None


def _give_up(fleet: Fleet, generation: int, now: float) -> list[Action]:
    """A generation that never was proven has failed: fall back, or end where nothing has ever been proven."""
    if generation != fleet.target or fleet.stopping:
        return []
    actions = _drain_unproven(fleet, generation, Reason.GIVEN_UP, now)
    fleet.canary_until = None
    if fleet.again:
        _new_target(fleet, now)
        return [*actions, GenerationGivenUp(generation, fleet.good)]
    shows = fleet.good in (0, fleet.stand_in) or not fleet.config.keep_good
    if fleet.config.stand_in and shows and generation != fleet.stand_in and fleet.stop_at is None:
        _new_target(fleet, now)
        fleet.stand_in = fleet.target
        return [*actions, GenerationGivenUp(generation, fleet.good, fleet.stand_in)]
    if fleet.good:
        fleet.target = fleet.good
        return [*actions, GenerationGivenUp(generation, fleet.good)]
    fleet.stopping = True
    if fleet.stop_at is None:  # else it only ends early what was to end
        fleet.exit_code = ExitCode.APPLICATION
    return actions
