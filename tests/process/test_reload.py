"""Deploys against real processes: new code is taken over, a bad deploy is survived, and no client loses a request."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.load import INTERFACES, Load, announces_close, ask, check, deploy, serving, site
from tests.support import (
    RawClient,
    Server,
    alive,
    descendants,
    processes,
    request_bytes,
    wait_for,
    write_app,
)

RELOADS = [signal.SIGHUP, signal.SIGUSR1]
PLAIN = ("--http", "h11", "--loop", "asyncio")

each_interface = pytest.mark.parametrize("interface", INTERFACES)


def fewest_ready(log: str, workers: int) -> int:
    """The fewest workers that were ready at once between the moment the first generation served and the stop."""
    ready: set[str] = set()
    fewest = None
    for line in log.splitlines():
        if match := re.search(r"(worker \d+) gen \d+ ready", line):
            ready.add(match[1])
        elif match := re.search(r"(worker \d+) gen \d+ (draining|gone|is stuck)", line):
            ready.discard(match[1])
        if len(ready) >= workers or fewest is not None:
            fewest = len(ready) if fewest is None else min(fewest, len(ready))
        if "SIGTERM received" in line:
            break
    assert fewest is not None, "the first generation never served"
    return fewest


# ---------------------------------------------------------------------------------- the load client can count


@contextlib.contextmanager
def wayward(*answers: bytes) -> Iterator[int]:
    """The port of a server that gives each connection these answers, one for each request that it reads, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with sock, contextlib.suppress(OSError):
                    for answer in answers:
                        sock.recv(1 << 16)
                        sock.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def good(headers: bytes = b"") -> bytes:
    body = b"one 1 0 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (headers, len(body), body)


@pytest.mark.parametrize(
    ("answers", "lost"),
    [
        ([good()], "the connection ended|Reset|BrokenPipe|empty"),
        ([], "the connection ended|Reset|BrokenPipe"),
        ([good()[:-1]], "bytes too early"),
        ([good().replace(b"200 OK", b"503 Busy")], "status 503"),
        ([good().replace(b"e3b0", b"f3b0")], "another body"),
    ],
    ids=["silent-close", "no-answer", "cut", "no-2xx", "wrong"],
)
def test_the_load_client_counts_what_is_lost(answers: list[bytes], lost: str) -> None:
    with wayward(*answers) as port, Load(port, clients=1) as load:
        load.wait(4)
    assert load.report.lost
    assert re.search(lost, load.report.lost[0])
    assert not load.report.announced


def test_the_load_client_counts_a_refused_connection() -> None:
    with wayward() as port:
        pass
    with Load(port, clients=1) as load:
        load.wait(2)
    assert "Refused" in load.report.lost[0]


def test_an_announced_close_is_no_loss() -> None:
    with wayward(good(b"Connection: close\r\n")) as port, Load(port, clients=1) as load:
        wait_for(lambda: load.report.announced)
    # Its second request is a POST, which this answer does not fit.
    assert load.report.answered >= 1
    assert not [loss for loss in load.report.lost if "received" not in loss]


def test_the_fewest_ready_workers_are_counted() -> None:
    log = ["worker 1 gen 1 booting, pid 7", "worker 1 gen 1 ready in 0 s", "worker 2 gen 1 ready in 0 s"]
    assert fewest_ready("\n".join(log), 2) == 2
    log += ["worker 1 gen 1 draining: reload", "worker 3 gen 2 ready in 0 s"]
    assert fewest_ready("\n".join(log), 2) == 1
    assert fewest_ready("\n".join([*log[:3], "SIGTERM received", *log[3:]]), 2) == 2


# ------------------------------------------------------------------------------------------------- new code


@each_interface
@pytest.mark.parametrize("number", RELOADS, ids=lambda number: number.name)
def test_a_reload_picks_up_new_code(tmp_path: Path, interface: str, number: signal.Signals) -> None:
    with serving(tmp_path, interface) as server:
        before = ask(server.port)
        write_app(tmp_path, "app", site(interface, "two"))
        mark = server.mark()
        server.signal(number)
        server.wait_line(f"{number.name} received", after=mark)
        server.wait_line("generation 2 is serving app:app with 1 worker, ", after=mark)
        after = ask(server.port)
        assert (before.version, after.version) == ("one", "two")
        wait_for(lambda: not alive(before.pid), what="the old worker to go")


