"""`log_config`: a file for `logging.config.dictConfig`, and apphost's own lines through the handlers that it names.

Our lines are written as without it; where the file has the loggers `apphost.access` or `apphost.error`, they go to the
handlers of these, too. Those handlers are kept from the moment of configuration, so an application that configures
logging anew, which disables loggers and takes handlers off, does not silence them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.config
import os
from typing import Any

from apphost.errors import SettingsError, user_traceback
from apphost.logs import Log
from apphost.sources import toml_parser

ACCESS, ERROR = "apphost.access", "apphost.error"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def read(path: str, directory: str) -> dict[str, Any]:
    """The configuration in the file, relative to `directory`. Raises `SettingsError`."""
    try:
        with open(os.path.join(directory, path), encoding="utf-8") as file:
            text = file.read()
    except OSError as exc:
        raise SettingsError(f"cannot read the logging configuration {path}: {exc.strerror}") from None
    except ValueError as exc:
        raise SettingsError(f"the logging configuration {path} is not UTF-8: {exc}") from None
    is_toml = path.endswith(".toml")
    loads = toml_parser() if is_toml else json.loads
    if loads is None:
        raise SettingsError(f"reading {path} needs the TOML parser tomli on this Python: pip install 'apphost[toml]'")
    try:
        config = loads(text)
    except (ValueError, RecursionError) as exc:
        raise SettingsError(
            f"the logging configuration {path} is not valid {'TOML' if is_toml else 'JSON'}: {exc}"
        ) from None
    if not isinstance(config, dict):
        raise SettingsError(f"the logging configuration {path} must be an object, as of logging.config.dictConfig")
    return config


class Relay:
    """The handlers that a logger had when it was configured."""

    def __init__(self, name: str) -> None:
        logger = logging.getLogger(name)
        self._name = name
        self._least = logger.getEffectiveLevel()
        self._handlers: list[logging.Handler] = []
        at: logging.Logger | None = logger
        while at is not None:
            self._handlers += at.handlers
            at = at.parent if at.propagate else None

    def emit(self, level: int, text: str) -> None:
        """From any thread; whatever a handler does, it must not end a worker."""
        if level < self._least:
            return
        record = logging.LogRecord(self._name, level, "", 0, "%s", (text,), None)
        for handler in self._handlers:
            if level >= handler.level:
                try:
                    handler.handle(record)
                except Exception:
                    with contextlib.suppress(Exception):
                        handler.handleError(record)

    def write(self, lines: list[str]) -> None:
        """As a sink of the access log."""
        for line in lines:
            self.emit(logging.INFO, line)

    def say(self, level: str, message: str, detail: str) -> None:
        """As the `relay` of a `Log`."""
        self.emit(_LEVELS[level], f"{message}\n{detail}" if detail else message)


class LogConfig:
    """A configuration that has been read, and once applied, where our lines go, too (`access`, `error`)."""

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        self._path = path
        # The loggers that exist by then are those of our own libraries: none of them is meant to be silenced.
        self._config = {"disable_existing_loggers": False, **config}
        self._applied = False
        self.access: Relay | None = None
        self.error: Relay | None = None

    def apply(self, log: Log) -> None:
        """Configure `logging`, once; later calls, in the forked processes too, do nothing. Raises `SettingsError`."""
        if self._applied:
            return
        try:
            logging.config.dictConfig(self._config)
        except Exception as exc:
            # What is wrong stands in the cause: `Unable to configure handler 'file'` comes from `No such directory`.
            cause = f": {exc.__cause__}" if exc.__cause__ is not None else ""
            raise SettingsError(
                f"the logging configuration {self._path} was not accepted: {exc or type(exc).__name__}{cause}",
                user_traceback(exc) if not isinstance(exc, ValueError) else "",
            ) from None
        self._applied = True
        named = self._config.get("loggers") or {}
        self.access = Relay(ACCESS) if ACCESS in named else None
        self.error = Relay(ERROR) if ERROR in named else None
        log.relay = self.error.say if self.error is not None else None
