"""The fleet in an adversarial world: any event at any time, also late, doubled, unknown and exactly at a deadline.

Hypothesis plays operator, workers and clock. After every step the rules below hold; when a play is over, the fleet is
continued twice, on copies: in a fair world it must converge, and after a stop it must halt.
"""

from __future__ import annotations

import copy

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from apphost.arbiter.fleet import BOOT_STOP_GRACE, DRAINING_EXTRA, SURGE, Fleet, next_deadline, step
from apphost.arbiter.vocabulary import (
    Action,
    Config,
    Configured,
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
    Tick,
    WorkerAsksReplacement,
    WorkerBeat,
    WorkerGone,
    WorkerLeaves,
    WorkerReady,
)
from apphost.errors import ExitCode
from apphost.lifecycle import State

OWN_DOING = {Reason.RELOAD, Reason.RECYCLE, Reason.SCALE_DOWN}
MAX_STEPS = 500  # of a continued play; the longest that a fair one takes is some 20 steps a worker

configs = st.builds(
    Config,
    size=st.integers(1, 4),
    boot_timeout=st.sampled_from([0.1, 3.0, 7.0, 60.0]),
    timeout=st.sampled_from([0.0, 2.0, 30.0]),
    graceful_timeout=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    stop_timeout=st.sampled_from([0.0, 0.1, 8.0, 100.0]),
)
durations = st.sampled_from([0.0, 0.05, 0.1, 0.25, 1.0, 4.9, 5.0, 10.0, 31.0, 100.0]) | st.floats(0, 50)
picks = st.integers(0, 20)