@each_interface
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_are_replaced_one_by_one_behind_ready_ones(tmp_path: Path, interface: str, workers: int) -> None:
    with serving(tmp_path, interface, "--workers", str(workers)) as server:
        with Load(server.port) as load:
            for version in ("two", "three"):
                load.wait(100)
                deploy(server, interface, version, "\ntime.sleep(0.3)\n")  # as it boots, the old ones serve
            load.wait(100)
        assert server.stop() == 0
    assert fewest_ready(server.log, workers) == workers
    order = re.findall(r"worker (\d+) gen 2 (ready|draining)|worker (\d+) gen 1 (draining)", server.log)
    events = [(first and f"new {what}") or f"old {old}" for first, what, _, old in order]
    assert events[: 2 * workers] == ["new ready", "old draining"] * workers
    assert load.report.lost == []
    assert load.report.versions == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("interface", "flavour", "reloads"),
    [("asgi", (), 6), ("wsgi", (), 6), ("asgi", PLAIN, 4)],
    ids=["asgi", "wsgi", "asgi-plain"],
)
def test_reloads_under_load_lose_no_request(
    tmp_path: Path, interface: str, flavour: tuple[str, ...], reloads: int
) -> None:
    """Keep-alive clients, GET and POST, no retries: a connection ends only where the answer before has said so."""
    with serving(tmp_path, interface, "--workers", "2", *flavour) as server:
        with Load(server.port, clients=6) as load:
            load.wait(50)
            for _ in range(reloads):
                server.reload()
                load.wait(20)
        generation = int(re.findall(r"generation (\d+) is serving", server.log)[-1])
    assert generation == reloads + 1
    report = load.report
    assert report.lost == []
    assert len(report.pids) > reloads / 2, "the clients have met the workers of most generations"
    assert fewest_ready(server.log, 2) == 2
    assert server.log.count("gone: exit 0") == server.log.count(" booting, pid ")


def test_a_switched_symlink_is_followed(tmp_path: Path) -> None:
    """The usual layout of deploys: the server runs in `current`, a link to the newest release."""
    for version in ("one", "two"):
        write_app(tmp_path / version, "app", site("asgi", version))
    current = tmp_path / "current"
    current.symlink_to("one")
    with Server("app:app", cwd=current, env={"PWD": str(current)}) as server:
        assert ask(server.port).version == "one"
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(current)
        shutil.rmtree(tmp_path / "one")
        server.reload()
        assert ask(server.port).version == "two"
        assert server.stop() == 0


