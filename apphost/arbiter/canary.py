"""How the first worker of new code is judged while it serves alone of its kind. Pure.

The rule: it fails when it has answered at least `ANSWERS_MIN` requests, at least `ERRORS_MIN` of them with 5xx, and its
share of 5xx is more than twice the share of the old workers in the same time plus `MARGIN`. So a single bad answer
decides nothing, an application that always has some errors may be deployed, and one that is broken is given up after
some twenty requests. (It also fails when it ends or stops beating; the fleet sees to that.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ANSWERS_MIN = 20
ERRORS_MIN = 3
MARGIN = 0.05


class Answers(NamedTuple):
    """Responses in some time, and those of them with a status of 500 or more."""

    all: int
    errors: int

    @property
    def share(self) -> float:
        return self.errors / self.all if self.all else 0.0


def fails(new: Answers, old: Answers) -> bool:
    """Whether the canary's answers, beside those of the old workers, say that it must go."""
    return new.all >= ANSWERS_MIN and new.errors >= ERRORS_MIN and new.share > 2 * old.share + MARGIN


def verdict(new: Answers, before: Mapping[int, Answers], now: Mapping[int, Answers]) -> str:
    """Why the canary fails, empty while it does not. `before` and `now`: the old workers' counts by wid, at the
    canary's start and at present; one that has gone meanwhile does not count."""
    gone_on = [(now[wid], counts) for wid, counts in before.items() if wid in now]
    old = Answers(sum(n.all - b.all for n, b in gone_on), sum(n.errors - b.errors for n, b in gone_on))
    if not fails(new, old):
        return ""
    return (
        f"its canary answered {new.errors} of {new.all} requests with 5xx ({new.share:.0%}), the old workers "
        f"{old.errors} of {old.all} ({old.share:.0%})"
    )