class World(RuleBasedStateMachine):
    @initialize(config=configs, start=st.sampled_from([0.0, 0.5, 12345.678]))
    def begin(self, config: Config, start: float) -> None:
        self.fleet = Fleet(config)
        self.now = start
        self.processes: dict[int, int] = {}  # wid: generation, of every process that the world has not ended yet
        self.last_wid = 0
        self.proven: set[int] = set()
        self.given_up: set[int] = set()
        self.completed: list[int] = []
        self.stop_asked = False
        self.failed_to_start = False
        self.halts = 0
        self.happens(Tick())

    # ------------------------------------------------------------------------------------------------ one step

    def happens(self, event: Event) -> None:
        fleet = self.fleet
        if isinstance(event, StopAsked):
            self.stop_asked = True
        elif isinstance(event, WorkerGone):
            self.processes.pop(event.wid, None)
        over = bool(self.halts)
        ready = {w.wid for w in fleet.having(State.READY)}
        booting = {w.wid: w.generation for w in fleet.having(State.BOOTING)}
        if isinstance(event, WorkerReady) and event.wid in booting:
            self.proven.add(booting[event.wid])
        actions = step(fleet, event, self.now)
        assert not (over and actions), "a halted fleet says nothing"
        if fleet.stopping and not self.stop_asked:
            self.failed_to_start = True
        for action in actions:
            self.check(action)
        self.check_capacity(event, ready, actions)
        failed = {action.wid for action in actions if isinstance(action, Dump)}
        failed |= {event.wid} if isinstance(event, WorkerGone) else set()
        for wid in failed & booting.keys():
            assert fleet.stopping or booting[wid] in self.proven | self.given_up, "a failed boot is taken notice of"

    def check(self, action: Action) -> None:
        fleet = self.fleet
        match action:
            case Spawn(wid, generation):
                assert not fleet.stopping, "nothing is spawned after a stop"
                assert wid > self.last_wid, "a wid is never used twice"
                assert generation in {fleet.target, fleet.good}
                assert generation not in self.given_up
                self.last_wid = wid
                self.processes[wid] = generation
            case Drain(wid, seconds, _, successors):
                assert wid in self.processes
                assert seconds >= 0
                self.check_successors(wid, successors)
            case Dump(wid, _) | Kill(wid, _):
                assert wid in self.processes
            case GenerationGivenUp(generation, keeping):
                assert generation not in self.proven | self.given_up
                assert keeping == fleet.good
                assert fleet.target != generation
                self.given_up.add(generation)
            case GenerationComplete(generation):
                assert self.completed[-1:] != [generation], "said once"
                assert generation in self.proven
                assert {w.generation for w in fleet.having(State.READY, State.BOOTING)} == {generation}
                assert len(fleet.having(State.READY)) >= fleet.size
                self.completed.append(generation)
            case Halt(code):
                assert not self.processes
                assert fleet.stopping
                assert code is (ExitCode.APPLICATION if self.failed_to_start else ExitCode.OK)
                self.halts += 1

    def check_successors(self, wid: int, successors: tuple[int, ...]) -> None:
        assert wid not in successors
        assert len(set(successors)) == len(successors)
        assert set(successors) <= set(self.processes)
        assert not (successors and self.fleet.stopping), "nobody is left to take over"

    def check_capacity(self, event: Event, ready_before: set[int], actions: list[Action]) -> None:
        """A ready worker is lost by its own doing, by the clock, by a stop, or where more than `size` are ready."""
        fleet = self.fleet
        ready = {w.wid for w in fleet.having(State.READY)}
        own_word = {event.wid} if isinstance(event, (WorkerGone, WorkerLeaves)) else set()
        dumped = {action.wid for action in actions if isinstance(action, Dump)}
        lost = ready_before - ready - own_word - dumped
        drains = [a for a in actions if isinstance(a, Drain) and a.reason in OWN_DOING and a.wid in ready_before]
        assert fleet.stopping or lost <= {drain.wid for drain in drains}
        for drain in drains:
            assert len(ready) >= fleet.size
            heirs = {self.processes[wid] for wid in drain.successors}
            assert heirs, "where enough are ready, someone can take the connections"
            assert min(heirs) >= self.processes[drain.wid], "connections never move to older code"
            staying = {self.processes[wid] for wid in ready if not fleet.workers[wid].stale}
            assert max(staying, default=0) in heirs | {0}

    # --------------------------------------------------------------------------------------- what always holds

    @invariant()
    def never_more_than_size_and_surge(self) -> None:
        """After *every* step, also the one in which TTOU or new settings shrink the size: the excess drains at once."""
        assert len(self.fleet.having(State.BOOTING, State.READY)) <= self.fleet.size + SURGE

    @invariant()
    def the_fleet_knows_exactly_the_processes_there_are(self) -> None:
        assert {w.wid: w.generation for w in self.fleet.workers.values()} == self.processes

    @invariant()
    def at_most_one_unproven_worker_boots_beside_proven_code(self) -> None:
        if self.fleet.good:
            assert sum(w.generation > self.fleet.good for w in self.fleet.having(State.BOOTING)) <= 1

    @invariant()
    def good_is_the_newest_proven_generation(self) -> None:
        assert self.fleet.good == max(self.proven, default=0)
        assert self.fleet.good <= self.fleet.target <= self.fleet.newest

    @invariant()
    def only_a_request_or_a_first_start_that_fails_ends_the_fleet(self) -> None:
        if self.failed_to_start:
            assert not self.proven
        assert self.fleet.stopping == (self.stop_asked or self.failed_to_start)
        assert self.fleet.halted == bool(self.halts)
        assert self.halts <= 1

    @invariant()
    def every_worker_that_must_do_something_has_a_deadline(self) -> None:
        for worker in self.fleet.having(State.BOOTING, State.DRAINING):
            assert worker.deadline is not None

    @invariant()
    def deadlines_lie_ahead(self) -> None:
        due = next_deadline(self.fleet)
        assert due is None or due > self.now, "the arbiter would spin"

    @invariant()
    def nothing_is_due_before_the_next_deadline(self) -> None:
        """No lost wake-up: the arbiter may sleep until then, or for ever where there is none."""
        due = next_deadline(self.fleet)
        almost = self.now + 1e6 if due is None else self.now + 0.999 * (due - self.now)
        if due is None or almost < due:  # two deadlines may be one rounding error apart
            assert step(copy.deepcopy(self.fleet), Tick(), almost) == []

    @invariant()
    def a_step_reaches_a_fixed_point(self) -> None:
        again = copy.deepcopy(self.fleet)
        assert step(again, Tick(), self.now) == []
        assert again == self.fleet

    @invariant()
    def whoever_is_missing_has_a_reason(self) -> None:
        """Too few workers, or old ones, only where a boot, a pause, a drain or a full house waits."""
        fleet = self.fleet
        if fleet.stopping:
            return
        booting = fleet.having(State.BOOTING)
        if len(booting) + len(fleet.having(State.READY)) < fleet.size:
            assert fleet.not_before is not None
        if any(not fleet.is_fresh(w) for w in fleet.having(State.READY)):
            crowded = len(fleet.having(State.DRAINING)) >= fleet.size + DRAINING_EXTRA
            assert booting or crowded or fleet.not_before is not None

    # ------------------------------------------------------------------------------------------- the operator

    @rule(times=st.sampled_from([1, 1, 1, 2, 50]))
    def reload(self, times: int) -> None:
        newest = self.fleet.newest
        for _ in range(times):
            self.happens(ReloadAsked())
        assert self.fleet.newest <= newest + 2, "a storm at one moment costs two generations at most"

    @rule(delta=st.sampled_from([+1, -1]))
    def scale(self, delta: int) -> None:
        if self.fleet.size < 6 or delta < 0:
            self.happens(ScaleAsked(delta))

    @rule(config=configs)
    def configure(self, config: Config) -> None:
        self.happens(Configured(config))

    @rule(luck=st.integers(0, 15), now=st.booleans())
    def stop(self, luck: int, now: bool) -> None:
        if luck == 7 or self.stop_asked:
            self.happens(StopAsked(now))

    # -------------------------------------------------------------------------------------------- the workers

    def anyone(self, pick: int, *states: State) -> int | None:
        wids = [w.wid for w in self.fleet.having(*states)]
        return wids[pick % len(wids)] if wids else None

    @rule(pick=picks)
    def gets_ready(self, pick: int) -> None:
        if (wid := self.anyone(pick, State.BOOTING)) is not None:
            self.happens(WorkerReady(wid))

    @rule()
    def all_get_ready(self) -> None:
        for worker in self.fleet.having(State.BOOTING):
            self.happens(WorkerReady(worker.wid))

    @rule()
    def all_beat(self) -> None:
        for worker in self.fleet.having(State.READY):
            self.happens(WorkerBeat(worker.wid))

    @rule(pick=picks)
    def asks_replacement(self, pick: int) -> None:
        if (wid := self.anyone(pick, State.READY)) is not None:
            self.happens(WorkerAsksReplacement(wid))

    @rule(pick=picks)
    def leaves(self, pick: int) -> None:
        if (wid := self.anyone(pick, State.BOOTING, State.READY)) is not None:
            self.happens(WorkerLeaves(wid))

    @rule(pick=picks, state=st.sampled_from([State.BOOTING, State.READY]))
    def crashes(self, pick: int, state: State) -> None:
        if (wid := self.anyone(pick, state)) is not None:
            self.happens(WorkerGone(wid))

    @rule(pick=picks)
    def finishes_its_drain(self, pick: int) -> None:
        if (wid := self.anyone(pick, State.DRAINING)) is not None:
            self.happens(WorkerGone(wid))

    @rule(
        kind=st.sampled_from([WorkerReady, WorkerBeat, WorkerAsksReplacement, WorkerLeaves, WorkerGone]),
        wid=st.integers(-1, 40),
    )
    def says_something_late_doubled_or_unknown(self, kind: type, wid: int) -> None:
        if kind is not WorkerGone or wid not in self.processes:
            self.happens(kind(wid))

    # ---------------------------------------------------------------------------------------------- the clock

    @rule(seconds=durations)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.happens(Tick())

    @rule(seconds=durations, pick=picks)
    def time_passes_until_someone_dies(self, seconds: float, pick: int) -> None:
        """Without a Tick: the event finds what is overdue, perhaps in the very worker that it is about."""
        if self.processes:
            self.now += seconds
            self.happens(WorkerGone(list(self.processes)[pick % len(self.processes)]))

    @rule()
    def the_next_deadline_comes(self) -> None:
        if (due := next_deadline(self.fleet)) is not None:
            self.now = due
            self.happens(Tick())

    # ---------------------------------------------------------------------------------------- and how it ends

    def teardown(self) -> None:
        if hasattr(self, "fleet"):
            converges_in_a_fair_world(copy.deepcopy(self.fleet), self.now)
            halts_after_a_stop(copy.deepcopy(self.fleet), self.now)


