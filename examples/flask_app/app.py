"""A small Flask application: `apphost app:app`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 64 * 1024 * 1024  # bytes

PIECES = 4
PAUSE = 0.15  # seconds between two pieces of the stream


@app.get("/")
def hello() -> str:
    return f"Hello, {request.args.get('name', 'world')}!\n"


@app.post("/upload")
def upload() -> Response:
    """The size and SHA-256 of a file sent as the form field `file`."""
    file = request.files["file"]
    digest = hashlib.sha256()
    size = 0
    while chunk := file.stream.read(64 * 1024):
        digest.update(chunk)
        size += len(chunk)
    return jsonify(name=file.filename, size=size, sha256=digest.hexdigest())


@app.put("/raw")
def raw() -> Response:
    """The same for a bare body, also one sent in chunks, whose length nobody knows beforehand."""
    digest = hashlib.sha256()
    size = 0
    while chunk := request.stream.read(64 * 1024):
        digest.update(chunk)
        size += len(chunk)
    return jsonify(size=size, sha256=digest.hexdigest())


@app.get("/stream")
def stream() -> Response:
    def pieces() -> Iterator[str]:
        for number in range(PIECES):
            if number:
                time.sleep(PAUSE)
            yield f"piece {number} made at {time.time():.6f}\n"

    return Response(pieces(), mimetype="text/plain")


@app.get("/cookies")
def cookies() -> Response:
    """Sets three cookies, and shows those that came."""
    response = jsonify(received=request.cookies)
    response.set_cookie("flavour", "oat, raisin; 2", max_age=3600)
    response.set_cookie("theme", "dark", samesite="Lax")
    response.set_cookie("token", "a=b", httponly=True)
    return response


@app.post("/echo")
def echo() -> Response:
    return jsonify(
        json=request.get_json(),
        path=request.path,
        query=request.query_string.decode("latin-1"),
        scheme=request.scheme,
        peer=[request.remote_addr, int(request.environ.get("REMOTE_PORT") or 0)],
    )


@app.get("/error")
def error() -> str:
    raise RuntimeError("this route always fails")


@app.errorhandler(HTTPException)
def as_json(exc: HTTPException) -> tuple[Response, int | None]:
    return jsonify(error=exc.name), exc.code
