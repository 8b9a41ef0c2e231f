"""The arbiter's state as data: what it takes along when it replaces its own program (USR2).

Unknown keys are ignored and missing ones default where the field has one: the program that reads may be another
version. Pure, but for the channels, which the caller opens.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from apphost.arbiter.fleet import Fleet, Worker
from apphost.arbiter.processes import Failure, ForkServer, WorkerProcess
from apphost.arbiter.vocabulary import Config, Reason
from apphost.errors import ExitCode
from apphost.lifecycle import State
from apphost.messages import Channel
from apphost.settings import Settings
from apphost.sockets import Identity

VERSION = 1

T = TypeVar("T")
OpenChannel = Callable[[int, bytes], Channel]  # descriptor, beginning of a message


class StateError(Exception):
    """What was handed over is not the state of an arbiter that this version understands."""


@dataclass(slots=True)
class ArbiterState:
    """Everything. Descriptors stay open across exec, and the monotonic clock that times are of goes on.

    leaving: fork servers whose channels have ended, so only their exits are awaited. own_sockets: path and
    identity of the Unix sockets to remove at the end. pidfile: path and locked descriptor. plain: those of `listeners`
    where no TLS is spoken in any case. control: the listening control socket, -1: none. admin: the listeners
    there. history: that of `status`. clock: `now` and `at` of the arbiter's, whose time the fleet's moments are of.
    """

    fleet: Fleet
    settings: Settings
    source: dict[str, Any]
    listeners: list[int]
    workers: list[WorkerProcess]
    fork_servers: list[ForkServer]
    leaving: list[ForkServer]
    own_sockets: dict[str, Identity]
    pidfile: tuple[str, int] | None
    plain: list[int] = field(default_factory=list)
    control: int = -1
    admin: list[int] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)
    clock: tuple[float, float] | None = None

    @property
    def descriptors(self) -> list[int]:
        """All that must stay open."""
        fds = [
            *self.listeners,
            *self.admin,
            *(w.dump for w in self.workers),
            *(w.channel.fileno() for w in self.workers),
        ]
        fds += [server.dump for server in (*self.fork_servers, *self.leaving)]
        fds += [server.channel.fileno() for server in self.fork_servers]
        fds += [self.control] if self.control >= 0 else []
        return fds + ([self.pidfile[1]] if self.pidfile is not None else [])

    def to_wire(self) -> dict[str, Any]:
        return {"v": VERSION, **_to_wire(self)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any], open_channel: OpenChannel) -> ArbiterState:
        """Raises `StateError`."""
        if not isinstance(wire, Mapping):
            raise StateError(f"no object but a {type(wire).__name__}")
        if wire.get("v") != VERSION:
            raise StateError(f"version {wire.get('v')!r}, expected {VERSION}")
        try:
            pidfile = wire["pidfile"]
            return cls(
                fleet=_fleet(wire["fleet"]),
                settings=Settings.from_wire(wire["settings"]),
                source=dict(wire["source"]),
                listeners=[int(fd) for fd in wire["listeners"]],
                workers=[_process(WorkerProcess, each, open_channel) for each in wire["workers"]],
                fork_servers=[_process(ForkServer, each, open_channel) for each in wire["fork_servers"]],
                leaving=[_process(ForkServer, each, open_channel) for each in wire["leaving"]],
                own_sockets={path: _identity(each) for path, each in wire["own_sockets"].items()},
                pidfile=(str(pidfile[0]), int(pidfile[1])) if pidfile is not None else None,
                plain=[int(fd) for fd in wire.get("plain", ())],
                control=int(wire.get("control", -1)),
                admin=[int(fd) for fd in wire.get("admin", ())],
                history=dict(wire.get("history", {})),
                clock=_clock(wire.get("clock")),
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise StateError(f"{type(exc).__name__}: {exc}") from None


def _to_wire(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_wire()
    if isinstance(value, Channel):
        return {"fd": value.fileno(), "rest": base64.b64encode(value.rest).decode("ascii")}
    if isinstance(value, (State, Reason, ExitCode)):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _to_wire(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _to_wire(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_wire(each) for each in value]
    return value


def _identity(wire: Any) -> Identity:
    device, inode, changed = map(int, wire)
    return device, inode, changed


def _clock(wire: Any) -> tuple[float, float] | None:
    if wire is None:
        return None
    now, at = map(float, wire)
    return now, at


def _known(kind: type[Any], wire: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in dataclasses.fields(kind)}
    return {name: value for name, value in wire.items() if name in names}


def _fleet(wire: Mapping[str, Any]) -> Fleet:
    values = _known(Fleet, wire)
    for name in ("config", "canary_config"):
        if wire.get(name) is not None:
            values[name] = Config(**_known(Config, wire[name]))
    values["exit_code"] = ExitCode(wire.get("exit_code", 0))
    values["workers"] = {int(wid): _fleet_worker(each) for wid, each in wire["workers"].items()}
    return Fleet(**values)


def _fleet_worker(wire: Mapping[str, Any]) -> Worker:
    values = _known(Worker, wire)
    values["state"] = State(wire["state"])
    values["reason"] = Reason(wire["reason"]) if wire.get("reason") else None
    return Worker(**values)


def _process(kind: type[T], wire: Mapping[str, Any], open_channel: OpenChannel) -> T:
    """A `ForkServer` or `WorkerProcess`."""
    values = _known(kind, wire)
    channel = wire["channel"]
    values["channel"] = open_channel(int(channel["fd"]), base64.b64decode(channel["rest"]))
    if wire.get("failure") is not None:
        values["failure"] = Failure(**_known(Failure, wire["failure"]))
    if kind is ForkServer and wire.get("settings") is not None:
        values["settings"] = Settings.from_wire(wire["settings"])
    return kind(**values)
