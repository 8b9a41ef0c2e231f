"""The load of the WebSocket cases: connections that each send a binary message, wait for its echo, and send the next.

    python benchmarks/echo.py PORT SECONDS BYTES CONNECTIONS

Prints JSON. Plain sockets and frames made beforehand, so that the client costs as little as
Python allows; every echo is compared with what was sent.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TIMEOUT = 5.0  # s without any echo are the end


def frames(size: int) -> tuple[bytes, bytes]:
    """A masked binary message, and its echo (RFC 6455, 5.2)."""
    payload, key = os.urandom(size), os.urandom(4)
    masked = bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))
    if size < 126:
        long, short = bytes((0x80 | size,)), bytes((size,))
    elif size < 65536:
        long, short = struct.pack("!BH", 0xFE, size), struct.pack("!BH", 126, size)
    else:
        long, short = struct.pack("!BQ", 0xFF, size), struct.pack("!BQ", 127, size)
    return b"\x82" + long + key + masked, b"\x82" + short + payload


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(HANDSHAKE)
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = sock.recv(4096)
        if not data:
            break
        answer += data
    if not answer.startswith(b"HTTP/1.1 101 ") or not answer.endswith(b"\r\n\r\n"):
        raise SystemExit(f"the handshake was answered {answer[:80]!r}")
    return sock


def run(port: int, seconds: float, size: int, connections: int) -> tuple[int, float, int]:
    """Echoes, seconds, and echoes that were not what was sent."""
    message, echo = frames(size)
    sockets = {sock.fileno(): sock for sock in (connect(port) for _ in range(connections))}
    received = dict.fromkeys(sockets, b"")
    poll = select.epoll()
    for number, sock in sockets.items():
        poll.register(number, select.EPOLLIN)
        sock.sendall(message)
    count, wrong = 0, 0
    start = now = time.perf_counter()
    while now - start < seconds:
        ready = poll.poll(TIMEOUT)
        if not ready:
            raise SystemExit(f"no echo for {TIMEOUT:.0f} s")
        for number, _ in ready:
            data = sockets[number].recv(262144)
            if not data:
                raise SystemExit("a connection was closed")
            if len(data) < len(echo):
                data = received[number] + data
                received[number] = b"" if len(data) >= len(echo) else data
            if len(data) >= len(echo):
                count += 1
                wrong += data != echo
                sockets[number].sendall(message)
        now = time.perf_counter()
    return count, now - start, wrong


def main() -> None:
    port, seconds, size, connections = sys.argv[1:]
    count, took, wrong = run(int(port), float(seconds), int(size), int(connections))
    print(json.dumps({"echoes": count, "seconds": took, "wrong": wrong}))


if __name__ == "__main__":
    main()
