"""The fleet as stories: what an operator and a set of workers do, and what the fleet orders in answer.

No process, no sleep, no mock: the clock of a story is a number. A story is strict: every action has to be told with
`expect`, in order, before the next event may happen.
"""

from __future__ import annotations

import pytest

from apphost.arbiter.fleet import (
    BACKOFF_MAX,
    DRAINING_EXTRA,
    REKILL_AFTER,
    STEADY_AFTER,
    SUPERSEDE_AFTER,
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

FOREVER = 1e9  # s, for stories in which a limit must not matter


class Story:
    """One fleet, one clock, and the actions that nobody has expected yet."""

    def __init__(self, size: int = 1, **config: float) -> None:
        settings = {"boot_timeout": 60.0, "timeout": 0.0, "graceful_timeout": 30.0, "stop_timeout": 8.0, **config}
        self.fleet = Fleet(Config(size=size, **settings))
        self.now = 1000.0
        self.untold: list[Action] = []

    @classmethod
    def serving(cls, size: int = 1, **config: float) -> Story:
        """A story that begins where workers 1 to `size` of generation 1 are ready."""
        story = cls(size, **config)
        story.start()
        story.expect(*(Spawn(wid, 1) for wid in range(1, size + 1)))
        story.ready(*range(1, size + 1))
        story.expect(GenerationComplete(1))
        return story

    def happens(self, *events: Event) -> None:
        assert not self.untold, "tell these before the story goes on"
        for event in events:
            self.untold += step(self.fleet, event, self.now)

    def expect(self, *actions: Action) -> None:
        told, self.untold = self.untold, []
        assert told == list(actions)

    def wait(self, seconds: float) -> None:
        """Let time pass as the arbiter does: with a Tick at every deadline on the way, and one at the end."""
        assert not self.untold, "tell these before the story goes on"
        end = self.now + seconds
        while (due := next_deadline(self.fleet)) is not None and due <= end:
            self.now = max(due, self.now)
            self.untold += step(self.fleet, Tick(), self.now)
        self.now = end
        self.untold += step(self.fleet, Tick(), self.now)

    def until_deadline(self) -> float:
        """Let time pass to the next deadline, exactly; the seconds that took."""
        due = next_deadline(self.fleet)
        assert due is not None, "nothing will ever happen"
        waited, self.now = due - self.now, due
        self.happens(Tick())
        return waited

    def start(self) -> None:
        self.happens(Tick())

    def reload(self) -> None:
        self.happens(ReloadAsked())

    def stop(self, now: bool = False) -> None:
        self.happens(StopAsked(now))

    def ttin(self) -> None:
        self.happens(ScaleAsked(+1))

    def ttou(self) -> None:
        self.happens(ScaleAsked(-1))

    @classmethod
    def on_probation(cls, size: int = 1, canary: float = 60.0, **config: float) -> Story:
        """A story that begins where worker `size` + 1, of generation 2, has begun to serve beside those of 1."""
        story = cls.serving(size, canary=canary, **config)
        story.wait(STEADY_AFTER)
        story.reload()
        story.expect(Spawn(size + 1, 2))
        story.ready(size + 1)
        story.expect(CanaryStarted(2, size + 1, canary))
        return story

    def canary_fails(self, generation: int) -> None:
        self.happens(CanaryFailed(generation))

    def ready(self, *wids: int) -> None:
        self.happens(*map(WorkerReady, wids))

    def beat(self, *wids: int) -> None:
        self.happens(*map(WorkerBeat, wids))

    def asks_replacement(self, *wids: int) -> None:
        self.happens(*map(WorkerAsksReplacement, wids))

    def leaves(self, *wids: int) -> None:
        self.happens(*map(WorkerLeaves, wids))

    def gone(self, *wids: int) -> None:
        self.happens(*map(WorkerGone, wids))

    def wids(self, state: State) -> list[int]:
        return [w.wid for w in self.fleet.having(state)]


# ------------------------------------------------------------------------------------------------------ first start


@pytest.mark.parametrize("size", [1, 2, 4])
def test_first_start_boots_all_workers_at_once(size: int) -> None:
    story = Story(size)
    story.start()
    story.expect(*(Spawn(wid, 1) for wid in range(1, size + 1)))
    story.ready(*range(1, size))
    story.expect()
    story.ready(size)
    story.expect(GenerationComplete(1))
    assert next_deadline(story.fleet) is None


def test_first_start_that_fails_halts_with_the_applications_exit_code_after_all_are_gone() -> None:
    """L3: non-zero exit, never a restart loop."""
    story = Story(3)
    story.start()
    story.expect(Spawn(1, 1), Spawn(2, 1), Spawn(3, 1))
    story.gone(2)
    story.expect(Drain(1, 0.0, Reason.GIVEN_UP), Drain(3, 0.0, Reason.GIVEN_UP))
    story.gone(1)
    story.expect()
    story.wait(0.25)
    story.expect(Kill(3, Reason.GIVEN_UP))
    story.gone(3)
    story.expect(Halt(ExitCode.APPLICATION))
    story.reload()
    story.ready(1)
    story.wait(100.0)
    story.expect()


def test_first_start_that_hangs_is_written_down_killed_and_halts() -> None:
    story = Story(2, boot_timeout=60.0)
    story.start()
    story.expect(Spawn(1, 1), Spawn(2, 1))
    story.wait(59.0)
    story.expect()
    story.wait(1.0)
    story.expect(Dump(1, Reason.BOOT_TIMEOUT), Drain(2, 0.0, Reason.GIVEN_UP))
    story.wait(0.25)
    story.expect(Kill(2, Reason.GIVEN_UP))
    story.wait(0.75)
    story.expect(Kill(1, Reason.BOOT_TIMEOUT))
    story.gone(2, 1)
    story.expect(Halt(ExitCode.APPLICATION))


def test_one_ready_worker_proves_a_generation_and_its_other_boots_may_then_fail() -> None:
    story = Story(2)
    story.start()
    story.expect(Spawn(1, 1), Spawn(2, 1))
    story.ready(1)
    story.gone(2)
    story.expect()
    assert story.until_deadline() == pytest.approx(0.1)
    story.expect(Spawn(3, 1))


def test_a_reload_during_a_first_start_that_fails_is_one_more_chance() -> None:
    story = Story()
    story.start()
    story.expect(Spawn(1, 1))
    story.reload()
    story.expect()
    story.gone(1)
    story.expect(GenerationGivenUp(1, 0), Spawn(2, 2))
    story.gone(2)
    story.expect(Halt(ExitCode.APPLICATION))


# -------------------------------------------------------------------------------------------------------- stand-ins


def test_where_a_stand_in_is_wanted_a_first_start_that_fails_does_not_end_the_fleet() -> None:
    story = Story(stand_in=True)
    story.start()
    story.expect(Spawn(1, 1))
    story.gone(1)
    story.expect(GenerationGivenUp(1, 0, stand_in=2), Spawn(2, 2))
    story.ready(2)
    story.expect(GenerationComplete(2))
    story.reload()
    story.expect(Spawn(3, 3))
    story.gone(3)
    story.expect(GenerationGivenUp(3, 2, stand_in=4), Spawn(4, 4))
    story.ready(4)
    story.expect(Drain(2, 30.0, Reason.RELOAD, (4,)), GenerationComplete(4))
    story.gone(2)
    story.expect()
    story.reload()
    story.expect(Spawn(5, 5))
    story.ready(5)
    story.expect(Drain(4, 30.0, Reason.RELOAD, (5,)), GenerationComplete(5))


def test_a_stand_in_takes_the_place_of_good_code_or_not() -> None:
    for keep_good in (False, True):
        story = Story.serving(stand_in=True, keep_good=keep_good)
        story.reload()
        story.expect(Spawn(2, 2))
        story.gone(2)
        if keep_good:
            story.expect(GenerationGivenUp(2, keeping=1))
            assert story.fleet.target == 1
        else:
            story.expect(GenerationGivenUp(2, keeping=1, stand_in=3), Spawn(3, 3))
            story.ready(3)
            story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), GenerationComplete(3))


