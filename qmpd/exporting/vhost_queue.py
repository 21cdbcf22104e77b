"""One ring of a vhost-user front end, and the requests of it that are under way. Lives on the data loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
from collections.abc import Coroutine
from typing import Any, Protocol

from qmpd.aio import guest_memory
from qmpd.exporting.vhost_memory import GuestMemory
from qmpd.exporting.virtio_disk import LARGEST, VirtioDisk, VirtioRequest
from qmpd.protocols import virtqueue
from qmpd.protocols.vhost_inflight import Inflight
from qmpd.protocols.vhost_user import RingAddresses, VhostUserError
from qmpd.protocols.virtio_blk import Feature
from qmpd.protocols.virtqueue import Chain, RingError, SplitRing

log = logging.getLogger(__name__)

TURN = 256
"""Chains taken from one ring before the loop sees to the others."""

_ONE = struct.pack("=Q", 1)


class Host(Protocol):
    """The front end, as its rings see it."""

    memory: GuestMemory
    disk: VirtioDisk
    features: int

    def inflight(self, index: int, num: int) -> Inflight | None:
        """Return the notes of a ring, None if there are none. Raises VhostUserError."""

    @property
    def shrunk(self) -> bool:
        """Whether a file that is shared has lost something that was used."""

    def admit(self, queue: Queue) -> bool:
        """Say whether there is room for one more request; if not, `queue.take` is called when there is."""

    def entered(self, size: int) -> None:
        """A request of `size` bytes is under way."""

    def left(self, size: int) -> None:
        """It has ended."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work, now as far as it gets."""

    def fail(self, why: str) -> None:
        """Hang up."""


class Queue:
    """One ring of a front end: what was told of it, and what is under way."""

    def __init__(self, front: Host, index: int) -> None:
        self._front, self.index = front, index
        self.num = 0
        self.base = 0
        self.addresses: RingAddresses | None = None
        self.enabled = False
        self.kick = self.call = self.error = -1
        self.ring: SplitRing | None = None
        self.under_way = 0
        """Requests that were taken and not given back."""
        self._idle: asyncio.Future[None] | None = None
        self._taking = self._untold = False

    def set_fd(self, name: str, fd: int) -> None:
        """Take over a descriptor, -1 for none, in place of an earlier one."""
        old = getattr(self, name)
        if old >= 0:
            os.close(old)
        setattr(self, name, fd)

    # --- start and stop -----------------------------------------------------------------------------

    def start(self) -> None:
        """(With a kick descriptor) Use the ring from now on. Raises VhostUserError."""
        if self.addresses is None or not self.num:
            raise VhostUserError(f"queue {self.index} is started without an address or a size")
        where = (self.addresses.descriptors, self.addresses.available, self.addresses.used)
        for address, alignment in zip(where, (16, 2, 4), strict=True):
            if address % alignment:
                raise VhostUserError(f"a part of queue {self.index} is at {address:#x}, no multiple of {alignment}")
        memory = self._front.memory
        views = [
            memory.front_end(address, size) for address, size in zip(where, virtqueue.sizes(self.num), strict=True)
        ]
        self.ring = SplitRing(
            memory,
            self.num,
            *views,
            base=self.base,
            event_idx=bool(self._front.features & Feature.EVENT_IDX),
            indirect=bool(self._front.features & Feature.INDIRECT_DESC),
            fence=guest_memory.fence(),
            inflight=self._front.inflight(self.index, self.num),
        )
        asyncio.get_running_loop().add_reader(self.kick, self._kicked)

    async def stop(self, *, keep_kick: bool = False) -> None:
        """Take no more requests, wait for those that were taken, and forget the ring."""
        if self.kick >= 0:
            asyncio.get_running_loop().remove_reader(self.kick)
        self.enabled = False
        while self.under_way:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
        if self.ring is not None:
            self.base = self.ring.next
            self.ring.release()
            self.ring = None
        if not keep_kick:
            self.set_fd("kick", -1)

    def close(self) -> None:
        """(After `stop`) Give up the descriptors."""
        for name in ("kick", "call", "error"):
            self.set_fd(name, -1)

    # --- requests -----------------------------------------------------------------------------------

    def _kicked(self) -> None:
        try:
            os.eventfd_read(self.kick)
        except BlockingIOError:
            return
        except OSError as error:
            self._front.fail(f"queue {self.index}: {error.strerror}")
            return
        self.take()

    def take(self) -> None:
        """Take requests while there are some and there is room for them."""
        if self.ring is None or not self.enabled or self._taking:
            return
        self._taking = True
        try:
            more = self._take(self.ring)
        except RingError as error:
            self._broken(str(error))
            more = False
        finally:
            self._taking = False
        if self._front.shrunk:
            self._front.fail("memory that it shares is gone")
        elif more:
            asyncio.get_running_loop().call_soon(self.take)

    def _take(self, ring: SplitRing) -> bool:
        """Return whether more may be there. Raises RingError; what was taken before is carried out."""
        requests: list[VirtioRequest] = []
        try:
            while len(requests) < TURN:
                if not self._front.admit(self):
                    return False
                chain = ring.pop()
                if chain is None:
                    return False
                if self.under_way >= self.num:
                    raise RingError(f"more requests are under way than the {self.num} descriptors of the ring can be")
                requests.append(self._request(chain))
            return True
        finally:
            for work in self._front.disk.works(requests):
                self._front.spawn(work)
            self._tell()

    def _request(self, chain: Chain) -> VirtioRequest:
        request = VirtioRequest(chain, self._done)
        self.under_way += 1
        self._front.entered(min(request.length, LARGEST))
        return request

    def _done(self, request: VirtioRequest) -> None:
        if self.ring is not None:
            self.ring.push(request.head, request.written)
            if not self._untold:
                self._untold = True
                if not self._taking:
                    asyncio.get_running_loop().call_soon(self._tell)
        self.under_way -= 1
        if not self.under_way and self._idle is not None and not self._idle.done():
            self._tell()
            self._idle.set_result(None)
        self._front.left(min(request.length, LARGEST))

    def _tell(self) -> None:
        """Interrupt the driver if something is done that it wants to know of."""
        if not self._untold:
            return
        self._untold = False
        if self.ring is not None and self.call >= 0 and self.ring.must_notify():
            with contextlib.suppress(BlockingIOError):  # it has been told so often that it must know
                os.write(self.call, _ONE)

    def _broken(self, why: str) -> None:
        """The driver broke the ring: leave it alone until it is set up anew."""
        log.warning("vhost-user: queue %d is stopped: %s", self.index, why)
        self.enabled = False
        if self.kick >= 0:
            asyncio.get_running_loop().remove_reader(self.kick)
        if self.error >= 0:
            with contextlib.suppress(OSError):
                os.write(self.error, _ONE)
