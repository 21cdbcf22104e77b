"""NBD requests and replies: hex tables, refusals with their texts, and any split of the stream."""

from __future__ import annotations

import errno
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.protocols.nbd import MAX_PAYLOAD, NbdError, Style, to_nbd_error
from qmpd.protocols.nbd_transmission import Replies, Request, Requests, merged_extents
from tests.support import nbd_wire as wire

SIZE = 1 << 20
EINVAL, EPERM, ENOSPC = NbdError.EINVAL, NbdError.EPERM, NbdError.ENOSPC


def requests(style: Style = Style.STRUCTURED, *, read_only: bool = False, size: int = SIZE) -> Requests:
    return Requests(style, size, read_only=read_only, contexts=(0, 1))


def decode(stream: bytes, style: Style = Style.STRUCTURED, *, read_only: bool = False) -> list[Request]:
    decoder = requests(style, read_only=read_only)
    found = decoder.decode(memoryview(stream))
    assert found.used == len(stream)
    assert found.partial is None
    assert not decoder.violation
    return found.requests


def refusal(stream: bytes, style: Style = Style.STRUCTURED, *, read_only: bool = False) -> tuple[NbdError, str] | None:
    [request] = decode(stream, style, read_only=read_only)
    return request.refusal


# requests


def test_a_compact_request_is_taken_apart() -> None:
    [request] = decode(bytes.fromhex("25609513 0001 0000 1122334455667788 0000000000010000 00001000"))
    assert (request.command, request.flags, request.cookie) == (wire.READ, wire.FUA, 0x1122334455667788)
    assert (request.offset, request.length, request.refusal) == (65536, 4096, None)


def test_an_extended_request_is_taken_apart() -> None:
    stream = bytes.fromhex("21e41c71 0020 0001 0000000000000009 0000000000000010 0000000000000003") + b"abc"
    [request] = decode(stream, Style.EXTENDED)
    assert (request.command, request.cookie, request.offset, request.length) == (wire.WRITE, 9, 16, 3)
    assert request.payload == b"abc"


def test_a_whole_buffer_comes_as_one_batch() -> None:
    stream = b"".join(wire.request(wire.READ, n * 4096, 4096, cookie=n) for n in range(100))
    stream += wire.request(wire.WRITE, 0, 5, cookie=100, payload=b"hello")
    stream += wire.request(wire.FLUSH, cookie=101)
    found = decode(stream)
    assert [one.cookie for one in found] == list(range(102))
    assert found[100].payload == b"hello"


def past(offset: int, length: int) -> str:
    return f"operation past EOF; From: {offset}, Len: {length}, Size: {SIZE}"


def flags(name: str, value: int) -> str:
    return f"unsupported flags for command {name} (got {value:#x})"


TOO_LONG = f"len ({MAX_PAYLOAD + 1}) is larger than max len ({MAX_PAYLOAD})"
REFUSED = [
    (wire.READ, SIZE - 5, 10, 0, EINVAL, past(SIZE - 5, 10)),
    (wire.READ, SIZE + 1, 0, 0, EINVAL, past(SIZE + 1, 0)),
    (wire.READ, 2**64 - 1, 2, 0, EINVAL, past(2**64 - 1, 2)),
    (wire.READ, 0, MAX_PAYLOAD + 1, 0, EINVAL, TOO_LONG),
    (wire.READ, 0, 10, 2, EINVAL, flags("read", 2)),
    (wire.READ, 0, 10, 0x80, EINVAL, flags("read", 0x80)),
    (wire.FLUSH, 0, 0, 2, EINVAL, flags("flush", 2)),
    (wire.TRIM, SIZE - 4, 8, 0, EINVAL, past(SIZE - 4, 8)),
    (wire.TRIM, 0, 8, 2, EINVAL, flags("trim", 2)),
    (wire.CACHE, 0, MAX_PAYLOAD + 1, 0, EINVAL, TOO_LONG),
    (wire.ZERO, SIZE - 4, 8, 0, ENOSPC, past(SIZE - 4, 8)),
    (wire.ZERO, 0, 2**32 - 1, 0, ENOSPC, past(0, 2**32 - 1)),
    (wire.ZERO, 0, 512, 4, EINVAL, flags("write zeroes", 4)),
    (wire.STATUS, 0, 0, 0, EINVAL, "need non-zero length"),
    (wire.STATUS, SIZE - 5, 10, 0, EINVAL, past(SIZE - 5, 10)),
    (wire.STATUS, 0, 10, 2, EINVAL, flags("block status", 2)),
    (8, 0, 5, 0, EINVAL, "invalid request type (8) received"),
    (65535, 0, 0, 0, EINVAL, "invalid request type (65535) received"),
]


