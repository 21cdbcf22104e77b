"""A vhost-user front end with the driver of a virtio disk: what QEMU and a guest's kernel are together."""

from __future__ import annotations

import array
import contextlib
import itertools
import mmap
import os
import select
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPLY_SECONDS = 20.0
GUEST, USER = 0x10000, 0x7F0000000000
"""Where the memory is for the guest and for the front end: never equal, so that a mix-up is seen."""

(GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE) = (1, 2, 3, 4, 5)
(SET_NUM, SET_ADDR, SET_BASE, GET_BASE, SET_KICK, SET_CALL, SET_ERR) = range(8, 15)
(GET_PROTOCOL, SET_PROTOCOL, GET_QUEUES, SET_ENABLE, SET_CHANNEL) = (15, 16, 17, 18, 21)
GET_INFLIGHT, SET_INFLIGHT = 31, 32
(GET_CONFIG, SET_CONFIG, GET_SLOTS, ADD_MEM, REM_MEM) = (24, 25, 36, 37, 38)
IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
NEXT, WRITE, INDIRECT = 1, 2, 4
EVENT_IDX, INDIRECT_DESC, PROTOCOL_FEATURES, VERSION_1 = 1 << 29, 1 << 28, 1 << 30, 1 << 32
ACK, CHANNEL, NOTES, SLOTS = 1 << 3, 1 << 5, 1 << 12, 1 << 15

Descriptor = tuple[int, int, int, int]
"""Address, length, flags, next."""


class Gone(Exception):
    """The back end has hung up."""


