"""Reads and writes without a way through the graph: where a range of a node lies in a file, told beforehand.

A chain such as luks over qcow2 over file changes every request in the same few ways. A node that can
say so answers `BlockNode.direct_read` with a `DirectRead`, made from that of its child; who serves many
small requests then has whole lists of them read and decrypted by one compiled call, from the page cache,
on the data loop. Whatever is out of the ordinary (a range that is not stored in one piece, a page that is not in
memory, a node that filters) is not answered here and goes through the nodes, with the same outcome.

Writes go the same way where they change nothing but data: inside the file, with no metadata of a format, no bitmap
and no threshold to look after, and no request under way that they would have to wait for (`DirectWrite.possible`).

A `DirectRead` holds until the graph changes (`Graph.generation`). All I/O, drains and the closing of
nodes run on the data loop, so nothing changes under a call that does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpd.aio.disk import DiskFile
    from qmpd.block.node import BlockNode
    from qmpd.crypto.block import BlockCrypto  # its libraries take a while, and many images need none

Locate = Callable[[int, int], int]
"""(offset, length) -> where the range starts in the file, or -1 if it is not all there in one piece."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DirectRead:
    """How offsets of a node become offsets of `disk`: add `before`, `locate`, add `after`.

    crypto      what decrypts the data, None for none; its own offsets are the node's plus `crypto_at`
    """

    disk: DiskFile
    before: int = 0
    locate: Locate | None = None
    after: int = 0
    crypto: BlockCrypto | None = None
    crypto_at: int = 0

    def shifted(self, delta: int) -> DirectRead:
        """Return the same for a node that starts `delta` bytes into this one."""
        return replace(self, before=self.before + delta, crypto_at=self.crypto_at + delta)

    def mapped(self, locate: Locate) -> DirectRead | None:
        """Return the same for a node that keeps its data here and there; None if that is too much."""
        if self.locate is not None or self.crypto is not None:
            return None
        return DirectRead(self.disk, 0, locate, self.before + self.after)

    def decrypted(self, crypto: BlockCrypto, delta: int) -> DirectRead | None:
        """Return the same for a node that keeps its data encrypted from `delta` on; None if it is already."""
        if self.crypto is not None or not crypto.direct:
            return None
        return replace(self, before=self.before + delta, crypto=crypto, crypto_at=0)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DirectWrite:
    """Where writes to a node end up.

    place       how offsets of the node become offsets of the file
    above       the node and those below it down to one that keeps its data here and there, each with what to
                add to an offset of the first to get theirs
    below       the others, each with what to add to an offset of the file
    alignment   bytes that offsets and lengths are multiples of
    """

    place: DirectRead
    above: Sequence[tuple[BlockNode, int]]
    below: Sequence[tuple[BlockNode, int]]
    alignment: int

    def possible(self) -> bool:
        """Say whether a write now concerns nobody but the file, and need not wait for it."""
        return self.place.disk.nowait and self.unnoticed()

    def unnoticed(self) -> bool:
        """Say whether a write now concerns nobody but the file."""
        for nodes in (self.above, self.below):
            for node, _ in nodes:
                if node.dirty_bitmaps or node.write_threshold or node.ranges.busy:
                    return False
        return True

    def written(self, end: int, end_in_file: int) -> None:
        """Note that the highest write ended there."""
        for nodes, highest in ((self.above, end), (self.below, end_in_file)):
            for node, delta in nodes:
                if highest + delta > node.wr_highest_offset:
                    node.wr_highest_offset = highest + delta


def direct_write(top: BlockNode) -> DirectWrite | None:
    """Return the direct way of writes to a node, None if there is none while the graph stays as it is."""
    place = top.direct_write()
    if place is None:
        return None
    above: list[tuple[BlockNode, int]] = []
    below: list[tuple[BlockNode, int]] = []
    node = top
    while True:
        here = node.direct_write()
        if here is None or node.read_only or node.node_options.detect_zeroes in ("on", "unmap"):
            return None
        if here.locate is not None:
            above.append((node, place.before - here.before))
        else:
            below.append((node, -here.before - here.after))
        under = node.children.get("data-file") or node.primary()
        if under is None:
            return DirectWrite(place, above, below, top.request_alignment)
        node = under.node
