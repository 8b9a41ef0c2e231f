"""Where it is measured: the environment of the peers, the cores, versions, how fast the machine is at the moment."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from servers import HERE, Bench, clean_environment

PEERS = HERE / ".peers"
REQUIREMENTS = HERE / "requirements-peers.txt"
PROBE_SECONDS = 0.2  # how long the speed of the core is sampled before each run
SHARED_PACKAGES = (
    *("h11", "httptools", "uvloop", "wsproto", "websockets"),
    *("starlette", "fastapi", "flask", "werkzeug", "django"),
)  # must be the same on both sides to be fair
PACKAGES = ("apphost", "uvicorn", "granian", "hypercorn", "gunicorn", "gunicorn_h1c", *SHARED_PACKAGES)
TOOLS = (("wrk", "your system's packages, or github.com/wg/wrk"), ("taskset", "util-linux"))


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


def stolen_seconds(core: int) -> float:
    """What the hypervisor has taken of a core since the boot (proc_stat(5)); 0 where it does not tell."""
    found = re.search(rf"^cpu{core} (.*)$", Path("/proc/stat").read_text(), re.MULTILINE)
    fields = found[1].split() if found else []
    return int(fields[7]) / os.sysconf("SC_CLK_TCK") if len(fields) > 7 else 0.0


class Steal:
    """The larger share of one of some cores that was taken since this was made."""

    def __init__(self, *cores: int) -> None:
        self.before = {core: stolen_seconds(core) for core in cores}
        self.since = time.monotonic()

    def share(self) -> float:
        took = time.monotonic() - self.since
        return max(stolen_seconds(core) - before for core, before in self.before.items()) / took


def choose_cores(allowed: set[int], siblings: dict[int, set[int]]) -> tuple[int, int]:
    """Server and client core: the first allowed, and the next that does not share its hardware with it if possible."""
    if len(allowed) < 2:
        raise SystemExit("compare.py needs two cores: one for the server, one for the load")
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
        if shutil.which(given) is None:
            raise SystemExit(f"--peers-python: {given} cannot be run")
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
    done = subprocess.run(command, cwd=HERE / "apps", env=env, check=True, capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def apphost_environment() -> dict[str, str]:
    """As it is when apphost is installed; otherwise with this checkout on the path."""
    env = clean_environment()
    try:
        subprocess.run(
            [sys.executable, "-c", "import apphost"], cwd=HERE / "apps", env=env, check=True, capture_output=True
        )
    except subprocess.CalledProcessError:
        print("apphost is not installed here: taking it from this checkout", file=sys.stderr)
        env["PYTHONPATH"] = str(HERE.parent)
    return env


def make_bench(options: argparse.Namespace) -> Bench:
    for tool, origin in TOOLS:
        if shutil.which(tool) is None:
            raise SystemExit(f"compare.py needs {tool} on PATH (from {origin})")
    allowed = os.sched_getaffinity(0)
    server, client = choose_cores(allowed, {core: hardware_siblings(core) for core in allowed})
    server = server if options.server_core is None else options.server_core
    client = client if options.client_core is None else options.client_core
    if server == client or not {server, client} <= allowed:
        raise SystemExit(f"the server and the load need two cores out of {sorted(allowed)}, not {server} and {client}")
    if client in hardware_siblings(server):
        print(f"warning: cores {server} and {client} share one physical core", file=sys.stderr)
    python = peers_python(options.peers_python)
    return Bench(sys.executable, python, apphost_environment(), clean_environment(), server, client)


def commit() -> str:
    """The commit of this checkout, with + when files of the package differ from it; "" outside of git."""
    git = ["git", "-C", str(HERE.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "apphost"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def gather_facts(bench: Bench) -> dict[str, Any]:
    """What must be the same in all runs that one report is made of."""
    wrk = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False)  # its exit status is 1
    found = re.search(r"wrk (?:\w+/)?([\d.]+)", wrk.stdout + wrk.stderr)
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())]),
        "wrk": f"wrk {found[1]}" if found else "wrk",
        "server_core": bench.server_core,
        "client_core": bench.client_core,
        "apphost": versions(bench.apphost_python, bench.apphost_env),
        "peers": versions(bench.peers_python, bench.peers_env),
    }