def test_where_good_code_is_kept_a_stand_in_is_none() -> None:
    """What it shows must be the latest failure."""
    story = Story(stand_in=True, keep_good=True)
    story.start()
    story.expect(Spawn(1, 1))
    story.gone(1)
    story.expect(GenerationGivenUp(1, 0, stand_in=2), Spawn(2, 2))
    story.ready(2)
    story.expect(GenerationComplete(2))
    story.reload()
    story.expect(Spawn(3, 3))
    story.gone(3)
    story.expect(GenerationGivenUp(3, 2, stand_in=4), Spawn(4, 4))


def test_a_stand_in_that_fails_has_none_itself() -> None:
    story = Story.serving(stand_in=True)
    story.reload()
    story.expect(Spawn(2, 2))
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1, stand_in=3), Spawn(3, 3))
    story.gone(3)
    story.expect(GenerationGivenUp(3, keeping=1))
    first = Story(stand_in=True)
    first.start()
    first.expect(Spawn(1, 1))
    first.gone(1)
    first.expect(GenerationGivenUp(1, 0, stand_in=2), Spawn(2, 2))
    first.gone(2)
    first.expect(Halt(ExitCode.APPLICATION))


def test_a_save_while_new_code_boots_comes_before_a_stand_in() -> None:
    story = Story.serving(stand_in=True)
    story.reload()
    story.expect(Spawn(2, 2))
    story.reload()
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1), Spawn(3, 3))
    story.gone(3)
    story.expect(GenerationGivenUp(3, keeping=1, stand_in=4), Spawn(4, 4))
    story.reload()
    story.expect()
    story.ready(4)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (4,)), Spawn(5, 5))


def test_a_stop_is_not_put_off_for_a_stand_in() -> None:
    story = Story(stand_in=True, shutdown_delay=5.0)
    story.start()
    story.expect(Spawn(1, 1))
    story.stop()
    story.expect()
    story.gone(1)
    story.expect(Halt(ExitCode.OK))


# ----------------------------------------------------------------------------------------------------------- reload


@pytest.mark.parametrize("size", [1, 2, 4])
def test_reload_replaces_one_by_one_and_never_serves_with_less_than_size(size: int) -> None:
    story = Story.serving(size)
    story.reload()
    for done in range(size):
        old, new = done + 1, size + done + 1
        story.expect(*([Drain(done, 30.0, Reason.RELOAD, tuple(range(size + 1, new)))] if done else []), Spawn(new, 2))
        assert story.wids(State.READY) == list(range(old, new)), "nothing old retires before something new is ready"
        story.ready(new)
    story.expect(Drain(size, 30.0, Reason.RELOAD, tuple(range(size + 1, 2 * size + 1))), GenerationComplete(2))
    story.gone(*range(1, size + 1))
    story.expect()
    assert story.fleet.generations == {2}
    assert next_deadline(story.fleet) is None


def test_a_broken_deploy_is_given_up_and_a_later_good_one_works() -> None:
    story = Story.serving()
    story.reload()
    story.expect(Spawn(2, 2))
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1))
    assert next_deadline(story.fleet) is None, "a broken deploy is not tried again until someone asks"
    story.reload()
    story.expect(Spawn(3, 3))
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), GenerationComplete(3))


def test_a_deploy_that_hangs_is_given_up_after_the_boot_timeout() -> None:
    story = Story.serving(boot_timeout=60.0)
    story.reload()
    story.expect(Spawn(2, 2))
    story.wait(60.0)
    story.expect(Dump(2, Reason.BOOT_TIMEOUT), GenerationGivenUp(2, keeping=1))
    story.ready(2)  # too late
    story.expect()
    story.wait(1.0)
    story.expect(Kill(2, Reason.BOOT_TIMEOUT))
    story.gone(2)
    story.expect()
    assert story.wids(State.READY) == [1]


def test_a_worker_of_old_code_that_dies_while_new_code_boots_is_replaced_by_old_code() -> None:
    """Code that has never booted is no capacity: when it hangs, the site would be down until the boot timeout."""
    story = Story.serving()
    story.wait(STEADY_AFTER)
    story.reload()
    story.expect(Spawn(2, 2))
    story.gone(1)
    story.expect(Spawn(3, 1))
    story.ready(3)
    story.expect()
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1))
    assert story.wids(State.READY) == [3]


def test_a_drain_that_takes_too_long_is_killed_and_killed_again_until_the_worker_is_gone() -> None:
    story = Story.serving(graceful_timeout=30.0)
    story.reload()
    story.expect(Spawn(2, 2))
    story.ready(2)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (2,)), GenerationComplete(2))
    story.wait(30.0)
    story.expect()
    story.wait(1.0)
    story.expect(Kill(1, Reason.RELOAD))
    story.wait(REKILL_AFTER)
    story.expect(Kill(1, Reason.RELOAD))
    story.gone(1)
    story.wait(100.0)
    story.expect()


def test_a_reload_waits_while_too_many_old_workers_drain() -> None:
    story = Story.serving(graceful_timeout=FOREVER)
    for generation in range(2, 2 + 1 + DRAINING_EXTRA):
        story.reload()
        story.expect(Spawn(generation, generation))
        story.ready(generation)
        drain = Drain(generation - 1, FOREVER, Reason.RELOAD, (generation,))
        story.expect(drain, GenerationComplete(generation))
    assert len(story.wids(State.DRAINING)) == 1 + DRAINING_EXTRA
    story.reload()
    story.expect()
    story.gone(3)
    story.expect(Spawn(6, 6))


# ----------------------------------------------------------------------------------------------------- reload storm


def test_a_thousand_reloads_while_one_boots_cost_two_generations() -> None:
    story = Story.serving(2)
    story.reload()
    story.expect(Spawn(3, 2))
    story.happens(*[ReloadAsked()] * 999)
    story.expect()
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), Spawn(4, 3))
    story.ready(4)
    story.expect(Drain(2, 30.0, Reason.RELOAD, (4,)), Spawn(5, 3))
    story.ready(5)
    story.expect(Drain(3, 30.0, Reason.RELOAD, (4, 5)), GenerationComplete(3))
    assert story.fleet.newest == 3


def test_a_thousand_reloads_while_a_broken_deploy_boots_cost_two_generations() -> None:
    story = Story.serving()
    story.reload()
    story.expect(Spawn(2, 2))
    story.happens(*[ReloadAsked()] * 999)
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1), Spawn(3, 3))
    story.gone(3)
    story.expect(GenerationGivenUp(3, keeping=1))


