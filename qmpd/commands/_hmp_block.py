"""Commands for people about nodes, drives and media."""

from __future__ import annotations

from typing import Any

from qmpd.block.backend import BlockBackend
from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.commands import _hmp_dump, _qemu_io
from qmpd.commands._hmp_call import qmp
from qmpd.commands._hmp_table import hmp, info
from qmpd.context import Context
from qmpd.errors import CommandError, QmpdError
from qmpd.machine import media

_CHANGE_MODES = ("retain", "read-only", "read-write")
_STATISTICS = (
    "rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations", "wr_total_time_ns",
    "rd_total_time_ns", "flush_total_time_ns", "rd_merged", "wr_merged", "idle_time_ns",
)  # fmt: skip


@info("block", "nodes:-n,verbose:-v,device:B?", "[-n] [-v] [device]", "show drives, or with -n every node")
async def info_block(ctx: Context, values: dict[str, Any]) -> str:
    """Show one drive or node, or all of them."""
    wanted, verbose = values.get("device"), bool(values.get("verbose"))
    printed = ""
    if not values.get("nodes"):
        for index, row in enumerate(await qmp(ctx, "query-block")):
            if wanted is None or row["device"] == wanted:
                printed += "\n" * bool(index) + _hmp_dump.drive(row, row.get("inserted"), verbose=verbose)
        if wanted is None or printed:
            return printed
    for index, row in enumerate(await qmp(ctx, "query-named-block-nodes")):
        if wanted is None or row["node-name"] == wanted:
            printed += "\n" * bool(index) + _hmp_dump.drive(None, row, verbose=verbose)
    return printed


@info("blockstats", help="show what went through the drives")
async def info_blockstats(ctx: Context, values: dict[str, Any]) -> str:
    """Show the counters of every drive, in one line each."""
    printed = ""
    for row in await qmp(ctx, "query-blockstats"):
        counters = " ".join(f"{name}={row['stats'].get(name, 0)}" for name in _STATISTICS)
        printed += f"{row.get('device', '')}: {counters}\n"
    return printed


@info("block-jobs", help="show the progress of jobs")
async def info_block_jobs(ctx: Context, values: dict[str, Any]) -> str:
    """Show the running block jobs."""
    rows = await qmp(ctx, "query-block-jobs")
    if not rows:
        return "No active jobs\n"
    return "".join(
        f"Type {row['type']}, device {row['device']}: Completed {row['offset']} of {row['len']} bytes, "
        f"speed limit {row['speed']} bytes/s\n"
        for row in rows
    )


@info("snapshots", help="show the snapshots of the machine")
async def info_snapshots(ctx: Context, values: dict[str, Any]) -> str:
    """Say why there are none: the machine has no state to keep."""
    if not any(_keeps_snapshots(node) for node in _roots(ctx)):
        return "no block device can store vmstate for snapshot\n"
    return "There is no snapshot available.\n"


def _roots(ctx: Context) -> list[BlockNode]:
    """Return the nodes of drives, then those of the monitor, each once."""
    drives = [one.backend.node for one in ctx.machine.block_devices() if one.backend.node is not None]
    return drives + [node for node in ctx.graph.nodes() if node.monitor_owned and node not in drives]


def _keeps_snapshots(node: BlockNode) -> bool:
    return node.driver_name == "qcow2" and not node.read_only


def _refuse_snapshot(ctx: Context) -> CommandError:
    for node in _roots(ctx):
        if not node.read_only and not _keeps_snapshots(node):
            return CommandError(f"Device '{node.name}' is writable but does not support snapshots")
    if not _roots(ctx):
        return CommandError("No block device can accept snapshots")
    return CommandError("The state of the machine cannot be saved: it has no guest")


@hmp("savevm", "name:s?", "tag", "refused: there is no state of a guest")
async def savevm(ctx: Context, values: dict[str, Any]) -> str:
    """Refuse: there is no guest whose state could be saved."""
    raise _refuse_snapshot(ctx)


