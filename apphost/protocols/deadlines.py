"""Time-outs of thousands of connections on one timer. Pure: the clock is an argument.

Each watched item stands in one bucket, the one of the moment at which it must be looked at. Moving a deadline further
away, what every request does, is just setting an attribute: the item is looked at too early, found not to be due, and
put into a later bucket then. So a request costs nothing here, and a tick costs only what is really due.
"""

from __future__ import annotations

import heapq
from typing import Generic, Protocol, TypeVar

NEVER = float("inf")
RESOLUTION = 0.25  # s; how late a time-out may be. The shortest useful one is a second.


class Timed(Protocol):
    slot: int  # the bucket it stands in, 0: none. Belongs to `Deadlines`.

    @property
    def deadline(self) -> float:
        """When it is due, in seconds of the caller's clock, or NEVER."""
        ...


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """The buckets. An item must be watched again whenever its deadline moves nearer, and forgotten when it ends."""

    def __init__(self) -> None:
        self._buckets: dict[int, set[T]] = {}
        self._slots: list[int] = []  # of the buckets, as a heap

    def watch(self, item: T) -> None:
        """See to it that `item` is looked at by its deadline. Cheap when it already is."""
        if item.deadline == NEVER:
            return
        slot = int(item.deadline / RESOLUTION) + 1
        if item.slot:
            if slot >= item.slot:
                return
            self.forget(item)
        bucket = self._buckets.get(slot)
        if bucket is None:
            bucket = self._buckets[slot] = set()
            heapq.heappush(self._slots, slot)
        bucket.add(item)
        item.slot = slot

    def forget(self, item: T) -> None:
        bucket = self._buckets.get(item.slot)
        item.slot = 0
        if bucket is not None:
            bucket.discard(item)

    def due(self, now: float, most: int = 1 << 62) -> list[T]:
        """The items whose deadline has passed; they are not watched any more. `most`: how many are looked at.

        While `late`, there may be more.
        """
        expired: list[T] = []
        looked = 0
        while looked < most and self.late(now):
            bucket = self._buckets[self._slots[0]]
            while bucket and looked < most:
                item = bucket.pop()
                looked += 1
                item.slot = 0
                if item.deadline <= now:
                    expired.append(item)
                else:
                    self.watch(item)
            if not bucket:
                del self._buckets[heapq.heappop(self._slots)]
        return expired

    def late(self, now: float) -> bool:
        """Whether there is a bucket that should be looked at."""
        return bool(self._slots) and self._slots[0] * RESOLUTION <= now
