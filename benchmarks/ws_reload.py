"""Reload a server with open WebSockets, again and again, and count what their clients notice.

    python benchmarks/ws_reload.py --rule rejoin --reloads 50 --sockets 500

Each client sends a counter every 50 ms and expects its echo: a message that does not come back in its turn is lost,
doubled or out of order, and a socket that ends is closed. Under `close` each end must be a 1012 with a full closing
handshake, and the client opens a new socket. Prints a line of JSON; exits with 1 if anything was noticed that should
not have been. Linux and one machine only: the client is on the same loopback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from echo import HANDSHAKE

HERE = Path(__file__).resolve().parent
EVERY = 0.05  # s between two messages of a socket
PATIENCE = 20.0  # s without an echo: the message is lost
MASK = b"\x37\xfa\x21\x3d"


def masked(payload: bytes) -> bytes:
    return bytes(byte ^ MASK[index % 4] for index, byte in enumerate(payload))


class Client:
    """One socket: closed-loop, so the next message is sent 50 ms after the one before or at its echo."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(HANDSHAKE)
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            data = self.sock.recv(4096)
            if not data:
                raise OSError("the handshake was not answered")
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise OSError(f"the handshake was answered {head[:40]!r}")
        self.sock.setblocking(False)
        self.number = 0
        self.waiting = False
        self.due = self.since = time.monotonic()
        self.closing = 0  # the code of the server's close frame

    def send(self, now: float) -> None:
        self.number += 1
        self.waiting = True
        self.since = now
        self.due = now + EVERY
        self.sock.sendall(b"\x82\x88" + MASK + masked(struct.pack("!Q", self.number)))

    def receive(self) -> Iterator[str]:
        """What is noticed: "echo", "wrong", "closed 1012 properly", "reset" ..."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            yield "reset"
            return
        if not data:
            yield f"closed {self.closing} properly" if self.closing else "closed without a word"
            return
        self.buffer += data
        while len(self.buffer) >= 2 and len(self.buffer) >= 2 + self.buffer[1]:
            first, size = self.buffer[0], self.buffer[1]
            payload, self.buffer = self.buffer[2 : 2 + size], self.buffer[2 + size :]
            if first == 0x82:
                right = self.waiting and payload == struct.pack("!Q", self.number)
                self.waiting = False
                yield "echo" if right else "wrong"
            elif first == 0x88:
                (self.closing,) = struct.unpack("!H", payload[:2])
                self.sock.sendall(b"\x88\x82" + MASK + masked(payload[:2]))
            elif first == 0x89:
                self.sock.sendall(bytes((0x8A, 0x80 | size)) + MASK + masked(payload))


class Server:
    def __init__(self, options: argparse.Namespace, log: Path) -> None:
        self.log = log
        command = [
            sys.executable,
            "-m",
            "apphost",
            "plain_asgi:app",
            "--bind",
            "127.0.0.1:0",
            "--ws-on-reload",
            options.rule,
        ]
        command += ["--workers", str(options.workers), "--log-level", "debug" if options.log else "info"]
        env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=HERE / "apps", env=env, stdout=file, stderr=file, start_new_session=True
            )
        self.generation = 0
        deadline = time.monotonic() + 30
        while not self.reloaded():
            if time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.05)
        match = re.search(r"listening at http://127.0.0.1:(\d+)", log.read_text())
        assert match is not None
        self.port = int(match[1])

    def reload(self) -> None:
        os.kill(self.process.pid, signal.SIGUSR1)

    def reloaded(self) -> bool:
        """Whether the generation asked for last serves, and the workers of the one before are gone."""
        text = self.log.read_text()
        if f"generation {self.generation + 1} is serving" not in text:
            return False
        booted, gone = (len(re.findall(rf"gen {self.generation} {what}", text)) for what in ("booting", "gone"))
        if booted > gone:
            return False
        self.generation += 1
        return True

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


def storm(server: Server, options: argparse.Namespace) -> collections.Counter[str]:
    noticed: collections.Counter[str] = collections.Counter()
    poll = select.epoll()
    clients: dict[int, Client] = {}

    def connect() -> None:
        client = Client(server.port)
        clients[client.sock.fileno()] = client
        poll.register(client.sock, select.EPOLLIN)

    for _ in range(options.sockets):
        connect()
    reloads, next_reload, checked = 0, time.monotonic() + 1, 0.0
    while True:
        for number, _ in poll.poll(0.005):
            client = clients[number]
            for what in client.receive():
                noticed[what] += 1
                if what not in ("echo", "wrong"):
                    poll.unregister(number)
                    del clients[number]
                    client.sock.close()
                    connect()
        now = time.monotonic()
        for client in clients.values():
            if not client.closing and not client.waiting and client.due <= now:
                with contextlib.suppress(OSError):
                    client.send(now)
            elif client.waiting and not client.closing and now - client.since > PATIENCE:
                noticed["lost"] += 1
                client.waiting = False
        if now >= next_reload and now - checked > 0.1:
            checked = now
            if reloads == 0 or server.reloaded():
                if reloads == options.reloads:
                    return noticed
                server.reload()
                reloads += 1
                next_reload = now + 0.3


def main() -> int:
    parser = argparse.ArgumentParser(description="Reload a server with open WebSockets.")
    parser.add_argument("--rule", choices=["close", "rejoin", "resume"], default="rejoin")
    parser.add_argument("--reloads", type=int, default=50)
    parser.add_argument("--sockets", type=int, default=500)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--log", metavar="FILE", type=Path, help="keep the server's log, with what it says for debugging"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options, options.log or Path(folder, "log"))
        try:
            noticed = storm(server, options)
        finally:
            server.stop()
        text = server.log.read_text()
    problems = len(re.findall(r" (?:warning|error) ", text))
    print(
        json.dumps({**vars(options), "log": None, "noticed": dict(noticed), "warnings and errors in the log": problems})
    )
    allowed = {"echo"} if options.rule != "close" else {"echo", "closed 1012 properly"}
    return 1 if set(noticed) - allowed or problems else 0


if __name__ == "__main__":
    sys.exit(main())
