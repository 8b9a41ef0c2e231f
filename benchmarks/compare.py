"""Measure apphost beside its peers: one worker on one core, wrk on another, the contestants in turns.

    python benchmarks/compare.py                 # every case, table on stdout
    python benchmarks/compare.py --check         # start everything once, ask once, no load
    python benchmarks/compare.py --write         # also put the table into benchmarks/README.md

apphost runs from the environment of this interpreter, its peers from ``benchmarks/.peers`` (made when missing). Linux
only: cores are pinned, processes looked up in ``/proc``. The method and its limits are in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from cases import CASES, Case, Contestant
from results import CONNECTIONS, PACKAGES, Outcome, Sample, WrkResult, as_json, parse_wrk, put_between_markers, render

HERE = Path(__file__).resolve().parent
APPS = HERE / "apps"
README = HERE / "README.md"
PEERS = HERE / ".peers"
REQUIREMENTS = HERE / "requirements-peers.txt"

BODY = b"Hello, world!"  # what every application in apps/ answers
BOOT_SECONDS = 30.0  # a server that has not answered by then has failed
STOP_SECONDS = 10.0  # after that a server that was asked to stop is killed
PROBE_SECONDS = 0.2  # how long the speed of the core is sampled before each run
LOG_LINES = 12  # of a server that failed are shown
# Settings of the person who measures must not reach the servers.
FOREIGN_VARIABLES = (
    *("APPHOST_", "GRANIAN_", "GUNICORN_", "UVICORN_"),
    *("FLASK_", "FORWARDED_", "PYTHON", "WEB_CONCURRENCY"),
)


class RunFailed(Exception):
    """A server did not start, answered wrongly or died, or wrk had nothing to report; the text says which."""


@dataclass(frozen=True)
class Bench:
    """The two interpreters with their environments, and the two cores."""

    apphost_python: str
    peers_python: str
    apphost_env: dict[str, str]
    peers_env: dict[str, str]
    server_core: int
    client_core: int


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_VARIABLES)}


def session_threads(session: int) -> list[int]:
    """Ids of all threads of the living processes that a server consists of, from ``/proc`` (see proc(5))."""
    threads = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, _, _, its = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
            if int(its) == session and state not in "ZX":
                threads += [int(task.name) for task in (entry / "task").iterdir()]
    return threads


def ask(port: int) -> None:
    """One request on its own connection. OSError or HTTPException when nobody answers, RunFailed when wrongly."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/", headers={"Connection": "close"})
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200 or body != BODY:
        raise RunFailed(f"answered {answer.status} {body[:80]!r} instead of 200 {BODY!r}")


def wait_until_serving(server: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        try:
            return ask(port)
        except (OSError, http.client.HTTPException) as error:
            problem = f"no answer after {BOOT_SECONDS:.0f} s ({error})" if time.monotonic() > deadline else ""
            if server.poll() is not None:
                problem = f"exited with {server.returncode} while starting"
            if problem:
                log.seek(0)
                output = log.read().decode(errors="replace").strip().splitlines() or ["(no output)"]
                raise RunFailed("\n  ".join([f"{problem}: {output[-1]}", *output[-LOG_LINES:]])) from error
        time.sleep(0.05)


def check_pinned(session: int, core: int) -> None:
    for thread in session_threads(session):
        with contextlib.suppress(ProcessLookupError):
            allowed = os.sched_getaffinity(thread)
            if allowed != {core}:
                raise RunFailed(f"thread {thread} may run on cores {sorted(allowed)} instead of {core} alone")


def stop_group(server: subprocess.Popen[bytes]) -> None:
    """End the process group that was started, and only that: TERM, then KILL at the deadline. Say what stays."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            server.poll()
            if not session_threads(server.pid):
                server.wait()
                return
            time.sleep(0.05)
        print(f"  still there {STOP_SECONDS:.0f} s after {number.name}", file=sys.stderr)


@contextlib.contextmanager
def serving(bench: Bench, contestant: Contestant) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A fresh server, pinned, in its own process group, that has given a correct answer: the process and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = bench.apphost_python if contestant.is_apphost else bench.peers_python
    env = bench.apphost_env if contestant.is_apphost else bench.peers_env
    command = ["taskset", "-c", str(bench.server_core), python, "-m", *contestant.command(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command, cwd=APPS, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_until_serving(server, port, log)
            check_pinned(server.pid, bench.server_core)
            yield server, port
        finally:
            stop_group(server)


def core_speed(core: int) -> float:
    """Turns a second of a fixed loop on ``core``: shows how fast the machine itself happens to be at the moment."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        turns, start = 0, time.perf_counter()
        while time.perf_counter() - start < PROBE_SECONDS:
            sum(range(1000))
            turns += 1
        return turns / (time.perf_counter() - start)
    finally:
        os.sched_setaffinity(0, allowed)


def run_load(core: int, port: int, seconds: int, message: int) -> tuple[WrkResult, float]:
    """The result, and the share of its core that the client used: wrk, or with a ``message`` echo.py."""
    if message:
        load = [sys.executable, str(HERE / "echo.py"), str(port), str(seconds), str(message)]
    else:
        load = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", f"http://127.0.0.1:{port}/"]
    command = ["taskset", "-c", str(core), *load]
    before, start = os.times(), time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30)
        result = parse_wrk(done.stdout + done.stderr)
    except (subprocess.SubprocessError, ValueError) as error:
        raise RunFailed(f"{Path(load[-4]).name}: {error}") from error
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return result, used / (time.monotonic() - start)


