"""Server hooks without processes: finding them, and calling them in a worker (requirement 7)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apphost.errors import ApplicationError, SettingsError
from apphost.hooks import HookEvent, load_hook
from apphost.logs import Log
from apphost.settings import Settings
from apphost.sources import resolve
from apphost.worker.hooks import NAMES, TIME_MIN, Hooks
from apphost.worker.main import Assignment
from tests.support import DEADLINE, write_app

EVENT = HookEvent(name="", pid=7, generation=3, settings=Settings(hook_timeout=10.0), worker=5)


class Worker:
    """A loop and a log for the hooks of a worker."""

    def __init__(self, **functions: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.hooks = self.make(functions)

    def make(self, functions: dict[str, Any], timeout: float = 10.0) -> Hooks:
        event = HookEvent(
            name="", pid=7, generation=3, worker=5, settings=Settings(hook_timeout=timeout, on_worker_ready="m:ready")
        )
        return Hooks(functions, event, Log(), self.loop, "worker 5 gen 3")

    def live(self, seconds: float = 5.0, reason: str = "reload") -> float:
        """All of a life; the seconds that its end took."""

        async def life() -> float:
            self.hooks.ready()
            self.hooks.drain(reason)
            before = time.monotonic()
            await self.hooks.exit(seconds)
            return time.monotonic() - before

        self.hooks.start()
        return self.loop.run_until_complete(life())


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    with contextlib.ExitStack() as stack:

        def make(timeout: float = 10.0, **functions: Any) -> Worker:
            made = Worker()
            made.hooks = made.make(functions, timeout)
            stack.callback(close, made.loop)
            return made

        yield make


def close(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=1))
    loop.close()


def test_the_order_and_what_they_are_told(worker: Callable[..., Worker]) -> None:
    heard: list[HookEvent] = []
    worker(**dict.fromkeys(NAMES, heard.append)).live()
    assert [event.name for event in heard] == ["worker_start", "worker_ready", "worker_drain", "worker_exit"]
    assert [event.reason for event in heard] == ["", "", "reload", "reload"]
    assert {(event.pid, event.worker, event.generation) for event in heard} == {(7, 5, 3)}
    with pytest.raises(AttributeError):
        heard[0].reason = "x"  # type: ignore[misc]


def test_coroutine_functions_run_on_the_loop_and_others_in_a_thread(worker: Callable[..., Worker]) -> None:
    where: dict[str, object] = {}

    async def on_the_loop(event: HookEvent) -> None:
        await asyncio.sleep(0)
        where[event.name] = asyncio.get_running_loop()

    def elsewhere(event: HookEvent) -> None:
        where[event.name] = threading.current_thread()

    async def both(event: HookEvent) -> None:
        where[event.name] = asyncio.get_running_loop()

    made = worker(
        worker_start=on_the_loop, worker_ready=elsewhere, worker_drain=on_the_loop, worker_exit=lambda each: both(each)
    )
    made.live()
    assert where["worker_start"] is where["worker_drain"] is where["worker_exit"] is made.loop
    assert isinstance(where["worker_ready"], threading.Thread)
    assert where["worker_ready"] is not threading.main_thread()
    made = worker(worker_start=elsewhere)
    made.live()
    assert where["worker_start"] is threading.main_thread(), "there is no loop to hold yet"


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_exception_is_logged_and_harmless(
    worker: Callable[..., Worker], error: type[BaseException], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is, in each of them; with the traceback of the user's code alone."""

    def fail(_event: HookEvent) -> None:
        raise error

    async def fail_later(_event: HookEvent) -> None:
        raise error

    function = fail if kind == "sync" else fail_later
    worker(**dict.fromkeys(NAMES, function)).live()
    log = capfd.readouterr().err
    for name in NAMES:
        assert f"worker 5 gen 3: the hook on_{name} = " in log
    if error is not asyncio.CancelledError:
        assert log.count(f"raised {error.__name__}") == 4
        assert log.count("Traceback") == 4
        assert log.count("raise error") == 4
    assert "hooks.py" not in log.replace("test_hooks.py", "")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hook_that_hangs_is_left_behind(
    worker: Callable[..., Worker], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It holds neither the loop nor the end of the worker for longer than its time."""
    over = threading.Event()

    def hang(_event: HookEvent) -> None:
        over.wait(DEADLINE)

    async def hang_later(_event: HookEvent) -> None:
        await asyncio.sleep(20)

    function = hang if kind == "sync" else hang_later
    took = worker(0.1, worker_ready=function, worker_drain=function, worker_exit=function).live()
    assert 0.2 <= took < 5
    log = capfd.readouterr().err
    for name in ("ready", "drain", "exit"):
        assert f"the hook on_worker_{name} = " in log
    assert log.count("took longer than 0.1 s and is left") == 3

    took = worker(10.0, worker_drain=function, worker_exit=function).live(seconds=-1.0)
    assert 2 * TIME_MIN <= took < 5, "there is no time left for the drain: they get the least"
    log = capfd.readouterr().err
    assert "the hook on_worker_drain = '' has not ended when its worker had to" in log
    assert "the hook on_worker_exit = '' took longer than 0.2 s and is left" in log
    over.set()


def test_without_hooks_nothing_is_waited_for(worker: Callable[..., Worker]) -> None:
    made = worker()
    made.live()
    assert not asyncio.all_tasks(made.loop)


# ------------------------------------------------------------------------------------------------------- finding them


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_loading(modules: Path) -> None:
    write_app(modules, "good_hooks", "class Group:\n    @staticmethod\n    def ready(event): return event\n")
    assert load_hook("on_reload", "good_hooks:Group.ready")(EVENT) is EVENT


@pytest.mark.parametrize(
    ("source", "target", "message", "detail"),
    [
        ("", "no_such_module:f", "there is no module 'no_such_module' for the hook on_reload = 'no_such_module:f'", ""),
        ("", "bad_hooks.sub:f", "there is no module 'bad_hooks.sub'", ""),
        ("import no_such_thing", "bad_hooks:f", "could not be imported", "No module named 'no_such_thing'"),
        ("1/0", "bad_hooks:f", "could not be imported", "ZeroDivisionError"),
        ("raise SystemExit", "bad_hooks:f", "could not be imported", "SystemExit"),
        ("", "bad_hooks:f", "module 'bad_hooks' has no attribute 'f'", ""),
        ("f = 3", "bad_hooks:f", "is a int, which cannot be called", ""),
    ],
)
def test_what_cannot_be_loaded(modules: Path, source: str, target: str, message: str, detail: str) -> None:
    write_app(modules, "bad_hooks", source)
    sys.modules.pop("bad_hooks", None)
    with pytest.raises(ApplicationError, match="on_reload = ") as caught:
        load_hook("on_reload", target)
    assert message in caught.value.message
    assert detail in caught.value.detail
    assert "apphost" not in caught.value.detail


@pytest.mark.parametrize("value", ["hooks", "hooks:", ":f", "a b:f", "hooks.py:f()", "hooks:f:g"])
def test_syntax(value: str) -> None:
    with pytest.raises(SettingsError, match=r"for on_reload, .*: expected module:function"):
        resolve({"on_reload": value}, {})


def test_all_are_loaded_at_once_and_only_those_that_are_set(modules: Path) -> None:
    write_app(modules, "some_hooks", "def f(event): pass\n")
    loop = asyncio.new_event_loop()
    with socket.socket() as listener, contextlib.closing(loop):
        settings = Settings(on_worker_start="some_hooks:f", on_worker_exit="some_hooks:f")
        hooks = Hooks.load(Assignment(1, 1, settings, [listener], -1, Log(), 1), Log(), loop)
        assert set(hooks._functions) == {"worker_start", "worker_exit"}
        hooks = Hooks.load(Assignment(1, 1, settings, [], -1, Log(), 1), Log(), loop)
        assert set(hooks._functions) == {"worker_start"}, "a check serves nobody"
        settings = Settings(on_worker_exit="some_hooks:g")
        with pytest.raises(ApplicationError, match="on_worker_exit = 'some_hooks:g'"):
            Hooks.load(Assignment(1, 1, settings, [listener], -1, Log(), 1), Log(), loop)
