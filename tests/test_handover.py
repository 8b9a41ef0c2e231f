"""Hand-over of connections, each promise of `handover.py` as a test: real sockets and loops, one process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apphost.lifecycle import State
from apphost.messages import Channel, Message, encode
from apphost.protocols.capsule import VERSION, Capsule
from apphost.protocols.http1 import Connection
from apphost.protocols.wire import Phase
from apphost.worker.handover import ANSWER_TIMEOUT, BATCH, IN_FLIGHT_MAX
from apphost.worker.server import Server
from tests.handover_stage import Client, Side, Stage, Theatre, messages, moving, request, turns, until
from tests.peer import TIMEOUTS
from tests.rawhttp import DEADLINE
from tests.support import no_more_descriptors

CAPSULE = Capsule(("127.0.0.1", 4711), ("127.0.0.1", 80), "http", 0, 60.0, False, b"")

each_kind = pytest.mark.parametrize("kind", ["tcp", "unix"])


@pytest.fixture(scope="module")
def theatre(loop_name: str, http_parser: str) -> Theatre:
    return Theatre(loop_name, http_parser)


def answer(channel: Channel, kind: str, number: object) -> None:
    assert channel.send({"t": kind, "id": number})


async def one_offer(stage: Stage, sent: bytes = b"") -> tuple[Side, Client, Connection, Channel, Message]:
    """An old side has offered its only connection to a successor played by hand, which has not answered."""
    old = stage.side("old")
    client, connection = await stage.client(old)
    if sent:
        await client.send(sent)
        await until(lambda: connection.buffer == sent)
    channel = stage.by_hand(old)
    ((move, fds),) = await messages(channel)
    for fd in fds:
        os.close(fd)
    assert move["t"] == "move"
    assert len(fds) == 1
    assert moving(connection)
    return old, client, connection, channel, move


# ------------------------------------------------------------------------------------------------ what moves, and how


@each_kind
def test_an_idle_connection_moves_with_all_that_is_known_of_it(theatre: Theatre, kind: str) -> None:
    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, connection = await stage.client(old, kind)
        first = await client.ask("/1")
        connection.read_deadline -= TIMEOUTS.keep_alive / 2  # as if it had waited for that long
        deadline, began = connection.read_deadline, stage.loop.time()
        stage.connect(old, new)
        await until(lambda: new.connections and not old.connections)
        (arrived,) = new.connections
        assert arrived.requests == 1
        assert -0.01 < arrived.read_deadline - deadline < stage.loop.time() - began + 0.01, "no more than the way took"
        second = await client.ask("/2", b"body")
        assert (first.side, second.side) == ("old", "new")
        assert (first.client, first.server) == (second.client, second.server)
        assert arrived.requests == 2
        assert old.sender is not None
        assert old.sender.moved == 1

    theatre(play)


@each_kind
def test_what_nobody_has_read_is_read_by_the_receiver(theatre: Theatre, kind: str) -> None:
    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, _ = await stage.client(old, kind)
        client.push(request("/unread", b"body"))
        stage.connect(old, new)
        reply = await client.answer()
        assert reply.fits("/unread", b"body")
        assert reply.side == "new"
        assert stage.calls == ["/unread"]

    theatre(play)


@each_kind
def test_a_head_moves_in_whatever_byte_it_is_cut(theatre: Theatre, kind: str) -> None:
    head = b"\r\n" + request("/cut", b"body")
    cuts = range(1, len(head) - len(b"body"))

    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        clients = []
        for cut in cuts:
            client, connection = await stage.client(old, kind)
            await client.send(head[:cut])
            await until(lambda connection=connection, cut=cut: head[:cut].endswith(connection.buffer or b"\n"))
            clients.append((cut, client))
        stage.connect(old, new)
        await until(lambda: len(new.connections) == len(cuts))
        for cut, client in clients:
            await client.send(head[cut:])
            reply = await client.answer()
            assert reply.fits("/cut", b"body"), cut
            assert reply.side == "new", cut
            assert not client.received
        assert len(stage.calls) == len(cuts)

    theatre(play)


def test_a_half_head_that_cannot_become_a_request_is_refused_by_the_receiver(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, connection = await stage.client(old)
        await client.send(b"GET / HTTP/1.1\r\nHo")
        await until(lambda: connection.phase is Phase.HEAD)
        stage.connect(old, new)
        await until(lambda: new.connections)
        await client.send(b"st : a\r\n\r\n")
        received = await asyncio.wait_for(stage.loop.sock_recv(client.sock, 1000), DEADLINE)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert stage.calls == []

    theatre(play)


@each_kind
@pytest.mark.parametrize("tail", [b"", b"GET /half HTT"], ids=["whole", "half"])
@pytest.mark.parametrize("unwilling", [0, 3])
def test_pipelined_requests_move_in_the_buffer(theatre: Theatre, kind: str, tail: bytes, unwilling: int) -> None:
    """Also when some successors refuse: what is in the buffer must not be begun here before all have been asked."""

    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, connection = await stage.client(old, kind)
        targets = ["/wait", *(f"/{number}" for number in range(19))]
        bodies = [b"", *(b"x" * (number % 3 * 50) for number in range(19))]
        burst = b"".join(map(request, targets, bodies)) + tail
        await client.send(burst)
        await until(lambda: len(connection.buffer) == len(burst) - len(request("/wait")))
        stage.connect(old, *stage.full_sides(unwilling), new)
        await turns()
        assert old.connections == [connection], "a request in progress has moved"
        stage.release.set()
        sides = []
        for target, body in zip(targets, bodies, strict=True):
            reply = await client.answer()
            assert reply.fits(target, body)
            sides.append(reply.side)
        assert sides == ["old", *["new"] * 19]
        if tail:
            await client.send(b"P/1.1\r\nHost: a\r\n\r\n")
            assert (await client.answer()).fits("/half")
        assert not client.received

    theatre(play)


def test_a_connection_that_is_accepted_during_the_drain_moves_unread(theatre: Theatre) -> None:
    """Also one whose transport begins to read only after `connection_made`: nothing is read once it is offered."""

    async def play(stage: Stage) -> None:
        old = stage.side("old")
        channel = stage.by_hand(old)
        client, connection = await stage.client(old)
        ((move, (fd,)),) = await messages(channel)
        assert moving(connection)
        await client.send(request("/late"))
        await turns()
        assert connection.buffer == b"", "read while it was moving"
        with socket.socket(fileno=fd) as sock:
            answer(channel, "prepared", move["id"])
            ((commit, _),) = await messages(channel)
            assert commit == {"t": "commit", "id": move["id"]}
            await until(lambda: not old.connections)
            assert sock.recv(1000) == request("/late")

    theatre(play)


def test_no_connection_with_unsent_bytes_moves(theatre: Theatre) -> None:
    """The receiver must write nothing before the sender has written everything."""

    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, connection = await stage.client(old)
        await client.send(request("/big/9000000") + request("/next"))
        await until(lambda: connection.phase is Phase.WAITING and connection.transport.get_write_buffer_size() > 0)
        stage.connect(old, new)
        await turns()
        assert old.connections == [connection]
        assert (await client.answer()).target == "/big/9000000"
        reply = await client.answer()
        assert reply.fits("/next")
        await until(lambda: new.connections and not old.connections)

    theatre(play)


@each_kind
def test_a_half_head_behind_unsent_bytes_is_answered_and_moves(theatre: Theatre, kind: str) -> None:
    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client = await _unsent_and_half(stage, old, kind)
        stage.connect(old, new)
        await client.send(b"P/1.1\r\nHost: a\r\n\r\n")
        await turns()
        assert (await client.answer()).side == "old"
        assert (await client.answer()).fits("/half")
        await until(lambda: not old.connections)
        assert (await client.ask("/after")).side == "new"

    theatre(play)


async def _unsent_and_half(stage: Stage, side: Side, kind: str) -> Client:
    """A connection with half a head in its buffer and so few unsent bytes that it has not been told to pause."""
    for size in range(100_000, 8_000_000, 20_000):
        client, connection = await stage.client(side, kind)
        await client.send(request(f"/big/{size}"))
        await until(lambda connection=connection: connection.requests == 1 and connection.phase is Phase.WAITING)
        unsent = connection.transport.get_write_buffer_size()
        if unsent > 0:
            assert not connection.write_paused, f"{unsent} bytes"
            await client.send(b"GET /half HTT")
            await until(lambda connection=connection: connection.phase is Phase.HEAD)
            return client
        client.sock.close()
    raise AssertionError("no size leaves anything unsent")


def test_time_that_is_left_travels_and_never_grows(theatre: Theatre) -> None:
    """Else a client could keep half a head for as long as workers move it about."""

    async def play(stage: Stage) -> None:
        one, two = stage.side("one"), stage.side("two")
        client, connection = await stage.client(one)
        await client.send(b"GET /slow HTT")
        await until(lambda: connection.phase is Phase.HEAD)
        connection.read_deadline -= TIMEOUTS.request_header / 2  # as if it had waited for that long
        deadline, began = connection.read_deadline, stage.loop.time()
        for source, target in [(one, two), (two, one)] * 5:
            stage.connect(source, target)
            await until(lambda target=target: target.connections)
            assert target.connections[0].phase is Phase.HEAD
            more = target.connections[0].read_deadline - deadline
            assert -0.01 < more < stage.loop.time() - began + 0.01, "no more than the ways took"
            source.serve_on()
        one.context.tick(deadline + 1)
        received = await asyncio.wait_for(stage.loop.sock_recv(client.sock, 1000), DEADLINE)
        assert received.startswith(b"HTTP/1.1 408 ")

    theatre(play)


def test_moves_are_spread_over_the_successors(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old = stage.side("old")
        news = [stage.side(f"new{number}") for number in range(3)]
        for _ in range(90):
            await stage.client(old)
        pairs = [stage.pair() for _ in news]
        for new, (_, theirs) in zip(news, pairs, strict=True):
            new.receive_from(theirs)
        old.drain_to(*(ours for ours, _ in pairs))
        await until(lambda: not old.connections and sum(len(new.connections) for new in news) == 90)
        counts = [len(new.connections) for new in news]
        assert max(counts) - min(counts) <= 10, "as many, but for those on their way when it was decided"

    theatre(play)


def test_a_successor_that_comes_later_gets_what_is_left(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old, client, _, channel, _ = await one_offer(stage)
        channel.close()
        await until(lambda: old.failed)
        new = stage.side("new")
        ours, theirs = stage.pair()
        new.receive_from(theirs)
        assert old.sender is not None
        old.sender.add(ours)
        await until(lambda: new.connections and not old.connections)
        assert (await client.ask("/1")).side == "new"

    theatre(play)


def test_offers_in_flight_are_bounded(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old = stage.side("old")
        count = IN_FLIGHT_MAX + 20
        for _ in range(count):
            await stage.client(old)
        channel = stage.by_hand(old)
        offered = await messages(channel, IN_FLIGHT_MAX)
        await turns()
        assert channel.receive() == []
        assert sum(map(moving, old.connections)) == IN_FLIGHT_MAX
        for move, _ in offered[:5]:
            answer(channel, "prepared", move["id"])
        following = await messages(channel, 10)
        assert sorted(message["t"] for message, _ in following) == ["commit"] * 5 + ["move"] * 5
        for _, fds in (*offered, *following):
            for fd in fds:
                os.close(fd)

    theatre(play)


def test_the_emptier_successor_gets_more(theatre: Theatre) -> None:
    """S10: what one worker held is shared so that all have as many in the end, whatever they had before."""

    async def play(stage: Stage) -> None:
        full, empty, old = stage.side("full"), stage.side("empty"), stage.side("old")
        for _ in range(40):
            await stage.client(full)
        clients = [(await stage.client(old))[0] for _ in range(60)]
        stage.connect(old, full, empty)
        await until(lambda: not old.connections)
        await until(lambda: len(full.connections) + len(empty.connections) == 100)
        assert abs(len(full.connections) - len(empty.connections)) <= 10
        sides = [(await client.ask()).side for client in clients]
        assert sides.count("empty") > 40

    theatre(play)


def test_many_move_a_few_in_each_turn_of_the_loop(theatre: Theatre) -> None:
    """S10: requests do not wait until thousands have been looked at."""

    async def play(stage: Stage) -> None:
        old = stage.side("old")
        for _ in range(3 * BATCH):
            await stage.client(old)
        channel = stage.by_hand(old)
        assert sum(map(moving, old.connections)) == BATCH
        offered = await messages(channel, IN_FLIGHT_MAX)
        assert sum(map(moving, old.connections)) == IN_FLIGHT_MAX
        for _, fds in offered:
            for fd in fds:
                os.close(fd)

    theatre(play)


# ------------------------------------------------------------------------------------- when it does not come about


def _dies(channel: Channel, _number: int) -> None:
    channel.close()


def _dies_prepared(channel: Channel, number: int) -> None:
    answer(channel, "prepared", number)
    channel.close()


def _refuses(channel: Channel, number: int) -> None:
    answer(channel, "refused", number)


def _talks_nonsense(channel: Channel, _number: int) -> None:
    channel.sock.send(b"HTTP/1.1 200 OK\r\n\r\n")


def _breaks_off(channel: Channel, number: int) -> None:
    channel.sock.send(encode({"t": "prepared", "id": number})[:-3])
    channel.close()


FAILURES = [_dies, _dies_prepared, _refuses, _talks_nonsense, _breaks_off]


@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__.strip("_"))
@pytest.mark.parametrize("sent", [b"", b"GET /half HTT"], ids=["idle", "half"])
def test_what_a_successor_does_not_take_is_served_on(
    theatre: Theatre, fail: Callable[[Channel, int], None], sent: bytes
) -> None:
    async def play(stage: Stage) -> None:
        old, client, connection, channel, move = await one_offer(stage, sent)
        fail(channel, move["id"])
        # The end of the channel may be read a turn after the COMMIT that it made fail.
        await until(lambda: not moving(connection) and old.failed == (fail is not _refuses))
        assert old.connections == [connection]
        if sent:
            await client.send(b"P/1.1\r\nHost: a\r\n\r\n")
            assert (await client.answer()).fits("/half")
        else:
            assert (await client.ask("/2", b"body")).side == "old"
        assert old.sender is not None
        assert old.sender.moved == 0
        assert old.sender.able == (fail is _refuses)

    theatre(play)


@pytest.mark.parametrize("fail", [_dies, _dies_prepared, _talks_nonsense], ids=lambda fail: fail.__name__.strip("_"))
def test_what_a_successor_does_not_take_goes_to_the_others(
    theatre: Theatre, fail: Callable[[Channel, int], None]
) -> None:
    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        clients = [(await stage.client(old))[0] for _ in range(10)]
        (bad, theirs), (good, receiving) = stage.pair(), stage.pair()
        channel = Channel(theirs)
        stage.channels.append(theirs)
        new.receive_from(receiving)
        old.drain_to(bad, good)
        offered = await messages(channel)  # one, as it has not told yet how many it holds
        for _, fds in offered:
            for fd in fds:
                os.close(fd)
        fail(channel, offered[0][0]["id"])
        await until(lambda: len(old.connections) <= 1)
        assert old.sender is not None
        old.sender.tick(stage.loop.time())
        await until(lambda: len(new.connections) == 10 and not old.connections)
        for client in clients:
            assert (await client.ask()).side == "new"
        assert old.failed == 0

    theatre(play)


def test_a_successor_that_never_answers_is_given_up(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old, client, connection, channel, _ = await one_offer(stage)
        assert old.sender is not None
        old.sender.tick(stage.loop.time() + ANSWER_TIMEOUT - 1)
        assert moving(connection)
        old.sender.tick(stage.loop.time() + ANSWER_TIMEOUT + 0.1)
        assert not moving(connection)
        assert old.failed == 1
        assert (await client.ask()).side == "old"
        assert channel.receive() is None

    theatre(play)


def test_what_was_refused_is_offered_again(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, connection = await stage.client(old)
        deadline = connection.read_deadline
        new.room = False
        stage.connect(old, new)
        await until(lambda: not moving(connection))
        assert connection.read_deadline == deadline, "a refusal has changed the time that is left"
        assert old.sender is not None
        old.sender.tick(stage.loop.time())
        assert moving(connection)
        await until(lambda: not moving(connection))
        assert old.connections == [connection]
        new.room = True
        old.sender.tick(stage.loop.time())
        await until(lambda: new.connections and not old.connections)
        assert (await client.ask()).side == "new"

    theatre(play)


@pytest.mark.parametrize("unwilling", [1, 2, 7])
def test_what_one_successor_refuses_goes_to_the_next_without_a_tick(theatre: Theatre, unwilling: int) -> None:
    """A client that is idle for an instant only is not idle any more at the next tick; most successors may be draining
    themselves when deploys come thick and fast."""

    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, _ = await stage.client(old)
        await client.ask()
        stage.connect(old, *stage.full_sides(unwilling), new)
        await until(lambda: new.connections and not old.connections)
        other, _ = await stage.client(old)  # after a tick all are asked again, before it only who has not refused
        await other.ask()
        await until(lambda: len(new.connections) == 2 and not old.connections)
        assert (await client.ask()).side == (await other.ask()).side == "new"

    theatre(play)


def test_the_time_of_a_connection_runs_while_it_is_offered(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old, client, connection, channel, move = await one_offer(stage)
        old.context.tick(connection.read_deadline + 1)
        assert moving(connection), "it was ended while another worker may have it"
        answer(channel, "refused", move["id"])
        await until(lambda: not moving(connection))
        old.context.tick(stage.loop.time() + 1)
        assert await client.ended()

    theatre(play)


def test_bytes_that_come_in_spite_of_the_pause_take_the_offer_back(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old, client, connection, channel, move = await one_offer(stage, b"GET /half HTT")
        connection.data_received(b"P/1.1\r\nHost: a\r\n\r\n")
        assert moving(connection)
        answer(channel, "prepared", move["id"])
        (cancel, _), (again, (fd,)) = await messages(channel, 2)
        os.close(fd)
        assert cancel == {"t": "cancel", "id": move["id"]}
        assert (again["t"], again["requests"], again["data"]) == ("move", 1, "")
        reply = await client.answer()
        assert reply.fits("/half")
        assert stage.calls == ["/half"]
        assert old.sender is not None
        assert old.sender.moved == 0

    theatre(play)


def test_a_client_that_ends_its_side_while_it_is_offered_is_closed_when_it_stays(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        old, client, connection, channel, move = await one_offer(stage)
        connection.eof_received()
        answer(channel, "refused", move["id"])
        assert await client.ended()
        await until(lambda: not old.connections)

    theatre(play)


@pytest.mark.parametrize("after", ["move", "commit"])
def test_a_client_that_leaves_on_the_way_is_gone(theatre: Theatre, after: str) -> None:
    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, _ = await stage.client(old)
        stage.connect(old, new)
        if after == "commit":
            await until(lambda: old.sender is not None and old.sender.moved)
        client.sock.close()
        await until(lambda: not old.connections and not new.connections)
        await until(lambda: not any(receiver.coming for receiver in new.receivers))

    theatre(play)


# ------------------------------------------------------------------------------------ a channel that is not read


def _fill(sock: socket.socket) -> None:
    """Until nothing fits any more; lines that a receiver ignores."""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(encode({"t": "filler"}))


@pytest.mark.parametrize("outcome", ["read", "dies", "stuck"])
def test_a_connection_is_let_go_only_when_its_commit_has_left(theatre: Theatre, outcome: str) -> None:
    async def play(stage: Stage) -> None:
        old = stage.side("old")
        client, connection = await stage.client(old)
        ours, theirs = stage.pair()
        stage.channels.append(theirs)
        with ours.dup() as extra:
            old.drain_to(ours)
            channel = Channel(theirs)
            ((move, (fd,)),) = await messages(channel)
            _fill(extra)
        sock = socket.socket(fileno=fd)
        answer(channel, "prepared", move["id"])
        await turns()
        assert old.connections == [connection]
        assert moving(connection)
        assert old.sender is not None
        assert old.sender.moved == 0
        if outcome == "read":
            found: list[Message] = []
            await until(lambda: found.extend(m for m, _ in channel.receive() or []) or found[-1:][0]["t"] == "commit")
            await until(lambda: not old.connections)
            assert old.sender.moved == 1
            sock.close()
            assert await client.ended()
            return
        if outcome == "dies":
            channel.close()
        else:
            old.sender.tick(stage.loop.time() + ANSWER_TIMEOUT + 0.1)
        sock.close()
        await until(lambda: not moving(connection))
        assert (await client.ask()).side == "old"

    theatre(play)


@pytest.mark.parametrize("outcome", ["read", "dies"])
def test_an_offer_larger_than_the_channel_waits_and_others_behind_it(theatre: Theatre, outcome: str) -> None:
    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        small, first = await stage.client(old)
        large, second = await stage.client(old)
        burst = request("/wait") + b"".join(request(f"/{n}", b"x" * 9000) for n in range(60))
        await large.send(burst)
        await until(lambda: second.read_paused)
        ours, theirs = stage.pair()
        theirs.setblocking(False)
        old.drain_to(ours)
        stage.release.set()
        await until(lambda: moving(second) and moving(first))
        await turns()
        if outcome == "dies":
            theirs.close()
        else:
            new.receive_from(theirs)
        assert (await large.answer()).fits("/wait")
        for n in range(60):
            assert (await large.answer()).fits(f"/{n}", b"x" * 9000)
        assert (await small.ask()).side == ("new" if outcome == "read" else "old")
        assert len(stage.calls) == 62

    theatre(play)


# -------------------------------------------------------------------------------------------------- the receiver


async def _receiver(stage: Stage) -> tuple[Side, Channel]:
    """A real receiver, and the channel of a sender that the test plays."""
    new = stage.side("new")
    ours, theirs = stage.pair()
    stage.channels.append(ours)
    new.receive_from(theirs)
    return new, Channel(ours)


def offer(stage: Stage, channel: Channel, message: Message) -> Client:
    """Send `message` with the server's end of a new connection, of which no other copy is left; its client."""
    ours, theirs = stage.sockets("tcp")
    client = Client(stage.loop, ours)
    stage.clients.append(client)
    with theirs:
        assert channel.send(message, [theirs.fileno()])
    return client