@pytest.mark.parametrize("style", list(Style))
@pytest.mark.parametrize(("command", "offset", "length", "flag", "error", "text"), REFUSED)
def test_refusals(style: Style, command: int, offset: int, length: int, flag: int, error: NbdError, text: str) -> None:
    if command == wire.STATUS and style is Style.SIMPLE:
        return
    stream = wire.request(command, offset, length, flag, extended=style is Style.EXTENDED)
    assert refusal(stream, style) == (error, text)


ALLOWED = [
    (wire.READ, SIZE, 0, 0), (wire.READ, 0, 0, 0), (wire.READ, 0, SIZE, wire.FUA), (wire.READ, 0, 10, wire.DF),
    (wire.FLUSH, 5, 7, wire.FUA), (wire.TRIM, 0, 0, wire.FUA), (wire.CACHE, 0, 5, wire.FUA),
    (wire.ZERO, 0, SIZE, wire.FUA | wire.NO_HOLE | wire.FAST_ZERO), (wire.STATUS, 1, 7, wire.REQ_ONE | wire.FUA),
]  # fmt: skip


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
@pytest.mark.parametrize(("command", "offset", "length", "flag"), ALLOWED)
def test_what_is_allowed(style: Style, command: int, offset: int, length: int, flag: int) -> None:
    assert refusal(wire.request(command, offset, length, flag, extended=style is Style.EXTENDED), style) is None


@pytest.mark.parametrize("command", [wire.WRITE, wire.TRIM, wire.ZERO])
@pytest.mark.parametrize("flag", [0, 0x80])
def test_a_read_only_export_is_not_changed(command: int, flag: int) -> None:
    payload = b"abcd" if command == wire.WRITE else b""
    stream = wire.request(command, SIZE - 2, 4, flag, payload=payload)
    assert refusal(stream, read_only=True) == (EPERM, "Export is read-only")


def test_unfragmented_reads_need_structured_replies() -> None:
    stream = wire.request(wire.READ, 0, 10, wire.DF)
    assert refusal(stream, Style.SIMPLE) == (EINVAL, flags("read", wire.DF))


def test_block_status_needs_selected_contexts() -> None:
    found = Requests(Style.STRUCTURED, SIZE, read_only=False).decode(memoryview(wire.request(wire.STATUS, 0, 8)))
    assert found.requests[0].refusal == (EINVAL, "CMD_BLOCK_STATUS not negotiated")


@pytest.mark.parametrize(
    ("offset", "flag", "refused"),
    [(SIZE - 2, 0, (ENOSPC, past(SIZE - 2, 4))), (0, 2, (EINVAL, flags("write", 2))), (0, wire.FUA, None)],
)
def test_the_payload_of_a_refused_write_is_passed_over(
    offset: int, flag: int, refused: tuple[NbdError, str] | None
) -> None:
    found = decode(wire.request(wire.WRITE, offset, 4, flag, payload=b"abcd") + wire.request(wire.FLUSH, cookie=2))
    assert found[0].refusal == refused
    assert (found[0].payload is None) == (refused is not None)
    assert (found[1].cookie, found[1].refusal) == (2, None)


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_a_write_beyond_all_limits_is_answered_and_ends_the_session(style: Style) -> None:
    flag = wire.PAYLOAD if style is Style.EXTENDED else 0
    decoder = requests(style)
    stream = wire.request(wire.WRITE, 0, MAX_PAYLOAD + 1, flag, extended=style is Style.EXTENDED)
    found = decoder.decode(memoryview(stream))
    assert found.requests[0].refusal == (EINVAL, TOO_LONG)
    assert decoder.finished
    assert decoder.violation == TOO_LONG


@pytest.mark.parametrize("stream", [bytes(28), wire.request(wire.READ, 0, 1, extended=True)])
def test_a_wrong_magic_ends_the_session(stream: bytes) -> None:
    decoder = requests()
    assert decoder.decode(memoryview(stream)).requests == []
    assert decoder.finished
    assert decoder.violation.startswith("invalid magic (got 0x")


def test_nothing_is_read_behind_a_disconnect() -> None:
    decoder = requests()
    found = decoder.decode(memoryview(wire.request(wire.READ, 0, 1) + wire.request(wire.DISC) + b"junk" * 9))
    assert [one.command for one in found.requests] == [wire.READ]
    assert decoder.finished
    assert decoder.violation == ""


# extended headers


def extended(command: int, length: int, flag: int, payload: bytes) -> bytes:
    return struct.pack(">IHHQQQ", 0x21E41C71, flag, command, 1, 0, length) + payload


def test_an_extended_write_may_forget_to_say_that_it_has_a_payload() -> None:
    """Regression: qemu-img convert failed with an I/O error, for QEMU's client leaves the flag out."""
    stream = extended(wire.WRITE, 4, 0, b"abcd") + wire.request(wire.FLUSH, cookie=5, extended=True)
    found = decode(stream, Style.EXTENDED)
    assert [(one.cookie, one.refusal) for one in found] == [(1, None), (5, None)]
    assert found[0].payload == b"abcd"


