"""vhost-user messages: any split of the stream is the same, and what is no message is an error with its numbers."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.protocols import vhost_user
from qmpd.protocols.vhost_user import MAX_PAYLOAD, Message, MessageReader, Region, VhostUserError


def packed(number: int, payload: bytes, flags: int = 1) -> bytes:
    return struct.pack("<III", number, flags, len(payload)) + payload


def taken(stream: bytes, cuts: list[int]) -> list[Message]:
    reader, found = MessageReader(), []
    places = iter(sorted(cuts))
    end = 0
    while stream:
        if not end:
            end = next(places, len(stream)) or len(stream)
        step = min(reader.need, end, len(stream)) or 1
        message = reader.feed(stream[:step])
        stream, end = stream[step:], max(end - step, 0)
        if message is not None:
            found.append(message)
    return found


@given(
    messages=st.lists(st.tuples(st.integers(0, 99), st.booleans(), st.binary(max_size=80)), max_size=5),
    cuts=st.lists(st.integers(1, 40), max_size=10),
)
def test_messages_come_out_as_they_were_sent(messages: list[tuple[int, bool, bytes]], cuts: list[int]) -> None:
    stream = b"".join(packed(number, data, 9 if wants else 1) for number, wants, data in messages)
    assert taken(stream, cuts) == [Message(*one) for one in messages]


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ((1, 0, 0), "message 1 is of version 0, not 1"),
        ((1, 2, 0), "version 2"),
        ((1, 5, 0), "message 1 is a reply"),
        ((5, 1, MAX_PAYLOAD + 1), f"payload of {MAX_PAYLOAD + 1} bytes; the limit is {MAX_PAYLOAD}"),
        ((5, 1, 0xFFFFFFFF), "payload of 4294967295 bytes"),
    ],
)
def test_a_header_that_is_none_is_refused_at_once(header: tuple[int, int, int], text: str) -> None:
    with pytest.raises(VhostUserError, match=text):
        MessageReader().feed(struct.pack("<III", *header))


def test_a_memory_table_is_its_regions() -> None:
    regions = [Region(0, 4096, 1 << 40, 0), Region(1 << 32, 8192, 2 << 40, 4096)]
    payload = struct.pack("<II", 2, 0) + b"".join(struct.pack("<QQQQ", *one) for one in regions)
    assert vhost_user.regions(Message(5, True, payload)) == regions


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "table has 0 bytes"),
        (struct.pack("<II", 9, 0) + bytes(32 * 9), "9 regions; the limit is 8"),
        (struct.pack("<II", 0xFFFFFFFF, 0), "the limit is 8"),
        (struct.pack("<II", 2, 0) + bytes(32), "of 2 regions has 40 bytes"),
        (struct.pack("<IIQQQQ", 1, 0, 0, 0, 0, 0), "region of 0 bytes"),
        (struct.pack("<IIQQQQ", 1, 0, 1 << 63, 1 << 63 | 1, 0, 0), "a memory region"),
        (struct.pack("<IIQQQQ", 1, 0, 0, 1 << 63 | 1, 1 << 63, 0), "a memory region"),
        (struct.pack("<IIQQQQ", 1, 0, 0, 4096, 0, (1 << 63) - 1), "a memory region"),
    ],
)
def test_a_memory_table_that_is_none_is_refused(payload: bytes, text: str) -> None:
    with pytest.raises(VhostUserError, match=text):
        vhost_user.regions(Message(5, True, payload))


@given(number=st.sampled_from(list(vhost_user.Request)), payload=st.binary(max_size=300))
def test_any_payload_is_taken_apart_or_refused(number: int, payload: bytes) -> None:
    message = Message(number, True, payload)
    for parse in (
        vhost_user.u64,
        vhost_user.state,
        vhost_user.ring_addresses,
        vhost_user.regions,
        vhost_user.one_region,
        vhost_user.config_part,
    ):
        with contextlib.suppress(VhostUserError):
            parse(message)
