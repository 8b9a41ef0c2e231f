"""The masking of what a client sends through a WebSocket (RFC 6455, 5.3): an exclusive or with four bytes. Pure."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import PathFinder
from typing import Any

Unmask = Callable[[bytes, bytes], bytes]  # of a payload and its key of 4 bytes

# Up to this many bytes the exclusive or of two large numbers is faster than four translations (1.8 against 3.6 us for
# 64 bytes, 7.9 against 6.6 for 1024).
_NUMBER_MAX = 512


_COMPILED = "websockets.speedups"


def fastest() -> Unmask:
    """The compiled one of the websockets library where it is installed (`apphost[fast]`): 3 us for 16 KiB, not 41."""
    function: Unmask | None = getattr(_compiled(), "apply_mask", None)
    return function or unmask


def _compiled() -> Any:
    """That module alone, None where it is not installed or not made for this machine.

    To import it takes the package around it along, of which nothing else is used: 70 ms and 1 MiB in each worker, in
    place of 1 ms and 30 KiB.
    """
    if _COMPILED in sys.modules:
        return sys.modules[_COMPILED]
    package = importlib.util.find_spec("websockets")
    places = package.submodule_search_locations if package is not None else None
    spec = PathFinder.find_spec(_COMPILED, places) if places else None
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    finally:
        # Extension modules may enter themselves there, and one without its package would confuse who imports that.
        sys.modules.pop(_COMPILED, None)
    return module


def unmask(payload: bytes, key: bytes) -> bytes:
    """As fast as it gets in Python."""
    size = len(payload)
    if size <= _NUMBER_MAX:
        mask = (key * (size // 4 + 1))[:size]
        return (int.from_bytes(payload, "little") ^ int.from_bytes(mask, "little")).to_bytes(size, "little")
    data = bytearray(payload)
    for offset, value in enumerate(key):
        data[offset::4] = data[offset::4].translate(_table(value))
    return bytes(data)


@cache  # all of them take 74 KB and 10 ms, which a process with the compiled one need not have
def _table(value: int) -> bytes:
    return bytes(each ^ value for each in range(256))
