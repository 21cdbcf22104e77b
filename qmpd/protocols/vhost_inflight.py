"""What is under way in a ring, noted in memory that outlives the back end.

The front end keeps that memory while the back end is away. The one that comes next finds in it which chains
were taken and not given back, and takes them again: without it, chains that were done out of order would be
lost or done twice. Source: QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking", split virtqueues. The
front end can write to the memory at any time: numbers in it are checked like those of a ring.
"""

from __future__ import annotations

import struct

from qmpd.units import align_up

_VERSION = 1
_HEADER = struct.Struct("<QHHHH")
_ENTRY = struct.Struct("<B5xHQ")
_VERSION_AT, _NUM_AT, _LAST_AT, _USED_AT = 8, 10, 12, 14
_U16 = struct.Struct("<H")


def region_size(num: int) -> int:
    """Return the bytes for one ring of `num` descriptors."""
    return align_up(_HEADER.size + num * _ENTRY.size, 64)


class Inflight:
    """The notes of one ring.

    view   writable, of the size that `region_size` tells
    num    descriptors that it has room for
    """

    def __init__(self, view: memoryview, num: int) -> None:
        self._view, self._num = view, num
        self._counter = 0

    def release(self) -> None:
        """Give up the view."""
        self._view.release()

    def _get(self, at: int) -> int:
        return int(_U16.unpack_from(self._view, at)[0])

    def _put(self, at: int, value: int) -> None:
        _U16.pack_into(self._view, at, value)

    def _entry(self, head: int) -> int:
        return _HEADER.size + head * _ENTRY.size

    def resume(self, used: int) -> list[int]:
        """Return the heads of chains that are to be taken again, in order; `used` is the index of the used ring."""
        if not self._get(_VERSION_AT):
            _HEADER.pack_into(self._view, 0, 0, _VERSION, self._num, 0, used)
            return []
        self._finish_last(used)
        waiting = []
        for head in range(self._num):
            taken, _following, counter = _ENTRY.unpack_from(self._view, self._entry(head))
            if taken:
                waiting.append((counter, head))
            self._counter = max(self._counter, counter + 1)
        self._counter %= 1 << 63
        return [head for _, head in sorted(waiting)]

    def _finish_last(self, used: int) -> None:
        """Strike out what was given back by a back end that could not note it any more."""
        given = min((used - self._get(_USED_AT)) & 0xFFFF, self._num)
        head = self._get(_LAST_AT)
        for _ in range(given):
            if head >= self._num:
                break
            self._view[self._entry(head)] = 0
            head = self._get(self._entry(head) + 6)
        self._put(_USED_AT, used)

    def taken(self, head: int) -> None:
        """Note a chain that was taken; `head` has room."""
        if head < self._num:
            _ENTRY.pack_into(self._view, self._entry(head), 0, 0, self._counter)
            self._view[self._entry(head)] = 1
            self._counter += 1

    def giving(self, head: int) -> None:
        """Note a chain that the next step gives back."""
        if head < self._num:
            self._put(self._entry(head) + 6, self._get(_LAST_AT))
            self._put(_LAST_AT, head)

    def given(self, head: int, used: int) -> None:
        """Note that it was; `used` is the index of the used ring now."""
        if head < self._num:
            self._view[self._entry(head)] = 0
        self._put(_USED_AT, used)
