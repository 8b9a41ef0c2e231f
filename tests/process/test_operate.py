"""The commands against live servers, in reloads that succeed, fail and hang."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.load import serving, site
from tests.operating import Control, begin, command, operate, status
from tests.process.test_canary import failing
from tests.support import DEADLINE, RawClient, Server, linux, raw, request_bytes, wait_for, write_app

pytestmark = linux
BROKEN = "def helper():\n    raise RuntimeError('the database has gone')\n\nhelper()\n"
HANGING = "\nwhile not os.path.exists('boot'): time.sleep(0.01)\n"
PRELOAD = ("--preload", "--no-preload")


@contextlib.contextmanager
def in_progress(server: Server, path: str) -> Iterator[RawClient]:
    """A request that is being answered."""
    with RawClient(server.port) as client:
        client.send(request_bytes("GET", path))
        yield client


# ------------------------------------------------------------------------------------------------- reload


@pytest.mark.parametrize("preload", PRELOAD)
def test_reloads_that_fail_and_succeed(tmp_path: Path, preload: str) -> None:
    """8 with the reason and the traceback of the user's code; `status` keeps it until a reload succeeds."""
    with serving(tmp_path, "asgi", "--workers", "2", preload) as server:
        write_app(tmp_path, "app", BROKEN)
        done = operate(server, "reload", "--wait")
        assert done.returncode == 8
        assert re.match(
            r"apphost: error: generation 2 given up: the application 'app:app' raised RuntimeError while it was "
            r"imported\. Generation 1 keeps serving; mend the new code or settings and reload again\n\nTraceback",
            done.stderr,
        )
        assert "line 2, in helper\n    raise RuntimeError('the database has gone')\n" in done.stderr
        assert "RuntimeError: the database has gone" in done.stderr
        assert re.search(r"^\S+ waiting for generation 2$", done.stdout, re.MULTILINE)
        assert "worker 3 gen 2 could not boot" in done.stdout
        assert "Traceback" not in done.stdout, "once is enough"
        found = status(server)
        assert (found["state"], found["ok"], found["good"]) == ("serving", False, 1)
        assert found["given_up"]["generation"] == 2
        assert "the database has gone" in found["given_up"]["detail"]
        shown = operate(server, "status").stdout
        assert shown.startswith("app:app: the last reload was given up, generation 1 serves on\n")
        assert "generation 2 given up: the application 'app:app' raised" in shown
        assert max(map(len, shown.splitlines())) <= 100

        write_app(tmp_path, "app", site("asgi", "two"))
        done = operate(server, "reload", "--wait")
        assert (done.returncode, done.stderr) == (0, "")
        lines = [line.partition(" ")[2] for line in done.stdout.splitlines()]
        assert lines[0] == "waiting for generation 3"
        assert re.fullmatch(r"generation 3 is serving app:app with 2 workers, \S+ s after it was asked for", lines[-1])
        ready, drained = lines.index("worker 4 gen 3 ready"), lines.index("worker 1 gen 1 draining: reload")
        assert ready < drained
        found = status(server)
        assert (found["state"], found["ok"], found["given_up"]) == ("serving", True, None)


def test_a_reload_that_hangs(tmp_path: Path) -> None:
    """11 after --timeout; `status` and `stacks` tell where it hangs; 9 when a newer one takes its place."""
    with serving(tmp_path, "asgi") as server:
        write_app(tmp_path, "app", site("asgi", "two") + HANGING)
        first = begin("reload", "--wait", "--pid", str(server.pid))
        server.wait_line("worker 2 gen 2 booting")
        found = status(server)
        assert (found["state"], found["ok"]) == ("reloading", False)
        assert found["what"] == "reloading: 0 of 1 workers are of generation 2"
        assert 50 < found["workers"][1]["boot_left"] < 60
        shown = operate(server, "stacks", "2").stdout
        assert "worker 2 gen 2, pid" in shown
        assert "no answer within 1 s" in shown
        assert f'File "{tmp_path}/app.py", line' in shown
        write_app(tmp_path, "app", site("asgi", "three"))
        second = begin("reload", "--wait", "--pid", str(server.pid))
        out, err = first.communicate(timeout=DEADLINE)
        assert first.returncode == 9, out + err
        assert "generation 2 was superseded by generation 3" in err
        out, err = second.communicate(timeout=DEADLINE)
        assert second.returncode == 0, out + err
        wait_for(lambda: status(server)["replaced"] == {"superseded": 1, "reload": 1})
        assert "error" not in server.log, "the stacks that were asked for are no crash"

        write_app(tmp_path, "app", site("asgi", "four") + HANGING)
        done = operate(server, "reload", "--wait", "--timeout", "0.5")
        assert done.returncode == 11
        assert "not complete within 0.5 s; it goes on, and `apphost status` tells how it ended" in done.stderr
        stopped = begin("reload", "--wait", "--pid", str(server.pid))
        assert stopped.stdout is not None
        assert "waiting for generation" in stopped.stdout.readline()
        assert operate(server, "stop").returncode == 0
        _, err = stopped.communicate(timeout=DEADLINE)
        assert stopped.returncode == 10
        assert re.search(r"error: the arbiter stops before generation \d is complete", err)
        assert server.wait_exit() == 0


