"""What thousands of slow clients do to the others: latency of ordinary requests with and without them, memory, threads.

    python benchmarks/slow_clients.py --interface asgi --clients 5000 --rounds 5

One worker on one core; on another this program, which sends ordinary requests at a fixed rate over keep-alive
connections and counts latency from the moment at which each was due, so a late answer delays no measurement. The slow
clients dribble a byte of a head or a body every few seconds, and open a new connection when the server has had enough;
some ask for a large response and never read. Rounds without and with them alternate, on the same server. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
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
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
LARGE = 8 * 2**20  # bytes of the response that nobody reads
SETTLE = 3.0  # s between the last slow client and the first measured request, and after the last of them has gone
BURST = 4  # slow clients that get their byte between two looks at the ordinary ones

HEAD = b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: " + b"x" * 4000
POST = b"POST /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n%b\r\n\r\n"
# (sent at once, what is dribbled after it)
KINDS = {
    "head": (b"", HEAD),
    "head, half of it": (HEAD[:2000], HEAD[2000:]),
    "small body": (POST % b"Content-Length: 5000", b"b" * 4999),
    "large body": (POST % b"Content-Length: 10000000", b"b" * 4999),
    "large body, 100 KB of it": (POST % b"Content-Length: 10000000" + bytes(100_000), b"b" * 4999),
    "chunked body": (POST % b"Transfer-Encoding: chunked", b"1\r\nb\r\n" * 1000),
}
UNREAD = b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

APPS = {
    "asgi": f"""