def test_a_newer_reload_supersedes_a_boot_that_takes_long() -> None:
    story = Story.serving()
    story.reload()
    story.expect(Spawn(2, 2))
    story.wait(2.0)
    story.reload()
    story.expect()
    assert story.until_deadline() == SUPERSEDE_AFTER - 2.0
    story.expect(Drain(2, 0.0, Reason.SUPERSEDED), Spawn(3, 3))
    story.gone(2)
    story.expect()
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), GenerationComplete(3))


def test_a_thousand_reloads_supersede_a_long_boot_only_once() -> None:
    story = Story.serving()
    story.reload()
    story.expect(Spawn(2, 2))
    story.wait(SUPERSEDE_AFTER + 1.0)
    story.expect()
    story.happens(*[ReloadAsked()] * 1000)
    story.expect(Drain(2, 0.0, Reason.SUPERSEDED), Spawn(3, 3))


def test_a_first_start_that_takes_long_is_superseded_too() -> None:
    story = Story(2)
    story.start()
    story.expect(Spawn(1, 1), Spawn(2, 1))
    story.wait(SUPERSEDE_AFTER - 1.0)
    story.reload()
    story.expect()
    story.wait(1.0)
    story.expect(Drain(1, 0.0, Reason.SUPERSEDED), Drain(2, 0.0, Reason.SUPERSEDED), Spawn(3, 2), Spawn(4, 2))
    story.gone(1, 2)
    story.ready(3, 4)
    story.expect(GenerationComplete(2))


# ---------------------------------------------------------------------------------------------- crash and back-off


def test_a_crash_loop_backs_off_doubling_to_thirty_seconds() -> None:
    story = Story.serving()
    story.gone(1)
    pauses = []
    for wid in range(2, 13):
        story.expect()
        pauses.append(story.until_deadline())
        story.expect(Spawn(wid, 1))
        story.gone(wid)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, BACKOFF_MAX, BACKOFF_MAX])


def test_workers_that_die_together_count_as_one_crash() -> None:
    """One restart of a database must not cost a large fleet the longest pause."""
    story = Story.serving(8)
    story.gone(*range(1, 9))
    story.expect()
    assert story.until_deadline() == pytest.approx(0.1)
    story.expect(*(Spawn(wid, 1) for wid in range(9, 17)))


def test_a_worker_that_had_served_for_a_while_is_replaced_at_once() -> None:
    story = Story.serving()
    story.wait(STEADY_AFTER)
    story.gone(1)
    story.expect(Spawn(2, 1))


def test_a_steady_crash_ends_the_row() -> None:
    story = Story.serving()
    story.gone(1)
    for wid in (2, 3, 4):
        story.until_deadline()
        story.expect(Spawn(wid, 1))
        story.ready(wid)
        if wid < 4:
            story.gone(wid)
    story.wait(STEADY_AFTER)
    story.gone(4)
    story.expect(Spawn(5, 1))
    story.gone(5)
    assert story.until_deadline() == pytest.approx(0.1)
    story.expect(Spawn(6, 1))


def test_a_reload_resets_the_back_off() -> None:
    story = Story.serving()
    story.gone(1)
    for wid in (2, 3, 4):
        story.until_deadline()
        story.expect(Spawn(wid, 1))
        story.gone(wid)
    story.reload()
    story.expect(Spawn(5, 1), Spawn(6, 2))
    story.ready(6)
    story.gone(5)
    assert story.fleet.crashes == 1, "the row begins anew"


def test_a_boot_of_proven_code_that_hangs_is_a_crash_and_not_a_failed_deploy() -> None:
    story = Story.serving(boot_timeout=60.0)
    story.wait(STEADY_AFTER)
    story.gone(1)
    story.expect(Spawn(2, 1))
    story.wait(60.0)
    story.expect(Dump(2, Reason.BOOT_TIMEOUT))
    assert story.until_deadline() == pytest.approx(0.1)
    story.expect(Spawn(3, 1))
    story.ready(3)
    story.until_deadline()
    story.expect(Kill(2, Reason.BOOT_TIMEOUT))


def test_back_off_does_not_keep_a_stop_waiting() -> None:
    story = Story.serving()
    story.gone(1)
    story.stop()
    story.expect(StopListening(), Halt(ExitCode.OK))


# ------------------------------------------------------------------------------------------------------------ stuck


def test_a_stuck_worker_is_replaced_at_once_writes_down_its_stacks_and_is_killed() -> None:
    story = Story.serving(timeout=30.0)
    story.wait(20.0)
    story.beat(1)
    story.wait(29.0)
    story.expect()
    story.wait(1.0)
    story.expect(Dump(1, Reason.STUCK), Spawn(2, 1))
    story.beat(1)  # it came back to life, too late
    story.ready(2)
    story.expect()
    story.wait(1.0)
    story.expect(Kill(1, Reason.STUCK))
    story.gone(1)
    story.expect()


def test_without_a_timeout_a_silent_worker_is_left_alone() -> None:
    story = Story.serving(timeout=0.0)
    assert next_deadline(story.fleet) is None
    story.wait(1e6)
    story.expect()


# ------------------------------------------------------------------------------------------------------------ scale


def test_ttin_and_ttou() -> None:
    story = Story.serving(2)
    story.ttin()
    story.expect(Spawn(3, 1))
    story.ready(3)
    story.expect()
    story.ttou()
    story.expect(Drain(1, 30.0, Reason.SCALE_DOWN, (2, 3)))
    story.ttou()
    story.expect(Drain(2, 30.0, Reason.SCALE_DOWN, (3,)))
    story.ttou()
    story.expect()
    assert story.wids(State.READY) == [3], "one worker always stays"


def test_ttin_in_the_middle_of_a_reload() -> None:
    story = Story.serving()
    story.reload()
    story.expect(Spawn(2, 2))
    story.ttin()
    story.expect(Spawn(3, 1))  # what is known to boot; 2 may yet fail
    story.ready(2)
    story.expect()
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (2,)), Spawn(4, 2))
    story.ready(4)
    story.expect(Drain(3, 30.0, Reason.RELOAD, (2, 4)), GenerationComplete(2))


def test_ttou_in_the_middle_of_a_reload_moves_connections_to_what_is_ready() -> None:
    story = Story.serving(2)
    story.reload()
    story.expect(Spawn(3, 2))
    story.ttou()
    story.expect(Drain(1, 30.0, Reason.SCALE_DOWN, (2,)))
    story.ready(3)
    story.expect(Drain(2, 30.0, Reason.RELOAD, (3,)), GenerationComplete(2))


def test_ttou_during_the_first_start_ends_boots_beyond_the_surge() -> None:
    story = Story(4)
    story.start()
    story.expect(*(Spawn(wid, 1) for wid in range(1, 5)))
    story.happens(*[ScaleAsked(-1)] * 3)
    story.expect(Drain(4, 0.0, Reason.SCALE_DOWN), Drain(3, 0.0, Reason.SCALE_DOWN))
    story.gone(3, 4)
    story.expect()
    story.ready(1)
    story.expect(GenerationComplete(1))
    story.ready(2)
    story.expect(Drain(1, 30.0, Reason.SCALE_DOWN, (2,)))


