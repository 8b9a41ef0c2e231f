"""A site that answers with what it was told of its client, for tests behind proxies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support import Response, write_app

_SITE = """
import json, os

VERSION = {version!r}
FIELDS = ("x-forwarded-for", "forwarded", "proxy")

def dump(**said):
    return json.dumps({{**said, "version": VERSION, "pid": os.getpid()}}).encode()

def of_scope(scope):
    fields = {{name.decode(): value.decode("latin-1") for name, value in scope["headers"]}}
    return dump(
        client=scope["client"], server=scope["server"], scheme=scope["scheme"], root=scope["root_path"],
        path=scope["path"], host=fields.get("host"), seen={{name: fields[name] for name in FIELDS if name in fields}},
    )

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    if scope["type"] == "http":
        body = of_scope(scope)
        headers = [(b"content-length", b"%d" % len(body))]
        await send({{"type": "http.response.start", "status": 200, "headers": headers}})
        return await send({{"type": "http.response.body", "body": body}})
    await receive()
    await send({{"type": "websocket.accept"}})
    while (await receive())["type"] == "websocket.receive":
        await send({{"type": "websocket.send", "text": of_scope(scope).decode()}})

def variable(name):
    return "HTTP_" + name.upper().replace("-", "_")

def wsgi(environ, start_response):
    get = environ.get
    client = [get("REMOTE_ADDR"), int(get("REMOTE_PORT"))] if get("REMOTE_ADDR") else None
    assert (get("HTTPS") == "on") == (get("wsgi.url_scheme") == "https")
    assert "HTTP_PROXY" not in environ
    body = dump(
        client=client, server=[get("SERVER_NAME").strip("[]"), get("SERVER_PORT")], scheme=get("wsgi.url_scheme"),
        root=get("SCRIPT_NAME"), path=get("SCRIPT_NAME") + get("PATH_INFO"), host=get("HTTP_HOST"),
        seen={{name: get(variable(name)) for name in FIELDS if variable(name) in environ}},
    )
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

APPS = {"asgi": "app:app", "wsgi": "app:wsgi"}


def write_site(folder: Path, version: str = "one") -> None:
    write_app(folder, "app", _SITE.format(version=version))


def told(response: Response) -> dict[str, Any]:
    """What the site was told; AssertionError when it did not answer."""
    assert response.status == 200, (response.status, response.body)
    said: dict[str, Any] = json.loads(response.body)
    if said["server"][1] is not None:
        said["server"][1] = int(said["server"][1])
    return said
