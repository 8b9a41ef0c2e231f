"""What is told of the past: how workers ended, how reloads went. Bounded; goes along in an upgrade (USR2)."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apphost.arbiter.processes import Failure
from apphost.arbiter.services import Happening, What
from apphost.lifecycle import State
from apphost.measures import Measures, add, zero

if TYPE_CHECKING:
    from apphost.arbiter.arbiter import Arbiter

ENDS_MAX = 20  # of workers: a screenful
OUTCOMES_MAX = 20  # of generations: whoever waits for one asks again at once when an upgrade has cut it off
DETAIL_MAX = 4096  # characters of the stacks of each end; the log has all

Outcome = dict[str, Any]  # outcome ("complete", "given up"), generation, at (Unix time), text, reason, detail

COMPLETE, GIVEN_UP, SUPERSEDED = "complete", "given up", "superseded"


class History:
    """started: when the arbiter has started, monotonic. replaced: how many workers have ended, by the reason.

    reloads: how many there were, by outcome. measures, cpu: what workers that are gone have counted and used (s), for
    the admin listener.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.replaced: Counter[str] = Counter()
        self.ends: deque[dict[str, Any]] = deque(maxlen=ENDS_MAX)
        self._outcomes: dict[int, Outcome] = {}
        self.given_up: Outcome | None = None  # the last reload, if it was
        self.reloads: Counter[str] = Counter()
        self.measures: Measures = zero()
        self.cpu = 0.0
        self._decided = 0  # the highest generation whose outcome is known

    def note_end(self, end: dict[str, Any], why: str) -> None:
        """`end`: at, worker, generation, pid, text, detail."""
        self.replaced[why] += 1
        self.ends.append({**end, "why": why, "detail": str(end.get("detail", ""))[-DETAIL_MAX:]})

    def note_complete(self, generation: int, at: float, text: str) -> Outcome:
        self.given_up = None
        return self._note({"outcome": COMPLETE, "generation": generation, "at": at, "text": text})

    def note_given_up(self, generation: int, at: float, text: str, failure: Failure | None) -> Outcome:
        reason, detail = (failure.message, failure.detail) if failure is not None else ("it could not boot", "")
        self.given_up = {"outcome": GIVEN_UP, "generation": generation, "at": at, "text": text}
        self.given_up |= {"reason": reason, "detail": detail}
        return self._note(self.given_up)

    def note_stand_in(self, generation: int) -> None:
        """It shows why the one before was given up: no reload, and for whoever waits for it given up as well."""
        if self.given_up is not None:
            self._outcomes[generation] = self.given_up
        self._decided = max(self._decided, generation)

    def _note(self, outcome: Outcome) -> Outcome:
        number = outcome["generation"]
        if number > 1:  # the first one is a start
            self.reloads[outcome["outcome"]] += 1
            skipped = number - max(self._decided, 1) - 1
            if skipped > 0:
                self.reloads[SUPERSEDED] += skipped
        self._decided = max(self._decided, number)
        self._outcomes[number] = outcome
        for generation in sorted(self._outcomes)[:-OUTCOMES_MAX]:
            del self._outcomes[generation]
        return outcome

    def outcome(self, generation: int, target: int) -> Outcome | None:
        """How it went with a generation; None while it is not decided. `target`: the generation asked for last."""
        known = self._outcomes.get(generation)
        if known is None and generation < target:
            text = f"generation {generation} was superseded by generation {target}, which was asked for later"
            return {"outcome": SUPERSEDED, "generation": generation, "text": text, "by": target}
        return known

    def to_wire(self) -> dict[str, Any]:
        return {
            "started": self.started,
            "replaced": dict(self.replaced),
            "ends": list(self.ends),
            "outcomes": list(self._outcomes.values()),
            "given_up": self.given_up,
            "reloads": dict(self.reloads),
            "measures": self.measures,
            "cpu": self.cpu,
            "decided": self._decided,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any], now: float) -> History:
        """What cannot be understood, from another version, is left out: it is no reason to stop an upgrade."""
        try:
            history = cls(float(wire.get("started", now)))
            history.replaced.update({str(why): int(count) for why, count in wire.get("replaced", {}).items()})
            history.ends.extend(dict(end) for end in wire.get("ends", ()))
            history._outcomes = {int(each["generation"]): dict(each) for each in wire.get("outcomes", ())}
            history.given_up = wire.get("given_up")
            history.reloads.update({str(how): int(count) for how, count in wire.get("reloads", {}).items()})
            add(history.measures, wire.get("measures", {}))
            history.cpu = float(wire.get("cpu", 0.0))
            history._decided = int(wire.get("decided", max(history._outcomes, default=0)))
        except (LookupError, TypeError, ValueError, AttributeError):
            return cls(now)
        return history


class Historian:
    """The service that writes the history. To be told before those that read it."""

    deadline: float | None = None

    def __init__(self, arbiter: Arbiter, history: History) -> None:
        self.history = history
        self._arbiter = arbiter

    def notice(self, happening: Happening) -> None:
        at = round(time.time(), 3)
        worker = happening.worker
        if happening.what is What.COMPLETE:
            self.history.note_complete(happening.generation, at, happening.text)
        elif happening.what is What.STANDS_IN:
            self.history.note_stand_in(happening.generation)
        elif happening.what is What.GIVEN_UP:
            self.history.note_given_up(happening.generation, at, happening.text, happening.failure)
        elif happening.what is What.GONE and worker is not None:
            member = self._arbiter.fleet.workers.get(worker.wid)
            why = "crashed" if worker.ready_at is not None else "could not boot"
            if member is not None and member.reason is not None and member.state is State.DRAINING:
                why = str(member.reason)
            end = {"at": at, "worker": worker.wid, "generation": worker.generation, "pid": worker.pid}
            self.history.note_end({**end, "text": happening.text, "detail": happening.detail}, why)

    def expire(self, now: float) -> None:
        pass

    def close(self) -> None:
        pass
