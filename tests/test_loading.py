"""Finding the application and telling its interface; parsers, loops and plug-ins by name."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from apphost.errors import ApplicationError, SettingsError
from apphost.worker import loading
from apphost.worker.loading import (
    choose_loop,
    choose_parser,
    detect_interface,
    load_application,
    load_plugin,
    modern_asgi,
    preimport,
)
from tests.support import write_app

SOURCE = """
def app(environ, start_response):
    pass

application = app

class Holder:
    inner = app

holder = Holder()
number = 7

def make():
    return app

def make_bad():
    raise LookupError("in the factory")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`module(source)`: the name of a new module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def module(source: str, name: str = "") -> str:
        name = name or f"loaded_{tmp_path.name}"
        write_app(tmp_path, name, source)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "modules", {key: value for key, value in sys.modules.items() if key in before})
        return name

    return module


@pytest.mark.parametrize(
    ("attribute", "factory", "found"),
    [("", False, "app"), (":app", False, "app"), (":holder.inner", False, "app"), (":make", True, "app"),
     (":make()", False, "app"), (":make()", True, "app"), (":make", False, "make")],
)  # fmt: skip
def test_load(module: Callable[[str], str], attribute: str, factory: bool, found: str) -> None:
    assert load_application(module(SOURCE) + attribute, factory).__name__ == found


def test_default_attribute_prefers_application(module: Callable[[str], str]) -> None:
    """PEP 3333's habit first."""
    name = module("def application(e, s): pass\n\ndef app(e, s): pass\n")
    assert load_application(name, False).__name__ == "application"


@pytest.mark.parametrize(
    ("attribute", "factory", "message"),
    [
        (":ap", False, "has no attribute 'ap' .* Did you mean 'app'"),
        (":holder.iner", False, "has no attribute 'iner' .*"),
        (":number.x", False, "has no attribute 'x'"),
        (":number", False, "a int cannot be called"),
        (":number", True, "is no factory: a int cannot be called"),
        (":make_bad", True, "factory .* raised LookupError"),
    ],
)
def test_load_refuses(module: Callable[[str], str], attribute: str, factory: bool, message: str) -> None:
    with pytest.raises(ApplicationError, match=message):
        load_application(module(SOURCE) + attribute, factory)


def test_missing_module_says_where_it_looked(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module(SOURCE)
    with pytest.raises(ApplicationError) as info:
        load_application(name[:-1] + ":app", False)
    assert f"Did you mean {name!r}?" in info.value.message
    assert str(tmp_path) in info.value.message
    assert ".zip" not in info.value.message
    assert info.value.detail == ""


def test_missing_module_in_a_package(module: Callable[..., str]) -> None:
    package = module("", "packed.__init__").partition(".")[0]
    module(SOURCE, "packed.inner")
    with pytest.raises(ApplicationError, match=r"no module 'packed\.iner' .*Did you mean 'inner'\?"):
        load_application(f"{package}.iner:app", False)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import not_installed_anywhere", "raised ModuleNotFoundError while it was imported"),
        ("raise SystemExit(0)", "ended itself with SystemExit while it was imported"),
        ("raise KeyboardInterrupt", "ended itself with KeyboardInterrupt"),
        ("x = (", "raised SyntaxError"),
    ],
)
def test_module_that_fails(module: Callable[[str], str], source: str, message: str) -> None:
    with pytest.raises(ApplicationError, match=message) as info:
        load_application(module(source), False)
    assert "loaded_" in info.value.detail


# -------------------------------------------------------------------------------------------------------- the interface


async def asgi(scope: Any, receive: Any, send: Any) -> None: ...
def asgi_without_async(scope: Any, receive: Any, send: Any) -> None: ...
def wsgi(environ: Any, start_response: Any) -> None: ...
def wsgi_with_more(environ: Any, start_response: Any, option: int = 1) -> None: ...
def legacy(scope: Any) -> None: ...
def anything(*args: Any) -> None: ...
def make_app() -> None: ...
def make_from(config: Any) -> None: ...
def four(a: Any, b: Any, c: Any, d: Any) -> None: ...


class Asgi:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class Wsgi:
    def __call__(self, environ: Any, start_response: Any) -> None: ...


class WsgiMethod:
    def serve(self, environ: Any, start_response: Any) -> None: ...
    async def serve_async(self, scope: Any, receive: Any, send: Any) -> None: ...


class WsgiClass:
    """PEP 3333's own example: the class is the application, its instances are the iterables."""

    def __init__(self, environ: Any, start_response: Any) -> None: ...


