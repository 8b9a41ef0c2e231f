"""Finding the application, the interface that it speaks, and the parser and loop to serve it with."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

from apphost.errors import ApplicationError, SettingsError, nearest, user_traceback

DEFAULT_ATTRIBUTES = ("application", "app")  # PEP 3333's habit first, then the one of Flask, FastAPI, Starlette

_BUILT_IN = {
    "apphost.parsers": {
        "h11": "apphost.protocols.h11_parser:H11Parser",
        "httptools": "apphost.protocols.httptools_parser:HttptoolsParser",
    },
    "apphost.interfaces": {
        "asgi": "apphost.interfaces.asgi:AsgiInterface",
        "wsgi": "apphost.interfaces.wsgi:WsgiInterface",
    },
}


def load_application(target: str, factory: bool) -> Any:
    """Import `module:attribute` (or `module` alone) and return the application; `factory`: call what was found.

    Raises `ApplicationError` for whatever the user's code does wrong, `SystemExit` included.
    """
    module_name, _, attribute = target.partition(":")
    if attribute.endswith("()"):
        attribute, factory = attribute[:-2], True
    module = _import(module_name, target)
    found = _attribute(module, attribute, target) if attribute else _default_attribute(module, target)
    if factory:
        found = _call_factory(found, target)
    if not callable(found):
        raise ApplicationError(f"{target!r} is no application: a {type(found).__name__} cannot be called")
    return found


def _import(module_name: str, target: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (module_name == exc.name or module_name.startswith(exc.name + ".")):
            raise ApplicationError(
                f"there is no module {exc.name!r} for the application {target!r}.{_nearest_module(exc.name)} It was "
                f"looked for in: {', '.join(_own_path())} and the installed packages. "
                "Is the name right, and the directory (--chdir, --pythonpath)?"
            ) from None
        raise _failed_import(exc, target) from None
    except BaseException as exc:
        raise _failed_import(exc, target) from None


def _own_path() -> list[str]:
    """What comes before Python's own part of `sys.path`: where the user's modules are."""
    standard = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
    return [path or "." for path in itertools.takewhile(lambda path: os.path.basename(path) != standard, sys.path)]


def _nearest_module(name: str) -> str:
    import pkgutil

    parent, _, last = name.rpartition(".")
    # The parent of a missing module was imported, or it would be what is missing.
    where = getattr(sys.modules.get(parent), "__path__", []) if parent else _own_path()
    return nearest(last, (module.name for module in pkgutil.iter_modules(where)))


def _failed_import(exc: BaseException, target: str) -> ApplicationError:
    what = f"raised {type(exc).__name__}" if isinstance(exc, Exception) else f"ended itself with {type(exc).__name__}"
    return ApplicationError(f"the application {target!r} {what} while it was imported", user_traceback(exc))


def _default_attribute(module: Any, target: str) -> Any:
    for name in DEFAULT_ATTRIBUTES:
        if hasattr(module, name):
            return getattr(module, name)
    expected = " nor ".join(repr(name) for name in DEFAULT_ATTRIBUTES)
    raise ApplicationError(
        f"module {target!r} has neither {expected}: name the application, as in {target}:my_application"
    )


def _attribute(module: Any, attribute: str, target: str) -> Any:
    found = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            known = [known for known in vars(found) if not known.startswith("_")] if hasattr(found, "__dict__") else []
            raise ApplicationError(
                f"module {module.__name__!r} has no attribute {name!r} for the application {target!r}."
                + nearest(name, known)
            ) from None
    return found


def _call_factory(factory: Callable[[], Any], target: str) -> Any:
    if not callable(factory):
        raise ApplicationError(f"{target!r} is no factory: a {type(factory).__name__} cannot be called")
    try:
        return factory()
    except BaseException as exc:
        raise ApplicationError(
            f"the application factory {target!r} raised {type(exc).__name__}", user_traceback(exc)
        ) from None


def detect_interface(app: Any) -> str:
    """`asgi`, `asgi2` (the legacy form of two calls) or `wsgi`, from the shape of the callable. Pure.

    ASGI is a coroutine function or an object with a coroutine `__call__`; for anything else the number of arguments
    that it takes tells: two for WSGI, three for ASGI, one, the scope, for legacy ASGI. Raises `ApplicationError` when
    it takes none of these.
    """
    call = getattr(app, "__call__", None)  # noqa: B004 - to look at, not to find out whether there is one
    # A class is called to make an instance; what its own `__call__` is like tells of those.
    legacy = inspect.isclass(app) and inspect.iscoroutinefunction(app.__call__)
    if not inspect.isclass(app) and (inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(call)):
        return "asgi"
    try:
        signature = inspect.signature(app)
    except (TypeError, ValueError):
        return "wsgi"
    if legacy and _takes(signature, 1):
        return "asgi2"
    if _takes(signature, 2):
        return "wsgi"
    if _takes(signature, 3):
        return "asgi"
    if _takes(signature, 1) and (inspect.isclass(app) or next(iter(signature.parameters)) == "scope"):
        return "asgi2"
    raise ApplicationError(
        f"{getattr(app, '__name__', type(app).__name__)}{signature} is no application: WSGI calls it with two "
        "arguments (environ, start_response), ASGI with three (scope, receive, send). If it makes the application, "
        "add --factory"
    )


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def modern_asgi(app: Any) -> Any:
    """A legacy application, `app(scope)` and then `(receive, send)`, in the form of one call."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await app(scope)(receive, send)

    return application


