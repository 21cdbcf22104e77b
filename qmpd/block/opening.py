"""Opening and closing nodes: the steps between two graph changes.

For one node: (1) its `file` child is found or opened, the name is reserved, the children are
attached with the permissions its options ask for; (2) `open` reads through those edges;
(3) the slow part (`unlock`) runs out of turn; (4) the backing chain is opened; (5) the node is
published. Whatever fails undoes all of it. The order of checks is the reference's: child before
name, name before content.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qmpd.block import backing, filename
from qmpd.block.child import Child
from qmpd.block.node import BlockNode
from qmpd.block.options import GENERIC_MEMBERS, NodeOptions, OpenFlags, driver_members
from qmpd.block.perm import ChildRole
from qmpd.errors import CommandError
from qmpd.qapi.bind import build

if TYPE_CHECKING:
    from qmpd.block.graph import Graph, Slow
    from qmpd.qapi.registry import ClassEntry

log = logging.getLogger(__name__)

MAX_TREE_DEPTH = 200
"""Levels of inline children and of backing files together; the reference stops there as well."""

MAX_LENGTH = (1 << 63) - (1 << 30)
"""Bytes in a node at most (BDRV_MAX_LENGTH): offsets stay signed 64-bit after any alignment."""


async def open_tree(
    graph: Graph, tree: Mapping[str, Any], slow: Slow, generic: NodeOptions | None = None, depth: int = 0
) -> BlockNode:
    """Open a validated BlockdevOptions tree and return the published node.

    generic   the node's options after inheritance; None for a tree of its own
    Raises QmpdError; then nothing is left behind.
    """
    if depth > MAX_TREE_DEPTH:
        raise CommandError(f"Block node tree is deeper than {MAX_TREE_DEPTH} levels")
    entry = graph.registry.drivers[tree["driver"]]
    generic = generic or NodeOptions.from_wire(tree)
    opening = _Opening(graph, entry, tree, generic, slow, depth)
    try:
        return await opening.run()
    except BaseException:
        await opening.undo()
        raise


class _Opening:
    """One node on its way into the graph."""

    def __init__(
        self, graph: Graph, entry: ClassEntry, tree: Mapping[str, Any], generic: NodeOptions, slow: Slow, depth: int
    ) -> None:
        self.graph, self.entry, self.generic, self.slow, self.depth = graph, entry, generic, slow, depth
        self.members = driver_members(tree)
        self.explicit = {name: tree[name] for name in GENERIC_MEMBERS if name in tree and name != "driver"}
        self.inline: list[BlockNode] = []
        self.node: BlockNode | None = None
        self.name: str | None = None
        self.opened = False

    async def run(self) -> BlockNode:
        roles: Mapping[str, ChildRole] = self.entry.cls.child_roles
        found: dict[str, BlockNode] = {}
        if "file" in roles and self.members.get("file") is not None:
            found["file"] = await self._child(self.members["file"], "file")
        self._check_generic()
        self.name = self.graph.reserve(self.generic.node_name)
        node: BlockNode = self.entry.cls(self.graph, self.name, self.generic, self.members)
        node.sequence = self.graph.next_sequence()
        node.explicit = self.explicit
        self.node = node
        for name, role in roles.items():
            if self.members.get(name) is None:
                continue
            reference = self.members[name]
            if isinstance(reference, str) or name not in found:
                # A node that was named is looked up again: it may be gone since its name was checked.
                found[name] = await self._child(reference, name)
            self._attach(name, role, found[name])
        await self._open(node)
        with self.graph.change() as tran:
            tran.touch(node)
        if node.supports_backing:
            await backing.open_backing(self.graph, node, self.members, self.slow, self.depth)
        self.graph.publish(node)
        return node

    def _check_generic(self) -> None:
        """Check what does not depend on the image, as bdrv_open_common does."""
        if self.generic.force_share and not self.generic.read_only:
            raise CommandError("force-share=on can only be used with read-only images")
        check = getattr(self.entry.cls, "check_options", None)
        if check is not None:
            check(self.members)
        if self.generic.detect_zeroes == "unmap" and self.generic.discard != "unmap":
            raise CommandError(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
            )

    async def _child(self, reference: str | Mapping[str, Any], name: str) -> BlockNode:
        if isinstance(reference, str):
            return self.graph.lookup(reference, reference)
        inherited = self.generic.inherited_by(
            NodeOptions.from_wire(reference), parent_is_format=not self.entry.cls.is_filter
        )
        node = await open_tree(self.graph, reference, self.slow, inherited, self.depth + 1)
        self.inline.append(node)
        return node

    def _attach(self, name: str, role: ChildRole, child: BlockNode) -> Child:
        assert self.node is not None
        with self.graph.change() as tran:
            edge = tran.attach(self.node, name, role, child)
        edge.inherits = child in self.inline
        return edge

    async def _open(self, node: BlockNode) -> None:
        values = {key: value for key, value in self.members.items() if key not in {"backing", *node.late_roles}}
        values.update(node.children)
        options = build(self.entry.options, values) if self.entry.options is not None else None
        try:
            if node.opens_alone:
                await node.open(options)
            else:
                await self.graph.runner.run(node.open(options))
            self.opened = True
            if node.late_roles and OpenFlags.NO_IO not in self.graph.open_flags:
                await self._late_children(node)
            if type(node).unlock is not BlockNode.unlock and node.locked:
                async with self.slow():
                    await self.graph.runner.run(node.unlock())
        except OSError as error:
            raise open_error(node, error) from error
        if node.size > MAX_LENGTH:
            raise CommandError("Could not refresh total sector count: File too large")

    async def _late_children(self, node: BlockNode) -> None:
        """Open and attach the children that depend on what the image says."""
        for name, role in node.late_roles.items():
            reference = self.members.get(name)
            if reference is None:
                named = node.late_filename(name)
                if named is None:
                    continue
                if len(named) > filename.MAX_FILENAME:
                    raise CommandError(f"Could not open '{named[: filename.MAX_FILENAME]}': File name too long")
                reference = {"driver": "file", "filename": named}
            self._attach(name, role, await self._child(reference, name))
        node.late_children_attached()

    async def undo(self) -> None:
        """Take back what was done, newest first; the error that caused it stays the one reported."""
        node = self.node
        if node is not None:
            if self.opened:
                await _close_quietly(self.graph, node)
            below = [edge.node for edge in node.children.values() if edge.name == "backing"]
            with self.graph.change() as tran:
                for edge in list(node.children.values()):
                    tran.detach(edge)
            for child in below:
                await self.graph.drop_unreferenced(child)
        if self.name is not None:
            self.graph.release(self.name)
        for child in reversed(self.inline):
            await self.graph.drop_unreferenced(child)


def open_error(node: BlockNode, error: OSError) -> CommandError:
    """Return the text for an errno that `open` let out."""
    reason = os.strerror(error.errno or errno.EIO)
    name = filename.exact_filename(node) if node.is_protocol else ""
    return CommandError(f"Could not open '{name}': {reason}" if name else f"Could not open image: {reason}")


async def close_node(graph: Graph, node: BlockNode) -> None:
    """Close a node that nobody holds and is already out of the name table, then its children."""
    await _close_quietly(graph, node)
    children = [edge.node for edge in node.children.values()]
    with graph.change() as tran:
        for edge in list(node.children.values()):
            tran.detach(edge)
    for child in children:
        await graph.drop_unreferenced(child)


async def _close_quietly(graph: Graph, node: BlockNode) -> None:
    if type(node).close is BlockNode.close:
        return
    try:
        await graph.runner.run(node.close())
    except OSError as error:
        log.error("node '%s': closing failed: %s", node.name, error.strerror)
