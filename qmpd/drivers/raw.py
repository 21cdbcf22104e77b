"""raw: a byte window onto its file child, otherwise a pass-through.

Options: BlockdevOptionsRaw (qapi/block-drivers.json). Messages: as the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qmpd.block.backend import check_length
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.change import Transaction
from qmpd.block.child import Child
from qmpd.block.defaults import default_child_perm
from qmpd.block.direct import DirectRead
from qmpd.block.node import BlockNode, Extent, ReopenStep
from qmpd.block.options import NodeOptions
from qmpd.block.perm import ChildRole, Perm
from qmpd.errors import CommandError
from qmpd.qapi.registry import driver
from qmpd.units import SECTOR, align_up


@dataclass(frozen=True, slots=True, eq=False)
class RawOptions:
    """BlockdevOptionsRaw.

    offset  bytes into the child          size  bytes; None means to the end of the child
    """

    file: Child
    offset: int | None = None
    size: int | None = None


def _window(options: RawOptions) -> tuple[int, int]:
    """Return size and alignment of the node. Raises CommandError for a window that reaches beyond the child."""
    start, window, available = options.offset or 0, options.size, options.file.size
    if start < 0:
        raise CommandError(f"Value '{start}' is out of range for parameter 'offset'")
    if window is not None and window < 0:
        raise CommandError(f"Value '{window}' is out of range for parameter 'size'")
    if start > available:
        raise CommandError(f"Offset ({start}) cannot be greater than size of the containing file ({available})")
    if window is not None and window > available - start:
        raise CommandError(
            f"The sum of offset ({start}) and size ({window}) has to be smaller or equal to the  "
            f"actual size of the containing file ({available})"
        )
    if window is not None and window % SECTOR:
        raise CommandError("Specified size is not multiple of 512")
    below = options.file.node.request_alignment
    size = align_up(available - start, SECTOR) if window is None else window
    return size, 1 if start % below else below


@driver("raw", schema="BlockdevOptionsRaw", options=RawOptions)
class RawNode(BlockNode):
    """A window onto another node."""

    child_roles: ClassVar[Mapping[str, ChildRole]] = {"file": ChildRole.DATA | ChildRole.PRIMARY}
    opens_alone = True
    reopens = True
    reopen_takes = reopen_resets = strong_options = ("offset", "size")

    async def open(self, options: RawOptions) -> None:
        """Check that the window lies within the child."""
        self.file, self.start, self.window = options.file, options.offset or 0, options.size
        self.size, self.request_alignment = _window(options)
        self.supports_fua = True

    async def prepare_reopen(self, options: RawOptions, generic: NodeOptions) -> ReopenStep:
        """Check that the other window lies within the child."""
        size, alignment = _window(options)

        def step(tran: Transaction) -> None:
            old = self.start, self.window, self.size, self.request_alignment

            def restore() -> None:
                self.start, self.window, self.size, self.request_alignment = old

            self.start, self.window = options.offset or 0, options.size
            self.size, self.request_alignment = size, alignment
            tran.on_undo(restore)

        return step

    @property
    def windowed(self) -> bool:
        """True if the node shows a part of its child only."""
        return "offset" in self.given or "size" in self.given

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Pass everything through; a window also forbids others to resize what it is cut from."""
        if not self.windowed:
            return perm, shared
        wanted, lets = default_child_perm(self, name, role, perm, shared)
        return (wanted & ~(Perm.WRITE | Perm.RESIZE)) | (perm & (Perm.WRITE | Perm.RESIZE)), lets

    async def preadv(self, batch: Batch) -> None:
        """Read from the child; an unaligned offset leaves part of the last sector without one."""
        shifted = batch.shifted(self.start)
        if self.start % SECTOR and any(request.end > self.file.size for request in shifted):
            shifted = Batch(self._within(request) for request in shifted)
        self.file.debug_event("read_aio")
        await self.file.preadv(shifted)

    def direct_read(self) -> DirectRead | None:
        """A raw node adds its offset."""
        below = self.file.node.direct_read()
        return below and below.shifted(self.start)

    def direct_write(self) -> DirectRead | None:
        """A raw node adds its offset."""
        below = self.file.node.direct_write()
        return below and below.shifted(self.start)

    def _within(self, request: Request) -> Request:
        there = self.file.size - request.offset
        if there >= len(request.view):
            return request
        request.view[there:] = bytes(len(request.view) - there)
        return request.part(request.offset, 0, there)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write to the child."""
        self.file.debug_event("write_aio")
        await self.file.pwritev(batch.shifted(self.start), flags)
        self._follow()

    def child_resized(self) -> None:
        """Follow the child."""
        self._follow()

    def _follow(self) -> None:
        """Grow with the child, as a plain raw node does while a format above allocates."""
        if self.window is None:
            self.size = align_up(self.file.size - self.start, SECTOR)

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero in the child."""
        await self.file.pwrite_zeroes(self.start + offset, length, flags)
        self._follow()

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard in the child."""
        await self.file.pdiscard(self.start + offset, length)

    async def flush(self) -> None:
        """Flush the child."""
        await self.file.flush()

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Report what the child has there."""
        found = await self.file.block_status(self.start + offset, length)
        return [extent._replace(offset=extent.offset - self.start) for extent in found]

    def image_info(self) -> dict[str, Any]:
        """What the child says of its clusters; a raw node has no format of its own."""
        below = self.file.node.image_info()
        return {name: below[name] for name in ("cluster-size", "dirty-flag") if name in below}

    async def truncate(self, size: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Resize the child; a window of fixed size stays as it is."""
        if self.window is not None:
            raise CommandError("Cannot resize fixed-size raw disks")
        if size + self.start >= 1 << 63:
            raise CommandError("Disk size too large for the chosen offset")
        check_length(size + self.start)
        await self.file.node.truncate(size + self.start, exact=exact, preallocation=preallocation)
        self.size = size
