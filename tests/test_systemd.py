"""What a service manager passes and is told: the parts that need no process (requirement 4)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apphost.arbiter.activation import FIRST_FD, SOCKETS_MAX, Passed
from apphost.arbiter.fleet import Fleet, step
from apphost.arbiter.processes import WorkerProcess
from apphost.arbiter.services import Happening, What
from apphost.arbiter.systemd import (
    MOVES,
    RETRY_AFTER,
    STATUS_MAX,
    UNSENT_MAX,
    Manager,
    Notifier,
    NotifySocket,
    Phase,
)
from apphost.arbiter.vocabulary import (
    Config,
    Event,
    ReloadAsked,
    StopAsked,
    Tick,
    WorkerGone,
    WorkerReady,
)
from apphost.errors import AddressError
from apphost.logs import Log
from apphost.settings import Settings
from apphost.sockets import parse_bind

# ---------------------------------------------------------------------------------------------------- what is passed


def test_the_variables_are_taken_away() -> None:
    environ = {
        "NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7", "HOME": "/",
        "LISTEN_PID": "8", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b",
    }  # fmt: skip
    manager = Manager.take(environ, 7)
    assert (manager.address, manager.watchdog) == ("/run/notify", 3.0)
    assert len(Passed.take(environ, 7)) == 0, "they were passed to process 8"
    assert environ == {"HOME": "/"}
    again = dict(manager.environment or {})
    assert Manager.take(again, 7) == manager, "a program that takes the place of this one finds the same"


@pytest.mark.parametrize(
    ("environ", "address", "watchdog"),
    [
        ({}, "", 0.0),
        ({"NOTIFY_SOCKET": "@abstract"}, "@abstract", 0.0),
        ({"NOTIFY_SOCKET": ""}, "", 0.0),
        ({"NOTIFY_SOCKET": "vsock:2:1", "WATCHDOG_USEC": "1000000"}, "", 0.0),
        ({"WATCHDOG_USEC": "1000000"}, "", 0.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1000000"}, "/n", 1.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "7"}, "/n", 1.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "6"}, "/n", 0.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "-5"}, "/n", 0.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1s"}, "/n", 0.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "9" * 30}, "/n", 0.0),
    ],
)
def test_manager(environ: dict[str, str], address: str, watchdog: float) -> None:
    manager = Manager.take(environ, 7)
    assert (manager.address, manager.watchdog) == (address, watchdog)


@pytest.mark.parametrize(
    ("count", "names", "message"),
    [
        ("x", "", "LISTEN_FDS in the environment is 'x'"),
        ("-1", "", "LISTEN_FDS in the environment is '-1'"),
        (str(SOCKETS_MAX + 1), "", "a number up to"),
        ("9" * 40, "", "a number up to"),
        ("2", "one", "has 1 names, for 2 sockets"),
        ("1", "one:two", "has 2 names, for 1 sockets"),
    ],
)
def test_nonsense_about_sockets(count: str, names: str, message: str) -> None:
    environ = {"LISTEN_PID": "7", "LISTEN_FDS": count, "LISTEN_FDNAMES": names}
    with pytest.raises(AddressError, match=message):
        Passed.take(environ, 7)
    assert not environ


def test_a_descriptor_that_is_not_open() -> None:
    """In an interpreter of its own, where descriptor 3 is free."""
    code = (
        "from apphost.arbiter.activation import Passed\n"
        "from apphost.errors import AddressError\n"
        "try: Passed.take({'LISTEN_PID': '7', 'LISTEN_FDS': '1'}, 7)\n"
        "except AddressError as exc: print(exc)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "descriptor 3 is not open" in result.stdout


@contextlib.contextmanager
def listener() -> Iterator[int]:
    """The descriptor of a listening socket, which somebody else may close."""
    sock = socket.create_server(("127.0.0.1", 0))
    fd = sock.detach()
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def test_names(capfd: pytest.CaptureFixture[str]) -> None:
    with listener() as web, listener() as more_web, listener() as api, listener() as left:
        passed = Passed({web: "web", more_web: "web", api: "api", left: "left"})
        by_name = passed.open(parse_bind("systemd:web"))
        by_number = passed.open(parse_bind(f"fd://{api}"))
        assert [sock.fileno() for sock in (*by_name, *by_number)] == [web, more_web, api]
        assert not any(os.get_inheritable(sock.fileno()) for sock in by_name)
        for text in ("systemd:web", "systemd:nobody"):
            with pytest.raises(AddressError, match="no socket of that name; those that are left are called left"):
                passed.open(parse_bind(text))
        passed.close_rest(Log())
        assert len(passed) == 0
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(left)
        warning = capfd.readouterr().err
        assert f"a socket called left (descriptor {left}) that no bind takes" in warning
        with pytest.raises(AddressError, match="none is left, or none was passed"):
            passed.open(parse_bind("systemd:web"))
        for sock in (*by_name, *by_number):
            sock.close()


def test_all_of_them() -> None:
    with listener() as one, listener() as two:
        passed = Passed({one: "unknown", two: "unknown"})
        opened = passed.open_all()
        assert [sock.fileno() for sock in opened] == [one, two]
        assert len(passed) == 0
        for sock in opened:
            sock.close()


def test_what_is_no_listener() -> None:
    """A socket unit with Accept=yes passes connections."""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(AddressError, match="systemd:web: it is not a listening stream socket"):
        Passed({ours.fileno(): "web"}).open_all()
    assert FIRST_FD == 3


# ------------------------------------------------------------------------------------------------------ what is told


class Story:
    """A notifier that hears of a real fleet, as the arbiter would tell it; what it says is gathered in `said`."""

    def __init__(self, watchdog: float = 0.0, **settings: Any) -> None:
        known = Settings(app="shop:app", **settings)
        self.fleet = Fleet(Config(size=known.workers))
        self.now = 100.0
        self.reads = True
        self.said: list[str] = []
        arbiter = SimpleNamespace(fleet=self.fleet, settings=known)
        self.notifier = Notifier(arbiter, watchdog, self._send, lambda: self.now)  # type: ignore[arg-type]

    def _send(self, text: str) -> bool:
        if self.reads:
            self.said.append(text)
        return self.reads

    def feed(self, event: Event) -> None:
        step(self.fleet, event, self.now)

    def tell(self, what: What, **about: Any) -> list[str]:
        """What this makes it say."""
        self.said.clear()
        self.notifier.notice(Happening(what=what, **about))
        return list(self.said)

    def start(self) -> list[str]:
        """Until the first worker is ready."""
        self.notifier.begin()
        self.feed(Tick())
        self.tell(What.BOOTING)
        return self.ready(1)

    def ready(self, wid: int) -> list[str]:
        self.feed(WorkerReady(wid))
        return self.tell(What.READY, worker=process(wid))

    def reload(self) -> list[str]:
        said = self.tell(What.RELOAD_ASKED, text="SIGUSR1")
        self.feed(ReloadAsked())
        return said


def process(wid: int) -> WorkerProcess:
    return WorkerProcess(wid, 1, channel=None, dump=-1, born=0.0)  # type: ignore[arg-type]


def first_lines(said: list[str]) -> list[str]:
    return [line.partition("\n")[0].partition("=")[0] for line in said]


def test_start() -> None:
    story = Story(workers=2, boot_timeout=60.0)
    story.notifier.begin()
    # At once: with `preload` the application is imported before there is a worker that boots.
    assert story.said == ["EXTEND_TIMEOUT_USEC=65000000\nSTATUS=starting shop:app, 0 of 2 workers ready, generation 1"]
    story.feed(Tick())
    assert story.tell(What.BOOTING) == ["EXTEND_TIMEOUT_USEC=65000000"]
    assert story.ready(1) == ["READY=1\nSTATUS=serving shop:app, 1 of 2 workers ready, generation 1"]
    assert story.ready(2) == ["STATUS=serving shop:app, 2 of 2 workers ready, generation 1"]
    assert story.tell(What.COMPLETE, generation=1, text="...") == [], "nothing new"
    assert story.notifier.deadline is None


def test_reload() -> None:
    story = Story(boot_timeout=60.0, graceful_timeout=30.0)
    story.start()
    story.now = 123.5
    words = ("RELOADING=1", "MONOTONIC_USEC=123500000", "EXTEND_TIMEOUT_USEC=96000000")
    assert story.reload() == ["\n".join((*words, "STATUS=reloading shop:app, 1 of 1 workers ready, generation 1"))]
    (said,) = story.tell(What.BOOTING)
    assert said.startswith("EXTEND_TIMEOUT_USEC=96000000\nSTATUS=reloading")
    assert said.endswith("generation 2 boots")
    (said,) = story.ready(2)
    assert "READY" not in said, "not before the old ones have been replaced"
    (said,) = story.tell(What.COMPLETE, generation=2, text="...")
    assert said.startswith("READY=1\nSTATUS=serving shop:app, 1 of 1 workers ready, generation 2")


def test_reload_that_is_given_up() -> None:
    story = Story()
    story.start()
    story.reload()
    story.feed(WorkerGone(2))
    text = "generation 2 given up: it raised ZeroDivisionError.\nGeneration 1 keeps serving"
    (said,) = story.tell(What.GIVEN_UP, generation=2, text=text)
    assert said == f"READY=1\nSTATUS=serving shop:app, 1 of 1 workers ready, generation 1; {text}".replace(
        "Error.\n", "Error. "
    )
    (said,) = story.reload()
    assert "given up" not in said, "the next one begins with a clean slate"


def test_reload_behind_a_reload_that_is_given_up() -> None:
    """A reload is over when none is left that was asked for."""
    story = Story()
    story.start()
    story.reload()
    assert first_lines(story.reload()) == ["RELOADING"], "whoever asked gets a timestamp of its own"
    story.feed(WorkerGone(2))
    (said,) = story.tell(What.GIVEN_UP, generation=2, text="generation 2 given up")
    assert said.startswith("STATUS=reloading")
    story.ready(3)
    assert first_lines(story.tell(What.COMPLETE, generation=3)) == ["READY"]


def test_reload_before_the_first_worker_is_ready() -> None:
    """READY of the start comes first."""
    story = Story()
    story.notifier.begin()
    story.feed(Tick())
    assert "RELOADING" not in "".join(story.reload())
    assert first_lines(story.ready(1)) == ["READY", "RELOADING"]
    story.ready(2)
    assert first_lines(story.tell(What.COMPLETE, generation=2)) == ["READY"]


def test_stop() -> None:
    story = Story(stop_timeout=8.0, shutdown_delay=5.0)
    story.start()
    assert story.tell(What.STOP_ASKED, text="SIGTERM") == [
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=19000000\nSTATUS=stopping shop:app"
    ]
    story.feed(StopAsked())
    for what in What:
        assert story.tell(what, worker=process(1)) == [], "a reload that comes too late begins nothing"
    story.notifier.close()
    assert not story.said


def test_an_end_that_nobody_asked_for() -> None:
    """The first generation could not boot."""
    story = Story()
    story.notifier.begin()
    story.said.clear()
    story.notifier.close()
    assert story.said == ["STOPPING=1\nSTATUS=stopping shop:app"]


def test_a_worker_that_is_gone_does_not_count() -> None:
    story = Story(workers=2)
    story.start()
    story.ready(2)
    assert story.tell(What.GONE, worker=process(2)) == ["STATUS=serving shop:app, 1 of 2 workers ready, generation 1"]


def test_every_move_is_allowed_somewhere_and_stopping_is_final() -> None:
    assert {phase for phase, _ in MOVES} == set(Phase) - {Phase.STOPPING}
    assert all((phase, What.STOP_ASKED) in MOVES for phase in set(Phase) - {Phase.STOPPING})


def test_status_is_one_short_line() -> None:
    story = Story()
    story.start()
    story.reload()
    story.feed(WorkerGone(2))
    (said,) = story.tell(What.GIVEN_UP, generation=2, text="x\n" * 5000)
    assert len(said.split("\n")) == 2
    assert len(said) < STATUS_MAX + 20


@pytest.mark.parametrize(
    ("fleet", "words"),
    [
        ({"good": 3, "target": 3, "complete": 3}, ["MAINPID", "RELOADING", "EXTEND_TIMEOUT_USEC", "STATUS"]),
        ({}, ["MAINPID", "EXTEND_TIMEOUT_USEC", "STATUS"]),
        ({"good": 3, "target": 3, "stop_at": 1.0}, ["MAINPID", "STATUS"]),
    ],
)
def test_after_an_upgrade(fleet: dict[str, Any], words: list[str]) -> None:
    """The new program says who it is, and that a new generation is on its way."""
    story = Story()
    for name, value in fleet.items():
        setattr(story.fleet, name, value)
    story.notifier.begin(resumed=True)
    said = "\n".join(story.said)
    assert [line.partition("=")[0] for line in said.split("\n") if not line.startswith("MONOTONIC")] == words
    assert f"MAINPID={os.getpid()}" in said


def test_watchdog() -> None:
    """Twice in the time that the manager allows."""
    story = Story(watchdog=4.0)
    story.notifier.begin()
    assert story.said[-1] == "WATCHDOG=1"
    assert story.notifier.deadline == 102.0
    story.said.clear()
    story.notifier.expire(101.9)
    assert story.said == []
    story.now = 102.5
    story.notifier.expire(102.5)
    assert story.said == ["WATCHDOG=1"]
    assert story.notifier.deadline == 104.5


def test_a_manager_that_does_not_read() -> None:
    """What could not be said is said later, in order, and is bounded; watchdog words do not pile up."""
    story = Story(watchdog=2.0)
    story.start()
    story.reads = False
    story.reload()
    assert story.notifier.deadline == 100.0 + RETRY_AFTER
    story.ready(2)
    for seconds in range(1, 100):
        story.now = 100.0 + seconds
        story.notifier.expire(story.now)
    story.tell(What.COMPLETE, generation=2)
    story.reads = True
    story.notifier.expire(story.now + RETRY_AFTER)
    assert [word for word in first_lines(story.said) if word != "STATUS"] == ["RELOADING", "READY"]
    for _ in range(2 * UNSENT_MAX):
        story.reads = False
        story.reload()
    story.reads = True
    story.said.clear()
    story.notifier.expire(story.now + 2 * RETRY_AFTER)
    assert len(story.said) == UNSENT_MAX


def test_the_socket(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Full: False. Gone: no news, and no error."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        sender = NotifySocket(path, Log("debug"))
        assert sender.send("READY=1\nSTATUS=ein Ä")
        assert manager.recv(4096) == "READY=1\nSTATUS=ein Ä".encode()
        sent = 0
        while sender.send("x"):
            sent += 1
            assert sent < 100_000
        assert capfd.readouterr().err == ""
    assert sender.send("x"), "nobody is there: there is nothing to try again"
    assert "debug the service manager cannot be told: " in capfd.readouterr().err
    sender.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="abstract names are Linux's")
def test_an_abstract_name() -> None:
    name = f"apphost-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        sender = NotifySocket(f"@{name}", Log())
        assert sender.send("READY=1")
        assert manager.recv(100) == b"READY=1"
        sender.close()
