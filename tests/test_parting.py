"""When and how the WebSockets of a draining worker go, with a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from apphost.lifecycle import Policy
from apphost.worker.parting import CLOSE_PACE, GOING_AWAY, MOVE_PACE, PATIENCE, RESTART, SHARE, Parting, Ways


class Loop:
    """Calls that wait for their time."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def call_later(self, seconds: float, call: Callable[..., None], *args: Any) -> Any:
        entry = (seconds, call, args)
        self.calls.append(entry)
        return SimpleNamespace(cancel=lambda: self.calls.remove(entry))

    def run(self) -> None:
        calls, self.calls = sorted(self.calls, key=lambda each: each[0]), []
        for _, call, args in calls:
            call(*args)


class Socket:
    open = True

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.went: list[Any] = []

    def leave(self, patience: float, time_to_move: float) -> None:
        self.went.append((patience, time_to_move))

    def dismiss(self, code: int, _why: str) -> None:
        self.went.append(code)


def stage(*policies: Policy) -> tuple[Loop, Parting, list[Any], list[Socket]]:
    loop = Loop()
    sockets = [Socket(policy) for policy in policies]
    return loop, Parting(cast(Any, loop)), [SimpleNamespace(websocket=socket) for socket in sockets], sockets


def test_each_goes_as_its_policy_and_the_plan_say() -> None:
    loop, parting, connections, (moves, closes) = stage(Policy.REJOIN, Policy.CLOSE)
    parting.plan(connections, Ways.MOVE, 100.0)
    loop.run()
    parting.plan(connections, Ways.CLOSE, 10.0)
    loop.run()
    parting.plan(connections, Ways.END, 10.0)
    assert [when for when, _, _ in loop.calls] == [0.0, 0.0], "at once: nobody comes back to this server"
    loop.run()
    assert moves.went == [(PATIENCE, 100.0 * SHARE), RESTART, GOING_AWAY]
    assert closes.went == [RESTART, RESTART, GOING_AWAY]


def test_they_are_spread_over_no_more_than_their_share_of_the_time() -> None:
    loop, parting, connections, _ = stage(*[Policy.CLOSE] * 3, *[Policy.REJOIN] * 2)
    parting.plan(connections, Ways.MOVE, 100.0)
    assert sorted(when for when, _, _ in loop.calls) == [0.0, 0.0, MOVE_PACE, CLOSE_PACE, 2 * CLOSE_PACE]
    parting.plan(connections, Ways.CLOSE, 0.005)
    assert max(when for when, _, _ in loop.calls) < 0.005 * SHARE


def test_a_new_plan_takes_the_place_of_the_one_before() -> None:
    loop, parting, connections, (socket,) = stage(Policy.CLOSE)
    parting.plan(connections, Ways.MOVE, 10.0)
    parting.plan(connections, Ways.END, 1.0)
    loop.run()
    assert socket.went == [GOING_AWAY]


def test_one_that_nobody_takes_comes_back_again_and_again_and_leaves_nothing_behind() -> None:
    """Each tick of a drain brings all of them back; once a socket has gone its way the plan forgets it."""
    loop, parting, connections, (socket,) = stage(Policy.REJOIN)
    parting.plan(connections, Ways.MOVE, 10.0)
    for _ in range(100):
        parting.add(connections[0])
        parting.add(connections[0])
        assert len(loop.calls) == len(parting._steps) == 1
        loop.run()
    assert not parting._steps
    assert len(socket.went) == 100
