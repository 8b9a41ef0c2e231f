"""The fleet in an adversarial world: any event at any time, also late, doubled, unknown and exactly at a deadline.

Hypothesis plays operator, workers and clock. After every step the rules below hold; when a play is over, the fleet is
continued twice, on copies: in a fair world it must converge, and after a stop it must halt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from apphost.arbiter.fleet import (
    BOOT_STOP_GRACE,
    DRAINING_EXTRA,
    SUPERSEDE_AFTER,
    SURGE,
    Fleet,
    next_deadline,
    step,
)
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
from apphost.lifecycle import State
from tests.test_state import back, wire_of

OWN_DOING = {Reason.RELOAD, Reason.RECYCLE, Reason.SCALE_DOWN}
OF_UNPROVEN_CODE = {Reason.GIVEN_UP, Reason.SUPERSEDED}
MAX_STEPS = 500  # of a continued play; the longest that a fair one takes is some 20 steps a worker

configs = st.builds(
    Config,
    size=st.integers(1, 4),
    boot_timeout=st.sampled_from([0.1, 3.0, 7.0, 60.0]),
    timeout=st.sampled_from([0.0, 2.0, 30.0]),
    graceful_timeout=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    stop_timeout=st.sampled_from([0.0, 0.1, 8.0, 100.0]),
    shutdown_delay=st.sampled_from([0.0, 0.0, 1.0, 20.0]),
    canary=st.sampled_from([0.0, 1.0, 10.0, 60.0]),
    stand_in=st.booleans(),
    keep_good=st.booleans(),
)
durations = st.sampled_from([0.0, 0.05, 0.1, 0.25, 1.0, 4.9, 5.0, 10.0, 31.0, 100.0]) | st.floats(0, 50)
picks = st.integers(0, 20)


def snapshot(fleet: Fleet) -> Fleet:
    return replace(fleet, workers={wid: replace(worker) for wid, worker in fleet.workers.items()})


class Probation(NamedTuple):
    """What the world remembers of a canary."""

    generation: int
    wid: int
    due: float
    config: Config


class World(RuleBasedStateMachine):
    @initialize(
        config=configs,
        start=st.sampled_from([0.0, 0.5, 12345.678]),
        chapter=st.sampled_from(["first start", "serving", "reload", "probation"]),
    )
    def begin(self, config: Config, start: float, chapter: str) -> None:
        """A play begins in one of four chapters: most of those that begin with a first start end there too."""
        self.fleet = Fleet(replace(config, canary=config.canary or 10.0) if chapter == "probation" else config)
        self.now = start
        self.processes: dict[int, int] = {}  # wid: generation, of every process that the world has not ended yet
        self.last_wid = 0
        self.proven: set[int] = set()
        self.given_up: set[int] = set()
        self.stand_ins: set[int] = set()
        self.completed: list[int] = []
        self.probation: Probation | None = None
        self.stop_due: float | None = None  # when the stop that was asked for begins
        self.stop_now = False
        self.stopped_listening = 0
        self.failed_to_start = False
        self.exit_code = ExitCode.OK
        self.halts = 0
        self.happens(Tick())
        if chapter != "first start":
            self.all_get_ready()
        if chapter in ("reload", "probation"):
            self.happens(ReloadAsked())
        if chapter == "probation":
            self.all_get_ready()
            assert self.probation is not None

    # ------------------------------------------------------------------------------------------------ one step

    def happens(self, event: Event) -> None:
        fleet, before = self.fleet, snapshot(self.fleet)
        over = bool(self.halts)
        if isinstance(event, StopAsked):
            self.note_stop(event)
        elif isinstance(event, WorkerGone):
            self.processes.pop(event.wid, None)
        expected = self.expect_readiness(event) if isinstance(event, WorkerReady) and not over else []
        actions = step(fleet, event, self.now)
        assert not (over and actions), "a halted fleet says nothing"
        assert [a for a in actions if isinstance(a, CanaryStarted)] == expected
        self.check_passed(before, actions)
        if fleet.stopping and not self.must_stop and not self.failed_to_start:
            self.failed_to_start = True
            self.exit_code = ExitCode.OK if self.stop_asked else ExitCode.APPLICATION
        for action in actions:
            self.check(action)
        self.check_capacity(event, before, actions)
        self.check_stop(before, actions)
        self.check_settings(event, before)
        self.check_end_of_probation(event, before, actions)
        self.check_failures(event, before, actions)

    @property
    def stop_asked(self) -> bool:
        return self.stop_now or self.stop_due is not None

    @property
    def must_stop(self) -> bool:
        return self.stop_now or (self.stop_due is not None and self.now >= self.stop_due)

    def note_stop(self, event: StopAsked) -> None:
        if event.now or self.stop_asked or self.fleet.stopping:
            self.stop_now = True
        else:
            self.stop_due = self.now + self.fleet.config.shutdown_delay

    def expect_readiness(self, event: WorkerReady) -> list[Action]:
        """The first readiness of new code proves it, begins its probation, or comes too late to matter."""
        worker = self.fleet.workers.get(event.wid)
        if worker is None or worker.state is not State.BOOTING or worker.generation in self.proven:
            return []
        config = event.config or self.fleet.config
        if not self.proven or not config.canary:
            self.proven.add(worker.generation)
            return []
        if self.fleet.again:
            return []
        self.probation = Probation(worker.generation, worker.wid, self.now + config.canary, config)
        return [CanaryStarted(worker.generation, worker.wid, config.canary)]

    def check_passed(self, before: Fleet, actions: list[Action]) -> None:
        """New code is proven by serving to the end of its probation, and by nothing else."""
        probation, good = self.probation, self.fleet.good
        if good in self.proven | {0}:
            return
        assert probation is not None
        assert probation.generation == good
        assert self.now >= probation.due
        assert probation.wid in {w.wid for w in before.having(State.READY)}
        assert probation.wid not in {a.wid for a in actions if isinstance(a, Dump)}
        assert self.fleet.config == probation.config
        self.proven.add(good)

    def check(self, action: Action) -> None:
        fleet = self.fleet
        match action:
            case Spawn(wid, generation):
                assert not fleet.stopping, "nothing is spawned after a stop"
                assert wid > self.last_wid, "a wid is never used twice"
                assert generation in {fleet.target, fleet.good}
                assert generation not in self.given_up
                assert fleet.canary_until is None or generation == fleet.good, "one canary is enough"
                self.last_wid = wid
                self.processes[wid] = generation
            case Drain(wid, seconds, reason, successors):
                assert wid in self.processes
                assert seconds >= 0
                assert reason not in OF_UNPROVEN_CODE or self.processes[wid] not in self.proven
                self.check_successors(wid, successors)
            case Dump(wid, _) | Kill(wid, _):
                assert wid in self.processes
            case GenerationGivenUp(generation, keeping, stand_in):
                assert generation not in self.proven | self.given_up
                if stand_in:
                    assert fleet.config.stand_in
                    assert stand_in == fleet.target == fleet.stand_in == generation + 1
                    assert generation not in self.stand_ins, "what shows a failure has none shown"
                    assert keeping in {0, *self.stand_ins} or not fleet.config.keep_good
                    self.stand_ins.add(stand_in)
                assert keeping == fleet.good
                assert fleet.target != generation
                self.given_up.add(generation)
            case GenerationComplete(generation):
                assert self.completed[-1:] != [generation], "said once"
                assert generation in self.proven
                assert {w.generation for w in fleet.having(State.READY, State.BOOTING)} == {generation}
                assert len(fleet.having(State.READY)) >= fleet.size
                self.completed.append(generation)
            case StopListening():
                self.stopped_listening += 1
            case Halt(code):
                assert not self.processes
                assert fleet.stopping
                assert code is self.exit_code
                self.halts += 1

    def check_successors(self, wid: int, successors: tuple[int, ...]) -> None:
        assert wid not in successors
        assert len(set(successors)) == len(successors)
        assert set(successors) <= set(self.processes)
        assert not (successors and self.fleet.stopping and self.must_stop), "nobody is left to take over"
        heirs = {self.processes[wid] for wid in successors}
        assert heirs <= self.proven, "nobody's connections go to code on probation"
        assert len(heirs) <= 1, "what is newest takes over"
        if self.processes[wid] in self.proven:
            assert min(heirs, default=wid) >= self.processes[wid], "connections never move to older code"

    def check_capacity(self, event: Event, before: Fleet, actions: list[Action]) -> None:
        """A ready worker is lost by its own doing, by the clock, by a stop, with its generation, or where more than
        `size` of proven code are ready."""
        fleet = self.fleet
        ready = {w.wid for w in fleet.having(State.READY)}
        ready_before = {w.wid for w in before.having(State.READY)}
        booting_before = {w.wid for w in before.having(State.BOOTING)}
        own_word = {event.wid} if isinstance(event, (WorkerGone, WorkerLeaves, WorkerReady)) else set()
        dumped = {action.wid for action in actions if isinstance(action, Dump)}
        drains = [action for action in actions if isinstance(action, Drain)]
        assert fleet.stopping or ready_before - ready - own_word - dumped <= {drain.wid for drain in drains}
        proven = {wid for wid in ready if self.processes[wid] in self.proven}
        for drain in drains:
            if drain.wid in booting_before - own_word:
                assert not drain.successors, "a booting worker has no connections"
            elif drain.reason in OWN_DOING:
                assert len(proven) >= fleet.size
                assert drain.successors, "where enough are ready, someone can take the connections"
                staying = {self.processes[wid] for wid in proven if not fleet.workers[wid].stale}
                heirs = {self.processes[wid] for wid in drain.successors}
                assert max(staying, default=0) in heirs | {0}
            elif drain.reason in OF_UNPROVEN_CODE and not fleet.stopping:
                assert drain.successors or not proven & ready_before, "old code takes them back"

    def check_stop(self, before: Fleet, actions: list[Action]) -> None:
        """A stop begins once: first the listeners, then everyone that is there."""
        begins = isinstance(next((a for a in actions if isinstance(a, (StopListening, Halt))), None), StopListening)
        graceful = not before.stopping and self.must_stop and not self.stop_now
        assert begins == (graceful and not self.failed_to_start)
        orders = [a for a in actions if isinstance(a, StopListening) or getattr(a, "reason", None) is Reason.STOP]
        if begins:
            assert orders[0] == StopListening()
            assert {a.wid for a in orders if isinstance(a, Drain)} == set(self.processes)
        elif not before.stopping and not self.fleet.stopping:
            assert not orders

    def check_settings(self, event: Event, before: Fleet) -> None:
        """Settings count from the moment at which their generation is proven."""
        if self.fleet.good == before.good:
            assert self.fleet.config == before.config
            assert isinstance(event, ScaleAsked) or self.fleet.size == before.size
        elif self.fleet.config.size != before.config.size:
            assert isinstance(event, ScaleAsked) or self.fleet.size == self.fleet.config.size

    def check_end_of_probation(self, event: Event, before: Fleet, actions: list[Action]) -> None:
        """Only success, failure, a newer reload or a stop ends it, each in its time."""
        probation, fleet = self.probation, self.fleet
        if probation is None or fleet.stopping:
            return
        generation = probation.generation
        if fleet.canary_until is not None:
            assert (fleet.target, fleet.canary_until) == (generation, probation.due)
            return
        self.probation = None
        if generation in self.proven | self.given_up:
            return
        assert fleet.target > generation
        assert before.again or isinstance(event, ReloadAsked)
        assert self.now >= before.target_since + SUPERSEDE_AFTER

    def check_failures(self, event: Event, before: Fleet, actions: list[Action]) -> None:
        """No failure of new code goes unnoticed, and nothing is given up without one."""
        lost = {action.wid for action in actions if isinstance(action, Dump)}
        lost |= {event.wid} if isinstance(event, WorkerGone) else set()
        alive = {w.wid: w.generation for w in before.having(State.BOOTING, State.READY)}
        failed = {alive[wid] for wid in lost & alive.keys()}
        if isinstance(event, CanaryFailed) and before.canary_until is not None and event.generation == before.target:
            failed.add(event.generation)
        # Who has left by itself is waited for: until it is gone, or until the end of the probation that it was on.
        left = {w.generation for w in before.having(State.DRAINING) if w.reason is Reason.LEFT}
        assert self.fleet.stopping or failed <= self.proven | self.given_up
        given_up = {action.generation for action in actions if isinstance(action, GenerationGivenUp)}
        assert given_up <= failed | left

    # --------------------------------------------------------------------------------------- what always holds

    @invariant()
    def never_more_than_size_and_surge(self) -> None:
        """After *every* step, also the one in which TTOU or new settings shrink the size: the excess drains at once."""
        assert len(self.fleet.having(State.BOOTING, State.READY)) <= self.fleet.size + SURGE

    @invariant()
    def the_fleet_knows_exactly_the_processes_there_are(self) -> None:
        assert {w.wid: w.generation for w in self.fleet.workers.values()} == self.processes

    @invariant()
    def at_most_one_worker_of_unproven_code_lives_beside_proven_code(self) -> None:
        alive = self.fleet.having(State.BOOTING, State.READY)
        unproven = [w for w in alive if w.generation > self.fleet.good]
        assert {w.generation for w in unproven} <= {self.fleet.target}
        if self.fleet.good:
            assert len(unproven) <= 1

    @invariant()
    def whoever_serves_is_proven_or_on_probation(self) -> None:
        if not self.fleet.stopping:
            serving = {w.wid for w in self.fleet.having(State.READY) if w.generation not in self.proven}
            assert serving <= ({self.probation.wid} if self.probation else set())
            assert (self.fleet.canary_until is None) == (self.probation is None)

    @invariant()
    def good_is_the_newest_proven_generation(self) -> None:
        assert self.fleet.good == max(self.proven, default=0)
        assert self.fleet.good <= self.fleet.target <= self.fleet.newest

    @invariant()
    def only_a_request_or_a_first_start_that_fails_ends_the_fleet(self) -> None:
        if self.failed_to_start:
            assert not self.proven
        assert self.fleet.stopping == (self.must_stop or self.failed_to_start)
        assert self.fleet.halted == bool(self.halts)
        assert self.halts <= 1
        assert self.stopped_listening <= 1

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
            assert step(snapshot(self.fleet), Tick(), almost) == []

    @invariant()
    def a_step_reaches_a_fixed_point(self) -> None:
        again = snapshot(self.fleet)
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
            assert booting or crowded or fleet.not_before is not None or fleet.canary_until is not None

    # ------------------------------------------------------------------------------------------- the operator

    @rule(times=st.sampled_from([1, 1, 1, 2, 50]))
    def reload(self, times: int) -> None:
        before = snapshot(self.fleet)
        for _ in range(times):
            self.happens(ReloadAsked())
        assert self.fleet.newest <= before.newest + 2, "a storm at one moment costs two generations at most"
        assert self.stop_due is None or self.fleet == before, "a reload after a stop means nothing"

    @rule(delta=st.sampled_from([+1, -1]))
    def scale(self, delta: int) -> None:
        if self.fleet.size < 6 or delta < 0:
            self.happens(ScaleAsked(delta))

    @rule(rolls=st.booleans())
    def upgrade(self, rolls: bool) -> None:
        """USR2: the state goes to the next program as JSON. Where nothing but the trial of it is run, it is read there,
        too, and has no effect here."""
        if self.halts or self.fleet.stopping:
            return
        read = back(wire_of(self.fleet)).fleet
        assert read == self.fleet
        if rolls:
            self.fleet = read
            self.happens(Tick())
            self.happens(ReloadAsked())

    @rule(luck=st.integers(0, 15), now=st.booleans())
    def stop(self, luck: int, now: bool) -> None:
        if luck == 7 or self.stop_asked:
            self.happens(StopAsked(now))

    # -------------------------------------------------------------------------------------------- the workers

    def anyone(self, pick: int, *states: State) -> int | None:
        wids = [w.wid for w in self.fleet.having(*states)]
        return wids[pick % len(wids)] if wids else None

    @rule(pick=picks, config=st.none() | configs)
    def gets_ready(self, pick: int, config: Config | None) -> None:
        if (wid := self.anyone(pick, State.BOOTING)) is not None:
            self.happens(WorkerReady(wid, config))

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

    @rule(generation=st.none() | st.integers(-1, 8))
    def canary_fails(self, generation: int | None) -> None:
        self.happens(CanaryFailed(self.fleet.target if generation is None else generation))

    @rule(event=st.sampled_from([CanaryFailed, WorkerGone, WorkerLeaves, WorkerAsksReplacement, None]))
    def something_befalls_the_canary(self, event: type | None) -> None:
        """Or nothing: then everybody beats, and its time is over."""
        if self.probation is None or self.fleet.stopping:
            return
        if event is CanaryFailed:
            self.happens(CanaryFailed(self.probation.generation))
        elif event is not None:
            self.happens(event(self.probation.wid))
        else:
            self.now = max(self.now, self.probation.due)
            for worker in self.fleet.having(State.READY):
                self.happens(WorkerBeat(worker.wid))
            self.happens(Tick())

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
            converges_in_a_fair_world(snapshot(self.fleet), self.now)
            halts_after_a_stop(snapshot(self.fleet), self.now)


def converges_in_a_fair_world(fleet: Fleet, now: float) -> None:
    """Boots succeed, workers beat, drains end: then `size` workers are ready, all of the target, and it is quiet."""
    if fleet.stopping or fleet.stop_at is not None:
        return
    for _ in range(MAX_STEPS):
        waits = [due for due in (fleet.not_before, fleet.canary_until) if due is not None]
        if worker := next(iter(fleet.having(State.BOOTING)), None):
            step(fleet, WorkerReady(worker.wid), now)
        elif worker := next(iter(fleet.having(State.DRAINING)), None):
            unfair = not fleet.good and worker.reason is Reason.LEFT and worker.generation == fleet.target
            step(fleet, WorkerGone(worker.wid), now)
            if fleet.stopping:
                assert unfair, "only who left a first start ends it"
                return
        elif waits:
            now = max(now, min(waits))
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
    first = not fleet.stopping and fleet.stop_at is None
    limit = now
    if first:
        limit = now + fleet.config.shutdown_delay + max(fleet.config.stop_timeout, BOOT_STOP_GRACE)
        if not fleet.good:  # a first start that fails during the delay ends with the drains that it had
            limit = max([limit, *(w.deadline or 0.0 for w in fleet.having(State.DRAINING))])
    actions = step(fleet, StopAsked(), now)
    halts: list[Halt] = []
    listening = 0
    for _ in range(MAX_STEPS):
        halts += [action for action in actions if isinstance(action, Halt)]
        listening += sum(isinstance(action, StopListening) for action in actions)
        killed = [action.wid for action in actions if isinstance(action, Kill)]
        actions = []
        for wid in killed:
            actions += step(fleet, WorkerGone(wid), now)
        if not killed:
            due = next_deadline(fleet)
            if due is None:
                break
            assert due > now, "the arbiter would spin"
            now = due
            actions = step(fleet, Tick(), now)
    assert len(halts) == 1
    assert not fleet.workers
    assert now <= limit, "a second stop ends everything in the moment in which it is asked for"
    if first:
        assert halts == [Halt(ExitCode.OK)]
        assert listening <= 1
    else:
        assert listening == 0
    assert step(fleet, WorkerGone(1), now + 1.0) == step(fleet, Tick(), now + 100.0) == []


TestFleetInAnAdversarialWorld = World.TestCase
TestFleetInAnAdversarialWorld.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
