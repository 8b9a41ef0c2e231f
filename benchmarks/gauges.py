"""What a server takes without load: memory, start-up, reload, and how it spreads connections. Each returns a Load."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import socket
import time
from collections import Counter

from cases import Case, Server
from loads import Load, run_wrk
from servers import Bench, RunFailed, Running, serving, session_pss

MIB = float(1 << 20)
# Are open when the memory of the others begins to count: by then they have filled what was free in the heap.
BASE_CONNECTIONS = 2000
IDLE_CONNECTIONS = 4000
SETTLE_SECONDS = 1.0  # until timers have run and the garbage of the requests is gone
LONG_CONNECTIONS = 400
FILES = 2 * (BASE_CONNECTIONS + IDLE_CONNECTIONS)  # descriptors that client and server need, and more
RELOAD_SECONDS = 60.0  # new code that does not answer by then has failed
QUIET_SECONDS = 1.5  # only new code for so long: the reload is over
ANSWER_SECONDS = 10.0  # for one answer
ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) .*?\r\n\r\n(.*)", re.DOTALL)
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def head(path: str, close: bool = False) -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{'Connection: close' if close else 'Accept: */*'}\r\n\r\n".encode()
    )


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """Status and body of an answer with a Content-Length. OSError when the connection ends before."""
    data = b""
    while True:
        more = sock.recv(65536)
        if not more:
            raise ConnectionError(f"the connection was closed after {data[:60]!r}")
        data += more
        found, length = ANSWER.match(data), LENGTH.search(data)
        if found and length and len(found[2]) >= int(length[1]):
            return int(found[1]), found[2]


def open_connections(running: Running, count: int, path: str) -> list[tuple[socket.socket, bytes]]:
    """Connections that have had one answer each, one after another, with the bodies."""
    pairs = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", running.port), ANSWER_SECONDS)
        sock.sendall(head(path))
        status, body = read_answer(sock)
        if status != 200:
            raise RunFailed(f"answered {status} on connection {len(pairs) + 1}")
        pairs.append((sock, body))
    return pairs


def raise_limit() -> None:
    """Of open files, for this process and the servers that it starts. RunFailed where the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        raise RunFailed(f"needs {FILES} open files, and the hard limit is {hard} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))


def closed(sockets: list[socket.socket]) -> int:
    """How many the server has closed."""
    poll = select.poll()
    for sock in sockets:
        poll.register(sock, select.POLLIN)
    return len(poll.poll(0))


def idle(bench: Bench, server: Server, case: Case) -> Load:
    """What each further idle keep-alive connection takes of the server's memory (not of the kernel's)."""
    raise_limit()
    with serving(bench, server, case) as running:
        run_wrk(bench, running, case, 1)
        sockets = [sock for sock, _ in open_connections(running, BASE_CONNECTIONS, case.request.path)]
        try:
            time.sleep(SETTLE_SECONDS)
            before = session_pss(running.session)
            sockets += [sock for sock, _ in open_connections(running, IDLE_CONNECTIONS, case.request.path)]
            time.sleep(SETTLE_SECONDS)
            after = session_pss(running.session)
            gone = closed(sockets)
        finally:
            for sock in sockets:
                sock.close()
    values = {"connection": (after - before) / IDLE_CONNECTIONS / 1024, "tree": after / MIB}
    return Load(values, {"closed by the server": gone} if gone else {})


def tree(bench: Bench, server: Server, case: Case, workers: int | None = None) -> Load:
    """Memory of all processes after a second of load, so that all workers have imported what they need."""
    with serving(bench, server, case, workers) as running:
        load = run_wrk(bench, running, case, 1)
        time.sleep(SETTLE_SECONDS)
        return Load({"tree": session_pss(running.session) / MIB}, load.errors)


def workers(bench: Bench, server: Server, case: Case) -> Load:
    one, four = tree(bench, server, case, 1), tree(bench, server, case, 4)
    values = {"one": one.values["tree"], "four": four.values["tree"]}
    return Load(
        values | {"worker": (values["four"] - values["one"]) / 3}, dict(Counter(one.errors) + Counter(four.errors))
    )


def start(bench: Bench, server: Server, case: Case) -> Load:
    with serving(bench, server, case) as running:
        return Load({"start": running.started * 1000})


def balance(bench: Bench, server: Server, case: Case) -> Load:
    """How evenly connections that stay are spread: those that come one after another, then those that come at once."""
    with serving(bench, server, case) as running:
        pairs = open_connections(running, LONG_CONNECTIONS, "/pid")
        paced = Counter(body for _, body in pairs)
        for sock, _ in pairs:
            sock.close()
        time.sleep(SETTLE_SECONDS)
        sockets, burst = [], Counter[bytes]()
        try:
            for _ in range(LONG_CONNECTIONS):
                sock = socket.create_connection(("127.0.0.1", running.port), ANSWER_SECONDS)
                sockets.append(sock)
                sock.sendall(head("/pid"))
            for sock in sockets:
                _, body = read_answer(sock)
                burst[body] += 1
        finally:
            for sock in sockets:
                sock.close()
    even = LONG_CONNECTIONS / case.workers
    values = {}
    for key, found in (("burst", burst), ("paced", paced)):
        values[key] = max(found.values()) / even
        values[f"{key}_least"] = min(found.values()) / even if len(found) == case.workers else 0.0
    return Load(values)


def ask_version(running: Running) -> bytes:
    """OSError without an answer, RunFailed when it is an error."""
    with socket.create_connection(("127.0.0.1", running.port), ANSWER_SECONDS) as sock:
        sock.sendall(head("/", close=True))
        status, body = read_answer(sock)
    if status != 200:
        raise RunFailed(f"answered {status} {body[:60]!r}")
    return body


def reload(bench: Bench, server: Server, case: Case) -> Load:
    """From the signal to the last answer of old code; a fresh connection for each request, one after another."""
    errors: Counter[str] = Counter()
    with serving(bench, server, case) as running:
        (running.folder / "version").write_bytes(b"new")
        asked, is_new = 0, False
        os.kill(running.process.pid, signal.Signals[f"SIG{server.reload}"])
        signalled = last_old = time.perf_counter()
        first_new = 0.0
        while True:
            now = time.perf_counter()
            asked += 1
            try:
                version: bytes | None = ask_version(running)
            except OSError:
                errors["lost"] += 1
                version = None
            except RunFailed:
                errors["no 200"] += 1
                version = None
            is_new = is_new or version == b"new"
            if version == b"new":
                first_new = first_new or now
            else:
                last_old = time.perf_counter()
            if is_new and now - max(last_old, first_new) > QUIET_SECONDS:
                break
            if now - signalled > RELOAD_SECONDS:
                raise RunFailed(f"new code did not take over within {RELOAD_SECONDS:.0f} s of {server.reload}")
            time.sleep(0.001)
    return Load({"reload": (max(last_old, first_new) - signalled) * 1000, "asked": asked}, dict(errors))