def converges_in_a_fair_world(fleet: Fleet, now: float) -> None:
    """Boots succeed, workers beat, drains end: then `size` workers are ready, all of the target, and it is quiet."""
    if fleet.stopping:
        return
    for _ in range(MAX_STEPS):
        if worker := next(iter(fleet.having(State.BOOTING)), None):
            step(fleet, WorkerReady(worker.wid), now)
        elif worker := next(iter(fleet.having(State.DRAINING)), None):
            step(fleet, WorkerGone(worker.wid), now)
        elif fleet.not_before is not None:
            now = fleet.not_before
            for worker in fleet.having(State.READY):
                step(fleet, WorkerBeat(worker.wid), now)
            step(fleet, Tick(), now)
        else:
            break
    assert [fleet.is_fresh(w) and w.state is State.READY for w in fleet.workers.values()] == [True] * fleet.size
    assert fleet.good == fleet.target == fleet.complete
    assert not fleet.again
    assert fleet.generations == {fleet.target}


def halts_after_a_stop(fleet: Fleet, now: float) -> None:
    """Workers ignore every drain but no kill: one Halt, in time, and then silence."""
    if fleet.halted:
        return
    first = not fleet.stopping
    limit = now + max(fleet.config.stop_timeout, BOOT_STOP_GRACE)
    actions = step(fleet, StopAsked(), now)
    halts: list[Halt] = []
    for _ in range(MAX_STEPS):
        halts += [action for action in actions if isinstance(action, Halt)]
        killed = [action.wid for action in actions if isinstance(action, Kill)]
        actions = []
        for wid in killed:
            actions += step(fleet, WorkerGone(wid), now)
        if not killed:
            due = next_deadline(fleet)
            if due is None:
                break
            now = max(now, due)
            actions = step(fleet, Tick(), now)
    assert len(halts) == 1
    assert not fleet.workers
    if first:
        assert halts == [Halt(ExitCode.OK)]
        assert now <= limit
    assert step(fleet, WorkerGone(1), now + 1.0) == step(fleet, Tick(), now + 100.0) == []


TestFleetInAnAdversarialWorld = World.TestCase
TestFleetInAnAdversarialWorld.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
