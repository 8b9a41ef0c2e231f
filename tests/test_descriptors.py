"""How many connections a worker takes, with the descriptors it may have."""

from __future__ import annotations

import pytest

from apphost.worker.descriptors import SPARE_DESCRIPTORS, room_for_moved, room_within


@pytest.mark.parametrize(
    ("limit", "connections", "room"),
    [
        (10_000 + SPARE_DESCRIPTORS, 10_000, 10_000),
        (65_536, 10_000, 10_000),
        (10_000, 10_000, 10_000 - SPARE_DESCRIPTORS),
        (1024, 10_000, 768),
        (256, 10_000, 192),
        (256, 100, 100),
        (1, 10_000, 1),
    ],
)
def test_room(limit: int, connections: int, room: int) -> None:
    assert room_within(limit, connections) == room


@pytest.mark.parametrize("limit", [4, 64, 256, 1024, 4096, 20_000])
def test_connections_that_move_here_leave_half_of_the_reserve(limit: int) -> None:
    room = room_within(limit, 1_000_000)
    spare = limit - room
    assert room <= room_for_moved(room) <= limit - spare // 2