def measure(bench: Bench, contestant: Contestant, message: int, number: int, warmup: int, seconds: int) -> Sample:
    speed = core_speed(bench.server_core)
    errors: dict[str, int] = {}
    try:
        with serving(bench, contestant) as (server, port):
            warm, _ = run_load(bench.client_core, port, warmup, message)
            errors = {f"{kind} in warm-up": count for kind, count in warm.errors.items()}
            result, busy = run_load(bench.client_core, port, seconds, message)
            errors |= result.errors
            check_pinned(server.pid, bench.server_core)
            ask(port)
    except (RunFailed, OSError, http.client.HTTPException) as error:
        return Sample(number, None, errors, None, speed, str(error) or repr(error))
    return Sample(number, result.good_per_second, errors, busy, speed, None)


def measure_case(bench: Bench, case: Case, rounds: int, warmup: int, seconds: int) -> Outcome:
    samples: list[list[Sample]] = [[] for _ in case.contestants]
    for number in range(1, rounds + 1):
        for contestant, collected in zip(case.contestants, samples, strict=True):
            sample = measure(bench, contestant, case.message, number, warmup, seconds)
            collected.append(sample)
            shown = (
                sample.failure.splitlines()[0]
                if sample.failure
                else f"{sample.requests_per_second:,.0f} requests/s {sample.errors or ''}"
            )
            print(f"{case.name} {number}/{rounds}  {contestant.label}: {shown}", file=sys.stderr)
    return Outcome(case, tuple(map(tuple, samples)))


def check(bench: Bench, cases: Sequence[Case]) -> int:
    """Start every contestant once and ask once. The number of those that failed."""
    failed = 0
    for case in cases:
        for contestant in case.contestants:
            try:
                with serving(bench, contestant):
                    verdict = "ok"
            except RunFailed as error:
                failed += 1
                verdict = f"FAILED: {error}"
            print(f"{case.name}  {contestant.label}: {verdict}")
    return failed


def choose_cores(allowed: set[int], siblings: dict[int, set[int]]) -> tuple[int, int]:
    """Server and client core: the first allowed, and the next that does not share its hardware with it if possible."""
    if len(allowed) < 2:
        raise SystemExit("compare.py needs two cores: one for the server, one for wrk")
    server, *others = sorted(allowed)
    return server, next((core for core in others if core not in siblings.get(server, set())), others[0])


def hardware_siblings(core: int) -> set[int]:
    """Cores that are threads of the same physical core (the kernel's cputopology document), from e.g. ``0-1,8``."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        ranges = [part.split("-") for part in path.read_text().strip().split(",")]
    except OSError:
        return set()
    return {number for span in ranges for number in range(int(span[0]), int(span[-1]) + 1)}


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found is not None:
            return found[1]
    return platform.processor() or platform.machine()


def peers_python(given: str | None) -> str:
    """The interpreter with the peers; makes ``benchmarks/.peers`` when it is the one to use and does not exist."""
    if given:
        return given
    python = PEERS / "bin" / "python"
    if not python.exists():
        print(f"making {PEERS} from {REQUIREMENTS.name}", file=sys.stderr)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)], check=True)
        except BaseException:
            shutil.rmtree(PEERS, ignore_errors=True)  # a half-made one would be taken for complete next time
            raise
    return str(python)


_VERSIONS = """
import importlib.metadata, json, platform, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
try:
    import apphost  # a checkout on the path has no metadata
    found["apphost"] = apphost.__version__
