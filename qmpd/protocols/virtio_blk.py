"""virtio-blk, the device's side: config space and requests as values, without I/O.

Source: Virtual I/O Device (VIRTIO) 1.2, section 5.2.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

SECTOR = 512
"""Bytes of the sectors that everything here is counted in, whatever the block size is."""

MAX_DISCARD_SECTORS = 32768
"""Sectors of one discard or zero write, as QEMU offers it."""

ID_SIZE = 20
"""Bytes of the disk's id, padded with zeroes."""

CONFIG_SIZE = 96
"""Bytes of the config space, as far as backends of QEMU answer."""

WCE_OFFSET = 32
"""Where the config space says whether there is a write cache: the one byte that can be written."""

UNMAP = 1
"""In the flags of a zero write: the range may lose its space."""

HEADER = struct.Struct("<IIQ")
SEGMENT = struct.Struct("<QII")
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB")


class Feature(enum.IntFlag):
    """Feature bits of the device and of its rings."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32


class Type(enum.IntEnum):
    """What a request asks for."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(enum.IntEnum):
    """The byte that ends a request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class Segment(NamedTuple):
    """A range of a discard or zero write, in sectors."""

    sector: int
    sectors: int
    flags: int


def config_space(*, size: int, block_size: int, queues: int, write_cache: bool) -> bytes:
    """Return the config space of a disk of `size` bytes."""
    blocks = block_size // SECTOR
    packed = _CONFIG.pack(
        size // SECTOR,
        0,  # size_max: not offered
        126,  # seg_max: two descriptors of a ring of 128 are the header's and the status byte's
        0,
        0,
        0,
        block_size,
        0,
        0,
        1,  # min_io_size, blocks
        1,  # opt_io_size, blocks
        write_cache,
        0,
        queues,
        MAX_DISCARD_SECTORS,
        1,
        blocks,
        MAX_DISCARD_SECTORS,
        1,
        1,  # write_zeroes_may_unmap
    )
    return packed.ljust(CONFIG_SIZE, b"\0")