def test_scale_down_retires_old_code_first_also_where_it_was_started_last() -> None:
    story = Story.serving(2)
    story.wait(STEADY_AFTER)
    story.reload()
    story.expect(Spawn(3, 2))
    story.gone(1)
    story.expect(Spawn(4, 1))
    story.ready(4)
    story.reload()
    story.expect()
    story.ready(3)
    story.expect(Drain(2, 30.0, Reason.RELOAD, (3,)), Spawn(5, 3))
    story.ttou()
    story.expect(Drain(4, 30.0, Reason.RELOAD, (3,)))
    assert story.wids(State.READY) == [3]


def test_the_size_that_ttou_chose_stays_where_new_settings_say_nothing_new() -> None:
    story = Story.serving(2)
    story.ttou()
    story.expect(Drain(1, 30.0, Reason.SCALE_DOWN, (2,)))
    story.reload()
    story.expect(Spawn(3, 2))
    story.happens(WorkerReady(3, Config(size=2, timeout=0.0, graceful_timeout=6.0)))
    story.expect(Drain(2, 6.0, Reason.RELOAD, (3,)), GenerationComplete(2))
    story.reload()
    story.expect(Spawn(4, 3))
    story.happens(WorkerReady(4, Config(size=3, timeout=0.0)))
    story.expect(Spawn(5, 3))
    assert story.fleet.size == 3


# ------------------------------------------------------------------------------------------------------------- stop


def test_term_drains_and_halts_when_all_are_gone() -> None:
    story = Story.serving(2, stop_timeout=8.0)
    story.stop()
    story.expect(StopListening(), Drain(1, 7.0, Reason.STOP), Drain(2, 7.0, Reason.STOP))
    story.gone(1)
    story.expect()
    story.gone(2)
    story.expect(Halt(ExitCode.OK))


def test_term_kills_what_does_not_go_in_time() -> None:
    story = Story.serving(stop_timeout=8.0)
    story.stop()
    story.expect(StopListening(), Drain(1, 7.0, Reason.STOP))
    story.wait(7.0)
    story.expect()
    story.wait(1.0)
    story.expect(Kill(1, Reason.STOP))
    story.wait(REKILL_AFTER)
    story.expect(Kill(1, Reason.STOP))
    story.gone(1)
    story.expect(Halt(ExitCode.OK))


def test_term_in_the_middle_of_a_reload() -> None:
    story = Story.serving(2, graceful_timeout=30.0, stop_timeout=8.0)
    story.reload()
    story.expect(Spawn(3, 2))
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), Spawn(4, 2))
    story.wait(2.0)
    story.stop()
    story.expect(
        StopListening(),
        Drain(2, 7.0, Reason.STOP),
        Drain(3, 7.0, Reason.STOP),
        Drain(4, 0.0, Reason.STOP),
        Drain(1, 7.0, Reason.STOP),
    )
    story.ready(4)
    story.reload()
    story.ttin()
    story.expect()
    story.wait(0.25)
    story.expect(Kill(4, Reason.STOP))
    story.gone(4, 2, 3)
    story.expect()
    story.gone(1)
    story.expect(Halt(ExitCode.OK))


def test_term_never_gives_a_worker_more_time_than_it_had() -> None:
    story = Story.serving(graceful_timeout=30.0, stop_timeout=8.0)
    story.reload()
    story.expect(Spawn(2, 2))
    story.ready(2)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (2,)), GenerationComplete(2))
    story.wait(28.0)
    story.stop()
    story.expect(StopListening(), Drain(2, 7.0, Reason.STOP), Drain(1, 2.0, Reason.STOP))
    story.wait(3.0)
    story.expect(Kill(1, Reason.RELOAD))


def test_a_second_term_kills() -> None:
    story = Story.serving(2)
    story.stop()
    story.expect(StopListening(), Drain(1, 7.0, Reason.STOP), Drain(2, 7.0, Reason.STOP))
    story.gone(2)
    story.stop()
    story.expect(Kill(1, Reason.STOP))
    story.gone(1)
    story.expect(Halt(ExitCode.OK))


def test_quit_kills_at_once() -> None:
    story = Story.serving(2)
    story.reload()
    story.expect(Spawn(3, 2))
    story.stop(now=True)
    story.expect(Kill(1, Reason.STOP), Kill(2, Reason.STOP), Kill(3, Reason.STOP))
    story.gone(3, 1)
    story.expect()
    story.gone(2)
    story.expect(Halt(ExitCode.OK))


def test_stop_before_anything_was_started() -> None:
    story = Story()
    story.stop()
    story.expect(StopListening(), Halt(ExitCode.OK))


def test_a_crash_while_stopping_is_no_failure() -> None:
    story = Story(2)
    story.start()
    story.expect(Spawn(1, 1), Spawn(2, 1))
    story.stop()
    story.expect(StopListening(), Drain(1, 0.0, Reason.STOP), Drain(2, 0.0, Reason.STOP))
    story.gone(1, 2)
    story.expect(Halt(ExitCode.OK))


def test_a_stop_without_any_time_to_drain_kills_in_the_same_breath() -> None:
    story = Story.serving(stop_timeout=0.0)
    story.stop()
    story.expect(StopListening(), Drain(1, 0.0, Reason.STOP), Kill(1, Reason.STOP))


# ------------------------------------------------------------------------------------------------- shutdown_delay


def test_after_term_the_fleet_serves_on_for_the_shutdown_delay() -> None:
    story = Story.serving(2, shutdown_delay=5.0, stop_timeout=8.0)
    story.stop()
    story.expect()
    assert next_deadline(story.fleet) == story.now + 5.0
    assert story.wids(State.READY) == [1, 2]
    assert story.until_deadline() == 5.0
    story.expect(StopListening(), Drain(1, 7.0, Reason.STOP), Drain(2, 7.0, Reason.STOP))
    story.wait(8.0)
    story.expect(Kill(1, Reason.STOP), Kill(2, Reason.STOP))
    story.gone(1, 2)
    story.expect(Halt(ExitCode.OK))


def test_a_second_term_during_the_delay_kills_at_once() -> None:
    story = Story.serving(2, shutdown_delay=5.0)
    story.stop()
    story.wait(1.0)
    story.expect()
    story.stop()
    story.expect(Kill(1, Reason.STOP), Kill(2, Reason.STOP))
    story.gone(1)
    story.expect()
    story.gone(2)
    story.expect(Halt(ExitCode.OK))


def test_quit_during_the_delay_kills_at_once() -> None:
    story = Story.serving(shutdown_delay=5.0)
    story.stop()
    story.stop(now=True)
    story.expect(Kill(1, Reason.STOP))
    story.wait(4.9)
    story.expect()
    story.gone(1)
    story.expect(Halt(ExitCode.OK))


def test_quit_does_not_wait_for_the_delay() -> None:
    story = Story.serving(shutdown_delay=5.0)
    story.stop(now=True)
    story.expect(Kill(1, Reason.STOP))
    story.gone(1)
    story.expect(Halt(ExitCode.OK))


