"""An ASGI application that does what its client tells it to.

The query of `/script` is the literal of a pair, a key and a list of steps: `("k1", [("send", {...}), ("receive",)])`.
What the steps have to say is kept under the key for `/records?k1`. Every other path answers with its scope.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import collections
from typing import Any
from urllib.parse import unquote

records: dict[str, list[Any]] = {}
flags: dict[str, asyncio.Event] = collections.defaultdict(asyncio.Event)
tasks: set[asyncio.Future[Any]] = set()
lifespans: list[dict[str, Any]] = []


async def app(*args: Any) -> Any:
    scope, receive, send = args
    if scope["type"] == "lifespan":
        return await lifespan(scope, receive, send)
    path, query = scope["path"], unquote(scope["query_string"].decode("latin-1"))
    if path == "/script":
        key, steps = ast.literal_eval(query)
        return await Run(scope, receive, send, records.setdefault(key, [])).run(steps)
    if path == "/mutate":
        told = dump(scope)
        mutate(scope)
        return await answer(send, told)
    if path == "/records":
        return await answer(send, repr(records.get(query)))
    if path == "/set":
        flags[query].set()
        return await answer(send, "set")
    if path == "/lifespan":
        return await answer(send, repr(lifespans))
    return await answer(send, dump(scope))


def dump(scope: Any) -> str:
    return repr({**scope, "is a": type(scope).__name__})


async def answer(send: Any, text: str) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})


async def lifespan(scope: Any, receive: Any, send: Any) -> None:
    lifespans.append({"type": scope["type"], "asgi": dict(scope["asgi"])})
    await receive()
    scope["state"]["shared"] = []
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def mutate(scope: Any) -> None:
    scope["headers"].append((b"x-leaked", b"1"))
    scope["asgi"]["leaked"] = 1
    scope["extensions"]["leaked"] = {}
    scope["state"]["leaked"] = 1
    scope["state"]["shared"].append("seen by all")
    scope["path"] = scope["raw_path"] = scope["leaked"] = "leaked"


class Run:
    """One call of the application that follows a script."""

    def __init__(self, scope: Any, receive: Any, send: Any, record: list[Any]) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.record = record

    async def run(self, steps: Any) -> Any:
        try:
            for name, *args in steps:
                if name == "return":
                    return args[0]
                await self.step(name, *args)
        finally:
            self.record.append("end")
        return None

    async def step(self, name: str, *args: Any) -> None:
        await getattr(self, name)(*args)

    async def send(self, event: Any) -> None:
        await self._send(event)

    async def attempt(self, event: Any) -> None:
        """`send`, and note what came of it: "sent", or the names of the classes of the exception."""
        try:
            await self._send(event)
        except Exception as exc:
            self.record.append([kind.__name__ for kind in type(exc).__mro__])
        else:
            self.record.append("sent")

    async def attempt_made(self, event: Any, name: str, value: Any) -> None:
        """`attempt` with a value of a type that a literal cannot have."""
        await self.attempt({**event, name: getattr(builtins, value)(event[name])})

    async def receive(self) -> None:
        self.record.append(await self._receive())

    async def until(self, kind: str) -> None:
        event: Any = {"type": ""}
        while event["type"] != kind:
            event = await self._receive()
            self.record.append(event)

    async def body(self) -> None:
        """The whole request body, noted in one piece."""
        size, data, more = 0, [], True
        while more:
            event = await self._receive()
            assert event["type"] == "http.request", event
            size += len(event["body"])
            if size < 65536:
                data.append(event["body"])
            more = event["more_body"]
        self.record.append((size, b"".join(data)))

    async def echo(self) -> None:
        """Each piece of the body as it comes, in a chunk."""
        more = True
        while more:
            event = await self._receive()
            more = event["more_body"]
            await self._send({"type": "http.response.body", "body": event["body"], "more_body": more})

    async def raises(self, name: str) -> None:
        raise getattr(builtins, name)("so said the script")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def wait(self, flag: str) -> None:
        await flags[flag].wait()

    async def note(self, what: Any) -> None:
        self.record.append(what)

    async def within(self, seconds: float, name: str, *args: Any) -> None:
        try:
            await asyncio.wait_for(self.step(name, *args), seconds)
        except asyncio.TimeoutError:
            self.record.append("timed out")

    async def cancelled_receive(self) -> None:
        task = asyncio.ensure_future(self._receive())
        await asyncio.sleep(0.01)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            self.record.append("cancelled")

    async def aside(self, steps: Any) -> None:
        """The steps in a task that nobody waits for."""
        tasks.add(task := asyncio.ensure_future(self.run(steps)))
        task.add_done_callback(tasks.discard)

    async def together(self, steps: Any) -> None:
        """Each step in a task of its own."""
        await asyncio.gather(*(asyncio.ensure_future(self.step(*step)) for step in steps))

    async def push(self, total: int, piece: int) -> None:
        """`total` bytes of body; how many have been taken is the last entry of the record."""
        self.record.append(0)
        for _ in range(total // piece):
            await self._send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
            self.record[-1] += piece

    async def flood(self, size: int = 1024) -> None:
        """Body until `send` raises."""
        while True:
            await self._send({"type": "http.response.body", "body": bytes(size), "more_body": True})
            await asyncio.sleep(0)

    async def flood_noted(self, size: int) -> None:
        try:
            await self.flood(size)
        except Exception as exc:
            self.record.append([kind.__name__ for kind in type(exc).__mro__])


class legacy:
    def __init__(self, scope: Any) -> None:
        self.scope = scope

    async def __call__(self, receive: Any, send: Any) -> None:
        await app(self.scope, receive, send)
