"""The memory of a guest, as a vhost-user front end shares it: regions, and two kinds of addresses."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right

from qmpd.aio.guest_memory import SharedMapping
from qmpd.protocols.vhost_user import MAX_SLOTS, Region, VhostUserError
from qmpd.protocols.virtqueue import RingError


class GuestMemory:
    """The regions of one front end."""

    def __init__(self) -> None:
        self._regions: list[tuple[Region, SharedMapping]] = []
        self._starts: list[int] = []

    def add(self, region: Region, fd: int) -> None:
        """Map one more region; the descriptor stays the caller's. Raises VhostUserError."""
        if len(self._regions) >= MAX_SLOTS:
            raise VhostUserError(f"there are {len(self._regions)} memory regions; the limit is {MAX_SLOTS}")
        for other, _ in self._regions:
            if region.guest < other.guest + other.size and other.guest < region.guest + region.size:
                raise VhostUserError(f"the memory regions at {region.guest:#x} and {other.guest:#x} overlap")
        try:
            mapping = SharedMapping(fd, region.offset, region.size)
        except (OSError, ValueError, OverflowError) as error:
            text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise VhostUserError(f"the memory region at {region.guest:#x} cannot be mapped: {text}") from error
        at = bisect_right(self._starts, region.guest)
        self._starts.insert(at, region.guest)
        self._regions.insert(at, (region, mapping))

    def remove(self, region: Region) -> None:
        """Unmap the region that is where `region` says. Raises VhostUserError."""
        for at, (one, mapping) in enumerate(self._regions):
            if (one.guest, one.size, one.user) == (region.guest, region.size, region.user):
                mapping.close()
                del self._regions[at], self._starts[at]
                return
        raise VhostUserError(f"there is no memory region of {region.size} bytes at {region.guest:#x}")

    def clear(self) -> None:
        """Unmap everything."""
        for _, mapping in self._regions:
            with contextlib.suppress(BufferError):  # of a request that has not ended: it goes with its last view
                mapping.close()
        self._regions, self._starts = [], []

    @property
    def shrunk(self) -> bool:
        """Whether a file has lost something that was used."""
        return any(mapping.shrunk for _, mapping in self._regions)

    def guest(self, address: int, length: int) -> list[memoryview]:
        """(Memory) Return the pieces that `length` bytes at a guest address lie in. Raises RingError."""
        pieces: list[memoryview] = []
        at = bisect_right(self._starts, address) - 1
        while length:
            if at < 0 or at >= len(self._regions):
                raise RingError(f"there is no memory at {address:#x}")
            region, mapping = self._regions[at]
            start = address - region.guest
            if not 0 <= start < region.size:
                raise RingError(f"there is no memory at {address:#x}")
            piece = min(length, region.size - start)
            pieces.append(mapping.view[start : start + piece])
            address, length, at = address + piece, length - piece, at + 1
        return pieces

    def front_end(self, address: int, length: int) -> memoryview:
        """Return `length` bytes at an address of the front end. Raises VhostUserError."""
        for region, mapping in self._regions:
            start = address - region.user
            if start >= 0 and start + length <= region.size:
                return mapping.view[start : start + length]
        raise VhostUserError(f"there are no {length} bytes of shared memory at {address:#x}")
