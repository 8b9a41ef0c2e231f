"""Steady load for tests of deploys: a site whose every answer can be checked, its server, and clients that never
try twice.

A request is lost when its connection cannot be opened, when the answer is incomplete, wrong or no 2xx, or when the
server closes a keep-alive connection that it had not said `Connection: close` on. A client never sends on a connection
after such an announcement, so whatever is lost was lost by the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.rawhttp import DEADLINE, Address, RawClient, Response
from tests.support import Server, wait_for, write_app

INTERFACES = ("asgi", "wsgi")

_COMMON = """
import asyncio, hashlib, os, subprocess, time

VERSION = {version!r}

def say(text):
    os.write(1, f"{{text}}\\n".encode())  # in one piece, among the lines of other processes

def answer(body):
    return f"{{VERSION}} {{os.getpid()}} {{len(body)}} {{hashlib.sha256(body).hexdigest()}}".encode()

def orphan():
    # The shell ends at once, so its background child loses its parent.
    command = "(while [ ! -e end-orphan ]; do sleep 0.01; done) >/dev/null 2>&1 & echo $!"
    return subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout
"""

_ASGI = """
async def lifespan(receive, send):
    while True:
        kind = (await receive())["type"]
        say(f"app {{VERSION}}: {{kind}}")
        await send({{"type": f"{{kind}}.complete"}})
        if kind == "lifespan.shutdown":
            return

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    path = scope["path"]
    text = answer(body)
    if path.startswith("/wait/"):
        say(f"{{path}} in progress")
        while not os.path.exists(path[6:]):
            await asyncio.sleep(0.01)
    elif path == "/spin":
        while True:
            pass
    elif path == "/sleep":
        say(f"{{path}} in progress")
        time.sleep(600)
    elif path == "/exit":
        os._exit(7)
    elif path == "/orphan":
        text = orphan()
    headers = [(b"content-length", str(len(text)).encode())]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": text}})
"""

_WSGI = """
def app(environ, start_response):
    body = environ["wsgi.input"].read()
    path = environ["PATH_INFO"]
    text = answer(body)
    if path.startswith("/wait/"):
        say(f"{{path}} in progress")
        while not os.path.exists(path[6:]):
            time.sleep(0.01)
    elif path == "/exit":
        os._exit(7)
    elif path == "/orphan":
        text = orphan()
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text]
"""


def site(interface: str, version: str = "one", extra: str = "") -> str:
    """The source of an application, `app`, that answers every request with `VERSION PID LENGTH SHA256`, the latter two
    of the request's body. `extra` is code behind it.

    /wait/NAME answers when there is a file NAME, and prints that it is in progress; /exit ends the worker with 7;
    /orphan answers the pid of a process that nobody waits for, which ends when there is a file `end-orphan`; /spin and
    /sleep (ASGI only) block the event loop for good.
    """
    return (_COMMON + {"asgi": _ASGI, "wsgi": _WSGI}[interface]).format(version=version) + extra


@contextlib.contextmanager
def serving(folder: Path, interface: str, *args: str, extra: str = "", **options: object) -> Iterator[Server]:
    """A server for `site` in `folder`; it must stop with 0 in the end, unless the test has asked for its exit code.

    options: as of `Server`.
    """
    write_app(folder, "app", site(interface, extra=extra))
    with Server("app:app", *args, cwd=folder, **options) as server:  # type: ignore[arg-type]
        yield server
        if server.exit_code is None:
            assert server.stop() == 0


def deploy(server: Server, interface: str, version: str, extra: str = "") -> int:
    """Write the next version, reload, and return the new generation once it serves."""
    write_app(server.cwd, "app", site(interface, version, extra))
    return server.reload()


@dataclass(frozen=True)
class Answer:
    """What the site said."""

    version: str
    pid: int


def check(response: Response, body: bytes = b"") -> Answer:
    """The site's answer to a request with `body`; AssertionError for anything else."""
    assert 200 <= response.status <= 299, f"status {response.status}, {response.body[:200]!r}"
    version, pid, length, digest = response.body.decode().split(" ")
    assert int(length) == len(body), f"the application received {length} bytes of {len(body)}"
    assert digest == hashlib.sha256(body).hexdigest(), "the application received another body"
    return Answer(version, int(pid))


def announces_close(response: Response) -> bool:
    tokens = (token.strip().lower() for value in response.all(b"connection") for token in value.split(b","))
    return b"close" in tokens


def ask(address: Address, target: str = "/", body: bytes = b"") -> Answer:
    """One request on a connection of its own."""
    with RawClient(address) as client:
        response = client.request("POST" if body else "GET", target, [("Connection", "close")], body)
        return check(response, body)


@dataclass
class Report:
    """What the clients have seen; `versions` and `pids` in the order of their first answers."""

    answered: int = 0
    connections: int = 0
    announced: int = 0  # connections that ended because the server had said so
    lost: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)


class Load:
    """`clients` threads that send GET and POST in turn over keep-alive connections until the end of the `with`.

    pause: seconds between two requests of one client.
    """

    def __init__(
        self,
        address: Address,
        clients: int = 4,
        pause: float = 0.01,
        timeout: float = DEADLINE,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.address = address
        self.tls = tls
        self.pause = pause
        self.timeout = timeout
        self.report = Report()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, answers: int, timeout: float = DEADLINE) -> None:
        """Until that many more requests were answered (or lost: whoever looks at the report will see)."""
        goal = answers + self._done()
        wait_for(lambda: self._done() >= goal, timeout, f"{answers} more answers")

    def _done(self) -> int:
        return self.report.answered + len(self.report.lost)

    def _client(self, number: int) -> None:
        client: RawClient | None = None
        for method, body in self._requests(number):
            try:
                if client is None:
                    client = RawClient(self.address, self.timeout, self.tls)
                    self._count(connections=1)
                response = client.request(method, "/", (), body)
                self._note(check(response, body))
                keep = not announces_close(response)
                self._count(announced=not keep)
            except (OSError, AssertionError, ValueError) as exc:
                with self._lock:
                    where = f"request {self.report.answered} of all, {method} by client {number}"
                    self.report.lost.append(f"{where}: {type(exc).__name__} {exc}")
                keep = False
            if not keep and client is not None:
                client.close()
                client = None
            if self._stop.wait(self.pause):
                break
        if client is not None:
            client.close()

    @staticmethod
    def _requests(number: int) -> Iterator[tuple[str, bytes]]:
        bodies = (b"small", bytes([number]) * 20_000, b"line\r\n\r\n" * 400)
        while True:
            for body in bodies:
                yield "GET", b""
                yield "POST", body

    def _count(self, connections: int = 0, announced: int = 0) -> None:
        with self._lock:
            self.report.connections += connections
            self.report.announced += announced

    def _note(self, answer: Answer) -> None:
        with self._lock:
            report = self.report
            report.answered += 1
            if answer.version not in report.versions:
                report.versions.append(answer.version)
            if answer.pid not in report.pids:
                report.pids.append(answer.pid)
