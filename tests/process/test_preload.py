"""Preload: the application is imported once for each generation, and its workers are forked from there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

from tests.load import INTERFACES, Load, ask, deploy, serving, site
from tests.support import RawClient, Server, alive, processes, wait_for, write_app

each_interface = pytest.mark.parametrize("interface", INTERFACES)

# Who imports it says so in a file; /state answers what only the process that imported it knows.
NOTES = """
import gc
with open("imports", "a") as file:
    file.write(f"{VERSION} {os.getpid()}\\n")
IMPORTED_BY = os.getpid()

def answer(body):
    return f"{VERSION} {os.getpid()} {IMPORTED_BY} {os.getppid()} {gc.get_freeze_count()}".encode()
"""


def preloaded(
    folder: Path, interface: str, *args: str, extra: str = NOTES
) -> contextlib.AbstractContextManager[Server]:
    """`serving` with a preloaded site that tells of itself as `notes` reads it."""
    return serving(folder, interface, "--preload", *args, extra=extra)


def imports(folder: Path) -> list[str]:
    """The versions that were imported, once for each time."""
    return [line.split()[0] for line in (folder / "imports").read_text().splitlines()]


def notes(server: Server) -> tuple[str, list[int]]:
    """What a worker tells of itself: version; pid, who imported the code, parent, frozen objects."""
    with RawClient(server.port) as client:
        response = client.request("GET", "/", [("Connection", "close")])
    assert response.status == 200
    version, *numbers = response.body.decode().split()
    return version, [int(number) for number in numbers]


# ------------------------------------------------------------------------------------------------- one import


@each_interface
def test_a_generation_imports_once_and_its_workers_share_it(tmp_path: Path, interface: str) -> None:
    with preloaded(tmp_path, interface, "--workers", "3") as server:
        assert imports(tmp_path) == ["one"]
        pids = server.worker_pids()
        seen = {}
        wait_for(lambda: seen.update([(numbers[0], numbers) for _, numbers in [notes(server)]]) or len(seen) >= 2)
        for pid, (_, imported_by, parent, _) in seen.items():
            assert pid in pids
            assert imported_by == parent, "by the fork server, which is the parent of all"
        assert len({imported_by for _, imported_by, _, _ in seen.values()}) == 1
        assert deploy(server, interface, "two", NOTES) == 2
        assert imports(tmp_path) == ["one", "two"]
        version, (_, imported_by, parent, _) = notes(server)
        assert version == "two"
        assert imported_by == parent
        assert imported_by not in {by for _, by, _, _ in seen.values()}


def test_without_preload_each_worker_imports(tmp_path: Path) -> None:
    write_app(tmp_path, "app", site("asgi", extra=NOTES))
    with Server("app:app", "--no-preload", "--workers", "2", cwd=tmp_path) as server:
        assert imports(tmp_path) == ["one", "one"]
        _, (pid, imported_by, _, _) = notes(server)
        assert imported_by == pid
        assert server.stop() == 0


@each_interface
@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
def test_what_is_imported_is_frozen(tmp_path: Path, interface: str, preload: str) -> None:
    """Else the first full collection of each worker would write to, and so copy, all the memory that they share."""
    with preloaded(tmp_path, interface, preload) as server:
        _, (_, _, _, frozen) = notes(server)
    assert frozen > 10_000, "the objects of the interpreter, of apphost and of the application"


def test_lifespan_is_of_each_worker(tmp_path: Path) -> None:
    with preloaded(tmp_path, "asgi", "--workers", "2") as server:
        assert server.log.count("app one: lifespan.startup") == 2
        deploy(server, "asgi", "two", NOTES)
        wait_for(lambda: server.log.count("app one: lifespan.shutdown") == 2)
        assert server.log.count("app two: lifespan.startup") == 2
        assert server.stop() == 0
        assert server.log.count("app two: lifespan.shutdown") == 2
    assert imports(tmp_path) == ["one", "two"]


def test_a_factory_is_called_once(tmp_path: Path) -> None:
    factory = NOTES + "\ndef make():\n    say(f'made by {os.getpid()}')\n    return app\n"
    write_app(tmp_path, "app", site("wsgi", extra=factory))
    with Server("app:make", "--factory", "--preload", "--workers", "2", cwd=tmp_path) as server:
        _, (_, _, parent, _) = notes(server)
        assert re.findall(r"made by (\d+)", server.log) == [str(parent)]
        assert server.stop() == 0


# ------------------------------------------------------------------------------------------------- other code on disk


@each_interface
def test_a_killed_worker_is_replaced_by_the_same_code(tmp_path: Path, interface: str) -> None:
    """The file on the disk has changed, but nobody has asked for a reload: the site must not be of two minds."""
    with preloaded(tmp_path, interface, "--workers", "2") as server:
        fork_server = notes(server)[1][2]
        write_app(tmp_path, "app", site(interface, "two", NOTES))
        for killed in server.worker_pids():
            mark = server.mark()
            os.kill(killed, signal.SIGKILL)
            server.wait_line("worker [12] gen 1 gone: died of SIGKILL", after=mark)
            server.wait_line("worker [34] gen 1 ready", after=mark)
        for _ in range(10):
            version, (_, imported_by, _, _) = notes(server)
            assert (version, imported_by) == ("one", fork_server)
        assert imports(tmp_path) == ["one"]
        server.reload()
        assert notes(server)[0] == "two"
        assert imports(tmp_path) == ["one", "two"]


def test_one_worker_more_is_of_the_same_code(tmp_path: Path) -> None:
    with preloaded(tmp_path, "asgi") as server:
        (tmp_path / "app.py").unlink()
        server.signal(signal.SIGTTIN)
        server.wait_line("worker 2 gen 1 ready")
        assert {notes(server)[0] for _ in range(10)} == {"one"}


def test_after_a_reload_that_failed_the_old_code_still_forks(tmp_path: Path) -> None:
    with preloaded(tmp_path, "asgi") as server:
        write_app(tmp_path, "app", "raise RuntimeError('no database')\n")
        server.signal(signal.SIGUSR1)
        server.wait_line("generation 2 given up: .*RuntimeError.*Generation 1 keeps serving")
        mark = server.mark()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_line(r"worker \d+ gen 1 ready", after=mark)
        assert notes(server)[0] == "one"
        assert deploy(server, "asgi", "two", NOTES) == 3


def test_recycled_workers_are_of_the_same_code(tmp_path: Path) -> None:
    with preloaded(tmp_path, "wsgi", "--max-requests", "50", "--workers", "2", extra="") as server:
        write_app(tmp_path, "app", "raise RuntimeError('half a deploy')\n")
        with Load(server.port) as load:
            wait_for(lambda: len(load.report.pids) >= 6, what="recycled workers")
        assert load.report.lost == []
        assert load.report.versions == ["one"]


# ------------------------------------------------------------------------------------------------- memory and processes


def test_the_memory_of_the_application_is_shared(tmp_path: Path) -> None:
    """What the application holds is in memory once: workers have it without owning it."""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs /proc/PID/smaps_rollup")
    ballast = "\nBALLAST = bytes(range(256)) * (64 << 12)\nassert len(BALLAST) == 64 << 20\n"
    with preloaded(tmp_path, "asgi", "--workers", "2", extra=ballast) as server:
        for _ in range(10):
            ask(server.port)
        own = [private(pid) for pid in server.worker_pids()]
    assert max(own) < 32 << 20


def private(pid: int) -> int:
    """Bytes of memory that only this process has."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except PermissionError:
        pytest.skip("no permission to read /proc/PID/smaps_rollup")
    return sum(int(kib) << 10 for kib in re.findall(r"Private_(?:Clean|Dirty): *(\d+) kB", rollup))


