"""What is measured on exports, and what is aimed at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qmpd.units import KiB, MiB

IMAGES = {
    "raw": "raw",
    "luks1": "LUKS1, 512-byte sectors",
    "luks2": "LUKS2, 4096-byte sectors (QSD: LUKS1)",
    "detached": "LUKS1 over qcow2, detached header",
}
"""What each image is. QSD has no LUKS2: its LUKS1 volume of the same size stands beside ours."""

SERVERS = ("qsd", "qmpd", "nbdkit")
"""qemu-storage-daemon, the one that is measured, and nbdkit with its luks filter (luks1 only)."""


@dataclass(frozen=True, slots=True)
class Work:
    """A pattern of requests: `operation` is the client's word, `size` is in bytes."""

    operation: str
    size: int
    depth: int

    @property
    def name(self) -> str:
        """Return what the tables call it."""
        size = f"{self.size // MiB} MiB" if self.size >= MiB else f"{self.size // KiB} KiB"
        words = {"randread": "random read", "randwrite": "random write"}
        return f"{words.get(self.operation, self.operation)} {size} QD{self.depth}"

    @property
    def writes(self) -> bool:
        """Say whether the image is written to."""
        return self.operation.endswith("write")

    @property
    def random(self) -> bool:
        """Say whether offsets jump; then speed is told in requests, else in bytes."""
        return self.operation.startswith("rand")


def works() -> Iterator[Work]:
    """Yield every pattern, reads first."""
    for kind in ("read", "write"):
        for size, depth in ((2 * MiB, 4), (256 * KiB, 16), (64 * KiB, 16), (64 * KiB, 1)):
            yield Work(kind, size, depth)
        for depth in (32, 1):
            yield Work("rand" + kind, 4 * KiB, depth)


def goal(image: str, work: Work) -> float | None:
    """Return the ratio to QSD that is aimed at, None for a row without a goal."""
    small = work.random
    if image == "raw":
        return 1.5 if small and work.depth > 1 else 1.0
    if image == "luks1":
        if small and work.depth > 1:
            return 2.0 if work.writes else 4.0
        if small:
            return 1.5
        if work.writes:
            return 2.5
        return 3.0 if work.depth >= 4 else None
    if image == "luks2":
        return 5.0 if not small and not work.writes else None
    if small and work.depth > 1:
        return 2.5
    return 2.5 if not work.writes and work.depth > 1 else None


def nbdkit_goal(image: str, work: Work) -> float | None:
    """Return the ratio to nbdkit that is aimed at."""
    large = image == "luks1" and not work.writes and not work.random and work.depth >= 4
    return 1.8 if large else None


def scaling_goal(image: str, work: Work) -> float:
    """Return what four connections are to reach of one."""
    return 1.3 if image != "raw" and not work.writes else 1.0
