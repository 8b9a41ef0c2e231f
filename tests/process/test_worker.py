"""Workers against real processes: stuck ones, recycled ones, signals that go astray, and how they end."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.load import INTERFACES, Load, ask, check, serving
from tests.support import RawClient, Server, alive, request_bytes, wait_for, write_app

each_interface = pytest.mark.parametrize("interface", INTERFACES)


def one_of(server: Server, pid: int) -> RawClient:
    """A keep-alive connection to the worker `pid`."""
    while True:
        client = RawClient(server.port)
        if check(client.request("GET", "/")).pid == pid:
            return client
        client.close()


# ------------------------------------------------------------------------------------------------- stuck


@pytest.mark.parametrize("flavour", ["asyncio", "uvloop"])
@pytest.mark.parametrize(("target", "function"), [("/spin", "app"), ("/sleep", "app")])
def test_a_blocked_event_loop_is_killed_with_its_stacks_and_requests(
    tmp_path: Path, flavour: str, target: str, function: str
) -> None:
    pytest.importorskip(flavour)
    with serving(tmp_path, "asgi", "--workers", "2", "--timeout", "4", "--loop", flavour) as server:
        before = server.worker_pids()
        stuck, other = before
        with one_of(server, stuck) as victim, one_of(server, other) as survivor:
            victim.send(request_bytes("GET", target))
            started = time.monotonic()
            server.wait_line(r"error worker \d gen 1 is stuck: .* timeout, 4 s")
            assert time.monotonic() - started > 3.4  # the last beat may have come up to a tick before
            check(survivor.request("POST", "/", body=b"served"), b"served")
            gone = server.wait_line(r"error worker (\d) gen 1 gone: died of SIGKILL")
            with pytest.raises((AssertionError, ConnectionResetError)):
                victim.read_response()
            check(survivor.request("GET", "/"))
        wait_for(lambda: len(server.worker_pids()) == 2 and stuck not in server.worker_pids())
        server.wait_line(f"in progress: .*GET {target}")
        server.wait_line(rf'File ".*app\.py", line \d+ in {function}')
        assert server.worker_pids()[0] == other
        assert gone[1] in "12"
        # The load goes to both again.
        wait_for(lambda: {ask(server.port).pid for _ in range(5)} - {other}, what="an answer of the new worker")


def test_a_worker_that_is_stopped_is_killed_and_replaced(tmp_path: Path) -> None:
    with serving(tmp_path, "wsgi", "--workers", "2", "--timeout", "4") as server:
        stopped, other = server.worker_pids()
        os.kill(stopped, signal.SIGSTOP)
        server.wait_line(r"worker \d gen 1 is stuck")
        server.wait_line(r"worker \d gen 1 gone: died of SIGKILL")
        wait_for(lambda: len(server.worker_pids()) == 2 and stopped not in server.worker_pids())
        assert other in server.worker_pids()
        assert ask(server.port).version == "one"


def test_a_long_request_in_a_thread_is_not_stuck(tmp_path: Path) -> None:
    """`timeout` is about the event loop; a WSGI application may take its time."""
    with serving(tmp_path, "wsgi", "--timeout", "2", "--threads", "2") as server, RawClient(server.port) as client:
        client.send(request_bytes("GET", "/wait/go"))
        server.wait_line("/wait/go in progress")
        with Load(server.port, clients=1) as load:
            end = time.monotonic() + 5
            wait_for(lambda: time.monotonic() > end, what="more than twice the timeout")
        (tmp_path / "go").touch()
        assert check(client.read_response()).pid == server.worker_pids()[0]
        assert load.report.lost == []
        assert "stuck" not in server.log


def test_timeout_0_leaves_a_blocked_worker_alone(tmp_path: Path) -> None:
    """It has a drain like every other, at whose end it is killed."""
    options = ("--timeout", "0", "--graceful-timeout", "0.5", "--stop-timeout", "1")
    with serving(tmp_path, "asgi", *options) as server, RawClient(server.port) as client:
        client.send(request_bytes("GET", "/sleep"))
        server.wait_line("/sleep in progress")
        server.reload()
        server.wait_line("worker 1 gen 1 is killed: it did not finish in time")
        server.wait_line("worker 1 gen 1 gone: died of SIGKILL")
        assert ask(server.port).pid == server.worker_pids()[0]
        assert "stuck" not in server.log


# ------------------------------------------------------------------------------------------------- recycling


@each_interface
@pytest.mark.parametrize(("workers", "jitter"), [(1, 0), (2, 60)])
def test_max_requests_recycles_without_a_lost_request(
    tmp_path: Path, interface: str, workers: int, jitter: int
) -> None:
    options = ("--max-requests", "100", "--max-requests-jitter", str(jitter), "--workers", str(workers))
    with serving(tmp_path, interface, *options) as server:
        with Load(server.port, clients=6) as load:
            wait_for(lambda: len(load.report.pids) >= 5 + workers, what="five recycled workers")
        said = re.findall(r"worker (\d+) gen 1 asks to be replaced: max_requests: (\d+) requests served", server.log)
        assert len(said) >= 5
        assert all(100 <= int(limit) <= 100 + jitter for _, limit in said)
        if jitter:
            assert len({limit for _, limit in said}) > 1
        worker = said[0][0]
        ready = server.wait_line(rf"worker {int(worker) + 1 if workers == 1 else '[3-9]'} gen 1 ready")
        draining = server.wait_line(rf"worker {worker} gen 1 draining: recycle")
        assert server.log.index(ready[0]) < server.log.index(draining[0])
    assert load.report.lost == []
    assert "error" not in server.log


# ------------------------------------------------------------------------------------------------- stray signals


@each_interface
def test_a_worker_that_gets_term_finishes_and_is_replaced(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface) as server, RawClient(server.port) as client:
        (worker,) = server.worker_pids()
        client.send(request_bytes("POST", "/wait/go", body=b"long"))
        server.wait_line("/wait/go in progress")
        os.kill(worker, signal.SIGTERM)
        server.wait_line("worker 1 gen 1 draining: it received TERM")
        server.wait_line("worker 2 gen 1 ready")
        assert ask(server.port).pid != worker
        (tmp_path / "go").touch()
        assert check(client.read_response(), b"long").pid == worker
        server.wait_line("worker 1 gen 1 gone: exit 0")


def test_other_stray_signals_do_nothing_to_a_worker(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server, RawClient(server.port) as client:
        (worker,) = server.worker_pids()
        mark = server.mark()
        for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGTTIN", "SIGTTOU", "SIGCHLD", "SIGPIPE"):
            os.kill(worker, getattr(signal, name))
            assert check(client.request("GET", "/")).pid == worker
        assert server.lines(mark) == []


@each_interface
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT], ids=lambda number: number.name)
def test_a_crash_leaves_its_stacks_in_the_log(tmp_path: Path, interface: str, number: signal.Signals) -> None:
    with serving(tmp_path, interface) as server:
        os.kill(server.worker_pids()[0], number)
        server.wait_line(f"error worker 1 gen 1 gone: died of {number.name}")
        server.wait_line("Fatal Python error|Current thread")
        server.wait_line("worker 2 gen 1 ready")
        assert ask(server.port).version == "one"


@each_interface
def test_a_worker_that_ends_itself_is_replaced(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface) as server:
        with RawClient(server.port) as client:
            client.send(request_bytes("GET", "/exit"))
            with pytest.raises((AssertionError, ConnectionResetError)):
                client.read_response()
        server.wait_line("error worker 1 gen 1 gone: exit 7 .* the requests that it had in progress are lost")
        server.wait_line("worker 2 gen 1 ready")
        assert ask(server.port).version == "one"


# ------------------------------------------------------------------------------------------------- applications' ways

FORKING = """
if os.fork() == 0:
    # A side process of the application, which has copies of every descriptor of the worker.
    try:
        while not os.path.exists("end-side"):
            time.sleep(0.02)
    finally:
        os._exit(0)
