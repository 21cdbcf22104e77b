"""blockdev-mirror: the options of the job that is in `qmpd.jobs.mirror`. Model: blockdev_mirror_common (blockdev.c)."""

from __future__ import annotations

from qmpd.block import chain
from qmpd.block.graph import Graph
from qmpd.block.node import BlockNode
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.jobs.chains import device_name, root_of
from qmpd.jobs.mirror import Mirror, MirrorOptions
from qmpd.qapi.registry import command, jobtype
from qmpd.units import MiB

SMALLEST, LARGEST = 512, 64 * MiB


@jobtype("mirror")
class MirrorJob(Mirror):
    """Mirrors one node."""


@command("blockdev-mirror")
async def blockdev_mirror(
    ctx: Context,
    *,
    device: str,
    target: str,
    sync: str,
    job_id: str | None = None,
    replaces: str | None = None,
    speed: int = 0,
    granularity: int = 0,
    buf_size: int = 0,
    on_source_error: str = "report",
    on_target_error: str = "report",
    filter_node_name: str | None = None,
    copy_mode: str = "background",
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
) -> None:
    """Start the job that keeps a node equal to another one."""
    graph = ctx.graph
    source = root_of(graph, device)
    to = graph.lookup(target, target)
    if granularity and not SMALLEST <= granularity <= LARGEST:
        raise CommandError("Parameter 'granularity' expects a value in range [512B, 64MB]")
    if granularity & (granularity - 1):
        raise CommandError("Parameter 'granularity' expects a power of 2")
    graph.check_blocked(source)
    graph.check_blocked(to)
    below = chain.backing_of(chain.image_of(source))
    if sync == "top" and below is None:
        sync = "full"
    replaced = None if replaces is None else _to_replace(graph, source, replaces)
    if sync in ("incremental", "bitmap"):
        raise CommandError(f"Sync mode '{sync}' not supported")
    if buf_size < 0:
        raise CommandError("Invalid parameter 'buf-size'")
    if source is to:
        raise CommandError("Can't mirror node into itself")
    options = MirrorOptions(
        replaces=replaced,
        granularity=granularity or None,
        on_source_error=on_source_error,
        on_target_error=on_target_error,
        blocking=copy_mode == "write-blocking",
        above=below if sync == "top" else None,
        everything=sync == "full",
        nothing=sync == "none",
    )
    job = MirrorJob(
        ctx.jobs,
        device_name(source) if job_id is None else job_id,
        source,
        to,
        options,
        speed=speed,
        auto_finalize=auto_finalize,
        auto_dismiss=auto_dismiss,
    )
    await ctx.jobs.begin(job, lambda: job.prepare_graph(filter_node_name))


def _to_replace(graph: Graph, source: BlockNode, name: str) -> BlockNode:
    """Return the node whose place the target is to take (check_to_replace_node). Raises CommandError."""
    node = graph.find_node(name)
    graph.check_blocked(node)
    shown = source
    while shown is not node and shown.is_filter and (edge := shown.primary()) is not None:
        shown = edge.node
    if shown is not node:
        raise CommandError(
            f"Cannot replace '{name}' by a node mirrored from '{source.name}', because it cannot be guaranteed that "
            "doing so would not lead to an abrupt change of visible data"
        )
    if node.size != source.size:
        raise CommandError("cannot replace image with a mirror image of different size")
    return node
