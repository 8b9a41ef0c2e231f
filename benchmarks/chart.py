"""results.svg: bars of the medians with their range, a block for each case, in two columns. Light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from cases import BY_NAME, SERVERS, Case
from results import Results, median, values

CHARTED = (
    *("asgi-hello", "asgi-h11-uvloop", "starlette", "fastapi", "asgi-json", "asgi-stream", "asgi-upload-1m"),
    *("asgi-download-1m", "asgi-1000", "asgi-fresh", "wsgi-hello", "flask", "django", "ws-64", "latency-half"),
    *("memory-idle", "memory-django", "start-asgi"),
)
WIDTH, MARGIN, GUTTER = 960, 20, 32
LABEL, VALUE = 172, 62  # px beside a bar, for the server's name and its number
TITLE, BAR, PITCH, GAP = 22, 12, 17, 16  # px: heights of a title and a bar, from bar to bar, between blocks
HEADER = 58

STYLE = """
  svg { font: 12px system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
  .paper { fill: #ffffff } .text { fill: #1f2328 } .soft { fill: #59636e }
  .ours { fill: #1f6feb } .peer { fill: #b6bec8 } .range { stroke: #3d444d; stroke-width: 1.5 }
  .title { font-weight: 600; font-size: 13px } .head { font-weight: 600; font-size: 17px } .bold { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .text { fill: #f0f6fc } .soft { fill: #9198a1 }
    .ours { fill: #4493f8 } .peer { fill: #4b535d } .range { stroke: #d1d7e0 }
  }
"""


def text(x: float, y: float, content: str, classes: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{escape(content)}</text>'


def drawn(case: Case, results: Results) -> list[str]:
    """The servers of a case that have a number."""
    return [name for name in case.servers if median(results.of(case.name, name), case.kind.metrics[0].key) is not None]


def height(case: Case, results: Results) -> int:
    return TITLE + PITCH * len(drawn(case, results)) + GAP


def block(case: Case, results: Results, left: float, top: float, width: float) -> list[str]:
    metric = case.kind.metrics[0]
    names = drawn(case, results)
    unit = metric.heading + ("" if case.kind.more_is_better else ", less is better")
    parts = [
        text(left, top + 13, case.title, "text title"),
        text(left + width, top + 13, unit, "soft", "end"),
    ]
    most = max(max(values(results.of(case.name, name), metric.key)) for name in names)
    scale = (width - LABEL - VALUE) / most
    for row, name in enumerate(names):
        samples = results.of(case.name, name)
        found, middle = values(samples, metric.key), median(samples, metric.key) or 0.0
        server = SERVERS[name]
        colour, weight = ("ours", "text bold") if server.is_apphost else ("peer", "text")
        y, x = top + TITLE + row * PITCH, left + LABEL
        low, high, centre = x + min(found) * scale, x + max(found) * scale, y + BAR / 2
        parts += [
            text(x - 8, y + 10, server.label, weight, "end"),
            f'<rect x="{x:.1f}" y="{y}" width="{middle * scale:.1f}" height="{BAR}" rx="2" class="{colour}"/>',
            f'<line x1="{low:.1f}" y1="{centre}" x2="{high:.1f}" y2="{centre}" class="range"/>',
            text(
                left + width,
                y + 10,
                f"{middle:,.{metric.digits}f}",
                weight,
                "end",
            ),
        ]
    return parts


def columns(cases: Sequence[Case], results: Results) -> tuple[list[Case], list[Case]]:
    """The first ones to the left until about half of the height is used."""
    total = sum(height(case, results) for case in cases)
    first: list[Case] = []
    used = 0
    for case in cases:
        if used + height(case, results) / 2 > total / 2:
            break
        first.append(case)
        used += height(case, results)
    return first, list(cases[len(first) :])


def draw(results: Results) -> str:
    """The chart; cases without results are not in it."""
    cases = [BY_NAME[name] for name in CHARTED if name in BY_NAME and drawn(BY_NAME[name], results)]
    sides = columns(cases, results)
    width = (WIDTH - 2 * MARGIN - GUTTER) / 2
    total = HEADER + max((sum(height(case, results) for case in side) for side in sides), default=0) + MARGIN // 2
    facts = results.facts
    about = (
        f"One worker on one core, Python {facts['apphost']['python']}, {facts['cpu']}: medians, "
        "with the range of the rounds as a line."
    )
    size = f'width="{WIDTH}" height="{total}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" {size} role="img">',
        "<title>apphost beside its peers</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{total}"/>',
        text(MARGIN, 26, "apphost beside its peers", "text head"),
        text(MARGIN, 44, about, "soft"),
    ]
    for number, side in enumerate(sides):
        top = HEADER
        for case in side:
            parts += block(case, results, MARGIN + number * (width + GUTTER), top, width)
            top += height(case, results)
    return "\n".join([*parts, "</svg>"]) + "\n"
