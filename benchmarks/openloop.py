"""The load of the latency cases: requests at times that were fixed beforehand, whatever the server does.

    python benchmarks/openloop.py PORT SECONDS RATE CONNECTIONS BODY

An open loop: the gaps between requests are exponential (a Poisson process, as of many independent users) with a mean of
1/RATE s, the same for every server. A latency counts from when a request was due, not from when it was sent: when the
server stalls, the requests that could not be sent meanwhile have waited too. So there is no coordinated omission. A
request takes the connection that has been idle for longest, and waits when there is none. Latencies go into bins of
1 us. Prints JSON. Plain sockets and a loop that spins on its core, so that the client adds as little as Python allows.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import socket
import sys
import time
from array import array
from collections import deque

SEED = 7
BINS = 1_000_000  # of 1 us; what took longer is in the last
GRACE = 5.0  # s that the answers may take after the last request was due
REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class Wrong(Exception):
    """An answer that is not what was expected, or none."""


def connect(port: int, body: bytes) -> tuple[socket.socket, bytes]:
    """A connection that has had one answer, and that answer."""
    sock = socket.create_connection(("127.0.0.1", port), 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(REQUEST)
    answer = b""
    while not answer.endswith(body):
        data = sock.recv(65536)
        if not data:
            raise Wrong(f"the connection was closed after {answer[:80]!r}")
        answer += data
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise Wrong(f"answered {answer[:80]!r}")
    return sock, answer


def percentile(bins: array[int], share: float) -> int:
    """The lowest bin below or in which that share of all is."""
    wanted, seen = share * sum(bins), 0
    for number, count in enumerate(bins):
        seen += count
        if seen >= wanted and seen:
            return number
    return len(bins) - 1


def run(port: int, seconds: float, rate: float, connections: int, body: bytes) -> dict[str, float]:
    """ms, except ``answers`` and ``unanswered`` (requests). Wrong when an answer is not the expected one.

    ``lag`` is the p99 of what the client itself was late with a request for which it had a connection.
    """
    pairs = [connect(port, body) for _ in range(connections)]
    size = len(pairs[0][1])
    sockets = {sock.fileno(): sock for sock, _ in pairs}
    poll = select.epoll()
    for number in sockets:
        poll.register(number, select.EPOLLIN)
    idle = deque(sockets)
    due_of = dict.fromkeys(sockets, 0.0)
    partly: dict[int, bytes] = {}
    latencies, lags = array("I", bytes(4 * BINS)), array("I", bytes(4 * BINS))
    gaps, clock, worst, answers, sent = random.Random(SEED), time.perf_counter, 0.0, 0, 0
    free_since = 0.0  # since then a connection has been idle
    gc.disable()
    start = now = clock()
    end, due = start + seconds, start
    while True:
        while due <= now and idle and due < end:
            number = idle.popleft()
            due_of[number] = due
            os.write(number, REQUEST)
            sent += 1
            now = clock()
            lags[min(int((now - max(due, free_since)) * 1e6), BINS - 1)] += 1
            due += gaps.expovariate(rate)
        ready = poll.poll(0)
        now = clock()
        for number, _ in ready:
            data = os.read(number, 65536)
            if len(data) != size:
                data = partly.pop(number, b"") + data
                if len(data) < size and data:
                    partly[number] = data
                    continue
            if len(data) != size or not data.startswith(b"HTTP/1.1 200 ") or not data.endswith(body):
                raise Wrong(f"answered {data[:80]!r}")
            took = now - due_of[number]
            worst = max(worst, took)
            latencies[min(int(took * 1e6), BINS - 1)] += 1
            answers += 1
            if not idle:
                free_since = now
            idle.append(number)
        if due >= end and (answers == sent or now > end + GRACE):
            break
    return {
        "p50": percentile(latencies, 0.5) / 1e3,
        "p99": percentile(latencies, 0.99) / 1e3,
        "worst": worst * 1e3,
        "lag": percentile(lags, 0.99) / 1e3,
        "answers": answers,
        "unanswered": sent - answers,
    }


def main() -> None:
    port, seconds, rate, connections, body = sys.argv[1:]
    try:
        print(json.dumps(run(int(port), float(seconds), float(rate), int(connections), body.encode())))
    except (Wrong, OSError) as error:
        raise SystemExit(str(error) or repr(error)) from error


if __name__ == "__main__":
    main()
