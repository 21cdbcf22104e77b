"""Copies of LUKS headers in files: what `cryptsetup luksHeaderBackup` writes and `luksHeaderRestore` takes.

A backup is the bytes from the start of the header's device to the end of its key slots, as they are
stored: for LUKS1 rounded up to a page, and without what lies between the fields and the first slot; for
LUKS2 both copies and the whole keyslot area. Whoever has it and a passphrase that it knew has the data.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from qmpd.aio.pool import in_work_thread
from qmpd.errors import CommandError
from qmpd.formats import luks1
from qmpd.luks.detect import is_luks2
from qmpd.luks.encrypt import REQUIREMENT
from qmpd.luks.luks2 import read_copies
from qmpd.luks.volume import HeaderIO, read_padded
from qmpd.units import SECTOR, MiB, align_up

MODE = 0o600
"""Of the files that are written here."""

MAX_IMAGE = 128 * MiB + 2 * 4 * MiB
"""Bytes of the largest header that there can be."""

PAGE = 4096


async def header_image(source: HeaderIO, *, detached: bool) -> bytes:
    """Return the bytes of a backup. Raises CommandError, ImageError for what is no valid header, OSError."""
    if await is_luks2(source):
        found = await read_copies(source, "header")
        if REQUIREMENT in found.copy.metadata.requirements:
            raise CommandError("The volume is being encrypted in place: a backup of now would tell lies about how far")
        return bytes(await read_padded(source, 0, found.copy.metadata.total_size))
    header = luks1.parse_header(await read_padded(source, 0, luks1.HEADER_SIZE), detached=detached)
    image = await read_padded(source, 0, luks1_length(header))
    if min(slot.material_offset for slot in header.slots) == luks1.ALIGNMENT:
        image[luks1.HEADER_SIZE : luks1.ALIGNMENT] = bytes(luks1.ALIGNMENT - luks1.HEADER_SIZE)
    return bytes(image)


def luks1_length(header: luks1.Luks1Header) -> int:
    """Return the bytes of a backup of a LUKS1 header. Raises CommandError for slots far beyond use."""
    end = max(slot.material_offset for slot in header.slots) + align_up(header.material_length, SECTOR)
    if end > MAX_IMAGE:
        raise CommandError(f"The key slots end at byte {end}, a header has {MAX_IMAGE} at most")
    return align_up(end, PAGE)


async def save_header(source: HeaderIO, filename: str, *, detached: bool) -> int:
    """Write a backup of the header on `source` to a new file and return its bytes.

    Raises CommandError if there is such a file already or it cannot be written, or as `header_image`.
    """
    image = await header_image(source, detached=detached)
    await in_work_thread(lambda: write_new(filename, image))
    return len(image)


def write_new(filename: str, data: bytes) -> None:
    """Write a file that was not there, for its owner alone, durably. Raises CommandError; there is then none."""
    try:
        fd = os.open(filename, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
    except OSError as error:
        raise CommandError(f"Could not create '{filename}': {os.strerror(error.errno or 0)}") from error
    try:
        os.fchmod(fd, MODE)  # the umask may have taken more away
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                at += os.write(fd, view[at:])
        os.fsync(fd)
        _sync_folder(filename)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(filename)
        raise CommandError(f"Could not write '{filename}': {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(fd)


def _sync_folder(filename: str) -> None:
    folder = os.open(Path(filename).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_backup(filename: str) -> bytes:
    """Return what a backup file holds. Raises CommandError."""
    try:
        fd = os.open(filename, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = os.fstat(fd).st_size
            if size > MAX_IMAGE:
                raise CommandError(f"'{filename}' has {size} bytes, a header backup has {MAX_IMAGE} at most")
            data = bytearray()
            while len(data) <= MAX_IMAGE:
                piece = os.read(fd, 1 * MiB)
                if not piece:
                    return bytes(data)
                data += piece
        finally:
            os.close(fd)
    except OSError as error:
        raise CommandError(f"Could not open '{filename}': {os.strerror(error.errno or 0)}") from error
    raise CommandError(f"'{filename}' is longer than {MAX_IMAGE} bytes, no header backup is")


class SavedFirst:
    """A header that is copied to a new file before the first write to it; if that fails, so does the write."""

    def __init__(self, target: HeaderIO, filename: str, *, detached: bool) -> None:
        self._target, self._filename, self._detached = target, filename, detached
        self._saved = False

    @property
    def size(self) -> int:
        """See `HeaderIO.size`."""
        return self._target.size

    async def pread(self, offset: int, length: int) -> bytearray:
        """See `HeaderIO.pread`."""
        return await self._target.pread(offset, length)

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See `HeaderIO.pwrite`. Raises CommandError as well."""
        if not self._saved:
            await save_header(self._target, self._filename, detached=self._detached)
            self._saved = True
        await self._target.pwrite(offset, data)

    async def flush(self) -> None:
        """See `HeaderIO.flush`."""
        await self._target.flush()


class Bytes:
    """A header in memory, to be read only: the content of a backup."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """See `HeaderIO.size`."""
        return len(self._data)

    async def pread(self, offset: int, length: int) -> bytearray:
        """See `HeaderIO.pread`."""
        return bytearray(self._data[offset : offset + length])

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Nobody writes to a backup."""
        raise AssertionError("a backup is not written to")

    async def flush(self) -> None:
        """Nothing to do."""
