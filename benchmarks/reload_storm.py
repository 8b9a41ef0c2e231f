"""Reload a server again and again under every kind of client, and count what the clients noticed.

    python benchmarks/reload_storm.py --server apphost                          # 100 reloads, 1,000,000 requests
    python benchmarks/reload_storm.py --server uvicorn --reloads 10 --requests 20000
    python benchmarks/reload_storm.py --server apphost --server gunicorn --write

Clients never try twice: what is lost stays lost and is counted. The server runs in its own process group with two
workers, the clients in this process. What is measured, and how, is in ``benchmarks/RELOADS.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from environment import peers_python
from results import BEGIN, END, put_between_markers
from servers import FOREIGN_VARIABLES, stop_group

HERE = Path(__file__).resolve().parent
REPORT = HERE / "RELOADS.md"

ANSWER_SECONDS = 30.0  # a request without an answer by then is lost
BOOT_SECONDS = 30.0
RELOAD_SECONDS = 45.0  # a reload after which old code still answers by then is counted as never done
SETTLED = 40  # answers in a row, from new connections and old ones, that must come from new code
IMPORT_SECONDS = 10.0  # what the slow import takes
STEADY_SECONDS = 4.0  # of measurement before a reload that is compared with it

# The token is read when the code is imported, so it tells which deploy answers.
APP = """
import asyncio, os, time

with open("token") as file:
    TOKEN = int(file.read())
with open("import_seconds") as file:
    time.sleep(float(file.read()))

def text(size):
    return b"%08d %08d" % (TOKEN, size)

def head(body):
    return [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]

async def asgi(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    size, more = 0, scope["method"] == "POST"
    while more:
        event = await receive()
        size += len(event.get("body", b""))
        more = event.get("more_body", False)
    path = scope["path"]
    if path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"17")]})
        for byte in text(0):
            await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
            await asyncio.sleep(4 / 17)
        await send({"type": "http.response.body", "body": b""})
        return
    if path == "/slow":
        await asyncio.sleep(1)
    body = text(size)
    await send({"type": "http.response.start", "status": 200, "headers": head(body)})
    await send({"type": "http.response.body", "body": body})

def trickle(body):
    for byte in body:
        yield bytes([byte])
        time.sleep(4 / 17)

