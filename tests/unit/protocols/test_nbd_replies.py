"""Replies of NBD servers: what fits the request is taken, whatever way it is cut; everything else is refused."""

from __future__ import annotations

import errno
import itertools
import random
import struct

import pytest

from qmpd.protocols import nbd_replies
from qmpd.protocols.nbd import Command, Style, TransmissionFlag
from qmpd.protocols.nbd_client import Negotiated, ProtocolError
from qmpd.protocols.nbd_replies import Pending, Transmission, from_nbd_error
from tests.support.nbd_liar import chunk, data_chunk, simple

CONTEXT = (1, b"base:allocation")


def extended(
    cookie: int, kind: int, data: bytes, *, offset: int = 0, flags: int = 1, length: int | None = None
) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, size) + data


class Session:
    """A transmission phase with one request under way."""

    def __init__(self, command: Command, length: int = 0, offset: int = 0, style: Style = Style.STRUCTURED) -> None:
        self.transmission = Transmission(Negotiated(1 << 20, TransmissionFlag(0x4D), style, context=CONTEXT))
        self.data = bytearray(b"\xee" * length)
        view = memoryview(self.data) if command in (Command.READ, Command.WRITE) else None
        self.pending = Pending(command, offset, length, view, lambda _: None)
        self.header = self.transmission.request(self.pending)
        self.done: list[Pending] = []

    def feed(self, stream: bytes, sizes: list[int] | None = None) -> Session:
        """Take a stream in pieces, as a socket would bring it."""
        held = b""
        for piece in cut(stream, sizes or [len(stream)]):
            direct = self.transmission.direct
            if direct is not None and not held:
                room = min(len(direct), len(piece))
                direct[:room] = piece[:room]
                finished = self.transmission.received(room)
                if finished is not None:
                    self.done.append(finished)
                piece = piece[room:]
            held += piece
            held = held[self.transmission.consume(memoryview(held), self.done) :]
        assert not held
        return self


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(stream[at : at + size])
        at += size
    return [piece for piece in [*pieces, stream[at:]] if piece]


def hole(cookie: int, offset: int, length: int, *, flags: int = 1) -> bytes:
    return chunk(cookie, 2, struct.pack(">QI", offset, length), flags=flags)


def test_requests_look_as_the_document_has_them() -> None:
    plain = Session(Command.WRITE, 512, 4096, Style.SIMPLE).header
    assert plain == struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 4096, 512)
    wide = Session(Command.WRITE, 512, 4096, Style.EXTENDED).header
    assert wide == struct.pack(">IHHQQQ", 0x21E41C71, 32, 1, 1, 4096, 512)


@pytest.mark.parametrize("seed", range(20))
def test_a_read_arrives_in_any_order_and_any_pieces(seed: int) -> None:
    chance = random.Random(seed)
    content = chance.randbytes(4096)
    edges = sorted({0, 4096, *(chance.randrange(4096) for _ in range(10))})
    parts = list(itertools.pairwise(edges))
    chance.shuffle(parts)
    stream, expected = b"", bytearray(content)
    for at, (low, high) in enumerate(parts):
        flags = int(at == len(parts) - 1)
        if chance.random() < 0.3:
            expected[low:high] = bytes(high - low)
            stream += hole(1, 100 + low, high - low, flags=flags)
        else:
            stream += data_chunk(1, 100 + low, content[low:high], flags=flags)
    sizes = [chance.randrange(1, 200) for _ in range(len(stream))]
    session = Session(Command.READ, 4096, 100).feed(stream, sizes)
    assert session.done == [session.pending]
    assert not session.pending.error
    assert session.data == expected


def test_status_and_errors_are_taken_apart() -> None:
    session = Session(Command.BLOCK_STATUS, 4096).feed(chunk(1, 5, struct.pack(">IIIII", 1, 512, 0, 9999, 3)))
    assert session.pending.extents == [(512, 0), (9999, 3)]
    wide = Session(Command.BLOCK_STATUS, 4096, style=Style.EXTENDED)
    wide.feed(extended(1, 6, struct.pack(">IIQQ", 1, 1, 1 << 40, 2)))
    assert wide.pending.extents == [(1 << 40, 2)]
    refused = Session(Command.WRITE, 512).feed(chunk(1, 0x8001, struct.pack(">IH", 28, 3) + b"why"))
    assert refused.pending.error == errno.ENOSPC
    late = Session(Command.READ, 512)
    late.feed(data_chunk(1, 0, b"x" * 5, flags=0) + chunk(1, 0x8002, struct.pack(">IHQ", 5, 0, 7)))
    assert late.pending.error == errno.EIO
    assert from_nbd_error(4711) == errno.EINVAL
    assert from_nbd_error(108) == errno.ESHUTDOWN
    unknown = Session(Command.READ, 512).feed(chunk(1, 0x8FFF, struct.pack(">IH", 12, 0) + b"more"))
    assert unknown.pending.error == errno.ENOMEM


