"""The short way of NBD reads and writes: from the receive buffer to a buffer of replies, or to the file, in one go.

Most requests of most clients are reads without flags of data that the page cache has. For a run of those at
the front of what was received, nothing is made but a table of extents and the headers of the replies; one call
reads and decrypts all of them between those headers, and one send takes the buffer. What does not fit this
form is left, with all that follows it, to `Requests` and `Worker`. Writes are taken apart by `Requests` first; if
all that were received together are plain ones, one call encrypts and writes them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from qmpd.aio.pool import PooledBuffer
from qmpd.block.direct import DirectRead
from qmpd.crypto.cipher import EXTENT, ExtentTable, extents_work, read_extents, write_extents
from qmpd.exporting.nbd_target import NbdTarget
from qmpd.exporting.nbd_work import SPARSE_FROM
from qmpd.protocols.nbd import CommandFlag, Style
from qmpd.protocols.nbd_transmission import PlainReads, Replies, Request
from qmpd.units import KiB, MiB

LARGEST = 1 * MiB
"""Bytes of the largest read that goes this way."""

ROOM = 1 * MiB
"""Bytes of replies of one run, unless its first is larger: what stays in the processor's cache until it is sent."""

SMALLEST_BUFFER = 64 * KiB
"""Bytes of the buffer that is taken for a run of small reads."""

LARGE = 16 * KiB
"""Bytes from which the data of a read gets pages of its own: copying to odd addresses costs more than another
part of the message. A run is of large reads or of small ones."""

ENTRIES = 256
"""Reads of one run."""

PAGE = 4096

_FUA = int(CommandFlag.FUA)

_pack_extent = EXTENT.pack_into
_EXTENT = EXTENT.size


class DirectReader:
    """Serves runs of plain reads for one connection, whose client was told that the export has `size` bytes."""

    def __init__(self, target: NbdTarget, style: Style, size: int) -> None:
        self._target, self._backend = target, target.backend
        self._size = size
        self._sparse = style is not Style.SIMPLE
        self._plain = PlainReads(style)
        self._table = ExtentTable(ENTRIES)

    @staticmethod
    def works() -> bool:
        """Say whether the compiled half of this is there."""
        return extents_work()

    def serve(self, received: memoryview) -> tuple[int, PooledBuffer, list[memoryview]] | None:
        """Carry out the reads that `received` begins with.

        Returns how many bytes of `received` they take, and their replies: a buffer, which the caller gives
        back, and the parts of it to send. None if the first request is not one for this way.
        """
        direct = self._backend.direct_read()
        plain = self._plain
        if direct is None or len(received) < plain.header_size or plain.unpack_from(received)[0] != plain.word:
            return None
        length = plain.unpack_from(received)[3]
        if not 0 < length <= LARGEST:
            return None
        many = len(received) // plain.header_size
        each = length + (PAGE if length >= LARGE else plain.reply_size)
        buffer = self._target.buffers.take(max(SMALLEST_BUFFER, min(each * many, ROOM), each))
        try:
            begun = time.monotonic_ns()
            count = self._fill(direct, received, buffer.view, large=length >= LARGE)
        except BaseException:
            buffer.release()
            raise
        if not count:
            buffer.release()
            return None
        parts, total = self._parts(count, buffer.view, large=length >= LARGE)
        self._backend.stats.read_directly(count, total, time.monotonic_ns() - begun)
        return count * plain.header_size, buffer, parts

    def _parts(self, count: int, out: memoryview, *, large: bool) -> tuple[list[memoryview], int]:
        """Return what to send of `out` for the first `count` extents, and the bytes of data in it."""
        table, reply = self._table.data, self._plain.reply_size
        if large:
            parts = []
            for number in range(count):
                _, _, length, place = EXTENT.unpack_from(table, number * _EXTENT)
                parts.append(out[place - reply : place + length])
            return parts, sum(map(len, parts)) - reply * count
        _, _, length, place = EXTENT.unpack_from(table, (count - 1) * _EXTENT)
        return [out[: place + length]], place + length - reply * count

    def _fill(self, direct: DirectRead, received: memoryview, out: memoryview, *, large: bool) -> int:
        """Fill `out` with replies and return how many there are."""
        plain, table = self._plain, self._table.data
        word, unpack, pack = plain.word, plain.unpack_from, plain.pack
        step, reply = plain.header_size, plain.reply_size
        size = min(self._size, self._backend.size)
        before, locate, after = direct.before, direct.locate, direct.after
        crypto, crypto_at = direct.crypto, direct.crypto_at
        first, mask = (crypto.first, crypto.sector_size - 1) if crypto is not None else (0, 0)
        covers, unsparse = self._target.known_data.covers, SPARSE_FROM if self._sparse else LARGEST + 1
        at = end = count = 0
        last, room = len(received) - step, len(out)
        while at <= last and count < ENTRIES:
            kind, cookie, offset, length = unpack(received, at)
            data = end + reply
            if large:
                data = data + PAGE - 1 & -PAGE
            if kind != word or not 0 < length <= room - data or offset + length > size or (length >= LARGE) != large:
                break
            if length >= unsparse and not covers(offset, offset + length):
                break
            inside = offset + crypto_at
            if (inside | length) & mask:
                break
            place = offset + before
            if locate is not None:
                place = locate(place, length)
                if place < 0:
                    break
            pack(out, data - reply, cookie, offset, length)
            _pack_extent(table, count * _EXTENT, first + (inside >> 9), place + after, length, data)
            end = data + length
            at += step
            count += 1
        if not count:
            return 0
        return read_extents(crypto.cipher if crypto is not None else None, direct.disk.fd, self._table, count, out)


class DirectWriter:
    """Carries out plain writes for one connection."""

    def __init__(self, target: NbdTarget, style: Style) -> None:
        self._target, self._backend = target, target.backend
        self._success = Replies(style).success
        self._table = ExtentTable(ENTRIES)

    def write(self, requests: Sequence[Request], received: memoryview) -> list[bytes | memoryview] | None:
        """Carry out writes whose payload is in `received`, and return their replies.

        None if that is not the way for one of them: then none is answered, and all are to be carried out.
        """
        direct = self._backend.direct_write()
        if direct is None or self._target.writethrough or len(requests) > ENTRIES or len(received) > LARGEST:
            return None
        place, table, mask = direct.place, self._table.data, direct.alignment - 1
        before, locate, after = place.before, place.locate, place.after
        size, there, crypto = self._backend.size, place.disk.size, place.crypto
        first, crypto_at = (0, 0) if crypto is None else (crypto.first, place.crypto_at)
        at = total = highest = highest_there = 0
        for request in requests:
            offset, length = request.offset, request.length
            if request.flags & _FUA or not length or (offset | length) & mask or offset + length > size:
                return None
            target = offset + before
            if locate is not None:
                target = locate(target, length)
                if target < 0:
                    return None
            target += after
            if target + length > there:
                return None
            _pack_extent(table, at, first + (offset + crypto_at >> 9), target, length, request.at)
            at += _EXTENT
            total += length
            highest = max(highest, offset + length)
            highest_there = max(highest_there, target + length)
        begun = time.monotonic_ns()
        cipher = None if crypto is None else crypto.cipher
        if write_extents(cipher, place.disk.fd, self._table, len(requests), received) < len(requests):
            return None  # what went wrong is for the long way to find out
        direct.written(highest, highest_there)
        self._backend.stats.written_directly(len(requests), total, time.monotonic_ns() - begun)
        return [self._success(request) for request in requests]
