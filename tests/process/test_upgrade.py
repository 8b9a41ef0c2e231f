"""USR2: the arbiter becomes the new program, with the same pid, while its workers go on serving."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.load import INTERFACES, Load, ask, check, serving, site
from tests.support import (
    OWN_CODE,
    RawClient,
    Server,
    descendants,
    linux,
    pid_namespace,
    request_bytes,
    wait_for,
    write_app,
)

each_interface = pytest.mark.parametrize("interface", INTERFACES)

GIVEN_UP = "error the upgrade is given up: "
NOT_READY = "\nwhile not os.path.exists('boot'): time.sleep(0.01)\n"


def upgrade(server: Server) -> int:
    """USR2, until the new program has rolled a new generation; its number."""
    mark = server.mark()
    server.signal(signal.SIGUSR2)
    server.wait_line("info SIGUSR2 received: the new program is tried", after=mark)
    server.wait_line(
        rf"info upgraded: apphost \S+ on Python \S+ goes on with \d+ workers?, pid {server.pid}$", after=mark
    )
    return int(server.wait_line(r"generation (\d+) is serving", after=mark)[1])


# ------------------------------------------------------------------------------------------------- it goes through


@each_interface
@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
def test_an_upgrade_loses_no_request_and_no_connection(tmp_path: Path, interface: str, preload: str) -> None:
    with serving(tmp_path, interface, "--workers", "2", preload) as server, RawClient(server.port) as idle:
        check(idle.request("GET", "/"))
        with Load(server.port, pause=0.01) as load:
            load.wait(50)
            for generation in (2, 3, 4):
                write_app(tmp_path, "app", site(interface, f"v{generation}"))
                assert upgrade(server) == generation
                load.wait(50)
            assert server.reload() == 5
            load.wait(50)
        assert check(idle.request("GET", "/")).version == "v4", "a connection from before the first upgrade"
        assert server.process is not None
        assert server.process.poll() is None, "it is still the same process"
        wait_for(lambda: len(server.children()) == 3, what="two workers and their fork server to be all that is left")
    assert load.report.lost == []
    assert load.report.versions == ["one", "v2", "v3", "v4"]
    assert load.report.announced == 0
    assert load.report.connections == 4
    assert "stopped, exit 0" in server.log
    assert "error" not in server.log


def test_the_command_is_found_again_by_its_name(tmp_path: Path) -> None:
    """Run as a script, from another directory, with relative paths: a link that was switched leads to the new one."""
    for version in ("1.0", "2.0"):
        program(tmp_path / version, version)
    current = tmp_path / "lib"
    current.symlink_to("1.0")
    with serving(tmp_path / "srv", "asgi", env={"PYTHONPATH": "../lib"}) as server:
        server.wait_line(r"apphost 1\.0 on Python")
        current.unlink()
        current.symlink_to("2.0")
        shutil.rmtree(tmp_path / "1.0")
        upgrade(server)
        server.wait_line(r"upgraded: apphost 2\.0 on Python .* goes on with 1 worker,")
        assert ask(server.port).version == "one"


def program(folder: Path, version: str) -> Path:
    """A copy of apphost, of another version. With its bytecode, but for what others are about to rename."""
    copy = shutil.copytree(OWN_CODE, folder / "apphost", ignore=shutil.ignore_patterns("*.pyc.*"))
    init = copy / "__init__.py"
    text, changes = re.subn(r'__version__ = "[^"]+"', f'__version__ = "{version}"', init.read_text())
    assert changes == 1
    init.write_text(text)
    return copy


def patient(folder: Path) -> dict[str, str]:
    """The environment for a copy of apphost in which no newer generation ends an unproven one, however slow it is."""
    fleet = program(folder, "1.0") / "arbiter" / "fleet.py"
    text, changes = re.subn(r"(?m)^SUPERSEDE_AFTER = [0-9.]+ ", "SUPERSEDE_AFTER = 600.0 ", fleet.read_text())
    assert changes == 1
    fleet.write_text(text)
    return {"PYTHONPATH": str(folder)}


def test_what_the_arbiter_owns_stays_its_own(tmp_path: Path) -> None:
    """The pidfile with its lock, the Unix socket, and every TCP listener; at the end the files are removed."""
    path, pidfile = tmp_path / "app.sock", tmp_path / "app.pid"
    args = ("--pidfile", str(pidfile), "--bind", f"unix:{path}", "--bind", "127.0.0.1:0")
    with serving(tmp_path, "asgi", *args) as server:
        before = path.stat().st_ino, pidfile.stat().st_ino
        with Load(str(path), clients=2, pause=0.01) as load:
            for _ in range(2):
                load.wait(10)
                upgrade(server)
            load.wait(10)
        assert load.report.lost == []
        assert load.report.connections == 2
        assert (path.stat().st_ino, pidfile.stat().st_ino) == before
        assert pidfile.read_text() == f"{server.pid}\n"
        assert ask(server.port).version == "one"
        with Server("app:app", "--pidfile", str(pidfile), cwd=tmp_path, until=None) as second:
            assert second.wait_exit() == 5, "the lock is still held"
        assert server.stop() == 0
    assert not path.exists()
    assert not pidfile.exists()


@linux
def test_upgrades_leak_neither_descriptors_nor_processes(tmp_path: Path) -> None:
    def open_files(pid: int) -> list[str]:
        return sorted(re.sub(r"\d+", "N", os.readlink(link)) for link in Path(f"/proc/{pid}/fd").iterdir())

    def settled() -> bool:
        return len(server.children()) == 2 and len(server.worker_pids()) == 1

    with serving(tmp_path, "asgi", "--pidfile", str(tmp_path / "pid")) as server:
        wait_for(settled)
        before, worker = open_files(server.pid), open_files(server.worker_pids()[0])
        for _ in range(5):
            upgrade(server)
        wait_for(settled, what="the last upgrade to be over")
        # A process that has ended is forgotten a moment later.
        wait_for(lambda: open_files(server.pid) == before, what="the same descriptors as before")
        assert open_files(server.worker_pids()[0]) == worker


def test_what_an_operator_has_set_stays(tmp_path: Path) -> None:
    """TTIN, and a setting that was adopted by a reload."""
    file = tmp_path / "apphost.toml"
    file.write_text("workers = 1\n")
    with serving(tmp_path, "asgi") as server:
        server.signal(signal.SIGTTIN)
        server.wait_line("worker 2 gen 1 ready")
        upgrade(server)
        server.wait_line("generation 2 is serving app:app with 2 workers")
        file.write_text("workers = 3\n")
        server.reload()
        server.wait_line("generation 3 is serving app:app with 3 workers")
        upgrade(server)
        server.wait_line("generation 4 is serving app:app with 3 workers")


# ------------------------------------------------------------------------------------------- in the middle of things


@each_interface
def test_with_a_worker_that_drains(tmp_path: Path, interface: str) -> None:
    """Its request is finished, its end is noticed and has its exit code, although its parent knows nobody any more."""
    with serving(tmp_path, interface) as server, RawClient(server.port) as client:
        client.send(request_bytes("POST", "/wait/go", body=b"long"))
        server.wait_line("/wait/go in progress")
        write_app(tmp_path, "app", site(interface, "two"))
        server.reload()
        upgrade(server)
        assert ask(server.port).version == "two"
        (tmp_path / "go").touch()
        assert check(client.read_response(), b"long").version == "one"
        server.wait_line("worker 1 gen 1 gone: exit 0")
        wait_for(lambda: len(server.children()) == 2)


@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
def test_with_a_worker_that_boots(tmp_path: Path, preload: str) -> None:
    """The deploy goes on under the new program, which then rolls the generation of its own."""
    with serving(tmp_path, "asgi", preload) as server, Load(server.port, clients=2, pause=0.02) as load:
        write_app(tmp_path, "app", site("asgi", "two", "\nsay('imported')\n" + NOT_READY))
        server.reload(wait=False)
        server.wait_line("^imported")
        mark = server.mark()
        server.signal(signal.SIGUSR2)
        server.wait_line("upgraded: .* goes on with 2 workers", after=mark)
        (tmp_path / "boot").touch()
        server.wait_line("generation 3 is serving", after=mark)
        assert ask(server.port).version == "two"
        load.wait(10)
        assert load.report.lost == []


def test_with_a_worker_that_hangs_at_boot(tmp_path: Path) -> None:
    """Its deadline goes on across the upgrade."""
    with serving(tmp_path / "srv", "asgi", "--boot-timeout", "6", env=patient(tmp_path / "lib")) as server:
        write_app(server.cwd, "app", "import time\nprint('imported')\ntime.sleep(600)\n")
        server.reload(wait=False)
        server.wait_line("^imported")
        write_app(server.cwd, "app", site("asgi", "two"))
        server.signal(signal.SIGUSR2)
        server.wait_line("upgraded: ")
        server.wait_line("generation 3 is serving")
        assert ask(server.port).version == "two"
        server.wait_line("worker 2 gen 2 could not boot: it was not ready within boot_timeout, 6 s")


def test_a_worker_that_dies_afterwards_is_replaced(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", "--workers", "2") as server:
        upgrade(server)
        wait_for(lambda: len(server.worker_pids()) == 2)
        for number in server.worker_pids():
            mark = server.mark()
            os.kill(number, signal.SIGKILL)
            server.wait_line(r"worker \d gen 2 gone: died of SIGKILL", after=mark)
            server.wait_line(r"worker \d gen 2 ready", after=mark)
        assert ask(server.port).version == "one"


def test_a_deploy_that_fails_under_the_new_program(tmp_path: Path) -> None:
    """The program is new, the application cannot be loaded: the workers of the old program go on serving."""
    with serving(tmp_path, "asgi") as server:
        before = ask(server.port)
        write_app(tmp_path, "app", "import no_such_module\n")
        server.signal(signal.SIGUSR2)
        server.wait_line("upgraded: ")
        server.wait_line("generation 2 given up: .*ModuleNotFoundError.*Generation 1 keeps serving")
        assert ask(server.port) == before
        write_app(tmp_path, "app", site("asgi", "two"))
        assert server.reload() == 3
        assert ask(server.port).version == "two"


@pytest.mark.parametrize("again", [signal.SIGUSR2, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_asked_for_once_more_at_any_moment(tmp_path: Path, again: signal.Signals) -> None:
    """A shower of orders: whatever comes of it, it ends with the newest code and without an error."""
    with serving(tmp_path, "asgi") as server, Load(server.port, clients=2, pause=0.02) as load:
        for version in range(6):
            write_app(tmp_path, "app", site("asgi", f"v{version}"))
            mark = server.mark()
            server.signal(signal.SIGUSR2)
            server.signal(again)
            server.wait_line("SIGUSR2 received|upgrade begins|upgraded", after=mark)
        server.signal(signal.SIGUSR1)
        wait_for(lambda: ask(server.port).version == "v5", what="the newest code")
        assert load.report.lost == []
        assert "error" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["SIGUSR2 received", "the upgrade begins", "upgraded: "])
def test_a_stop_is_not_lost(tmp_path: Path, number: signal.Signals, when: str) -> None:
    """Neither before nor in the exec, nor before the new program has its handlers."""
    with serving(tmp_path, "asgi", "--pidfile", str(tmp_path / "pid")) as server:
        server.signal(signal.SIGUSR2)
        server.wait_line(when)
        server.signal(number)
        assert server.wait_exit() == 0
        assert GIVEN_UP not in server.log
    assert not (tmp_path / "pid").exists()


def test_a_stop_with_the_order_to_upgrade(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server:
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGUSR2)
        assert server.wait_exit() == 0


def test_a_second_stop_during_the_trial_is_at_once(tmp_path: Path) -> None:
    """The trial succeeds while the arbiter is stopping: then it must neither begin nor spoil anything."""
    with serving(tmp_path, "asgi", "--stop-timeout", "60") as server, RawClient(server.port) as client:
        client.send(request_bytes("GET", "/wait/never"))
        server.wait_line("/wait/never in progress")
        server.signal(signal.SIGUSR2)
        server.wait_line("the new program is tried")
        server.signal(signal.SIGTERM)
        server.wait_line("the upgrade is dropped: this arbiter stops|upgraded: ")
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0


# ------------------------------------------------------------------------------------------------- it cannot


def goes_on(server: Server, before: object) -> None:
    """The arbiter has not changed, and can do all it could before."""
    assert ask(server.port) == before
    assert len(re.findall(GIVEN_UP, server.log)) == 1
    assert "upgraded" not in server.log
    wait_for(lambda: len(server.children()) == 2, what="nothing of the trial to be left")
    write_app(server.cwd, "app", site("asgi", "two"))
    assert server.reload() == 2
    assert ask(server.port).version == "two"


BROKEN = {
    "missing": (lambda package: (package / "start.py").unlink(), "1"),
    "syntax": (lambda package: (package / "start.py").write_text("def main(:\n"), "1"),
    "exit": (lambda package: (package / "__init__.py").write_text("raise SystemExit(5)\n"), "5"),
    "dies": (lambda package: (package / "__init__.py").write_text("import os\nos.kill(os.getpid(), 9)\n"), "-9"),
    "other state": (lambda package: newer(package / "arbiter" / "state.py"), "1"),
}


def newer(state: Path) -> None:
    text, changes = re.subn(r"(?m)^VERSION = 1$", "VERSION = 2", state.read_text())
    assert changes == 1
    state.write_text(text)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_new_program_that_cannot_start_is_given_up(tmp_path: Path, kind: str) -> None:
    """Whatever its state, the running one goes on, and a later upgrade to a good one works."""
    lib = tmp_path / "lib"
    package = program(lib, "1.0")
    spoil, status = BROKEN[kind]
    folder = tmp_path / "srv"
    with serving(folder, "asgi", env={"PYTHONPATH": str(lib)}, allow_errors=True) as server:
        before = ask(server.port)
        spoil(package)
        server.signal(signal.SIGUSR2)
        server.wait_line(
            rf"{GIVEN_UP}the new program cannot start \(its trial ended with {status}\)\. This arbiter goes on"
        )
        shutil.rmtree(package, ignore_errors=True)
        program(lib, "2.0")
        goes_on(server, before)
        upgrade(server)
        server.wait_line(r"upgraded: apphost 2\.0")


def test_a_new_program_that_hangs_is_given_up_with_a_stop(tmp_path: Path) -> None:
    """The trial has some seconds; a stop does not wait for it, and leaves nothing of it behind."""
    lib = tmp_path / "lib"
    package = program(lib, "1.0")
    with serving(tmp_path / "srv", "asgi", env={"PYTHONPATH": str(lib)}) as server:
        (package / "start.py").write_text("import time\nprint('trial', flush=True)\ntime.sleep(600)\n")
        server.signal(signal.SIGUSR2)
        server.wait_line("^trial")
        assert ask(server.port).version == "one"
        assert server.stop() == 0


def test_an_interpreter_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    folder = tmp_path / "srv"
    launcher = "import sys; sys.executable = sys.argv.pop(1); from apphost.start import main; main()"
    start = subprocess.Popen

    def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return start([command[0], "-c", launcher, str(python), *command[3:]], **options)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        context = serving(folder, "asgi")
        server = context.__enter__()
    try:
        before = ask(server.port)
        kept = python.read_text()
        python.unlink()
        server.signal(signal.SIGUSR2)
        server.wait_line(f"apphost: cannot run {re.escape(str(python))}: .*No such file or directory")
        server.wait_line(GIVEN_UP)
        python.write_text(kept)
        python.chmod(0o755)
        goes_on(server, before)
    finally:
        context.__exit__(*sys.exc_info())


# ------------------------------------------------------------------------------------------------- process 1


@linux
def test_as_process_1(tmp_path: Path) -> None:
    """In a container there is no other way to upgrade: who replaces process 1 by another one ends them all."""
    args = ("--workers", "2", "--pidfile", str(tmp_path / "pid"))
    with serving(tmp_path, "asgi", *args, prefix=pid_namespace("--mount-proc")) as server:
        arbiter = descendants(server.pid)[0]
        with Load(server.port, clients=2, pause=0.02) as load:
            for generation in (2, 3):
                load.wait(10)
                write_app(tmp_path, "app", site("asgi", f"v{generation}"))
                os.kill(arbiter, signal.SIGUSR2)
                server.wait_line(f"generation {generation} is serving")
            load.wait(10)
        assert server.log.count("upgraded: ") == 2
        assert server.log.count("goes on with 2 workers, pid 1") == 2
        assert load.report.lost == []
        assert load.report.versions == ["one", "v2", "v3"]
        assert (tmp_path / "pid").read_text() == "1\n"
        os.kill(arbiter, signal.SIGTERM)
        assert server.wait_exit() == 0
        assert "stopped, exit 0" in server.log