def test_the_fork_server_of_the_old_code_goes(tmp_path: Path) -> None:
    with preloaded(tmp_path, "asgi") as server:
        old = notes(server)[1][2]
        assert old in [process.pid for process in processes() if process.parent == server.pid]
        deploy(server, "asgi", "two", NOTES)
        wait_for(lambda: not alive(old), what="the old fork server to go")
        assert len(server.children()) == 2


def test_what_the_application_registers_for_its_exit_is_not_run_by_the_fork_server(tmp_path: Path) -> None:
    extra = NOTES + "\nimport atexit\natexit.register(lambda: say(f'at exit of {os.getpid()}'))\n"
    with preloaded(tmp_path, "asgi", extra=extra) as server:
        _, (worker, _, _, _) = notes(server)
        assert server.stop() == 0
        assert re.findall(r"at exit of (\d+)", server.log) == [str(worker)]


# ------------------------------------------------------------------------------------------------- failures

FAILURES = {
    "raises": (
        "raise RuntimeError('no database')\n",
        "raised RuntimeError",
        ["no database", r'File ".*app\.py", line 1'],
    ),
    "exits": ("import sys\nsys.exit(0)\n", "ended itself with SystemExit", [r'File ".*app\.py", line 2']),
    "ends": ("import os\nos._exit(0)\n", r"ended early \(exit 0\)", []),
    "dies": (
        "import faulthandler\nfaulthandler._sigsegv()\n",
        r"ended early \(died of SIGSEGV\)",
        ["Segmentation fault"],
    ),
    "hangs": (
        "import time\ndef hang_here():\n    time.sleep(600)\nhang_here()\n",
        r"not ready within boot_timeout, 6 s",
        ["in hang_here", r'File ".*app\.py", line 3'],
    ),
    "spins": (
        "def spin_here():\n    while True: pass\nspin_here()\n",
        "not ready within boot_timeout, 6 s",
        ["in spin_here"],
    ),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_first_start_that_fails_ends_with_the_reason(tmp_path: Path, kind: str) -> None:
    source, reason, shown = FAILURES[kind]
    write_app(tmp_path, "app", source)
    args = ("--preload", "--workers", "2", "--boot-timeout", "6")
    with Server("app:app", *args, cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3
        assert re.search(f"worker [12] gen 1 could not boot: .*{reason}", server.log)
        for text in shown:
            assert re.search(text, server.log)
        assert "stopped, exit 3" in server.log
        assert " ready in " not in server.log


@pytest.mark.parametrize("kind", ["hangs", "spins"])
def test_a_reload_that_hangs_is_given_up(tmp_path: Path, kind: str) -> None:
    """It hangs in the fork server, which has no worker yet: so that is what is asked for its stacks, and killed."""
    source, reason, shown = FAILURES[kind]
    with preloaded(tmp_path, "asgi", "--boot-timeout", "6", extra="") as server:
        before = ask(server.port)
        write_app(tmp_path, "app", source)
        mark = server.mark()
        server.signal(signal.SIGUSR1)
        server.wait_line(f"generation 2 given up: .*{reason}.*Generation 1 keeps serving")
        for text in shown:
            server.wait_line(text, after=mark)
        wait_for(lambda: len(server.children()) == 2, what="the fork server that hangs to be gone")
        assert ask(server.port) == before
        assert deploy(server, "asgi", "two", "") == 3
        assert ask(server.port).version == "two"