MOVE = {"t": "move", "id": 1, **CAPSULE.to_wire()}


@pytest.mark.parametrize(
    "change",
    [{"v": VERSION + 1}, {"kind": "h2"}, {"data": "?"}, {"left": "soon"}, {"id": None}, {"id": [1]}, {"id": True}],
    ids=str,
)
def test_what_the_receiver_does_not_understand_it_refuses_and_closes(theatre: Theatre, change: Message) -> None:
    async def play(stage: Stage) -> None:
        new, channel = await _receiver(stage)
        client = offer(stage, channel, {**MOVE, **change})
        ((refused, _),) = await messages(channel)
        assert refused == {"t": "refused", "id": change.get("id", 1), "connections": 0}
        assert await client.ended()
        good = offer(stage, channel, {**MOVE, "id": 2})
        assert (await messages(channel))[0][0] == {"t": "prepared", "id": 2, "connections": 1}
        answer(channel, "commit", 2)
        assert (await good.ask()).side == "new"
        assert len(new.connections) == 1

    theatre(play)


def test_without_room_or_with_a_number_twice_it_refuses(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        new, channel = await _receiver(stage)
        first = offer(stage, channel, MOVE)
        assert (await messages(channel))[0][0]["t"] == "prepared"
        again = offer(stage, channel, MOVE)
        assert (await messages(channel))[0][0]["t"] == "refused"
        assert await again.ended()
        new.room = False
        third = offer(stage, channel, {**MOVE, "id": 3})
        assert (await messages(channel))[0][0]["t"] == "refused"
        assert await third.ended()
        assert channel.send({**MOVE, "id": 4})
        assert (await messages(channel))[0][0] == {"t": "refused", "id": 4, "connections": 1}
        answer(channel, "commit", 1)
        assert (await first.ask()).side == "new"

    theatre(play)


def test_a_connection_that_fits_no_message_stays_and_the_others_move(
    theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apphost.messages.MAX_MESSAGE", 2000)

    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        large, stays = await stage.client(old)
        await large.send(request("/" + "x" * 3000)[:-1])
        await until(lambda: stays.phase is Phase.HEAD)
        small, _ = await stage.client(old)
        stage.connect(old, new)
        assert (await small.ask()).side == "new"
        await large.send(b"\n")
        assert (await large.answer()).side == "old"
        assert old.failed == 0

    theatre(play)


def test_what_was_prepared_takes_room_before_it_is_committed(theatre: Theatre) -> None:
    """`limit_connections`: a draining worker offers up to 64 at once, which must not all find the last free place."""

    async def play(stage: Stage) -> None:
        new, channel = await _receiver(stage)
        (receiver,) = new.receivers
        worker = SimpleNamespace(
            acceptors=[], receivers=[receiver], context=new.context, state=State.READY,
            assignment=SimpleNamespace(room=1),
        )  # fmt: skip
        worker._held = lambda: Server._held(worker)  # type: ignore[arg-type]
        receiver._has_room = lambda: Server._welcome(worker)  # type: ignore[arg-type]
        offer(stage, channel, MOVE)
        assert (await messages(channel))[0][0]["t"] == "prepared"
        offer(stage, channel, {**MOVE, "id": 2})
        assert (await messages(channel))[0][0]["t"] == "refused"

    theatre(play)


@pytest.mark.parametrize("end", ["cancel", "death", "nonsense", "half a message"])
def test_the_receiver_closes_what_was_not_committed(theatre: Theatre, end: str) -> None:
    async def play(stage: Stage) -> None:
        new, channel = await _receiver(stage)
        (receiver,) = new.receivers
        client = offer(stage, channel, MOVE)
        await client.send(request())
        await messages(channel)
        await turns()
        assert receiver.coming
        assert stage.calls == [], "it was read before COMMIT"
        if end == "cancel":
            answer(channel, "cancel", 1)
        elif end == "nonsense":
            channel.sock.send(b"\x00\n")
        else:
            channel.sock.send(encode({"t": "commit", "id": 1})[:-1] if end == "half a message" else b"")
            channel.close()
        assert await client.ended()
        assert not receiver.coming
        await until(lambda: bool(new.receivers) == (end == "cancel"))
        assert not new.connections

    theatre(play)


def test_what_was_committed_is_served_though_the_sender_dies(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        new, channel = await _receiver(stage)
        client = offer(stage, channel, {**MOVE, **Capsule(*_address(), "http", 3, 9.0, True, b"GET /ha").to_wire()})
        await messages(channel)
        answer(channel, "commit", 1)
        channel.close()
        await client.send(b"lf HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.answer()).fits("/half")
        assert new.connections[0].requests == 4

    theatre(play)


def _address() -> tuple[tuple[str, int], tuple[str, int]]:
    return ("127.0.0.1", 4711), ("127.0.0.1", 80)


@pytest.mark.parametrize("kind", ["commit", "cancel", "prepared", "refused", "unknown"])
def test_orders_about_nothing_known_are_ignored(theatre: Theatre, kind: str) -> None:
    """By the receiver and by the sender."""

    async def play(stage: Stage) -> None:
        _, channel = await _receiver(stage)
        old, _, connection, successor, move = await one_offer(stage)
        for number in (None, True, 99, -1, "1", [1], {}, 1.0):
            answer(channel, kind, number)
            answer(successor, kind, number)
        await turns()
        assert moving(connection)
        client = offer(stage, channel, MOVE)
        assert (await messages(channel))[0][0] == {"t": "prepared", "id": 1, "connections": 1}
        answer(channel, "commit", 1)
        assert (await client.ask()).side == "new"
        answer(successor, "prepared", move["id"])
        await until(lambda: not old.connections)

    theatre(play)


def test_a_descriptor_that_is_no_socket_does_no_harm(theatre: Theatre) -> None:
    async def play(stage: Stage) -> None:
        new, channel = await _receiver(stage)
        with open(os.devnull, "rb") as file:
            assert channel.send(MOVE, [file.fileno()])
        await messages(channel)
        answer(channel, "commit", 1)
        client = offer(stage, channel, {**MOVE, "id": 2})
        await messages(channel)
        answer(channel, "commit", 2)
        assert (await client.ask()).side == "new"
        await until(lambda: not any(receiver.coming for receiver in new.receivers))

    theatre(play)


# --------------------------------------------------------------------------------------- running out of descriptors


def test_without_descriptors_connections_stay_where_they_are(theatre: Theatre) -> None:
    """The sender needs none to give one away; at the receiver none arrives, so it refuses, and is asked again."""

    async def play(stage: Stage) -> None:
        old, new = stage.side("old"), stage.side("new")
        client, connection = await stage.client(old)
        ours, theirs = stage.pair()
        new.receive_from(theirs)
        await turns()
        with no_more_descriptors(0):
            old.drain_to(ours)
            await turns(20)
            assert old.connections == [connection]
            assert not moving(connection)
            assert not new.connections
        assert (await client.ask()).side == "old"
        assert old.failed == 0
        assert old.sender is not None
        old.sender.tick(stage.loop.time())
        await until(lambda: new.connections)
        assert (await client.ask()).side == "new"

    theatre(play)


# ------------------------------------------------------------------------------------------------ any schedule


class Wanderings:
    """One client whose requests come in pieces at any moment, while its connection is moved about between sides."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.dice = random.Random(seed)
        self.sides = [stage.side(name) for name in ("a", "b", "c")]
        self.done = False
        self.asked = [
            (f"/{number}", self.dice.randbytes(self.dice.choice((0, 0, 1, 40, 3000)))) for number in range(12)
        ]

    async def run(self) -> None:
        clients = [(await self.stage.client(self.sides[0], kind))[0] for kind in ("tcp", "unix", "tcp")]
        mover = asyncio.ensure_future(self._move_about())
        await asyncio.gather(*(self._talk(client) for client in clients))
        self.done = True
        await mover
        expected = sorted(target for target, _ in self.asked * len(clients))
        assert sorted(self.stage.calls) == expected, "a request was lost or parsed twice"

    async def _talk(self, client: Client) -> None:
        sender = asyncio.ensure_future(self._send(client))
        for target, body in self.asked:
            reply = await client.answer()
            assert reply.fits(target, body), (reply, target)
            assert not reply.closes
        await sender
        assert not client.received
        assert client.sock.fileno() >= 0

    async def _send(self, client: Client) -> None:
        data = b"".join(request(target, body) for target, body in self.asked)
        while data:
            size = self.dice.choice((1, 3, 20, 200, 5000))
            await client.send(data[:size])
            data = data[size:]
            await self._wait()

    async def _move_about(self) -> None:
        """Faults on the way; those that lose a connection (a death after COMMIT) are not among them."""
        source = self.sides[0]
        while not self.done:
            target = self.dice.choice([side for side in self.sides if side is not source])
            fault = self.dice.choice(("", "", "", "no room", "late room", "receiver ends", "two"))
            target.room = fault not in ("no room", "late room")
            receivers = [self.stage.connect(source, target)]
            if fault == "two":
                ours, theirs = self.stage.pair()
                receivers.append(target.receive_from(theirs))
                assert source.sender is not None
                source.sender.add(ours)
            await self._wait()
            if (
                fault in ("receiver ends", "two") and not receivers[0].coming
            ):  # as a worker does at the end of its drain
                receivers[0].close()
                target.receivers.discard(receivers[0])
            target.room = target.room or fault == "late room"
            await self._wait()
            if source.sender is not None:
                source.sender.tick(self.stage.loop.time())
            if not await self._settled(source, target, fault):
                return
            source.serve_on()
            if not source.connections:
                source = target

    async def _settled(self, source: Side, target: Side, fault: str) -> bool:
        """Wait until no connection is on its way; False at the end."""
        source.context.on_idle = None  # else one that has become idle may be on its way when the sender is closed
        await until(
            lambda: not any(map(moving, source.connections)) and not any(each.coming for each in target.receivers),
            f"an end of the moves, {fault}",
        )
        for side in self.sides:
            side.room = True
        return not self.done

    async def _wait(self) -> None:
        for _ in range(self.dice.choice((0, 0, 1, 2, 5))):
            await asyncio.sleep(0)
        if self.dice.random() < 0.3:
            await asyncio.sleep(self.dice.random() * 0.003)


@settings(
    max_examples=int(os.environ.get("HANDOVER_EXAMPLES", "8")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32))
def test_whenever_bytes_come_each_request_has_its_one_answer(theatre: Theatre, seed: int) -> None:
    async def play(stage: Stage) -> None:
        await Wanderings(stage, seed).run()

    theatre(play)