def test_reloads_during_the_delay_are_ignored() -> None:
    story = Story.serving(shutdown_delay=5.0)
    story.stop()
    before = repr(story.fleet)
    story.happens(*[ReloadAsked()] * 3)
    story.expect()
    assert repr(story.fleet) == before


def test_a_roll_goes_on_during_the_delay_and_ends_with_it() -> None:
    story = Story.serving(2, shutdown_delay=5.0)
    story.reload()
    story.expect(Spawn(3, 2))
    story.stop()
    story.expect()
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), Spawn(4, 2))
    story.wait(5.0)
    story.expect(
        StopListening(),
        Drain(2, 7.0, Reason.STOP),
        Drain(3, 7.0, Reason.STOP),
        Drain(4, 0.0, Reason.STOP),
        Drain(1, 7.0, Reason.STOP),
    )


def test_a_worker_that_crashes_during_the_delay_is_replaced() -> None:
    """The balancer still sends: there have to be as many workers as ever."""
    story = Story.serving(shutdown_delay=5.0)
    story.wait(STEADY_AFTER)
    story.stop()
    story.gone(1)
    story.expect(Spawn(2, 1))
    story.ready(2)
    story.wait(5.0)
    story.expect(StopListening(), Drain(2, 7.0, Reason.STOP))
    story.gone(2)
    story.expect(Halt(ExitCode.OK))


def test_whose_time_is_up_when_the_delay_ends_is_killed_in_that_moment() -> None:
    story = Story.serving(graceful_timeout=4.0, shutdown_delay=5.0)
    story.reload()
    story.expect(Spawn(2, 2))
    story.ready(2)
    story.expect(Drain(1, 4.0, Reason.RELOAD, (2,)), GenerationComplete(2))
    story.stop()
    assert story.until_deadline() == 5.0  # of the delay, and of the drain with its grace
    story.expect(StopListening(), Drain(2, 7.0, Reason.STOP), Drain(1, 0.0, Reason.STOP), Kill(1, Reason.RELOAD))


def test_a_first_start_that_fails_during_the_delay_is_no_failure() -> None:
    """A TERM that everyone gets ends boots; what was asked for is what happens, only earlier."""
    story = Story(2, shutdown_delay=5.0)
    story.start()
    story.expect(Spawn(1, 1), Spawn(2, 1))
    story.stop()
    story.leaves(1, 2)
    story.expect()
    story.gone(1, 2)
    story.expect(Halt(ExitCode.OK))


# --------------------------------------------------------------------------------------------- recycling and leaving


def test_a_worker_that_has_served_enough_drains_after_its_successor_is_ready() -> None:
    story = Story.serving(2)
    story.asks_replacement(1)
    story.expect(Spawn(3, 1))
    story.asks_replacement(1)
    story.expect()
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RECYCLE, (2, 3)))


def test_all_workers_that_ask_at_once_are_recycled_one_by_one() -> None:
    story = Story.serving(2)
    story.asks_replacement(1, 2)
    story.expect(Spawn(3, 1))
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RECYCLE, (3,)), Spawn(4, 1))
    story.ready(4)
    story.expect(Drain(2, 30.0, Reason.RECYCLE, (3, 4)))


def test_a_worker_serves_on_while_its_successor_cannot_boot() -> None:
    story = Story.serving()
    story.asks_replacement(1)
    story.expect(Spawn(2, 1))
    for wid, pause in ((3, 0.1), (4, 0.2)):
        story.gone(wid - 1)
        story.expect()
        assert story.until_deadline() == pytest.approx(pause)
        story.expect(Spawn(wid, 1))
    assert story.wids(State.READY) == [1]


def test_a_recycled_worker_in_a_reload_is_replaced_by_new_code() -> None:
    story = Story.serving(2)
    story.asks_replacement(2)
    story.expect(Spawn(3, 1))
    story.reload()
    story.expect()
    story.ready(3)
    story.expect(Drain(2, 30.0, Reason.RECYCLE, (1, 3)), Spawn(4, 2))
    story.ready(4)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (4,)), Spawn(5, 2))
    story.ready(5)
    story.expect(Drain(3, 30.0, Reason.RELOAD, (4, 5)), GenerationComplete(2))


def test_connections_move_to_a_worker_that_will_be_replaced_where_there_is_no_other() -> None:
    story = Story.serving(2)
    story.reload()
    story.expect(Spawn(3, 2))
    story.ready(3)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), Spawn(4, 2))
    story.asks_replacement(3)
    story.expect()
    story.ttou()
    story.expect(Drain(2, 30.0, Reason.RELOAD, (3,)), GenerationComplete(2))
    story.ready(4)
    story.expect(Drain(3, 30.0, Reason.RECYCLE, (4,)))


def test_a_steady_worker_that_leaves_on_its_own_account_is_replaced_at_once() -> None:
    story = Story.serving(graceful_timeout=30.0)
    story.wait(STEADY_AFTER)
    story.leaves(1)
    story.expect(Spawn(2, 1))
    story.leaves(1)
    story.ready(2)
    story.expect()
    story.wait(31.0)
    story.expect(Kill(1, Reason.LEFT))
    story.gone(1)
    story.expect()
    assert story.fleet.crashes == 0, "its leaving was counted, its end is not"
    assert next_deadline(story.fleet) is None


def test_a_worker_of_new_code_that_leaves_while_it_boots_gives_its_generation_up_when_it_is_gone() -> None:
    story = Story.serving()
    story.reload()
    story.expect(Spawn(2, 2))
    story.leaves(2)
    story.expect()
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1))
    story.wait(100.0)
    story.expect()


def test_a_worker_that_leaves_a_first_start_ends_it_when_it_is_gone() -> None:
    story = Story(2)
    story.start()
    story.expect(Spawn(1, 1), Spawn(2, 1))
    story.leaves(1)
    story.expect()
    story.gone(1)
    story.expect(Drain(2, 0.0, Reason.GIVEN_UP))
    story.gone(2)
    story.expect(Halt(ExitCode.APPLICATION))


def test_a_worker_that_left_a_generation_proven_since_was_nothing_but_a_crash() -> None:
    story = Story(2)
    story.start()
    story.expect(Spawn(1, 1), Spawn(2, 1))
    story.leaves(1)
    story.ready(2)
    story.gone(1)
    story.expect()
    assert story.until_deadline() == pytest.approx(0.1)
    story.expect(Spawn(3, 1))
    story.ready(3)
    story.expect(GenerationComplete(1))


def test_a_worker_that_left_a_superseded_generation_takes_nothing_with_it() -> None:
    story = Story.serving()
    story.reload()
    story.expect(Spawn(2, 2))
    story.leaves(2)
    story.reload()
    story.expect(Spawn(3, 2))
    story.wait(SUPERSEDE_AFTER)
    story.expect(Drain(3, 0.0, Reason.SUPERSEDED), Spawn(4, 3))
    story.gone(2, 3)
    story.expect()
    story.ready(4)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (4,)), GenerationComplete(3))


def test_workers_that_leave_as_soon_as_they_are_started_are_not_a_fork_storm() -> None:
    story = Story.serving()
    pauses = []
    for wid in range(1, 8):
        story.leaves(wid)
        story.expect()
        story.gone(wid)
        pauses.append(story.until_deadline())
        story.expect(Spawn(wid + 1, 1))
        if wid % 2:
            story.ready(wid + 1)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4])