"""


def test_a_side_process_of_the_application_does_not_hide_a_death(tmp_path: Path) -> None:
    """It holds the channel of the worker open, so the channel does not end with the worker."""
    with serving(tmp_path, "asgi", extra=FORKING) as server:
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_line("worker 1 gen 1 gone: died of SIGKILL")
        server.wait_line("worker 2 gen 1 ready")
        (tmp_path / "end-side").touch()


def test_the_reason_of_a_failed_boot_comes_whole_however_long(tmp_path: Path) -> None:
    deep = "def f(n):\n    return f(n - 1) if n else 1 / 0\n\nraise ValueError('ä' * 30_000 + 'the end')\n"
    write_app(tmp_path, "app", deep)
    with Server("app:app", cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3
    assert "ValueError: ää" in server.log
    assert "ä" * 30_000 + "the end" in server.log


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_subprocess_of_the_application_inherits_nothing_of_ours(tmp_path: Path) -> None:
    """No listener, no channel, no ignored or blocked signals (as `close_fds=False` would show)."""
    extra = r"""
import subprocess, sys
code = '''
import os
fds = {fd: os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2}
print("inherited", *(f"{fd}={path}" for fd, path in fds.items() if "/fd" not in path), flush=True)
print(open("/proc/self/status").read(), flush=True)
'''
subprocess.run([sys.executable, "-c", code], close_fds=False)
"""
    with serving(tmp_path, "asgi", extra=extra) as server:
        assert server.wait_line("^inherited.*$")[0] == "inherited"
        ignored = int(server.wait_line(r"^SigIgn:\t(\w+)$")[1], 16)
        blocked_signals = int(server.wait_line(r"^SigBlk:\t(\w+)$")[1], 16)
    # Python itself ignores SIGPIPE and SIGXFSZ; what is above SIGSYS is the C library's.
    numbers = {number for number in range(1, signal.SIGSYS + 1) if (ignored | blocked_signals) >> number - 1 & 1}
    assert numbers <= {signal.SIGPIPE, signal.SIGXFSZ}


def test_a_worker_leaves_no_process_behind(tmp_path: Path) -> None:
    with serving(tmp_path, "wsgi", "--workers", "2") as server:
        pids = [server.pid, *server.children()]
        assert len(pids) == 4
        assert server.stop() == 0
        wait_for(lambda: not any(alive(pid) for pid in pids))