class LegacyClass:
    def __init__(self, scope: Any) -> None: ...
    async def __call__(self, receive: Any, send: Any) -> None: ...


@pytest.mark.parametrize(
    ("app", "expected"),
    [
        (asgi, "asgi"), (asgi_without_async, "asgi"), (Asgi(), "asgi"), (functools.partial(asgi), "asgi"),
        (WsgiMethod().serve_async, "asgi"), (wsgi, "wsgi"), (wsgi_with_more, "wsgi"), (Wsgi(), "wsgi"),
        (functools.partial(wsgi_with_more, option=2), "wsgi"), (WsgiMethod().serve, "wsgi"), (WsgiClass, "wsgi"),
        (anything, "wsgi"), (dict.fromkeys, "wsgi"), (legacy, "asgi2"), (LegacyClass, "asgi2"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", None) or type(value).__name__,
)  # fmt: skip
def test_detect(app: Any, expected: str) -> None:
    """G, A1"""
    assert detect_interface(app) == expected


@pytest.mark.parametrize("app", [make_app, make_from, four, Asgi])
def test_detect_refuses(app: Any) -> None:
    with pytest.raises(ApplicationError, match=r"is no application: .* add --factory"):
        detect_interface(app)


def test_legacy_in_modern_form() -> None:
    """A1"""
    calls: list[object] = []

    class App:
        def __init__(self, scope: object) -> None:
            calls.append(scope)

        async def __call__(self, receive: object, send: object) -> None:
            calls.append((receive, send))

    asyncio.run(modern_asgi(App)("scope", "receive", "send"))
    assert calls == ["scope", ("receive", "send")]


# -------------------------------------------------------------------------------------- plug-ins, parsers, loops


def test_built_in_plugins() -> None:
    """The entry points of the package and the built-in table say the same."""
    for group, names in loading._BUILT_IN.items():
        for name, target in names.items():
            assert load_plugin(group, name).__name__ == target.partition(":")[2]


def test_plugin_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", "json:loads", "apphost.parsers")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: EntryPoints([entry]))
    assert load_plugin("apphost.parsers", "mine").__name__ == "loads"
    with pytest.raises(SettingsError, match=r"nothing called 'mien' .*; there is h11, httptools, mine"):
        load_plugin("apphost.parsers", "mien")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`without(name, ...)`: these modules are not installed."""

    def without(*names: str) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find_spec(name))
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
        monkeypatch.delitem(sys.modules, "apphost.protocols.httptools_parser", raising=False)

    return without


def test_choose_parser(http_parser: str) -> None:
    name, parser = choose_parser(http_parser)
    assert name == http_parser
    assert parser.parse(b"GET /x?y HTTP/1.1\r\nHost: a\r\n\r\n") == [(b"host", b"a")]


def test_choose_loop(loop_name: str) -> None:
    name, loop = choose_loop(loop_name)
    assert name == loop_name
    assert loop.run_until_complete(asyncio.sleep(0, 7)) == 7
    loop.close()


def test_auto_takes_the_fast_ones() -> None:
    pytest.importorskip("httptools")
    pytest.importorskip("uvloop")
    assert choose_parser("auto")[0] == "httptools"
    name, loop = choose_loop("auto")
    loop.close()
    assert name == "uvloop"


def test_auto_without_the_fast_ones(without: Callable[..., None]) -> None:
    without("httptools", "uvloop")
    assert choose_parser("auto")[0] == "h11"
    name, loop = choose_loop("auto")
    loop.close()
    assert name == "asyncio"
    preimport("auto", "auto")  # is no error


def test_missing_extras(without: Callable[..., None]) -> None:
    without("httptools", "uvloop")
    with pytest.raises(SettingsError, match=r"the parser 'httptools' needs httptools: pip install 'apphost\[fast\]'"):
        choose_parser("httptools")
    with pytest.raises(SettingsError, match=r"the loop 'uvloop' is not installed: pip install 'apphost\[fast\]'"):
        choose_loop("uvloop")


def test_preimport_brings_what_workers_need() -> None:
    preimport("h11", "asyncio")
    for name in ("apphost.protocols.http1", "apphost.protocols.h11_parser", "apphost.interfaces.wsgi"):
        assert isinstance(sys.modules[name], ModuleType)


def test_h11_is_read_without_its_state_machine_or_as_documented() -> None:
    """An h11 that is built otherwise inside must not stop us: then its documented way is taken."""
    from apphost.protocols import h11_parser

    assert h11_parser.best_reader() is not h11_parser.read_with_connection, "a new h11: look at its readers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "h11._readers", None)
        assert h11_parser.best_reader() is h11_parser.read_with_connection
