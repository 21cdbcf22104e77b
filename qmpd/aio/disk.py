"""Files on disk: vectored reads and writes, sync, holes. The only code that touches image descriptors.

What the page cache can answer is done at once on the caller's loop (RWF_NOWAIT); the rest goes to
threads, a batch at a time. Direct I/O always goes to threads, through aligned buffers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from qmpd.aio.pool import BufferPool, PooledBuffer, in_disk_thread
from qmpd.units import KiB, MiB, align_down, align_up

INLINE_READ = 512 * KiB
"""Reads up to this many bytes per batch are tried on the loop first, from the page cache; larger ones go to a thread
at once, so that the loop has something else to do while their bytes are copied."""

INLINE_WRITE = 1 * MiB
"""Buffered writes up to this many bytes per batch are done on the loop: a copy to the page cache, which
for a megabyte costs less than two changes of thread."""

IOV_MAX = 1024
DIRECT_ALIGNMENT = 4096
"""Bytes that direct I/O is aligned to: right for every disk in use, and pages for the buffers."""

_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2
_FALLOC_ZERO_RANGE = 16
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

_zeroes = memoryview(bytes(256 * KiB))
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class IoRequest(Protocol):
    """What a batch is made of, as far as a file is concerned."""

    offset: int
    view: memoryview

    def fail(self, error: int) -> None:
        """Mark the request with an errno."""


class DiskFile:
    """An open image file or block device.

    fd      owned; closed by `close`
    direct  opened with O_DIRECT: every request is aligned to DIRECT_ALIGNMENT
    size    bytes when last looked at (`refresh_size`)
    nowait  reads can be asked of the page cache alone, as far as is known
    """

    def __init__(self, fd: int, *, direct: bool = False) -> None:
        self.fd = fd
        self.direct = direct
        self.is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self.size = 0
        self.zero_range_works = True
        self.nowait = not direct
        self._pool = BufferPool() if direct else None
        self._growing = threading.RLock()
        """Held from looking the size up to setting it."""
        self._reaching: list[int] = []
        """Where the writes end that may make the file longer just now."""
        self.refresh_size()

    def refresh_size(self) -> int:
        """Ask the system for the size and return it, in bytes."""
        with self._growing:
            self.size = os.fstat(self.fd).st_size if self.is_regular else _device_size(self.fd)
            return self.size

    def _extend(self, end: int) -> None:
        """Make a regular file `end` bytes long, if it is not longer by now. Raises OSError.

        What other threads write at its end just now stays inside: it would otherwise be cut off by one that looks
        the size up before that write and sets it after.
        """
        with self._growing:
            if self.refresh_size() < end:
                end = max([end, *self._reaching])
                set_size(self.fd, self.size, end, "off")
                self.size = end

    @contextlib.contextmanager
    def reaching(self, end: int) -> Iterator[None]:
        """Write in this block what ends at `end` at most: where that makes the file longer, nobody cuts it off."""
        with self._growing:
            self._reaching.append(end)
        try:
            yield
        finally:
            with self._growing:
                self._reaching.remove(end)
                self.refresh_size()

    def switch(self, fd: int, *, direct: bool) -> None:
        """Go on with another descriptor of the same file, which is closed; its number stays what it was.

        Nothing is in flight. Raises OSError.
        """
        try:
            os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)
        if direct != self.direct:
            self.direct, self.nowait = direct, not direct
            self._pool = BufferPool() if direct else None

    def allocated_size(self) -> int:
        """Return the bytes that the file takes on its disk."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)

    # --- data -------------------------------------------------------------------------------------

    async def preadv(self, requests: Sequence[IoRequest]) -> None:
        """Fill every view; what lies beyond the end of the file reads as zeroes.

        Failed requests are marked with their errno.
        """
        rest: list[tuple[IoRequest, int]] = []
        if not self.nowait or sum(len(request.view) for request in requests) > INLINE_READ:
            rest = [(request, 0) for request in requests]
        else:
            for request in requests:
                done = self._read_cached(request)
                if done < len(request.view):
                    rest.append((request, done))
        if rest:
            await in_disk_thread(lambda: self._read_blocking(rest))

    def _read_cached(self, request: IoRequest) -> int:
        """Read what the page cache has; returns the bytes read, the whole length if it is done."""
        view, offset, done = request.view, request.offset, 0
        length = len(view)
        while done < length:
            try:
                count = os.preadv(self.fd, (view[done:] if done else view,), offset + done, os.RWF_NOWAIT)
            except BlockingIOError:
                return done
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    self.nowait = False
                    return done
                request.fail(error.errno or errno.EIO)
                return length
            if not count:
                _zero(view, done)
                return length
            done += count
        return done

    def _read_blocking(self, rest: Sequence[tuple[IoRequest, int]]) -> None:
        for request, done in rest:
            try:
                if self._pool is not None:
                    self._read_direct(request)
                else:
                    self._read_rest(request.view, request.offset, done)
            except OSError as error:
                request.fail(error.errno or errno.EIO)

    def _read_rest(self, view: memoryview, offset: int, done: int) -> None:
        while done < len(view):
            count = os.preadv(self.fd, (view[done:],), offset + done)
            if not count:
                _zero(view, done)
                return
            done += count

    def _read_direct(self, request: IoRequest) -> None:
        start = align_down(request.offset, DIRECT_ALIGNMENT)
        end = align_up(request.offset + len(request.view), DIRECT_ALIGNMENT)
        with _Bounce(end - start) as bounce:
            self._read_rest(bounce.view, start, 0)
            skip = request.offset - start
            request.view[:] = bounce.view[skip : skip + len(request.view)]

    async def pwritev(self, requests: Sequence[IoRequest], *, fua: bool = False) -> None:
        """Write every view, with `fua` durably. Failed requests are marked with their errno."""
        total = sum(len(request.view) for request in requests)
        if self.direct or fua or total > INLINE_WRITE:
            await in_disk_thread(lambda: self._write_all(requests, fua))
        else:
            self._write_all(requests, fua)

    def _write_all(self, requests: Sequence[IoRequest], fua: bool) -> None:
        end = max((request.offset + len(request.view) for request in requests), default=0)
        if self.is_regular and end > self.size:
            with self.reaching(end):
                self._write_runs(requests, fua)
        else:
            self._write_runs(requests, fua)

    def _write_runs(self, requests: Sequence[IoRequest], fua: bool) -> None:
        for run in neighbours(requests):
            try:
                if self.direct:
                    self._write_direct(run, fua)
                else:
                    self._write_run(run, fua)
            except OSError as error:
                for request in run:
                    request.fail(error.errno or errno.EIO)

    def _write_run(self, run: Sequence[IoRequest], fua: bool) -> None:
        flags = os.RWF_DSYNC if fua else 0
        views = [request.view for request in run]
        offset = run[0].offset
        while views:
            count = os.pwritev(self.fd, views[:IOV_MAX], offset, flags)
            offset += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def _write_direct(self, run: Sequence[IoRequest], fua: bool) -> None:
        length = sum(len(request.view) for request in run)
        with _Bounce(length) as bounce:
            at = 0
            for request in run:
                bounce.view[at : at + len(request.view)] = request.view
                at += len(request.view)
            done = 0
            while done < length:
                flags = os.RWF_DSYNC if fua else 0
                done += os.pwritev(self.fd, (bounce.view[done:],), run[0].offset + done, flags)

    async def sync(self) -> None:
        """Make everything written durable (fdatasync). Raises OSError."""
        await in_disk_thread(lambda: os.fdatasync(self.fd))

    # --- space ------------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zeroes without sending them; `unmap` may free its space.

        Raises OSError, with ENOTSUP where the file system has no such call.
        """

        def work() -> None:
            size = self.refresh_size()
            inside = min(offset + length, size) - offset
            freed = unmap and inside > 0 and self._try_fallocate(_FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, inside)
            if inside > 0 and not freed and not self._try_fallocate(_FALLOC_ZERO_RANGE, offset, inside):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            if offset + length <= size or not self.is_regular:
                return
            if not unmap and offset >= size and self._try_fallocate(0, offset, length):
                self.refresh_size()  # as long as QEMU makes it: with space for what is going to be written there
            else:
                self._extend(offset + length)

        await in_disk_thread(work)

    async def punch(self, offset: int, length: int) -> None:
        """Free the range; it reads as zeroes where the file system can. Raises OSError(ENOTSUP)."""

        def work() -> None:
            if not self._try_fallocate(_FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        await in_disk_thread(work)

    def _try_fallocate(self, mode: int, offset: int, length: int) -> bool:
        if not self.is_regular:
            return False
        while _libc.fallocate(self.fd, mode, offset, length):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code in _UNSUPPORTED:
                return False
            raise OSError(code, os.strerror(code))
        return True

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        """Set the size of a regular file in bytes; what is added is a hole, or preallocated by
        "falloc" or "full". A file that has become longer meanwhile than it was to be keeps what is new.
        Raises OSError."""
        growing = size > self.refresh_size()

        def work() -> None:
            if preallocation == "off":
                with self._growing:
                    if growing:
                        self._extend(size)
                    else:
                        set_size(self.fd, self.refresh_size(), size, preallocation)
                        self.size = size
            else:
                set_size(self.fd, self.refresh_size(), size, preallocation)
                self.refresh_size()

        await in_disk_thread(work)

    async def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Return (offset, length, is data) for the range, by SEEK_DATA and SEEK_HOLE.

        All is data where the file system cannot tell; what lies beyond the end is a hole.
        """
        return await in_disk_thread(lambda: self._extents(offset, length))

    def _extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        found: list[tuple[int, int, bool]] = []
        end = offset + length
        size = self.refresh_size()
        while offset < end:
            try:
                data = os.lseek(self.fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    found.append((offset, end - offset, False))
                    break
                stop = min(end, max(offset, size))
                if stop > offset:
                    found.append((offset, stop - offset, True))
                if stop < end:
                    found.append((stop, end - stop, False))
                break
            if data > offset:
                stop = min(data, end)
                found.append((offset, stop - offset, False))
                offset = stop
                continue
            stop = min(os.lseek(self.fd, offset, os.SEEK_HOLE), end)
            found.append((offset, stop - offset, True))
            offset = stop
        return found


class _Bounce:
    """An aligned buffer of one blocking request."""

    def __init__(self, length: int) -> None:
        self._buffer: PooledBuffer = BufferPool(0).take(length)
        self.view = self._buffer.view

    def __enter__(self) -> _Bounce:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer.release()


def neighbours(requests: Sequence[IoRequest]) -> list[list[IoRequest]]:
    """Group requests that follow one another on disk, in the order given."""
    runs: list[list[IoRequest]] = []
    end = -1
    for request in requests:
        if request.offset == end:
            runs[-1].append(request)
        else:
            runs.append([request])
        end = request.offset + len(request.view)
    return runs


def set_size(fd: int, current: int, size: int, preallocation: str) -> None:
    """Change a file from `current` to `size` bytes ("off", "falloc" or "full"); blocks. Raises OSError."""
    if size >= 1 << 63:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if preallocation == "falloc" and size > current:
        os.posix_fallocate(fd, current, size - current)
    elif preallocation == "full" and size > current:
        while current < size:
            current += os.pwrite(fd, _zeroes[: min(len(_zeroes), size - current)], current)
        os.fsync(fd)
    else:
        os.ftruncate(fd, size)


def _zero(view: memoryview, start: int) -> None:
    view[start:] = bytes(len(view) - start)


def _device_size(fd: int) -> int:
    """Return the size of a block device; 0 for a character device, which has none."""
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        return 0


async def open_fd(path: str, flags: int, mode: int = 0o644) -> int:
    """Open a path in a thread: a dead network file system must not stop a loop. Raises OSError.

    A pipe without a partner does not hold it up either.
    """

    def work() -> int:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, mode)
        os.set_blocking(fd, True)
        return fd

    return await in_disk_thread(work)