READ_LIES = {
    "junk": b"\xff" * 32,
    "another cookie": data_chunk(2, 0, bytes(512)),
    "simple reply": simple(1, 0, bytes(512)),
    "too little": data_chunk(1, 0, bytes(500)),
    "nothing": chunk(1, 0),
    "nothing, and more to come": chunk(1, 0, flags=0),
    "none with data": chunk(1, 0, b"x"),
    "too much": data_chunk(1, 0, bytes(513)),
    "before": data_chunk(1, (1 << 64) - 1, bytes(512)),
    "behind": data_chunk(1, 1, bytes(512)),
    "twice": data_chunk(1, 0, bytes(512), flags=0) + data_chunk(1, 0, bytes(512)),
    "overlap": data_chunk(1, 0, bytes(300), flags=0) + data_chunk(1, 200, bytes(312)),
    "overlap below": data_chunk(1, 200, bytes(300), flags=0) + data_chunk(1, 0, bytes(212)),
    "hole in data": data_chunk(1, 0, bytes(400), flags=0) + hole(1, 100, 112),
    "empty data": chunk(1, 1, bytes(8)),
    "short data": chunk(1, 1, bytes(3)),
    "empty hole": hole(1, 0, 0),
    "huge hole": hole(1, 0, 0xFFFFFFFF),
    "long hole chunk": chunk(1, 2, bytes(13)),
    "huge chunk": chunk(1, 1, b"", length=0xFFFFFFFF),
    "status": chunk(1, 5, bytes(12)),
    "unknown chunk": chunk(1, 77, bytes(12)),
    "error without code": chunk(1, 0x8001, bytes(6)),
    "short error": chunk(1, 0x8001, bytes(5)),
    "long error": chunk(1, 0x8001, b"", length=1 << 20),
    "error text outside": chunk(1, 0x8001, struct.pack(">IH", 5, 100) + b"x"),
    "extended header": extended(1, 0, b""),
    "reply to nothing after the end": data_chunk(1, 0, bytes(512)) + data_chunk(1, 0, bytes(512)),
}  # fmt: skip


@pytest.mark.parametrize("lie", READ_LIES)
def test_a_read_is_not_lied_to(lie: str) -> None:
    with pytest.raises(ProtocolError):
        Session(Command.READ, 512).feed(READ_LIES[lie])


STATUS_LIES = {
    "simple": simple(1),
    "nothing": chunk(1, 0),
    "another context": chunk(1, 5, struct.pack(">III", 2, 512, 0)),
    "no extent": chunk(1, 5, struct.pack(">I", 1)),
    "half an extent": chunk(1, 5, struct.pack(">II", 1, 512)),
    "empty extent": chunk(1, 5, struct.pack(">III", 1, 0, 0)),
    "twice": chunk(1, 5, struct.pack(">III", 1, 512, 0), flags=0) + chunk(1, 5, struct.pack(">III", 1, 512, 0)),
    "wide": chunk(1, 6, struct.pack(">IIQQ", 1, 1, 512, 0)),
    "endless": chunk(1, 5, b"", length=(1 << 32) - 4),
    "data": data_chunk(1, 0, bytes(10)),
}


@pytest.mark.parametrize("lie", STATUS_LIES)
def test_a_status_request_is_not_lied_to(lie: str) -> None:
    with pytest.raises(ProtocolError):
        Session(Command.BLOCK_STATUS, 512).feed(STATUS_LIES[lie])


@pytest.mark.parametrize(
    "stream",
    [
        extended(1, 1, bytes(520), offset=1),
        simple(1),
        data_chunk(1, 0, bytes(512)),
        extended(1, 1, b"", length=(1 << 64) - 1),
        extended(1, 5, struct.pack(">III", 1, 512, 0)),
    ],
)
def test_extended_headers_are_checked(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        Session(Command.READ, 512, style=Style.EXTENDED).feed(stream)


def test_a_count_of_extents_must_be_true() -> None:
    with pytest.raises(ProtocolError, match="with a count of 2"):
        Session(Command.BLOCK_STATUS, 512, style=Style.EXTENDED).feed(
            extended(1, 6, struct.pack(">IIQQ", 1, 2, 512, 0))
        )


def test_a_read_in_too_many_pieces_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_replies, "MAX_PIECES", 8)
    stream = b"".join(data_chunk(1, at, b"x", flags=0) for at in range(0, 40, 2))
    with pytest.raises(ProtocolError, match="more than 8 pieces"):
        Session(Command.READ, 512).feed(stream)
