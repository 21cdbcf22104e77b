"""LUKS2 binary headers: the two copies, their checksums, and which of them is believed. Sans-io.

Source: LUKS2 On-Disk Format Specification 1.1.x, sections 2.1 and 2.5; the order of the checks is
cryptsetup's (what costs nothing, checksum, JSON, cross references, areas). What the JSON says is read
by `luks2_json`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from qmpd.errors import ImageError
from qmpd.formats.layout import Layout, bytes6, bytes32, bytes40, bytes48, bytes64, bytes184, u16, u64
from qmpd.formats.luks2_json import Metadata, parse_json
from qmpd.units import KiB

MAGIC = (b"LUKS\xba\xbe", b"SKUL\xba\xbe")
"""Of the first copy and of the second."""

VERSION = 2
BINARY_SIZE = 4096
"""Bytes before the JSON area: the fields below, then zeroes."""

COPY_SIZES = tuple(16 * KiB << shift for shift in range(9))
"""Sizes of one copy, JSON included (16 KiB to 4 MiB): the second copy starts at one of them."""

CHECKSUMS = ("sha256", "sha1", "sha512", "sha384", "sha224")
"""Checksum algorithms that are accepted; cryptsetup writes sha256."""


@dataclass(frozen=True, slots=True)
class BinaryHeader(Layout):
    """The fields at the start of a copy."""

    SIZE: ClassVar[int] = 512
    magic: bytes6
    version: u16
    hdr_size: u64  # bytes of the copy, JSON area included
    seqid: u64  # grows with every change
    label: bytes48
    csum_alg: bytes32
    salt: bytes64  # differs between the copies, so that their checksums do
    uuid: bytes40
    subsystem: bytes48
    hdr_offset: u64  # bytes from the start of the volume
    padding: bytes184
    csum: bytes64  # of the whole copy, with this field zeroed


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy that passed every check."""

    binary: BinaryHeader
    metadata: Metadata
    data: bytes  # the copy as it is stored

    @property
    def uuid(self) -> str:
        """The volume's UUID as text."""
        return _text(self.binary.uuid)

    @property
    def label(self) -> str:
        """The volume's label, often empty."""
        return _text(self.binary.label)

    @property
    def subsystem(self) -> str:
        """The label of the subsystem that owns the volume, often empty."""
        return _text(self.binary.subsystem)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def parse_binary(block: bytes | bytearray | memoryview, offset: int, image: str) -> BinaryHeader:
    """Return the binary header in `block` (at least 512 bytes), found at byte `offset`.

    Checked is what must hold before more is read: magic, version, place, size. Raises ImageError.
    """
    header = BinaryHeader.unpack_from(block)

    def refuse(field: str, found: str, expected: str) -> ImageError:
        at = offset + BinaryHeader.offset_of(field)
        return ImageError(image, at, f"LUKS2 header {field}", found, expected)

    expected = MAGIC[offset > 0]
    if header.magic != expected:
        raise refuse("magic", header.magic.hex(), expected.hex())
    if header.version != VERSION:
        raise refuse("version", str(header.version), str(VERSION))
    if header.hdr_offset != offset:
        raise refuse("hdr_offset", str(header.hdr_offset), str(offset))
    if header.hdr_size not in COPY_SIZES:
        raise refuse("hdr_size", str(header.hdr_size), "a power of two from 16 KiB to 4 MiB")
    if offset and offset != header.hdr_size:
        raise refuse("hdr_size", str(header.hdr_size), f"{offset}, where this copy starts")
    return header


def parse_copy(data: bytes | bytearray | memoryview, offset: int, image: str) -> Copy:
    """Return the copy in `data`, all `hdr_size` bytes of it, found at byte `offset`.

    Raises ImageError naming the first thing that is wrong.
    """
    header = parse_binary(data, offset, image)
    if len(data) < header.hdr_size:
        raise ImageError(image, offset, "LUKS2 header copy", f"{len(data)} bytes long", f"{header.hdr_size} bytes")
    data = bytes(data[: header.hdr_size])
    algorithm = _text(header.csum_alg)
    at = offset + BinaryHeader.offset_of("csum_alg")
    if algorithm not in CHECKSUMS:
        raise ImageError(image, at, "LUKS2 header csum_alg", repr(algorithm), " or ".join(CHECKSUMS))
    if not hmac.compare_digest(checksum(data, algorithm), header.csum[: hashlib.new(algorithm).digest_size]):
        at = offset + BinaryHeader.offset_of("csum")
        raise ImageError(image, at, "LUKS2 header checksum", "wrong", f"the {algorithm} of the copy")
    metadata = parse_json(data[BINARY_SIZE:], image, offset + BINARY_SIZE)
    return Copy(header, metadata, data)


def checksum(data: bytes, algorithm: str) -> bytes:
    """Return the digest of a copy with its checksum field taken as zeroes."""
    at = BinaryHeader.offset_of("csum")
    work = hashlib.new(algorithm, data[:at])
    work.update(bytes(64))
    work.update(data[at + 64 :])
    return work.digest()


@dataclass(frozen=True, slots=True)
class Found:
    """The copy to believe, and what is wrong with the other.

    problem   None if both are right and equally new
    """

    copy: Copy
    problem: str | None


def choose(primary: Copy | ImageError, secondary: Copy | ImageError) -> Found:
    """Return the copy to believe: the valid one, of two valid ones the newer. Raises ImageError if none is."""
    if isinstance(primary, Copy) and isinstance(secondary, Copy):
        if primary.binary.seqid == secondary.binary.seqid:
            return Found(primary, None)
        newer, older = ("primary", "secondary")
        copy = primary
        if secondary.binary.seqid > primary.binary.seqid:
            newer, older, copy = older, newer, secondary
        return Found(copy, f"the {older} header is older than the {newer} one")
    if isinstance(primary, Copy):
        return Found(primary, f"the secondary header is damaged: {secondary}")
    if isinstance(secondary, Copy):
        return Found(secondary, f"the primary header is damaged: {primary}")
    raise primary


def pack_copy(header: BinaryHeader, json_text: bytes, offset: int) -> bytes:
    """Return a copy for byte `offset` with `json_text` in its JSON area, magic, place and checksum set.

    Raises ValueError if the text does not leave room for the NUL that ends it.
    """
    room = header.hdr_size - BINARY_SIZE
    if len(json_text) >= room:
        raise ValueError(f"{len(json_text)} bytes of JSON do not fit into {room}")
    header = replace(header, magic=MAGIC[offset > 0], hdr_offset=offset, csum=bytes(64))
    blank = header.pack() + bytes(BINARY_SIZE - BinaryHeader.SIZE) + json_text + bytes(room - len(json_text))
    digest = checksum(blank, _text(header.csum_alg))
    return replace(header, csum=digest).pack() + blank[BinaryHeader.SIZE :]


def secondary_offsets(primary: Copy | ImageError, binary: BinaryHeader | None) -> Sequence[int]:
    """Return where to look for the second copy: behind the first, or, if that gives no size, everywhere."""
    if isinstance(primary, Copy):
        return (primary.binary.hdr_size,)
    return (binary.hdr_size,) if binary is not None else COPY_SIZES
