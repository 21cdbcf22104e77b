"""Memory that another process shares with us: mapped, guarded, and read and written beside it.

`_guest_memory` (compiled at install) has the guard and the fence; without it nothing can be mapped.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable

from qmpd.native import compiled

_native = compiled("qmpd.aio._guest_memory")

_HUGE = 2 << 20
"""Bytes; a file system with blocks of that size or more is one of huge pages, which are mapped and lost whole."""


def available() -> bool:
    """Say whether memory can be shared here: the guard is built, and integers are stored as virtio has them."""
    return _native is not None and sys.byteorder == "little"


def fence() -> Callable[[], object]:
    """Return the function that keeps later loads from passing earlier stores, in this thread."""
    assert _native is not None
    return _native.lib.qmpd_fence  # type: ignore[no-any-return]


class SharedMapping:
    """`size` bytes from `offset` of a shared file, mapped; the descriptor stays the caller's.

    Raises OSError, ValueError if the file is shorter.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        assert _native is not None
        page = os.fstatvfs(fd).f_bsize
        if page < _HUGE or page & (page - 1):
            page = mmap.PAGESIZE
        before = offset % page
        if os.fstat(fd).st_size < offset + size:
            raise ValueError(f"{size} bytes at {offset} lie beyond the end of a file of {os.fstat(fd).st_size}")
        length = before + size if page == mmap.PAGESIZE else -(-(before + size) // page) * page
        self._map = mmap.mmap(fd, length, offset=offset - before)
        self._guard = -1
        whole = memoryview(self._map)
        self.view = whole[before : before + size]
        """The bytes, writable; every slice of it has to be released before `close`."""
        whole.release()
        with _native.ffi.from_buffer(self._map) as start:
            self._guard = _native.lib.qmpd_guard(start, length, page)
        if self._guard < 0:
            self.close()
            raise OSError("too many pieces of memory are shared")

    @property
    def shrunk(self) -> bool:
        """Whether something was touched that the file does not have any more."""
        assert _native is not None
        return bool(_native.lib.qmpd_guard_hit(self._guard))

    def close(self) -> None:
        """Unmap."""
        assert _native is not None
        if self._guard >= 0:
            _native.lib.qmpd_unguard(self._guard)
            self._guard = -1
        self.view.release()
        self._map.close()