def test_an_arbiter_that_dies_while_waited_for(tmp_path: Path) -> None:
    write_app(tmp_path, "app", site("asgi"))
    with Server("app:app", cwd=tmp_path, allow_errors=True) as server:
        write_app(tmp_path, "app", site("asgi", "two") + HANGING)
        waiting = begin("reload", "--wait", "--pid", str(server.pid))
        server.wait_line("worker 2 gen 2 booting")
        server.signal(signal.SIGKILL)
        _, err = waiting.communicate(timeout=DEADLINE)
        assert waiting.returncode == 10
        assert f"the arbiter, pid {server.pid}, has ended" in err
        done = operate(server, "status")
        assert done.returncode == 7
        assert done.stderr == f"apphost: error: there is no process {server.pid}: that server has ended\n"
        (tmp_path / "left").write_text(f"{server.pid}\n")
        done = command("status", "--pidfile", str(tmp_path / "left"))
        assert done.returncode == 7
        assert f"no process {server.pid}, which {tmp_path}/left names: that server has ended" in done.stderr


@pytest.mark.parametrize(
    "order", ["reload --wait", "upgrade", "stop", "stop --now", "stacks", "connections"]
)  # fmt: skip
def test_an_arbiter_that_does_not_answer(tmp_path: Path, order: str) -> None:
    """11, and why: whoever is on call learns more than that time has passed. It is not left an order to obey later."""
    with serving(tmp_path, "asgi") as server:
        server.signal(signal.SIGSTOP)
        try:
            done = operate(server, *order.split(), "--timeout", "0.5")
        finally:
            server.signal(signal.SIGCONT)
        assert done.returncode == 11
        assert f"the arbiter, pid {server.pid}, has not answered within 0.5 s: its process is stopped" in done.stderr
        assert f"`kill -CONT {server.pid}`" in done.stderr
        assert operate(server, "scale", "2").stdout == "2 workers, before 1\n"
        assert not re.search("`apphost (reload|upgrade|stop)", server.log)


def test_without_a_timeout_nobody_waits_for_minutes(tmp_path: Path) -> None:
    """The bounds of the commands that have no --timeout, or do not need one, are that of a sample."""
    with serving(tmp_path, "asgi") as server:
        server.signal(signal.SIGSTOP)
        try:
            waiting = [begin(*order.split(), "--pid", str(server.pid)) for order in ("stacks", "upgrade", "scale +1")]
            ends = [(each.communicate(timeout=DEADLINE)[1], each.returncode) for each in waiting]
        finally:
            server.signal(signal.SIGCONT)
        for said, code in ends:
            assert code == 11
            assert "has not answered within 10 s: its process is stopped" in said


