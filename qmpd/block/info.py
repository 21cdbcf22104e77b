"""What the query commands say about nodes: ImageInfo, BlockDeviceInfo, BlockStats, the graph.

Model: bdrv_block_device_info, bdrv_query_image_info and bdrv_get_xdbg_block_graph (QEMU
block/qapi.c, block.c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qmpd.block import stats
from qmpd.block.backend import BlockBackend
from qmpd.block.backing import full_backing_filename
from qmpd.block.filename import node_filename
from qmpd.block.node import BlockNode
from qmpd.block.perm import ChildRole, perm_wire
from qmpd.block.throttle_group import BackendGroup
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.child import Child
    from qmpd.block.graph import Graph


def image_info(node: BlockNode, *, chain: bool) -> dict[str, Any]:
    """Return ImageInfo; with `chain` the backing images are nested in `backing-image`."""
    return _image_info(node, node_filename(node), node.image_info(), chain=chain)


def _signed(value: int) -> int:
    """Return what an unsigned number of 64 bits is in a member that the schema has as signed."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _image_info(node: BlockNode, filename: str, own: dict[str, Any], *, chain: bool) -> dict[str, Any]:
    info: dict[str, Any] = {
        "virtual-size": node.size,
        "filename": filename,
        "format": node.driver_name,
    }
    allocated = node.allocated_size()
    if allocated is not None:
        info["actual-size"] = allocated
    info |= own
    if node.backing_file:
        info["backing-filename"] = node.backing_file
        try:
            info["full-backing-filename"] = full_backing_filename(node) or node.backing_file
        except CommandError:
            pass  # relative to nothing: the plain member says what the image holds
        if node.backing_format:
            info["backing-filename-format"] = node.backing_format
    below = _below(node)
    if chain and below is not None:
        info["backing-image"] = image_info(below, chain=True)
    return info


def _below(node: BlockNode) -> BlockNode | None:
    """Return the node whose data shows through: the backing image, or what a filter filters."""
    edge = node.children.get("backing") or (node.primary() if node.is_filter else None)
    return edge.node if edge is not None else None


def backing_depth(node: BlockNode) -> int:
    """Return how many images lie below `node` in its backing chain, filters counted."""
    depth = 0
    below = _below(node)
    while below is not None:
        below = _below(below)
        depth += 1
    return depth


def device_info(node: BlockNode, *, flat: bool, backend: BlockBackend | None = None) -> dict[str, Any]:
    """Return BlockDeviceInfo; `flat` leaves out what lies below, `backend` adds its limits."""
    options = node.node_options
    filename, own = node_filename(node), node.image_info()
    info: dict[str, Any] = {
        "node-name": node.name,
        "drv": node.driver_name,
        "file": filename,
        "ro": node.read_only,
        "active": True,
        "encrypted": bool(own.get("encrypted")),
        "cache": {
            "writeback": True,
            "direct": bool(options.cache_direct),
            "no-flush": bool(options.cache_no_flush),
        },
        "detect_zeroes": options.detect_zeroes or "off",
        "backing_file_depth": 0 if flat else backing_depth(node),
        "write_threshold": _signed(node.write_threshold),
        "image": _image_info(node, filename, own, chain=not flat),
    }
    if node.dirty_bitmaps:
        info["dirty-bitmaps"] = [bitmap.to_wire() for bitmap in node.dirty_bitmaps]
    info |= dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    if backend is not None and backend.throttle is not None:
        info |= _limits(backend.throttle)
    backing = node.children.get("backing")
    if backing is not None and backing.role & ChildRole.COW:
        info["backing_file"] = node_filename(backing.node)
    return info


def _limits(group: BackendGroup) -> dict[str, Any]:
    """Return the members of BlockDeviceInfo that say how a device is throttled."""
    reply: dict[str, Any] = {"group": group.name}
    for unit in ("bps", "iops"):
        for what, suffix in (("total", ""), ("read", "_rd"), ("write", "_wr")):
            limit = f"{unit}-{what}"
            reply[unit + suffix] = group.limits[limit]
            if group.limits[f"{limit}-max"]:
                reply[f"{unit}{suffix}_max"] = group.limits[f"{limit}-max"]
                reply[f"{unit}{suffix}_max_length"] = group.limits[f"{limit}-max-length"]
    if group.limits["iops-size"]:
        reply["iops_size"] = group.limits["iops-size"]
    return reply


def node_stats(node: BlockNode, backend: BlockBackend | None = None, *, chain: bool) -> dict[str, Any]:
    """Return BlockStats of a node; the counters are those of `backend`, zero without one.

    `chain` adds the backing image; the image's own file is always there as `parent`.
    """
    reply: dict[str, Any] = {
        "node-name": node.name,
        "stats": stats.to_wire(backend.stats if backend else None, node.wr_highest_offset),
    }
    specific = node.driver_stats()
    if specific is not None:
        reply["driver-specific"] = {"driver": node.driver_name, **specific}
    for child in node.children.values():
        if child.role & (ChildRole.PRIMARY | ChildRole.FILTERED) and "parent" not in reply:
            reply["parent"] = node_stats(child.node, chain=chain)
        elif chain and child.name == "backing":
            reply["backing"] = node_stats(child.node, chain=True)
    return reply


@runtime_checkable
class _JobParent(Protocol):
    """A job, as far as it is a parent."""

    id: str
    held: list[Child]


def _jobs(graph: Graph) -> list[_JobParent]:
    """Return the jobs that hold nodes."""
    found: dict[int, _JobParent] = {}
    for node in graph.nodes():
        for edge in node.parents:
            if edge.parent.stays_at_node and isinstance(edge.parent, _JobParent):
                found[id(edge.parent)] = edge.parent
    return list(found.values())


def debug_graph(graph: Graph) -> dict[str, Any]:
    """Return XDbgBlockGraph: backends, then nodes from the oldest, ids in the order of meeting.

    Both lists are turned round at the end, as the reference's are.
    """
    ids: dict[int, int] = {}
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []

    def number(thing: object) -> int:
        return ids.setdefault(id(thing), len(ids) + 1)

    def edge(parent: object, child: Any) -> None:
        edges.append(
            {
                "parent": number(parent),
                "child": number(child.node),
                "name": child.name,
                "perm": perm_wire(child.perm),
                "shared-perm": perm_wire(child.shared),
            }
        )

    for backend in graph.backends:
        nodes.append({"id": number(backend), "type": "block-backend", "name": backend.name or backend.label})
        if backend.root is not None:
            edge(backend, backend.root)
    for job in _jobs(graph):
        nodes.append({"id": number(job), "type": "block-job", "name": job.id})
        for child in reversed(job.held):
            edge(job, child)
    for node in reversed(graph.nodes()):
        nodes.append({"id": number(node), "type": "block-driver", "name": node.name})
        for child in reversed(node.children.values()):
            edge(node, child)
    return {"nodes": nodes[::-1], "edges": edges[::-1]}