def wsgi(environ, start_response):
    size = 0
    if environ["REQUEST_METHOD"] == "POST":
        size = len(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    path = environ["PATH_INFO"]
    body = text(0 if path == "/stream" else size)
    start_response("200 OK", [(name.decode(), value.decode()) for name, value in head(body)])
    if path == "/stream":
        return trickle(body)
    if path == "/slow":
        time.sleep(1)
    return [body]
"""


# ---------------------------------------------------------------------------------------------------- the servers


@dataclass(frozen=True)
class Contestant:
    """``arguments`` follow ``python -m``; ``reload`` is the signal with which its documentation deploys new code."""

    name: str
    arguments: str
    reload: signal.Signals


_UVICORN = "uvicorn storm:asgi --host 127.0.0.1 --port {port} --workers 2 --no-access-log --log-level warning"
_GUNICORN = "gunicorn storm:wsgi --bind 127.0.0.1:{port} --workers 2 --worker-class gthread --threads 32"
_HYPERCORN = "hypercorn storm:asgi --bind 127.0.0.1:{port} --workers 2 --worker-class uvloop"
_GRANIAN = "granian storm:asgi --interface asgi --host 127.0.0.1 --port {port} --workers 2 --http 1 --no-ws"

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("apphost", "apphost storm:asgi --bind 127.0.0.1:{port} --workers 2", signal.SIGUSR1),
        Contestant(
            "apphost-wsgi", "apphost storm:wsgi --bind 127.0.0.1:{port} --workers 2 --threads 32", signal.SIGUSR1
        ),
        Contestant("uvicorn", _UVICORN, signal.SIGHUP),
        Contestant("gunicorn", _GUNICORN, signal.SIGHUP),
        Contestant("hypercorn", _HYPERCORN, signal.SIGHUP),
        Contestant("granian", _GRANIAN + " --loop uvloop --no-access-log", signal.SIGHUP),
    )
}


class Site:
    """A running server, and deploys to it."""

    def __init__(self, contestant: Contestant, python: str, folder: Path) -> None:
        self.contestant = contestant
        self.python = python
        self.folder = folder
        self.token = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        (self.folder / "storm.py").write_text(APP)
        self._put("import_seconds", "0")
        self._put("token", "0")
        env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_VARIABLES)}
        if self.contestant.name.startswith("apphost"):
            env["PYTHONPATH"] = str(HERE.parent)
        command = [self.python, "-m", *self.contestant.arguments.replace("{port}", str(self.port)).split()]
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                yield
            finally:
                stop_group(self.process)

    def _put(self, name: str, value: str) -> None:
        (self.folder / "new").write_text(value)
        os.replace(self.folder / "new", self.folder / name)

    def deploy(self, import_seconds: float = 0.0) -> float:
        """New code, and the signal; when that was."""
        self.token += 1
        self._put("import_seconds", str(import_seconds))
        self._put("token", str(self.token))
        os.kill(self.process.pid, self.contestant.reload)
        return time.perf_counter()


# ---------------------------------------------------------------------------------------------------- one connection

_HEAD = re.compile(rb"HTTP/1\.1 (\d\d\d)[^\r]*\r\n(?:[^\r]*\r\n)*?\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked\r\n", re.IGNORECASE)


class Lost(Exception):
    """No answer, or not a whole one."""


class Answer:
    __slots__ = ("body", "closes", "status")

    def __init__(self, status: int, body: bytes, closes: bool) -> None:
        self.status = status
        self.body = body
        self.closes = closes


class Link(asyncio.Protocol):
    """A keep-alive connection: `ask` sends and waits for that many answers, in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.buffer = b""
        self.answers: list[Answer] = []
        self.wanted = 0
        self.waiter: asyncio.Future[list[Answer]] | None = None
        self.since = 0.0
        self.ended = False  # by the server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def ask(self, data: bytes, wanted: int = 1) -> asyncio.Future[list[Answer]]:
        """Raises `Lost` through the future."""
        self.answers = []
        self.wanted = wanted
        self.since = time.perf_counter()
        waiter = self.waiter = self.loop.create_future()
        if self.ended:
            self._fail("the connection had ended")
        else:
            self.transport.write(data)
        return waiter

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while self.buffer and (answer := self._take()) is not None:
            self.answers.append(answer)
        waiter = self.waiter
        if waiter is not None and len(self.answers) >= self.wanted:
            self.waiter = None
            if not waiter.done():  # its client may be gone
                waiter.set_result(self.answers)

    def _take(self) -> Answer | None:
        buffer = self.buffer
        head = _HEAD.match(buffer)
        if head is None:
            return None
        closes = _CLOSE.search(buffer, 0, head.end()) is not None
        length = _LENGTH.search(buffer, 0, head.end())
        if length is not None:
            end = head.end() + int(length[1])
            body = buffer[head.end() : end]
            if len(buffer) < end:
                return None
        elif _CHUNKED.search(buffer, 0, head.end()) and (end := buffer.find(b"0\r\n\r\n", head.end()) + 5) >= 5:
            body = b"".join(re.findall(rb"[0-9a-f]+\r\n([^\r]*)\r\n", buffer[head.end() : end]))
        else:
            return None
        self.buffer = buffer[end:]
        return Answer(int(head[1]), body, closes)

    def eof_received(self) -> None:
        self.ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._fail(f"the connection ended ({exc or 'end of file'})")

    def _fail(self, why: str) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(Lost(why))


# ------------------------------------------------------------------------------------------------------- the clients


@dataclass
class Tally:
    """What one kind of client has seen."""

    answered: int = 0
    lost: int = 0
    refused: int = 0
    bad: int = 0  # no 2xx
    wrong: int = 0  # another body than expected
    closed: int = 0  # connections that the server ended, announced or not
    why: Counter[str] = field(default_factory=Counter)

    @property
    def flawless(self) -> bool:
        return not (self.lost or self.refused or self.bad or self.wrong or self.closed)

    def add(self, other: Tally) -> None:
        for name in ("answered", "lost", "refused", "bad", "wrong", "closed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.why.update(other.why)


GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
BODY = b"x" * 500
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n" + BODY
UPLOAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 40000\r\n\r\n" + b"u" * 40000
SLOW = GET.replace(b" / ", b" /slow ")
STREAM = GET.replace(b" / ", b" /stream ")


class Clients:
    """All clients of one storm."""

    def __init__(self, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self.loop = loop
        self.port = port
        self.tallies: dict[str, Tally] = {}
        self.links: set[Link] = set()
        self.stopping = False
        self.oldest_ok = 0  # tokens below this are old
        self.last_old = 0.0  # when an answer of old code to a short request came last
        self.fresh_answers = 0  # of new code, in a row
        self.latencies: deque[tuple[float, float]] = deque(maxlen=2_000_000)  # when, how long
        self.times: deque[float] = deque(maxlen=4_000_000)  # of answers to short requests
        self.dice = random.Random(1)
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def answered(self) -> int:
        return sum(tally.answered for tally in self.tallies.values())

    def start(self, kind: str, count: int, act: Callable[[Link, Tally], Awaitable[None]], keep: bool = True) -> None:
        tally = self.tallies.setdefault(kind, Tally())
        for _ in range(count):
            self.tasks.append(self.loop.create_task(self._live(tally, act, keep)))

    async def stop(self) -> None:
        self.stopping = True
        await asyncio.gather(*self.tasks)

    async def watch(self) -> None:
        """End what has waited for too long."""
        while True:
            await asyncio.sleep(1)
            now = time.perf_counter()
            for link in list(self.links):
                if link.waiter is not None and now - link.since > ANSWER_SECONDS:
                    link._fail(f"no answer within {ANSWER_SECONDS:.0f} s")
                    link.transport.abort()

    async def _live(self, tally: Tally, act: Callable[[Link, Tally], Awaitable[None]], keep: bool) -> None:
        link: Link | None = None
        while not self.stopping:
            if link is None:
                link = await self._connect(tally)
                if link is None:
                    await asyncio.sleep(0.01)
                    continue
            try:
                await act(link, tally)
                over = link.ended
            except Lost as exc:
                tally.lost += 1
                tally.why[str(exc)] += 1
                over = True
            if over:
                tally.closed += keep
            if over or not keep:
                self._drop(link)
                link = None
        if link is not None:
            self._drop(link)

    async def _connect(self, tally: Tally) -> Link | None:
        try:
            _, link = await self.loop.create_connection(lambda: Link(self.loop), "127.0.0.1", self.port)
        except OSError as exc:
            tally.refused += 1
            tally.why[f"connect: {exc.strerror or exc}"] += 1
            return None
        self.links.add(link)
        return link

    def _drop(self, link: Link) -> None:
        self.links.discard(link)
        link.transport.abort()

    def note(self, tally: Tally, link: Link, answers: Sequence[Answer], size: int = 0, short: bool = True) -> None:
        now = time.perf_counter()
        for answer in answers:
            if not 200 <= answer.status <= 299:
                tally.bad += 1
                tally.why[f"status {answer.status}"] += 1
            elif len(answer.body) != 17 or int(answer.body[9:]) != size:
                tally.wrong += 1
            else:
                tally.answered += 1
                if short:
                    self.times.append(now)
                    self._age(int(answer.body[:8]), now)
            link.ended = link.ended or answer.closes

    def _age(self, token: int, now: float) -> None:
        if token < self.oldest_ok:
            self.last_old = now
            self.fresh_answers = 0
        else:
            self.fresh_answers += 1

    # -- what they do

    def steady(self, request: bytes, size: int) -> Callable[[Link, Tally], Awaitable[None]]:
        async def act(link: Link, tally: Tally) -> None:
            self.note(tally, link, await link.ask(request), size)

        return act

    async def paused(self, link: Link, tally: Tally) -> None:
        started = time.perf_counter()
        self.note(tally, link, await link.ask(POST), 500)
        self.latencies.append((started, time.perf_counter() - started))
        await asyncio.sleep(self.dice.random() * 0.5)

    async def fresh(self, link: Link, tally: Tally) -> None:
        self.note(tally, link, await link.ask(GET))
        link.ended = False  # whether it ends this connection is the server's business
        await asyncio.sleep(0.01)

    async def slow(self, link: Link, tally: Tally) -> None:
        self.note(tally, link, await link.ask(SLOW), short=False)

    async def burst(self, link: Link, tally: Tally) -> None:
        answers = await link.ask((GET + POST) * 10, 20)
        for index, answer in enumerate(answers):
            self.note(tally, link, [answer], 500 if index % 2 else 0)
        await asyncio.sleep(self.dice.random() * 0.05)

    async def upload(self, link: Link, tally: Tally) -> None:
        waiter = link.ask(UPLOAD[:1000])
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, should nobody ask
        for start in range(1000, len(UPLOAD), 2000):
            await asyncio.sleep(0.05)
            if waiter.done() or link.ended:
                break
            link.since = time.perf_counter()
            link.transport.write(UPLOAD[start : start + 2000])
        self.note(tally, link, await waiter, 40000, short=False)

    async def stream(self, link: Link, tally: Tally) -> None:
        self.note(tally, link, await link.ask(STREAM), short=False)

    def start_all(self) -> None:
        self.start("keep-alive GET", 8, self.steady(GET, 0))
        self.start("keep-alive POST", 8, self.steady(POST, 500))
        self.start("pausing keep-alive", 20, self.paused)
        self.start("fresh connections", 4, self.fresh, keep=False)
        self.start("1 s requests", 8, self.slow)
        self.start("pipelined bursts of 20", 4, self.burst)
        self.start("slow uploads", 4, self.upload)
        self.start("4 s streams", 4, self.stream)


# ---------------------------------------------------------------------------------------------------- what is measured


@dataclass
class Outcome:
    server: str
    reloads: int = 0
    never_done: int = 0  # reloads after which old code answered on and on
    seconds: float = 0.0
    new_after: list[float] = field(default_factory=list)  # s from the signal to the last answer of old code
    tallies: dict[str, Tally] = field(default_factory=dict)
    rate: float = 0.0  # answers a second of the saturated server
    dip: float = 0.0  # the slowest half second during a reload, as a share of that
    p99: float = 0.0  # s, steady
    p99_import: float = 0.0  # s, while the new code takes its time to be imported
    failure: str = ""

    @property
    def total(self) -> Tally:
        total = Tally()
        for tally in self.tallies.values():
            total.add(tally)
        return total


async def reload(site: Site, clients: Clients, import_seconds: float = 0.0) -> float | None:
    """Deploy and wait until only new code answers; how long that took, None when it never did."""
    clients.oldest_ok = site.token + 1
    clients.fresh_answers = 0
    started = site.deploy(import_seconds)
    clients.last_old = started
    limit = started + RELOAD_SECONDS + import_seconds
    while time.perf_counter() < limit:
        await asyncio.sleep(0.02)
        # The pausing clients ask every half second at the latest, so nobody's old worker stays unnoticed.
        if clients.fresh_answers >= SETTLED and time.perf_counter() - clients.last_old > 0.6:
            return clients.last_old - started
    return None


async def storm(site: Site, outcome: Outcome, options: argparse.Namespace) -> None:
    clients = await _ready(site)
    clients.start_all()
    started = time.perf_counter()
    await asyncio.sleep(1)
    while time.perf_counter() - started < options.limit and (
        outcome.reloads < options.reloads or clients.answered < options.requests
    ):
        if outcome.reloads < options.reloads:
            took = await reload(site, clients)
            outcome.reloads += 1
            outcome.never_done += took is None
            outcome.new_after += [took] if took is not None else []
            if outcome.reloads % 10 == 0:
                print(f"{outcome.server}: {outcome.reloads} reloads, {clients.answered:,} answers", file=sys.stderr)
        else:
            await asyncio.sleep(0.2)
    await clients.stop()
    outcome.seconds = time.perf_counter() - started
    outcome.tallies = clients.tallies


async def dip(site: Site, outcome: Outcome) -> None:
    """How much slower a saturated server is at its slowest during a reload."""
    clients = await _ready(site)
    clients.start("saturating", 32, clients.steady(GET, 0))
    await asyncio.sleep(1)
    start = time.perf_counter()
    await asyncio.sleep(STEADY_SECONDS)
    signalled = time.perf_counter()
    took = await reload(site, clients)
    await clients.stop()
    times = list(clients.times)
    outcome.rate = sum(start <= when < signalled for when in times) / (signalled - start)
    end = signalled + max(took or RELOAD_SECONDS, 0.5)
    bins = Counter(int((when - signalled) / 0.1) for when in times if signalled <= when < end)
    count = max(5, int((end - signalled) / 0.1))
    windows = [sum(bins[first + index] for index in range(5)) / 0.5 for first in range(count - 4)]
    outcome.dip = min(windows) / outcome.rate if outcome.rate else 0.0


async def slow_import(site: Site, outcome: Outcome) -> None:
    """Whether clients wait while new code is imported for seconds."""
    clients = await _ready(site)
    clients.start("pausing keep-alive", 60, clients.paused)
    await asyncio.sleep(STEADY_SECONDS)
    steady = [took for _, took in clients.latencies]
    signalled = time.perf_counter()
    await reload(site, clients, IMPORT_SECONDS)
    await clients.stop()
    outcome.p99 = percentile(steady)
    outcome.p99_import = percentile([took for when, took in clients.latencies if when >= signalled])


def percentile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


async def _ready(site: Site) -> Clients:
    loop = asyncio.get_running_loop()
    clients = Clients(loop, site.port)
    deadline = time.perf_counter() + BOOT_SECONDS
    while time.perf_counter() < deadline:
        try:
            _, link = await loop.create_connection(lambda: Link(loop), "127.0.0.1", site.port)
            (answer,) = await asyncio.wait_for(link.ask(GET), 5)
            link.transport.abort()
            assert answer.status == 200, answer.body
            watcher = loop.create_task(clients.watch())
            loop.call_later(3600, watcher.cancel)
            return clients
        except (OSError, Lost, TimeoutError, asyncio.TimeoutError):
            await asyncio.sleep(0.1)
    raise Lost(f"no answer within {BOOT_SECONDS:.0f} s: {(site.folder / 'log').read_text()[-500:]}")


def measure(contestant: Contestant, python: str, options: argparse.Namespace) -> Outcome:
    outcome = Outcome(contestant.name)
    parts: list[Callable[[Site], Awaitable[None]]] = [lambda site: storm(site, outcome, options)]
    if not options.storm_only:
        parts += [lambda site: dip(site, outcome), lambda site: slow_import(site, outcome)]
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="storm-") as folder:
            site = Site(contestant, python, Path(folder))
            try:
                with site.running():
                    run(part(site))
            except Lost as exc:
                outcome.failure = str(exc)
    return outcome


def run(play: Awaitable[None]) -> None:
    try:
        import uvloop

        loop = uvloop.new_event_loop()
    except ImportError:
        loop = asyncio.new_event_loop()

    async def guarded() -> None:
        try:
            await play
        finally:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0.05)

    try:
        loop.run_until_complete(guarded())
    finally:
        loop.close()


# ------------------------------------------------------------------------------------------------------------ report


def render(outcomes: Sequence[Outcome]) -> str:
    lines = [
        (
            "| server | reloads | answers | lost | refused | no 2xx | wrong | closed by the server "
            "| only new code after (median, slowest) | slowest half second | p99 steady | p99, 10 s import |"
        ),
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for outcome in outcomes:
        total = outcome.total
        figures = (total.answered, total.lost, total.refused, total.bad, total.wrong, total.closed)
        new = outcome.new_after
        after = f"{statistics.median(new):.2f} s, {max(new):.2f} s" if new else "never"
        after += f"; {outcome.never_done} never" if outcome.never_done and new else ""
        speed = (
            (f"{outcome.dip:.0%} of {outcome.rate:,.0f}/s", *(f"{1000 * p:.0f} ms" for p in _p99s(outcome)))
            if outcome.rate
            else ("-", "-", "-")
        )
        cells = (outcome.server, str(outcome.reloads), *(f"{figure:,}" for figure in figures), after, *speed)
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for outcome in outcomes:
        lines += _details(outcome)
    return "\n".join(lines)


def _p99s(outcome: Outcome) -> tuple[float, float]:
    return outcome.p99, outcome.p99_import


def _details(outcome: Outcome) -> Iterator[str]:
    if outcome.failure:
        yield f"- {outcome.server}: FAILED, {outcome.failure}"
    for kind, tally in outcome.tallies.items():
        if not tally.flawless:
            figures = {k: v for k, v in dataclasses.asdict(tally).items() if v and k not in ("why", "answered")}
            noticed = ", ".join(f"{name} {count:,}" for name, count in figures.items())
            why = "; ".join(f"{count} x {text}" for text, count in tally.why.most_common(3))
            yield f"- {outcome.server}, {kind} ({tally.answered:,} answered): {noticed}{f' ({why})' if why else ''}"


def merge(text: str, report: str, measured: Sequence[str]) -> str:
    """`text` with `report` between the markers; lines of servers that were not `measured` this time stay."""
    old = text.partition(BEGIN)[2].partition(END)[0]
    kept = [line for line in old.splitlines() if _server_of(line) in CONTESTANTS and _server_of(line) not in measured]
    lines = report.splitlines()
    rows = [line for line in kept if line.startswith("|")] + [line for line in lines[2:] if line.startswith("|")]
    details = [line for each in (kept, lines[2:]) for line in each if line.startswith("-")]
    names = list(CONTESTANTS)
    rows.sort(key=lambda line: names.index(_server_of(line)))
    details.sort(key=lambda line: names.index(_server_of(line)))
    return put_between_markers(text, "\n".join((*lines[:2], *rows, "", *details)))


def _server_of(line: str) -> str:
    return re.split("[,:|]", line.lstrip("|- "), maxsplit=1)[0].strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """0: apphost's clients noticed nothing (or it was not measured). 1: they did, or a server failed."""
    parser = argparse.ArgumentParser(description="Reload servers under load and count what clients notice.")
    parser.add_argument("--server", action="append", choices=list(CONTESTANTS), help="may repeat (default: apphost)")
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument("--requests", type=int, default=1_000_000, help="at least so many answers in the storm")
    parser.add_argument("--limit", type=float, default=900.0, help="s that one storm takes at most (default 900)")
    parser.add_argument("--storm-only", action="store_true", help="do not measure the dip and the slow import")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter with the peers, not benchmarks/.peers")
    parser.add_argument(
        "--write", action="store_true", help="put the lines of these servers into benchmarks/RELOADS.md"
    )
    options = parser.parse_args(arguments)
    names = options.server or ["apphost"]
    outcomes = []
    for name in names:
        python = sys.executable if name.startswith("apphost") else peers_python(options.peers_python)
        outcomes.append(measure(CONTESTANTS[name], python, options))
    report = render(outcomes)
    print(report)
    if options.write:
        REPORT.write_text(merge(REPORT.read_text(), report, names))
    ours = [outcome for outcome in outcomes if outcome.server.startswith("apphost")]
    return int(any(outcome.failure for outcome in outcomes) or not all(outcome.total.flawless for outcome in ours))


if __name__ == "__main__":
    sys.exit(main())
