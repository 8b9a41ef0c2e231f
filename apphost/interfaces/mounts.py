"""Applications below a path that a trusted proxy tells with each request (`X-Forwarded-Prefix`)."""

from __future__ import annotations

from collections.abc import Callable

from apphost.protocols.base import Handler, Interface, Stream

MOUNTS_MAX = 64  # interfaces that are kept; a proxy has a few prefixes, and one that hands through any is no leak


class Mounts:
    """An interface that calls one for each prefix, made by `make` with that prefix when it is first asked for.

    So that an interface, also one of a plug-in, need not know that its root path can be another at each request.
    """

    def __init__(self, make: Callable[[str], Interface]) -> None:
        self._make = make
        self._mounted = {"": make("")}
        self.name = self._mounted[""].name
        self.websockets = self._mounted[""].websockets

    def handle(self, stream: Stream) -> Handler:
        prefix = stream.prefix
        interface = self._mounted.get(prefix)
        if interface is None:
            interface = self._make(prefix)
            if len(self._mounted) < MOUNTS_MAX:
                self._mounted[prefix] = interface
        return interface.handle(stream)