def test_a_term_that_everyone_gets_starts_nothing() -> None:
    """A container's stop signals every process; the workers' word may come before the arbiter reads its own signal."""
    story = Story.serving(2)
    story.leaves(1, 2)
    story.expect()
    story.stop()
    story.expect(StopListening(), Drain(1, 7.0, Reason.STOP), Drain(2, 7.0, Reason.STOP))
    story.gone(1, 2)
    story.expect(Halt(ExitCode.OK))


# ----------------------------------------------------------------------------------------------------------- canary


@pytest.mark.parametrize("size", [1, 2, 4])
def test_new_code_serves_on_probation_as_one_extra_and_the_roll_goes_on_when_it_has_passed(size: int) -> None:
    story = Story.on_probation(size, canary=60.0)
    canary, old = size + 1, list(range(1, size + 1))
    assert next_deadline(story.fleet) == story.now + 60.0
    assert story.wids(State.READY) == [*old, canary], "nothing old retires for it"
    story.wait(59.0)
    story.expect()
    assert (story.fleet.good, story.fleet.target) == (1, 2)
    assert story.until_deadline() == 1.0
    for done in range(1, size):
        story.expect(Drain(done, 30.0, Reason.RELOAD, tuple(range(canary, canary + done))), Spawn(canary + done, 2))
        story.ready(canary + done)
    story.expect(Drain(size, 30.0, Reason.RELOAD, tuple(range(canary, canary + size))), GenerationComplete(2))
    story.gone(*old)
    story.expect()
    assert next_deadline(story.fleet) is None


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_first_start_needs_no_canary(size: int) -> None:
    """There is nothing that could serve instead."""
    story = Story.serving(size, canary=60.0)
    assert story.fleet.good == 1
    assert next_deadline(story.fleet) is None


def test_a_first_start_that_is_superseded_needs_no_canary_either() -> None:
    story = Story(canary=60.0)
    story.start()
    story.expect(Spawn(1, 1))
    story.reload()
    story.wait(SUPERSEDE_AFTER)
    story.expect(Drain(1, 0.0, Reason.SUPERSEDED), Spawn(2, 2))
    story.ready(2)
    story.expect(GenerationComplete(2))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_canary_that_fails_gives_its_connections_back_to_old_code(size: int) -> None:
    story = Story.on_probation(size)
    story.wait(10.0)
    story.canary_fails(2)
    story.expect(Drain(size + 1, 30.0, Reason.GIVEN_UP, tuple(range(1, size + 1))), GenerationGivenUp(2, keeping=1))
    story.canary_fails(2)
    story.gone(size + 1)
    story.wait(100.0)
    story.expect()
    assert story.wids(State.READY) == list(range(1, size + 1))


def test_a_canary_that_crashes_is_given_up_also_after_it_had_served_for_a_while() -> None:
    story = Story.on_probation(canary=60.0)
    story.wait(STEADY_AFTER + 1.0)
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1))
    assert next_deadline(story.fleet) is None, "old code has not crashed: no pause, no successor"


def test_a_canary_that_is_stuck_is_given_up() -> None:
    story = Story.on_probation(canary=60.0, timeout=20.0)
    story.beat(1)
    story.wait(19.0)
    story.beat(1)
    story.wait(1.0)
    story.expect(Dump(2, Reason.STUCK), GenerationGivenUp(2, keeping=1))
    story.beat(1)
    story.wait(1.0)
    story.expect(Kill(2, Reason.STUCK))


def test_a_canary_that_is_stuck_at_the_end_of_its_probation_has_not_passed() -> None:
    story = Story.on_probation(canary=20.0, timeout=20.0)
    story.now += 20.0
    story.beat(1)
    story.happens(Tick())
    story.expect(Dump(2, Reason.STUCK), GenerationGivenUp(2, keeping=1))


def test_a_canary_that_leaves_is_given_up_when_it_is_gone() -> None:
    story = Story.on_probation(canary=60.0, graceful_timeout=30.0)
    story.leaves(2)
    story.expect()
    story.wait(20.0)
    story.expect()
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1))
    story.wait(100.0)
    story.expect()


def test_a_canary_that_has_left_does_not_pass_while_it_drains() -> None:
    """Its probation may end before its drain does: nobody of new code serves then."""
    story = Story.on_probation(canary=10.0, graceful_timeout=30.0)
    story.leaves(2)
    story.wait(9.0)
    story.expect()
    story.wait(1.0)
    story.expect(GenerationGivenUp(2, keeping=1))
    story.gone(2)
    story.wait(100.0)
    story.expect()
    assert story.wids(State.READY) == [1]


def test_a_deploy_that_is_broken_at_boot_never_comes_to_its_probation() -> None:
    story = Story.serving(canary=60.0)
    story.reload()
    story.expect(Spawn(2, 2))
    story.canary_fails(2)
    story.expect()
    story.gone(2)
    story.expect(GenerationGivenUp(2, keeping=1))


def test_after_a_canary_was_given_up_a_good_deploy_has_a_probation_of_its_own() -> None:
    story = Story.on_probation(canary=60.0)
    story.canary_fails(2)
    story.expect(Drain(2, 30.0, Reason.GIVEN_UP, (1,)), GenerationGivenUp(2, keeping=1))
    story.gone(2)
    story.reload()
    story.expect(Spawn(3, 3))
    story.ready(3)
    story.expect(CanaryStarted(3, 3, 60.0))
    story.canary_fails(2)  # late word of the one before
    story.expect()
    story.wait(60.0)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), GenerationComplete(3))


@pytest.mark.parametrize("generation", [0, 1, 3])
def test_a_failure_of_a_generation_that_is_not_on_probation_means_nothing(generation: int) -> None:
    story = Story.on_probation()
    before = repr(story.fleet)
    story.canary_fails(generation)
    story.expect()
    assert repr(story.fleet) == before


def test_a_canary_that_has_passed_can_fail_no_more() -> None:
    story = Story.on_probation(canary=60.0)
    story.wait(60.0)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (2,)), GenerationComplete(2))
    story.canary_fails(2)
    story.expect()


def test_connections_of_a_canary_go_only_to_old_workers_that_stay() -> None:
    story = Story.on_probation(2)
    story.asks_replacement(1)
    story.expect()  # it waits: a replacement would be one more than the extra one
    story.canary_fails(2)
    story.expect(Drain(3, 30.0, Reason.GIVEN_UP, (2,)), GenerationGivenUp(2, keeping=1), Spawn(4, 1))
    story.ready(4)
    story.expect(Drain(1, 30.0, Reason.RECYCLE, (2, 4)))


def test_a_canary_is_given_up_also_where_nobody_can_take_its_connections() -> None:
    story = Story.on_probation()
    story.gone(1)
    story.expect(Spawn(3, 1))
    story.canary_fails(2)
    story.expect(Drain(2, 30.0, Reason.GIVEN_UP), GenerationGivenUp(2, keeping=1))
    story.ready(3)
    story.expect()


