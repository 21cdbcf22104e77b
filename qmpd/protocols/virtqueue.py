"""A split ring of virtio, the device's side: chains of buffers out, used elements in.

Source: Virtual I/O Device (VIRTIO) 1.2, section 2.7. The driver on the other side may write to the ring
at any time: whatever is believed is read once, checked, and not read again.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from qmpd.errors import QmpdError
from qmpd.protocols.vhost_inflight import Inflight

MAX_SIZE = 1024
"""Descriptors of a ring, and of one chain: what QEMU's devices go to."""

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("=II")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1


class RingError(QmpdError):
    """The driver broke the ring."""


class Memory(Protocol):
    """The memory of the guest."""

    def guest(self, address: int, length: int) -> list[memoryview]:
        """Return the pieces that `length` bytes at a guest address lie in. Raises RingError."""


class Chain(NamedTuple):
    """One request of the driver.

    head       what names it when it is done
    readable   buffers for the device to read, in order
    writable   buffers for the device to write, in order
    """

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


def sizes(num: int) -> tuple[int, int, int]:
    """Return the bytes of the descriptor table, the available and the used ring of `num` descriptors."""
    return num * _DESCRIPTOR.size, 6 + 2 * num, 6 + 8 * num


class SplitRing:
    """One ring in use.

    descriptors, available, used   its parts, writable views of the sizes that `sizes` tells
    base        index of the first chain to take
    event_idx, indirect            whether these features were agreed on
    fence       keeps later loads from passing earlier stores
    inflight    notes what is under way; the chains that it knows of are taken first, and `base` is not believed
    """

    def __init__(
        self,
        memory: Memory,
        num: int,
        descriptors: memoryview,
        available: memoryview,
        used: memoryview,
        *,
        base: int,
        event_idx: bool,
        indirect: bool,
        fence: Callable[[], object],
        inflight: Inflight | None = None,
    ) -> None:
        self._memory, self._num = memory, num
        self._descriptors, self._used = descriptors, used
        self._available16, self._used16 = available.cast("H"), used[: 6 + 8 * num].cast("H")
        self._event_idx, self._indirect, self._fence = event_idx, indirect, fence
        self.next = base
        """Index of the next chain to take, free-running, 16 bits."""
        self._used_index = self._used16[1]
        self._inflight = inflight
        self._again: deque[int] = deque()
        if inflight is not None:
            self._again.extend(inflight.resume(self._used_index))
            self.next = (self._used_index + len(self._again)) & 0xFFFF
        self._told = -1
        """Used index at the last notification; -1 before the first."""

    def release(self) -> None:
        """Give up the views; the ring is of no use afterwards."""
        for view in (self._available16, self._used16, self._descriptors, self._used):
            view.release()
        if self._inflight is not None:
            self._inflight.release()

    # --- what the driver offers ---------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """Take the next chain, None if there is none for now. Raises RingError.

        After None a kick comes for the next one.
        """
        if self._again:
            return self._begin(self._again.popleft())
        waiting = (self._available16[1] - self.next) & 0xFFFF
        if not waiting and self._event_idx:
            self._used16[2 + 4 * self._num] = self.next  # avail_event
            self._fence()
            waiting = (self._available16[1] - self.next) & 0xFFFF
        if not waiting:
            return None
        if waiting > self._num:
            raise RingError(f"{waiting} chains are available in a ring of {self._num}")
        self._fence()
        chain = self._begin(self._available16[2 + self.next % self._num])
        self.next = (self.next + 1) & 0xFFFF
        return chain

    def _begin(self, head: int) -> Chain:
        if head >= self._num:
            raise RingError(f"a chain begins with descriptor {head} of {self._num}")
        chain = self._chain(head)
        if self._inflight is not None:
            self._inflight.taken(head)
        return chain

    def _chain(self, head: int) -> Chain:
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        table: memoryview | bytes = self._descriptors
        count, at, left = self._num, head, MAX_SIZE
        nested = False
        while True:
            if not left:
                raise RingError(f"a chain has more than {MAX_SIZE} descriptors, or goes round")
            left -= 1
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, at * _DESCRIPTOR.size)
            if flags & _INDIRECT:
                if nested or not self._indirect or flags & _NEXT:
                    raise RingError("an indirect table is where none may be")
                table = self._table(address, length)
                count, at, nested = length // _DESCRIPTOR.size, 0, True
                continue
            if not length:
                raise RingError("a buffer has no bytes")
            if flags & _WRITE:
                writable += self._memory.guest(address, length)
            elif writable:
                raise RingError("a buffer to read follows one to write")
            else:
                readable += self._memory.guest(address, length)
            if not flags & _NEXT:
                return Chain(head, readable, writable)
            if following >= count:
                raise RingError(f"a chain goes on with descriptor {following} of {count}")
            at = following

    def _table(self, address: int, length: int) -> bytes:
        """Return a copy of an indirect table."""
        if not length or length % _DESCRIPTOR.size or length > MAX_SIZE * _DESCRIPTOR.size:
            raise RingError(f"an indirect table has {length} bytes")
        return b"".join(self._memory.guest(address, length))

    # --- what the device has done -------------------------------------------------------------------

    def push(self, head: int, written: int) -> None:
        """Give a chain back; `written` bytes of its buffers were written."""
        _USED.pack_into(self._used, 4 + 8 * (self._used_index % self._num), head, written)
        self._used_index = (self._used_index + 1) & 0xFFFF
        if self._inflight is not None:
            self._inflight.giving(head)
        self._fence()
        self._used16[1] = self._used_index
        if self._inflight is not None:
            self._fence()
            self._inflight.given(head, self._used_index)

    def must_notify(self) -> bool:
        """Say whether the driver wants to be told of what was pushed since it was told last."""
        self._fence()
        before, self._told = self._told, self._used_index
        if not self._event_idx:
            return not self._available16[0] & _NO_INTERRUPT
        if before < 0:
            return True
        event = self._available16[2 + self._num]  # used_event
        return (self._used_index - event - 1) & 0xFFFF < (self._used_index - before) & 0xFFFF