@hmp("loadvm", "name:s", "tag", "refused: there is no state of a guest")
async def loadvm(ctx: Context, values: dict[str, Any]) -> str:
    """Refuse: there is no guest whose state could be loaded."""
    raise _refuse_snapshot(ctx)


@hmp("delvm", "name:s", "tag", "refused: there is no state of a guest")
async def delvm(ctx: Context, values: dict[str, Any]) -> str:
    """Refuse: there is no guest whose state was saved."""
    raise _refuse_snapshot(ctx)


@hmp("commit", "device:B", "device|all", "write an overlay's changes to its backing file")
async def commit(ctx: Context, values: dict[str, Any]) -> str:
    """Find the drive of that name; there is nothing to commit for drives without backing file."""
    if values["device"] == "all":
        drives = ctx.machine.block_devices()
        overlays = [one for one in drives if one.backend.node is not None and "backing" in one.backend.node.children]
        return "".join(f"'commit' error for 'all': {one.qdev}: Operation not supported\n" for one in overlays)
    if ctx.graph.find_backend(values["device"]) is None:
        return f"Device '{values['device']}' not found\n"
    return f"'commit' error for '{values['device']}': Operation not supported\n"


@hmp("drive_del", "id:B", "device", "delete a node or drive")
async def drive_del(ctx: Context, values: dict[str, Any]) -> str:
    """Delete a node of the monitor."""
    if ctx.graph.get(values["id"]) is None:
        return f"Device '{values['id']}' not found\n"
    try:
        await qmp(ctx, "blockdev-del", node_name=values["id"])
    except QmpdError as error:
        return f"{error}\n"
    return ""


@hmp("block_resize", "device:B,size:o", "device size", "change the size of a drive's image")
async def block_resize(ctx: Context, values: dict[str, Any]) -> str:
    """Resize the image of a -drive, which is looked up first."""
    ctx.graph.lookup(values["device"], None)
    await qmp(ctx, "block_resize", device=values["device"], size=values["size"])
    return ""


@hmp("eject", "force:-f,device:B", "[-f] device", "open a tray and take the medium out")
async def eject(ctx: Context, values: dict[str, Any]) -> str:
    """Eject the medium of a -drive."""
    await media.eject(ctx.machine, values["device"], None)
    return ""


@hmp(
    "change",
    "device:B,force:-f,target:F,arg:s?,read-only-mode:s?",
    "device [-f] filename [format [read-only-mode]]",
    "put another image into a drive",
)
async def change(ctx: Context, values: dict[str, Any]) -> str:
    """Change the medium of a -drive."""
    mode = values.get("read-only-mode", "retain")
    if mode not in _CHANGE_MODES:
        raise CommandError(f"invalid parameter value: {mode}")
    await media.change_medium(
        ctx.machine,
        values["device"],
        None,
        values["target"],
        image_format=values.get("arg"),
        mode=mode,
        slow=ctx.out_of_turn,
    )
    return ""


@hmp("qemu-io", "qdev:-d,device:B,command:s", '[-d] device "command"', "read and write as qemu-io does")
async def qemu_io(ctx: Context, values: dict[str, Any]) -> str:
    """Run a command of qemu-io on a drive's backend, or on a node by way of a backend of its own.

    What the command prints goes to the daemon's standard output, as the reference does it.
    """
    backend: BlockBackend | None
    if values.get("qdev"):
        _, backend = media.find_drive(ctx.machine, None, values["device"])
    else:
        backend = ctx.graph.find_backend(values["device"])
    if backend is not None:
        return await _transfer(ctx, backend, values["command"])
    node = ctx.graph.lookup(None, values["device"])
    backend = BlockBackend(ctx.graph, lambda: "an unnamed block device", Perm.NONE, Perm.ALL)
    try:
        backend.insert(node)
        return await _transfer(ctx, backend, values["command"])
    finally:
        await backend.remove()


async def _transfer(ctx: Context, backend: BlockBackend, line: str) -> str:
    """Run the command with other clients' commands going on; the backend keeps its node meanwhile."""
    command = _qemu_io.prepare(backend, line)
    if isinstance(command, str):
        return command
    async with ctx.out_of_turn():
        await command.run()
    return ""
