"""Messages: the decoder with any split of any bytes, and channels over real socketpairs."""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apphost.messages import MAX_FDS, MAX_MESSAGE, Channel, Decoder, Message, ProtocolError, encode, is_cut
from tests.support import linux, no_more_descriptors

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
# "fds" is the channel's own key: the number of descriptors beside the line.
messages = st.builds(
    lambda kind, rest: {**rest, "t": kind},
    st.text(max_size=10),
    st.dictionaries(st.text(max_size=10).filter(lambda key: key != "fds"), values, max_size=4),
)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(at)]


def message_of_size(size: int) -> bytes:
    line = b'{"t":"","x":"' + b"x" * (size - 16) + b'"}\n'
    assert len(line) == size
    return line


# ---------------------------------------------------------------------------------------------------------- decoder


@given(messages)
def test_a_message_is_one_line(message: Message) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Decoder().feed(line, []) == [(message, [])]


@given(st.lists(messages, max_size=6), st.lists(st.integers(0, 10**6), max_size=12))
def test_any_split_gives_the_same_messages(sent: list[Message], cuts: list[int]) -> None:
    decoder = Decoder()
    got = [pair for part in split(b"".join(map(encode, sent)), cuts) for pair in decoder.feed(part, [])]
    assert got == [(message, []) for message in sent]


@given(st.lists(messages, max_size=3))
def test_byte_by_byte(sent: list[Message]) -> None:
    decoder = Decoder()
    data = b"".join(map(encode, sent))
    got = [pair for i in range(len(data)) for pair in decoder.feed(data[i : i + 1], [])]
    assert got == [(message, []) for message in sent]


def test_a_message_is_given_out_as_soon_as_its_line_ends() -> None:
    decoder = Decoder()
    assert decoder.feed(b'{"t":"beat"}', []) == []
    assert decoder.feed(b'\n{"t":', []) == [({"t": "beat"}, [])]


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 10**6), max_size=8))
def test_descriptors_are_claimed_in_order(counts: list[int], cuts: list[int]) -> None:
    """They come with the first byte of their line, whatever the split, and are given out with its last."""
    decoder, number, data, arriving = Decoder(), 100, b"", {}
    expected = []
    for count in counts:
        fds = list(range(number, number + count))
        number += count
        message = {"t": "take", "fds": count}
        arriving[len(data)] = fds
        expected.append((message, fds))
        data += encode(message)
    got, at = [], 0
    for part in split(data, cuts):
        fds = [fd for start in range(at, at + len(part)) for fd in arriving.get(start, [])]
        got += decoder.feed(part, fds)
        at += len(part)
    assert got == expected
    assert not decoder.fds


def test_descriptors_that_nobody_claims_are_kept_for_closing() -> None:
    decoder = Decoder()
    assert decoder.feed(b'{"t":"take","fds":1}\n', [7, 8]) == [({"t": "take", "fds": 1}, [7])]
    assert list(decoder.fds) == [8]


def test_lost_descriptors_are_those_of_one_message() -> None:
    """Whatever else has come by the time that its message is whole; a message without any loses none."""
    decoder = Decoder()
    assert decoder.feed(b'{"t":"take","fds":2}\n{"t":"ta', [5, 6]) == [({"t": "take", "fds": 2}, [5, 6])]
    assert decoder.feed(b'ke"}\n{"t":"take","fds":3,', [Decoder.LOST]) == [({"t": "take"}, [])]
    got = decoder.feed(b'"n":1}\n{"t":"take","fds":1}\n', [7])
    assert got == [({"t": "take", "fds": 3, "n": 1}, []), ({"t": "take", "fds": 1}, [7])]
    assert [is_cut(message, fds) for message, fds in got] == [True, False]
    assert not decoder.fds


@pytest.mark.parametrize("fds", ["-1", "true", '"1"'])
def test_a_wrong_count_is_wrong_also_where_descriptors_are_lost(fds: str) -> None:
    with pytest.raises(ProtocolError):
        Decoder().feed(b'{"t":"take","fds":%s}\n' % fds.encode(), [Decoder.LOST])