def test_a_canary(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", "--canary", "5") as server:
        write_app(tmp_path, "app", site("asgi", "two"))
        with Control(server) as control:
            control.send({"do": "reload", "wait": True})
            assert control.until("probation")["worker"] == 2
            found = status(server)
            assert found["what"] == "reloading: 1 of 1 workers are of generation 2, on probation"
            assert 0 < found["canary_left"] <= 5
            assert control.lines()[-1]["outcome"] == "complete"
    with serving(tmp_path, "asgi", "--canary", "600") as server:
        write_app(tmp_path, "app", failing("asgi", "two"))
        waiting = begin("reload", "--wait", "--pid", str(server.pid))
        server.wait_line("is on probation")
        while waiting.poll() is None:
            raw(server.port, request_bytes("GET", "/", [("Connection", "close")]))
        assert waiting.returncode == 8
        assert re.search(r"its canary answered (\d+) of \1 requests with 5xx", waiting.communicate()[1])


def test_a_time_to_wait_is_not_silently_ignored() -> None:
    """Else a script that forgets --wait takes 0 for a reload that went well."""
    done = command("reload", "--timeout", "60")
    assert (done.returncode, done.stderr) == (2, "apphost: error: --timeout is for how long to wait: add --wait\n")


def test_it_does_not_wait_unless_told_to(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server:
        mark = server.mark()
        done = operate(server, "reload")
        assert (done.returncode, done.stdout) == (0, "generation 2 is asked for\n")
        server.wait_line("generation 2 is serving", after=mark)
        server.wait_line(r"info `apphost reload` of uid \d+, pid \d+ received")


# ------------------------------------------------------------------------------------------------- upgrade


def test_waiting_goes_on_across_an_upgrade(tmp_path: Path) -> None:
    """Who waits for a reload, and who has asked for the upgrade, both get their end from the new program."""
    with serving(tmp_path, "asgi") as server:
        server.reload()
        before = wait_for(lambda: found if (found := status(server))["replaced"] else None)
        assert before["replaced"] == {"reload": 1}
        write_app(tmp_path, "app", site("asgi", "two") + HANGING)
        waiting = begin("reload", "--wait", "--pid", str(server.pid))
        server.wait_line("worker 3 gen 3 booting")
        upgrading = begin("upgrade", "--pid", str(server.pid))
        server.wait_line("info upgraded: apphost")
        (tmp_path / "boot").touch()
        out, err = upgrading.communicate(timeout=DEADLINE)
        assert upgrading.returncode == 0, out + err
        assert re.search(r"generation 4 is serving app:app with 1 worker", out)
        out, err = waiting.communicate(timeout=DEADLINE)
        assert waiting.returncode == 9, out + err
        found = status(server)
        assert found["uptime"] > before["uptime"]
        assert found["replaced"]["reload"] >= 1, "what was before the upgrade is not forgotten"


def test_an_upgrade_that_is_given_up(tmp_path: Path) -> None:
    write_app(tmp_path / "lib", "sitecustomize", "")
    with serving(tmp_path, "asgi", env={"PYTHONPATH": f"{tmp_path}/lib"}) as server:
        write_app(tmp_path / "lib", "sitecustomize", "import os\nif 'APPHOST_RESUME' in os.environ: os._exit(9)\n")
        done = operate(server, "upgrade")
        assert done.returncode == 8
        assert "the upgrade is given up: the new program cannot start (its trial ended with 9)" in done.stderr
        assert status(server)["ok"]


# ------------------------------------------------------------------------------------------------- workers


def test_a_worker_that_is_stuck(tmp_path: Path) -> None:
    """Its stacks are told and it lives; when it goes on and is replaced, they are not taken for its last words."""
    until_go = "[time.sleep(0.02) for _ in iter(lambda: os.path.exists('go'), True)]"
    write_app(tmp_path, "app", site("asgi").replace("time.sleep(600)", until_go))
    with Server("app:app", cwd=tmp_path) as server, in_progress(server, "/sleep?token=secret") as client:
        wait_for(lambda: "silent" in status(server)["workers"][0], what="the worker to be noticed as silent")
        found = status(server)
        assert (found["ok"], found["what"]) == (False, "serving, but worker 1 does not answer")
        done = operate(server, "stacks")
        assert done.returncode == 0
        assert "no answer within 1 s: its event loop is blocked" in done.stdout
        assert re.search(rf'File "{tmp_path}/app.py", line \d+ in app', done.stdout)
        with Control(server) as control:
            answer = control.ask({"do": "connections"})
            assert answer == {"done": True}
        (tmp_path / "go").touch()
        assert client.read_response().status == 200
        wait_for(lambda: "silent" not in status(server)["workers"][0])
        assert operate(server, "reload", "--wait").returncode == 0
        server.wait_line("info worker 1 gen 1 gone: exit 0")
        assert "error" not in server.log
        assert server.stop() == 0


def test_a_crash_after_stacks_were_asked_for(tmp_path: Path) -> None:
    crash = "\nimport ctypes, threading\n"
    crash += "def crash():\n    while not os.path.exists('crash'): time.sleep(0.01)\n    ctypes.string_at(0)\n"
    crash += "threading.Thread(target=crash, daemon=True).start()\n"
    write_app(tmp_path, "app", site("asgi") + crash)
    with Server("app:app", cwd=tmp_path, allow_errors=True) as server, in_progress(server, "/sleep"):
        server.wait_line("generation 1 is serving")
        wait_for(lambda: "its event loop is blocked" in operate(server, "stacks").stdout)
        mark = server.mark()
        (tmp_path / "crash").touch()
        server.wait_line("error worker 1 gen 1 gone: died of SIGSEGV", after=mark)
        (tmp_path / "crash").unlink()
        server.wait_line("Fatal Python error: Segmentation fault", after=mark)
        wait_for(lambda: status(server)["replaced"] == {"crashed": 1})
        shown = operate(server, "status").stdout
        assert "ended workers: 1 crashed" in shown
        assert "worker 1 gen 1 gone: died of SIGSEGV" in shown


def test_requests_connections_and_tasks(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "asgi", "--workers", "1") as server,
        in_progress(server, "/wait/go?password=hunter2") as busy,
        RawClient(server.port) as idle,
    ):
        assert idle.request("POST", "/", body=b"x" * 5000).status == 200
        server.wait_line("/wait/go in progress")
        (worker,) = wait_for(lambda: [w for w in status(server)["workers"] if w["oldest"]])
        assert worker["oldest"]["request"] == "GET /wait/go"
        assert worker["oldest"]["seconds"] < 30
        assert (worker["in_progress"], worker["connections"]) == (1, 2)
        assert worker["rss"] > 1 << 20
        assert re.fullmatch("[0-9a-f]{12}", worker["code"]["hash"])
        assert worker["code"]["directory"] == str(tmp_path.resolve())

        done = operate(server, "connections", "--json")
        (answer,) = json.loads(done.stdout)
        assert answer["left_out"] == 0
        first, second = answer["connections"]
        assert (first["state"], first["request"], first["movable"]) == ("busy", "GET /wait/go", False)
        assert first["why"] == "after its answer"
        assert (second["state"], second["requests"], second["movable"]) == ("waiting", 1, True)
        assert second["peer"] == f"127.0.0.1:{idle.sock.getsockname()[1]}"
        assert second["received"] > 5000
        assert 20 < second["sent"] < 500
        shown = operate(server, "connections").stdout
        assert "GET /wait/go" in shown
        stacks = operate(server, "stacks", str(worker["pid"])).stdout
        assert re.search(rf'task \S+ AsgiRequest.run:\n(.*\n)*? +File "{tmp_path}/app.py", line \d+, in app', stacks)
        for text in (done.stdout, shown, stacks, json.dumps(status(server)), operate(server, "status").stdout):
            assert "hunter2" not in text
        (tmp_path / "go").touch()
        assert busy.read_response().status == 200


def test_every_key_of_status_is_documented(tmp_path: Path) -> None:
    documented = set(re.findall(r"`(\w+)`", (Path(__file__).parents[2] / "docs" / "control.md").read_text()))
    with serving(tmp_path, "asgi") as server:
        wait_for(lambda: status(server)["workers"][0]["code"])
        found = status(server)
        assert set(found) <= documented
        assert set(found["workers"][0]) | set(found["workers"][0]["code"]) <= documented


def test_scale(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server:
        done = operate(server, "scale", "3")
        assert (done.returncode, done.stdout) == (0, "3 workers, before 1\n")
        wait_for(lambda: status(server)["ok"] and len(status(server)["workers"]) == 3)
        assert operate(server, "scale", "2").stdout == "2 workers, before 3\n"
        wait_for(lambda: len(status(server)["workers"]) == 2)
        assert status(server)["settings"].get("workers") is None
        assert operate(server, "scale", "+2").stdout == "4 workers, before 2\n"
        assert operate(server, "scale", "-3").stdout == "1 workers, before 4\n"
        done = operate(server, "scale", "-1")
        assert (done.returncode, done.stderr) == (
            7, "apphost: error: the arbiter refused: size of scale: expected a whole number from 1 to 1024, not 0\n",
        )  # fmt: skip
        for size in ("0", "+0", "1.5", "--bogus", "4096"):
            done = operate(server, "scale", size)
            assert done.returncode == 2
            assert "expected a number from 1 to 1024, or one with a sign for so many more or fewer" in done.stderr


def test_the_code_of_workers_tells_deploys_apart(tmp_path: Path) -> None:
    """Also when files were changed without a reload, and a worker that was started later has imported them."""

    def codes() -> list[str]:
        return [each["code"].get("hash", "") for each in status(server)["workers"]]

    with serving(tmp_path, "asgi", "--workers", "2") as server:
        one, other = wait_for(lambda: codes() if all(codes()) else None)
        assert one == other
        write_app(tmp_path, "app", site("asgi", "two"))
        assert operate(server, "scale", "3").returncode == 0
        three = wait_for(lambda: codes() if len(codes()) == 3 and all(codes()) else None)
        assert three[:2] == [one, one]
        assert three[2] != one
        assert "the workers of generation 1 run different code" in operate(server, "status").stdout
        assert operate(server, "reload", "--wait").returncode == 0
        wait_for(lambda: codes() == [three[2]] * 3)


# ------------------------------------------------------------------------------------------------- stop, and finding


def test_stop_waits_until_the_server_has_gone(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "asgi", "--pidfile", "pid", "--stop-timeout", "600") as server,
        in_progress(server, "/wait/go") as client,
    ):
        server.wait_line("/wait/go in progress")
        stopping = begin("stop", "--pidfile", str(tmp_path / "pid"))
        server.wait_line("worker 1 gen 1 draining: stop")
        assert status(server)["state"] == "stopping"
        assert "the arbiter refused: it stops" in operate(server, "reload", "--wait").stderr
        with Control(server) as again:
            again.send({"do": "stop"})
            assert status(server)["state"] == "stopping"
            assert server.process is not None
            assert server.process.poll() is None, "a second one only waits, too"
            (tmp_path / "go").touch()
            assert client.read_response().status == 200
            assert again.lines()[-1]["outcome"] == "stopped"
        out, err = stopping.communicate(timeout=DEADLINE)
        assert stopping.returncode == 0, out + err
        assert out.endswith("stopped\n")
        wait_for(lambda: server.process is not None and server.process.poll() is not None)
        assert server.process.poll() == 0
        assert server.wait_exit() == 0


def test_stop_now(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server, in_progress(server, "/wait/never"):
        server.wait_line("/wait/never in progress")
        done = operate(server, "stop", "--timeout", "2")
        assert done.returncode == 11
        assert "it still runs after 2 s; `apphost stop --now` does not wait" in done.stderr
        assert operate(server, "stop", "--now").returncode == 0
        assert server.wait_exit() == 0


def test_watch(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi") as server:
        watching = begin("status", "--watch", "--json", "--pid", str(server.pid))
        assert watching.stdout is not None
        first, second = (json.loads(watching.stdout.readline()) for _ in range(2))
        assert second["uptime"] - first["uptime"] > 1
        watching.send_signal(signal.SIGINT)
        assert watching.wait(DEADLINE) == 130
        watching.communicate()


def test_completion(tmp_path: Path) -> None:
    def complete(words: str, cword: int) -> list[str]:
        env = {"_APPHOST_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(cword)}
        return command(env=env).stdout.split()

    with serving(tmp_path, "asgi", "--workers", "2") as server:
        assert {"plain,status", "plain,stop", "plain,stacks"} <= set(complete("apphost st", 1))
        assert "plain,--wait" in complete("apphost reload --w", 2)
        assert f"plain,{server.pid}" in complete("apphost status --pid ", 3)
        assert complete(f"apphost stacks --pid {server.pid} ", 4) == ["plain,1", "plain,2"]
    assert complete("apphost shop:app --work", 2) == ["plain,--workers"], "`run` need not be typed"
    assert complete("apphost run --log-level de", 3) == ["plain,debug"]


def test_several_servers_and_none(tmp_path: Path) -> None:
    """Only those of this network namespace count, so the test needs one of its own."""
    prefix = ["unshare", "--net"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no permission for a network namespace")
    done = command("status", prefix=prefix)
    assert done.returncode == 7
    assert done.stderr.startswith("apphost: error: no server of this user is running here")
    with serving(tmp_path, "asgi", prefix=prefix, bind=f"unix:{tmp_path}/http") as first:
        inside = ["nsenter", "--net", "--target", str(first.pid)]
        assert command("status", prefix=inside).returncode == 0
        with serving(tmp_path, "asgi", prefix=inside, bind=f"unix:{tmp_path}/other") as second:
            done = command("status", prefix=inside)
            assert done.returncode == 7
            pids = sorted((first.pid, second.pid))
            assert "there are several servers: pid " in done.stderr
            assert all(
                re.search(rf"^    --pid {pid}  app:app in {tmp_path}, unix:\S+$", done.stderr, re.M) for pid in pids
            )
            assert command("status", "--pid", str(second.pid), prefix=inside).returncode == 0
    for text in ("none\n", "0\n", "-1\n", "9" * 30):
        (tmp_path / "pid").write_text(text)
        done = command("status", "--pidfile", str(tmp_path / "pid"))
        assert (done.returncode, done.stderr) == (
            7, f"apphost: error: {tmp_path / 'pid'} is no pidfile: it does not hold the number of a process\n",
        )  # fmt: skip
    assert "cannot read the pidfile" in command("status", "--pidfile", os.devnull + "/x").stderr
