"""file, host_device: the ends of the graph on this host.

Options: BlockdevOptionsFile (qapi/block-drivers.json). Image locks: aio/locks.py. With
auto-read-only the file is opened for reading until somebody needs to write; it is then opened
again through its descriptor, never by name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qmpd.aio import locks
from qmpd.aio.disk import DIRECT_ALIGNMENT, DiskFile, open_fd
from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.change import Transaction
from qmpd.block.direct import DirectRead
from qmpd.block.node import BlockNode, Extent, ReopenStep
from qmpd.block.options import NodeOptions
from qmpd.block.perm import Perm
from qmpd.errors import CommandError, FileTooLarge
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR, align_up


@dataclass(frozen=True, slots=True, eq=False)
class FileOptions:
    """BlockdevOptionsFile; `aio` and the cache checks have no effect on how we do I/O."""

    filename: str
    pr_manager: str | None = None
    locking: str = "auto"
    aio: str = "threads"
    aio_max_batch: int = 0
    drop_cache: bool = True
    x_check_cache_dropped: bool = False


class _Descriptor(NamedTuple):
    """A descriptor of the file that is to take the place of the present one."""

    fd: int
    writes: bool
    direct: bool


@driver("file", schema="BlockdevOptionsFile", options=FileOptions)
class FileNode(BlockNode):
    """A regular file."""

    is_protocol = True
    strong_options = ("filename",)
    reopens = True
    reopen_takes = ("drop-cache", "x-check-cache-dropped")
    reopen_resets = ("x-check-cache-dropped",)
    format_name = "file"

    disk: DiskFile

    @staticmethod
    def check_options(members: Mapping[str, Any]) -> None:
        """Refuse an empty name before anything else is looked at."""
        if not members["filename"]:
            raise CommandError("The 'file' block driver requires a file name")

    async def open(self, options: FileOptions) -> None:
        """Open the file, read-only if that is all there is and auto-read-only allows it."""
        direct = bool(self.node_options.cache_direct)
        if options.aio == "native" and not direct:
            raise CommandError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        if options.pr_manager is not None:
            raise CommandError(f"No persistent reservation manager with id '{options.pr_manager}'")
        self.path = options.filename
        self._next: _Descriptor | None = None
        self._held = (Perm.NONE, Perm.ALL)
        self._discards = [0, 0, 0]
        self.outside = Perm.NONE
        fd = await self._open_path(direct)
        try:
            self._check_kind(os.fstat(fd).st_mode)
            self.disk = DiskFile(fd, direct=direct)
        except BaseException:
            os.close(fd)
            raise
        self.size = align_up(self.disk.size, SECTOR)
        self.supports_fua = True
        self.request_alignment = DIRECT_ALIGNMENT if direct else 1
        try:
            self._locking = options.locking != "off" and self._lockable(options.locking)
        except CommandError:
            self.disk.close()
            raise

    async def _open_path(self, direct: bool) -> int:
        flags = os.O_DIRECT if direct else 0
        automatic = bool(self.node_options.auto_read_only)
        if self.read_only or automatic:
            try:
                fd = await open_fd(self.path, os.O_RDONLY | flags)
            except OSError as error:
                raise self._refusal(error, direct) from error
            if not self.read_only and not os.access(f"/proc/self/fd/{fd}", os.W_OK):
                self.read_only = True
            self._writes = False
            return fd
        try:
            fd = await open_fd(self.path, os.O_RDWR | flags)
        except OSError as error:
            raise self._refusal(error, direct) from error
        self._writes = True
        return fd

    def _refusal(self, error: OSError, direct: bool) -> CommandError:
        if error.errno == errno.EINVAL and direct:
            return CommandError(f"Could not open '{self.path}': filesystem does not support O_DIRECT")
        return CommandError(f"Could not open '{self.path}': {os.strerror(error.errno or errno.EIO)}")

    def _check_kind(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise CommandError(f"'file' driver requires '{self.path}' to be a regular file")

    def _lockable(self, locking: str) -> bool:
        if locks.available(self.disk.fd):
            return True
        if locking == "on":
            raise CommandError("File lock is not supported by the file system")
        return False

    async def close(self) -> None:
        """Close the descriptor; the locks go with it."""
        self.disk.close()

    # --- permissions ------------------------------------------------------------------------------

    def check_perm(self, perm: Perm, shared: Perm) -> None:
        """Take the image locks of the new permissions beside the old ones, or refuse."""
        writes = self._writes if self._next is None else self._next.writes
        if perm & (Perm.WRITE | Perm.WRITE_UNCHANGED) and not writes:
            self._replace(self._reopen(os.O_RDWR, self._direct), writes=True, direct=self._direct)
        shared &= ~self.outside
        self._wanted = (perm, shared)
        if not self._locking or (self._wanted == self._held and self._next is None):
            return
        old_perm, old_shared = self._held
        try:
            locks.apply(self.disk.fd, perm | old_perm, ~shared | ~old_shared, release=False)
            locks.check(self.disk.fd, perm, ~shared, self.path)
            if self._next is not None:
                locks.apply(self._next.fd, perm, ~shared, release=False)
        except CommandError:
            self.abort_perm()
            raise

    def flock_descriptor(self) -> int | None:
        """Return a descriptor of its own for whole-file locks, which the caller closes; None without locking."""
        return self._reopen(os.O_RDONLY, self.disk.direct) if self._locking else None

    def _reopen(self, flags: int, direct: bool) -> int:
        """Return a new descriptor of the file. Raises CommandError."""
        if direct:
            flags |= os.O_DIRECT
        try:
            return os.open(f"/proc/self/fd/{self.disk.fd}", flags | os.O_CLOEXEC)
        except OSError as error:
            raise self._refusal(error, direct) from error

    @property
    def _direct(self) -> bool:
        """True if I/O is to be direct from the present change on."""
        return self.disk.direct if self._next is None else self._next.direct

    def _replace(self, fd: int, *, writes: bool, direct: bool) -> None:
        """Go over to a descriptor when the present change is final."""
        if self._next is not None:
            os.close(self._next.fd)
        self._next = _Descriptor(fd, writes, direct)

    async def prepare_reopen(self, options: FileOptions, generic: NodeOptions) -> ReopenStep:
        """Another descriptor will be needed if direct I/O, or whether the file is written to, changes."""
        return self._become

    def _become(self, tran: Transaction) -> None:
        """Open the file as the node's options, which were just set, have it. Raises CommandError."""
        direct = bool(self.node_options.cache_direct)
        automatic = bool(self.node_options.auto_read_only)
        if automatic and not self.read_only and not os.access(f"/proc/self/fd/{self.disk.fd}", os.W_OK):
            self.read_only = True
        if self.read_only:
            writes = False
        else:
            writes = self._writes if automatic else True
        if (writes, direct) != (self._writes, self.disk.direct):
            flags = os.O_RDWR if writes else os.O_RDONLY
            self._replace(self._reopen(flags, direct), writes=writes, direct=direct)
            tran.on_undo(self._forget_next)
        alignment, self.request_alignment = self.request_alignment, DIRECT_ALIGNMENT if direct else 1

        def restore() -> None:
            self.request_alignment = alignment

        tran.on_undo(restore)

    def commit_perm(self) -> None:
        """Release the locks that are no longer needed, and use the descriptor that can write."""
        if self._next is not None:
            fd, self._writes, direct = self._next
            self._next = None
            self.disk.switch(fd, direct=direct)
        perm, shared = self._wanted
        if self._locking:
            locks.apply(self.disk.fd, perm, ~shared, release=True)
        self._held = self._wanted

    def abort_perm(self) -> None:
        """Go back to the locks that were held."""
        self._forget_next()
        if self._locking:
            perm, shared = self._held
            locks.apply(self.disk.fd, perm, ~shared, release=True)

    def _forget_next(self) -> None:
        if self._next is not None:
            os.close(self._next.fd)
            self._next = None

    # --- I/O --------------------------------------------------------------------------------------

    async def preadv(self, batch: Batch) -> None:
        """Read from the page cache at once, the rest in threads."""
        await self.disk.preadv(batch)

    def direct_read(self) -> DirectRead | None:
        """Offsets are those of the file."""
        return DirectRead(self.disk)

    def direct_write(self) -> DirectRead | None:
        """Offsets are those of the file."""
        return None if self.disk.direct else DirectRead(self.disk)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write, growing the file where a request ends beyond it."""
        durable = bool(flags) and bool(flags & WriteFlags.FUA)  # `&` of an IntFlag is slow
        await self.disk.pwritev(batch, fua=durable and not self.node_options.cache_no_flush)
        self._grow(max(request.end for request in batch))

    def child_resized(self) -> None:
        """Notice that the file has become longer."""
        self._grow(self.disk.size)

    def _grow(self, end: int) -> None:
        if end > self.size:
            self.size = align_up(end, SECTOR)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero by fallocate; freeing the space only if the node's discard option lets it."""
        unmap = bool(flags & WriteFlags.MAY_UNMAP) and self.node_options.discard == "unmap"
        await self.disk.write_zeroes(offset, length, unmap=unmap)
        self._grow(offset + length)
        if flags & WriteFlags.FUA:
            await self.flush()

    async def pdiscard(self, offset: int, length: int) -> None:
        """Punch a hole; a file system without holes keeps the data."""
        try:
            await self.disk.punch(offset, length)
        except OSError as error:
            self._discards[1] += 1
            if error.errno != errno.ENOTSUP:
                raise
        else:
            self._discards[0] += 1
            self._discards[2] += length

    async def flush(self) -> None:
        """Sync, unless cache.no-flush says that durability does not matter."""
        if not self.node_options.cache_no_flush:
            await self.disk.sync()

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Report data and holes as the file system knows them."""
        found = await self.disk.extents(offset, length)
        return [Extent(at, size, data=data, zero=not data, host=at, file=self) for at, size, data in found]

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Set the length of the file. Raises CommandError."""
        if preallocation == "metadata":
            raise CommandError("Unsupported preallocation mode: metadata")
        try:
            await self.disk.truncate(size, preallocation)
        except OSError as error:
            kind = FileTooLarge if error.errno == errno.EFBIG else CommandError
            raise kind(f"Could not resize file: {os.strerror(error.errno or errno.EIO)}") from error
        self.size = align_up(size, SECTOR)

    # --- descriptions -----------------------------------------------------------------------------

    def exact_filename(self) -> str:
        """The path as it was given."""
        return str(self.given["filename"])

    def allocated_size(self) -> int:
        """Bytes in the file system."""
        return self.disk.allocated_size()

    def image_info(self) -> dict[str, Any]:
        """ImageInfoSpecificFile has no members that apply here."""
        return {"dirty-flag": False, "format-specific": {"type": "file", "data": {}}}

    def driver_stats(self) -> dict[str, Any]:
        """BlockStatsSpecificFile."""
        done, failed, total = self._discards
        return {"discard-nb-ok": done, "discard-nb-failed": failed, "discard-bytes-ok": total}


@driver("host_device", schema="BlockdevOptionsFile", options=FileOptions)
class HostDeviceNode(FileNode):
    """A block or character device."""

    @staticmethod
    def check_options(members: Mapping[str, Any]) -> None:
        """Refuse an empty name before anything else is looked at."""
        if not members["filename"]:
            raise CommandError("The 'host_device' block driver requires a file name")

    def _check_kind(self, mode: int) -> None:
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise CommandError(f"'host_device' driver requires '{self.path}' to be either a character or block device")

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """A device has the size it has; asking for less is granted when it need not be exact."""
        if exact and size != self.size:
            raise CommandError("Cannot resize device files")
        if size > self.size:
            raise CommandError("Cannot grow device files")
