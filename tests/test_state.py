"""The arbiter's state, there and back through JSON: what a new program finds of the one that it replaces."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.arbiter.fleet import Fleet, Worker, next_deadline, step
from apphost.arbiter.processes import Failure, ForkServer, WorkerProcess
from apphost.arbiter.state import VERSION, ArbiterState, StateError
from apphost.arbiter.upgrade import read_state, write_state
from apphost.arbiter.vocabulary import Config, Reason, ReloadAsked, StopAsked, Tick, WorkerGone, WorkerReady
from apphost.errors import ExitCode
from apphost.lifecycle import State
from apphost.messages import Channel
from apphost.settings import Settings

# ------------------------------------------------------------------------------------------------- building states


class End:
    """In place of a channel: its descriptor and what was read of a message."""

    def __init__(self, fd: int, rest: bytes) -> None:
        self.fd, self.rest = fd, rest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, End) and (self.fd, self.rest) == (other.fd, other.rest)

    __hash__ = None  # type: ignore[assignment]


@contextlib.contextmanager
def channels() -> Iterator[Callable[[bytes], Channel]]:
    """Makes real channels, each with the given beginning of a message."""
    with contextlib.ExitStack() as stack:

        def make(rest: bytes = b"") -> Channel:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            return Channel(ours, rest)

        yield make


def plain(state: ArbiterState) -> ArbiterState:
    """The same with comparable channels."""

    def each(process: Any) -> Any:
        channel = process.channel
        end = channel if isinstance(channel, End) else End(channel.fileno(), channel.rest)
        return dataclasses.replace(process, channel=end)

    return dataclasses.replace(
        state,
        workers=[each(worker) for worker in state.workers],
        fork_servers=[each(server) for server in state.fork_servers],
        leaving=[each(server) for server in state.leaving],
    )


def through_json(state: ArbiterState) -> dict[str, Any]:
    wire = json.loads(json.dumps(state.to_wire()))
    assert isinstance(wire, dict)
    return wire


def back(wire: Any) -> ArbiterState:
    return ArbiterState.from_wire(wire, End)  # type: ignore[arg-type]


def example(make: Callable[[bytes], Channel], fleet: Fleet | None = None) -> ArbiterState:
    """Something of everything."""
    failure = Failure("it raised RuntimeError", 'Traceback\n  "quoted" \u2014 \n', ExitCode.APPLICATION)
    settings = Settings(app="app:app", bind=("127.0.0.1:0", "unix:/run/x"), umask=0o22, keep_alive=1.5, workers=2)
    worker = WorkerProcess(
        7, 2, make(b'{"t":"be'), 11, 12.25, pid=4711, parent=100, ready_at=13.5, requests=9, errors=1
    )
    worker.names = {"interface": "asgi", "parser": "h11", "loop": "uvloop"}
    booting = WorkerProcess(8, 3, make(b""), 12, 14.0, failure=failure, expected=True, killed=True, lost_at=15.0)
    servers = [
        ForkServer(2, 100, make(b""), 20, settings, ignored=["user"]),
        ForkServer(3, 101, make(b"\xff\n"), 21, None, failure),
    ]
    gone = make(b"")
    gone.close()
    source = {"cli": {"bind": ["127.0.0.1:0"], "preload": True}, "config": None, "cwd": "/srv/current"}
    return ArbiterState(
        fleet=fleet or Fleet(Config(size=2)),
        settings=settings,
        source=source,
        listeners=[3, 4],
        workers=[worker, booting],
        fork_servers=servers,
        leaving=[ForkServer(1, 99, gone, 22)],
        own_sockets={"/run/x": (2049, 123456789012, 1_700_000_000_123_456_789)},
        pidfile=("/run/apphost.pid", 5),
        plain=[4],
        control=6,
        history={"started": 1.5, "replaced": {"reload": 2}, "ends": [{"at": 3.5, "why": "crashed"}]},
        clock=(16.5, 4016.5),
    )


# ------------------------------------------------------------------------------------------------- round trips


def test_everything_comes_back() -> None:
    with channels() as make:
        state = example(make)
        again = back(through_json(state))
        assert again == plain(state)
        assert [worker.channel.rest for worker in again.workers] == [b'{"t":"be', b""]
        assert again.leaving[0].channel == End(-1, b""), "it was closed already"


def test_types_are_restored_and_not_only_values() -> None:
    """`State` and `Reason` are texts and would pass for each other, until the first `is`."""
    with channels() as make:
        worker = Worker(1, 2, 3.0, State.DRAINING, 4.0, 5.0, Reason.STUCK, True, True)
        fleet = Fleet(Config(), workers={1: worker}, exit_code=ExitCode.APPLICATION, canary_config=Config(canary=1.0))
        again = back(through_json(example(make, fleet))).fleet
    assert again == fleet
    assert again.workers[1].state is State.DRAINING
    assert again.workers[1].reason is Reason.STUCK
    assert again.exit_code is ExitCode.APPLICATION
    assert type(again.canary_config) is Config


def test_the_descriptors_are_all_that_must_stay_open() -> None:
    with channels() as make:
        state = example(make)
        live = [each.channel.fileno() for each in (*state.workers, *state.fork_servers)]
        assert sorted(state.descriptors) == sorted([3, 4, 5, 6, 11, 12, 20, 21, 22, *live])
        state.pidfile = None
        assert 5 not in state.descriptors


def test_the_state_file_is_read_as_it_was_written() -> None:
    with channels() as make:
        state = example(make)
        fd = write_state(state)
        try:
            assert read_state(fd, End) == plain(state)  # type: ignore[arg-type]
        finally:
            os.close(fd)


times = st.floats(0, 1e9)
maybe = st.none() | times
fleet_configs = st.builds(
    Config, size=st.integers(1, 9), boot_timeout=times, timeout=times, graceful_timeout=times, stop_timeout=times,
    shutdown_delay=times, canary=times, stand_in=st.booleans(), keep_good=st.booleans(),
)  # fmt: skip
fleet_workers = st.builds(
    Worker, wid=st.integers(1, 10**9), generation=st.integers(1, 9), born=times, state=st.sampled_from(State),
    ready_at=times, deadline=maybe, reason=st.none() | st.sampled_from(Reason), stale=st.booleans(),
    killed=st.booleans(),
    connections=st.integers(0, 10**6),
)  # fmt: skip
fleets = st.builds(
    Fleet, config=fleet_configs, size=st.integers(1, 9), target=st.integers(1, 9), good=st.integers(0, 9),
    newest=st.integers(1, 9), complete=st.integers(0, 9), again=st.booleans(), target_since=times, canary_until=maybe,
    stand_in=st.integers(0, 9),
    canary_config=st.none() | fleet_configs, stop_at=maybe, stopping=st.booleans(), stop_deadline=times,
    exit_code=st.sampled_from(ExitCode), halted=st.booleans(), crashes=st.integers(0, 99), not_before=maybe,
    next_wid=st.integers(1, 10**9),
    workers=st.lists(fleet_workers, max_size=5).map(lambda workers: {worker.wid: worker for worker in workers}),
)  # fmt: skip


def wire_of(fleet: Fleet) -> dict[str, Any]:
    state = ArbiterState(fleet, Settings(), {"cli": {}, "config": None, "cwd": "/"}, [], [], [], [], {}, None)
    return through_json(state)


@given(fleets)
def test_any_fleet_comes_back(fleet: Fleet) -> None:
    assert back(wire_of(fleet)).fleet == fleet


def test_the_strategy_knows_every_field() -> None:
    """A field that is added to the fleet must be in the round trip above."""
    fields = {each.name for kind in (Fleet, Worker, Config) for each in dataclasses.fields(kind)}
    assert fields <= set(str(fleets).replace("=", " ").replace("(", " ").replace(",", " ").split())


events = st.sampled_from(
    [ReloadAsked(), Tick(), StopAsked(), *(kind(wid) for kind in (WorkerReady, WorkerGone) for wid in range(1, 6))]
)


@given(st.lists(events, max_size=12), st.lists(events, max_size=12), st.sampled_from([0.0, 5.0]))
def test_a_fleet_goes_on_where_it_stopped(before: list[Any], after: list[Any], canary: float) -> None:
    fleet = Fleet(Config(size=2, canary=canary))
    for moment, event in enumerate((Tick(), *before)):
        step(fleet, event, float(moment))
    again = back(wire_of(fleet)).fleet
    for moment, event in enumerate(after, len(before) + 1):
        assert step(again, event, float(moment)) == step(fleet, event, float(moment))
        assert next_deadline(again) == next_deadline(fleet)


# ------------------------------------------------------------------------------------------------- other versions


def sprinkled(value: Any) -> Any:
    """`value` with an unknown key in every object that has a fixed set of them."""
    if isinstance(value, dict):
        more = {} if not value or all(key.isdigit() or "/" in key for key in value) else {"of_the_future": [1]}
        return {key: sprinkled(each) for key, each in value.items()} | more
    if isinstance(value, list):
        return [sprinkled(each) for each in value]
    return value


def test_unknown_keys_are_ignored() -> None:
    with channels() as make:
        state = example(make, Fleet(Config(), workers={3: Worker(3, 1, 0.0)}, canary_config=Config()))
        wire = through_json(state)
        kept = wire["source"], [worker["names"] for worker in wire["workers"]]
        wire = sprinkled(wire)
        # Free forms: they come back as they are.
        wire["source"], wire["history"] = kept[0], state.history
        for worker, names in zip(wire["workers"], kept[1], strict=True):
            worker["names"] = names
        assert "of_the_future" in wire["fleet"]["workers"]["3"]
        assert "of_the_future" in wire["workers"][0]["channel"]
        assert back(wire) == plain(state)


def test_missing_keys_have_their_defaults() -> None:
    with channels() as make:
        wire = through_json(example(make, Fleet(Config(), workers={3: Worker(3, 1, 0.0)}, crashes=4)))
        for name in ("crashes", "canary_until", "canary_config", "stop_at", "again"):
            del wire["fleet"][name]
        del wire["fleet"]["config"]["canary"]
        del wire["fleet"]["workers"]["3"]["stale"]
        del wire["workers"][0]["errors"]
        del wire["settings"]["canary"]
        del wire["clock"]
        state = back(wire)
    assert state.fleet.crashes == 0
    assert state.fleet.config.canary == 0.0
    assert state.fleet.workers[3].stale is False
    assert state.workers[0].errors == 0
    assert state.settings.canary == 0.0
    assert state.clock is None


@pytest.mark.parametrize("version", [None, 0, VERSION + 1, str(VERSION), [VERSION]])
def test_another_version_is_refused(version: object) -> None:
    wire = wire_of(Fleet(Config()))
    wire["v"] = version
    with pytest.raises(StateError, match="version"):
        back(wire)


@pytest.mark.parametrize(
    "name",
    ["fleet", "settings", "source", "listeners", "workers", "fork_servers", "leaving", "own_sockets", "pidfile"],
)
def test_a_part_that_is_missing_is_refused(name: str) -> None:
    wire = wire_of(Fleet(Config()))
    del wire[name]
    with pytest.raises(StateError, match=name):
        back(wire)


# ------------------------------------------------------------------------------------------------- nonsense

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def read_or_refuse(wire: Any) -> None:
    """Nothing but a `StateError` may come out: the trial of an upgrade tells by it."""
    with contextlib.suppress(StateError):
        back(wire)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in a JSON document, whole objects included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from paths(each, (*path, key))


@given(st.data())
def test_a_state_with_one_thing_spoilt_is_read_or_refused(data: st.DataObject) -> None:
    with channels() as make:
        wire = through_json(example(make, Fleet(Config(), workers={3: Worker(3, 1, 0.0)}, canary_config=Config())))
    *way, last = data.draw(st.sampled_from([path for path in paths(wire) if path]))
    parent = wire
    for key in way:
        parent = parent[key]
    parent[last] = data.draw(junk)
    read_or_refuse(wire)


@given(junk)
def test_anything_else_is_refused(wire: Any) -> None:
    with pytest.raises(StateError):
        back(wire)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b'"v"', b"\xff\xfe", b"[" * 100_000, b'{"v": 1}', b'{"v": 2}', b"{}{}"],
    ids=["empty", "cut", "list", "null", "number", "text", "binary", "deep", "bare", "newer", "more"],
)
def test_a_file_that_is_no_state_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "state"
    file.write_bytes(content)
    with file.open("rb") as opened, pytest.raises(StateError):
        read_state(opened.fileno(), End)  # type: ignore[arg-type]


def test_a_descriptor_that_is_no_file_is_refused() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(StateError):
        read_state(reader, End)  # type: ignore[arg-type]
