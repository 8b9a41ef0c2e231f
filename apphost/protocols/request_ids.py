"""Ids of requests (`request_id_header`): from a trusted proxy or made, for the application, the client and the log.

Which connections have them is decided by their class, as with proxies; where the setting is off there is no such class.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import TYPE_CHECKING

from apphost.protocols.base import Headers, RequestHead
from apphost.protocols.exchange import Exchange

if TYPE_CHECKING:
    from apphost.protocols.body import BodyDecoder
    from apphost.protocols.http1 import Connection
    from apphost.protocols.response import ResponseHead

# What proxies and tracing libraries make: hex, UUIDs, base64, W3C trace ids with dashes. nginx's `$request_id` has 32
# characters, a UUID 36; four times that leaves room for what joins several.
_GOOD = re.compile(rb"[A-Za-z0-9+/=_.:@~-]{1,144}")
_STOCK = 512  # bytes asked of the system at a time, for 32 ids: a call for each would take most of its time


class RequestIds:
    """The rules. `name`: the header field. underscores: whether names with `_` come through, which to WSGI are the
    same as those with `-`."""

    __slots__ = ("_random", "field", "name", "underscores")

    def __init__(self, name: str, underscores: bool = False) -> None:
        self.field = name.encode("ascii")
        self.name = self.field.lower()
        self.underscores = underscores
        self._random = b""

    def make(self) -> bytes:
        """128 random bits in hex."""
        if not self._random:
            self._random = os.urandom(_STOCK).hex().encode("ascii")
        made, self._random = self._random[:32], self._random[32:]
        return made

    def take(self, headers: Headers, believed: bool) -> tuple[bytes, Headers]:
        """(the id, the header fields with it in the place of what the client has sent for it).

        That is the id when the peer is `believed`, and it is a single one of harmless characters; else one is made.
        """
        ours: Collection[bytes] = (self.name,)
        if self.underscores:
            ours = {name for name, _ in headers if name.replace(b"_", b"-") == self.name}
        given = [value for name, value in headers if name in ours]
        good = believed and len(given) == 1 and _GOOD.fullmatch(given[0]) is not None
        made = given[0] if good else self.make()
        if given:
            headers = [item for item in headers if item[0] not in ours]
        return made, [*headers, (self.name, made)]


class IdentifiedExchange(Exchange):
    """A request with an id. To be mixed with another kind of exchange; the slots are those of the mixture.

    request_id: for the log. fields: what each response to it says.
    """

    __slots__ = ()
    believed = False
    request_id: str

    def __init__(self, connection: Connection, head: RequestHead, decoder: BodyDecoder | None) -> None:
        super().__init__(connection, head, decoder)
        rules = self.context.request_ids
        assert rules is not None
        made, head.headers = rules.take(head.headers, self.believed)
        self._identify(rules, made)

    def _identify(self, rules: RequestIds, made: bytes) -> None:
        self.request_id = made.decode("ascii")  # type: ignore[misc]  # slots of the mixture
        self.fields = ((rules.field, made),)  # type: ignore[misc]

    def go_on(self, headers: Headers) -> None:
        """It is a WebSocket that another worker has had: the id is that of its handshake."""
        rules = self.context.request_ids
        assert rules is not None
        for name, value in headers:
            if name == rules.name and _GOOD.fullmatch(value) is not None:
                self.head.headers = headers
                self._identify(rules, value)

    def start(self, head: ResponseHead) -> None:
        name, made = self.fields[0]
        # An application that gives the field itself has its reasons.
        if b"\r\n" + name.lower() + b": " not in head.text.lower():
            head.text += b"%b: %b\r\n" % (name, made)
        super().start(head)

    def with_fields(self, headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
        given = [*headers]
        name = self.fields[0][0].lower()
        if any(isinstance(key, bytes) and key.lower() == name for key, _ in given):
            return given
        return [*given, *self.fields]


@cache
def identified(kind: type[Connection], believed: bool) -> type[Connection]:
    """The kind of connection whose requests have ids; `believed`: those of the peer count."""
    inner = kind.exchange_type
    slots = ("request_id", "fields")
    exchange = type(
        f"Identified{inner.__name__}", (IdentifiedExchange, inner), {"__slots__": slots, "believed": believed}
    )
    return type(f"Identified{kind.__name__}", (kind,), {"__slots__": (), "exchange_type": exchange})
