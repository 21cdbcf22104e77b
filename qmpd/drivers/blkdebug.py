"""blkdebug: a filter that makes requests fail on purpose, and bends limits and permissions.

Options: BlockdevOptionsBlkdebug (qapi/block-drivers.json). The node above tells of events, such as
that it is about to load an L2 table; rules say which event arms which error for what comes next.
Model: QEMU block/blkdebug.c.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.child import Child
from qmpd.block.filename import MAX_FILENAME, exact_filename
from qmpd.block.filter import FilterNode
from qmpd.block.node import Extent
from qmpd.block.perm import ChildRole, Perm
from qmpd.block.ranges import ZERO_CHUNK
from qmpd.drivers._blkdebug_rules import InjectErrorOptions, Rules, SetStateOptions, read_config
from qmpd.errors import CommandError
from qmpd.qapi.registry import driver
from qmpd.units import align_down, align_up

INT_MAX = (1 << 31) - 1
_PERMS = {
    "consistent-read": Perm.CONSISTENT_READ,
    "write": Perm.WRITE,
    "write-unchanged": Perm.WRITE_UNCHANGED,
    "resize": Perm.RESIZE,
}

EVENTS = re.findall(
    r"\w+",
    """
    l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update
    l2_update_compressed l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio read_compressed
    write_aio write_compressed vmstate_load vmstate_save cow_read cow_write reftable_load reftable_grow
    reftable_update refblock_load refblock_update refblock_update_part refblock_alloc
    refblock_alloc_hookup refblock_alloc_write refblock_alloc_write_blocks refblock_alloc_write_table
    refblock_alloc_switch_table cluster_alloc cluster_alloc_bytes cluster_free flush_to_os flush_to_disk
    pwritev_rmw_head pwritev_rmw_after_head pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero
    pwritev_done empty_image_prepare l1_shrink_write_table l1_shrink_free_l2_clusters cor_write
    cluster_alloc_space none