def test_a_canary_that_asks_to_be_replaced_is_replaced_when_it_has_passed() -> None:
    story = Story.on_probation(canary=60.0)
    story.asks_replacement(2)
    story.expect()
    story.wait(60.0)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (2,)), Spawn(3, 2), GenerationComplete(2))
    story.ready(3)
    story.expect(Drain(2, 30.0, Reason.RECYCLE, (3,)))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_old_worker_that_crashes_during_probation_is_replaced_by_old_code(size: int) -> None:
    story = Story.on_probation(size, canary=60.0)
    successor, canary = size + 2, size + 1
    story.gone(1)
    story.expect(Spawn(successor, 1))
    story.ready(successor)
    story.expect()
    story.wait(60.0)
    first = 2 if size > 1 else successor
    assert story.untold[0] == Drain(first, 30.0, Reason.RELOAD, (canary,))


def test_an_old_worker_that_boots_when_the_canary_passes_is_replaced_in_its_turn() -> None:
    story = Story.on_probation(canary=60.0)
    story.wait(59.0)
    story.gone(1)
    story.expect(Spawn(3, 1))
    story.wait(1.0)
    story.expect()
    assert story.fleet.good == 2
    story.ready(3)
    story.expect(Drain(3, 30.0, Reason.RELOAD, (2,)), GenerationComplete(2))


def test_old_code_that_crashes_in_a_row_backs_off_beside_a_canary() -> None:
    story = Story.on_probation(canary=60.0)
    story.gone(1)
    story.expect(Spawn(3, 1))
    story.gone(3)
    story.expect()
    assert story.until_deadline() == pytest.approx(0.1)
    story.expect(Spawn(4, 1))
    story.gone(4)
    assert story.until_deadline() == pytest.approx(0.2)
    story.expect(Spawn(5, 1))
    assert story.wids(State.READY) == [2]


def test_ttin_during_probation_adds_old_code() -> None:
    story = Story.on_probation(canary=60.0)
    story.ttin()
    story.expect(Spawn(3, 1))
    story.ready(3)
    story.expect()
    story.wait(60.0)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (2,)), Spawn(4, 2))
    story.ready(4)
    story.expect(Drain(3, 30.0, Reason.RELOAD, (2, 4)), GenerationComplete(2))


def test_ttou_during_probation_retires_old_code_whose_connections_stay_with_old_code() -> None:
    story = Story.on_probation(2, canary=60.0)
    story.ttou()
    story.expect(Drain(1, 30.0, Reason.SCALE_DOWN, (2,)))
    story.gone(1)
    story.ttou()
    story.expect()
    story.wait(60.0)
    story.expect(Drain(2, 30.0, Reason.RELOAD, (3,)), GenerationComplete(2))


def test_ttou_during_probation_ends_a_boot_beyond_the_surge() -> None:
    """The canary is the one extra worker: there is no room for another."""
    story = Story.on_probation(2, canary=60.0)
    story.gone(1)
    story.expect(Spawn(4, 1))
    story.ttou()
    story.expect(Drain(4, 0.0, Reason.SCALE_DOWN))
    assert story.wids(State.READY) == [2, 3]


@pytest.mark.parametrize("size", [1, 2])
def test_term_during_probation_drains_everyone(size: int) -> None:
    story = Story.on_probation(size, canary=60.0)
    story.stop()
    story.expect(StopListening(), *(Drain(wid, 7.0, Reason.STOP) for wid in range(1, size + 2)))
    assert next_deadline(story.fleet) == story.now + 8.0
    story.canary_fails(2)
    story.gone(size + 1)
    story.expect()
    story.gone(*range(1, size + 1))
    story.expect(Halt(ExitCode.OK))


def test_quit_during_probation_kills_everyone() -> None:
    story = Story.on_probation()
    story.stop(now=True)
    story.expect(Kill(1, Reason.STOP), Kill(2, Reason.STOP))
    story.gone(2)
    story.expect()
    story.gone(1)
    story.expect(Halt(ExitCode.OK))


def test_a_probation_goes_on_during_the_shutdown_delay() -> None:
    story = Story.on_probation(2, canary=10.0, shutdown_delay=20.0)
    story.stop()
    assert next_deadline(story.fleet) == story.now + 10.0
    story.wait(10.0)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (3,)), Spawn(4, 2))
    assert next_deadline(story.fleet) == story.now + 10.0
    story.ready(4)
    story.expect(Drain(2, 30.0, Reason.RELOAD, (3, 4)), GenerationComplete(2))
    story.gone(1, 2)
    story.wait(10.0)
    story.expect(StopListening(), Drain(3, 7.0, Reason.STOP), Drain(4, 7.0, Reason.STOP))


def test_a_canary_that_fails_during_the_shutdown_delay_is_given_up() -> None:
    story = Story.on_probation(canary=60.0, shutdown_delay=20.0)
    story.stop()
    story.canary_fails(2)
    story.expect(Drain(2, 30.0, Reason.GIVEN_UP, (1,)), GenerationGivenUp(2, keeping=1))


def test_a_stop_and_the_end_of_a_probation_at_the_same_moment() -> None:
    story = Story.on_probation(canary=10.0, shutdown_delay=10.0)
    story.stop()
    story.expect()
    assert story.until_deadline() == 10.0
    story.expect(StopListening(), Drain(1, 7.0, Reason.STOP), Drain(2, 7.0, Reason.STOP))


def test_a_newer_reload_during_probation_waits_a_moment_and_supersedes_the_canary() -> None:
    story = Story.on_probation(2, canary=60.0)
    story.wait(2.0)
    story.reload()
    story.expect()
    assert story.until_deadline() == SUPERSEDE_AFTER - 2.0
    story.expect(Drain(3, 30.0, Reason.SUPERSEDED, (1, 2)), Spawn(4, 3))
    story.ready(4)
    story.expect(CanaryStarted(3, 4, 60.0))
    story.gone(3)
    story.expect()
    story.wait(60.0)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (4,)), Spawn(5, 3))


def test_a_newer_reload_late_in_a_probation_supersedes_the_canary_at_once_and_a_thousand_do_so_once() -> None:
    story = Story.on_probation(canary=60.0)
    story.wait(30.0)
    story.happens(*[ReloadAsked()] * 1000)
    story.expect(Drain(2, 30.0, Reason.SUPERSEDED, (1,)), Spawn(3, 3))
    assert story.fleet.newest == 3


def test_a_newer_reload_waits_for_a_probation_that_is_soon_over() -> None:
    story = Story.on_probation(canary=3.0)
    story.reload()
    assert story.until_deadline() == 3.0
    story.expect(Drain(1, 30.0, Reason.RELOAD, (2,)), Spawn(3, 3))
    story.ready(3)
    story.expect(CanaryStarted(3, 3, 3.0))
    story.wait(3.0)
    story.expect(Drain(2, 30.0, Reason.RELOAD, (3,)), GenerationComplete(3))


def test_a_newer_reload_that_came_before_the_canary_was_ready_supersedes_it_there() -> None:
    story = Story.serving(2, canary=60.0)
    story.reload()
    story.expect(Spawn(3, 2))
    story.reload()
    story.expect()
    story.ready(3)
    story.expect(Drain(3, 30.0, Reason.SUPERSEDED, (1, 2)), Spawn(4, 3))
    story.ready(4)
    story.expect(CanaryStarted(3, 4, 60.0))


