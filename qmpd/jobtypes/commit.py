"""block-commit: images of a chain are written into one below them. Model: block/commit.c of QEMU.

What nobody writes to is copied once (`CommitJob`); an image in use is mirrored (`ActiveCommitJob`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ClassVar

from qmpd.block import chain, insertion, reopen
from qmpd.block.backend import BlockBackend
from qmpd.block.backing import refresh_names
from qmpd.block.batch import WriteFlags
from qmpd.block.change import cumulative
from qmpd.block.child import Child
from qmpd.block.filename import node_filename
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.block.perm import ChildRole, Perm
from qmpd.context import Context
from qmpd.errors import CommandError, DeviceNotFound
from qmpd.jobs.block_job import BlockJob, pieces
from qmpd.jobs.chains import (
    backing_format,
    device_name,
    find_image,
    lowest_image,
    overlay_of,
    root_of,
)
from qmpd.jobs.job import JobManager
from qmpd.jobs.layers import Held, Stretch, held_above
from qmpd.jobs.mirror import Mirror, MirrorOptions
from qmpd.qapi.registry import command, jobtype
from qmpd.units import KiB, MiB

WINDOW = 64 * MiB
"""Bytes that are looked at as one."""

CHUNK = 512 * KiB
"""Bytes that are copied as one (COMMIT_BUFFER_SIZE)."""


class CommitFilter(insertion.JobFilter):
    """Above what is committed: the images below may be written to, and nobody sees them but through here."""

    driver_name: ClassVar[str] = "commit_top"

    def child_perm(self, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Take nothing, share everything."""
        return Perm.NONE, Perm.ALL


class ActiveCommitJob(Mirror):
    """Commits an image in use."""

    job_type = "commit"
    commits = True


@jobtype("commit")
class CommitJob(BlockJob):
    """Commits images from `top` down into `base`; `overlay` is the one above them.

    name    what the image above is told its backing file is, None for that file's own name
    """

    job_type = "commit"

    def __init__(
        self,
        manager: JobManager,
        job_id: str,
        top: BlockNode,
        base: BlockNode,
        on_error: str,
        *,
        name: str | None,
        mask: bool,
        **named: Any,
    ) -> None:
        super().__init__(manager, job_id, **named)
        self.top, self.base, self.on_error, self.name, self.mask = top, base, on_error, name, mask
        self.was_read_only = False
        self._filter: insertion.JobFilter | None = None
        self._reader: BlockBackend | None = None
        self._writer: BlockBackend | None = None
        self._frozen: list[Child] = []

    async def prepare_graph(self, filter_name: str | None) -> None:
        """Make the base writable, and put the filter above what is committed. Raises QmpdError."""
        graph = self.top.graph
        self.was_read_only = self.base.read_only
        await reopen.set_read_only(graph, self.base, False)
        made = insertion.new_filter(graph, CommitFilter, filter_name, self.top)
        await insertion.insert(graph, made, self.top)
        self._filter = made
        self.hold("main node", made)
        for node, _ in chain.links(self.top, self.base):
            self.hold("intermediate node", node)
        self._frozen = chain.freeze(made, self.base)
        self.hold("base", self.base)
        for edge in list(made.parents):
            if isinstance(edge.parent, BlockNode):
                self.hold("overlay", edge.parent)
        taken = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
        lets = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        self._writer = self.new_backend(self.base, taken, lets)
        self._reader = self.new_backend(self.top, Perm.NONE, Perm.ALL)

    async def run(self) -> None:
        """Copy from the start to the end."""
        assert self._reader is not None
        assert self._writer is not None
        self.total = self.top.size
        if self.base.size < self.total:
            await self._writer.truncate(self.total)
        for offset in range(0, self.total, WINDOW):
            await self.pause_point()
            end = min(offset + WINDOW, self.total)
            look = partial(held_above, self.top, self.base, offset, end - offset)
            stretches = await self.attempt(partial(self._visit, look), self.on_error, reading=True)
            for one in stretches or ():
                if one.held is Held.BELOW:
                    continue
                for at, stop in pieces([(one.offset, one.length)], CHUNK if one.held is Held.DATA else WINDOW):
                    await self.pause_point()
                    self.current = at
                    await self._copy(at, stop - at, one.held)
                    await self.pace(stop - at)
            self.current = end
        if self.ignored is not None:
            raise self.ignored  # images must not go while the base lacks something of theirs
        await self._writer.flush()

    async def _copy(self, offset: int, length: int, held: Held) -> None:
        """Write a piece into the base."""
        assert self._reader is not None
        assert self._writer is not None
        if held is Held.ZERO:
            zero = partial(self._writer.pwrite_zeroes, offset, length, WriteFlags.MAY_UNMAP)
            await self.attempt(zero, self.on_error, reading=False)
            return
        data = await self.attempt(partial(self._reader.pread, offset, length), self.on_error, reading=True)
        if data is not None:
            await self.attempt(partial(self._writer.pwrite, offset, data), self.on_error, reading=False)

    async def _visit(self, work: Callable[[], Coroutine[Any, Any, list[Stretch]]]) -> list[Stretch]:
        assert self._reader is not None
        return await self._reader.visit(lambda _: work())

    async def commit(self) -> None:
        """Have the image above use the base, and say so."""
        graph, above = self.top.graph, self._filter
        assert above is not None
        chain.thaw(self._frozen)
        await self.drop_backends()
        overlays = [edge.parent for edge in above.parents if edge.name == "backing"]
        async with graph.drained(above):
            shown = self.name if self.name is not None else node_filename(self.base)
            image_format = backing_format(self.base, mask=self.mask)
            for overlay in overlays:
                if isinstance(overlay, BlockNode) and overlay.supports_backing:
                    read_only = overlay.read_only
                    await reopen.set_read_only(graph, overlay, False)
                    try:
                        await graph.runner.run(overlay.change_backing_file(shown, image_format))
                    finally:
                        await reopen.set_read_only(graph, overlay, read_only)
            with graph.change() as tran:
                insertion.move_parents(tran, above, self.base)
        refresh_names([self.base])
        self._filter = None
        await self.let_go()
        await graph.drop_unreferenced(above)

    async def clean(self) -> None:
        """Take the filter away, if it is still there, and make the base what it was."""
        graph = self.top.graph
        chain.thaw(self._frozen)
        await self.drop_backends()
        above, self._filter = self._filter, None
        if above is not None:
            await self.take_out(above)
        if self.was_read_only and graph.get(self.base.name) is self.base:
            await reopen.set_read_only(graph, self.base, True)
        await self.let_go()


