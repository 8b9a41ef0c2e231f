"""A small Starlette application: `apphost app:app`."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

PIECES = 4
PAUSE = 0.15  # seconds between two events of the stream
WORK = 0.5  # seconds that a background job takes


class Counter:
    """Counts requests; one per worker, made when the worker starts."""

    def __init__(self) -> None:
        self.started = time.time()
        self.requests = 0
        self.jobs: dict[str, float] = {}  # name of a finished background job -> time of its end


class State(TypedDict):
    counter: Counter


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[State]:
    print("lifespan: startup", flush=True)
    yield {"counter": Counter()}
    print("lifespan: shutdown", flush=True)


async def hello(request: Request) -> Response:
    return PlainTextResponse(f"Hello, {request.query_params.get('name', 'world')}!\n")


async def count(request: Request) -> Response:
    counter: Counter = request.state.counter
    counter.requests += 1
    return JSONResponse({"requests": counter.requests, "started": counter.started})


async def events(request: Request) -> Response:
    """A stream of server-sent events, each with the time at which it was made."""

    async def stream() -> AsyncIterator[str]:
        for number in range(PIECES):
            if number:
                await asyncio.sleep(PAUSE)
            yield f"id: {number}\ndata: {time.time():.6f}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"cache-control": "no-store"})


async def start_job(request: Request) -> Response:
    """Answers at once; the work is done afterwards. GET on the same path tells when it ended."""
    name = request.path_params["name"]
    counter: Counter = request.state.counter

    async def work() -> None:
        await asyncio.sleep(WORK)
        counter.jobs[name] = time.time()

    return JSONResponse({"accepted": name}, status_code=202, background=BackgroundTask(work))


async def show_job(request: Request) -> Response:
    ended = request.state.counter.jobs.get(request.path_params["name"])
    return JSONResponse({"ended": ended})


async def upload(request: Request) -> Response:
    """The size and SHA-256 of a file sent as the form field `file`."""
    digest = hashlib.sha256()
    async with request.form() as form:
        file = form["file"]
        if isinstance(file, str):
            return JSONResponse({"error": "not a file"}, status_code=400)
        while chunk := await file.read(64 * 1024):
            digest.update(chunk)
        return JSONResponse({"name": file.filename, "size": file.size, "sha256": digest.hexdigest()})


async def raw(request: Request) -> Response:
    """The same for a bare body, which is never held in memory as a whole."""
    digest = hashlib.sha256()
    size = 0
    async for chunk in request.stream():
        digest.update(chunk)
        size += len(chunk)
    return JSONResponse({"size": size, "sha256": digest.hexdigest()})


async def cookies(request: Request) -> Response:
    """Sets three cookies, and shows those that came."""
    response = JSONResponse({"received": request.cookies})
    response.set_cookie("flavour", "oat, raisin; 2", max_age=3600)
    response.set_cookie("theme", "dark", samesite="lax")
    response.set_cookie("token", "a=b", httponly=True)
    return response


async def echo(request: Request) -> Response:
    try:
        sent = await request.json()
    except ValueError as exc:
        return JSONResponse({"error": str(exc)}, status_code=400)
    client = request.client
    return JSONResponse(
        {
            "json": sent,
            "path": request.url.path,
            "query": request.url.query,
            "scheme": request.url.scheme,
            "peer": [client.host, client.port] if client else None,
        }
    )


async def error(request: Request) -> Response:
    raise RuntimeError("this route always fails")


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/", hello),
        Route("/count", count),
        Route("/events", events),
        Route("/jobs/{name}", start_job, methods=["POST"]),
        Route("/jobs/{name}", show_job),
        Route("/upload", upload, methods=["POST"]),
        Route("/raw", raw, methods=["PUT"]),
        Route("/cookies", cookies),
        Route("/echo", echo, methods=["POST"]),
        Route("/error", error),
    ],
)
