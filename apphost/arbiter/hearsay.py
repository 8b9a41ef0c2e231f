"""What the arbiter takes from its processes. Pure.

They run the application, often as another user than the arbiter, which may be root. So what they say is checked before
anything is done about it: a message of a known kind has the keys that it needs, of the type and within the bounds that
an honest process keeps to. Unknown kinds and keys pass, and are ignored, as everywhere in this protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from apphost.measures import fits
from apphost.messages import Message, ProtocolError
from apphost.settings import SETTINGS

_COUNT_MAX = 2**53  # what every reader of JSON takes for a whole number; requests of a million years

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _COUNT_MAX


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _COUNT_MAX  # not for nan


def _status(value: Any) -> bool:
    return type(value) is int and -255 <= value <= 255


def _settings(value: Any) -> bool:
    return isinstance(value, dict) and all(this.fits(value[name]) for name, this in SETTINGS.items() if name in value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _facts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, (str, int, type(None))) for each in value.values())


def _request(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and _seconds(value[0]) and _text(value[1]))


_NEEDED: Mapping[str, Mapping[str, Check]] = {
    "beat": {"requests": _count, "connections": _count, "active": _count},
    "ready": {"seconds": _seconds},
    "failed": {"message": _text, "detail": _text},
    "replace": {"why": _text},
    "leaving": {"why": _text},
    "settings": {"settings": _settings},
    "forked": {"wid": _count, "pid": _count},
    "exited": {"wid": _count, "status": _status},
    "answer": {"id": _count},
    "code": {"facts": _facts},
    "watching": {"how": _text, "files": _count},
    "changed": {"paths": _names, "count": _count},
    "note": {"text": _text},
}
_OPTIONAL: Mapping[str, Check] = {
    "errors": _count,
    "code": _status,
    "wid": _count,
    "ignored": _names,
    "oldest": _request,
    "measures": fits,
}


def examine(message: Message) -> None:
    """Raises `ProtocolError` for what no process of ours says."""
    kind = message["t"]
    for name, check in _NEEDED.get(kind, {}).items():
        if name not in message or not check(message[name]):
            raise ProtocolError(f"message {kind!r} without a proper {name!r}")
    for name, check in _OPTIONAL.items():
        if name in message and not check(message[name]):
            raise ProtocolError(f"message {kind[:80]!r} with an improper {name!r}")