@pytest.mark.parametrize("fds", ["2", "-1", "null", "true", "false", "1.0", '"1"', "[]", "1e400", "9" * 400])
def test_a_wrong_count_of_descriptors(fds: str) -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError):
        decoder.feed(b'{"t":"take","fds":%s}\n' % fds.encode(), [7])
    assert list(decoder.fds) == [7]


def test_descriptors_claimed_just_before_garbage_are_not_lost() -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError):
        decoder.feed(b'{"t":"a","fds":2}\n{"t":"b","fds":1}\ngarbage\n', [5, 6, 7, 8])
    assert list(decoder.fds) == [5, 6, 7, 8]


GARBAGE = [
    b"",
    b" ",
    b"garbage",
    b"null",
    b"[]",
    b'"t"',
    b"{}",
    b'{"t":1}',
    b'{"t":null}',
    b'{"T":"beat"}',
    b'{"t":"beat"',
    b'{"t":"beat"}}',
    b"{'t':'beat'}",
    b'{"t":"\xff"}',
    b'{"t":"a\x00b"}',
    b"\xff\xfe{\x00}\x00",
    b"\x00\x00\x00{",
    b"[" * 500_000,
    b'{"t":' * 100_000,
    b'{"t":"beat","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    b'{"t":"beat","x":' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: ascii(line[:20]))
def test_garbage_is_a_protocol_error(line: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        Decoder().feed(line + b"\n", [])
    assert len(str(caught.value)) < 500, "an error message that fits into a log"


pieces = st.binary(max_size=20) | st.sampled_from(
    [b'{"t":"a"}', b"\n", b'"', b"{", b"}", b'"t":', b"[", b',"fds":1', b"9" * 5000, b"\xef\xbb\xbf", b"\x00", b"NaN"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(pieces, max_size=8).map(b"".join), max_size=6))
def test_fuzz_nothing_but_protocol_errors(parts: list[bytes]) -> None:
    decoder, given_fds, claimed = Decoder(), 0, 0
    for part in parts:
        fds, given_fds = [given_fds], given_fds + 1
        try:
            got = decoder.feed(part, fds)
        except ProtocolError:
            continue
        for message, fds in got:
            assert isinstance(message["t"], str)
            assert fds == list(range(claimed, claimed + len(fds)))
            claimed += len(fds)
    assert list(decoder.fds) == list(range(claimed, given_fds)), "each descriptor is claimed or kept"


@pytest.mark.parametrize("parts", [1, 3])
def test_the_longest_message(parts: int) -> None:
    line = message_of_size(MAX_MESSAGE + 1)  # the line feed is not counted
    decoder = Decoder()
    got = [
        pair for part in split(line, [i * len(line) // parts for i in range(parts)]) for pair in decoder.feed(part, [])
    ]
    assert [message["t"] for message, _ in got] == [""]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n" + b'{"t":"beat"}\n'])
def test_a_message_that_is_too_long(end: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder().feed(message_of_size(MAX_MESSAGE + 2)[:-1] + end, [])


def test_a_message_that_never_ends_is_not_collected() -> None:
    decoder = Decoder()
    for _ in range(MAX_MESSAGE // 65536):
        assert decoder.feed(b"x" * 65536, []) == []
    with pytest.raises(ProtocolError):
        decoder.feed(b"x", [])


# ---------------------------------------------------------------------------------------------------------- channel


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = map(Channel, socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    yield left, right
    left.close()
    right.close()


def open_fds() -> set[str]:
    return set(os.listdir("/dev/fd"))


def drain(channel: Channel) -> list[tuple[Message, list[int]]]:
    """All that has arrived so far."""
    got = []
    while new := channel.receive():
        got += new
    return got


def fill(channel: Channel) -> list[Message]:
    """Send numbered messages until the socket takes no more; at least one is queued then."""
    sent: list[Message] = []
    while not channel.blocked:
        sent.append({"t": "n", "n": len(sent), "x": "x" * 5000})
        assert channel.send(sent[-1])
    return sent


def test_messages_go_both_ways_in_order(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    for n in range(3):
        assert left.send({"t": "order", "n": n})
        assert right.send({"t": "answer", "n": n})
    assert drain(right) == [({"t": "order", "n": n}, []) for n in range(3)]
    assert drain(left) == [({"t": "answer", "n": n}, []) for n in range(3)]
    assert left.receive() == []
    assert not left.blocked
    assert left.fileno() == left.sock.fileno()


def test_a_long_message_arrives_whole(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    message = {"t": "boot failure", "detail": "é\n" * 50_000}
    assert left.send(message)
    got: list[tuple[Message, list[int]]] = []
    while not got:
        got = drain(right)
        assert left.flush()
    assert got == [(message, [])]


def test_a_descriptor_arrives_usable_and_closed_on_exec(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    assert left.send({"t": "take"}, [writer])
    os.close(writer)
    [(message, [received])] = drain(right)
    assert message == {"t": "take", "fds": 1}
    assert not os.get_inheritable(received)
    os.write(received, b"through")
    os.close(received)
    assert os.read(reader, 100) == b"through"
    assert os.read(reader, 100) == b"", "no copy of the descriptor is left open anywhere"
    os.close(reader)


def test_descriptors_of_many_messages_stay_with_their_message(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    files = [
        os.memfd_create(str(n)) if hasattr(os, "memfd_create") else os.open(__file__, os.O_RDONLY) for n in range(6)
    ]
    sent = {0: [], 1: files[:1], 2: [], 3: files[1:4], 4: files[4:]}
    for n, fds in sent.items():
        assert left.send({"t": "take", "n": n}, fds)
    got = drain(right)
    assert [message["n"] for message, _ in got] == list(sent)
    for message, received in got:
        assert list(map(os.fstat, received)) == list(map(os.fstat, sent[message["n"]]))
        for fd in received:
            os.close(fd)
    for fd in files:
        os.close(fd)


@linux
@pytest.mark.parametrize("spare", [0, 1])
def test_a_message_whose_descriptors_find_no_room_arrives_without_them(
    pair: tuple[Channel, Channel], spare: int
) -> None:
    left, right = pair
    before = open_fds()
    with open(os.devnull) as file:
        for count in (1, 2, 0):
            assert left.send({"t": "take", "n": count}, [file.fileno()] * count)
        with no_more_descriptors(spare):
            got = drain(right)
    assert [message["n"] for message, _ in got] == [1, 2, 0]
    assert [len(fds) for _, fds in got] == [spare, 0, 0]
    assert [is_cut(*each) for each in got] == [not spare, True, False]
    for _, fds in got:
        for fd in fds:
            os.close(fd)
    with open(os.devnull) as file:
        assert left.send({"t": "take"}, [file.fileno()])
    ((_, [fd]),) = drain(right)
    os.close(fd)
    assert open_fds() == before


def test_a_blocked_peer_gets_everything_once_and_in_order(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    sent = fill(left)
    for _ in range(5):
        sent.append({"t": "n", "n": len(sent), "x": ""})
        assert left.send(sent[-1])
    got: list[Message] = []
    while left.blocked:
        got += [message for message, _ in right.receive() or []]
        assert left.flush()
    got += [message for message, _ in drain(right)]
    assert got == sent


def test_a_queued_descriptor_may_be_closed_by_its_sender(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    fill(left)
    reader, writer = os.pipe()
    assert left.send({"t": "take"}, [writer])
    os.close(writer)
    got: list[tuple[Message, list[int]]] = []
    while left.blocked:
        got += right.receive() or []
        assert left.flush()
    got += drain(right)
    assert [fds for _, fds in got[:-1]] == [[]] * (len(got) - 1)
    message, [received] = got[-1]
    assert message["t"] == "take"
    os.write(received, b"through")
    os.close(received)
    assert os.read(reader, 100) == b"through"
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_what_a_stuck_peer_does_not_read_is_kept_only_up_to_a_limit(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    sent = len(fill(left))
    before = open_fds()
    while left.send({"t": "n", "n": sent, "x": "x" * 5000}):
        sent += 1
        assert sent < 10 * MAX_MESSAGE // 5000
    assert left.blocked
    reader, writer = os.pipe()
    assert left.send({"t": "take", "x": "x" * 5000}, [writer]) is False
    os.close(reader)
    os.close(writer)
    assert open_fds() == before, "what is refused keeps no copy of a descriptor"
    got = []
    while left.blocked:
        got += [message["n"] for message, _ in right.receive() or []]
        assert left.flush()
    got += [message["n"] for message, _ in drain(right)]
    assert got == list(range(sent)), "what was refused is not sent, what was accepted is"
    assert left.send({"t": "n", "x": "x" * (MAX_MESSAGE - 100)}), "and there is room again for all that fits"


def test_a_message_that_no_peer_would_accept_is_refused(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    assert left.send({"t": "x", "x": "x" * MAX_MESSAGE}) is False
    assert not left.blocked
    assert not left.gone
    assert left.send({"t": "beat"})
    assert drain(right) == [({"t": "beat"}, [])]


def test_a_peer_that_is_gone_is_told_by_end_of_file_and_false(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    right.close()
    assert not left.gone
    assert left.send({"t": "beat"}) is False
    assert left.gone
    assert left.flush() is True, "nothing is left to send"
    assert not left.blocked
    assert left.receive() is None
    assert left.receive() is None


def test_a_peer_that_goes_while_blocked_leaves_no_descriptor_behind(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    before = open_fds()
    reader, writer = os.pipe()
    fill(left)
    assert left.send({"t": "take"}, [writer])
    os.close(writer)
    right.sock.close()
    assert left.flush() is False
    assert not left.blocked
    assert os.read(reader, 1) == b"", "the queued copy is closed"
    os.close(reader)
    assert len(open_fds()) == len(before) - 1  # the peer's socket


def test_the_last_words_of_a_peer_that_died_with_unread_orders(pair: tuple[Channel, Channel]) -> None:
    """The kernel then says ECONNRESET instead of end of file, but only after what was sent before."""
    left, right = pair
    assert left.send({"t": "order"})
    assert right.send({"t": "failed"})
    right.close()
    assert left.receive() == [({"t": "failed"}, [])]
    assert left.receive() is None


def test_half_a_message_before_the_end_is_no_message(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    right.sock.send(b'{"t":"bea')
    right.close()
    assert left.receive() == []
    assert left.receive() is None


def test_garbage_ends_a_channel_and_closing_it_closes_what_came(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    reader, writer = os.pipe()
    socket.send_fds(right.sock, [b'{"t":"take","fds":1}\ngarbage\n'], [writer])
    os.close(writer)
    with pytest.raises(ProtocolError):
        left.receive()
    left.close()
    assert os.read(reader, 1) == b"", "the received descriptor is closed"
    os.close(reader)


def test_more_descriptors_than_a_read_takes_leak_nothing(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    reader, writer = os.pipe()
    assert right.send({"t": "take"}, [writer] * (MAX_FDS + 1))
    os.close(writer)
    with pytest.raises(ProtocolError):
        left.receive()
    left.close()
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_close_drops_what_waits_and_what_nobody_claimed(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    reader, writer = os.pipe()
    socket.send_fds(right.sock, [b'{"t":"be'], [writer])
    assert left.receive() == []
    fill(left)
    assert left.send({"t": "take"}, [writer])
    os.close(writer)
    left.close()
    left.close()  # a second time does nothing
    assert not left.blocked
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        left.sock.getpeername()
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_unknown_kinds_and_keys_pass_the_channel(pair: tuple[Channel, Channel]) -> None:
    """An upgraded peer may say more than we know; whether to act on it is the owner's business."""
    left, right = pair
    line = json.dumps({"t": "a kind of tomorrow", "v": 99}).encode() + b"\r\n"
    right.sock.send(line)
    assert left.receive() == [({"t": "a kind of tomorrow", "v": 99}, [])]
