"""A node as the one file of a FUSE file system: what each request of the kernel does to its backend.

Model: QEMU block/export/fuse.c. Runs on the data loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine
from typing import Any

from qmpd.block.backend import BlockBackend
from qmpd.block.batch import WriteFlags
from qmpd.errors import CommandError
from qmpd.protocols import fuse
from qmpd.protocols.fuse import FuseRequest, Opcode, SetAttr

log = logging.getLogger(__name__)

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
"""FALLOC_FL_* of linux/falloc.h."""

_NOTHING = SetAttr.HANDLE | SetAttr.LOCK_OWNER | SetAttr.KILL_SUIDGID
_MAX_LENGTH = (1 << 63) - 1

Handler = Callable[[memoryview], Coroutine[Any, Any, bytes | bytearray]]


class FuseFile:
    """Serves requests from the descriptor `fd` of /dev/fuse until `stop`.

    growable      writes behind the end make the node longer
    writethrough  every write is durable before it is answered
    allow_other   other users may reach the file, so it may be made theirs
    """

    def __init__(
        self, backend: BlockBackend, fd: int, *, writable: bool, growable: bool, writethrough: bool, allow_other: bool
    ) -> None:
        self.backend, self._fd = backend, fd
        self.writable, self.growable, self.allow_other = writable, growable, allow_other
        self._flags = WriteFlags.FUA if writethrough else WriteFlags.NONE
        self._mode = stat.S_IFREG | stat.S_IRUSR | (stat.S_IWUSR if writable else 0)
        self._uid, self._gid = os.getuid(), os.getgid()
        self._growing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[int, Handler] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.STATFS: self._statfs,
            Opcode.RELEASE: self._nothing,
            Opcode.DESTROY: self._nothing,
            Opcode.FSYNC: self._flush,
            Opcode.FLUSH: self._flush,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
        }

    # --- the device -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to serve."""
        os.set_blocking(self._fd, False)
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    async def stop(self) -> None:
        """Let requests in flight end, then close the device: what is still open has no file any more."""
        asyncio.get_running_loop().remove_reader(self._fd)
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        os.close(self._fd)

    def _readable(self) -> None:
        """Take every request that there is."""
        for _ in range(64):
            try:
                data = os.read(self._fd, fuse.BUFFER)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                if error.errno != errno.ENODEV:
                    log.error("FUSE: %s", error.strerror)
                asyncio.get_running_loop().remove_reader(self._fd)
                return
            try:
                request = fuse.parse(data)
            except fuse.FuseError as error:
                log.error("FUSE: %s", error)
                continue
            if request.opcode not in fuse.NO_REPLY:
                task = asyncio.get_running_loop().create_task(self._serve(request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, request: FuseRequest) -> None:
        handler = self._handlers.get(request.opcode)
        try:
            if handler is None:
                answer = fuse.error_reply(request.unique, errno.ENOSYS)
            else:
                answer = fuse.reply(request.unique, await handler(request.body))
        except fuse.FuseError as error:
            log.error("FUSE: %s", error)
            answer = fuse.error_reply(request.unique, errno.EINVAL)
        except CommandError as error:
            log.info("FUSE: %s", error)
            answer = fuse.error_reply(request.unique, errno.ENOTSUP)
        except OSError as error:
            answer = fuse.error_reply(request.unique, error.errno or errno.EIO)
        try:
            os.write(self._fd, answer)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("FUSE: a reply was refused: %s", error.strerror)

    # --- requests ---------------------------------------------------------------------------------

    async def _init(self, body: memoryview) -> bytes:
        return fuse.init_reply(body)

    async def _nothing(self, _body: memoryview) -> bytes:
        return b""

    async def _lookup(self, _body: memoryview) -> bytes:
        raise OSError(errno.ENOENT, "a file has no entries")

    async def _statfs(self, _body: memoryview) -> bytes:
        return fuse.statfs_reply()

    async def _open(self, _body: memoryview) -> bytes:
        return fuse.open_reply()

    async def _getattr(self, _body: memoryview) -> bytes:
        node = self.backend.node
        allocated = node.allocated_size() if node is not None else 0
        size = self.backend.size
        return fuse.attributes_reply(
            fuse.Attributes(
                size=size,
                blocks=-(-(size if allocated is None else allocated) // 512),
                mode=self._mode,
                uid=self._uid,
                gid=self._gid,
                blksize=max(node.request_alignment if node is not None else 1, 1),
                now=int(time.time()),
            )
        )

    async def _setattr(self, body: memoryview) -> bytes:
        """Change size, mode, and with allow_other the owner; nothing else can be kept."""
        change = fuse.parse_setattr(body)
        allowed = SetAttr.SIZE | SetAttr.MODE | _NOTHING
        if self.allow_other:
            allowed |= SetAttr.UID | SetAttr.GID
        if change.valid & ~allowed:
            raise OSError(errno.ENOTSUP, "attributes that are not kept")
        if SetAttr.MODE in change.valid:
            if not self.allow_other and change.mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise OSError(errno.EPERM, "others cannot reach the file")
            if not self.writable and change.mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
                raise OSError(errno.EROFS, "read-only export")
        if SetAttr.SIZE in change.valid:
            self._check_writable()
            async with self._growing:
                await self._truncate(change.size)
        if SetAttr.MODE in change.valid:
            self._mode = stat.S_IMODE(change.mode) | stat.S_IFREG
        if SetAttr.UID in change.valid:
            self._uid = change.uid
        if SetAttr.GID in change.valid:
            self._gid = change.gid
        return await self._getattr(body)

    def _check_writable(self) -> None:
        if not self.writable:
            raise OSError(errno.EACCES, "read-only export")

    async def _truncate(self, size: int, preallocation: str = "off") -> None:
        if size > _MAX_LENGTH:
            raise OSError(errno.EFBIG, "too large")
        await self.backend.truncate(size, preallocation=preallocation)

    async def _read(self, body: memoryview) -> bytearray:
        """Read; less than asked for at the end of the node."""
        offset, length = fuse.parse_read(body)
        length = min(length, max(self.backend.size - offset, 0))
        return await self.backend.pread(offset, length) if length else bytearray()

    async def _write(self, body: memoryview) -> bytes:
        """Write; behind the end the node grows, or less is written than asked for."""
        offset, data = fuse.parse_write(body)
        self._check_writable()
        end = offset + len(data)
        if end > self.backend.size and self.growable:
            async with self._growing:
                if end > self.backend.size:
                    await self._truncate(end)
        data = data[: max(self.backend.size - offset, 0)]
        if data:
            await self.backend.pwrite(offset, data, self._flags)
        return fuse.write_reply(len(data))

    async def _flush(self, _body: memoryview) -> bytes:
        await self.backend.flush()
        return b""

    async def _fallocate(self, body: memoryview) -> bytes:
        """Make the file longer, punch holes, write zeroes."""
        mode, offset, length = fuse.parse_fallocate(body)
        self._check_writable()
        if offset + length > _MAX_LENGTH:
            raise OSError(errno.EFBIG, "too large")
        async with self._growing:
            await self._allocate(mode, offset, length)
        return b""

    async def _allocate(self, mode: int, offset: int, length: int) -> None:
        size = self.backend.size
        if mode & _KEEP_SIZE:
            length = min(length, max(size - offset, 0))
        if not mode:
            if offset < size:
                raise OSError(errno.EOPNOTSUPP, "only what is behind the end can be allocated")
            if offset > size:
                await self._truncate(offset)
            await self._truncate(offset + length, "falloc")
        elif mode & _PUNCH_HOLE:
            if not mode & _KEEP_SIZE:
                raise OSError(errno.EINVAL, "a hole cannot change the size")
            await self._punch(offset, length)
        elif mode & _ZERO_RANGE:
            if not mode & _KEEP_SIZE and offset + length > size:
                await self._truncate(offset + length)
            if length:
                await self.backend.pwrite_zeroes(offset, length, self._flags)
        else:
            raise OSError(errno.EOPNOTSUPP, "a mode of fallocate that there is not")

    async def _punch(self, offset: int, length: int) -> None:
        if not length:
            return
        flags = WriteFlags.MAY_UNMAP | WriteFlags.NO_FALLBACK | self._flags
        try:
            await self.backend.pwrite_zeroes(offset, length, flags)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            await self.backend.pdiscard(offset, length)

    async def _lseek(self, body: memoryview) -> bytes:
        """Find the next data or the next hole; the end counts as a hole."""
        offset, whence = fuse.parse_lseek(body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "the kernel does the other ones")
        size = self.backend.size
        if offset >= size:
            raise OSError(errno.ENXIO, "behind the end")
        for extent in await self.backend.block_status(offset, size - offset):
            data = extent.data or not extent.zero
            if data == (whence == os.SEEK_DATA):
                return fuse.lseek_reply(max(extent.offset, offset))
        if whence == os.SEEK_DATA:
            raise OSError(errno.ENXIO, "no more data")
        return fuse.lseek_reply(size)
