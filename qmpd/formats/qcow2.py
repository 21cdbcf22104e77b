"""qcow2 tables: L1, L2 and refcount entries; bytes in, values out, no file and no asyncio.

Source: docs/interop/qcow2.txt of QEMU, sections "Cluster mapping" and "Reference counts"; every
integer on disk is big-endian. In memory tables are arrays of native integers: one swap when a
slice is read, none per entry. The header is in `qcow2_header`.
"""

from __future__ import annotations

import enum
import sys
from array import array

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
"""Cluster sizes are 512 bytes to 2 MiB (the reference's limits; larger ones make COW too dear)."""

MAX_REFCOUNT_ORDER = 6
"""Refcounts are 1 << order bits wide, 64 at most."""

ENTRY_SIZE = 8
"""Bytes in an entry of the L1, L2 and refcount tables; extended L2 entries have twice that."""

MAX_L1_BYTES = 32 << 20
"""Bytes of an L1 table at most: 128 GiB of guest data with 512-byte clusters, 2 PiB with 64 KiB."""

MAX_REFCOUNT_TABLE_BYTES = 8 << 20
"""Bytes of a refcount table at most: 2 PiB of file with 64 KiB clusters and 16-bit refcounts."""

MAX_SNAPSHOTS = 65536
"""Internal snapshots at most; the reference stops there as well."""

SNAPSHOT_HEADER_SIZE = 40
"""Bytes of the fixed part of a snapshot table entry."""

MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = MAX_BITMAPS * 1024
"""Persistent bitmaps and the bytes of their directory at most: 1 KiB for each."""

COPIED = 1 << 63
"""L1 and L2: the refcount is exactly 1, the cluster may be written in place."""

COMPRESSED = 1 << 62
"""L2: the entry is a compressed cluster descriptor."""

ZERO = 1
"""L2, version 3: the cluster reads as zeroes, whatever its offset says."""

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
"""L1 and L2: the host offset."""

REFCOUNT_TABLE_MASK = 0xFFFF_FFFF_FFFF_FE00
"""Refcount table: the offset of a refcount block."""

L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
"""Bits that must be zero; the check reports them."""

_LITTLE = sys.byteorder == "little"


SUBCLUSTERS = 32
ALL_ALLOCATED = (1 << SUBCLUSTERS) - 1
ALL_ZERO = ALL_ALLOCATED << SUBCLUSTERS
"""Extended L2 entries: an entry is followed by a bitmap, allocated subclusters below, zero ones above."""


def hex0(value: int) -> str:
    """Return a number as the reference's texts print it: hexadecimal, but a zero without 0x."""
    return f"{value:#x}" if value else "0"


class ClusterType(enum.IntEnum):
    """What an L2 entry stands for."""

    UNALLOCATED = 0
    ZERO_PLAIN = 1
    ZERO_ALLOC = 2
    NORMAL = 3
    COMPRESSED = 4


def cluster_type(entry: int) -> ClusterType:
    """Classify an L2 entry; the caller refuses zero flags in version 2."""
    if entry & COMPRESSED:
        return ClusterType.COMPRESSED
    if entry & ZERO:
        return ClusterType.ZERO_ALLOC if entry & OFFSET_MASK else ClusterType.ZERO_PLAIN
    return ClusterType.NORMAL if entry & OFFSET_MASK else ClusterType.UNALLOCATED


def compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return the host offset and the length, in bytes, that a compressed descriptor names.

    The length is that of the sectors it touches, from the offset on: the stream ends somewhere
    in the last one.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = ((entry >> shift) & ((1 << (cluster_bits - 8)) - 1)) + 1
    return offset, sectors * 512 - (offset & 511)


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """Return the descriptor of `length` compressed bytes at host `offset`; see compressed_extent."""
    shift = 62 - (cluster_bits - 8)
    assert offset < 1 << shift
    sectors = (offset + length - 1) // 512 - offset // 512
    assert sectors < 1 << (cluster_bits - 8)
    return COMPRESSED | (sectors << shift) | offset


def unpack_entries(data: bytes | bytearray | memoryview) -> array[int]:
    """Return the 64-bit big-endian integers of `data` (a multiple of 8 bytes)."""
    table = array("Q")
    table.frombytes(data)
    if _LITTLE:
        table.byteswap()
    return table


def pack_entries(table: array[int]) -> bytes:
    """Return the bytes on disk of a table; the inverse of `unpack_entries`."""
    if not _LITTLE:
        return table.tobytes()
    swapped = array(table.typecode, table)
    swapped.byteswap()
    return swapped.tobytes()


def unpack_extended(data: bytes | bytearray | memoryview) -> array[int]:
    """Return extended L2 entries: all cluster descriptors, then all bitmaps."""
    table = unpack_entries(data)
    return table[0::2] + table[1::2]


def pack_extended(table: array[int]) -> bytes:
    """Return the bytes on disk of extended L2 entries; the inverse of `unpack_extended`."""
    half = len(table) // 2
    both = zero_entries(len(table))
    both[0::2], both[1::2] = table[:half], table[half:]
    return pack_entries(both)


def zero_entries(count: int) -> array[int]:
    """Return a table of `count` zero entries."""
    return array("Q", bytes(count * ENTRY_SIZE))


class RefcountCodec:
    """Refcounts of one width as arrays of native integers.

    order   log2 of the width in bits, 0..6; narrower ones than a byte lie in each byte from the
            least significant bit up, and take a byte each in memory
    """

    __slots__ = ("_narrow", "maximum", "order", "typecode")

    _TYPECODES = ("B", "B", "B", "B", "H", "I", "Q")

    def __init__(self, order: int) -> None:
        assert 0 <= order <= MAX_REFCOUNT_ORDER
        self.order = order
        self.typecode = self._TYPECODES[order]
        self.maximum = (1 << (1 << order)) - 1
        self._narrow: list[bytes] = []
        if order < 3:
            width = 1 << order
            self._narrow = [bytes(byte >> bit & self.maximum for bit in range(0, 8, width)) for byte in range(256)]

    def count(self, length: int) -> int:
        """Return how many refcounts `length` bytes hold."""
        return length * 8 >> self.order

    def unpack(self, data: bytes | bytearray | memoryview) -> array[int]:
        """Return the refcounts stored in `data`."""
        if self.order < 3:
            data = b"".join(map(self._narrow.__getitem__, data))
        table = array(self.typecode)
        table.frombytes(data)
        if _LITTLE and table.itemsize > 1:
            table.byteswap()
        return table

    def pack(self, table: array[int]) -> bytes:
        """Return the bytes on disk of whole bytes' worth of refcounts."""
        if self.order >= 3:
            return pack_entries(table)
        width = 1 << self.order
        per_byte = 8 // width
        packed = bytearray(table[0::per_byte].tobytes())
        for place in range(1, per_byte):
            for index, value in enumerate(table[place::per_byte]):
                if value:
                    packed[index] |= value << place * width
        return bytes(packed)

    def zeroes(self, length: int) -> array[int]:
        """Return the refcounts of `length` zero bytes."""
        table = array(self.typecode)
        table.frombytes(bytes(self.count(length) * table.itemsize))
        return table
