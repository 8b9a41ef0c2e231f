"""A server for a while: started pinned to a core, asked for a correct answer, looked up in /proc, ended. Linux only."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cases import Case, Request, Server

HERE = Path(__file__).resolve().parent
BOOT_SECONDS = 30.0  # a server that has not answered by then has failed
STOP_SECONDS = 10.0  # after that a server that was asked to stop is killed
LOG_LINES = 12  # of a server that failed are shown
# Settings of the person who measures must not reach the servers.
FOREIGN_VARIABLES = (
    *("APPHOST_", "GRANIAN_", "GUNICORN_", "UVICORN_", "HYPERCORN_"),
    *("FLASK_", "DJANGO_", "FORWARDED_", "PYTHON", "WEB_CONCURRENCY", "PORT"),
)


class RunFailed(Exception):
    """A server did not start, answered wrongly or died, or the load had nothing to report; the text says which."""


@dataclass(frozen=True)
class Bench:
    """The two interpreters with their environments, and the two cores."""

    apphost_python: str
    peers_python: str
    apphost_env: dict[str, str]
    peers_env: dict[str, str]
    server_core: int
    client_core: int


@dataclass(frozen=True)
class Running:
    """A server that has answered. ``started``: seconds from its start to the first correct answer."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    started: float

    @property
    def session(self) -> int:
        return self.process.pid


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_VARIABLES)}
    return kept | {"DJANGO_DEBUG": "0"}


def session_processes(session: int) -> list[int]:
    """Ids of the living processes that a server consists of, from ``/proc`` (see proc(5))."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, _, _, its = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
            if int(its) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def session_threads(session: int) -> list[int]:
    threads = []
    for process in session_processes(session):
        with contextlib.suppress(OSError):
            threads += [int(task.name) for task in Path(f"/proc/{process}/task").iterdir()]
    return threads


def session_pss(session: int) -> int:
    """Memory of all processes of a server, bytes: shared pages count once, split among those that have them (PSS)."""
    total = 0
    for process in session_processes(session):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            found = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
            if found is None:
                raise RunFailed(f"/proc/{process}/smaps_rollup has no Pss")
            total += int(found[1]) * 1024
    return total


def ask(port: int, request: Request, timeout: float = 5.0) -> None:
    """One request on its own connection. OSError or HTTPException when nobody answers, RunFailed when wrongly."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(
            request.method, request.path, request.body or None, {**dict(request.headers), "Connection": "close"}
        )
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200 or body != request.whole_answer:
        wanted = request.whole_answer
        raise RunFailed(
            f"answered {answer.status} with {len(body)} bytes {body[:60]!r}, not 200 with {len(wanted)} {wanted[:60]!r}"
        )
    missing = [name for name in ("Date", "Server") if answer.getheader(name) is None]
    if missing:
        raise RunFailed(f"answered without {' and '.join(missing)}, which all servers must send here")


def wait_until_serving(process: subprocess.Popen[bytes], port: int, request: Request, log: IO[bytes]) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        try:
            return ask(port, request)
        except (OSError, http.client.HTTPException) as error:
            problem = f"no answer after {BOOT_SECONDS:.0f} s ({error})" if time.monotonic() > deadline else ""
            if process.poll() is not None:
                problem = f"exited with {process.returncode} while starting"
            if problem:
                log.seek(0)
                output = log.read().decode(errors="replace").strip().splitlines() or ["(no output)"]
                raise RunFailed("\n  ".join([f"{problem}: {output[-1]}", *output[-LOG_LINES:]])) from error
        time.sleep(0.002)


def check_pinned(session: int, core: int) -> None:
    for thread in session_threads(session):
        with contextlib.suppress(ProcessLookupError):
            allowed = os.sched_getaffinity(thread)
            if allowed != {core}:
                raise RunFailed(f"thread {thread} may run on cores {sorted(allowed)} instead of {core} alone")


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End the process group that was started, and only that: TERM, then KILL at the deadline. Say what stays."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            process.poll()
            if not session_threads(process.pid):
                process.wait()
                return
            time.sleep(0.02)
        print(f"  still there {STOP_SECONDS:.0f} s after {number.name}", file=sys.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(bench: Bench, server: Server, case: Case, workers: int | None = None) -> Iterator[Running]:
    """A fresh server, pinned, in its own process group, that has given a correct answer."""
    python = bench.apphost_python if server.is_apphost else bench.peers_python
    env = bench.apphost_env if server.is_apphost else bench.peers_env
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, tempfile.TemporaryFile() as log:
        version = Path(folder) / "version"
        version.write_bytes(case.request.whole_answer if len(case.request.whole_answer) < 1024 else b"")
        arguments = server.command(app=case.app, port=port, workers=workers or case.workers, tmp=folder)
        since = time.perf_counter()
        process = subprocess.Popen(
            ["taskset", "-c", str(bench.server_core), python, "-m", *arguments],
            cwd=HERE / case.folder, env=env | {"BENCH_VERSION_FILE": str(version)},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_until_serving(process, port, case.request, log)
            running = Running(process, port, Path(folder), time.perf_counter() - since)
            check_pinned(process.pid, bench.server_core)
            yield running
        finally:
            stop_group(process)
