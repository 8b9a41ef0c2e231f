"""New code on probation, the ready probe, the delayed stop, and workers that are replaced for their size or age."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from pathlib import Path

import pytest

from tests.load import INTERFACES, Load, ask, check, serving, site
from tests.operating import status
from tests.process.test_upgrade import patient
from tests.support import RawClient, Response, Server, alive, connect, moment, request_bytes, wait_for, write_app

each_interface = pytest.mark.parametrize("interface", INTERFACES)

PROBATION = 1.5  # s


def failing(interface: str, version: str) -> str:
    """The site, but every answer is a 500."""
    source = site(interface, version)
    bad = source.replace('"status": 200', '"status": 500').replace('"200 OK"', '"500 Oops"')
    assert bad != source
    return bad


def canary(
    interface: str, *args: str, folder: Path, seconds: float = PROBATION, **options: object
) -> contextlib.AbstractContextManager[Server]:
    return serving(folder, interface, "--canary", str(seconds), *args, **options)


def on_probation(server: Server, source: str) -> int:
    """Deploy it and wait until it serves on probation; a place in the log before that."""
    mark = server.mark()
    write_app(server.cwd, "app", source)
    server.signal(signal.SIGUSR1)
    server.wait_line(r"info generation \d+ is on probation for \S+ s with worker \d+", after=mark)
    return mark


def version(response: Response) -> str:
    return response.body.decode().split()[0]


def client_of(server: Server, wanted: str) -> RawClient:
    """A connection to a worker of that version: by opening one after the other."""

    def attempt() -> RawClient | None:
        client = RawClient(server.port)
        if version(client.request("GET", "/")) == wanted:
            return client
        client.close()
        return None

    return wait_for(attempt, what=f"a connection to version {wanted}")


# ------------------------------------------------------------------------------------------------- probation


@each_interface
@pytest.mark.parametrize("workers", [1, 3])
def test_good_code_passes(tmp_path: Path, interface: str, workers: int) -> None:
    with canary(interface, "--workers", str(workers), folder=tmp_path) as server:
        assert "probation" not in server.log, "there was nothing to fall back to"
        with Load(server.port, pause=0.01) as load:
            mark = on_probation(server, site(interface, "two"))
            client = client_of(server, "two")
            server.wait_line(f"generation 2 is serving app:app with {workers} worker", after=mark)
            load.wait(20)
            assert version(client.request("GET", "/")) == "two"
            client.close()
        assert load.report.lost == []
        assert load.report.announced == 0
        log = server.lines(mark)
        begun = next(at for at, line in enumerate(log) if "is on probation" in line)
        then = next(at for at, line in enumerate(log) if re.search("draining|gen 2 booting", line) and at > begun)
        assert moment(log[then]) - moment(log[begun]) > PROBATION * 0.9, "nothing old retires, and it is alone"
        assert {ask(server.port).version for _ in range(10)} == {"two"}
    assert "error" not in server.log


@each_interface
def test_code_that_answers_with_errors_is_given_up(tmp_path: Path, interface: str) -> None:
    """Long before its probation would be over; whoever was connected to it is served on by the old code."""
    with canary(interface, "--workers", "2", folder=tmp_path, seconds=600) as server:
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(RawClient(server.port))
            check(old.request("GET", "/"))
            mark = on_probation(server, failing(interface, "two"))
            new = stack.enter_context(client_of(server, "two"))
            for _ in range(20):
                assert new.request("GET", "/").status == 500
                assert check(old.request("GET", "/")).version == "one"
            given_up = server.wait_line(
                r"error generation 2 given up: its canary answered (\d+) of \1 requests with 5xx \(100%\), the old "
                r"workers 0 of \d+ \(0%\)\. Generation 1 keeps serving",
                after=mark,
            )
            assert int(given_up[1]) >= 20
            server.wait_line("worker 3 gen 2 gone: exit 0", after=mark)
            for client in (new, old):
                assert check(client.request("POST", "/", body=b"still here"), b"still here").version == "one"
        assert {ask(server.port).version for _ in range(10)} == {"one"}
        assert len(server.worker_pids()) == 2
        assert not re.search("gen 1 (draining|gone)", server.log)


def test_a_mended_deploy_passes_afterwards(tmp_path: Path) -> None:
    settings = tmp_path / "apphost.toml"
    settings.write_text("canary = 600\n")
    with serving(tmp_path, "asgi") as server:
        on_probation(server, failing("asgi", "two"))
        settings.write_text("canary = 1\n")
        with client_of(server, "two") as client:
            for _ in range(25):
                assert client.request("GET", "/").status == 500
            server.wait_line("generation 2 given up: its canary answered")
            write_app(tmp_path, "app", site("asgi", "three"))
            assert server.reload() == 3
            assert check(client.request("GET", "/")).version == "three"


def test_few_errors_decide_nothing(tmp_path: Path) -> None:
    """Fewer answers than the rule asks for: then it is the time that decides."""
    with canary("asgi", folder=tmp_path) as server:
        mark = on_probation(server, failing("asgi", "two"))
        with client_of(server, "two") as client:
            assert client.request("GET", "/").status == 500
        server.wait_line("generation 2 is serving", after=mark)
        assert "given up" not in server.log


@each_interface
def test_a_canary_that_dies_is_given_up(tmp_path: Path, interface: str) -> None:
    with canary(interface, folder=tmp_path, seconds=600) as server:
        before = ask(server.port)
        with client_of(server, "one") as old:
            mark = on_probation(server, site(interface, "two"))
            with client_of(server, "two") as client:
                client.send(request_bytes("GET", "/exit"))
                server.wait_line(
                    r"generation 2 given up: its canary ended early \(exit 7\)\. Generation 1 keeps serving", after=mark
                )
            server.wait_line("worker 2 gen 2 gone: exit 7", after=mark)
            assert ask(server.port) == before
            assert check(old.request("GET", "/")) == before
        write_app(tmp_path, "app", site(interface, "three"))
        server.signal(signal.SIGUSR1)
        server.wait_line("generation 3 is on probation")


def test_a_canary_that_hangs_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", "--canary", "600", "--timeout", "5") as server:
        before = ask(server.port)
        mark = on_probation(server, site("asgi", "two"))
        with client_of(server, "two") as client:
            client.send(request_bytes("GET", "/spin"))
            server.wait_line(r"generation 2 given up: its event loop did not answer for timeout, 5 s", after=mark)
            server.wait_line("worker 2 gen 2 gone", after=mark)
        assert ask(server.port) == before


def test_a_reload_during_the_probation_takes_its_place(tmp_path: Path) -> None:
    with canary("asgi", folder=tmp_path) as server, Load(server.port, clients=2, pause=0.02) as load:
        on_probation(server, site("asgi", "two"))
        with client_of(server, "two") as client:
            mark = server.mark()
            write_app(tmp_path, "app", site("asgi", "three"))
            server.signal(signal.SIGUSR1)
            server.wait_line("generation 3 is serving", after=mark)
            assert check(client.request("GET", "/")).version == "three"
        assert load.report.lost == []


def test_a_stop_during_the_probation(tmp_path: Path) -> None:
    with canary("asgi", folder=tmp_path, seconds=600) as server:
        on_probation(server, site("asgi", "two"))
        assert server.stop() == 0
        assert "given up" not in server.log


def probation_ends(server: Server) -> tuple[float, float]:
    """The monotonic time at which the probation ends: not before the first, not after the second."""
    earliest = time.monotonic()
    left = status(server)["canary_left"]
    assert left is not None
    return earliest + left - 0.1, time.monotonic() + left + 0.1


def test_an_upgrade_during_the_probation_remembers_its_end(tmp_path: Path) -> None:
    with canary("asgi", folder=tmp_path, seconds=600, env=patient(tmp_path / "lib")) as server:
        on_probation(server, site("asgi", "two"))
        before = probation_ends(server)
        server.signal(signal.SIGUSR2)
        server.wait_line("upgraded: .* goes on with 2 workers")
        after = probation_ends(server)
        assert after[0] <= before[1]
        assert before[0] <= after[1]
        assert "gen 1 draining" not in server.log


def test_an_upgrade_around_the_end_of_a_probation(tmp_path: Path) -> None:
    """Whichever comes first: the new program rolls its own generation, through a probation, too."""
    with canary("asgi", folder=tmp_path) as server, Load(server.port, clients=2, pause=0.02) as load:
        on_probation(server, site("asgi", "two"))
        server.signal(signal.SIGUSR2)
        server.wait_line("upgraded: .* goes on with [12] workers?")
        server.wait_line("generation 3 is on probation")
        server.wait_line("generation 3 is serving")
        assert ask(server.port).version == "two"
        assert load.report.lost == []


def test_an_upgrade_during_the_probation_forgets_no_error(tmp_path: Path) -> None:
    """The new program judges by all that the canary has answered, also while the old one ran.

    Its own generation waits for the verdict, however long it takes to get here.
    """
    env = patient(tmp_path / "lib")
    with canary("asgi", folder=tmp_path, seconds=600, env=env) as server, RawClient(server.port) as old:
        check(old.request("GET", "/"))
        mark = on_probation(server, failing("asgi", "two"))
        with client_of(server, "two") as client:
            for _ in range(10):
                assert client.request("GET", "/").status == 500
            server.signal(signal.SIGUSR2)
            server.wait_line("upgraded: ", after=mark)
            write_app(tmp_path, "app", site("asgi", "three"))
            for _ in range(10):
                assert client.request("GET", "/").status == 500
            server.wait_line("generation 2 given up: its canary answered 2[0-9] of ", after=mark)
            server.wait_line("generation 3 is on probation", after=mark)
        assert check(old.request("GET", "/")).version == "one"


# ------------------------------------------------------------------------------------------------- the ready probe


@each_interface
def test_an_application_that_answers_the_probe_serves(tmp_path: Path, interface: str) -> None:
    extra = "\nanswer = lambda body, plain=answer: (say('asked'), plain(body))[1]\n"
    write_app(tmp_path, "app", site(interface, extra=extra))
    with Server("app:app", "--ready-probe", "/health?deep=1", cwd=tmp_path) as server:
        lines = [line for line in server.lines() if re.search("^asked| ready in ", line)]
        assert lines[0] == "asked"
        assert "worker 1 gen 1 ready" in lines[1]
        assert ask(server.port).version == "one"
        assert server.stop() == 0


@each_interface
def test_a_first_start_that_fails_the_probe(tmp_path: Path, interface: str) -> None:
    write_app(tmp_path, "app", failing(interface, "one"))
    with Server("app:app", "--ready-probe", "/health", cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3
        assert "worker 1 gen 1 could not boot: the ready probe /health was answered with status 500" in server.log
        assert " ready in " not in server.log


@each_interface
def test_a_deploy_that_fails_the_probe_is_given_up(tmp_path: Path, interface: str) -> None:
    with serving(tmp_path, interface, "--ready-probe", "/health") as server:
        with Load(server.port, clients=2, pause=0.02) as load:
            load.wait(10)
            write_app(tmp_path, "app", failing(interface, "two"))
            server.signal(signal.SIGUSR1)
            server.wait_line(
                "generation 2 given up: the ready probe /health was answered with status 500. Generation 1 keeps"
            )
            load.wait(10)
            write_app(tmp_path, "app", site(interface, "three"))
            assert server.reload() == 3
            load.wait(10)
        assert load.report.lost == []
        assert load.report.versions == ["one", "three"]


def test_a_probe_that_is_never_answered_is_a_boot_that_hangs(tmp_path: Path) -> None:
    write_app(tmp_path, "app", site("asgi"))
    args = ("--ready-probe", "/wait/never", "--boot-timeout", "6")
    with Server("app:app", *args, cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3
        assert "it was not ready within boot_timeout, 6 s" in server.log
        assert "in progress: GET /wait/never" in server.log


# ------------------------------------------------------------------------------------------------- the delayed stop


def refused(port: int) -> bool:
    try:
        connect(port, 5).close()
    except (ConnectionRefusedError, ConnectionResetError):  # the latter when the last listener is closed just now
        return True
    return False


@each_interface
def test_a_delayed_stop_serves_on_for_so_long(tmp_path: Path, interface: str) -> None:
    """A balancer sends requests until it has noticed: they are served as ever, on new connections, too."""
    with serving(tmp_path, interface, "--shutdown-delay", "3") as server, RawClient(server.port) as idle:
        check(idle.request("GET", "/"))
        begun = time.monotonic()
        server.signal(signal.SIGTERM)
        server.wait_line("SIGTERM received")
        answers = 0
        while time.monotonic() < begun + 1:
            assert ask(server.port).version == "one"
            response = idle.request("GET", "/")
            assert check(response).version == "one"
            assert response.header(b"connection") is None, "nothing is announced yet"
            answers += 1
        assert answers > 3
        assert "draining" not in server.log
        wait_for(lambda: refused(server.port), what="the listener to be closed")
        assert time.monotonic() >= begun + 3
        assert server.wait_exit() == 0
    assert "worker 1 gen 1 draining: stop" in server.log


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGQUIT], ids=lambda number: number.name)
def test_a_second_stop_does_not_wait_for_the_delay(tmp_path: Path, second: signal.Signals) -> None:
    with serving(tmp_path, "asgi", "--shutdown-delay", "600") as server:
        (worker,) = server.worker_pids()
        server.signal(signal.SIGTERM)
        server.wait_line("SIGTERM received")
        assert ask(server.port).version == "one"
        mark = server.mark()
        server.signal(second)
        server.wait_line(f"{second.name} received", after=mark)
        assert server.wait_exit() == 0
        assert not alive(worker)


def test_a_worker_that_dies_during_the_delay_is_replaced(tmp_path: Path) -> None:
    """It is still a site that serves. A reload, though, comes too late."""
    with serving(tmp_path, "asgi", "--shutdown-delay", "600") as server:
        server.signal(signal.SIGTERM)
        server.wait_line("SIGTERM received")
        with RawClient(server.port) as client:
            client.send(request_bytes("GET", "/exit"))
            server.wait_line("worker 1 gen 1 gone: exit 7")
        server.wait_line("worker 2 gen 1 ready")
        server.signal(signal.SIGUSR1)
        server.wait_line("SIGUSR1 received")
        assert ask(server.port).version == "one"
        assert "gen 2" not in server.log
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0


# ------------------------------------------------------------------------------------------------- size and age


@each_interface
def test_a_worker_that_has_grown_is_replaced(tmp_path: Path, interface: str) -> None:
    leak = (
        "\nKEPT = []\n\ndef answer(body, plain=answer):\n    KEPT.append(b'x' * (512 << 10))\n    return plain(body)\n"
    )
    with serving(tmp_path, interface, "--max-rss", "100MiB", extra=leak) as server:
        with Load(server.port, clients=4, pause=0.01) as load:
            wait_for(lambda: len(load.report.pids) >= 3, what="two workers that were replaced")
        said = re.findall(
            r"worker (\d+) gen 1 asks to be replaced: max_rss: (\d+) MiB of memory, 100 MiB are allowed", server.log
        )
        assert len(said) >= 2
        assert all(int(size) >= 100 for _, size in said)
        assert len({worker for worker, _ in said}) == len(said), "each asks once"
    assert load.report.lost == []
    assert load.report.announced == 0
    ready = server.log.index("worker 2 gen 1 ready")
    assert ready < server.log.index("worker 1 gen 1 draining: recycle")
    assert "error" not in server.log


def test_a_worker_that_begins_with_more_than_is_allowed_is_replaced_when_it_has_grown(tmp_path: Path) -> None:
    """Not at once, as its successor would begin with as much; and not never."""
    leak = "\nKEPT = []\n\ndef answer(body, plain=answer):\n    KEPT.append(body * 2)\n    return plain(body)\n"
    with serving(tmp_path, "wsgi", "--max-rss", "1MiB", extra=leak) as server:
        said = server.wait_line(
            r"warning worker 1 gen 1: max_rss is too small: 1 MiB are allowed, and the application has taken (\d+) MiB "
            r"before its first request; it is replaced when it has (\d+) MiB"
        )
        before, limit = int(said[1]), int(said[2])
        assert limit == pytest.approx(before * 1.5, abs=2)
        (pid,) = server.worker_pids()
        end = time.monotonic() + 2  # some four ticks
        wait_for(lambda: time.monotonic() > end)
        assert ask(server.port).pid == pid
        assert "replaced: " not in server.log
        while "asks to be replaced" not in server.log:
            ask(server.port, body=b"x" * (1 << 20))
        server.wait_line(rf"worker 1 gen 1 asks to be replaced: max_rss: \d+ MiB of memory, {limit} MiB are allowed")
        server.wait_line("worker 1 gen 1 gone: exit 0")
        assert ask(server.port).pid != pid


def test_a_lifetime_that_is_shorter_than_the_boot_begins_with_the_service(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", "--max-lifetime", "0.7", extra="\ntime.sleep(1.5)\n") as server:
        server.wait_line("worker 2 gen 1 ready")
        server.wait_line("worker 2 gen 1 asks to be replaced: max_lifetime")
        ready = moment(server.wait_line(".* worker 2 gen 1 ready")[0])
        asked = moment(server.wait_line(".* worker 2 gen 1 asks to be replaced")[0])
        assert asked - ready >= 0.6
        server.wait_line("worker 2 gen 1 gone: exit 0")


@each_interface
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_of_some_age_is_replaced(tmp_path: Path, interface: str, workers: int) -> None:
    args = ("--max-lifetime", "1", "--max-lifetime-jitter", "0.5", "--workers", str(workers))
    with serving(tmp_path, interface, *args) as server:
        with Load(server.port, clients=4, pause=0.01) as load:
            wait_for(lambda: server.log.count("draining: recycle") >= 2 * workers, what="recycled workers")
            load.wait(20)
        assert server.log.count("asks to be replaced: max_lifetime: it is old enough") >= 2 * workers
    assert load.report.lost == []
    assert load.report.announced == 0
    assert load.report.versions == ["one"]
    assert "error" not in server.log
