"""The transport of the drivers: a socket whose peer reads everything at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

_EXTRA = {"peername": ("127.0.0.1", 50000), "sockname": ("127.0.0.1", 8000)}


class CallsSoon(Protocol):
    def call_soon(self, call: Callable[..., Any], *args: Any) -> object: ...


class FakeTransport(asyncio.Transport):
    """Keeps what is written, and what should not have been (`faults`). `signs` counts what the server does."""

    def __init__(self, loop: CallsSoon, protocol: asyncio.Protocol) -> None:
        super().__init__(_EXTRA)
        self.written: list[bytes] = []
        self.faults: list[str] = []
        self.signs = 0
        self.paused = self.closing = self.eof_written = self.aborted = self.lost = False
        self._loop = loop
        self._protocol = protocol

    @property
    def wire(self) -> bytes:
        return b"".join(self.written)

    def write(self, data: Any) -> None:
        self.signs += 1
        if self.closing or self.eof_written:
            self.faults.append(f"written after the end: {bytes(data)[:60]!r}")
        self.written.append(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.signs += 1
        self.eof_written = True

    def close(self) -> None:
        self.signs += 1
        if not self.closing:
            self.closing = True
            self._loop.call_soon(self.lose)

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.signs += 1
        self.paused = False

    def is_reading(self) -> bool:
        return not self.paused and not self.closing

    def lose(self) -> None:
        """The connection has ended."""
        if not self.lost:
            self.lost = self.closing = True
            self._protocol.connection_lost(None)
