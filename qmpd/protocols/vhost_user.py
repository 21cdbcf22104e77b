"""vhost-user, the backend's side: messages to values and back, without I/O.

Source: QEMU docs/interop/vhost-user.rst. All integers are little-endian; of the many messages these are
the ones that a disk of today's QEMU needs.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from qmpd.errors import QmpdError

HEADER = struct.Struct("<III")
"""Request, flags, bytes of payload."""

MAX_PAYLOAD = 4096
"""Bytes; the longest payload that is known, SET_MEM_TABLE with all its regions, is shorter."""

MAX_FDS = 8
"""Descriptors of one message: one for each region of SET_MEM_TABLE."""

MAX_REGIONS = 8
"""Regions of one SET_MEM_TABLE."""

MAX_SLOTS = 509
"""Regions at a time, as other backends offer it."""

MAX_CONFIG = 256
"""Bytes of the config space that can be asked for."""

NO_FD = 0x100
"""In SET_VRING_KICK, CALL and ERR: there is no descriptor; the lower eight bits are the queue."""

_VERSION, _VERSION_MASK, _REPLY, _NEED_REPLY = 1, 3, 4, 8

_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESS = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
_CONFIG = struct.Struct("<III")
_INFLIGHT = struct.Struct("<QQHH")
_INFLIGHT_PADDED = 24  # QEMU sends and expects its own structure, which is longer than the document's


class VhostUserError(QmpdError):
    """The front end does not keep to the protocol."""


class Request(enum.IntEnum):
    """Messages of the front end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


ANSWERED = frozenset(
    (
        Request.GET_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_CONFIG,
        Request.GET_INFLIGHT_FD,
        Request.GET_MAX_MEM_SLOTS,
    )
)
"""Requests that are answered with data whatever their flags are."""

CONFIG_CHANGED = 2
"""The backend's own message: the config space is another now."""

PROTOCOL_FEATURES = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES, among the features of the device."""


class ProtocolFeature(enum.IntFlag):
    """Bits of GET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    CONFIGURE_MEM_SLOTS = 1 << 15


class Message(NamedTuple):
    """One request, whose descriptors are kept apart.

    number   a `Request`, or another number
    """

    number: int
    need_reply: bool
    payload: bytes


class Region(NamedTuple):
    """Memory of the guest that the front end shares.

    guest    address of its first byte for the guest
    size     bytes
    user     address of its first byte for the front end
    offset   of its first byte in the file of its descriptor
    """

    guest: int
    size: int
    user: int
    offset: int


class RingAddresses(NamedTuple):
    """Where the parts of a ring are, as addresses of the front end."""

    queue: int
    flags: int
    descriptors: int
    used: int
    available: int


class InflightArea(NamedTuple):
    """Memory for notes of what is under way: bytes, and for how many rings of how many descriptors."""

    size: int
    offset: int
    queues: int
    num: int


