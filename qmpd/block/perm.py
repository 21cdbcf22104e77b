"""Permissions of edges: what a parent does to a node, and what it lets others do.

Model: BLK_PERM_* (QEMU include/block/block-common.h) and the default rules of block.c. The order
of the names, in conflict texts and in x-debug-query-block-graph, is the reference's.
"""

from __future__ import annotations

import enum


class Perm(enum.IntFlag):
    """One bit per permission; the bit number is also its place in the OFD lock bytes."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


class ChildRole(enum.IntFlag):
    """What an edge is for.

    DATA      holds guest data           METADATA  holds data of the format itself
    FILTERED  seen through unchanged     COW       read where the parent has nothing
    PRIMARY   the child that stands for its parent in file names and sizes
    """

    NONE = 0
    DATA = 1
    METADATA = 2
    FILTERED = 4
    COW = 8
    PRIMARY = 16
    IMAGE = DATA | METADATA | PRIMARY


_TEXT = {
    Perm.CONSISTENT_READ: "consistent read",
    Perm.WRITE: "write",
    Perm.WRITE_UNCHANGED: "write unchanged",
    Perm.RESIZE: "resize",
}
_WIRE = {
    Perm.RESIZE: "resize",
    Perm.WRITE_UNCHANGED: "write-unchanged",
    Perm.WRITE: "write",
    Perm.CONSISTENT_READ: "consistent-read",
}


def perm_text(perm: Perm) -> str:
    """Return "consistent read, write" and the like, for error texts."""
    return ", ".join(text for bit, text in _TEXT.items() if perm & bit)


def perm_wire(perm: Perm) -> list[str]:
    """Return the BlockPermission members of `perm`, highest bit first."""
    return [text for bit, text in _WIRE.items() if perm & bit]
