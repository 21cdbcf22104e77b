"""Filters that jobs put above a node that is in use, and take away again.

Model: bdrv_insert_node, bdrv_append and bdrv_replace_node (QEMU block.c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from qmpd.block import opening
from qmpd.block.backing import refresh_names
from qmpd.block.change import Transaction, reaches
from qmpd.block.direct import DirectRead
from qmpd.block.filter import FilterNode
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions
from qmpd.block.perm import ChildRole
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.graph import Graph


F = TypeVar("F", bound="JobFilter")


class JobFilter(FilterNode):
    """A filter that only a job makes; what it filters is its `backing` child, as in the reference."""

    def direct_read(self) -> DirectRead | None:
        """Offsets are those of the child."""
        return self.file.node.direct_read()

    def exact_filename(self) -> str | None:
        """That of the child."""
        from qmpd.block.filename import exact_filename

        return exact_filename(self.file.node)


def move_parents(tran: Transaction, node: BlockNode, to: BlockNode) -> None:
    """Have every edge to `node` lead to `to`, but for those that `to` itself relies on. Raises CommandError."""
    for edge in list(node.parents):
        if edge.parent.stays_at_node or (isinstance(edge.parent, BlockNode) and reaches(to, edge.parent)):
            continue
        if edge.frozen:
            raise CommandError(f"Cannot change '{edge.name}' link to '{node.name}'")
        tran.replace(edge, to)


async def insert(graph: Graph, node: JobFilter, above: BlockNode) -> None:
    """Make a new filter (its name reserved) see what goes to `above`. Raises QmpdError; then nothing has changed."""
    node.sequence = graph.next_sequence()
    async with graph.drained(above):
        try:
            with graph.change() as tran:
                edge = tran.attach(node, "backing", ChildRole.FILTERED | ChildRole.PRIMARY, above)
                node.attach_file(edge)
                move_parents(tran, above, node)
        except BaseException:
            graph.release(node.name)
            raise
        graph.publish(node)
    refresh_names([node])


async def open_above(
    graph: Graph, above: BlockNode, tree: Mapping[str, Any], name: str | None, begin: Callable[[BlockNode], None]
) -> BlockNode:
    """Open a filter with these options of its driver, and have it see what goes to `above`; return it.

    begin   called at that moment, while no request is in flight; does not raise
    Raises QmpdError; then nothing has changed.
    """
    named = {} if name is None else {"node-name": name}
    try:
        node = await opening.open_tree(graph, {**tree, **named}, nullcontext, NodeOptions(node_name=name))
    except CommandError as error:
        raise CommandError(f"Could not create node: {error}") from error
    try:
        async with graph.drained(above):
            with graph.change() as tran:
                move_parents(tran, above, node)
            begin(node)
    except BaseException:
        await graph.drop_unreferenced(node)
        raise
    refresh_names([node])
    return node


async def take_out(graph: Graph, node: BlockNode) -> None:
    """Have the parents of a filter use what it filters, and close it. Raises QmpdError."""
    edge = node.primary()
    assert edge is not None
    below = edge.node
    async with graph.drained(below):
        with graph.change() as tran:
            move_parents(tran, node, below)
    refresh_names([below])
    await graph.drop_unreferenced(node)


def new_filter(graph: Graph, kind: type[F], name: str | None, like: BlockNode) -> F:
    """Return an unattached filter with the name, or one that is made up. Raises CommandError."""
    options = NodeOptions(node_name=name, read_only=like.read_only)
    return kind(graph, graph.reserve(name), options, {})
