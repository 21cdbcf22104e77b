"""The handler of x-blockdev-set-iothread in qapi/block-core.json. Model: qmp_x_blockdev_set_iothread of QEMU."""

from __future__ import annotations

from qmpd.block.backend import BlockBackend
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.qapi.registry import command


@command("x-blockdev-set-iothread")
async def x_blockdev_set_iothread(ctx: Context, *, node_name: str, iothread: str | None, force: bool = False) -> None:
    """Check a move of a node to another loop; all nodes stay on the one loop that there is for data."""
    node = ctx.graph.find_node(node_name)
    if not force and any(isinstance(edge.parent, BlockBackend) for edge in node.parents):
        raise CommandError(
            f"Node {node_name} is associated with a BlockBackend and could be in use (use force=true to override this "
            "check)"
        )
    if iothread:
        found = ctx.objects.get(iothread)
        if found is None or found.qom_type != "iothread":
            raise CommandError(f"Cannot find iothread {iothread}")
