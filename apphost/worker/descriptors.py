"""How many descriptors a worker may have, and how many of them connections get."""

from __future__ import annotations

import resource

from apphost.logs import Log

# Descriptors beside those of connections: what the application has open, and the twins of connections that move.
SPARE_DESCRIPTORS = 1024
# Of a limit that is too small for these and all connections: an application that has a few files or a client's
# connection open for each request in progress is content with a quarter, and the hand-over with a few.
SPARE_PART = 4


def make_room(connections: int, log: Log) -> int:
    """For how many connections a worker has descriptors: for those of the setting, or as many as the system allows.

    Called before workers are forked, which inherit the limit.
    """
    limit = allow_descriptors(connections + SPARE_DESCRIPTORS)
    room = room_within(limit, connections)
    if room < connections:
        log.warning(
            f"a worker takes {room} connections, not the {connections} of limit_connections, and leaves the others in "
            f"the backlog: a process may have {limit} descriptors (ulimit -n, LimitNOFILE)"
        )
    return room


def room_within(limit: int, connections: int) -> int:
    """How many of `connections` may be held by a process that may have `limit` descriptors."""
    return max(1, min(connections, limit - min(SPARE_DESCRIPTORS, limit // SPARE_PART)))


def room_for_moved(room: int) -> int:
    """How many connections a worker may have when one of another worker comes: half of the spare descriptors more.

    A worker that is full when it drains has clients in the backlog, and its successor accepts some of these first.
    """
    return room + min(SPARE_DESCRIPTORS, room // (SPARE_PART - 1)) // 2


def allow_descriptors(wanted: int) -> int:
    """Raise the soft limit (RLIMIT_NOFILE) to `wanted`, or as near as the hard one lets it; what it is then.

    The usual 1024 is for programs that call select(2), which cannot do more; those that can shall raise it themselves
    (systemd.exec(5), `LimitNOFILE=`). An application that uses select(2) on its own descriptors is no worse off before
    there are that many, and then it would have none at all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= enough:
        return wanted if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    except (OSError, ValueError):
        return soft  # macOS has another limit for each process (kern.maxfilesperproc) and refuses what is above it
    return enough
