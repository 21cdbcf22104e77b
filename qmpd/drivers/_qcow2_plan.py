"""What a write to a qcow2 image is going to put where."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpd.block.batch import Request


class Piece:
    """Guest data for a part of one cluster: `start` bytes into it."""

    __slots__ = ("request", "start", "view")

    def __init__(self, request: Request, start: int, view: memoryview) -> None:
        self.request, self.start, self.view = request, start, view


class Plan:
    """A guest cluster that gets a new host cluster; or a row of them that one piece covers and that held nothing.

    count     how many clusters
    guest     offset of the cluster     pieces  the data, in the order of the batch
    entry     its L2 entry before       host    offset of the cluster to write, -1: not yet known
    fresh     `host` was taken for this, not found preallocated nor given by an external data file
    bitmap    (extended L2) the bitmap before      filled  mask of subclusters that are allocated now
    """

    __slots__ = ("bitmap", "count", "entry", "failed", "filled", "fresh", "gaps", "guest", "host", "pieces")

    def __init__(self, guest: int, count: int = 1) -> None:
        self.guest, self.count = guest, count
        self.pieces: list[Piece] = []
        self.entry = 0
        self.host = -1
        self.fresh = False
        self.bitmap = 0
        self.filled = 0
        self.failed = 0
        self.gaps: list[tuple[int, memoryview]] = []

    def fail(self, error: int) -> None:
        """Fail the plan and every request that has data in it."""
        self.failed = self.failed or error
        for piece in self.pieces:
            piece.request.fail(error)

    def split(self, count: int, cluster_size: int) -> Plan:
        """Keep the first `count` clusters of the row and return a plan for the others."""
        [piece] = self.pieces
        length = count * cluster_size
        rest = Plan(self.guest + length, self.count - count)
        rest.pieces = [Piece(piece.request, 0, piece.view[length:])]
        self.count, piece.view = count, piece.view[:length]
        return rest

    def holes(self, cluster_size: int) -> list[tuple[int, int]]:
        """Return the parts (start, end) of the cluster that no piece covers."""
        found = []
        at = 0
        for start, end in sorted((piece.start, piece.start + len(piece.view)) for piece in self.pieces):
            if start > at:
                found.append((at, start))
            at = max(at, end)
        if at < cluster_size:
            found.append((at, cluster_size))
        return found
