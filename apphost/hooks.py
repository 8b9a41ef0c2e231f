"""Server hooks: functions of the operator, named in the settings `on_...`, that are called when something happens.

Those of workers run in the worker (`worker/hooks.py`), those of the arbiter in a process of their own
(`hookrunner.py`), as the arbiter runs nothing of the application.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from apphost.errors import ApplicationError, user_traceback
from apphost.settings import Settings

Hook = Callable[["HookEvent"], object | Awaitable[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HookEvent:
    """What has happened: the one argument of a hook.

    name: the setting without `on_`, such as `worker_ready`. pid: of the worker, or of the arbiter for its hooks.
    generation: of the worker; of the code that is reloaded; 0 at the start of the arbiter.
    worker: its number, 0 for hooks of the arbiter.
    reason: why a worker drains or ends (`reload`, `stop`, `recycle`, `scale-down` ...); the line of the log about a
    reload; else empty.
    outcome: of a reload, `complete` or `given up`; else empty.
    settings: all settings, to read.
    """

    name: str
    pid: int
    generation: int
    settings: Settings
    worker: int = 0
    reason: str = ""
    outcome: str = ""


def load_hook(setting: str, target: str) -> Hook:
    """Import `module:function`, the value of `setting`. Raises `ApplicationError`, whatever the module does wrong."""
    what = f"{setting} = {target!r}"
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (module_name == exc.name or module_name.startswith(exc.name + ".")):
            raise ApplicationError(f"there is no module {exc.name!r} for the hook {what}") from None
        raise ApplicationError(f"the hook {what} could not be imported", user_traceback(exc)) from None
    except BaseException as exc:
        raise ApplicationError(f"the hook {what} could not be imported", user_traceback(exc)) from None
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise ApplicationError(f"module {module_name!r} has no attribute {name!r} for the hook {what}") from None
    if not callable(found):
        raise ApplicationError(f"the hook {what} is a {type(found).__name__}, which cannot be called")
    hook: Hook = found
    return hook
