"""Sockets that a service manager hands over: LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES (sd_listen_fds(3)).

They stay the service manager's: it opened them, it keeps its own copy, and nothing of them is removed at our end.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from apphost.errors import AddressError
from apphost.logs import Log
from apphost.sockets import Address, Listener, open_listeners

FIRST_FD = 3  # SD_LISTEN_FDS_START
# Far more than any service has; it keeps a slip from becoming a walk over millions of descriptors.
SOCKETS_MAX = 1024
_UNNAMED = "unknown"  # what sd_listen_fds_with_names(3) calls a socket without a name


class Passed:
    """The sockets that were passed to this process and are not taken yet, by descriptor."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names

    @classmethod
    def take(cls, environ: MutableMapping[str, str], pid: int) -> Passed:
        """What `environ` says, for the process `pid`; the variables are removed, so that no child takes them for its
        own. Raises `AddressError` for values that cannot be meant.
        """
        owner, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
        if not count or owner != str(pid):  # for an ancestor that has not removed them
            return cls({})
        if not (count.isascii() and count.isdigit() and len(count) < 9 and int(count) <= SOCKETS_MAX):
            raise AddressError(f"LISTEN_FDS in the environment is {count!r}: a number up to {SOCKETS_MAX} was expected")
        told = names.split(":") if names else [_UNNAMED] * int(count)
        if len(told) != int(count):
            raise AddressError(f"LISTEN_FDNAMES in the environment has {len(told)} names, for {count} sockets")
        passed = {FIRST_FD + number: name for number, name in enumerate(told)}
        for fd in passed:
            try:
                os.set_inheritable(fd, False)  # they come without close-on-exec
            except OSError as exc:
                raise AddressError(f"LISTEN_FDS is {count}, but descriptor {fd} is not open ({exc.strerror})") from None
        return cls(passed)

    def __len__(self) -> int:
        return len(self._names)

    def open(self, address: Address) -> list[Listener]:
        """The listeners for one value of `bind`, if it is about what was passed, else none.

        Raises `AddressError` when no socket has that name, or one is no listening stream socket.
        """
        if address.fd >= 0:
            self._names.pop(address.fd, None)
            return open_listeners(address, 0)
        fds = [fd for fd, name in self._names.items() if name == address.name]
        if not fds:
            there = ", ".join(sorted(set(self._names.values())))
            what = f"those that are left are called {there}" if there else "none is left, or none was passed"
            raise AddressError(
                f"cannot listen at {address.text}: the service manager has passed no socket of that name; {what}. "
                "A name is FileDescriptorName= of a socket unit, or the name of the unit"
            )
        return [self._adopt(fd) for fd in fds]

    def open_all(self) -> list[Listener]:
        """Listeners for everything that was passed."""
        return [self._adopt(fd) for fd in list(self._names)]

    def _adopt(self, fd: int) -> Listener:
        name = self._names.pop(fd)
        return open_listeners(Address(f"systemd:{name}", fd=fd), 0)[0]

    def close_rest(self, log: Log) -> None:
        """Warn about the sockets that no `bind` has taken, and close our copies: connections wait there for nobody."""
        for fd, name in self._names.items():
            log.warning(
                f"the service manager has passed a socket called {name} (descriptor {fd}) that no bind takes: nobody "
                f"answers there. Add --bind systemd:{name}, or leave out --bind to listen on all that are passed"
            )
            os.close(fd)
        self._names = {}
