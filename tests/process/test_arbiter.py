"""The arbiter against real processes: start and stop, signals, deaths of every kind of process, and what is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.load import INTERFACES, Load, announces_close, ask, check, serving, site
from tests.support import (
    RawClient,
    Server,
    alive,
    descendants,
    linux,
    pid_namespace,
    processes,
    refused,
    request_bytes,
    wait_for,
    write_app,
)

each_interface = pytest.mark.parametrize("interface", INTERFACES)


def ready_workers(server: Server, count: int) -> list[int]:
    """Wait until that many workers are there and all of them have said that they are ready; their pids."""

    def settled() -> list[int]:
        pids = server.worker_pids()
        ready = set(re.findall(r"(worker \d+) gen \d+ ready", server.log))
        gone = set(re.findall(r"(worker \d+) gen \d+ gone", server.log))
        return pids if len(pids) == len(ready - gone) == count else []

    return wait_for(settled, what=f"{count} ready workers")


def fork_servers(server: Server) -> list[int]:
    return [process.pid for process in processes() if process.parent == server.pid and process.state != "Z"]


def ends(client: RawClient) -> bool:
    """Whether the connection ends without an answer, by a close or a reset."""
    try:
        return client.eof()
    except ConnectionResetError:
        return True


# ------------------------------------------------------------------------------------------------- start and stop


@each_interface
def test_the_log_of_a_life_reads_as_a_transcript(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface, "--workers", "2") as server:
        assert ask(server.port).version == "one"
        assert server.stop() == 0
    lines = [re.sub(r"^\S+ \S+ \S+ \[\d+\] ", "", line) for line in server.log.splitlines() if "app one" not in line]
    said = {
        "hello": rf"info apphost \S+ on Python \S+ starts app:app with 2 workers, pid {server.pid}",
        "listening": rf"info listening at http://127\.0\.0\.1:{server.port}",
        "booting": r"info worker [12] gen 1 booting, pid \d+",
        "ready": rf"info worker [12] gen 1 ready in \d+\.\d\d s \({interface}, \w+, \w+\)",
        "serving": r"info generation 1 is serving app:app with 2 workers, \d+\.\d\d s after it was asked for",
        "signal": r"info SIGTERM received",
        "draining": r"info worker [12] gen 1 draining: stop",
        "gone": r"info worker [12] gen 1 gone: exit 0 after \d+\.\d s, [01] requests?",
        "end": r"info stopped, exit 0",
    }
    story = [next((kind for kind, text in said.items() if re.fullmatch(text, line)), line) for line in lines]
    assert [*story[:2], *sorted(story[2:6]), story[6]] == [
        "hello", "listening", "booting", "booting", "ready", "ready", "serving",
    ]  # fmt: skip
    assert story[7:] == ["signal", "draining", "draining", "gone", "gone", "end"]


@each_interface
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_graceful_stop_finishes_requests_in_progress(tmp_path: Path, interface: str, number: signal.Signals) -> None:
    with (
        serving(tmp_path, interface, "--stop-timeout", "60") as server,
        RawClient(server.port) as client,
        RawClient(server.port) as idle,
    ):
        check(idle.request("GET", "/"))
        client.send(request_bytes("POST", "/wait/go", body=b"long"))
        server.wait_line("/wait/go in progress")
        server.signal(number)
        server.wait_line("worker 1 gen 1 draining: stop")
        wait_for(lambda: refused(server.port), what="new connections to be refused")
        assert idle.eof(), "a silent connection is closed, and nobody waits for it"
        (tmp_path / "go").touch()
        response = client.read_response()
        assert check(response, b"long").version == "one"
        assert announces_close(response)
        assert client.eof()
        assert server.wait_exit() == 0
    if interface == "asgi":
        assert "app one: lifespan.shutdown" in server.log
    assert "worker 1 gen 1 gone: exit 0" in server.log


@each_interface
@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGQUIT,),
        (signal.SIGINT, signal.SIGQUIT),
    ],
    ids=lambda numbers: "-".join(number.name for number in numbers),
)
def test_a_stop_at_once(tmp_path: Path, interface: str, numbers: tuple[signal.Signals, ...]) -> None:
    with serving(tmp_path, interface, "--stop-timeout", "600") as server, RawClient(server.port) as client:
        client.send(request_bytes("GET", "/wait/never"))
        server.wait_line("/wait/never in progress")
        mark = server.mark()
        for number in numbers:
            server.signal(number)
            server.wait_line(f"{number.name} received", after=mark)
            mark = server.mark() if number is numbers[0] else mark
        assert server.wait_exit() == 0, "long before stop_timeout"
        assert ends(client)


@each_interface
def test_the_whole_stop_keeps_to_stop_timeout(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface, "--stop-timeout", "1.5") as server, RawClient(server.port) as client:
        client.send(request_bytes("GET", "/wait/never"))
        server.wait_line("/wait/never in progress")
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert ends(client)
    assert re.search("cut 1 requests? short at the end of its drain: GET /wait/never", server.log)


def stopped_with_a_backlog(server: Server, stop: Callable[[], None]) -> list[RawClient]:
    """Connections with requests that wait in the backlog, not accepted, while the server is told to stop."""
    (worker,) = ready_workers(server, 1)
    os.kill(worker, signal.SIGSTOP)
    wait_for(lambda: any(process.pid == worker and process.state == "T" for process in processes()))
    clients = [RawClient(server.port) for _ in range(30)]  # far more than are accepted at a turn of the loop
    for client in clients:
        client.send(request_bytes("POST", "/", body=b"queued"))
    stop()
    os.kill(worker, signal.SIGCONT)
    return clients


@each_interface
def test_a_stop_serves_the_backlog(tmp_path: Path, interface: str) -> None:
    def stop() -> None:
        server.signal(signal.SIGTERM)
        server.wait_line("worker 1 gen 1 draining: stop")

    with serving(tmp_path, interface) as server:
        for client in stopped_with_a_backlog(server, stop):
            with client:
                assert check(client.read_response(), b"queued").version == "one"
        assert server.wait_exit() == 0


def test_a_stop_of_the_whole_group_serves_the_backlog(tmp_path: Path) -> None:
    """As systemd does it by default: every process gets the signal."""
    with serving(tmp_path, "asgi") as server:
        for client in stopped_with_a_backlog(server, lambda: os.killpg(server.pid, signal.SIGTERM)):
            with client:
                assert check(client.read_response(), b"queued").version == "one"
        assert server.wait_exit() == 0


@each_interface
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_of_the_whole_group_is_graceful(tmp_path: Path, interface: str, number: signal.Signals) -> None:
    args = ("--workers", "2", "--stop-timeout", "60")
    with serving(tmp_path, interface, *args) as server, RawClient(server.port) as client:
        client.send(request_bytes("POST", "/wait/go", body=b"long"))
        server.wait_line("/wait/go in progress")
        os.killpg(server.pid, number)
        server.wait_line(f"{number.name} received")
        wait_for(lambda: refused(server.port), what="new connections to be refused")
        (tmp_path / "go").touch()
        assert check(client.read_response(), b"long").version == "one"
        assert server.wait_exit() == 0
    assert "could not boot" not in server.log
    assert "died of" not in server.log


# ------------------------------------------------------------------------------------------------- scaling


def test_one_worker_more_and_one_fewer(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server, Load(server.port, clients=3) as load:
        server.signal(signal.SIGTTIN)
        first = ready_workers(server, 2)
        server.signal(signal.SIGTTIN)
        assert set(first) < set(ready_workers(server, 3))
        server.reload()  # what TTIN has set stays
        wait_for(lambda: len(set(server.worker_pids()) - set(first)) == len(ready_workers(server, 3)))
        for workers in (2, 1):
            server.signal(signal.SIGTTOU)
            ready_workers(server, workers)
        mark = server.mark()
        server.signal(signal.SIGTTOU)  # never below one
        server.wait_line("SIGTTOU received", after=mark)
        load.wait(20)
        assert len(ready_workers(server, 1)) == 1
        assert not [line for line in server.lines(mark) if "draining" in line]
    assert load.report.lost == []


# ------------------------------------------------------------------------------------------------- deaths


@each_interface
def test_a_killed_worker_is_replaced(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface, "--workers", "2") as server:
        victim, other = ready_workers(server, 2)
        os.kill(victim, signal.SIGKILL)
        server.wait_line(r"error worker \d gen 1 gone: died of SIGKILL")
        after = ready_workers(server, 2)
        assert other in after
        assert victim not in after
        assert ask(server.port).pid in after


CRASHING = """
import threading

