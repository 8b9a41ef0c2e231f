"""What apphost costs as connections and workers grow in number. Linux only; docs/performance.md tells what to expect.

    python benchmarks/scale.py                        # all parts, Markdown on stdout: about 2 minutes
    python benchmarks/scale.py requests --rounds 15   # CPU time of a worker per request, at 10 to 10,000 connections
    python benchmarks/scale.py fleet --workers 64     # boot, reload and stop, and what the arbiter takes meanwhile
    python benchmarks/scale.py handover               # a reload, and a stop, with 10,000 idle connections

CPU times are those of the kernel's clock of each process, so they do not contain what the clients take. The machine's
own speed varies; so the servers with few and with many connections run beside each other and are measured in turns.
More than some 10,000 connections need a limit of descriptors (`ulimit -n`) of twice as many.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

APPS = Path(__file__).resolve().parent / "apps"
APP = "plain_asgi:app"
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
WITHIN = 120.0  # s for whatever is waited for
WINDOW = 64  # requests that are on their way at a time

Batches = Iterator[Sequence[socket.socket]]


def cpu(pid: int) -> float:
    """CPU seconds of a process with all of its threads (see clock_getcpuclockid(3) for the number)."""
    return time.clock_gettime((~pid << 3) | 2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Server:
    """apphost with a hello world, followed through its log."""

    def __init__(self, *options: str, core: int | None = None) -> None:
        self.port = free_port()
        self._log = tempfile.NamedTemporaryFile("w+", prefix="apphost-scale-")  # noqa: SIM115
        pinned = ["taskset", "-c", str(core)] if core is not None else []
        command = [*pinned, sys.executable, "-m", "apphost", APP, "--bind", f"127.0.0.1:{self.port}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("APPHOST_")}
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            [*command, *options], cwd=APPS, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self.boot_seconds = self.wait(r"generation 1 is serving")

    def log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    def wait(self, pattern: str, count: int = 1, since: float | None = None) -> float:
        """Wait until the log has `pattern` so often; the seconds since the start, or `since`."""
        deadline = time.monotonic() + WITHIN
        while len(re.findall(pattern, self.log())) < count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                sys.exit(f"never came: {pattern}\n{self.log()[-2000:]}")
            time.sleep(0.01)
        return time.monotonic() - (self._started if since is None else since)

    def workers(self) -> list[int]:
        """Their pids, the oldest first, with those that are gone."""
        return [int(pid) for pid in re.findall(r"booting, pid (\d+)", self.log())]

    def reload(self, generation: int) -> float:
        began = time.monotonic()
        self.process.send_signal(signal.SIGHUP)
        return self.wait(f"generation {generation} is serving", since=began)

    def stop(self) -> float:
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(WITHIN)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._log.close()
        return time.monotonic() - began


class Clients:
    """Keep-alive connections to one server."""

    def __init__(self, port: int, count: int) -> None:
        self.sockets: list[socket.socket] = []
        self._epoll = select.epoll()
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            self.sockets.append(sock)
            self._epoll.register(sock, select.EPOLLIN)
        self._by_fd = {sock.fileno(): sock for sock in self.sockets}

    def ask(self, batch: Sequence[socket.socket]) -> None:
        """A request on each of them; returns when all have their answer."""
        for sock in batch:
            sock.send(REQUEST)
        left = len(batch)
        while left:
            events = self._epoll.poll(WITHIN)
            for fd, _ in events:
                answer = self._by_fd[fd].recv(65536)
                if not answer.startswith(b"HTTP/1.1 200 ") or not answer.endswith(b"Hello, world!"):
                    sys.exit(f"a wrong answer: {answer!r}")
            left -= len(events)
            if not events:
                sys.exit(f"{left} requests have no answer")

    def few(self) -> Batches:
        """The same ones again and again, while all others are idle."""
        while True:
            yield self.sockets[:WINDOW]

    def in_turn(self) -> Batches:
        while True:
            for begin in range(0, len(self.sockets), WINDOW):
                yield self.sockets[begin : begin + WINDOW]

    def ask_all(self) -> None:
        for begin in range(0, len(self.sockets), WINDOW):
            self.ask(self.sockets[begin : begin + WINDOW])

    def clean_ends(self) -> int:
        """How many have been closed without a reset."""
        count = 0
        for sock in self.sockets:
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                count += sock.recv(1) == b""
        return count

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self._epoll.close()


def run_for(clients: Clients, batches: Batches, seconds: float, pid: int) -> float:
    """CPU microseconds of `pid` for each request."""
    count, before, end = 0, cpu(pid), time.monotonic() + seconds
    while time.monotonic() < end:
        batch = next(batches)
        clients.ask(batch)
        count += len(batch)
    return (cpu(pid) - before) / count * 1e6


# ------------------------------------------------------------------------------------------------------------ parts


def requests(arguments: argparse.Namespace) -> None:
    """One server for each number of connections, all on one core, measured in turns."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[0]
    os.sched_setaffinity(0, {cores[-1]})
    counts: list[int] = arguments.connections
    servers = [Server("--keep-alive", "3600", "--limit-connections", "20000", core=core) for _ in counts]
    everyone = [Clients(server.port, count) for server, count in zip(servers, counts, strict=True)]
    kinds: dict[str, Callable[[Clients], Batches]] = {"few": Clients.few, "in turn": Clients.in_turn}
    found: dict[tuple[str, int], list[float]] = {(kind, count): [] for kind in kinds for count in counts}
    plays = [
        (kind, count, clients, make(clients), server.workers()[0])
        for kind, make in kinds.items()
        for count, clients, server in zip(counts, everyone, servers, strict=True)
    ]
    for clients in everyone:
        clients.ask_all()
    for _ in range(arguments.rounds):
        for kind, count, clients, batches, pid in plays:
            run_for(clients, batches, 0.05, pid)
            found[kind, count].append(run_for(clients, batches, arguments.seconds, pid))
    idle = []
    for server in servers:
        before = cpu(server.workers()[0])
        time.sleep(4)
        idle.append((cpu(server.workers()[0]) - before) / 4)
    print(f"| connections | {WINDOW} of them ask | ratio | all ask in turn | ratio | idle: of a core |")
    print("|--:|--:|--:|--:|--:|--:|")
    for number, count in enumerate(counts):
        row = [f"{count:,}"]
        for kind in kinds:
            ratios = [mine / first for mine, first in zip(found[kind, count], found[kind, counts[0]], strict=True)]
            row += [f"{statistics.median(found[kind, count]):.1f} us", f"{statistics.median(ratios):.2f}"]
        print("|", " | ".join([*row, f"{idle[number]:.2%}"]), "|")
    for clients, server in zip(everyone, servers, strict=True):
        clients.close()
        server.stop()


