"""Default permissions of a node's edges, by role.

Model: bdrv_default_perms (QEMU block.c); what each rule yields was compared with
x-debug-query-block-graph of the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.block.perm import ChildRole, Perm

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode


def default_child_perm(node: BlockNode, name: str, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """Return (perm, shared) of the edge, given what `node`'s own parents take and share."""
    if role & ChildRole.FILTERED:
        return perm, shared
    if role & ChildRole.COW:
        return _cow(perm, shared)
    return _storage(node, role, perm, shared)


def _cow(perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """A backing file is only read; who accepts changing data accepts a changing backing file."""
    changing = Perm.WRITE | Perm.RESIZE if shared & Perm.WRITE else Perm.NONE
    return perm & Perm.CONSISTENT_READ, changing | Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


def _storage(node: BlockNode, role: ChildRole, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """A format owns its file: metadata must not change under it, nor the length of its data."""
    if role & ChildRole.METADATA:
        if node.writable:
            perm |= Perm.WRITE | Perm.RESIZE
        perm |= Perm.CONSISTENT_READ
        shared &= ~(Perm.WRITE | Perm.RESIZE)
    if role & ChildRole.DATA:
        if perm & Perm.WRITE:
            perm |= Perm.RESIZE
        shared &= ~Perm.RESIZE
    return perm, shared