@pytest.mark.parametrize("command", [wire.READ, wire.FLUSH, wire.TRIM, 77])
def test_a_payload_nobody_expects_is_passed_over(command: int) -> None:
    stream = extended(command, 7, wire.PAYLOAD, b"garbage") + wire.request(wire.FLUSH, cookie=5, extended=True)
    found = decode(stream, Style.EXTENDED)
    assert [one.cookie for one in found] == [1, 5]
    assert found[0].refusal is not None
    assert found[1].refusal is None


def test_block_status_may_be_limited_to_contexts() -> None:
    stream = extended(wire.STATUS, 12, wire.PAYLOAD, struct.pack(">QI", 4096, 1))
    [request] = decode(stream, Style.EXTENDED)
    assert (request.refusal, request.length, request.contexts) == (None, 4096, (1,))


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack(">QI", 4096, 5),
        struct.pack(">QII", 4096, 0, 0),
        struct.pack(">Q", 4096),
        b"123456789",
        bytes(4096),
        b"1",
    ],
)
def test_a_wrong_context_list_is_passed_over(payload: bytes) -> None:
    stream = extended(wire.STATUS, len(payload), wire.PAYLOAD, payload)
    found = decode(stream + wire.request(wire.FLUSH, cookie=5, extended=True), Style.EXTENDED)
    assert found[0].refusal == (EINVAL, "CMD_BLOCK_STATUS payload not valid")
    assert found[1].cookie == 5


def test_64_bit_lengths() -> None:
    decoder = requests(Style.EXTENDED, size=1 << 40)
    stream = b"".join(
        wire.request(command, 0, 1 << 40, extended=True) for command in (wire.ZERO, wire.TRIM, wire.STATUS)
    )
    assert [(one.length, one.refusal) for one in decoder.decode(memoryview(stream)).requests] == [(1 << 40, None)] * 3


# replies


def a_request(command: int = wire.READ) -> Request:
    return Request(command, 0, 0x0102030405060708, 0x1000, 512)


COOKIE = "0102030405060708"
REPLIES = [
    (Style.SIMPLE, lambda r: r.success(a_request()), f"67446698 00000000 {COOKIE}"),
    (Style.STRUCTURED, lambda r: r.success(a_request(wire.WRITE)), f"67446698 00000000 {COOKIE}"),
    (Style.STRUCTURED, lambda r: r.success(a_request()), f"668e33ef 0001 0000 {COOKIE} 00000000"),
    (
        Style.EXTENDED,
        lambda r: r.success(a_request(wire.WRITE)),
        f"6e8a278c 0001 0000 {COOKIE} 0000000000001000 0000000000000000",
    ),
    (Style.SIMPLE, lambda r: r.error(a_request(), NbdError.EIO, "x"), f"67446698 00000005 {COOKIE}"),
    (
        Style.STRUCTURED,
        lambda r: r.error(a_request(), NbdError.EIO, "xy"),
        f"668e33ef 0001 8001 {COOKIE} 00000008 00000005 0002 7879",
    ),
    (
        Style.EXTENDED,
        lambda r: r.error(a_request(), NbdError.ENOSPC),
        f"6e8a278c 0001 8001 {COOKIE} 0000000000001000 0000000000000006 0000001c 0000",
    ),
    (Style.SIMPLE, lambda r: r.data(a_request(), 0x1000, 512), f"67446698 00000000 {COOKIE}"),
    (
        Style.STRUCTURED,
        lambda r: r.data(a_request(), 0x1100, 16, last=False),
        f"668e33ef 0000 0001 {COOKIE} 00000018 0000000000001100",
    ),
    (
        Style.EXTENDED,
        lambda r: r.data(a_request(), 0x1100, 16),
        f"6e8a278c 0001 0001 {COOKIE} 0000000000001000 0000000000000018 0000000000001100",
    ),
    (
        Style.STRUCTURED,
        lambda r: r.hole(a_request(), 0x1100, 16, last=True),
        f"668e33ef 0001 0002 {COOKIE} 0000000c 0000000000001100 00000010",
    ),
    (
        Style.STRUCTURED,
        lambda r: r.status(a_request(), 1, [(16, 3), (32, 0)], last=False),
        f"668e33ef 0000 0005 {COOKIE} 00000014 00000001 00000010 00000003 00000020 00000000",
    ),
    (
        Style.EXTENDED,
        lambda r: r.status(a_request(), 1, [(1 << 40, 3)], last=True),
        f"6e8a278c 0001 0006 {COOKIE} 0000000000001000 0000000000000018 00000001 00000001"
        "0000010000000000 0000000000000003",
    ),
]