BLOCK = bytes(65536)
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    large = scope["path"] == "/large"
    while (await receive()).get("more_body"):
        pass
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    for _ in range({LARGE} // len(BLOCK) if large else 0):
        await send({{"type": "http.response.body", "body": BLOCK, "more_body": True}})
    await send({{"type": "http.response.body", "body": b"Hello, world!"}})
""",
    "wsgi": f"""
LARGE = bytes({LARGE})
def app(environ, start_response):
    environ["wsgi.input"].read()
    body = LARGE if environ["PATH_INFO"] == "/large" else b"Hello, world!"
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
""",
}


class Slow:
    """A client that dribbles, or that asks for much and reads nothing."""

    def __init__(self, port: int, kind: str) -> None:
        self.port = port
        self.kind = kind
        self.sock: socket.socket | None = None
        self.place = 0

    def step(self) -> str:
        """Send the next byte, on a new connection if there is none; what was noticed."""
        begin, rest = KINDS.get(self.kind, (UNREAD, b""))
        if self.sock is None:
            self.sock = socket.socket()
            if self.kind not in KINDS:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.sock.connect(("127.0.0.1", self.port))
            self.sock.setblocking(False)
            self.place = 0
            with contextlib.suppress(OSError):
                self.sock.send(begin)
            return "opened"
        try:
            if rest:
                self.sock.send(rest[self.place : self.place + 1])
                self.place += 1
                if self.sock.recv(65536, socket.MSG_PEEK) or self.place >= len(rest):
                    raise ConnectionError  # it was answered, 408 or the like
        except BlockingIOError:
            return "slow"
        except OSError:
            self.close()
            return "closed by the server"
        return "slow"

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class Ordinary:
    """Requests at a fixed rate over some keep-alive connections."""

    def __init__(self, port: int, rate: float, connections: int) -> None:
        self.rate = rate
        self.poll = select.epoll()
        self.socks: dict[int, socket.socket] = {}
        self.waiting: dict[int, deque[float]] = {}  # when each request that is not answered was due
        self.latencies: list[float] = []
        self.begun = time.perf_counter()
        self.sent = 0
        for _ in range(connections):
            sock = socket.create_connection(("127.0.0.1", port), 10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socks[sock.fileno()] = sock
            self.waiting[sock.fileno()] = deque()
            self.poll.register(sock, select.EPOLLIN)
        self.ring = deque(self.socks)

    def turn(self, wait: float) -> None:
        now = time.perf_counter()
        while (due := self.begun + self.sent / self.rate) <= now:
            number = self.ring[0]
            self.ring.rotate(-1)
            self.sent += 1
            self.waiting[number].append(due)
            if len(self.waiting[number]) == 1:
                self.socks[number].send(REQUEST)
        for number, _ in self.poll.poll(max(0.0, min(wait, due - now))):
            data = self.socks[number].recv(65536)
            if not data.startswith(b"HTTP/1.1 200 ") or not data.endswith(b"Hello, world!"):
                raise SystemExit(f"an ordinary request was answered {data[:200]!r}")
            self.latencies.append(time.perf_counter() - self.waiting[number].popleft())
            if self.waiting[number]:
                self.socks[number].send(REQUEST)

    def close(self) -> None:
        for sock in self.socks.values():
            sock.close()
        self.poll.close()


@dataclass
class Sample:
    p50: float
    p99: float
    worst: float
    rss: int  # KiB, of the worker
    threads: int
    cpu: float  # share of its core that the worker used
    noticed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        times = "  ".join(f"{each * 1000:7.2f}" for each in (self.p50, self.p99, self.worst))
        worker = f"{self.rss / 1024:6.1f} MiB   {self.threads} threads   {self.cpu:4.0%} CPU"
        return f"{times} ms   {worker}   {dict(self.noticed)}"


class Herd:
    """All slow clients; each has its byte every `every` seconds, spread evenly."""

    def __init__(self, port: int, clients: int, unread: int, every: float) -> None:
        kinds = [*KINDS]
        names = ["unread response"] * unread + [kinds[number % len(kinds)] for number in range(clients)]
        self.every = every
        self.noticed: Counter[str] = Counter()
        begun = time.perf_counter()
        self.due = [(begun + every * n / len(names), n, Slow(port, kind)) for n, kind in enumerate(names)]
        heapq.heapify(self.due)

    def turn(self) -> None:
        now = time.perf_counter()
        for _ in range(BURST):
            if self.due[0][0] > now:
                return
            _, number, client = self.due[0]
            self.noticed[client.step()] += 1
            heapq.heapreplace(self.due, (now + self.every, number, client))

    def close(self) -> None:
        for _, _, client in self.due:
            client.close()


def measure(server: Served, options: argparse.Namespace, herd: Herd | None) -> Sample:
    begun = time.perf_counter()
    while herd is not None and time.perf_counter() < begun + herd.every + SETTLE:
        herd.turn()
        time.sleep(0.0005)
    ordinary = Ordinary(server.port, options.rate, options.connections)
    if herd is not None:
        herd.noticed.clear()
    used = server.cpu()
    while time.perf_counter() < ordinary.begun + options.seconds:
        if herd is not None:
            herd.turn()
        ordinary.turn(0.001)
    rss, threads = server.status()
    share = (server.cpu() - used) / (time.perf_counter() - ordinary.begun)
    ordinary.close()
    found = sorted(ordinary.latencies) or [float("inf")]  # nobody was answered
    times = (found[len(found) // 2], found[len(found) * 99 // 100], found[-1])
    return Sample(*times, rss, threads, share, herd.noticed if herd is not None else Counter())


@dataclass
class Served:
    port: int
    worker: int  # pid

    def cpu(self) -> float:
        """Seconds that it has used."""
        words = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def status(self) -> tuple[int, int]:
        text = Path(f"/proc/{self.worker}/status").read_text()
        found = [re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE) for name in ("VmRSS", "Threads")]
        return tuple(int(match[1]) if match else 0 for match in found)  # type: ignore[return-value]


@contextlib.contextmanager
def serving(options: argparse.Namespace) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "app.py").write_text(APPS[options.interface])
        log = Path(folder, "log")
        command = ["taskset", "-c", str(options.server_core), sys.executable, "-m", "apphost", "app:app"]
        command += ["--bind", "127.0.0.1:0", "--interface", options.interface, *options.server]
        env = {name: value for name, value in os.environ.items() if not name.startswith("APPHOST_")}
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            deadline = time.monotonic() + 30
            while "is serving" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            text = log.read_text()
            port, worker = re.search(r"listening at \S+:(\d+)", text), re.search(r"booting, pid (\d+)", text)
            if port is None or worker is None:
                raise SystemExit(f"the server does not serve:\n{text}")
            yield Served(int(port[1]), int(worker[1]))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        for line in sorted({re.sub(r"^.*?(warning|error)", r"\1", line) for line in log.read_text().splitlines()}):
            if line.startswith(("warning", "error")):
                print("  log:", line)


def main() -> int:
    parser = argparse.ArgumentParser(description="Latency of ordinary requests beside slow clients.")
    parser.add_argument("--interface", choices=tuple(APPS), default="asgi")
    parser.add_argument("--clients", type=int, default=5000, help="that dribble")
    parser.add_argument("--unread", type=int, default=50, help="that ask for a large response and do not read")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two bytes of a client")
    parser.add_argument("--rate", type=float, default=500.0, help="ordinary requests a second")
    parser.add_argument("--connections", type=int, default=32, help="that these come over")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("server", nargs="*", help="options of apphost, behind --")
    options = parser.parse_args()
    wanted = options.clients + options.unread + 1000
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} descriptors are needed, ulimit -Hn says {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    os.sched_setaffinity(0, {options.client_core})
    ratios, extra = [], []
    print(f"{options.interface}: {options.clients} + {options.unread} slow clients")
    print("                   p50      p99      max")
    with serving(options) as server:
        for _ in range(options.rounds):
            without = measure(server, options, None)
            herd = Herd(server.port, options.clients, options.unread, options.every)
            beside = measure(server, options, herd)
            herd.close()
            time.sleep(SETTLE)
            print(f"  without      {without}\n  with         {beside}", flush=True)
            ratios.append(beside.p99 / without.p99)
            extra.append(beside.rss - without.rss)
    range_ = f"{min(ratios):.2f} to {max(ratios):.2f} by round"
    each = max(extra) / (options.clients + options.unread)
    print(f"  p99 with / without: median {statistics.median(ratios):.2f}, {range_}")
    print(f"  memory: {max(extra) / 1024:.1f} MiB more, {each:.1f} KiB a client")
    return 0


if __name__ == "__main__":
    sys.exit(main())
