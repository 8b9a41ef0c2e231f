"""An arbiter that is stopped for a while and goes on, alone or with its workers, as by `docker pause`: nobody notices.

All stops are longer than `timeout` and `boot_timeout`, which are 4 s here.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.load import INTERFACES, Load, ask, check, serving
from tests.support import RawClient, Server, descendants, request_bytes, wait_for

TIMEOUT = 4.0
STOP = 5.5  # s

each_interface = pytest.mark.parametrize("interface", INTERFACES)


@contextmanager
def stopped(server: Server, whole: bool) -> Iterator[None]:
    """Stop the arbiter, or the whole tree, for the time of the block and for `STOP` at least."""
    pids = [server.pid, *(descendants(server.pid) if whole else ())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + STOP
    try:
        yield
        wait_for(lambda: time.monotonic() > end, what="the end of the stop")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def pass_judgement(server: Server) -> None:
    """Let the time pass in which the arbiter would find somebody stuck, and would have killed it."""
    server.wait_line(r"warning the arbiter stood still for \d+\.\d s")
    end = time.monotonic() + TIMEOUT + 0.5
    wait_for(lambda: time.monotonic() > end)
    assert "stuck" not in server.log
    assert "gone" not in server.log


@each_interface
def test_an_arbiter_that_was_stopped_blames_nobody(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface, "--workers", "2", "--timeout", f"{TIMEOUT}") as server:
        pids = server.worker_pids()
        with RawClient(server.port) as idle, RawClient(server.port) as busy:
            before = check(idle.request("GET", "/")).pid
            busy.send(request_bytes("GET", "/wait/go"))
            server.wait_line("/wait/go in progress")
            with Load(server.port, clients=2) as load, stopped(server, whole=False):
                pass
            pass_judgement(server)
            assert check(idle.request("GET", "/")).pid == before
            (tmp_path / "go").touch()
            check(busy.read_response())
        assert load.report.lost == []
        assert server.worker_pids() == pids


@pytest.mark.parametrize("flavour", ["asyncio", "uvloop"])
@each_interface
def test_a_tree_that_was_stopped_goes_on(tmp_path: Path, interface: str, flavour: str) -> None:
    """Also a connection whose `keep_alive` has passed, when its next request was sent before it could be closed."""
    pytest.importorskip(flavour)
    options = ("--workers", "2", "--timeout", f"{TIMEOUT}", "--loop", flavour, "--keep-alive", f"{TIMEOUT}")
    with serving(tmp_path, interface, *options) as server:
        pids = server.worker_pids()
        with RawClient(server.port) as idle, RawClient(server.port) as busy:
            busy.send(request_bytes("GET", "/wait/go"))
            server.wait_line("/wait/go in progress")
            check(idle.request("GET", "/"))
            with stopped(server, whole=True):
                idle.send(request_bytes("GET", "/"))
            check(idle.read_response())
            pass_judgement(server)
            (tmp_path / "go").touch()
            check(busy.read_response())
        assert server.worker_pids() == pids
        assert ask(server.port).version == "one"


@pytest.mark.parametrize("whole", [False, True])
def test_a_boot_that_was_stopped_has_its_time_again(tmp_path: Path, whole: bool) -> None:
    slow = "\nsay('importing')\nwhile not os.path.exists('boot'):\n    time.sleep(0.01)\n"
    (tmp_path / "boot").touch()
    with serving(tmp_path, "wsgi", "--boot-timeout", f"{TIMEOUT}", extra=slow) as server:
        (tmp_path / "boot").unlink()
        mark = server.mark()
        server.reload(wait=False)
        server.wait_line("^importing", after=mark)
        with stopped(server, whole):
            pass
        server.wait_line("the arbiter stood still")
        (tmp_path / "boot").touch()
        server.wait_line("generation 2 is serving")
        assert "stuck" not in server.log


def test_a_worker_that_stays_stopped_is_stuck_all_the_same(tmp_path: Path) -> None:
    with serving(tmp_path, "wsgi", "--workers", "2", "--timeout", f"{TIMEOUT}") as server:
        victim, other = server.worker_pids()
        os.kill(victim, signal.SIGSTOP)
        with stopped(server, whole=False):
            pass
        server.wait_line("the arbiter stood still")
        went_on = time.monotonic()
        server.wait_line(r"worker \d gen 1 is stuck")
        assert time.monotonic() - went_on > TIMEOUT / 4
        wait_for(lambda: len(server.worker_pids()) == 2 and victim not in server.worker_pids())
        assert other in server.worker_pids()
