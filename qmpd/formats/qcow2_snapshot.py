"""The snapshot table and the bitmap directory of qcow2: bytes in, values out.

Source: docs/interop/qcow2.txt of QEMU, sections "Snapshots" and "Bitmaps".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from qmpd.errors import CommandError
from qmpd.formats.qcow2 import SNAPSHOT_HEADER_SIZE
from qmpd.units import align_up

MAX_EXTRA = 1024
"""Bytes of extra data in a snapshot table entry at most (the reference's limit)."""

MAX_TABLE = 64 << 20
"""Bytes of the whole snapshot table at most (the reference's limit)."""

BITMAP_IN_USE = 1
BITMAP_AUTO = 2
BITMAP_KNOWN_FLAGS = BITMAP_IN_USE | BITMAP_AUTO
BITMAP_DIRTY_TRACKING = 1
"""The only type of bitmap there is."""

BITMAP_ALL_ONES = 1
BITMAP_ENTRY_OFFSET = 0x00FF_FFFF_FFFF_FE00
BITMAP_ENTRY_RESERVED = 0xFF00_0000_0000_01FE
"""Bitmap table entries: no data, every bit set; the place of the data; bits that must be zero."""

MAX_BITMAP_NAME = 1023
MAX_BITMAP_BYTES = 512 << 20
"""Bytes of one bitmap's data at most (the reference's limit)."""

_SNAPSHOT = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
_INT_MAX = (1 << 31) - 1
NO_ICOUNT = (1 << 64) - 1
"""The count of instructions in a snapshot that has none."""

_BITMAP = struct.Struct(">QIIBBHI")
assert _SNAPSHOT.size == SNAPSHOT_HEADER_SIZE


class Snapshot(NamedTuple):
    """An internal snapshot; sizes in bytes, l1_size in entries, icount None if not recorded.

    encoded   identifier and name as they are stored     unknown_extra  extra data behind what we know
    """

    l1_table_offset: int
    l1_size: int
    identifier: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None
    encoded: tuple[bytes, bytes]
    unknown_extra: bytes = b""

    def to_qapi(self) -> dict[str, object]:
        """Return the SnapshotInfo of this snapshot."""
        info: dict[str, object] = {
            "id": self.identifier,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": self.vm_clock_nsec // 1_000_000_000,
            "vm-clock-nsec": self.vm_clock_nsec % 1_000_000_000,
        }
        if self.icount is not None:
            info["icount"] = self.icount
        return info


def snapshot_entry_size(head: bytes | bytearray | memoryview, index: int) -> int:
    """Return the bytes of the entry whose fixed part is `head`, padding included.

    Raises CommandError for more extra data than the reference reads.
    """
    fields = _SNAPSHOT.unpack_from(head)
    if fields[8] > MAX_EXTRA:
        raise CommandError(
            f"Too much extra metadata in snapshot table entry {index}",
            hint="You can force-remove this extra metadata with qemu-img check -r all",
        )
    return align_up(SNAPSHOT_HEADER_SIZE + int(fields[8]) + int(fields[2]) + int(fields[3]), 8)


def parse_snapshot(data: bytes | bytearray | memoryview) -> Snapshot:
    """Return the snapshot whose whole entry is `data` (missing bytes count as zeroes)."""
    offset, l1_size, id_size, name_size, sec, nsec, clock, vm_size, extra_size = _SNAPSHOT.unpack_from(data)
    at = SNAPSHOT_HEADER_SIZE
    extra = bytes(data[at : at + extra_size])
    at += extra_size
    encoded = bytes(data[at : at + id_size]), bytes(data[at + id_size : at + id_size + name_size])
    identifier, name = (one.decode("utf-8", "replace") for one in encoded)
    if extra_size >= 8:
        vm_size = struct.unpack_from(">Q", extra)[0]
    disk_size = struct.unpack_from(">Q", extra, 8)[0] if extra_size >= 16 else None
    icount = struct.unpack_from(">Q", extra, 16)[0] if extra_size >= 24 else None
    if icount == NO_ICOUNT:
        icount = None
    return Snapshot(
        offset, l1_size, identifier, name, sec, nsec, clock, vm_size, disk_size, icount, encoded, extra[_EXTRA.size :]
    )


def pack_snapshots(snapshots: list[Snapshot], size: int) -> bytes:
    """Return a snapshot table; `size` bytes of disk are assumed where an entry does not say."""
    data = bytearray()
    for one in snapshots:
        icount = NO_ICOUNT if one.icount is None else one.icount
        extra = _EXTRA.pack(one.vm_state_size, size if one.disk_size is None else one.disk_size, icount)
        extra += one.unknown_extra
        identifier, name = one.encoded
        data += _SNAPSHOT.pack(
            one.l1_table_offset,
            one.l1_size,
            len(identifier),
            len(name),
            one.date_sec,
            one.date_nsec,
            one.vm_clock_nsec,
            one.vm_state_size & 0xFFFF_FFFF,
            len(extra),
        )
        data += extra + identifier + name
        data += bytes(-len(data) % 8)
    return bytes(data)


class StoredBitmap(NamedTuple):
    """An entry of the bitmap directory.

    at     byte offset of the entry in the directory     table_size  entries of its table
    encoded  the name's bytes, as they are stored
    """

    at: int
    table_offset: int
    table_size: int
    flags: int
    granularity_bits: int
    name: str
    encoded: bytes
    kind: int = BITMAP_DIRTY_TRACKING

    def check(self, size: int, cluster_size: int) -> None:
        """Check the entry's fields for an image with `size` bytes of disk. Raises CommandError."""
        stored = self.table_size * cluster_size
        sound = (
            self.table_size > 0
            and self.table_offset > 0
            and self.table_offset % cluster_size == 0
            and 9 <= self.granularity_bits <= 31
            and not self.flags & ~BITMAP_KNOWN_FLAGS
            and self.kind == BITMAP_DIRTY_TRACKING
            and len(self.encoded) <= MAX_BITMAP_NAME
            and stored <= MAX_BITMAP_BYTES
            and (bool(self.flags & BITMAP_IN_USE) or size <= stored * 8 << self.granularity_bits)
        )
        if not sound:
            raise CommandError(f"Bitmap '{self.name}' doesn't satisfy the constraints")

    def to_qapi(self) -> dict[str, object]:
        """Return the Qcow2BitmapInfo of this bitmap."""
        flags = [text for bit, text in ((BITMAP_IN_USE, "in-use"), (BITMAP_AUTO, "auto")) if self.flags & bit]
        return {"name": self.name, "granularity": 1 << self.granularity_bits, "flags": flags}


FLAGS_OFFSET = 12
"""Where the flags lie in an entry of the bitmap directory."""


def parse_bitmap_directory(
    data: bytes | bytearray | memoryview, count: int, *, size: int, cluster_size: int
) -> list[StoredBitmap]:
    """Return the entries of a bitmap directory of an image with `size` bytes of disk.

    Raises CommandError if there are not `count`, or if one cannot be.
    """
    found: list[StoredBitmap] = []
    at = 0
    if not data:
        raise CommandError("Requested bitmap directory size is zero")
    while at < len(data):
        if at + _BITMAP.size > len(data):
            raise CommandError("Broken bitmap directory")
        table, table_size, flags, kind, granularity, name_size, extra_size = _BITMAP.unpack_from(data, at)
        length = align_up(_BITMAP.size + name_size + extra_size & 0xFFFF_FFFF, 8)
        if at + length > len(data) and length <= _INT_MAX:
            raise CommandError("Broken bitmap directory")
        if extra_size:
            raise CommandError("Bitmap extra data is not supported")
        if len(found) == count:
            raise CommandError("More bitmaps found than specified in header extension")
        encoded = bytes(data[at + _BITMAP.size : at + _BITMAP.size + name_size])
        name = encoded.decode("utf-8", "replace")
        found.append(StoredBitmap(at, table, table_size, flags, granularity, name, encoded, kind))
        found[-1].check(size, cluster_size)
        at += length
    if len(found) != count:
        raise CommandError("Less bitmaps found than specified in header extension")
    return found


def pack_bitmap_directory(entries: list[StoredBitmap]) -> tuple[bytes, list[StoredBitmap]]:
    """Return a bitmap directory and its entries with their places in it."""
    data = b""
    placed = []
    for one in entries:
        placed.append(one._replace(at=len(data)))
        fields = (one.table_offset, one.table_size, one.flags, one.kind, one.granularity_bits, len(one.encoded), 0)
        data += _BITMAP.pack(*fields) + one.encoded
        data = data.ljust(align_up(len(data), 8), b"\0")
    return data, placed


def bitmap_entry_valid(entry: int, cluster_size: int) -> bool:
    """Say whether an entry of a bitmap table keeps to the format."""
    if entry & BITMAP_ENTRY_RESERVED:
        return False
    offset = entry & BITMAP_ENTRY_OFFSET
    return offset % cluster_size == 0 and not (offset and entry & BITMAP_ALL_ONES)