@command("block-commit")
async def block_commit(
    ctx: Context,
    *,
    device: str,
    job_id: str | None = None,
    base_node: str | None = None,
    base: str | None = None,
    top_node: str | None = None,
    top: str | None = None,
    backing_file: str | None = None,
    backing_mask_protocol: bool = False,
    speed: int = 0,
    on_error: str = "report",
    filter_node_name: str | None = None,
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
) -> None:
    """Start the job that writes images into one below them."""
    graph = ctx.graph
    root = _root(graph, device)
    graph.check_blocked(root, in_chain=True)
    upper = _top(graph, root, top_node, top)
    lower = _base(graph, upper, base_node, base)
    for node in [upper, *(edge.node for _, edge in chain.links(upper, lower))]:
        graph.check_blocked(node, in_chain=True)
    if upper is lower:
        raise CommandError("cannot commit an image into itself")
    name = device_name(root) if job_id is None else job_id
    named: dict[str, Any] = {"speed": speed, "auto_finalize": auto_finalize, "auto_dismiss": auto_dismiss}
    active = chain.image_of(upper) is chain.image_of(root)
    if active or cumulative(upper)[0] & Perm.WRITE:
        if backing_file is not None:
            why = "'top' is the active layer" if active else "'top' has a writer on it"
            raise CommandError(f"'backing-file' specified, but {why}")
        options = MirrorOptions(above=lower, on_source_error=on_error, on_target_error=on_error)
        mirror = ActiveCommitJob(ctx.jobs, name, upper, lower, options, **named)
        await ctx.jobs.begin(mirror, lambda: mirror.prepare_graph(filter_node_name))
        return
    overlay = overlay_of(root, upper)
    if overlay is not None:
        graph.check_blocked(overlay, in_chain=True)
    job = CommitJob(ctx.jobs, name, upper, lower, on_error, name=backing_file, mask=backing_mask_protocol, **named)
    await ctx.jobs.begin(job, lambda: job.prepare_graph(filter_node_name), created_first=True)


def _root(graph: Graph, device: str) -> BlockNode:
    try:
        graph.lookup(device, device)
    except CommandError as error:
        raise DeviceNotFound(f"Device '{device}' not found") from error
    return root_of(graph, device)


def _top(graph: Graph, root: BlockNode, node_name: str | None, name: str | None) -> BlockNode:
    if node_name is not None and name is not None:
        raise CommandError("'top-node' and 'top' are mutually exclusive")
    if node_name is not None:
        node = graph.lookup(None, node_name)
        if not chain.contains(root, node):
            raise CommandError(f"'{node_name}' is not in this backing file chain")
        return node
    if name is None or name == node_filename(root):
        return root
    found = find_image(root, name)
    if found is None:
        raise CommandError(f"Top image file {name} not found")
    return found


def _base(graph: Graph, top: BlockNode, node_name: str | None, name: str | None) -> BlockNode:
    if node_name is not None and name is not None:
        raise CommandError("'base-node' and 'base' are mutually exclusive")
    if node_name is not None:
        node = graph.lookup(None, node_name)
        if not chain.contains(top, node):
            raise CommandError(f"'{node_name}' is not in this backing file chain")
        return node
    if name is not None:
        found = find_image(top, name)
        if found is None:
            raise CommandError(f"Can't find '{name}' in the backing chain")
        return found
    return lowest_image(top)
