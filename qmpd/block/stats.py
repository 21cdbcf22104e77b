"""Counters of a backend, as query-blockstats reports them (BlockDeviceStats)."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qmpd.block.batch import Batch


class Histogram:
    """Requests counted by how long they took.

    boundaries  nanoseconds, rising; the first bin ends before the first one
    bins        one more than boundaries
    """

    def __init__(self, boundaries: Sequence[int]) -> None:
        """Raises ValueError unless the boundaries rise from above zero."""
        if not boundaries or any(b <= a for a, b in pairwise((0, *boundaries))):
            raise ValueError("boundaries must rise from above zero")
        self.boundaries = list(boundaries)
        self.bins = [0] * (len(boundaries) + 1)

    def add(self, elapsed: int, count: int) -> None:
        """Count `count` requests that took `elapsed` nanoseconds each."""
        self.bins[bisect_right(self.boundaries, elapsed)] += count


@dataclass(slots=True, eq=False, repr=False)
class AccountedStats:
    """Operations, bytes and nanoseconds since the backend was made.

    failed   got an errno from below       invalid  refused before they were tried
    """

    rd_bytes: int = 0
    wr_bytes: int = 0
    unmap_bytes: int = 0
    rd_operations: int = 0
    wr_operations: int = 0
    unmap_operations: int = 0
    flush_operations: int = 0
    rd_total_time_ns: int = 0
    wr_total_time_ns: int = 0
    unmap_total_time_ns: int = 0
    flush_total_time_ns: int = 0
    failed_rd_operations: int = 0
    failed_wr_operations: int = 0
    failed_unmap_operations: int = 0
    failed_flush_operations: int = 0
    invalid_rd_operations: int = 0
    invalid_wr_operations: int = 0
    invalid_unmap_operations: int = 0
    invalid_flush_operations: int = 0
    account_invalid: bool = True
    account_failed: bool = True
    last_access_ns: int | None = field(default=None)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def transferred(self, batch: Batch, elapsed: int, *, writing: bool) -> None:
        """Count the requests of a batch that took `elapsed` nanoseconds together."""
        done = total = 0
        for request in batch:
            if not request.error:
                done += 1
                total += len(request.view)
        failed = len(batch) - done
        if writing:
            self.wr_operations += done
            self.wr_bytes += total
            self.failed_wr_operations += failed
            self.wr_total_time_ns += elapsed * done
        else:
            self.rd_operations += done
            self.rd_bytes += total
            self.failed_rd_operations += failed
            self.rd_total_time_ns += elapsed * done
        self._measure("wr" if writing else "rd", elapsed, done)
        self.last_access_ns = time.monotonic_ns()

    def read_directly(self, count: int, total: int, elapsed: int) -> None:
        """Count `count` successful reads of `total` bytes that took `elapsed` nanoseconds together."""
        self.rd_operations += count
        self.rd_bytes += total
        self.rd_total_time_ns += elapsed * count
        self._measure("rd", elapsed, count)
        self.last_access_ns = time.monotonic_ns()

    def written_directly(self, count: int, total: int, elapsed: int) -> None:
        """Count `count` successful writes of `total` bytes that took `elapsed` nanoseconds together."""
        self.wr_operations += count
        self.wr_bytes += total
        self.wr_total_time_ns += elapsed * count
        self._measure("wr", elapsed, count)
        self.last_access_ns = time.monotonic_ns()

    def _measure(self, kind: str, elapsed: int, count: int = 1) -> None:
        if kind in self.histograms:
            self.histograms[kind].add(elapsed, count)

    def note(self, kind: str, length: int, elapsed: int) -> None:
        """Count one successful "wr", "unmap" or "flush"."""
        setattr(self, f"{kind}_operations", getattr(self, f"{kind}_operations") + 1)
        setattr(self, f"{kind}_total_time_ns", getattr(self, f"{kind}_total_time_ns") + elapsed)
        if kind != "flush":
            setattr(self, f"{kind}_bytes", getattr(self, f"{kind}_bytes") + length)
        self._measure(kind, elapsed)
        self.last_access_ns = time.monotonic_ns()

    def note_failed(self, kind: str) -> None:
        """Count one failed operation."""
        setattr(self, f"failed_{kind}_operations", getattr(self, f"failed_{kind}_operations") + 1)

    def note_invalid(self, kind: str) -> None:
        """Count one operation that was refused at once."""
        setattr(self, f"invalid_{kind}_operations", getattr(self, f"invalid_{kind}_operations") + 1)


_COUNTED = (
    "rd_bytes", "wr_bytes", "unmap_bytes",
    "rd_operations", "wr_operations", "unmap_operations", "flush_operations",
    "rd_total_time_ns", "wr_total_time_ns", "unmap_total_time_ns", "flush_total_time_ns",
    "failed_rd_operations", "failed_wr_operations", "failed_unmap_operations", "failed_flush_operations",
    "invalid_rd_operations", "invalid_wr_operations", "invalid_unmap_operations", "invalid_flush_operations",
)  # fmt: skip
_NEVER = (
    "zone_append_bytes", "zone_append_operations", "zone_append_total_time_ns", "zone_append_merged",
    "failed_zone_append_operations", "invalid_zone_append_operations", "rd_merged", "wr_merged", "unmap_merged",
)  # fmt: skip


def to_wire(stats: AccountedStats | None, highest: int) -> dict[str, Any]:
    """Return BlockDeviceStats; without `stats` (an inner node) all counters are zero.

    highest   offset after the last byte ever written through the node
    """
    source = stats or AccountedStats(account_invalid=False, account_failed=False)
    reply: dict[str, Any] = {name: getattr(source, name) for name in _COUNTED}
    reply |= dict.fromkeys(_NEVER, 0)
    reply["wr_highest_offset"] = highest
    reply["account_invalid"] = source.account_invalid
    reply["account_failed"] = source.account_failed
    reply["timed_stats"] = []
    for kind, histogram in source.histograms.items():
        reply[f"{kind}_latency_histogram"] = {"boundaries": histogram.boundaries, "bins": list(histogram.bins)}
    if source.last_access_ns is not None:
        reply["idle_time_ns"] = time.monotonic_ns() - source.last_access_ns
    return reply
