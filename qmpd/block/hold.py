"""Keeping a node from being deleted, by somebody who does nothing else to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from qmpd.block.perm import ChildRole, Perm

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode


class Hold:
    """(Parent) Takes nothing and shares everything; `blockdev-del` finds the node in use."""

    stays_at_node: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self._name = name

    def describe_parent(self) -> str:
        """See `Parent`."""
        return self._name

    def drained_begin(self) -> None:
        """Nothing comes from here."""

    def drained_end(self) -> None:
        """Nothing comes from here."""


@contextmanager
def held(node: BlockNode, name: str) -> Iterator[None]:
    """Hold `node` for the time of the block; `name` says by whom."""
    with node.graph.change() as tran:
        edge = tran.attach(Hold(name), "root", ChildRole.NONE, node, Perm.NONE, Perm.ALL)
    try:
        yield
    finally:
        with node.graph.change() as tran:
            tran.detach(edge)
