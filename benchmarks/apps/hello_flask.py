"""The same answer from a Flask view: what is measured is the server and the framework together."""

from __future__ import annotations

from flask import Flask, Response

BODY = b"Hello, world!"

app = Flask(__name__)


@app.get("/")
def hello() -> Response:
    """Answer with ``BODY``; Flask adds the Content-Length."""
    return Response(BODY, content_type="text/plain; charset=utf-8")