def test_a_canary_that_fails_while_a_newer_reload_waits_makes_room_for_it() -> None:
    story = Story.on_probation(canary=60.0)
    story.reload()
    story.expect()
    story.canary_fails(2)
    story.expect(Drain(2, 30.0, Reason.GIVEN_UP, (1,)), GenerationGivenUp(2, keeping=1), Spawn(3, 3))


def settings_of_new_code(size: int, canary: float) -> Config:
    return Config(size=size, timeout=0.0, graceful_timeout=5.0, canary=canary)


def test_new_settings_count_when_the_canary_has_passed() -> None:
    story = Story.serving(canary=60.0, graceful_timeout=30.0)
    story.reload()
    story.expect(Spawn(2, 2))
    story.happens(WorkerReady(2, settings_of_new_code(size=3, canary=10.0)))
    story.expect(CanaryStarted(2, 2, 10.0))  # the probation itself is of the new settings
    story.wait(9.0)
    story.expect()
    assert (story.fleet.size, story.fleet.config.graceful_timeout) == (1, 30.0)
    story.wait(1.0)
    story.expect(Spawn(3, 2))
    story.ready(3)
    story.expect(Spawn(4, 2))
    story.ready(4)
    story.expect(Drain(1, 5.0, Reason.RELOAD, (2, 3, 4)), GenerationComplete(2))


def test_fewer_workers_of_new_settings_count_when_the_canary_has_passed() -> None:
    story = Story.serving(4, canary=60.0)
    story.reload()
    story.expect(Spawn(5, 2))
    story.happens(WorkerReady(5, settings_of_new_code(size=1, canary=60.0)))
    story.expect(CanaryStarted(2, 5, 60.0))
    story.wait(59.0)
    story.expect()
    story.wait(1.0)
    story.expect(*(Drain(wid, 5.0, Reason.RELOAD, (5,)) for wid in range(1, 5)), GenerationComplete(2))


def test_new_settings_are_given_up_with_their_canary() -> None:
    story = Story.serving(graceful_timeout=30.0, canary=60.0)
    story.reload()
    story.expect(Spawn(2, 2))
    story.happens(WorkerReady(2, settings_of_new_code(size=3, canary=60.0)))
    story.expect(CanaryStarted(2, 2, 60.0))
    story.canary_fails(2)
    story.expect(Drain(2, 30.0, Reason.GIVEN_UP, (1,)), GenerationGivenUp(2, keeping=1))
    story.wait(100.0)
    story.expect(Kill(2, Reason.GIVEN_UP), *[Kill(2, Reason.GIVEN_UP)] * 13)
    assert story.fleet.size == 1


def test_new_settings_can_bring_a_canary_and_can_take_it_away() -> None:
    story = Story.serving(canary=0.0)
    story.reload()
    story.expect(Spawn(2, 2))
    story.happens(WorkerReady(2, settings_of_new_code(size=1, canary=10.0)))
    story.expect(CanaryStarted(2, 2, 10.0))
    story.wait(10.0)
    story.expect(Drain(1, 5.0, Reason.RELOAD, (2,)), GenerationComplete(2))
    story.reload()
    story.expect(Spawn(3, 3))
    story.happens(WorkerReady(3, settings_of_new_code(size=1, canary=0.0)))
    story.expect(Drain(2, 5.0, Reason.RELOAD, (3,)), GenerationComplete(3))


def test_new_settings_without_a_canary_count_in_the_step_that_proves_them() -> None:
    story = Story.serving(2, graceful_timeout=30.0)
    story.reload()
    story.expect(Spawn(3, 2))
    story.happens(WorkerReady(3, settings_of_new_code(size=1, canary=0.0)))
    story.expect(Drain(1, 5.0, Reason.RELOAD, (3,)), Drain(2, 5.0, Reason.RELOAD, (3,)), GenerationComplete(2))


def test_what_ttin_chose_during_probation_stays_where_the_new_settings_say_nothing_new() -> None:
    story = Story.on_probation(canary=60.0)
    story.ttin()
    story.expect(Spawn(3, 1))
    story.ready(3)
    story.wait(60.0)
    story.expect(Drain(1, 30.0, Reason.RELOAD, (2,)), Spawn(4, 2))
    assert story.fleet.size == 2


# --------------------------------------------------------------------------------------- late, doubled and unknown

ABOUT_A_WORKER = [WorkerReady, WorkerBeat, WorkerAsksReplacement, WorkerLeaves, WorkerGone]


@pytest.mark.parametrize("kind", ABOUT_A_WORKER)
def test_events_about_unknown_workers_do_nothing(kind: type) -> None:
    story = Story.serving(2, timeout=30.0)
    before = repr(story.fleet)
    story.happens(kind(0), kind(3), kind(99))
    story.expect()
    assert repr(story.fleet) == before


@pytest.mark.parametrize("kind", ABOUT_A_WORKER)
def test_events_about_a_worker_that_is_gone_do_nothing(kind: type) -> None:
    story = Story.serving(2)
    story.ttou()
    story.expect(Drain(1, 30.0, Reason.SCALE_DOWN, (2,)))
    story.gone(1)
    before = repr(story.fleet)
    story.happens(kind(1))
    story.expect()
    assert repr(story.fleet) == before


@pytest.mark.parametrize("kind", [WorkerReady, WorkerBeat, WorkerAsksReplacement, WorkerLeaves])
def test_late_events_about_a_draining_worker_do_nothing(kind: type) -> None:
    story = Story.serving(2, timeout=30.0)
    story.ttou()
    story.expect(Drain(1, 30.0, Reason.SCALE_DOWN, (2,)))
    before = repr(story.fleet)
    story.happens(kind(1))
    story.expect()
    assert repr(story.fleet) == before


@pytest.mark.parametrize("kind", [WorkerBeat, WorkerAsksReplacement])
def test_a_booting_worker_can_neither_beat_nor_ask(kind: type) -> None:
    story = Story(boot_timeout=60.0)
    story.start()
    story.expect(Spawn(1, 1))
    story.wait(59.0)
    story.happens(kind(1))
    story.expect()
    story.wait(1.0)
    story.expect(Dump(1, Reason.BOOT_TIMEOUT))


def test_a_doubled_ready_does_not_make_a_worker_younger() -> None:
    story = Story.serving()
    story.wait(STEADY_AFTER)
    story.ready(1)
    story.gone(1)
    story.expect(Spawn(2, 1))


def test_ready_and_the_boot_timeout_at_the_same_moment() -> None:
    story = Story(boot_timeout=60.0)
    story.start()
    story.expect(Spawn(1, 1))
    story.now += 60.0
    story.ready(1)
    story.expect(GenerationComplete(1))


def test_a_clock_that_jumps_far_ahead_does_everything_once() -> None:
    story = Story.serving(2, timeout=30.0)
    story.reload()
    story.expect(Spawn(3, 2))
    story.now += 1e6
    story.happens(Tick())
    story.expect(
        Dump(1, Reason.STUCK),
        Dump(2, Reason.STUCK),
        Dump(3, Reason.BOOT_TIMEOUT),
        GenerationGivenUp(2, keeping=1),
        Spawn(4, 1),
        Spawn(5, 1),
    )
