"""What development mode serves in place of an application that cannot be started: a page that says why.

An ordinary ASGI application, run by ordinary workers of a generation of its own. Browsers get HTML that needs nothing
from elsewhere, in the colours that they ask for, and that loads itself anew once other code answers; everybody else
gets plain text. It is never made outside of `--reload`: a traceback shows the source.
"""

from __future__ import annotations

import dataclasses
import html
import re
from typing import Any

from apphost.settings import Settings

NAME = "apphost.worker.error_page:ErrorPage"  # in place of the application, in what a worker tells of itself
MARK = "X-Apphost-Error"  # the field by which the page knows itself: the generation whose failure it shows
POLL = 400  # ms between two looks of an open page: soon enough for one who has just saved, and cheap

# No scripts and styles but those of the page, and requests only to where it comes from.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_PLACE = re.compile(r'^ *(?:\| )*File "(?P<file>[^"\n]+)", line (?P<line>[0-9]+)', re.MULTILINE)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<noscript><meta http-equiv="refresh" content="2"></noscript>
<style>
:root {{ --back: #fff; --text: #1c1c1e; --soft: #6b6b70; --box: #f4f4f6; --edge: #d9352b; }}
@media (prefers-color-scheme: dark) {{
:root {{ --back: #18181b; --text: #e8e8ea; --soft: #a0a0a8; --box: #242428; --edge: #ff6a5e; }} }}
body {{ background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0; padding: 2rem; }}
main {{ max-width: 64rem; margin: 0 auto; }}
h1 {{ border-left: .3rem solid var(--edge); font-size: 1.25rem; overflow-wrap: anywhere; padding-left: .8rem; }}
pre {{ background: var(--box); border-radius: .4rem; font: 14px/1.5 ui-monospace, monospace; overflow: auto;
padding: 1rem; tab-size: 4; }}
code {{ font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }}
p.soft {{ color: var(--soft); }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{place}{detail}<p class="soft">This page goes away by itself when the code is mended and saved.</p>
</main>
<script>
setInterval(async () => {{
  if (document.hidden) return;
  try {{
    const answer = await fetch(location.href, {{ method: "HEAD", cache: "no-store", redirect: "manual" }});
    if (answer.headers.get("{mark}") !== "{generation}") location.reload();
  }} catch {{ }}
}}, {poll});
</script>
</body>
</html>
"""


def settings_for(running: Settings) -> Settings:
    """Those of a generation that shows the page, for a server that runs with `running`.

    Without what would keep it from being ready, or end it early, and without the lines that an open page would make in
    the access log.
    """
    return dataclasses.replace(
        running,
        app=NAME, preload=True, factory=False, interface="asgi", lifespan="off", ready_probe="", access_log="",
        max_requests=0, max_rss=0, max_lifetime=0.0, limit_requests=0,
    )  # fmt: skip


def place_of(detail: str) -> tuple[str, int] | None:
    """File and line of the innermost frame of a traceback; of a syntax error, where it is. None without any. Pure."""
    last = None
    for match in _PLACE.finditer(detail):
        if not match["file"].startswith("<"):
            last = match["file"], int(match["line"])
    return last


def as_text(message: str, detail: str) -> str:
    """The failure as plain text."""
    return f"{message}\n" + (f"\n{detail}\n" if detail else "")


def as_html(message: str, detail: str, generation: int) -> str:
    """The failure as a page of HTML; nothing of `message` and `detail` is markup. Pure."""
    where = place_of(detail)
    return _PAGE.format(
        title=html.escape(message),
        place=f"<p>Line {where[1]} of <code>{html.escape(where[0])}</code></p>\n" if where else "",
        detail=f"<pre>{html.escape(detail)}</pre>\n" if detail else "",
        mark=MARK,
        generation=generation,
        poll=POLL,
    )


def wants_html(accept: bytes) -> bool:
    """Whether a client with this Accept field (RFC 9110 section 12.5.1) is a browser that shows pages. Pure."""
    for item in accept.lower().split(b","):
        kind, *parameters = (part.strip() for part in item.split(b";"))
        if kind in (b"text/html", b"application/xhtml+xml"):
            return not any(re.fullmatch(rb"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


class ErrorPage:
    """The ASGI application. `generation`: the one that failed, which has `message` and `detail` as its reason."""

    def __init__(self, message: str, detail: str, generation: int) -> None:
        self._generation = str(generation).encode("ascii")
        self._html = as_html(message, detail, generation).encode("utf-8", "replace")
        self._text = as_text(message, detail).encode("utf-8", "replace")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # before it is accepted: refused with 403
            return
        accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
        kind, body = (b"text/html", self._html) if wants_html(accept) else (b"text/plain", self._text)
        headers = [
            (b"content-type", kind + b"; charset=utf-8"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"cache-control", b"no-store"),
            (b"vary", b"accept"),
            (MARK.lower().encode("ascii"), self._generation),
        ]
        if body is self._html:
            headers.append((b"content-security-policy", _POLICY.encode("ascii")))
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": body})