class MessageReader:
    """Takes the stream apart. Ask for `need` bytes at most at a time: descriptors then belong to one message."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.need = HEADER.size
        """Bytes until the next step: never 0."""

    def feed(self, data: bytes) -> Message | None:
        """Take up to `need` bytes; return the message that they end. Raises VhostUserError."""
        self._data += data
        self.need -= len(data)
        if self.need:
            return None
        number, flags, size = HEADER.unpack_from(self._data)
        if len(self._data) == HEADER.size:
            if flags & _VERSION_MASK != _VERSION:
                raise VhostUserError(f"message {number} is of version {flags & _VERSION_MASK}, not {_VERSION}")
            if flags & _REPLY:
                raise VhostUserError(f"message {number} is a reply")
            if size > MAX_PAYLOAD:
                raise VhostUserError(f"message {number} has a payload of {size} bytes; the limit is {MAX_PAYLOAD}")
            if size:
                self.need = size
                return None
        payload = bytes(self._data[HEADER.size :])
        self._data.clear()
        self.need = HEADER.size
        return Message(number, bool(flags & _NEED_REPLY), payload)


def reply(number: int, payload: bytes) -> bytes:
    """Return the reply to a request."""
    return HEADER.pack(number, _VERSION | _REPLY, len(payload)) + payload


def reply_u64(number: int, value: int) -> bytes:
    """Return a reply that is a number; as an acknowledgement, 0 means success."""
    return reply(number, _U64.pack(value))


def reply_state(number: int, index: int, value: int) -> bytes:
    """Return a reply that is a number of one queue."""
    return reply(number, _STATE.pack(index, value))


def config_changed() -> bytes:
    """Return the message that makes the front end read the config space anew."""
    return HEADER.pack(CONFIG_CHANGED, _VERSION, 0)


def _exact(message: Message, size: int) -> bytes:
    if len(message.payload) != size:
        raise VhostUserError(f"message {message.number} has a payload of {len(message.payload)} bytes, not {size}")
    return message.payload


def u64(message: Message) -> int:
    """Return a payload that is one number. Raises VhostUserError."""
    (value,) = _U64.unpack(_exact(message, _U64.size))
    return int(value)


def state(message: Message) -> tuple[int, int]:
    """Return a payload that is (queue, number). Raises VhostUserError."""
    index, value = _STATE.unpack(_exact(message, _STATE.size))
    return index, value


def ring_addresses(message: Message) -> RingAddresses:
    """Return the payload of SET_VRING_ADDR. Raises VhostUserError."""
    queue, flags, descriptors, used, available, _log = _ADDRESS.unpack(_exact(message, _ADDRESS.size))
    return RingAddresses(queue, flags, descriptors, used, available)


def regions(message: Message) -> list[Region]:
    """Return the payload of SET_MEM_TABLE. Raises VhostUserError."""
    if len(message.payload) < _STATE.size:
        raise VhostUserError(f"the memory table has {len(message.payload)} bytes; it begins with {_STATE.size}")
    count, _ = _STATE.unpack_from(message.payload)
    if count > MAX_REGIONS:
        raise VhostUserError(f"the memory table has {count} regions; the limit is {MAX_REGIONS}")
    if len(message.payload) < _STATE.size + count * _REGION.size:
        raise VhostUserError(f"the memory table of {count} regions has {len(message.payload)} bytes")
    return [_region(message.payload, _STATE.size + number * _REGION.size) for number in range(count)]


def one_region(message: Message) -> Region:
    """Return the payload of ADD_MEM_REG and REM_MEM_REG. Raises VhostUserError."""
    return _region(_exact(message, _U64.size + _REGION.size), _U64.size)


def _region(payload: bytes, at: int) -> Region:
    guest, size, user, offset = _REGION.unpack_from(payload, at)
    if not size or guest + size > 1 << 64 or user + size > 1 << 64 or offset + size > 1 << 63:
        raise VhostUserError(f"a memory region of {size} bytes at {guest:#x}, offset {offset:#x}, is none")
    return Region(guest, size, user, offset)


def config_part(message: Message) -> tuple[int, int, bytes]:
    """Return the payload of GET_CONFIG and SET_CONFIG: offset, bytes, contents. Raises VhostUserError."""
    if len(message.payload) < _CONFIG.size:
        raise VhostUserError(f"message {message.number} has a payload of {len(message.payload)} bytes")
    offset, size, _flags = _CONFIG.unpack_from(message.payload)
    contents = message.payload[_CONFIG.size :]
    if size > MAX_CONFIG or len(contents) < size:
        raise VhostUserError(f"{size} bytes of config space in a payload of {len(message.payload)} bytes")
    return offset, size, contents[:size]


def reply_config(number: int, offset: int, contents: bytes) -> bytes:
    """Return the reply to GET_CONFIG."""
    return reply(number, _CONFIG.pack(offset, len(contents), 0) + contents)


def inflight_area(message: Message) -> InflightArea:
    """Return the payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD. Raises VhostUserError."""
    if len(message.payload) not in (_INFLIGHT.size, _INFLIGHT_PADDED):
        raise VhostUserError(f"message {message.number} has a payload of {len(message.payload)} bytes")
    area = InflightArea(*_INFLIGHT.unpack_from(message.payload))
    if area.offset + area.size > 1 << 63:
        raise VhostUserError(f"an area of {area.size} bytes at {area.offset} is none")
    return area


def reply_inflight(number: int, area: InflightArea) -> bytes:
    """Return the reply to GET_INFLIGHT_FD, which goes with a descriptor."""
    return reply(number, _INFLIGHT.pack(*area).ljust(_INFLIGHT_PADDED, b"\0"))
