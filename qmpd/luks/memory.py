"""How much memory a key derivation may take: what the machine has left, and what its control groups allow.

Source: Linux Documentation/filesystems/proc.rst (MemAvailable), admin-guide/cgroup-v2.rst (memory.max,
memory.current), cgroup-v1/memory.rst. Page cache that a group could give back counts as free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qmpd.errors import CommandError
from qmpd.units import KiB

RESERVE_KIB = 16 * 1024
"""Left over for everything else: a derivation that takes the last page gets the whole process killed."""


class NotEnoughMemory(CommandError):
    """A key derivation that needs more memory than there is right now."""


def check_memory(needed: int, what: str, root: Path = Path("/")) -> None:
    """Refuse a derivation that needs `needed` KiB if they cannot be had. Raises NotEnoughMemory.

    root   where /proc and /sys lie
    """
    limit = available(root)
    if limit is not None and needed > max(0, limit - RESERVE_KIB):
        raise NotEnoughMemory(f"{what} needs {needed} KiB of memory, only {limit} KiB are available")


def available(root: Path = Path("/")) -> int | None:
    """Return the KiB that this process could still take, None if nothing tells."""
    return min(_limits(root), default=None)


def _limits(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            yield int(rest.split()[0])
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _group(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _group(root / "sys/fs/cgroup/memory", path, *names)


def _group(mount: Path, path: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    """Yield what the group at `path`, and each one above it, leaves; inside a container the path may not be there."""
    steps = [step for step in path.split("/") if step not in ("", ".", "..")]
    for depth in range(len(steps), -1, -1):
        group = mount.joinpath(*steps[:depth])
        most, used = _number(group / limit), _number(group / usage)
        if most is None or used is None:
            continue
        reclaimable = 0
        for line in _text(group / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == cache and value.isdigit():
                reclaimable = int(value)
        yield max(0, most - max(0, used - reclaimable)) // KiB


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
