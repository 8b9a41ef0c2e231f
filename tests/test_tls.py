"""The transport that speaks TLS, without a loop and without a socket: both ends of it, byte by byte if need be."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from apphost.logs import Log
from apphost.protocols.tls import TlsTransport, describe_tls, rfc4514
from apphost.settings import Settings
from apphost.worker.certificates import load
from tests import pki as pki_module
from tests.pki import Pki
from tests.rawhttp import DEADLINE


class Below:
    """The plain transport."""

    def __init__(self) -> None:
        self.wire = b""
        self.events: list[str] = []
        self.unsent = 0
        self.limits: tuple[int | None, int | None] = (None, None)

    def write(self, data: bytes) -> None:
        assert data, "an empty write"
        assert not {"eof", "close", "abort"} & {*self.events}, "written after the end"
        self.wire += data

    def take(self) -> bytes:
        data, self.wire = self.wire, b""
        return data

    def write_eof(self) -> None:
        self.events.append("eof")

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.events.append("close")

    def abort(self) -> None:
        self.events.append("abort")

    def is_closing(self) -> bool:
        return "close" in self.events or "abort" in self.events

    def pause_reading(self) -> None:
        self.events.append("pause")

    def resume_reading(self) -> None:
        self.events.append("resume")

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.limits = high, low

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("192.0.2.1", 4711)}.get(name, default)


class Above(asyncio.Protocol):
    """The protocol; `heard` in order."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.on_data: Callable[[bytes], None] = lambda _: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.heard.append("made")

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)
        self.on_data(data)

    def eof_received(self) -> bool:
        self.heard.append("eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.heard.append(("lost", exc))

    def pause_writing(self) -> None:
        self.heard.append("pause")

    def resume_writing(self) -> None:
        self.heard.append("resume")


class Lines(Log):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def write(self, level: str, message: str, detail: str = "", **fields: Any) -> None:
        assert not detail
        self.lines.append((level, message))


class Stage:
    """A server's transport and a client, with everything in the hands of the test."""

    def __init__(self, pki: Pki, loop: asyncio.AbstractEventLoop, client: ssl.SSLContext | None = None, **more: str):
        self.loop = loop
        self.below, self.above, self.log = Below(), Above(), Lines()
        local = (str(pki.folder / "local.pem"),), (str(pki.folder / "local.key"),)
        certificates = load(Settings(tls_certfile=local[0], tls_keyfile=local[1], **more))  # type: ignore[arg-type]
        assert certificates is not None
        self.transport = TlsTransport(loop, certificates.context, lambda: self.above, self.log, 10.0)
        self.transport.connection_made(self.below)  # type: ignore[arg-type]
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client or pki.client()
        self.client = client.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    def carry(self, step: int = 1 << 20) -> None:
        """Bring to the other side what each has to say, in pieces of `step` bytes."""
        while (data := self.outgoing.read()) or self.below.wire:
            for at in range(0, len(data), step):
                self.transport.data_received(data[at : at + step])
            self.incoming.write(self.below.take())
            if not data:
                return

    def shake_hands(self, step: int = 1 << 20) -> None:
        for _ in range(4):
            with contextlib.suppress(ssl.SSLWantReadError):
                self.client.do_handshake()
            self.carry(step)
        assert self.above.heard == ["made"]
        assert self.transport.settled.done()
        self.above.heard.clear()

    def say(self, data: bytes, step: int = 1 << 20) -> None:
        self.client.write(data)
        self.carry(step)

    def hear(self) -> bytes:
        """What has come for the client; b"" is close_notify. `SSLWantReadError` when there is nothing."""
        self.incoming.write(self.below.take())
        return self.client.read(1 << 20)

    def end(self) -> None:
        """The client's close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.client.unwrap()
        self.carry()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return pki_module.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def stage(pki: Pki, loop: asyncio.AbstractEventLoop) -> Stage:
    return Stage(pki, loop)


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_both_ways_in_any_pieces(stage: Stage, step: int) -> None:
    stage.shake_hands(step)
    stage.say(b"question", step)
    assert stage.above.heard == [b"question"]
    stage.transport.write(b"answer")
    assert stage.hear() == b"answer"
    stage.transport.writelines([b"one", b"", b"two"])
    assert stage.hear() + stage.hear() == b"onetwo"
    stage.transport.write(b"")
    assert not stage.below.wire
    assert stage.log.lines == []


def test_many_records_come_in_one_piece(stage: Stage) -> None:
    """And with close_notify in the same bytes: first the data, then the end."""
    stage.shake_hands()
    stage.client.write(bytes(100_000))
    stage.end()
    assert stage.above.heard == [bytes(100_000), "eof"]
    stage.transport.write(b"answer")  # RFC 8446, 6.1: the other direction goes on
    assert stage.hear() == b"answer"
    stage.transport.eof_received()
    assert stage.above.heard[2:] == []  # it has heard that


def test_data_behind_the_handshake(stage: Stage) -> None:
    """A client that speaks at once: its request is in the same bytes as the end of the handshake."""
    with pytest.raises(ssl.SSLWantReadError):
        stage.client.do_handshake()
    stage.carry()
    stage.client.do_handshake()
    stage.client.write(b"early")
    stage.carry()
    assert stage.above.heard == ["made", b"early"]


def test_end_without_close_notify(stage: Stage) -> None:
    stage.shake_hands()
    assert stage.transport.eof_received()
    assert stage.above.heard == ["eof"]


def test_end_while_reading_is_paused(stage: Stage) -> None:
    """It is told when the protocol reads again, after the data as on a plain connection."""
    stage.shake_hands()
    stage.above.on_data = lambda _: stage.transport.pause_reading()
    stage.client.write(b"last")
    stage.end()
    assert stage.above.heard == [b"last"]
    assert stage.below.events == ["pause"]
    stage.transport.resume_reading()
    stage.loop.run_until_complete(asyncio.sleep(0))
    assert stage.above.heard == [b"last", "eof"]


def test_close(stage: Stage) -> None:
    """close_notify, then the end; nothing is heard or said afterwards."""
    stage.shake_hands()
    stage.transport.write(b"bye")
    stage.transport.close()
    assert stage.below.events == ["close"]
    assert stage.transport.is_closing()
    assert stage.hear() == b"bye"
    assert stage.hear() == b""
    stage.transport.write(b"more")
    stage.say(b"late")
    assert stage.above.heard == []
    stage.transport.connection_lost(None)
    assert stage.above.heard == [("lost", None)]
    stage.transport.write(b"more")


def test_write_eof(stage: Stage) -> None:
    """Our side is over, and what still comes is thrown away until the peer's is: no reset can destroy the answer."""
    stage.shake_hands()
    stage.transport.write(b"bye")
    stage.transport.write_eof()
    assert stage.below.events == ["eof"]
    assert not stage.transport.is_closing()
    stage.say(bytes(1_000_000))
    assert stage.above.heard == []
    assert stage.hear() == b"bye"
    assert stage.hear() == b""
    stage.transport.eof_received()
    assert stage.above.heard == ["eof"]
    stage.transport.close()
    assert stage.below.events == ["eof", "close"]


def test_close_after_the_transport_below_has_failed(stage: Stage) -> None:
    """Which the loop tells only in its next turn; writing to it then is an error on uvloop."""
    stage.shake_hands()
    stage.below.take()
    stage.below.events.append("abort")
    stage.transport.close()
    assert stage.below.wire == b""


def test_abort_says_nothing(stage: Stage) -> None:
    stage.shake_hands()
    stage.below.take()
    stage.transport.abort()
    assert stage.below.wire == b""
    assert stage.below.events == ["abort"]


def test_flow_is_that_of_the_transport_below(stage: Stage) -> None:
    """What waits there is what waits: else nobody would notice a client that does not read."""
    stage.shake_hands()
    stage.below.unsent = 4711
    assert stage.transport.get_write_buffer_size() == 4711
    stage.transport.set_write_buffer_limits(high=0)
    assert stage.below.limits == (0, None)
    stage.transport.pause_writing()
    stage.transport.resume_writing()
    assert stage.above.heard == ["pause", "resume"]


def test_broken_record(stage: Stage) -> None:
    stage.shake_hands()
    stage.say(b"good")
    stage.transport.data_received(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert stage.above.heard == [b"good"]
    assert stage.below.events == ["abort"]
    ((level, line),) = stage.log.lines
    assert level == "debug"
    assert line.startswith("the TLS connection of 192.0.2.1:4711 has failed: ")


@pytest.mark.parametrize(
    ("data", "level", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "info", "http request"),
        (b"SSH-2.0-OpenSSH\r\n", "info", "wrong version number"),
        (b"", "debug", "the client has left"),
    ],
)
def test_handshake_that_fails(stage: Stage, data: bytes, level: str, why: str) -> None:
    if data:
        stage.transport.data_received(data)
    else:
        stage.transport.eof_received()
    assert stage.below.events[:1] == ["close"]
    stage.transport.data_received(b"more")
    stage.transport.connection_lost(None)
    assert stage.transport.settled.done()
    assert stage.above.heard == []
    assert stage.log.lines == [(level, f"the TLS handshake with 192.0.2.1:4711 has failed: {why}")]
    assert stage.below.wire.startswith(b"HTTP/1.1 400 ") is (why == "http request")


def test_alert_tells_the_client_why(pki: Pki, loop: asyncio.AbstractEventLoop) -> None:
    stage = Stage(pki, loop, pki.client(version=ssl.TLSVersion.TLSv1_2), tls_minimum="1.3")
    with pytest.raises(ssl.SSLWantReadError):
        stage.client.do_handshake()
    stage.carry()
    stage.incoming.write(stage.below.take())
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        stage.client.do_handshake()


def test_given_up(stage: Stage) -> None:
    stage.transport.give_up()
    stage.transport.give_up()
    assert stage.below.events == ["close"]
    assert stage.log.lines == [("debug", "the TLS handshake with 192.0.2.1:4711 has failed: the worker goes")]


def test_time_is_up(pki: Pki, loop: asyncio.AbstractEventLoop) -> None:
    stage = Stage(pki, loop)
    transport = TlsTransport(loop, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Above, stage.log, 0.01)
    transport.connection_made(stage.below)  # type: ignore[arg-type]

    async def until_closed() -> None:
        while not stage.below.events:
            await asyncio.sleep(0.001)

    loop.run_until_complete(asyncio.wait_for(until_closed(), DEADLINE))
    assert stage.log.lines == [("info", "the TLS handshake with 192.0.2.1:4711 has failed: it took longer than 0.01 s")]


def test_facts(pki: Pki, loop: asyncio.AbstractEventLoop) -> None:
    stage = Stage(pki, loop, tls_ca_certs=str(pki.ca_file), tls_client_certs="optional")
    stage.shake_hands()
    told = describe_tls(stage.transport.get_extra_info("ssl_object"))
    assert told["server_cert"] == pki.leaf("local")
    assert (told["tls_version"], told["cipher_suite"]) == (0x0304, 0x1302)
    assert (told["client_cert_chain"], told["client_cert_name"], told["client_cert_error"]) == ([], None, None)


# RFC 4514, sections 2 to 4, with the names of `getpeercert`
@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ((), ""),
        (
            ((("domainComponent", "net"),), (("domainComponent", "example"),), (("userId", "jsmith"),)),
            "UID=jsmith,DC=example,DC=net",
        ),
        (
            ((("domainComponent", "net"),), (("organizationalUnitName", "Sales"), ("commonName", "J.  Smith"))),
            "OU=Sales+CN=J.  Smith,DC=net",
        ),
        (((("commonName", 'James "Jim" Smith, III'),),), 'CN=James \\"Jim\\" Smith\\, III'),
        (((("commonName", "Before\rAfter"),),), "CN=Before\rAfter"),
        (((("commonName", "#a+b;c<d>e\\f=g"),),), "CN=\\#a\\+b\\;c\\<d\\>e\\\\f=g"),
        (((("commonName", "  two  "),),), "CN=\\  two \\ "),
        (((("commonName", " "),),), "CN=\\ "),
        (((("commonName", "a\0b"),),), "CN=a\\00b"),
        (((("commonName", "Lučić"),),), "CN=Lučić"),
        (((("countryName", "CH"),), (("stateOrProvinceName", "Uri"),)), "ST=Uri,C=CH"),
        (((("emailAddress", "a@b.c"),),), "emailAddress=a@b.c"),
        (((("1.3.6.1.4.1.1466.0", "Hi"),),), "1.3.6.1.4.1.1466.0=#0c024869"),
    ],
)  # fmt: skip
def test_rfc4514(subject: Any, expected: str) -> None:
    assert rfc4514(subject) == expected
