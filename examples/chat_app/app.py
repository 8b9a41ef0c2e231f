"""A chat that goes on through deploys: `apphost app:app`, with the settings in apphost.toml.

What is said stands in a database, so any worker can serve any client. What belongs to one client, its name, how much it
has said and what it has seen, travels with its WebSocket from the old worker to the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

HERE = Path(__file__).parent
DATABASE = os.environ.get("CHAT_DB", os.path.join(tempfile.gettempdir(), "apphost-chat.sqlite3"))
POLL = 0.05  # seconds between two looks for what other workers' clients have said
LONGEST = 500  # characters of a line
OLD_LINES = 20  # that a new client is shown

NEW_CLIENT = {"name": "", "said": 0, "seen": None}


class Room:
    """What is said, in the order of its numbers; the same for all workers, through the database."""

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path, timeout=5, isolation_level=None)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("CREATE TABLE IF NOT EXISTS lines (id INTEGER PRIMARY KEY, name TEXT, text TEXT)")

    def say(self, name: str, text: str) -> None:
        self.database.execute("INSERT INTO lines (name, text) VALUES (?, ?)", (name, text))

    def newest(self) -> int:
        return int(self.database.execute("SELECT coalesce(max(id), 0) FROM lines").fetchone()[0])

    def since(self, number: int) -> list[tuple[int, str, str]]:
        return self.database.execute("SELECT id, name, text FROM lines WHERE id > ? ORDER BY id", (number,)).fetchall()


class Client:
    """One WebSocket. `state` is what the next worker needs to know of it."""

    def __init__(self, websocket: WebSocket, room: Room) -> None:
        self.websocket = websocket
        self.room = room
        # Without the extension, under another server or another `ws_on_reload`, this is just a dict.
        self.legacy: dict[str, Any] = websocket.scope["extensions"].get("apphost.resume", {})
        left = self.legacy.get("state")
        self.state = json.loads(left) if left else dict(NEW_CLIENT)
        if self.state["seen"] is None:
            self.state["seen"] = max(0, room.newest() - OLD_LINES)

    def keep(self, **changes: Any) -> None:
        self.state.update(changes)
        self.legacy["state"] = json.dumps(self.state).encode()

    async def listen(self) -> None:
        """What the client says, until it goes, or until its socket moves on."""
        while True:
            said = await self.websocket.receive_json()
            if "name" in said:
                self.keep(name=str(said["name"])[:40])
            elif "text" in said:
                self.room.say(self.state["name"] or "somebody", str(said["text"])[:LONGEST])
                self.keep(said=self.state["said"] + 1)
                await self.websocket.send_json({"said": self.state["said"], "worker": os.getpid()})

    async def tell(self) -> None:
        """What anybody says."""
        while True:
            for number, name, text in self.room.since(self.state["seen"]):
                await self.websocket.send_json({"id": number, "name": name, "text": text})
                self.keep(seen=number)
            await asyncio.sleep(POLL)


async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    client = Client(websocket, websocket.state.room)
    teller = asyncio.create_task(client.tell())
    try:
        await client.listen()
    except WebSocketDisconnect:
        pass
    finally:
        teller.cancel()
        with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect):
            await teller


async def page(request: Request) -> Response:
    return FileResponse(HERE / "page.html")


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Room]]:
    room = Room(DATABASE)
    yield {"room": room}
    room.database.close()


app = Starlette(routes=[Route("/", page), WebSocketRoute("/chat", chat)], lifespan=lifespan)