""",
)
"""Values of BlkdebugEvent, for configuration files."""

KINDS = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
"""Values of BlkdebugIOType."""


@dataclass(frozen=True, slots=True)
class BlkdebugOptions:
    """BlockdevOptionsBlkdebug.

    config   path of a file with more rules
    align    of requests, and the sizes of the others: bytes; 0 leaves a limit as it is
    """

    image: Child
    config: str | None = None
    align: int = 0
    max_transfer: int = 0
    opt_write_zero: int = 0
    max_write_zero: int = 0
    opt_discard: int = 0
    max_discard: int = 0
    inject_error: list[InjectErrorOptions] | None = None
    set_state: list[SetStateOptions] | None = None
    take_child_perms: list[str] | None = None
    unshare_child_perms: list[str] | None = None


@driver("blkdebug", schema="BlockdevOptionsBlkdebug", options=BlkdebugOptions)
class BlkdebugNode(FilterNode):
    """Fails requests."""

    child_roles: ClassVar[Mapping[str, ChildRole]] = {"image": ChildRole.FILTERED | ChildRole.PRIMARY}
    has_protocol_name = True
    reopens = True
    strong_options = (
        "config",
        "inject-error.",
        "set-state.",
        "align",
        "max-transfer",
        "opt-write-zero",
        "max-write-zero",
        "opt-discard",
        "max-discard",
    )

    async def open(self, options: BlkdebugOptions) -> None:
        """Read the rules and check the limits."""
        inject: list[InjectErrorOptions] = []
        states: list[SetStateOptions] = []
        if options.config is not None:
            inject, states = read_config(options.config, EVENTS, KINDS)
        self.rules = Rules([*inject, *(options.inject_error or ())], [*states, *(options.set_state or ())])
        self.attach_file(options.image)
        _check_limits(options, self.file.node.request_alignment)
        self.options = options
        self.request_alignment = max(options.align, self.file.node.request_alignment)
        self.zero_alignment = max(options.opt_write_zero, self.file.node.zero_alignment)
        self.debug_event("none")

    def debug_event(self, event: str) -> None:
        """Arm the rules for an event of the node above."""
        self.rules.happened(event)

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Take more and share less than the parents do, as asked for."""
        for one in self.given.get("take-child-perms", ()):
            perm |= _PERMS[one]
        for one in self.given.get("unshare-child-perms", ()):
            shared &= ~_PERMS[one]
        return perm, shared

    async def preadv(self, batch: Batch) -> None:
        """Read what no rule hits."""
        good = self._admitted(batch, "read")
        end = align_up(self.file.size, self.file.node.request_alignment)
        if any(request.end > end for request in good):
            good = Batch(part for request in good for part in _inside(request, end))
        if good:
            await self.file.preadv(good)

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        """Write what no rule hits."""
        self.debug_event("pwritev")
        try:
            good = self._admitted(batch, "write")
            if good:
                await super().pwritev(good, flags)
        finally:
            self.debug_event("pwritev_done")

    def _admitted(self, batch: Batch, kind: str) -> Batch:
        """Return the requests that may go on, none longer than the limit; the others fail."""
        good = Batch()
        longest = self.options.max_transfer
        for request in batch:
            for part in _split(request, longest) if longest else (request,):
                error = self.rules.error_of(kind, part.offset, len(part.view))
                if error:
                    part.fail(error)
                else:
                    good.append(part)
        return good

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero whole units of the alignment for zeroes; what is around them is written as data."""
        self.debug_event("pwritev_zero")
        try:
            start, stop = self._units(offset, length, self.options.opt_write_zero)
            if (start, stop) != (offset, offset + length) and flags & WriteFlags.NO_FALLBACK:
                raise OSError(errno.ENOTSUP, "not aligned for zero writes")
            if start >= stop:
                await self._write_zero_bytes(offset, offset + length, flags)
                return
            await self._write_zero_bytes(offset, start, flags)

            async def zero(at: int, size: int) -> None:
                await FilterNode.pwrite_zeroes(self, at, size, flags)

            await self._in_pieces("write-zeroes", start, stop, self.options.max_write_zero, zero)
            await self._write_zero_bytes(stop, offset + length, flags)
        finally:
            self.debug_event("pwritev_done")

    async def _write_zero_bytes(self, start: int, stop: int, flags: WriteFlags) -> None:
        while start < stop:
            length = min(stop - start, ZERO_CHUNK)
            batch = Batch.single(start, memoryview(bytes(length)))
            good = self._admitted(batch, "write")
            if good:
                await super().pwritev(good, flags & WriteFlags.FUA)
            batch.raise_first()
            start += length

    async def pdiscard(self, offset: int, length: int) -> None:
        """Discard whole units of the alignment for discards."""
        start, stop = self._units(offset, length, self.options.opt_discard)
        if start < stop:
            await self._in_pieces("discard", start, stop, self.options.max_discard, super().pdiscard)

    def _units(self, offset: int, length: int, unit: int) -> tuple[int, int]:
        unit = max(unit, self.request_alignment)
        return align_up(offset, unit), align_down(offset + length, unit)

    async def _in_pieces(
        self, kind: str, start: int, stop: int, longest: int, work: Callable[[int, int], Coroutine[Any, Any, None]]
    ) -> None:
        while start < stop:
            length = min(stop - start, longest or stop - start)
            error = self.rules.error_of(kind, start, length)
            if error:
                raise OSError(error, "injected")
            await work(start, length)
            start += length

    async def flush(self) -> None:
        """Flush, unless a rule hits."""
        error = self.rules.error_of("flush", 0, 0)
        if error:
            raise OSError(error, "injected")
        await super().flush()

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Say what the child says, unless a rule hits."""
        error = self.rules.error_of("block-status", offset, length)
        if error:
            raise OSError(error, "injected")
        return await super().block_status(offset, length)

    def exact_filename(self) -> str:
        """blkdebug:CONFIG:IMAGE, if there are no other options."""
        if any(name not in ("image", "config") and self._is_strong(name) for name in self.given):
            return ""
        below = exact_filename(self.file.node)
        name = f"blkdebug:{self.given.get('config', '')}:{below}"
        return name if below and len(name.encode("utf-8", "surrogateescape")) <= MAX_FILENAME else ""

    def _is_strong(self, name: str) -> bool:
        return name in self.strong_options or f"{name}." in self.strong_options

    def allocated_size(self) -> int | None:
        """Not known, as the reference has it."""
        return None


def _split(request: Request, longest: int) -> list[Request]:
    length = len(request.view)
    if length <= longest:
        return [request]
    return [request.part(request.offset + at, at, min(longest, length - at)) for at in range(0, length, longest)]


def _inside(request: Request, end: int) -> list[Request]:
    """Return the part of a read before `end`, if any; what is behind reads as zeroes."""
    there = max(end - request.offset, 0)
    if there >= len(request.view):
        return [request]
    request.view[there:] = bytes(len(request.view) - there)
    return [request.part(request.offset, 0, there)] if there else []


def _check_limits(options: BlkdebugOptions, below: int) -> None:
    """Refuse limits that contradict each other. Raises CommandError."""
    align = options.align
    _check("align", align, not align & align - 1)
    align = max(align, below)
    _check("max-transfer", options.max_transfer, not options.max_transfer % align)
    _check("opt-write-zero", options.opt_write_zero, not options.opt_write_zero % align)
    _check("max-write-zero", options.max_write_zero, not options.max_write_zero % max(options.opt_write_zero, align))
    _check("opt-discard", options.opt_discard, not options.opt_discard % align)
    _check("max-discard", options.max_discard, not options.max_discard % max(options.opt_discard, align))


def _check(name: str, value: int, fits: bool) -> None:
    if value < 0:
        raise CommandError(f"Value '{value}' is out of range for parameter '{name}'")
    if value and (value >= INT_MAX or not fits):
        raise CommandError(f"Cannot meet constraints with {name} {value}")
