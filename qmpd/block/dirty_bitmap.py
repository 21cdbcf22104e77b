"""Dirty bitmaps: which parts of a node were written since somebody began to look.

A bitmap has one bit for each `granularity` bytes, kept in chunks that exist only where bits are
set, so memory follows what is dirty. Writers mark on the data loop while a command looks from the
loop of the monitor: each operation holds the bitmap's lock.
Model: BdrvDirtyBitmap and HBitmap (QEMU block/dirty-bitmap.c, util/hbitmap.c).
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qmpd.errors import CommandError
from qmpd.units import KiB, align_up

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode

MIN_GRANULARITY = 512
MAX_GRANULARITY = 1 << 31
"""Bytes for one bit: a power of two in this range (uint32)."""

MAX_NAME = 1023
"""Bytes of a bitmap's name at most."""

CHUNK_BYTES = 4096
CHUNK_BITS = CHUNK_BYTES * 8
"""Size of the unit in which a bitmap takes memory."""

WORD_BYTES = 8
"""A serialised bitmap is padded to this: the reference keeps it in 64-bit words."""

_FULL = b"\xff" * CHUNK_BYTES
_CLEAN = bytes(CHUNK_BYTES)


class DirtyBitmap:
    """One bitmap of one node.

    name          None: nameless, for a job            size         bytes covered
    granularity   bytes for one bit                    enabled      writes mark it
    persistent    the image keeps it                   busy         an export or a job uses it
    readonly      the image cannot be written, so it may not change either
    inconsistent  the image says it was not closed: useless, but for being removed
    """

    def __init__(self, name: str | None, size: int, granularity: int) -> None:
        assert granularity >= MIN_GRANULARITY
        assert not granularity & granularity - 1
        self.name, self.size, self.granularity = name, size, granularity
        self.enabled = True
        self.persistent = self.busy = self.readonly = self.inconsistent = False
        self._shift = granularity.bit_length() - 1
        self._chunks: dict[int, bytes | bytearray] = {}
        self._count = 0
        self._order: list[int] | None = None
        self._lock = threading.Lock()

    # --- what it says -------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """How many bits it has."""
        return self.size + self.granularity - 1 >> self._shift

    @property
    def count(self) -> int:
        """Dirty bytes, in whole units of the granularity."""
        return self._count << self._shift

    def to_wire(self) -> dict[str, Any]:
        """Return BlockDirtyInfo."""
        info: dict[str, Any] = {
            "count": self.count,
            "granularity": self.granularity,
            "recording": self.enabled,
            "busy": self.busy,
            "persistent": self.persistent,
        }
        if self.name is not None:
            info["name"] = self.name
        if self.inconsistent:
            info["inconsistent"] = True
        return info

    def check(self, *, readonly: bool = False, inconsistent: bool = False) -> None:
        """Refuse the use of a bitmap that is busy; `readonly`, `inconsistent`: such ones will do.

        Raises CommandError with the reference's text.
        """
        if self.busy:
            raise CommandError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if self.readonly and not readonly:
            raise CommandError(f"Bitmap '{self.name}' is readonly and cannot be modified")
        if self.inconsistent and not inconsistent:
            raise CommandError(
                f"Bitmap '{self.name}' is inconsistent and cannot be used",
                hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
            )

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, dirty) for the bytes [start, end), neighbours differing.

        The caller may pause between two; what changes meanwhile is seen or not.
        """
        at, dirty = start, self.get(start) if start < end else False
        while at < end:
            stop = self._next(at, not dirty)
            if not dirty and stop >= self.size:
                stop = end  # also where the range goes on behind the end of the bitmap
            stop = min(stop, end)
            yield at, stop - at, dirty
            at, dirty = stop, not dirty

    def dirty_areas(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes of what is dirty, the last one cut at the end of the node."""
        for offset, length, dirty in self.runs(0, self.size):
            if dirty:
                yield offset, length

    def get(self, offset: int) -> bool:
        """Say whether the byte at `offset` is dirty."""
        bit = offset >> self._shift
        with self._lock:
            chunk = self._chunks.get(bit // CHUNK_BITS)
        return chunk is not None and bool(chunk[bit % CHUNK_BITS >> 3] >> (bit & 7) & 1)

    def _next(self, offset: int, dirty: bool) -> int:
        """Return the first byte from `offset` on whose bit is `dirty`, the size if there is none."""
        bit, bits = offset >> self._shift, self.bits
        with self._lock:
            while bit < bits:
                number = bit // CHUNK_BITS
                chunk = self._chunks.get(number, _CLEAN)
                skip = chunk is _CLEAN if dirty else chunk is _FULL
                if not skip:
                    first = bit % CHUNK_BITS >> 3
                    value = int.from_bytes(chunk[first:], "little")
                    if not dirty:
                        value ^= (1 << (CHUNK_BYTES - first) * 8) - 1
                    value = value >> (bit & 7) << (bit & 7)
                    if value:
                        found = number * CHUNK_BITS + first * 8 + (value & -value).bit_length() - 1
                        return min(max(found << self._shift, offset), self.size)
                bit = self._after(number, bits, dirty)
        return self.size

    def _after(self, number: int, bits: int, dirty: bool) -> int:
        """Return the bit at which to go on after chunk `number`; clean chunks are leapt over."""
        if not dirty:
            return (number + 1) * CHUNK_BITS
        if self._order is None:
            self._order = sorted(self._chunks)
        at = bisect_right(self._order, number)
        return (self._order[at] if at < len(self._order) else bits // CHUNK_BITS + 1) * CHUNK_BITS

    def serialize(self, offset: int, length: int) -> bytes:
        """Return the bits from byte `offset` on as `length` bytes, least significant bit first.

        offset   bytes of the node, a multiple of 8 units of the granularity
        """
        first = offset >> self._shift >> 3
        parts = []
        with self._lock:
            while length:
                number, within = divmod(first, CHUNK_BYTES)
                step = min(length, CHUNK_BYTES - within)
                parts.append(bytes(self._chunks.get(number, _CLEAN)[within : within + step]))
                first += step
                length -= step
        return b"".join(parts)

    @property
    def serialized_length(self) -> int:
        """Bytes of the whole bitmap when serialised."""
        return max(align_up(self.bits + 7 >> 3, WORD_BYTES), WORD_BYTES)

    def sha256(self) -> str:
        """Return the digest, in hexadecimal, of the whole serialised bitmap."""
        import hashlib

        digest = hashlib.sha256()
        left = self.serialized_length
        number = 0
        while left:
            step = min(left, CHUNK_BYTES)
            with self._lock:
                digest.update(bytes(self._chunks.get(number, _CLEAN)[:step]))
            left -= step
            number += 1
        return digest.hexdigest()

    # --- changes ------------------------------------------------------------------------------

    def set(self, offset: int, length: int) -> None:
        """Mark the bytes [offset, offset + length), as far as they lie within the node."""
        end = min(offset + length, self.size)
        if offset < end:
            with self._lock:
                self._fill(offset >> self._shift, (end - 1 >> self._shift) + 1, True)

    def reset(self, offset: int, length: int) -> None:
        """Clean the units that begin in [offset, offset + length)."""
        end = min(offset + length, self.size)
        if offset < end:
            with self._lock:
                self._fill(offset >> self._shift, (end - 1 >> self._shift) + 1, False)

    def _fill(self, first: int, end: int, dirty: bool) -> None:
        """Give bits [first, end) one value; the lock is held."""
        chunks = self._chunks
        while first < end:
            number, bit = divmod(first, CHUNK_BITS)
            stop = min(CHUNK_BITS, bit + end - first)
            chunk = chunks.get(number)
            if stop - bit == CHUNK_BITS:
                self._count += (CHUNK_BITS if dirty else 0) - _ones(chunk)
                self._order = None
                if dirty:
                    chunks[number] = _FULL
                else:
                    chunks.pop(number, None)
            elif chunk is not None or dirty:
                self._fill_part(number, chunk, bit, stop, dirty)
            first += stop - bit

    def _fill_part(self, number: int, chunk: bytes | bytearray | None, bit: int, stop: int, dirty: bool) -> None:
        low, high = bit >> 3, (stop + 7) >> 3
        if chunk is None:
            chunk = bytearray(CHUNK_BYTES)
            self._order = None
        old = int.from_bytes(chunk[low:high], "little")
        mask = (1 << stop - low * 8) - (1 << bit - low * 8)
        new = old | mask if dirty else old & ~mask
        if new == old:
            return
        if not isinstance(chunk, bytearray):
            chunk = bytearray(chunk)
        chunk[low:high] = new.to_bytes(high - low, "little")
        self._chunks[number] = chunk
        self._count += (new ^ old).bit_count() * (1 if dirty else -1)

    def clear(self) -> None:
        """Clean all of it."""
        with self._lock:
            self._chunks = {}
            self._count = 0
            self._order = None

    def load(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Replace the bits from byte `offset` on by serialised ones; see `serialize`.

        Bits behind the end of the node are dropped.
        """
        first = offset >> self._shift >> 3
        at = 0
        with self._lock:
            while at < len(data):
                number, within = divmod(first + at, CHUNK_BYTES)
                step = min(len(data) - at, CHUNK_BYTES - within)
                old = self._chunks.get(number)
                chunk = bytearray(CHUNK_BYTES) if old is None else bytearray(old)
                chunk[within : within + step] = data[at : at + step]
                self._put(number, chunk, old)
                at += step
            if (first + at) * 8 > self.bits:
                self._cut()

    def _put(self, number: int, chunk: bytearray, old: bytes | bytearray | None) -> None:
        ones = _ones(chunk)
        self._count += ones - _ones(old)
        self._order = None
        if ones:
            self._chunks[number] = chunk if ones < CHUNK_BITS else _FULL
        else:
            self._chunks.pop(number, None)

    def _cut(self) -> None:
        """Drop bits behind the end; the lock is held."""
        bits = self.bits
        for number in [one for one in self._chunks if (one + 1) * CHUNK_BITS > bits]:
            start = max(number * CHUNK_BITS, bits)
            self._fill(start, (number + 1) * CHUNK_BITS, False)

    def truncate(self, size: int) -> None:
        """Follow the node to a new size; what is added is clean."""
        with self._lock:
            self.size = size
            self._cut()

    def merge(self, source: DirtyBitmap) -> None:
        """Mark all that is dirty in `source`, which has the same size and perhaps another granularity."""
        if source is self:
            return
        if source.granularity != self.granularity:
            for offset, length in source.dirty_areas():
                self.set(offset, length)
            return
        with source._lock:
            theirs = {number: bytes(chunk) for number, chunk in source._chunks.items()}
        with self._lock:
            for number, chunk in theirs.items():
                old = self._chunks.get(number)
                if old is None:
                    self._put(number, bytearray(chunk), old)
                elif old is not _FULL:
                    joined = int.from_bytes(old, "little") | int.from_bytes(chunk, "little")
                    self._put(number, bytearray(joined.to_bytes(CHUNK_BYTES, "little")), old)

    def snapshot(self) -> DirtyBitmap:
        """Return a nameless copy: to go back to, or to walk through while this one is marked."""
        copy = DirtyBitmap(None, self.size, self.granularity)
        copy.enabled = False
        with self._lock:
            copy._chunks = {
                number: chunk if chunk is _FULL else bytearray(chunk) for number, chunk in self._chunks.items()
            }
            copy._count = self._count
        return copy

    def restore(self, copy: DirtyBitmap) -> None:
        """Take back the bits that `snapshot` copied."""
        with self._lock:
            self._chunks, self._count = copy._chunks, copy._count
            self._order = None

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.name!r} {self.count}/{self.size} granularity={self.granularity}>"


def _ones(chunk: bytes | bytearray | None) -> int:
    if chunk is None:
        return 0
    return CHUNK_BITS if chunk is _FULL else int.from_bytes(chunk, "little").bit_count()


# --- the bitmaps of a node ------------------------------------------------------------------------


def mark(node: BlockNode, offset: int, length: int) -> None:
    """Mark a range that was, or may have been, written in all enabled bitmaps of `node`."""
    for bitmap in node.dirty_bitmaps:
        if bitmap.size != node.size:
            bitmap.truncate(node.size)
        if bitmap.enabled:
            bitmap.set(offset, length)


def resized(node: BlockNode) -> None:
    """Let the bitmaps of `node` follow its size."""
    for bitmap in node.dirty_bitmaps:
        if bitmap.size != node.size:
            bitmap.truncate(node.size)


def find(node: BlockNode, name: str) -> DirtyBitmap:
    """Return the bitmap `name` of `node`. Raises CommandError."""
    for bitmap in node.dirty_bitmaps:
        if bitmap.name == name:
            return bitmap
    raise CommandError(f"Dirty bitmap '{name}' not found")


def default_granularity(node: BlockNode) -> int:
    """Return the bytes for one bit if nobody says: the cluster size from 4 KiB to 64 KiB, 64 KiB without clusters."""
    cluster = int(node.image_info().get("cluster-size", 0))
    return min(max(cluster, 4 * KiB), 64 * KiB) if cluster else 64 * KiB


def create(node: BlockNode, name: str | None, granularity: int) -> DirtyBitmap:
    """Add an enabled bitmap to `node`. Raises CommandError for a name that is taken or too long."""
    if name is not None:
        if any(bitmap.name == name for bitmap in node.dirty_bitmaps):
            raise CommandError(f"Bitmap already exists: {name}")
        if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
            raise CommandError(f"Bitmap name too long: {name}")
    bitmap = DirtyBitmap(name, node.size, granularity)
    node.dirty_bitmaps.insert(0, bitmap)
    return bitmap


def check_name(name: str) -> None:
    """Raise CommandError for an empty name, which commands say before anything of the node."""
    if not name:
        raise CommandError("Bitmap name cannot be empty")


def add(node: BlockNode, name: str, granularity: int | None, *, persistent: bool, disabled: bool) -> DirtyBitmap:
    """Do what block-dirty-bitmap-add does. Raises CommandError."""
    check_name(name)
    if granularity is None:
        granularity = default_granularity(node)
    elif not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY or granularity & granularity - 1:
        raise CommandError("Granularity must be power of 2 and at least 512")
    if persistent:
        node.check_storing_bitmap(name, granularity)
    bitmap = create(node, name, granularity)
    bitmap.persistent = persistent
    bitmap.enabled = not disabled
    return bitmap


def check_mergeable(target: DirtyBitmap, source: DirtyBitmap) -> None:
    """Refuse a merge that cannot be. Raises CommandError."""
    target.check()
    source.check(readonly=True)
    if target.size != source.size:
        raise CommandError(
            f"Bitmaps are of different sizes (destination size is {target.size}, source size is {source.size})"
            " and can't be merged"
        )