def fleet(arguments: argparse.Namespace) -> None:
    for options in ([], ["--admin", f"127.0.0.1:{free_port()}"]):
        server = Server("--workers", str(arguments.workers), *options)
        arbiter = server.process.pid
        booted = cpu(arbiter)
        rolls = []
        for generation in (2, 3):
            before = cpu(arbiter)
            seconds = server.reload(generation)
            rolls.append((seconds, cpu(arbiter) - before))
        time.sleep(1)
        shares = []
        for _ in range(3):
            before = cpu(arbiter)
            time.sleep(4)
            shares.append((cpu(arbiter) - before) / 4)
        clients = Clients(server.port, WINDOW)
        batches, before, began = clients.few(), cpu(arbiter), time.monotonic()
        while time.monotonic() < began + 4:
            clients.ask(next(batches))
        loaded = (cpu(arbiter) - before) / (time.monotonic() - began)
        clients.close()
        with_admin = " and --admin" if options else ""
        print(
            f"- {arguments.workers} workers{with_admin}: boot {server.boot_seconds:.1f} s (arbiter {booted:.2f} s of "
            f"CPU), reloads {', '.join(f'{wall:.1f} s (arbiter {own:.2f} s)' for wall, own in rolls)}; arbiter idle "
            f"{statistics.median(shares):.2%} of a core, under load {loaded:.2%}; stop {server.stop():.2f} s."
        )


def handover(arguments: argparse.Namespace) -> None:
    count = max(arguments.connections)
    server = Server("--keep-alive", "3600", "--limit-connections", "20000")
    clients = Clients(server.port, count)
    clients.ask_all()
    waits: list[tuple[float, float]] = []  # of a client that asks all the time: when, and s until the answer
    ended = threading.Event()

    def probe() -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not ended.is_set():
                began = time.monotonic()
                sock.send(REQUEST)
                if not sock.recv(65536):
                    sys.exit("the connection that asks all the time was closed")
                waits.append((began, time.monotonic() - began))
                time.sleep(0.001)

    thread = threading.Thread(target=probe)
    thread.start()
    for generation in (2, 3):
        before = [wait for _, wait in waits]
        server.reload(generation)
        drained = time.monotonic()
        server.wait(r"gone: exit 0", generation - 1)
        seconds = time.monotonic() - drained
        worst = sorted(wait for when, wait in waits if when > drained - 0.05)[-3:]
        usual = statistics.median(before or [0.0])
        clients.ask_all()
        print(
            f"- Reload with {count:,} idle connections: moved in {seconds:.2f} s, all answered afterwards; a client "
            f"that asked meanwhile waited {usual * 1000:.1f} ms usually, {worst[-1] * 1000:.0f} ms at worst."
        )
    ended.set()
    thread.join()
    seconds = server.stop()
    print(f"- Stop with {count:,} idle connections: {seconds:.2f} s, {clients.clean_ends():,} clean ends.")
    clients.close()


PARTS = {"requests": requests, "fleet": fleet, "handover": handover}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="all when none is named")
    parser.add_argument("--connections", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--workers", type=int, default=64)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in arguments.part or PARTS:
        PARTS[name](arguments)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