except ImportError:
    pass
print(json.dumps({"python": platform.python_version(), "packages": found}))
"""


def versions(python: str, env: dict[str, str]) -> dict[str, Any]:
    command = [python, "-c", _VERSIONS, *PACKAGES]
    done = subprocess.run(command, cwd=APPS, env=env, check=True, capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def apphost_environment() -> dict[str, str]:
    """As it is when apphost is installed; otherwise with this checkout on the path."""
    env = clean_environment()
    try:
        subprocess.run([sys.executable, "-c", "import apphost"], cwd=APPS, env=env, check=True, capture_output=True)
    except subprocess.CalledProcessError:
        print("apphost is not installed here: taking it from this checkout", file=sys.stderr)
        env["PYTHONPATH"] = str(HERE.parent)
    return env


def make_bench(options: argparse.Namespace) -> Bench:
    for tool, origin in (("wrk", "your system's packages, or github.com/wg/wrk"), ("taskset", "util-linux")):
        if shutil.which(tool) is None:
            raise SystemExit(f"compare.py needs {tool} on PATH (from {origin})")
    allowed = os.sched_getaffinity(0)
    server, client = choose_cores(allowed, {core: hardware_siblings(core) for core in allowed})
    server = server if options.server_core is None else options.server_core
    client = client if options.client_core is None else options.client_core
    if server == client or not {server, client} <= allowed:
        raise SystemExit(f"the server and wrk need two cores out of {sorted(allowed)}, not {server} and {client}")
    if client in hardware_siblings(server):
        print(f"warning: cores {server} and {client} share one physical core", file=sys.stderr)
    python = peers_python(options.peers_python)
    return Bench(sys.executable, python, apphost_environment(), clean_environment(), server, client)


def gather_facts(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    wrk = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False)  # its exit status is 1
    found = re.search(r"wrk (?:\w+/)?([\d.]+)", wrk.stdout + wrk.stderr)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())]),
        "load": os.getloadavg()[0],
        "wrk": f"wrk {found[1]}" if found else "wrk",
        "server_core": bench.server_core,
        "client_core": bench.client_core,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "warmup": options.warmup,
        "apphost": versions(bench.apphost_python, bench.apphost_env),
        "peers": versions(bench.peers_python, bench.peers_env),
    }


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure apphost beside its peers.")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this; may repeat")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of every contestant (default 5)")
    parser.add_argument("--seconds", type=positive, default=5, help="measured seconds of each run (default 5)")
    parser.add_argument("--warmup", type=positive, default=2, help="seconds of load before that (default 2)")
    parser.add_argument("--server-core", type=int, help="core of the servers (default: the first allowed)")
    parser.add_argument("--client-core", type=int, help="core of wrk (default: the next on other hardware)")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter with the peers, not benchmarks/.peers")
    parser.add_argument("--check", action="store_true", help="start every server and ask once, without load")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md (all cases)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number to FILE")
    options = parser.parse_args(arguments)
    if options.write and options.case:
        parser.error("--write replaces the whole table, so it needs all cases")
    return options


def interrupted(number: int, _: object) -> NoReturn:
    """TERM and HUP unwind the stack as Ctrl-C does, so that no server is left behind."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all was measured (targets met or not). 1: a run failed, the report says which."""
    options = parse_options(arguments)
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("compare.py needs Linux: it pins processes to cores")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    bench = make_bench(options)
    cases = [case for case in CASES if not options.case or case.name in options.case]
    if options.check:
        return min(check(bench, cases), 1)
    facts = gather_facts(bench, options)
    outcomes = [measure_case(bench, case, options.rounds, options.warmup, options.seconds) for case in cases]
    report = render(outcomes, facts)
    print(report)
    if options.json:
        options.json.write_text(json.dumps(as_json(outcomes, facts), indent=2) + "\n")
    if options.write:
        README.write_text(put_between_markers(README.read_text(), report))
    failed = any(sample.failure for outcome in outcomes for rounds in outcome.samples for sample in rounds)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