def test_requests_in_progress_finish_on_the_old_code(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server, RawClient(server.port) as client:
        client.send(request_bytes("POST", "/wait/go", body=b"long"))
        server.wait_line("/wait/go in progress")
        deploy(server, "asgi", "two")
        assert ask(server.port).version == "two"
        (tmp_path / "go").touch()
        assert check(client.read_response(), b"long").version == "one"
        server.wait_line("worker 1 gen 1 gone: exit 0")


def test_a_threaded_request_in_progress_finishes_on_the_old_code(tmp_path: Path) -> None:
    with serving(tmp_path, "wsgi", "--threads", "2") as server, RawClient(server.port) as client:
        client.send(request_bytes("POST", "/wait/go", body=b"long"))
        server.wait_line("/wait/go in progress")
        deploy(server, "wsgi", "two")
        assert ask(server.port).version == "two"
        (tmp_path / "go").touch()
        assert check(client.read_response(), b"long").version == "one"
        server.wait_line("worker 1 gen 1 gone: exit 0")


# ------------------------------------------------------------------------------------------------- draining


@each_interface
def test_idle_connections_are_served_on(tmp_path: Path, interface: str) -> None:
    """Either the new worker has the connection, or the old one answers once more and announces its close."""
    with serving(tmp_path, interface) as server, RawClient(server.port) as used, RawClient(server.port) as unused:
        old = check(used.request("GET", "/")).pid
        deploy(server, interface, "two")
        for client in (used, unused):
            response = client.request("POST", "/", body=b"late")
            answer = check(response, b"late")
            assert answer.version == "two" or (answer.pid == old and announces_close(response))
        server.wait_line("worker 1 gen 1 gone: exit 0")


@each_interface
def test_a_request_that_outlasts_graceful_timeout_is_cut_and_named(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface, "--graceful-timeout", "0.5") as server, RawClient(server.port) as client:
        client.send(request_bytes("GET", "/wait/never"))
        server.wait_line("/wait/never in progress")
        server.reload()
        server.wait_line(r"worker 1 gen 1 cut 1 requests? short .*GET /wait/never")
        server.wait_line("worker 1 gen 1 gone")
        with pytest.raises((ConnectionResetError, AssertionError)):
            client.read_response()
        assert ask(server.port).version == "one"


# ------------------------------------------------------------------------------------------- deploys that fail

BROKEN = {
    "ImportError": ("import no_such_module\n", "No module named 'no_such_module'"),
    "SyntaxError": ("def app(:\n", "SyntaxError"),
    "attribute": ("application_ = 1\n", "has no attribute 'app'"),
    "exception": ("raise RuntimeError('no database')\n", "no database"),
    "deep": ("def app(n): app(n + 1)\n\n\napp(0)\n", "RecursionError"),
    "sys.exit": ("import sys; sys.exit(0)\n", "SystemExit"),
    "os._exit": ("import os; os._exit(0)\n", "exit 0"),
    "killed": ("import os; os.kill(os.getpid(), 9)\n", "SIGKILL"),
    "segfault": ("import os; os.kill(os.getpid(), 11)\n", "Segmentation fault"),
    "hang": ("import time\ndef hang_here(): time.sleep(600)\nhang_here()\n", "boot_timeout"),
    "lifespan": (
        "async def app(_, __, send): await send({'type': 'lifespan.startup.failed', 'message': 'no database'})\n",
        "no database",
    ),
    "lifespan hangs": ("import asyncio\nasync def app(*_): await asyncio.sleep(600)\n", "boot_timeout"),
    "no callable": ("app = 3\n", "cannot be called"),
}


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    """One server that all the failing deploys are tried on: it must survive them one after the other."""
    with serving(tmp_path_factory.mktemp("survivor"), request.param, "--boot-timeout", "6") as server:
        yield server


@pytest.mark.parametrize(
    ("survivor", "kind"),
    [*(("asgi", kind) for kind in BROKEN), *(("wsgi", kind) for kind in ("exception", "os._exit", "hang"))],
    indirect=["survivor"],
)
def test_a_broken_deploy_keeps_the_old_code_serving(
    survivor: Server, kind: str, request: pytest.FixtureRequest
) -> None:
    server = survivor
    interface = request.node.callspec.params["survivor"]
    source, told = BROKEN[kind]
    before = ask(server.port)
    write_app(server.cwd, "app", source)
    mark = server.mark()
    server.signal(signal.SIGUSR1)
    match = server.wait_line(r"generation (\d+) given up: .*Generation (\d+) keeps serving", after=mark)
    server.wait_line(re.escape(told), after=mark)
    said = "\n".join(server.lines(mark))
    assert re.search(r"given up: (?!it could not boot\.)", said), "the reason"
    server.wait_line("could not boot: ", after=mark)
    if kind == "hang":
        server.wait_line("hang_here", after=mark)  # the stack
    assert ask(server.port) == before
    assert server.process is not None
    assert server.process.poll() is None

    new = deploy(server, interface, f"after-{kind.replace(' ', '-')}")
    assert new == int(match[1]) + 1
    after = ask(server.port)
    assert after.version == f"after-{kind.replace(' ', '-')}"
    wait_for(lambda: len(server.children()) == 2, what="only the new fork server and its worker to be left")


SETTINGS = [
    ("workers = \n", "not valid TOML"),
    ("worker = 3\n", "Did you mean 'workers'"),
    ("workers = 'many'\n", "bad value 'many' for workers"),
    ("chdir = 'nowhere'\n", "nowhere"),
    ("access_log = 'nowhere/access.log'\n", "cannot open the access log"),
]


@pytest.mark.parametrize(("content", "told"), SETTINGS, ids=["toml", "unknown", "value", "directory", "log"])
def test_broken_settings_keep_the_old_code_serving(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "apphost.toml"
    file.write_text("workers = 1\n")
    with serving(tmp_path, "asgi") as server:
        before = ask(server.port)
        file.write_text(content)
        server.signal(signal.SIGUSR1)
        server.wait_line("generation 2 given up: .*Generation 1 keeps serving")
        assert told in server.log
        assert ask(server.port) == before
        file.write_text("workers = 2\n")
        assert deploy(server, "asgi", "two") == 3
        assert ask(server.port).version == "two"


def test_the_old_code_serves_while_the_new_one_hangs(tmp_path: Path) -> None:
    with serving(tmp_path, "wsgi", "--workers", "2", "--boot-timeout", "6") as server:
        with Load(server.port) as load:
            write_app(tmp_path, "app", BROKEN["hang"][0])
            server.reload(wait=False)
            server.wait_line("generation 2 given up")
            load.wait(50)
            write_app(tmp_path, "app", site("wsgi", "two"))
            server.reload()
            load.wait(50)
        assert load.report.lost == []
        assert load.report.versions == ["one", "two"]
    assert fewest_ready(server.log, 2) == 2


@pytest.mark.parametrize("kind", ["exception", "os._exit", "hang", "lifespan"])
def test_a_first_start_that_fails_ends_with_the_reason(tmp_path: Path, kind: str) -> None:
    source, told = BROKEN[kind]
    write_app(tmp_path, "app", source)
    with Server("app:app", "--boot-timeout", "6", "--workers", "2", cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3
        assert told in server.log
        assert "stopped, exit 3" in server.log


# -------------------------------------------------------------------------------------- events on top of events


def newest(server: Server, what: str) -> int:
    """The highest number of a generation of which the log says that."""
    return max(map(int, re.findall(what.format(r"(\d+)"), server.log)))


@each_interface
def test_a_storm_of_reloads_ends_with_the_newest_code(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface, "--workers", "2") as server:
        with Load(server.port) as load:
            for version in range(40):
                write_app(tmp_path, "app", site(interface, f"v{version}"))
                server.signal(RELOADS[version % 2])
                load.wait(3)
            wait_for(lambda: load.report.versions[-1] == "v39", what="the newest code")
            wait_for(lambda: newest(server, "gen {} booting") == newest(server, "generation {} is serving"))
        generations = {int(match) for match in re.findall(r"generation (\d+) is serving", server.log)}
        assert max(generations) < 41, "reloads that come while one boots are one"
        assert load.report.lost == []
    assert fewest_ready(server.log, 2) == 2


def test_reload_signals_to_every_process_kill_nothing(tmp_path: Path) -> None:
    """A careless `pkill -USR1 -f` reaches processes between fork and their handlers too."""
    stop = threading.Event()

    def shower(pid: int) -> None:
        while not stop.is_set():
            for child in (pid, *descendants(pid)):
                for number in RELOADS:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, number)

    with serving(tmp_path, "asgi", "--workers", "2") as server, Load(server.port, clients=2) as load:
        thread = threading.Thread(target=shower, args=(server.pid,))
        thread.start()
        try:
            for _ in range(4):
                server.wait_line("gone: exit 0", after=server.mark())
        finally:
            stop.set()
            thread.join()
        wait_for(lambda: load.report.answered > 50)
        server.reload()
    assert load.report.lost == []
    assert not re.search("died of SIG(HUP|USR1)", server.log)
    assert "could not boot" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT], ids=lambda number: number.name)