def load_plugin(group: str, name: str) -> Any:
    """What is registered as `name` in the entry point group. Raises `SettingsError` naming what there is."""
    built_in = _BUILT_IN[group]
    if name in built_in:
        module, _, attribute = built_in[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    from importlib.metadata import entry_points

    found = entry_points(group=group)
    for entry in found:
        if entry.name == name:
            try:
                return entry.load()
            except Exception as exc:
                raise SettingsError(
                    f"the plug-in {name!r} of {group} cannot be imported from {entry.value}", user_traceback(exc)
                ) from None
    known = sorted({*built_in, *found.names})
    raise SettingsError(f"nothing called {name!r} is registered in {group}; there is {', '.join(known)}")


def choose_parser(wanted: str) -> tuple[str, Any]:
    """(name, a parser) for the setting `http`. Raises `SettingsError` when it is not installed."""
    name = wanted
    if wanted == "auto":
        name = "httptools" if importlib.util.find_spec("httptools") else "h11"
    try:
        return name, load_plugin("apphost.parsers", name)()
    except ModuleNotFoundError as exc:
        raise SettingsError(f"the parser {name!r} needs {exc.name}: pip install 'apphost[fast]'") from None


def choose_loop(wanted: str) -> tuple[str, Any]:
    """(name, a new event loop) for the setting `loop`. Raises `SettingsError` when it is not installed."""
    import asyncio

    if wanted == "uvloop" or (wanted == "auto" and importlib.util.find_spec("uvloop")):
        try:
            import uvloop
        except ModuleNotFoundError:
            raise SettingsError("the loop 'uvloop' is not installed: pip install 'apphost[fast]'") from None
        return "uvloop", uvloop.new_event_loop()
    return "asyncio", asyncio.new_event_loop()


def preimport(http: str, loop: str) -> None:
    """Import what every worker runs, parser and loop included, so that workers forked later find it in memory.

    What is missing is said by the worker that misses it.
    """
    names = ["apphost.worker.main", "apphost.interfaces.asgi", "apphost.interfaces.wsgi"]
    names += ["apphost.protocols.h11_parser"] if http == "h11" else ["apphost.protocols.httptools_parser"]
    names += ["uvloop"] if loop in ("auto", "uvloop") else []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
