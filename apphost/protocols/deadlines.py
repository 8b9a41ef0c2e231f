"""Time-outs of thousands of connections on one timer. Pure: the clock is an argument.

Each watched item stands in one bucket, the one of the moment at which it must be looked at. Moving a deadline further
away, what every request does, is just setting an attribute: the item is looked at too early, found not to be due, and
put into a later bucket then. So a request costs nothing here, and a tick costs only what is really due.
"""

from __future__ import annotations

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
        bucket.add(item)
        item.slot = slot

    def forget(self, item: T) -> None:
        bucket = self._buckets.get(item.slot)
        item.slot = 0
        if bucket is not None:
            bucket.discard(item)

    def due(self, now: float) -> list[T]:
        """The items whose deadline has passed; they are not watched any more."""
        expired = []
        for slot in [slot for slot in self._buckets if slot * RESOLUTION <= now]:
            for item in self._buckets.pop(slot):
                item.slot = 0
                if item.deadline <= now:
                    expired.append(item)
                else:
                    self.watch(item)
        return expired
