"""The life of the watcher process. It is started by the arbiter, and ends when its channel does.

Messages from the arbiter: `watch`, once. To the arbiter: `watching` when it has begun, `changed` for each burst of
changes, `note` for what the user should know.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import NoReturn

from apphost.errors import ApphostError
from apphost.messages import Channel, Message
from apphost.peers import is_of_parent
from apphost.privileges import become, resolve
from apphost.watcher import git
from apphost.watcher.engines import Engine, Polling, choose
from apphost.watcher.rules import Burst, Rules
from apphost.watcher.tree import MOST, Tree

PATHS_TOLD = 20  # of a burst: for the log, which names three; a checkout may change thousands
RETRIES = 3  # for notifications of a tree that changes while they are set up, before polling takes their place


def main(fd: int, dump: int) -> NoReturn:
    """Watch for the arbiter at the other end of the channel `fd`. `dump` is closed: it has no last words."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to everybody; they are the arbiter's business
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.close(dump)
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    if not is_of_parent(sock):
        os._exit(1)
    channel = Channel(sock)
    sock.setblocking(True)
    order = _first_order(channel)
    threading.Thread(target=_end_with, args=(sock,), daemon=True).start()
    try:
        Watcher(channel, order).run()
    except ApphostError as exc:
        channel.send({"t": "note", "text": exc.message, "fatal": True})
    except OSError as exc:
        channel.send({"t": "note", "text": f"the watcher cannot go on: {exc}"})
    os._exit(1)


def _first_order(channel: Channel) -> Message:
    while (messages := channel.receive()) is not None:
        for message, _ in messages:
            if message["t"] == "watch":
                return message
    os._exit(0)


def _end_with(sock: socket.socket) -> NoReturn:
    """In a thread of its own, as the main one may be in the middle of a look, or of a wait of the system's."""
    while True:
        try:
            if not sock.recv(4096):
                break
        except OSError:
            break
    os._exit(0)


class Watcher:
    def __init__(self, channel: Channel, order: Message) -> None:
        """`order`: roots, files, include, exclude, engine, since, user, group. Raises `ApphostError`."""
        account = resolve(order["user"], order["group"])
        if account is not None:
            become(account)  # git and the files are the user's, so root need not meet them
        self._channel = channel
        self._since = int(order["since"])
        self._roots = [str(root) for root in order["roots"]]
        by_git = any(map(_minds_git, self._roots))
        rules = Rules(order["include"], order["exclude"], map(os.path.basename, order["files"]), by_git)
        self._tree = Tree(self._roots, order["files"], rules, git.ignored if by_git else None)
        self._engine: Engine = choose(order["engine"], rules)
        self._cost = 0.0

    def run(self) -> NoReturn:
        """Until the arbiter is gone. Raises `OSError`."""
        changed = self._measured_look(self._since)
        changed |= self._follow()
        self._tell({"t": "watching", "how": self._engine.name, "files": len(self._tree.files)})
        if self._tree.full:
            where = ", ".join(self._roots)
            self._tell({"t": "note", "text": f"more than {MOST} files below {where}: not all of them are watched"})
        while True:
            if changed:
                self._report(changed)
            self._wait()
            changed = self._measured_look() | self._follow()

    def _measured_look(self, since: int | None = None) -> set[str]:
        started = time.monotonic()
        changed = self._tree.look() if since is None else self._tree.first_look(since)
        self._cost = time.monotonic() - started
        return changed

    def _wait(self) -> None:
        try:
            self._engine.wait(self._cost)
        except OSError as exc:
            self._poll_instead(exc)

    def _follow(self) -> set[str]:
        """Have the engine watch what is there. What changed before it did is found by another look."""
        changed: set[str] = set()
        for attempt in range(1, RETRIES + 1):
            try:
                if not self._engine.follow(self._tree):
                    break
            except OSError as exc:  # a directory is gone again, or the kernel has no more watches
                if attempt == RETRIES:
                    self._poll_instead(exc)
            changed |= self._measured_look()
        return changed

    def _poll_instead(self, exc: OSError) -> None:
        self._tell({"t": "note", "text": f"files are polled, since the system cannot tell of changes: {exc}"})
        self._engine = Polling()

    def _report(self, changed: set[str]) -> None:
        burst = Burst(time.monotonic(), changed)
        while left := burst.left(time.monotonic()):
            time.sleep(left)
            burst.add(time.monotonic(), self._measured_look())
        paths = sorted(burst.paths)
        self._tell({"t": "changed", "paths": paths[:PATHS_TOLD], "count": len(paths)})

    def _tell(self, message: Message) -> None:
        self._channel.send(message)


def _minds_git(root: str) -> bool:
    """Whether git has a say: not where it ignores all of it, as for a scratch directory inside of another project."""
    return git.is_in_repository(root) and not git.ignored(os.path.dirname(root), [root])