def crash():
    while not os.path.exists("crash"):
        time.sleep(0.01)
    time.sleep(0.05)  # it becomes ready first
    os._exit(9)

threading.Thread(target=crash, daemon=True).start()
"""


@pytest.mark.parametrize("when", ["after-ready", "while-booting"])
def test_a_crash_loop_backs_off_and_heals(tmp_path: Path, when: str) -> None:
    crash = tmp_path / "crash"
    booting = "\nif os.path.exists('crash'): os._exit(9)\n"
    with serving(tmp_path, "asgi", extra=CRASHING if when == "after-ready" else booting) as server:
        mark = server.mark()
        busy = cpu_seconds(server.pid)
        started = time.monotonic()
        crash.touch()
        if when == "while-booting":
            os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_line("worker 6 gen 1 booting", after=mark)
        # 0.1 + 0.2 + 0.4 + 0.8 + 1.6 s
        assert time.monotonic() - started > 2.9
        assert len([line for line in server.lines(mark) if " booting" in line]) <= 6
        assert cpu_seconds(server.pid) - busy < 1, "it sleeps in between"
        crash.unlink()
        server.reload()  # it does not wait for the pause to end
        assert ask(server.port).version == "one"


def cpu_seconds(pid: int) -> float:
    if not os.path.exists("/proc/self/stat"):
        return 0.0
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@each_interface
def test_without_their_fork_server_workers_go_on(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface, "--workers", "2") as server:
        before = ready_workers(server, 2)
        with Load(server.port, clients=3) as load:
            (fork_server,) = [pid for pid in fork_servers(server) if pid not in before]
            os.kill(fork_server, signal.SIGKILL)
            server.wait_line("the fork server of generation 1 is gone: died of SIGKILL")
            load.wait(50)
            assert server.worker_pids() == before
            server.signal(signal.SIGTTIN)  # the next worker needs a new fork server
            ready_workers(server, 3)
        assert load.report.lost == []
        os.kill(before[0], signal.SIGKILL)  # one whose parent is gone
        how = "died of SIGKILL" if sys.platform == "linux" else "ended without a status"
        server.wait_line(rf"worker \d gen 1 gone: {how}")
        ready_workers(server, 3)
        server.reload()
        wait_for(lambda: not any(alive(pid) for pid in before), what="the old workers to go")
        assert ask(server.port).version == "one"


def test_a_fork_server_that_dies_while_a_deploy_boots(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server:
        write_app(tmp_path, "app", "import time; time.sleep(600)")
        server.reload(wait=False)
        server.wait_line("worker 2 gen 2 booting")
        booting = server.worker_pids()[-1]
        (fork_server,) = [process.parent for process in processes() if process.pid == booting]
        os.kill(fork_server, signal.SIGKILL)
        server.wait_line("the fork server of generation 2 is gone: died of SIGKILL")
        os.kill(booting, signal.SIGKILL)
        server.wait_line("generation 2 given up")
        write_app(tmp_path, "app", site("asgi", "two"))
        assert server.reload() == 3
        assert ask(server.port).version == "two"


@linux
def test_a_stop_does_not_wait_for_a_fork_server_that_is_stopped(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", "--stop-timeout", "1") as server:
        (fork_server,) = fork_servers(server)
        os.kill(fork_server, signal.SIGSTOP)
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0


@each_interface
def test_without_the_arbiter_workers_finish_and_go(tmp_path: Path, interface: str) -> None:
    pidfile = tmp_path / "apphost.pid"
    with serving(tmp_path, interface, "--pidfile", str(pidfile), "--workers", "2") as server:
        port = server.port
        children = server.children()
        with RawClient(port) as client, RawClient(port) as idle:
            check(idle.request("GET", "/"))
            client.send(request_bytes("POST", "/wait/go", body=b"long"))
            server.wait_line("/wait/go in progress")
            server.signal(signal.SIGKILL)
            assert server.wait_exit() == -signal.SIGKILL
            wait_for(lambda: refused(port), what="the port to be free")
            assert announces_close(idle.request("GET", "/"))
            # Another one can start now, beside the request in progress, on the same port and the stale pidfile.
            assert pidfile.read_text() == f"{server.pid}\n"
            options = ("--pidfile", str(pidfile), "--bind", f"127.0.0.1:{port}")
            with Server("app:app", *options, cwd=tmp_path) as successor:
                assert ask(port).pid in successor.worker_pids()
                assert pidfile.read_text() == f"{successor.pid}\n"
                (tmp_path / "go").touch()
                assert check(client.read_response(), b"long").version == "one"
                assert client.eof()
                assert successor.stop() == 0
        wait_for(lambda: not any(alive(pid) for pid in children), what="every process of the first one to go")
        assert not pidfile.exists()


def test_without_the_arbiter_silent_connections_are_closed_politely(tmp_path: Path) -> None:
    """At graceful_timeout, and not with a reset."""
    with serving(tmp_path, "asgi", "--graceful-timeout", "1") as server:
        children = server.children()
        with RawClient(server.port) as used, RawClient(server.port) as unused, RawClient(server.port) as half:
            check(used.request("GET", "/"))
            half.send(b"GET / HT")
            started = time.monotonic()
            server.signal(signal.SIGKILL)
            assert used.eof()
            assert unused.eof()
            assert time.monotonic() - started > 0.5
            if not half.eof():
                assert half.read_response().status == 408
        assert server.wait_exit() == -signal.SIGKILL
        wait_for(lambda: not any(alive(pid) for pid in children))
        assert "cut" not in server.log


STUCK = """
plain = app
async def app(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/stuck":
        say("stuck")
        time.sleep(600)
    await plain(scope, receive, send)
"""


def test_without_the_arbiter_a_stuck_worker_is_killed(tmp_path: Path) -> None:
    """It cannot notice; and in the end the port is free in spite of it."""
    with serving(tmp_path, "asgi", "--graceful-timeout", "0.5", extra=STUCK) as server:
        children = server.children()
        with RawClient(server.port) as client:
            client.send(request_bytes("GET", "/stuck"))
            server.wait_line("^stuck")
            server.signal(signal.SIGKILL)
            assert server.wait_exit() == -signal.SIGKILL
            wait_for(lambda: not any(alive(pid) for pid in children), what="every process to go")
        assert refused(server.port)


HANGS = """
print("hangs", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("preload", [False, True])
def test_without_the_arbiter_an_import_ends(tmp_path: Path, preload: bool) -> None:
    """Who imports the application, for ever perhaps, must not keep the port from another start."""
    if preload and not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells a process that is busy that its parent has gone")
    options = ("--preload",) if preload else ()
    with serving(tmp_path, "asgi", *options, "--graceful-timeout", "30") as server:
        port = server.port
        write_app(tmp_path, "app", site("asgi", "two", extra=HANGS))
        server.signal(signal.SIGUSR1)
        server.wait_line("^hangs")
        children = server.children()
        server.signal(signal.SIGKILL)
        assert server.wait_exit() == -signal.SIGKILL
        wait_for(lambda: not any(alive(pid) for pid in children), what="every process to go")
        write_app(tmp_path, "app", site("asgi", "three"))
        with Server("app:app", "--bind", f"127.0.0.1:{port}", cwd=tmp_path) as successor:
            assert ask(port).version == "three"
            assert successor.stop() == 0


def test_without_the_arbiter_the_backlog_is_served(tmp_path: Path) -> None:
    """Nobody else would."""

    def kill() -> None:
        server.signal(signal.SIGKILL)
        assert server.wait_exit() == -signal.SIGKILL

    with serving(tmp_path, "asgi") as server:
        for client in stopped_with_a_backlog(server, kill):
            with client:
                assert check(client.read_response(), b"queued").version == "one"


# ------------------------------------------------------------------------------------------- strangers, zombies, pid 1


def reaps_orphans(server: Server, arbiter: int, folder: Path) -> None:
    """An orphan of the application becomes the arbiter's child, and no zombie is left when it ends."""
    before = {process.pid for process in processes() if process.parent == arbiter}
    with RawClient(server.port) as client:
        client.request("GET", "/orphan", [("Connection", "close")])
    (orphan,) = [process.pid for process in processes() if process.parent == arbiter and process.pid not in before]
    (folder / "end-orphan").touch()
    wait_for(lambda: not any(process.pid == orphan for process in processes()), what="the orphan to be reaped")


@linux
@each_interface
def test_orphans_of_the_application_are_reaped(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface) as server:
        reaps_orphans(server, server.pid, tmp_path)
        assert ask(server.port).pid in ready_workers(server, 1)


@linux
def test_as_process_1(tmp_path: Path) -> None:
    """As in a container without an init: no default action of a signal helps, and every orphan is ours."""
    with serving(tmp_path, "asgi", "--workers", "2", prefix=pid_namespace()) as server:
        arbiter = descendants(server.pid)[0]
        assert "starts app:app with 2 workers, pid 1" in server.log
        server.wait_line("generation 1 is serving")
        reaps_orphans(server, arbiter, tmp_path)
        write_app(tmp_path, "app", site("asgi", "two"))
        os.kill(arbiter, signal.SIGUSR1)
        server.wait_line("generation 2 is serving")
        assert ask(server.port).version == "two"
        os.kill(arbiter, signal.SIGTERM)
        assert server.wait_exit() == 0
        assert "stopped, exit 0" in server.log


# ------------------------------------------------------------------------------------------------- the pidfile


def test_the_pidfile_of_a_running_server_is_respected(tmp_path: Path) -> None:
    pidfile = tmp_path / "apphost.pid"
    with serving(tmp_path, "asgi", "--pidfile", str(pidfile)) as server:
        with Server("app:app", "--pidfile", str(pidfile), cwd=tmp_path, until=None) as second:
            assert second.wait_exit() == 5
            assert f"process {server.pid} holds the pidfile" in second.log
        assert pidfile.read_text() == f"{server.pid}\n"
        assert ask(server.port).version == "one"


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        write_app(tmp_path, "app", site("asgi"))
        with Server("app:app", "--bind", f"127.0.0.1:{port}", cwd=tmp_path, until=None) as server:
            assert server.wait_exit() == 4
            assert "another process is listening there already" in server.log
