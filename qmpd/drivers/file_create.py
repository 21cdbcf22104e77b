"""Making a file: the `file` branch of blockdev-create.

Options: BlockdevCreateOptionsFile (qapi/block-drivers.json). Messages: as the reference.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass

from qmpd.aio import locks
from qmpd.aio.disk import open_fd, set_size
from qmpd.aio.pool import in_disk_thread
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.errors import CommandError, FileTooLarge
from qmpd.qapi.registry import creator

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


@dataclass(frozen=True, slots=True, eq=False)
class FileCreateOptions:
    """BlockdevCreateOptionsFile.

    size  bytes                nocow  no copy-on-write, where the file system has it
    extent_size_hint           bytes; only XFS would listen, where it changes no content
    """

    filename: str
    size: int
    preallocation: str = "off"
    nocow: bool = False
    extent_size_hint: int | None = None


@creator("file", schema="BlockdevCreateOptionsFile", options=FileCreateOptions)
class FileCreator:
    """Makes or empties a regular file, then gives it its size."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    async def create(self, options: FileCreateOptions) -> None:
        """Make the file. Raises CommandError."""
        name = options.filename.removeprefix("file:")
        try:
            fd = await open_fd(name, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise CommandError(f"Could not create '{name}': {os.strerror(error.errno or errno.EIO)}") from error
        try:
            if locks.available(fd):
                taken, unshared = Perm.WRITE | Perm.RESIZE, Perm.RESIZE
                locks.apply(fd, taken, unshared, release=False)
                locks.check(fd, taken, unshared, name)
            await in_disk_thread(lambda: _fill(fd, options))
        finally:
            os.close(fd)


def _fill(fd: int, options: FileCreateOptions) -> None:
    os.ftruncate(fd, 0)
    if options.nocow:
        # Asked for speed on copy-on-write file systems; others refuse, which harms nothing.
        with contextlib.suppress(OSError):
            flags = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(4)))[0]
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", flags | _FS_NOCOW_FL))
    if options.preallocation == "metadata":
        raise CommandError("Unsupported preallocation mode: metadata")
    try:
        set_size(fd, 0, options.size, options.preallocation)
    except OSError as error:
        kind = FileTooLarge if error.errno == errno.EFBIG else CommandError
        raise kind(f"Could not resize file: {os.strerror(error.errno or errno.EIO)}") from error
