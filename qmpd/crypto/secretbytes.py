"""SecretBytes: key material that can be wiped and that does not show itself.

The bytes live in pages of their own: locked in memory where the system allows it, left out of core
dumps, zeroed by `wipe()`. Honest limit: copies that Python or OpenSSL make on the way in or out
cannot be wiped; what this prevents is a leak through logs, error texts, dumps and swap.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from types import TracebackType
from typing import NoReturn

_log = logging.getLogger("qmpd.secrets")
_libc = ctypes.CDLL(None, use_errno=True)
_lock_failure_reported = False

Buffer = bytes | bytearray | memoryview


class SecretBytes:
    """Secret bytes, fixed in number, changed only by `wipe`.

    `view()` is how their user gets at them; there is no way to turn the object itself into text,
    into bytes, into a pickle or into a copy by accident. Used as a context manager, it is wiped
    when the block ends.
    """

    __slots__ = ("_length", "_pages")

    def __init__(self, data: Buffer) -> None:
        """Copy `data`; the caller still owns (and wipes) its own buffer, see `take`."""
        self._length = len(data)
        self._pages = _allocate(self._length)
        self._pages[: self._length] = data

    @classmethod
    def take(cls, buffer: bytearray) -> SecretBytes:
        """Move the contents of `buffer` into a new object and zero the buffer."""
        secret = cls(buffer)
        buffer[:] = bytes(len(buffer))
        return secret

    def view(self) -> memoryview:
        """Return a read-only view; it reads as zeroes after `wipe`. Release it soon."""
        with memoryview(self._pages) as pages:
            return pages[: self._length].toreadonly()

    def clone(self) -> SecretBytes:
        """Return a second object with the same bytes, wiped on its own."""
        with self.view() as view:
            return SecretBytes(view)

    def wipe(self) -> None:
        """Overwrite the bytes with zeroes; the length becomes 0. Wiping twice does nothing."""
        if self._length:
            self._pages[: self._length] = bytes(self._length)
            self._length = 0

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        """Compare in constant time with another secret, or with plain bytes."""
        from hmac import compare_digest  # brings in all of hashlib, and most programs never compare secrets

        if isinstance(other, SecretBytes):
            with self.view() as mine, other.view() as theirs:
                return compare_digest(mine, theirs)
        if isinstance(other, bytes | bytearray | memoryview):
            with self.view() as mine:
                return compare_digest(mine, other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<secret {self._length} bytes>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse pickling, and with it `copy.copy` and `copy.deepcopy`."""
        raise TypeError("a secret cannot be pickled or copied; clone() makes a second one")

    def __enter__(self) -> SecretBytes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.wipe()

    def __del__(self) -> None:
        if getattr(self, "_length", 0) and hasattr(self, "_pages"):
            self.wipe()


def _allocate(length: int) -> mmap.mmap:
    """Return private pages for `length` bytes, locked and kept out of dumps as far as possible."""
    pages = mmap.mmap(-1, max(length, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTDUMP"):
        pages.madvise(mmap.MADV_DONTDUMP)
    anchor = ctypes.c_char.from_buffer(pages)
    if _libc.mlock(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(max(length, 1))) != 0:
        _report_lock_failure()
    del anchor
    return pages


def _report_lock_failure() -> None:
    """Say once per process that secrets may reach the swap device."""
    global _lock_failure_reported
    if not _lock_failure_reported:
        _lock_failure_reported = True
        _log.warning("key material cannot be locked in memory (raise the memlock limit); it may reach swap")
