"""Who takes over the connections of a worker that drains: each pair of the two has a channel, made by the arbiter.

A worker that drains knows `SUCCESSORS_MAX` that serve, not all: of 64 workers whose connections have much to finish,
each would have a channel to each of the 64 new ones else, 4096 of them, when one successor would do.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from apphost.arbiter.processes import WorkerProcess
from apphost.arbiter.reports import who
from apphost.lifecycle import State
from apphost.messages import MAX_FDS, Message

if TYPE_CHECKING:
    from apphost.arbiter.arbiter import Arbiter

# The channels to the first ones travel in one message. The connections are spread over so many at a time; which these
# are, the emptiest, changes from one worker that drains to the next.
SUCCESSORS_MAX = MAX_FDS


def order_drain(arbiter: Arbiter, worker: WorkerProcess, order: Message, successors: tuple[int, ...]) -> None:
    """Send `order`, with a channel to each of the first `successors`."""
    channels: list[socket.socket] = []
    chosen = [arbiter.workers[wid] for wid in successors if wid in arbiter.workers][:SUCCESSORS_MAX]
    try:
        channels.extend(_channel(arbiter, successor, worker) for successor in chosen)
        arbiter.hub.send(worker.channel, order, [sock.fileno() for sock in channels])
        worker.successors = [successor.wid for successor in chosen]
    except OSError as exc:
        arbiter.log.warning(f"connections of {worker.name} cannot move: {exc.strerror}", **who(worker))
        arbiter.hub.send(worker.channel, order)
    finally:
        for sock in channels:
            sock.close()


def introduce(arbiter: Arbiter, successor: WorkerProcess) -> None:
    """Tell the workers that drain of one more: those that they know may drain before they are done."""
    if arbiter.fleet.stopping or successor.generation > arbiter.fleet.good:
        return
    for worker in _in_need(arbiter):
        try:
            with _channel(arbiter, successor, worker) as sock:
                arbiter.hub.send(worker.channel, {"t": "successor"}, [sock.fileno()])
            worker.successors.append(successor.wid)
        except OSError as exc:
            arbiter.log.warning(f"{worker.name} has one successor less: {exc.strerror}", **who(worker))


def _in_need(arbiter: Arbiter) -> Iterator[WorkerProcess]:
    """The workers that drain and know fewer than they may; what has become of those that they knew is noted."""
    members = arbiter.fleet.workers
    serving = {wid for wid, member in members.items() if member.state is State.READY}
    for wid, member in members.items():
        worker = arbiter.workers.get(wid)
        if worker is None or member.state is not State.DRAINING or member.killed or worker.failure is not None:
            continue
        worker.successors = [known for known in worker.successors if known in serving]
        if len(worker.successors) < SUCCESSORS_MAX:
            yield worker


def _channel(arbiter: Arbiter, successor: WorkerProcess, worker: WorkerProcess) -> socket.socket:
    """One end of a channel on which `worker` can hand connections to `successor`, which gets the other. `OSError`."""
    ours, theirs = socket.socketpair()
    with theirs:
        arbiter.hub.send(successor.channel, {"t": "adopt", "from": worker.wid}, [theirs.fileno()])
    return ours