@pytest.mark.parametrize(("style", "make", "expected"), REPLIES)
def test_replies_on_the_wire(style: Style, make: object, expected: str) -> None:
    assert callable(make)
    assert make(Replies(style)) == bytes.fromhex(expected)


def test_error_texts_are_cut() -> None:
    reply = Replies(Style.STRUCTURED).error(a_request(), NbdError.EIO, "x" * 5000)
    assert len(reply) == 20 + 6 + 4096


@pytest.mark.parametrize(
    ("error", "wire_error"),
    [
        (errno.EPERM, 1), (errno.EROFS, 1), (errno.EIO, 5), (errno.ENOMEM, 12), (errno.EINVAL, 22), (errno.ENOSPC, 28),
        (errno.EDQUOT, 28), (errno.EFBIG, 28), (errno.EOVERFLOW, 75), (errno.ENOTSUP, 95), (errno.ESHUTDOWN, 108),
        (errno.ENOMEDIUM, 5), (errno.ETIMEDOUT, 5),
    ],
)  # fmt: skip
def test_errnos_become_nbd_errors(error: int, wire_error: int) -> None:
    assert to_nbd_error(error) == wire_error


def test_extents_are_merged_and_cut() -> None:
    assert merged_extents([(1, 0), (2, 0), (3, 1), (4, 0)], 9, wide=False) == [(3, 0), (3, 1), (4, 0)]
    assert merged_extents([(1, 0), (2, 0), (3, 1), (4, 0)], 1, wide=False) == [(3, 0)]
    assert merged_extents([(1 << 33, 0), (1, 1)], 9, wide=False) == [(0xFFFF0000, 0)]
    assert merged_extents([(1 << 33, 0), (1 << 33, 0), (1, 1)], 9, wide=True) == [(1 << 34, 0), (1, 1)]


# any split


def streams(style: Style) -> st.SearchStrategy[bytes]:
    is_extended = style is Style.EXTENDED
    numbers = st.sampled_from([0, 1, 512, SIZE - 1, SIZE, 2**32 - 1])
    plain = st.builds(
        lambda command, offset, length, flag: wire.request(command, offset, length, flag, extended=is_extended),
        st.sampled_from([0, 3, 4, 5, 6, 7, 8]),
        numbers,
        numbers,
        st.sampled_from([0, 1, 2, 4, 8, 16]),
    )
    writes = st.builds(
        lambda offset, flag, payload: wire.request(
            wire.WRITE, offset, len(payload), flag, payload=payload, extended=is_extended
        ),
        numbers,
        st.sampled_from([0, 1, 2]),
        st.binary(min_size=1, max_size=60),
    )
    kinds = [plain, writes, st.just(wire.request(wire.DISC, extended=is_extended)), st.binary(max_size=40)]
    if is_extended:
        kinds.append(
            st.builds(
                lambda command, payload: extended(command, len(payload), wire.PAYLOAD, payload),
                st.sampled_from([0, 3, 7, 99]),
                st.binary(max_size=30),
            )
        )
    return st.lists(st.one_of(kinds), max_size=8).map(b"".join)


def receive(decoder: Requests, pieces: list[bytes]) -> tuple[list[tuple[object, ...]], bool, str]:
    """Do what a connection does: keep the rest of a buffer, receive a payload in place."""
    found: list[tuple[object, ...]] = []

    def note(request: Request) -> None:
        payload = None if request.payload is None else bytes(request.payload)
        found.append((request.command, request.offset, request.length, request.refusal, request.contexts, payload))

    kept, partial, payload = b"", None, bytearray()
    for piece in pieces:
        data = kept + piece
        kept = b""
        while data and not decoder.finished:
            if partial is not None:
                count = partial.length - len(payload)
                payload += data[:count]
                data = data[count:]
                if len(payload) < partial.length:
                    break
                partial.payload = memoryview(bytes(payload))
                note(partial)
                partial = None
                continue
            result = decoder.decode(memoryview(data))
            for request in result.requests:
                note(request)
            rest = data[result.used :]
            if result.partial is not None:
                partial, payload, data = result.partial, bytearray(rest), b""
            else:
                kept, data = rest, b""
    return found, decoder.finished, decoder.violation


@given(st.data(), st.sampled_from(list(Style)), st.booleans(), st.lists(st.integers(0, 500)))
def test_any_split_of_the_stream_gives_the_same_requests(
    data: st.DataObject, style: Style, read_only: bool, cuts: list[int]
) -> None:
    stream = data.draw(streams(style))
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[low:high] for low, high in itertools.pairwise(edges)]
    whole = receive(requests(style, read_only=read_only), [stream])
    assert receive(requests(style, read_only=read_only), pieces) == whole
    assert receive(requests(style, read_only=read_only), [stream[at : at + 1] for at in range(len(stream))]) == whole
