"""What the admin process answers: an interface of its own, on the same connections as workers have."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apphost.admin.exposition import (
    OPENMETRICS,
    TEXT,
    Snapshot,
    families,
    is_ready,
    openmetrics,
    prefers_openmetrics,
    prometheus_text,
)
from apphost.measures import quantile
from apphost.protocols.base import Handler, Stream
from apphost.protocols.exchange import NOBODY
from apphost.protocols.response import ResponseHead

STALE_AFTER = 5.0  # s: twice the longest time between two snapshots, and some for a busy machine
POINT_EVERY = 1.0  # s between two points of the curves
POINTS = 180  # three minutes of them

Answer = tuple[int, str, bytes]  # status, content type, body


class Site:
    """An interface (`apphost.protocols.base.Interface`). `take` a snapshot now and then; `clock`: monotonic, s."""

    name = "admin"
    websockets = False

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._taken = 0.0
        self._points: deque[dict[str, Any]] = deque(maxlen=POINTS)
        self._last: tuple[float, Snapshot] | None = None  # what the last point was made of
        self._page, self._policy = load_page()
        self._routes: dict[bytes, Callable[[str], Answer]] = {
            b"/": self._dashboard,
            b"/metrics": self._metrics,
            b"/healthz": self._health,
            b"/readyz": self._ready,
            b"/status.json": self._status,
        }

    def take(self, snapshot: Snapshot) -> None:
        now = self._clock()
        self._snapshot, self._taken = snapshot, now
        if self._last is None:
            self._last = now, snapshot
        elif now - self._last[0] >= POINT_EVERY:
            self._points.append(point(self._last[1], snapshot, now - self._last[0]))
            self._last = now, snapshot

    # -- the interface

    def handle(self, stream: Stream) -> Handler:
        head = stream.head
        route = self._routes.get(head.raw_path)
        fields: list[tuple[bytes, bytes]] = []
        if route is None:
            answer = _text(404, "there are /, /metrics, /healthz, /readyz and /status.json")
        elif head.method not in ("GET", "HEAD"):
            answer = _text(405, "only GET and HEAD")
            fields.append((b"allow", b"GET, HEAD"))
        else:
            accept = b",".join(value for name, value in head.headers if name == b"accept")
            answer = route(accept.decode("latin-1"))
        status, kind, body = answer
        fields += [
            (b"content-type", kind.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
            (b"content-security-policy", self._policy.encode()),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
        ]
        stream.start(ResponseHead(status, fields))
        stream.write(body, False)
        return NOBODY

    # -- the pages

    def _dashboard(self, _accept: str) -> Answer:
        return 200, "text/html; charset=utf-8", self._page

    def _stale(self) -> str:
        """Why nothing can be told, "" when it can."""
        if self._snapshot is None:
            return "the arbiter has told nothing yet"
        age = self._clock() - self._taken
        return f"the arbiter has told nothing for {age:.0f} s" if age > STALE_AFTER else ""

    def _health(self, _accept: str) -> Answer:
        why = self._stale()
        return _text(503, why) if why else _text(200, "the arbiter lives")

    def _ready(self, _accept: str) -> Answer:
        why = self._stale()
        snapshot = self._snapshot
        if why or snapshot is None:
            return _text(503, why)
        if is_ready(snapshot):
            ready = sum(worker["state"] == "ready" for worker in snapshot["workers"])
            return _text(200, f"ready: {ready} of {snapshot['size']} workers serve")
        return _text(503, f"not ready: {snapshot['what']}")

    def _metrics(self, accept: str) -> Answer:
        why = self._stale()
        if why or self._snapshot is None:
            return _text(503, why)  # a scrape that fails is seen, old figures are not
        metrics = families(self._snapshot)
        if prefers_openmetrics(accept):
            return 200, OPENMETRICS, openmetrics(metrics).encode()
        return 200, TEXT, prometheus_text(metrics).encode()

    def _status(self, _accept: str) -> Answer:
        age = round(self._clock() - self._taken, 3) if self._snapshot is not None else None
        told = {"snapshot": self._snapshot, "age": age, "stale": self._stale(), "points": list(self._points)}
        return 200, "application/json", json.dumps(told, separators=(",", ":")).encode()


def _text(status: int, text: str) -> Answer:
    return status, "text/plain; charset=utf-8", text.encode() + b"\n"


def point(before: Snapshot, after: Snapshot, seconds: float) -> dict[str, Any]:
    """One point of the curves: what has happened between two snapshots `seconds` apart.

    rate, errors: requests a second, those of them that were answered 5xx. p50, p99: s, None without requests.
    """
    old, new = before["measures"], after["measures"]
    latency = [max(0, b - a) for a, b in zip(old["latency"], new["latency"], strict=True)]
    codes = [max(0, b - a) for a, b in zip(old["codes"], new["codes"], strict=True)]
    p50, p99 = quantile(latency, 0.5), quantile(latency, 0.99)
    return {
        "at": after["at"],
        "rate": round(sum(codes) / seconds, 1),
        "errors": round(codes[-1] / seconds, 1),
        "p50": None if p50 is None else round(p50, 6),
        "p99": None if p99 is None else round(p99, 6),
    }


def load_page() -> tuple[bytes, str]:
    """The dashboard, and the policy under which its own script and style run, and no others."""
    page = Path(__file__).with_name("dashboard.html").read_bytes()
    script, style = (_hash(page, name) for name in (b"script", b"style"))
    policy = f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    return page, policy + "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _hash(page: bytes, name: bytes) -> str:
    match = re.search(b"<%b>(.*?)</%b>" % (name, name), page, re.DOTALL)
    assert match is not None, name
    return f"'sha256-{base64.b64encode(hashlib.sha256(match[1]).digest()).decode()}'"
