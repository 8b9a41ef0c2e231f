"""The ready probe: a request that a worker answers to itself before it says that it is ready."""

from __future__ import annotations

import asyncio
import re
import socket

from apphost.errors import ApplicationError
from apphost.protocols.context import Context
from apphost.protocols.http1 import Connection

_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
_HEAD_MAX = 65536  # bytes of the answer in which the status line must be


async def probe(loop: asyncio.AbstractEventLoop, context: Context, path: str) -> None:
    """GET `path` from this worker's own connection, parser, interface and application.

    Raises `ApplicationError` unless the answer has a status below 500. `boot_timeout` bounds the wait.
    """
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        theirs.setblocking(False)
        await loop.connect_accepted_socket(lambda: Connection(context), theirs)
        request = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: apphost-ready-probe\r\nConnection: close\r\n\r\n"
        )
        await loop.sock_sendall(ours, request.encode("ascii"))
        answer = b""
        while b"\r\n" not in answer and len(answer) < _HEAD_MAX and (data := await loop.sock_recv(ours, 4096)):
            answer += data
    match = _STATUS.match(answer)
    if match is None:
        raise ApplicationError(f"the ready probe {path} got no answer")
    if int(match[1]) >= 500:
        raise ApplicationError(f"the ready probe {path} was answered with status {match[1].decode()}")
