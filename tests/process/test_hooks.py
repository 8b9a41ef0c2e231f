"""Server hooks in a running server (requirement 7)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.load import ask, serving, site
from tests.support import Server, alive, wait_for, write_app

HOOKS = """
import os, subprocess, sys, time

def say(text):
    os.write(1, f"{text}\\n".encode())

def tell(event):
    say(f"hook {event.name} worker={event.worker} gen={event.generation} pid={event.pid} "
        f"here={os.getpid()} reason={event.reason!r} outcome={event.outcome!r} app={'app' in sys.modules}")

async def tell_later(event):
    tell(event)

def fail(event):
    raise LookupError(f"no {event.name}")

def hang_alone(event):
    time.sleep(600)

def hang(event):
    say(f"hook {event.name} hangs in {os.getpid()}")
    child = subprocess.Popen(["sleep", "600"])
    say(f"with {child.pid}")
    time.sleep(600)

def leave(event):
    os._exit(0)
"""
OF_WORKERS = ("worker_start", "worker_ready", "worker_drain", "worker_exit")
OF_THE_ARBITER = ("arbiter_start", "reload")


def hooks(function: str, *names: str) -> list[str]:
    """The options that name this function for these hooks."""
    return [word for name in names for word in (f"--on-{name.replace('_', '-')}", f"site_hooks:{function}")]


def heard(server: Server) -> list[dict[str, str]]:
    """What the hooks have told so far, in order."""
    told = [(match[1], line) for line in server.lines() if (match := re.match(r"hook (\w+) worker=", line))]
    return [{"name": name, **dict(re.findall(r"(\w+)=('[^']*'|\S+)", line))} for name, line in told]


@pytest.mark.parametrize(("interface", "function"), [("wsgi", "tell"), ("asgi", "tell_later")])
def test_all_of_them(tmp_path: Path, interface: str, function: str) -> None:
    """Each is called once for each thing that happens, where it says, with what it says."""
    write_app(tmp_path, "site_hooks", HOOKS)
    args = hooks(function, *OF_WORKERS, *OF_THE_ARBITER)
    with serving(tmp_path, interface, *args) as server:
        server.wait_line("^hook worker_ready worker=1 gen=1")
        server.wait_line("^hook arbiter_start")
        assert server.reload() == 2
        server.wait_line("^hook reload .*outcome='complete'")
        server.wait_line("^hook worker_exit worker=1")
        write_app(tmp_path, "app", "1/0\n")
        server.reload(wait=False)
        server.wait_line("^hook reload .*outcome='given up'")
        write_app(tmp_path, "app", site(interface))
        assert server.stop() == 0
        told = heard(server)
        mine = {name: [each for each in told if each["worker"] == name] for name in "0123"}

        assert [each["name"] for each in mine["1"]] == list(OF_WORKERS)
        assert [each["name"] for each in mine["2"]] == list(OF_WORKERS)
        assert [each["name"] for each in mine["3"]] == ["worker_start"], "its code could not boot"
        assert [each["reason"] for each in mine["1"]] == ["''", "''", "'reload'", "'reload'"]
        assert [each["reason"] for each in mine["2"]] == ["''", "''", "'stop'", "'stop'"]
        assert [each["gen"] for each in mine["2"]] == ["2"] * 4
        assert all(each["pid"] == each["here"] for each in told if each["worker"] != "0")
        assert mine["1"][0]["app"] == "False", "before the application is imported"
        assert mine["1"][1]["app"] == "True"

        assert [each["name"] for each in mine["0"]] == ["arbiter_start", "reload", "reload"]
        assert [each["gen"] for each in mine["0"]] == ["0", "2", "3"]
        assert {each["pid"] for each in mine["0"]} == {str(server.pid)}
        assert all(each["here"] != str(server.pid) for each in mine["0"]), "not in the arbiter"
        server.wait_line(r"^hook reload .*reason=.generation 3 given up: the application 'app:app' raised ZeroDivision")


def test_a_hook_that_fails_is_logged_and_harmless(tmp_path: Path) -> None:
    write_app(tmp_path, "site_hooks", HOOKS)
    with serving(tmp_path, "wsgi", *hooks("fail", *OF_WORKERS, *OF_THE_ARBITER)) as server:
        assert ask(server.port).version == "one"
        assert server.reload() == 2
        for name in (*OF_THE_ARBITER, *OF_WORKERS):
            server.wait_line(f"error .*the hook on_{name} = 'site_hooks:fail' raised LookupError")
            server.wait_line(f"LookupError: no {name}")
        assert ask(server.port).version == "one"


def test_a_hook_of_a_worker_that_cannot_be_imported_is_a_failed_boot(tmp_path: Path) -> None:
    """Like the application: at a start it is the end, in a reload its generation is given up."""
    write_app(tmp_path, "app", site("wsgi"))
    write_app(tmp_path, "site_hooks", HOOKS)
    with Server("app:app", *hooks("no_such", "worker_exit"), cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3
        server.wait_line("module 'site_hooks' has no attribute 'no_such' for the hook on_worker_exit")
    with serving(tmp_path, "wsgi", *hooks("tell", "worker_exit")) as server:
        write_app(tmp_path, "site_hooks", "import no_such_library\n")
        server.reload(wait=False)
        server.wait_line(r"generation 2 given up: the hook on_worker_exit = 'site_hooks:tell' could not be imported")
        assert "No module named 'no_such_library'" in server.log
        assert ask(server.port).version == "one"


def test_hooks_that_hang(tmp_path: Path) -> None:
    """Those of the arbiter are killed, with what they have started; those of workers hold neither drain nor stop."""
    write_app(tmp_path, "site_hooks", HOOKS)
    args = hooks("hang", *OF_THE_ARBITER) + hooks("hang_alone", "worker_ready", "worker_drain", "worker_exit")
    with serving(tmp_path, "wsgi", *args, "--hook-timeout", "1.5") as server:
        server.wait_line("error the hook on_arbiter_start = .* did not end within hook_timeout, 1.5 s, and is killed")
        runner = int(server.wait_line(r"^hook arbiter_start hangs in (\d+)")[1])
        wait_for(lambda: not alive(runner))
        assert server.reload() == 2
        hanging = int(server.wait_line(r"^hook reload hangs in (\d+)")[1])
        server.wait_line(r"worker 1 gen 1: the hook on_worker_drain = .* took longer than 1.5 s and is left")
        server.wait_line(r"worker 1 gen 1: the hook on_worker_exit = .* took longer than 1.5 s and is left")
        server.wait_line("worker 1 gen 1 gone: exit 0")
        assert ask(server.port).version == "one"
        server.wait_line("error the hook on_reload = .* is killed")
        assert server.stop() == 0
        started = [int(match[1]) for line in server.lines() if (match := re.match(r"with (\d+)", line))]
        assert len(started) == 2
        wait_for(lambda: not any(alive(pid) for pid in (hanging, *started)))


def test_a_hook_that_ends_its_process(tmp_path: Path) -> None:
    write_app(tmp_path, "site_hooks", HOOKS)
    with serving(tmp_path, "wsgi", *hooks("leave", "arbiter_start", "reload")) as server:
        server.wait_line("error the hook on_arbiter_start = 'site_hooks:leave': its process has ended early")
        assert server.reload() == 2
        server.wait_line("error the hook on_reload = 'site_hooks:leave': its process has ended early")


def test_a_stop_ends_a_hook_of_the_arbiter(tmp_path: Path) -> None:
    write_app(tmp_path, "site_hooks", HOOKS)
    with serving(tmp_path, "wsgi", *hooks("hang", "arbiter_start")) as server:
        runner = int(server.wait_line(r"^hook arbiter_start hangs in (\d+)")[1])
        server.wait_line(r"^with \d+")
        assert server.stop() == 0
        wait_for(lambda: not alive(runner))
        assert "is killed" not in server.log


def test_a_check_imports_hooks_and_calls_none_that_tell_of_serving(tmp_path: Path) -> None:
    write_app(tmp_path, "site_hooks", HOOKS)
    write_app(tmp_path, "app", site("wsgi"))
    args = ("check", "app:app", *hooks("tell", *OF_WORKERS, *OF_THE_ARBITER))
    with Server(*args, bind=None, cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 0
        assert [each["name"] for each in heard(server)] == ["worker_start"]
    with Server("check", "app:app", *hooks("x", "worker_drain"), bind=None, cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3
