"""A node's chain: the links that say where what it does not hold itself comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.block.child import Child
    from qmpd.block.node import BlockNode


def link_below(node: BlockNode) -> Child | None:
    """Return the edge to the backing image, or below a filter to what it filters (bdrv_filter_or_cow_child)."""
    return node.children.get("backing") or (node.children.get("file") if node.is_filter else None)


def image_of(node: BlockNode) -> BlockNode:
    """Return the first node of the chain that is no filter."""
    while node.is_filter and (edge := link_below(node)) is not None:
        node = edge.node
    return node


def backing_of(node: BlockNode) -> BlockNode | None:
    """Return the image behind an image, filters between them left out."""
    edge = node.children.get("backing")
    return image_of(edge.node) if edge else None


def links(top: BlockNode, bottom: BlockNode | None) -> Iterator[tuple[BlockNode, Child]]:
    """Yield (node, edge below it) from `top` to `bottom`; the whole chain if `bottom` is not in it, or None."""
    node = top
    while node is not bottom:
        edge = link_below(node)
        if edge is None:
            return
        yield node, edge
        node = edge.node


def contains(top: BlockNode, node: BlockNode) -> bool:
    """Say whether `node` is `top` or in the chain below it."""
    return node is top or any(edge.node is node for _, edge in links(top, node))


def freeze(top: BlockNode, bottom: BlockNode) -> list[Child]:
    """Keep the links from `top` to `bottom` as they are until they are thawed; return them.

    Raises CommandError, with nothing frozen, if one of them is frozen by somebody else: who thaws
    first would free the other's (bdrv_freeze_backing_chain).
    """
    found = list(links(top, bottom))
    for node, edge in found:
        if edge.frozen:
            raise CommandError(f"Cannot change '{edge.name}' link from '{node.name}' to '{edge.node.name}'")
    for _, edge in found:
        edge.frozen = True
    return [edge for _, edge in found]


def thaw(frozen: list[Child]) -> None:
    """Undo `freeze`; the list is empty afterwards, so that a second call does nothing."""
    while frozen:
        frozen.pop().frozen = False
