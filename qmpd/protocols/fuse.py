"""The kernel's FUSE protocol, version 7.31: bytes of /dev/fuse to requests, and replies to bytes.

Source: linux/fuse.h. Integers are in the machine's byte order. One file is served, the root of the
file system, so of the protocol only what concerns a regular file is here.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

MAJOR = 7
MINOR = 31
"""The version we speak; the kernel comes down to it. 7.28 brought max_pages."""

OLDEST_MINOR = 12
"""Kernels older than this have other layouts; none is alive."""

MAX_TRANSFER = 1 << 20
"""Bytes in one read or write at most."""

PAGE = 4096
BUFFER = MAX_TRANSFER + PAGE
"""Bytes that a request may have: the kernel refuses to hand one out to a smaller buffer."""

ROOT = 1
"""The node id of the root."""

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_ATTR_OUT = struct.Struct("=QIIQQQQQQIIIIIIIIII")
_SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIIII")
_OPEN_OUT = struct.Struct("=QIi")
_IO_IN = struct.Struct("=QQIIQII")
_WRITE_OUT = struct.Struct("=II")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_FALLOCATE_IN = struct.Struct("=QQQII")
_LSEEK_IN = struct.Struct("=QQII")
_LSEEK_OUT = struct.Struct("=Q")

_ASYNC_READ, _BIG_WRITES, _ASYNC_DIO, _MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 22
_DIRECT_IO, _PARALLEL_WRITES = 1 << 0, 1 << 6
_CONGESTION, _BACKGROUND = 48, 64
"""Requests without a waiting caller that the kernel keeps going: it slows down, it stops."""


class Opcode(enum.IntEnum):
    """FUSE_*, those that a regular file sees."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46


NO_REPLY = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT))


class SetAttr(enum.IntFlag):
    """FATTR_*: what a SETATTR is to change, and flags that change nothing."""

    MODE = 1
    UID = 2
    GID = 4
    SIZE = 8
    ATIME = 16
    MTIME = 32
    HANDLE = 64
    ATIME_NOW = 128
    MTIME_NOW = 256
    LOCK_OWNER = 512
    CTIME = 1024
    KILL_SUIDGID = 2048


class FuseError(ValueError):
    """A request that breaks the protocol."""


@dataclass(frozen=True, slots=True)
class FuseRequest:
    """One request; `body` is what follows its header."""

    opcode: int
    unique: int
    node: int
    body: memoryview


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat shows of the file; `size` in bytes, `blocks` in units of 512, `now` in seconds."""

    size: int
    blocks: int
    mode: int
    uid: int
    gid: int
    blksize: int
    now: int


def parse(data: bytes) -> FuseRequest:
    """Return the request that one read of the device gave. Raises FuseError."""
    if len(data) < IN_HEADER.size:
        raise FuseError(f"request of {len(data)} bytes, at least {IN_HEADER.size} expected")
    length, opcode, unique, node, _, _, _, _, _ = IN_HEADER.unpack_from(data)
    if length != len(data):
        raise FuseError(f"request says {length} bytes and has {len(data)}")
    return FuseRequest(opcode, unique, node, memoryview(data)[IN_HEADER.size :])


def reply(unique: int, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """Return the bytes of a good reply."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + bytes(payload)


def error_reply(unique: int, error: int) -> bytes:
    """Return the bytes of a reply that fails with an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -error, unique)


def _fields(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise FuseError(f"body of {len(body)} bytes, at least {layout.size} expected")
    return layout.unpack_from(body)


def init_reply(body: memoryview) -> bytes:
    """Return the answer to INIT. Raises FuseError for a kernel that is too old."""
    major, minor, readahead, flags = _fields(_INIT_IN, body)
    if major != MAJOR or minor < OLDEST_MINOR:
        raise FuseError(f"the kernel speaks version {major}.{minor}, {MAJOR}.{OLDEST_MINOR} is the oldest accepted")
    wanted = flags & (_ASYNC_READ | _BIG_WRITES | _ASYNC_DIO | _MAX_PAGES)
    transfer = MAX_TRANSFER if wanted & _MAX_PAGES else 32 * PAGE
    return _INIT_OUT.pack(
        MAJOR, min(minor, MINOR), readahead, wanted, _BACKGROUND, _CONGESTION, transfer, 1, transfer // PAGE, 0, 0
    )


def attributes_reply(attributes: Attributes, *, valid_seconds: int = 1) -> bytes:
    """Return the answer to GETATTR and SETATTR."""
    a = attributes
    times = (a.now, a.now, a.now, 0, 0, 0)
    return _ATTR_OUT.pack(valid_seconds, 0, 0, ROOT, a.size, a.blocks, *times, a.mode, 1, a.uid, a.gid, 0, a.blksize, 0)


@dataclass(frozen=True, slots=True)
class Change:
    """What a SETATTR asks for; fields that `valid` does not name have no meaning."""

    valid: SetAttr
    size: int
    mode: int
    uid: int
    gid: int


def parse_setattr(body: memoryview) -> Change:
    """Return what a SETATTR asks for. Raises FuseError."""
    fields = _fields(_SETATTR_IN, body)
    return Change(SetAttr(fields[0]), size=fields[3], mode=fields[11], uid=fields[13], gid=fields[14])


def open_reply() -> bytes:
    """Return the answer to OPEN: no page cache, and writes side by side."""
    return _OPEN_OUT.pack(0, _DIRECT_IO | _PARALLEL_WRITES, 0)


def parse_read(body: memoryview) -> tuple[int, int]:
    """Return offset and length of a READ. Raises FuseError."""
    _, offset, length, *_ = _fields(_IO_IN, body)
    if length > MAX_TRANSFER:
        raise FuseError(f"read of {length} bytes, at most {MAX_TRANSFER} agreed")
    return offset, length


def parse_write(body: memoryview) -> tuple[int, memoryview]:
    """Return offset and data of a WRITE. Raises FuseError."""
    _, offset, length, *_ = _fields(_IO_IN, body)
    data = body[_IO_IN.size :]
    if length != len(data):
        raise FuseError(f"write says {length} bytes and has {len(data)}")
    return offset, data


def write_reply(length: int) -> bytes:
    """Return the answer to WRITE: how much was written."""
    return _WRITE_OUT.pack(length, 0)


def statfs_reply() -> bytes:
    """Return the answer to STATFS: a file system that has nothing but its file."""
    return _STATFS_OUT.pack(0, 0, 0, 0, 0, 512, 255, 512, 0)


def parse_fallocate(body: memoryview) -> tuple[int, int, int]:
    """Return mode (FALLOC_FL_*), offset and length of a FALLOCATE. Raises FuseError."""
    _, offset, length, mode, _ = _fields(_FALLOCATE_IN, body)
    return mode, offset, length


def parse_lseek(body: memoryview) -> tuple[int, int]:
    """Return offset and whence of an LSEEK. Raises FuseError."""
    _, offset, whence, _ = _fields(_LSEEK_IN, body)
    return offset, whence


def lseek_reply(offset: int) -> bytes:
    """Return the answer to LSEEK."""
    return _LSEEK_OUT.pack(offset)
