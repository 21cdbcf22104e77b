"""block-stream: an image gets what the images below it hold, and needs them no more.

Options: qapi/block-job.json. While the job runs, a copy-on-read filter sees what goes to the image, so
that a copy never overwrites what is written meanwhile. Model: block/stream.c of QEMU.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, runtime_checkable

from qmpd.block import chain, insertion, reopen
from qmpd.block.backend import BlockBackend
from qmpd.block.backing import refresh_names
from qmpd.block.child import Child
from qmpd.block.filename import node_filename
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.jobs.block_job import BlockJob, pieces
from qmpd.jobs.chains import backing_format, device_name, find_image
from qmpd.jobs.job import JobManager
from qmpd.jobs.layers import Held, held_above
from qmpd.qapi.registry import command, jobtype
from qmpd.units import KiB, MiB

WINDOW = 64 * MiB
"""Bytes that are looked at as one."""

CHUNK = 512 * KiB
"""Bytes that are copied as one (STREAM_CHUNK)."""


UNCHANGING = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
"""What others may do to images that the job relies on."""


@runtime_checkable
class Prefetching(Protocol):
    """A filter that copies into its image what it is told to."""

    async def prefetch(self, offset: int, length: int) -> None:
        """Copy what of the range the image does not hold. Raises OSError."""


@jobtype("stream")
class StreamJob(BlockJob):
    """Streams one image.

    image   the image       bottom   the lowest image whose data is copied
    name    what the image is told its backing file is, None for that file's own name
    """

    job_type = "stream"

    def __init__(
        self, manager: JobManager, job_id: str, image: BlockNode, bottom: BlockNode, on_error: str, **named: Any
    ) -> None:
        self.name: str | None = named.pop("backing_file", None)
        self.mask: bool = named.pop("mask", False)
        super().__init__(manager, job_id, **named)
        self.image, self.bottom, self.on_error = image, bottom, on_error
        self.was_read_only = False
        self._filter: BlockNode | None = None
        self._reader: BlockBackend | None = None

    async def prepare_graph(self, filter_name: str | None) -> None:
        """Make the image writable, and put the filter above it. Raises QmpdError."""
        graph = self.image.graph
        self.was_read_only = self.image.read_only
        await reopen.set_read_only(graph, self.image, False)
        tree: dict[str, Any] = {"driver": "copy-on-read", "file": self.image.name, "bottom": self.bottom.name}
        above = await insertion.open_above(graph, self.image, tree, filter_name, self._take)
        self._reader = self.new_backend(above, Perm.CONSISTENT_READ, Perm.ALL)
        self.hold("main node", above)
        self.hold("active node", self.image, UNCHANGING | Perm.WRITE)
        for node, _ in list(chain.links(self.image, self._base))[1:]:
            self.hold("intermediate node", node, UNCHANGING)

    def _take(self, above: BlockNode) -> None:
        self._filter = above

    @property
    def _base(self) -> BlockNode | None:
        """The node below the lowest image that is copied, None if there is none."""
        edge = chain.link_below(self.bottom)
        return edge.node if edge is not None else None

    async def run(self) -> None:
        """Copy from the start to the end."""
        backend, base = self._reader, self._base
        assert backend is not None
        if self.bottom is self.image:
            return  # nothing lies between the image and the base
        self.total = self.image.size
        for offset in range(0, self.total, WINDOW):
            await self.pause_point()
            end = min(offset + WINDOW, self.total)
            look = partial(backend.visit, partial(self._lacking, base, offset, end - offset))
            lacking = await self.attempt(look, self.on_error, reading=True)
            for at, stop in pieces(lacking or (), CHUNK):
                await self.pause_point()
                self.current = at
                step = partial(backend.visit, partial(self._fetch, at, stop - at))
                await self.attempt(step, self.on_error, reading=True)
                await self.pace(stop - at)
            self.current = end
        if self.ignored is not None:
            raise self.ignored

    async def _lacking(self, base: BlockNode | None, offset: int, length: int, _: Child) -> list[tuple[int, int]]:
        """Return what of a range the image lacks, and an image between it and the base holds: (offset, length)."""
        below = chain.backing_of(self.image)
        if below is None:
            return []
        return [
            (one.offset, one.length)
            for mine in await held_above(self.image, below, offset, length)
            if mine.held is Held.BELOW
            for one in await held_above(below, base, mine.offset, mine.length)
            if one.held is not Held.BELOW
        ]

    @staticmethod
    async def _fetch(offset: int, length: int, root: Child) -> None:
        assert isinstance(root.node, Prefetching)
        await root.node.prefetch(offset, length)

    async def commit(self) -> None:
        """Take the filter away, and the images that are not needed."""
        graph, image = self.image.graph, self.image
        base = self._base
        await self._drop_filter()
        edge = image.children.get("backing")
        if edge is None:
            return
        dropped = edge.node
        async with graph.drained(image):
            shown, image_format = "", ""
            if base is not None:
                unfiltered = chain.image_of(base)
                shown = self.name if self.name is not None else node_filename(unfiltered)
                image_format = backing_format(unfiltered, mask=self.mask)
            # If the image cannot be told, everything stays as it is: it holds what it needs either way.
            await graph.runner.run(image.change_backing_file(shown, image_format))
            with graph.change() as tran:
                if base is None:
                    tran.detach(edge)
                elif edge.node is not base:
                    tran.replace(edge, base)
        refresh_names([image])
        await graph.drop_unreferenced(dropped)

    async def _drop_filter(self) -> None:
        await self.drop_backends()
        above, self._filter = self._filter, None
        if above is not None:
            await self.take_out(above)

    async def clean(self) -> None:
        """Take the filter away, if it is still there, and make the image what it was."""
        await self._drop_filter()
        if self.was_read_only:
            await reopen.set_read_only(self.image.graph, self.image, True)
        await self.let_go()


@command("block-stream")
async def block_stream(
    ctx: Context,
    *,
    device: str,
    job_id: str | None = None,
    base: str | None = None,
    base_node: str | None = None,
    backing_file: str | None = None,
    backing_mask_protocol: bool = False,
    bottom: str | None = None,
    speed: int = 0,
    on_error: str = "report",
    filter_node_name: str | None = None,
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
) -> None:
    """Start the job that makes an image independent of images below it."""
    graph = ctx.graph
    if base is not None and base_node is not None:
        raise CommandError("'base' and 'base-node' cannot be specified at the same time")
    if base is not None and bottom is not None:
        raise CommandError("'base' and 'bottom' cannot be specified at the same time")
    if bottom is not None and base_node is not None:
        raise CommandError("'bottom' and 'base-node' cannot be specified at the same time")
    image = graph.lookup(device, device)
    below = _base_of(graph, image, device, base, base_node)
    lowest = _lowest(graph, image, device, below, bottom)
    for node in [image, *(edge.node for _, edge in chain.links(image, lowest))]:
        graph.check_blocked(node, in_chain=True)
    if below is None and bottom is None and backing_file is not None:
        raise CommandError("backing file specified, but streaming the entire chain")
    job = StreamJob(
        ctx.jobs,
        device_name(image) if job_id is None else job_id,
        chain.image_of(image),
        lowest,
        on_error,
        backing_file=backing_file,
        mask=backing_mask_protocol,
        speed=speed,
        auto_finalize=auto_finalize,
        auto_dismiss=auto_dismiss,
    )
    await ctx.jobs.begin(job, lambda: job.prepare_graph(filter_node_name))


def _base_of(graph: Graph, image: BlockNode, device: str, base: str | None, base_node: str | None) -> BlockNode | None:
    if base is not None:
        found = find_image(image, base)
        if found is None:
            raise CommandError(f"Can't find '{base}' in the backing chain")
        return found
    if base_node is not None:
        node = graph.lookup(None, base_node)
        if node is image or not chain.contains(image, node):
            raise CommandError(f"Node '{base_node}' is not a backing image of '{device}'")
        return node
    return None


def _lowest(graph: Graph, image: BlockNode, device: str, base: BlockNode | None, bottom: str | None) -> BlockNode:
    """Return the lowest image that is copied from."""
    if bottom is not None:
        node = graph.lookup(None, bottom)
        if node.is_filter:
            raise CommandError(f"Node '{bottom}' is a filter, use a non-filter node as 'bottom'")
        if not chain.contains(image, node):
            raise CommandError(f"Node '{bottom}' is not in a chain starting from '{device}'")
        return node
    lowest = chain.image_of(image)
    stop = None if base is None else chain.image_of(base)
    while (below := chain.backing_of(lowest)) is not None and below is not stop:
        lowest = below
    return lowest
