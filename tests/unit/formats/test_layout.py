"""Typed layouts: declared once, packed and taken apart by the declaration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from qmpd.formats.layout import Layout, bytes6, u8, u16, u32, u64


@dataclass(frozen=True, slots=True)
class Sample(Layout):
    SIZE: ClassVar[int] = 21
    magic: bytes6
    version: u16
    flags: u8
    length: u32
    offset: u64


@dataclass(frozen=True, slots=True)
class Wrong(Layout):
    SIZE: ClassVar[int] = 5
    length: u32


@dataclass(frozen=True, slots=True)
class Little(Layout):
    SIZE: ClassVar[int] = 4
    ORDER: ClassVar[str] = "<"
    length: u32


def test_round_trip() -> None:
    one = Sample(b"ABCDEF", 1, 2, 3, 1 << 60)
    raw = one.pack()
    assert raw == b"ABCDEF\0\1\2\0\0\0\3\x10\0\0\0\0\0\0\0"
    assert Sample.unpack_from(b"..." + raw, 3) == one
    room = bytearray(30)
    one.pack_into(room, 9)
    assert room[9:] == raw


def test_byte_order() -> None:
    assert Little(1).pack() == b"\1\0\0\0"


def test_offsets() -> None:
    assert [Sample.offset_of(name) for name in ("magic", "version", "flags", "length", "offset")] == [0, 6, 8, 9, 13]
    with pytest.raises(KeyError):
        Sample.offset_of("nothing")


@pytest.mark.parametrize(("length", "at"), [(20, 0), (21, 1), (0, 0), (21, -1), (21, 22)])
def test_a_buffer_that_ends_early_is_refused(length: int, at: int) -> None:
    with pytest.raises(ValueError, match="Sample takes 21 bytes"):
        Sample.unpack_from(bytes(length), at)


def test_a_wrong_size_is_found_at_first_use() -> None:
    with pytest.raises(TypeError, match="the fields take 4 bytes, SIZE says 5"):
        Wrong(1).pack()
