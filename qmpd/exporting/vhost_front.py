"""A vhost-user front end: what it asks on its socket. Lives on the data loop.

The front end is a virtual machine's, or a program's that drives the rings itself. Model: libvhost-user.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from array import array
from collections.abc import Callable, Coroutine
from typing import Any

from qmpd.aio import eager
from qmpd.aio.guest_memory import SharedMapping
from qmpd.aio.unix import descriptors
from qmpd.exporting.vhost_memory import GuestMemory
from qmpd.exporting.vhost_queue import Queue
from qmpd.exporting.virtio_disk import LARGEST, VirtioDisk
from qmpd.protocols import vhost_user, virtqueue
from qmpd.protocols.vhost_inflight import Inflight, region_size
from qmpd.protocols.vhost_user import InflightArea, Message, MessageReader, ProtocolFeature, VhostUserError
from qmpd.protocols.vhost_user import Request as Ask
from qmpd.units import is_power_of_two

log = logging.getLogger(__name__)

PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)

IN_FLIGHT = 2 * LARGEST
"""Bytes that the requests of one front end may have under way; the others stay in their rings."""

_CONTROL = socket.CMSG_SPACE(vhost_user.MAX_FDS * array("i").itemsize)

Handler = Callable[["FrontEnd", Message, list[int]], Coroutine[Any, Any, bytes | None]]


class FrontEnd:
    """One connected front end, until `closed` is called."""

    def __init__(self, sock: socket.socket, disk: VirtioDisk, closed: Callable[[], None]) -> None:
        self._sock, self.disk, self._closed = sock, disk, closed
        self.memory = GuestMemory()
        self.queues: dict[int, Queue] = {}
        self.features = self._agreed = 0
        self._in_flight = 0
        self._starved: set[Queue] = set()
        self._channel: socket.socket | None = None
        self._notes: tuple[InflightArea, SharedMapping] | None = None
        self._answer_fd = -1
        self._tasks: set[asyncio.Future[None]] = set()
        self._wakeup: asyncio.Future[None] | None = None
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._converse())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work, now as far as it gets."""
        task = eager.start(work, self._loop)
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def admit(self, queue: Queue) -> bool:
        """(Host) Say whether there is room for one more request, or let the queue wait for it."""
        if self._in_flight <= IN_FLIGHT - LARGEST:
            return True
        self._starved.add(queue)
        return False

    def entered(self, size: int) -> None:
        """(Host) Count a request that is under way."""
        self._in_flight += size

    def left(self, size: int) -> None:
        """(Host) Count it no more, and let those in that wait for room."""
        self._in_flight -= size
        if self._starved and self._in_flight <= IN_FLIGHT - LARGEST:
            waiting, self._starved = self._starved, set()
            for queue in waiting:
                self._loop.call_soon(queue.take)

    def fail(self, why: str) -> None:
        """Hang up."""
        log.warning("vhost-user: the front end is let go: %s", why)
        self.hang_up()

    def hang_up(self) -> None:
        """End the conversation after what is under way."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def config_changed(self) -> None:
        """Tell the front end to read the config space anew."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send(vhost_user.config_changed(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    # --- the conversation ---------------------------------------------------------------------------

    async def _converse(self) -> None:
        reader = MessageReader()
        fds: list[int] = []
        try:
            while True:
                data, came = await self._receive(reader.need)
                fds += came
                if not data:
                    return
                message = reader.feed(data)
                if message is None:
                    continue
                answer = await self._handle(message, fds)
                _close_all(fds)
                if answer:
                    await self._send(answer)
        except VhostUserError as error:
            log.warning("vhost-user: the front end is let go: %s", error)
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.EPIPE):
                log.warning("vhost-user: %s", error.strerror)
        finally:
            _close_all(fds)
            await self._end()

    async def _receive(self, size: int) -> tuple[bytes, list[int]]:
        """Return up to `size` bytes, none at the end, and the descriptors with them."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(size, _CONTROL, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                self._wakeup = self._loop.create_future()
                self._loop.add_reader(self._sock, self._readable)
                await self._wakeup
                continue
            fds = descriptors(ancillary)
            if flags & socket.MSG_CTRUNC:
                _close_all(fds)
                raise VhostUserError(f"a message has more than {vhost_user.MAX_FDS} descriptors")
            return data, fds

    async def _send(self, answer: bytes) -> None:
        """Send a reply, and the descriptor that goes with it. Raises OSError."""
        if self._answer_fd >= 0:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", (self._answer_fd,)))]
            sent = self._sock.sendmsg([answer], control)  # to a front end that waits: there is room
            os.close(self._answer_fd)
            self._answer_fd = -1
            answer = answer[sent:]
        if answer:
            await self._loop.sock_sendall(self._sock, answer)

    def _readable(self) -> None:
        self._loop.remove_reader(self._sock)
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def _handle(self, message: Message, fds: list[int]) -> bytes | None:
        """Do what a message asks; return the reply, None for none. Raises VhostUserError."""
        acknowledge = message.need_reply and bool(self._agreed & ProtocolFeature.REPLY_ACK)
        handler = _HANDLERS.get(message.number)
        try:
            if handler is None:
                raise VhostUserError(f"message {message.number} is not known")
            answer = await handler(self, message, fds)
        except VhostUserError as error:
            if message.number in vhost_user.ANSWERED or not acknowledge:
                raise
            log.warning("vhost-user: %s", error)
            return vhost_user.reply_u64(message.number, 1)
        if answer is None and acknowledge:
            return vhost_user.reply_u64(message.number, 0)
        return answer

    async def _end(self) -> None:
        """Let everything of this front end go, after what is under way."""
        for queue in self.queues.values():
            await queue.stop()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        for queue in self.queues.values():
            queue.close()
        self.memory.clear()
        if self._notes is not None:
            self._notes[1].close()
        if self._answer_fd >= 0:
            os.close(self._answer_fd)
        if self._channel is not None:
            self._channel.close()
        self._sock.close()
        self._closed()

    def _queue(self, index: int) -> Queue:
        if index >= self.disk.queues:
            raise VhostUserError(f"there is no queue {index}; there are {self.disk.queues}")
        if index not in self.queues:
            self.queues[index] = Queue(self, index)
        return self.queues[index]

    # --- messages -----------------------------------------------------------------------------------

    async def _get_features(self, message: Message, _fds: list[int]) -> bytes:
        return vhost_user.reply_u64(message.number, self._offered())

    def _offered(self) -> int:
        return self.disk.features() | vhost_user.PROTOCOL_FEATURES

    async def _set_features(self, message: Message, _fds: list[int]) -> None:
        wanted = vhost_user.u64(message)
        if wanted & ~self._offered():
            raise VhostUserError(f"features {wanted & ~self._offered():#x} were not offered")
        self.features = wanted

    async def _set_owner(self, _message: Message, _fds: list[int]) -> None:
        """There is one front end at a time anyway."""

    async def _reset_owner(self, _message: Message, _fds: list[int]) -> None:
        for queue in self.queues.values():
            await queue.stop()

    async def _get_protocol_features(self, message: Message, _fds: list[int]) -> bytes:
        return vhost_user.reply_u64(message.number, PROTOCOL)

    async def _set_protocol_features(self, message: Message, _fds: list[int]) -> None:
        wanted = vhost_user.u64(message)
        if wanted & ~PROTOCOL:
            raise VhostUserError(f"protocol features {wanted & ~PROTOCOL:#x} were not offered")
        self._agreed = wanted

    async def _get_queue_num(self, message: Message, _fds: list[int]) -> bytes:
        return vhost_user.reply_u64(message.number, self.disk.queues)

    async def _get_max_mem_slots(self, message: Message, _fds: list[int]) -> bytes:
        return vhost_user.reply_u64(message.number, vhost_user.MAX_SLOTS)

    async def _set_backend_req_fd(self, _message: Message, fds: list[int]) -> None:
        fd = _one(fds)
        try:
            channel = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise VhostUserError("the descriptor for messages of the back end is no socket") from error
        channel.setblocking(False)
        if self._channel is not None:
            self._channel.close()
        self._channel = channel

    async def _get_config(self, message: Message, _fds: list[int]) -> bytes:
        offset, size, _ = vhost_user.config_part(message)
        contents = self.disk.config()
        if offset + size > len(contents):
            return vhost_user.reply(message.number, b"")
        return vhost_user.reply_config(message.number, offset, contents[offset : offset + size])

    async def _set_config(self, message: Message, _fds: list[int]) -> None:
        offset, size, contents = vhost_user.config_part(message)
        if not self.disk.set_config(offset, contents):
            raise VhostUserError(f"{size} bytes of the config space at {offset} cannot be changed")

    # memory: nothing may be under way in what goes

    async def _set_mem_table(self, message: Message, fds: list[int]) -> None:
        regions = vhost_user.regions(message)
        if len(fds) != len(regions):
            raise VhostUserError(f"{len(regions)} memory regions come with {len(fds)} descriptors")
        running = await self._suspend()
        self.memory.clear()
        for region, fd in zip(regions, fds, strict=True):
            self.memory.add(region, fd)
        self._resume(running)

    async def _add_mem_reg(self, message: Message, fds: list[int]) -> None:
        region = vhost_user.one_region(message)
        if len(fds) != 1:
            raise VhostUserError(f"a memory region comes with {len(fds)} descriptors")
        self.memory.add(region, fds[0])

    async def _rem_mem_reg(self, message: Message, _fds: list[int]) -> None:
        region = vhost_user.one_region(message)
        running = await self._suspend()
        try:
            self.memory.remove(region)
        finally:
            self._resume(running)

    async def _suspend(self) -> list[tuple[Queue, bool]]:
        """Wait until no request uses the memory, and give up the rings in it.

        Return the queues that have one, and whether they are enabled.
        """
        rings = [(queue, queue.enabled) for queue in self.queues.values() if queue.ring is not None]
        for queue, _ in rings:
            await queue.stop(keep_kick=True)
        return rings

    def _resume(self, rings: list[tuple[Queue, bool]]) -> None:
        for queue, enabled in rings:
            queue.start()
            queue.enabled = enabled
            self._loop.call_soon(queue.take)

    # notes of what is under way

    async def _get_inflight_fd(self, message: Message, _fds: list[int]) -> bytes:
        """Make memory for notes; the front end gives it back at once, and to whoever serves it next."""
        wanted = vhost_user.inflight_area(message)
        self._check_area(wanted)
        area = wanted._replace(size=wanted.queues * region_size(wanted.num), offset=0)
        fd = os.memfd_create("qmpd-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, area.size)
        if self._answer_fd >= 0:
            os.close(self._answer_fd)
        self._answer_fd = fd
        return vhost_user.reply_inflight(message.number, area)

    async def _set_inflight_fd(self, message: Message, fds: list[int]) -> None:
        area = vhost_user.inflight_area(message)
        self._check_area(area)
        needed = area.queues * region_size(area.num)
        if area.size < needed:
            raise VhostUserError(
                f"an area of {area.size} bytes for {area.queues} queues of {area.num}: it takes {needed}"
            )
        fd = _one(fds)
        try:
            mapping = SharedMapping(fd, area.offset, needed)
        except (OSError, ValueError, OverflowError) as error:
            raise VhostUserError(f"the area of {area.size} bytes for what is under way cannot be mapped") from error
        finally:
            os.close(fd)
        rings = await self._suspend()
        if self._notes is not None:
            self._notes[1].close()
        self._notes = (area, mapping)
        self._resume(rings)

    def _check_area(self, area: InflightArea) -> None:
        """Refuse notes of more, or of larger rings, than there can be. Raises VhostUserError."""
        if not area.queues or area.queues > self.disk.queues:
            raise VhostUserError(f"notes of {area.queues} queues; there are {self.disk.queues}")
        if not area.num or area.num > virtqueue.MAX_SIZE:
            raise VhostUserError(f"notes of queues of {area.num}; the limit is {virtqueue.MAX_SIZE}")

    def inflight(self, index: int, num: int) -> Inflight | None:
        """(Host) Return the notes of a ring, None if there are none. Raises VhostUserError."""
        if self._notes is None or not self._agreed & ProtocolFeature.INFLIGHT_SHMFD:
            return None
        area, mapping = self._notes
        if index >= area.queues or num > area.num:
            raise VhostUserError(f"queue {index} of {num} descriptors has no place among {area.queues} of {area.num}")
        start = index * region_size(area.num)
        return Inflight(mapping.view[start : start + region_size(area.num)], area.num)

    @property
    def shrunk(self) -> bool:
        """(Host) Whether a file that is shared has lost something that was used."""
        return self.memory.shrunk or (self._notes is not None and self._notes[1].shrunk)

    # rings

    async def _set_vring_num(self, message: Message, _fds: list[int]) -> None:
        index, num = vhost_user.state(message)
        queue = self._queue(index)
        if not is_power_of_two(num) or num > virtqueue.MAX_SIZE:
            raise VhostUserError(
                f"queue {index} of {num} descriptors: a power of two up to {virtqueue.MAX_SIZE} it may be"
            )
        queue.num = num

    async def _set_vring_base(self, message: Message, _fds: list[int]) -> None:
        index, base = vhost_user.state(message)
        self._queue(index).base = base & 0xFFFF

    async def _set_vring_addr(self, message: Message, _fds: list[int]) -> None:
        addresses = vhost_user.ring_addresses(message)
        queue = self._queue(addresses.queue)
        queue.addresses = addresses
        if queue.ring is not None:
            enabled = queue.enabled
            await queue.stop(keep_kick=True)
            queue.start()
            queue.enabled = enabled
            queue.take()

    async def _set_vring_kick(self, message: Message, fds: list[int]) -> None:
        queue, fd = self._event(message, fds)
        if fd < 0:
            raise VhostUserError(f"queue {queue.index} is to be polled, which is not offered")
        await queue.stop()
        queue.set_fd("kick", fd)
        queue.start()
        queue.enabled = not self.features & vhost_user.PROTOCOL_FEATURES
        queue.take()

    async def _set_vring_call(self, message: Message, fds: list[int]) -> None:
        queue, fd = self._event(message, fds)
        queue.set_fd("call", fd)

    async def _set_vring_err(self, message: Message, fds: list[int]) -> None:
        queue, fd = self._event(message, fds)
        queue.set_fd("error", fd)

    def _event(self, message: Message, fds: list[int]) -> tuple[Queue, int]:
        """Return the queue and its new descriptor, -1 for none. Raises VhostUserError."""
        value = vhost_user.u64(message)
        queue = self._queue(value & 0xFF)
        if value & vhost_user.NO_FD:
            return queue, -1
        fd = _one(fds)
        try:
            if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
                raise VhostUserError(f"a descriptor of queue {queue.index} is no eventfd")
            os.set_blocking(fd, False)
        except BaseException:
            os.close(fd)
            raise
        return queue, fd

    async def _get_vring_base(self, message: Message, _fds: list[int]) -> bytes:
        index, _ = vhost_user.state(message)
        queue = self._queue(index)
        await queue.stop()
        return vhost_user.reply_state(message.number, index, queue.base)

    async def _set_vring_enable(self, message: Message, _fds: list[int]) -> None:
        index, value = vhost_user.state(message)
        queue = self._queue(index)
        queue.enabled = bool(value)
        queue.take()


_HANDLERS: dict[int, Handler] = {
    Ask.GET_FEATURES: FrontEnd._get_features,
    Ask.SET_FEATURES: FrontEnd._set_features,
    Ask.SET_OWNER: FrontEnd._set_owner,
    Ask.RESET_OWNER: FrontEnd._reset_owner,
    Ask.SET_MEM_TABLE: FrontEnd._set_mem_table,
    Ask.SET_VRING_NUM: FrontEnd._set_vring_num,
    Ask.SET_VRING_ADDR: FrontEnd._set_vring_addr,
    Ask.SET_VRING_BASE: FrontEnd._set_vring_base,
    Ask.GET_VRING_BASE: FrontEnd._get_vring_base,
    Ask.SET_VRING_KICK: FrontEnd._set_vring_kick,
    Ask.SET_VRING_CALL: FrontEnd._set_vring_call,
    Ask.SET_VRING_ERR: FrontEnd._set_vring_err,
    Ask.GET_PROTOCOL_FEATURES: FrontEnd._get_protocol_features,
    Ask.SET_PROTOCOL_FEATURES: FrontEnd._set_protocol_features,
    Ask.GET_QUEUE_NUM: FrontEnd._get_queue_num,
    Ask.SET_VRING_ENABLE: FrontEnd._set_vring_enable,
    Ask.SET_BACKEND_REQ_FD: FrontEnd._set_backend_req_fd,
    Ask.GET_CONFIG: FrontEnd._get_config,
    Ask.SET_CONFIG: FrontEnd._set_config,
    Ask.GET_INFLIGHT_FD: FrontEnd._get_inflight_fd,
    Ask.SET_INFLIGHT_FD: FrontEnd._set_inflight_fd,
    Ask.GET_MAX_MEM_SLOTS: FrontEnd._get_max_mem_slots,
    Ask.ADD_MEM_REG: FrontEnd._add_mem_reg,
    Ask.REM_MEM_REG: FrontEnd._rem_mem_reg,
}


def _one(fds: list[int]) -> int:
    """Take the one descriptor of a message. Raises VhostUserError."""
    if len(fds) != 1:
        raise VhostUserError(f"a message that needs one descriptor has {len(fds)}")
    return fds.pop()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
