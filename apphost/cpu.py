"""How many CPUs this process may really use: `workers = auto`.

`os.cpu_count()` is the size of the machine. A container or a systemd unit usually gets less, in two ways: an affinity
mask, which says where a process may run, and a CFS bandwidth quota of its control group, which says how much CPU time
it gets. Linux documents the quota files in Documentation/admin-guide/cgroup-v2.rst (`cpu.max`) and in
Documentation/scheduler/sched-bwc.rst (`cpu.cfs_quota_us`, `cpu.cfs_period_us`).
"""

from __future__ import annotations

import math
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_Read = Callable[[str], "str | None"]


class CpuGroup(NamedTuple):
    """A control group directory that may limit CPU time."""

    version: int  # 1 or 2: the names of the quota files differ
    directory: str


def usable_cpus() -> int:
    """CPUs that this process may keep busy: the affinity count, or less where a quota says less. At least 1."""
    return combine(_affinity_count(), quota(_read_text))


def combine(affinity: int, cpu_quota: float | None) -> int:
    """The smaller of both limits. A quota is rounded up: of 1.5 CPUs, one worker would leave half a CPU idle."""
    if cpu_quota is None:
        return max(1, affinity)
    return max(1, min(affinity, math.ceil(cpu_quota)))


def quota(read: _Read) -> float | None:
    """The strictest CPU quota of the group of this process and of its ancestors, in CPUs; None when there is none.

    `read(path)` returns the text of a file, or None when it cannot be read: all that this function knows of the system.
    """
    memberships, mounts = read("/proc/self/cgroup"), read("/proc/self/mountinfo")
    if memberships is None or mounts is None:
        return None
    limits = [_limit(group, read) for group in cpu_groups(memberships, mounts)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(group: CpuGroup, read: _Read) -> float | None:
    if group.version == 2:
        return parse_v2(read(f"{group.directory}/cpu.max") or "")
    cfs = f"{group.directory}/cpu.cfs"
    return parse_v1(read(f"{cfs}_quota_us") or "", read(f"{cfs}_period_us") or "")


def parse_v2(cpu_max: str) -> float | None:
    """`cpu.max`: quota and period in microseconds, `max` for no quota. `150000 100000` is 1.5 CPUs."""
    amount, _, period = cpu_max.strip().partition(" ")
    return _ratio(amount, period or "100000")


def parse_v1(quota_us: str, period_us: str) -> float | None:
    """`cpu.cfs_quota_us` and `cpu.cfs_period_us`, in microseconds; a quota of -1 is no quota."""
    return _ratio(quota_us, period_us)


def _ratio(amount: str, period: str) -> float | None:
    try:
        value, every = int(amount), int(period)
    except ValueError:  # "max", or a file that is absent or of another kind: no quota that we could honour
        return None
    return value / every if value > 0 and every > 0 else None


def cpu_groups(memberships: str, mounts: str) -> list[CpuGroup]:
    """Every directory whose quota applies, from the texts of `/proc/self/cgroup` and `/proc/self/mountinfo`.

    An ancestor's quota binds its children too, so each path is followed up to the mount point. Without a cgroup
    namespace the membership is a path of the host while only a part of that tree is mounted: the root of the mount is
    taken off.
    """
    paths = dict(_memberships(memberships))
    groups: list[CpuGroup] = []
    for version, root, mount_point in _mounts(mounts):
        path = paths.get(version)
        if path is None:
            continue
        below = _below(path, root)
        while True:
            directory = posixpath.join(mount_point, below) if below else mount_point
            groups.append(CpuGroup(version, directory))
            if not below:
                break
            below = posixpath.dirname(below)
    return groups


def _below(path: str, root: str) -> str:
    """`path` relative to `root`; empty (the mount itself) when it lies outside, as seen from inside some containers."""
    inside = posixpath.relpath(path, root)
    return "" if inside in (".", "..") or inside.startswith("../") else inside


def _memberships(text: str) -> Iterator[tuple[int, str]]:
    """(version, path) from lines `hierarchy:controllers:path`; hierarchy 0 without controllers is version 2."""
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        hierarchy, controllers, path = parts
        if hierarchy == "0" and not controllers:
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def _mounts(text: str) -> Iterator[tuple[int, str, str]]:
    """(version, root, mount point) of each cgroup file system, from lines as described in proc_pid_mountinfo(5)."""
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        root, mount_point = _unescape(fields[3]), _unescape(fields[4])
        if kind[0] == "cgroup2":
            yield 2, root, mount_point
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            yield 1, root, mount_point


def _unescape(path: str) -> str:
    """The kernel writes space, tab, newline and backslash in a path as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _affinity_count() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return None