def test_a_stop_in_the_middle_of_a_reload(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, "asgi", "--stop-timeout", "600", "--boot-timeout", "600") as server:
        write_app(tmp_path, "app", BROKEN["hang"][0])
        server.reload(wait=False)
        server.wait_line("worker 2 gen 2 booting")
        server.signal(number)
        assert server.wait_exit() == 0, "long before either"


def test_scaling_in_the_middle_of_a_reload(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server:
        write_app(tmp_path, "app", site("asgi", "two", "\nwhile not os.path.exists('boot'): time.sleep(0.01)\n"))
        server.reload(wait=False)
        server.wait_line("worker 2 gen 2 booting")
        server.signal(signal.SIGTTIN)
        server.wait_line("worker 3 gen 1 booting|SIGTTIN received")
        (tmp_path / "boot").touch()
        server.wait_line("generation 2 is serving app:app with 2 workers")
        wait_for(lambda: len(server.worker_pids()) == 2)
        assert {ask(server.port).version for _ in range(10)} == {"two"}


def test_a_newer_reload_replaces_one_that_hangs(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server:
        write_app(tmp_path, "app", BROKEN["hang"][0])
        server.reload(wait=False)
        server.wait_line("worker 2 gen 2 booting")
        write_app(tmp_path, "app", site("asgi", "two"))
        server.reload(wait=False)  # long before boot_timeout, which is a minute
        server.wait_line("generation 3 is serving")
        assert ask(server.port).version == "two"


# ------------------------------------------------------------------------------------------------- settings


def test_a_changed_number_of_workers_is_adopted(tmp_path: Path) -> None:
    file = tmp_path / "apphost.toml"
    file.write_text("workers = 1\n")
    with serving(tmp_path, "asgi") as server:
        for workers in (3, 2):
            file.write_text(f"workers = {workers}\n")
            server.reload()
            wait_for(lambda wanted=workers: len(server.worker_pids()) == wanted, what=f"{workers} workers")
        server.wait_line("generation 2 is serving app:app with 3 workers")
        server.wait_line("generation 3 is serving app:app with 2 workers")


def test_a_changed_application_and_log_are_adopted(tmp_path: Path) -> None:
    write_app(tmp_path, "app", site("asgi", "first"))
    write_app(tmp_path, "other", site("wsgi", "other"))
    file = tmp_path / "apphost.toml"
    file.write_text('app = "app:app"\n')
    with Server(cwd=tmp_path) as server:
        assert ask(server.port).version == "first"
        file.write_text('app = "other:app"\naccess_log = "access.log"\n')
        server.reload()
        server.wait_line("generation 2 is serving other:app")
        assert ask(server.port, "/logged").version == "other"
        log = tmp_path / "access.log"
        wait_for(lambda: log.exists() and '"GET /logged HTTP/1.1" 200' in log.read_text(), what="the access log")

        log.rename(tmp_path / "access.log.1")  # as logrotate does
        server.reload()
        ask(server.port, "/rotated")
        wait_for(lambda: log.exists() and "/rotated" in log.read_text(), what="the new access log")
        assert "/rotated" not in (tmp_path / "access.log.1").read_text()
        assert server.stop() == 0


def test_a_changed_address_needs_a_restart_and_is_told(tmp_path: Path) -> None:
    write_app(tmp_path, "app", site("asgi"))
    file = tmp_path / "apphost.toml"
    file.write_text('bind = "127.0.0.1:0"\n')
    with Server("app:app", bind=None, cwd=tmp_path) as server:
        file.write_text('bind = "127.0.0.1:1"\nbacklog = 7\n')
        server.reload()
        warning = server.wait_line("warning settings that need a restart .*")
        assert "bind" in warning[0]
        assert "backlog" in warning[0]
        assert ask(server.port).version == "one"
        assert server.stop() == 0


# ------------------------------------------------------------------------------------------------- listeners


def test_a_unix_socket_survives_reloads(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    with serving(tmp_path, "wsgi", bind=f"unix:{path}") as server:
        inode = path.stat().st_ino
        with Load(str(path), clients=3) as load:
            for version in ("two", "three"):
                load.wait(20)
                deploy(server, "wsgi", version)
            load.wait(20)
        assert load.report.lost == []
        assert load.report.versions == ["one", "two", "three"]
        assert path.stat().st_ino == inode
    assert not path.exists()


def test_an_inherited_socket_survives_reloads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, fd = listener.getsockname()[1], listener.fileno()
        write_app(tmp_path, "app", site("asgi"))
        with Server("app:app", bind=f"fd://{fd}", cwd=tmp_path, pass_fds=[fd]) as server:
            assert server.port == port
            with Load(port, clients=3) as load:
                for version in ("two", "three"):
                    load.wait(20)
                    deploy(server, "asgi", version)
                load.wait(20)
            assert load.report.lost == []
            assert load.report.versions == ["one", "two", "three"]


# ------------------------------------------------------------------------------------------------- leaks


def test_reloads_leak_neither_descriptors_nor_processes(tmp_path: Path) -> None:
    def settled() -> bool:
        """Nothing is on its way in or out: one worker, its fork server, and no zombie."""
        children = [process for process in processes() if process.parent == server.pid]
        return len(server.worker_pids()) == 1 and len(server.children()) == 2 and len(children) == 1

    def open_files(pid: int) -> list[str]:
        return sorted(re.sub(r"\d+", "N", os.readlink(link)) for link in Path(f"/proc/{pid}/fd").iterdir())

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to count descriptors")
    with serving(tmp_path, "asgi") as server:
        server.reload()
        wait_for(settled, what="the first reload to be over")
        before = open_files(server.pid)
        workers = open_files(server.worker_pids()[0])
        for _ in range(15):  # one leaked descriptor in each would show
            server.reload()
        wait_for(settled, what="the last reload to be over")
        assert open_files(server.pid) == before
        assert open_files(server.worker_pids()[0]) == workers