class Wire:
    """The socket: messages as numbers and bytes."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(REPLY_SECONDS)
        self.sock.connect(str(path))

    def send(self, number: int, payload: bytes = b"", fds: list[int] | None = None, flags: int = 1) -> None:
        data = struct.pack("<III", number, flags, len(payload)) + payload
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([data], control)
        except OSError as error:
            raise Gone(str(error)) from error

    def receive(self) -> tuple[int, int, bytes]:
        number, flags, size = struct.unpack("<III", self._exact(12))
        return number, flags, self._exact(size)

    def _exact(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.sock.recv(size - len(data))
            except ConnectionError as error:
                raise Gone(str(error)) from error
            if not piece:
                raise Gone("end of stream")
            data += piece
        return data

    def ask(self, number: int, payload: bytes = b"") -> bytes:
        """Send a request that is answered with data."""
        self.send(number, payload)
        answered, flags, data = self.receive()
        assert (answered, flags) == (number, 5)
        return data

    def ask_u64(self, number: int) -> int:
        (value,) = struct.unpack("<Q", self.ask(number))
        return int(value)

    def acknowledged(self, number: int, payload: bytes = b"", fds: list[int] | None = None) -> int:
        """Send a request with need_reply; 0 means it succeeded."""
        self.send(number, payload, fds, flags=9)
        answered, _, data = self.receive()
        assert answered == number
        return int(struct.unpack("<Q", data)[0])

    def is_open(self) -> bool:
        """Say whether the back end still answers."""
        try:
            self.ask(GET_FEATURES)
        except Gone:
            return False
        return True

    def close(self) -> None:
        self.sock.close()


@dataclass
class Pending:
    """A request under way: where its data and its status are in the memory."""

    head: int
    data: int
    length: int
    status: int


@dataclass
class Ring:
    """One queue as the driver has it: parts at offsets of the memory."""

    index: int
    num: int
    descriptors: int
    available: int
    used: int
    kick: int
    call: int
    next: int = 0
    seen: int = 0
    pending: dict[int, Pending] = field(default_factory=dict)


class Driver:
    """A disk driven through one back end.

    features   of virtio that are to be agreed on, beside VERSION_1
    """

    def __init__(
        self,
        path: Path,
        *,
        features: int = EVENT_IDX | INDIRECT_DESC,
        queues: int = 1,
        num: int = 128,
        memory: int = 16 << 20,
        table: bool = False,
        start: bool = True,
    ) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, memory)
        self.memory = mmap.mmap(self.fd, memory)
        self.size = memory
        self.event_idx = bool(features & EVENT_IDX)
        self._features, self._table = features, table
        self.notes: tuple[bytes, int] | None = None
        self._connect(path)
        self._free = 64 << 10
        self.rings = [self._ring(index, num) for index in range(queues)]
        if start:
            for ring in self.rings:
                self.start(ring)

    def _connect(self, path: Path) -> None:
        """Hold the conversation up to the memory."""
        self.wire = Wire(path)
        self.offered = self.wire.ask_u64(GET_FEATURES)
        self.protocol = self.wire.ask_u64(GET_PROTOCOL) & (ACK | CHANNEL | SLOTS | NOTES | 1 | 1 << 9)
        self.wire.send(SET_PROTOCOL, struct.pack("<Q", self.protocol))
        self.queues = self.wire.ask_u64(GET_QUEUES)
        self.channel, theirs = socket.socketpair()
        assert self.wire.acknowledged(SET_CHANNEL, fds=[theirs.fileno()]) == 0
        theirs.close()
        self.wire.send(SET_OWNER)
        agreed = (self._features & self.offered) | PROTOCOL_FEATURES | VERSION_1
        self.wire.send(SET_FEATURES, struct.pack("<Q", agreed))
        region = struct.pack("<QQQQ", GUEST, self.size, USER, 0)
        if self._table:
            assert self.wire.acknowledged(SET_MEM_TABLE, struct.pack("<II", 1, 0) + region, [self.fd]) == 0
        else:
            assert self.wire.acknowledged(ADD_MEM, bytes(8) + region, [self.fd]) == 0

    def take_notes(self, num: int) -> None:
        """Ask for memory for notes of what is under way, and give it back; rings are started after that."""
        self.wire.send(GET_INFLIGHT, struct.pack("<QQHH4x", 0, 0, self.queues, num))
        data, (fd,), _, _ = socket.recv_fds(self.wire.sock, 12 + 24, 1)
        self.notes = (data[12:], fd)
        assert self.wire.acknowledged(SET_INFLIGHT, self.notes[0], [fd]) == 0

    def connect_again(self, path: Path) -> None:
        """Go on, with rings as they are, at a back end that comes after one that has died."""
        self.wire.close()
        self.channel.close()
        self._connect(path)
        if self.notes is not None:
            assert self.wire.acknowledged(SET_INFLIGHT, self.notes[0], [self.notes[1]]) == 0
        for ring in self.rings:
            self.start(ring, base=self.get(ring.used + 2, "H"))

    def _ring(self, index: int, num: int) -> Ring:
        base = index * (32 << 10)
        assert base + (32 << 10) <= 64 << 10 or self._reserve(base + (32 << 10))
        kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        return Ring(index, num, base, base + 16 * num, base + 24 * num + 16, kick, call)

    def _reserve(self, end: int) -> bool:
        self._free = max(self._free, end)
        return True

    def start(self, ring: Ring, base: int | None = None) -> None:
        """Set a ring up and enable it: anew, or with its next request to take."""
        if base is None:
            base = 0
            ring.next = ring.seen = 0
            self.memory[ring.available : ring.available + 6 + 2 * ring.num] = bytes(6 + 2 * ring.num)
            self.memory[ring.used : ring.used + 6 + 8 * ring.num] = bytes(6 + 8 * ring.num)
        index = struct.pack("<Q", ring.index)
        self.wire.send(SET_CALL, index, [ring.call])
        self.wire.send(SET_NUM, struct.pack("<II", ring.index, ring.num))
        self.wire.send(SET_BASE, struct.pack("<II", ring.index, base))
        self.wire.send(SET_ADDR, self.addresses(ring))
        self.wire.send(SET_KICK, index, [ring.kick])
        assert self.wire.acknowledged(SET_ENABLE, struct.pack("<II", ring.index, 1)) == 0

    def addresses(self, ring: Ring) -> bytes:
        """Return the payload of SET_VRING_ADDR."""
        return struct.pack(
            "<IIQQQQ", ring.index, 0, USER + ring.descriptors, USER + ring.used, USER + ring.available, 0
        )

    def stop(self, ring: Ring) -> int:
        """Stop a ring; return the index of its next request."""
        answer = self.wire.ask(GET_BASE, struct.pack("<II", ring.index, 0))
        index, base = struct.unpack("<II", answer)
        assert index == ring.index
        return int(base)

    # --- rings --------------------------------------------------------------------------------------

    def put(self, offset: int, layout: str, *values: int) -> None:
        struct.pack_into("<" + layout, self.memory, offset, *values)

    def get(self, offset: int, layout: str) -> Any:
        return struct.unpack_from("<" + layout, self.memory, offset)[0]

    def offer(self, ring: Ring, head: int, descriptors: dict[int, Descriptor]) -> None:
        """Write descriptors, and make the chain that begins with `head` available."""
        for number, values in descriptors.items():
            self.put(ring.descriptors + 16 * number, "QIHH", *values)
        self.put(ring.available + 4 + 2 * (ring.next % ring.num), "H", head)
        ring.next = (ring.next + 1) & 0xFFFF
        self.put(ring.available + 2, "H", ring.next)

    def kick(self, ring: Ring) -> None:
        """Tell the back end."""
        os.eventfd_write(ring.kick, 1)

    def collect(self, ring: Ring) -> list[tuple[int, int]]:
        """Return the (head, written) that have come back since the last call."""
        found = []
        while ring.seen != self.get(ring.used + 2, "H"):
            element = ring.used + 4 + 8 * (ring.seen % ring.num)
            found.append((self.get(element, "I"), self.get(element + 4, "I")))
            ring.seen = (ring.seen + 1) & 0xFFFF
        if self.event_idx:
            self.put(ring.available + 4 + 2 * ring.num, "H", ring.seen)  # used_event
        return found

    def wait(self, ring: Ring, count: int) -> list[tuple[int, int]]:
        """Wait for interrupts until `count` chains have come back."""
        found = self.collect(ring)
        while len(found) < count:
            ready, _, _ = select.select([ring.call, self.wire.sock], [], [], REPLY_SECONDS)
            assert ready, f"no interrupt; {len(found)} of {count} came back, used index {self.get(ring.used + 2, 'H')}"
            if ring.call not in ready:
                raise Gone("end of stream")
            os.eventfd_read(ring.call)
            found += self.collect(ring)
        return found

    # --- requests -----------------------------------------------------------------------------------

    def begin(
        self,
        ring: Ring,
        slot: int,
        kind: int,
        sector: int,
        data: bytes | int,
        *,
        pieces: int = 1,
        indirect: bool = False,
    ) -> Pending:
        """Make a request available in `slot`: bytes are written, a number is read.

        slot     requests under way have different ones; each has room for 8 descriptors and 256 KiB
        pieces   buffers that the data lies in
        """
        length = data if isinstance(data, int) else len(data)
        room = self._free + slot * (257 << 10)
        header, status, body = room, room + 16, room + 1024
        assert body + length <= self.size
        self.put(header, "IIQ", kind, 0, sector)
        self.memory[status] = 0xFF
        if isinstance(data, int):
            self.memory[body : body + length] = b"\xaa" * length
        else:
            self.memory[body : body + length] = data
        cuts = [length * number // pieces for number in range(pieces + 1)]
        flags = WRITE if isinstance(data, int) else 0
        buffers = [(header, 16, 0)]
        buffers += [(body + low, high - low, flags) for low, high in itertools.pairwise(cuts) if high > low]
        buffers.append((status, 1, WRITE))
        first = 0 if indirect else slot * 8
        table = {
            first + at: (
                GUEST + where,
                size,
                flag | (NEXT if at + 1 < len(buffers) else 0),
                first + at + 1 if at + 1 < len(buffers) else 0,
            )
            for at, (where, size, flag) in enumerate(buffers)
        }
        if indirect:
            for at, values in table.items():
                self.put(room + 32 + 16 * at, "QIHH", *values)
            table = {slot * 8: (GUEST + room + 32, 16 * len(buffers), INDIRECT, 0)}
        self.offer(ring, slot * 8, table)
        pending = Pending(slot * 8, body, length, status)
        ring.pending[slot * 8] = pending
        return pending

    def result(self, pending: Pending) -> tuple[int, bytes]:
        return self.memory[pending.status], self.memory[pending.data : pending.data + pending.length]

    def request(
        self, kind: int, sector: int = 0, data: bytes | int = b"", *, pieces: int = 1, indirect: bool = False
    ) -> tuple[int, bytes]:
        """Do one request; return its status and what its buffers hold then."""
        ring = self.rings[0]
        pending = self.begin(ring, 0, kind, sector, data, pieces=pieces, indirect=indirect)
        self.kick(ring)
        ((head, _written),) = self.wait(ring, 1)
        assert head == pending.head
        return self.result(pending)

    def config(self) -> bytes:
        """Return the config space, as QEMU asks for it."""
        return self.wire.ask(GET_CONFIG, struct.pack("<III", 0, 57, 0) + bytes(57))[12:]

    def close(self) -> None:
        self.wire.close()
        self.channel.close()
        self.memory.close()
        if self.notes is not None:
            os.close(self.notes[1])
        for ring in self.rings:
            os.close(ring.kick)
            os.close(ring.call)
        with contextlib.suppress(OSError):
            os.close(self.fd)
