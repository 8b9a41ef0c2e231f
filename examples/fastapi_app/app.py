"""A small FastAPI application: `apphost app:app`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, UploadFile
from pydantic import BaseModel, Field


@dataclass
class Ledger:
    """What happened in this worker since it started."""

    opened: int = 0
    closed: int = 0
    mails: dict[str, float] = field(default_factory=dict)  # recipient -> time of sending


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.ledger = Ledger()
    print("lifespan: startup", flush=True)
    yield
    print("lifespan: shutdown", flush=True)


app = FastAPI(title="apphost example", lifespan=lifespan)


def ledger(request: Request) -> Ledger:
    return request.app.state.ledger  # type: ignore[no-any-return]


LedgerDep = Annotated[Ledger, Depends(ledger)]


@dataclass
class Connection:
    """Stands for a database connection that has to be given back after every request, also after a failed one."""

    number: int
    open: bool = True


async def connection(ledger: LedgerDep) -> AsyncIterator[Connection]:
    ledger.opened += 1
    conn = Connection(ledger.opened)
    try:
        yield conn
    finally:
        conn.open = False
        ledger.closed += 1


class Item(BaseModel):
    name: str = Field(min_length=1)
    price: float = Field(gt=0)
    tags: list[str] = []


@app.get("/")
async def hello(name: str = "world") -> dict[str, str]:
    return {"message": f"Hello, {name}!"}


@app.post("/items")
async def create_item(item: Item) -> Item:
    """Echoes a valid item; a body that does not fit the model is answered with 422."""
    return item


@app.get("/query")
async def query(conn: Annotated[Connection, Depends(connection)], fail: bool = False) -> dict[str, int | bool]:
    if fail:
        raise HTTPException(status_code=409, detail="asked to fail")
    return {"connection": conn.number, "open": conn.open}


@app.get("/ledger")
async def show_ledger(ledger: LedgerDep) -> Ledger:
    return ledger


@app.post("/mails/{recipient}", status_code=202)
async def send_mail(recipient: str, background: BackgroundTasks, ledger: LedgerDep) -> dict[str, str]:
    """Answers at once; the mail is "sent" afterwards, by a plain function in a thread."""

    def send() -> None:
        time.sleep(0.5)
        ledger.mails[recipient] = time.time()

    background.add_task(send)
    return {"accepted": recipient}


@app.post("/upload")
async def upload(file: UploadFile) -> dict[str, str | int | None]:
    digest = hashlib.sha256()
    while chunk := await file.read(64 * 1024):
        digest.update(chunk)
    return {"name": file.filename, "size": file.size, "sha256": digest.hexdigest()}


@app.get("/sync")
def sync() -> dict[str, str]:
    """A plain function: FastAPI runs it in a thread."""
    return {"message": "from a thread"}
