"""Accepting connections where the system refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest

from apphost.logs import Log
from apphost.protocols.context import Context
from apphost.protocols.h11_parser import H11Parser
from apphost.worker.acceptor import Acceptor


class Listener:
    """`accept` raises these errors, one after the other; then nobody waits to be accepted."""

    def __init__(self, *errors: int) -> None:
        self._errors: Iterator[int] = iter(errors)
        self.accepts = 0
        self.closed = False

    def accept(self) -> Any:
        self.accepts += 1
        number = next(self._errors, errno.EAGAIN)
        raise OSError(number, os.strerror(number))

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.closed = True


def stopped(listener: Listener) -> None:
    """Take what is left in the backlog, as at the beginning of a drain without successors."""
    loop = asyncio.new_event_loop()
    try:
        context = Context(loop, H11Parser(), Log("error"))
        Acceptor(loop, cast(socket.socket, listener), context, context.log, lambda: True).stop(take_rest=True)
    finally:
        loop.close()


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH])
def test_a_connection_that_the_network_has_lost_is_no_error_of_the_listener(number: int) -> None:
    """accept(2): "treat them like EAGAIN by retrying". Else one such connection would stop a drain on its way."""
    listener = Listener(number, number)
    stopped(listener)
    assert listener.accepts == 3
    assert listener.closed


def test_an_error_of_the_listener_is_raised() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        stopped(Listener(errno.EINVAL))
