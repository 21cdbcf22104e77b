"""NBD: numbers, limits and shared values of both phases of the protocol.

Source: doc/proto.md of the Network Block Device project, and its extension-ext-header branch for
extended headers. Texts of refusals are those of QEMU's server. Everything on the wire is big-endian.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import Protocol

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

MAX_STRING = 4096
"""Bytes in a name, description or error text (proto.md, "Values")."""

MAX_PAYLOAD = 32 << 20
"""Bytes of data in one read or write: what every client may count on, and QEMU's limit."""

MAX_OPTION = 32 << 20
"""Bytes that may follow an option; a client that announces more is cut off, as QEMU does."""

MAX_BUFFERED_OPTION = 256 << 10
"""Bytes of option data that are kept to be parsed (thousands of context queries); longer data is skipped."""

MAX_EXTENTS = (1 << 20) // 8
"""Descriptors in one block status reply, QEMU's limit; the document asks for at most 2^20."""

ALLOCATION = b"base:allocation"
DEPTH = b"qemu:allocation-depth"
BITMAP_PREFIX = b"qemu:dirty-bitmap:"


class HandshakeFlag(enum.IntFlag):
    """Handshake flags of the server, and with the same values the client's answer."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    """NBD_OPT_*."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(enum.IntEnum):
    """NBD_REP_*."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class Info(enum.IntEnum):
    """NBD_INFO_*."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    """NBD_FLAG_*: what an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(enum.IntEnum):
    """NBD_CMD_*."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """NBD_CMD_FLAG_*."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkType(enum.IntEnum):
    """NBD_REPLY_TYPE_*."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


STATE_HOLE = 1
"""base:allocation: nothing is stored here."""

STATE_ZERO = 2
"""base:allocation: reads as zeroes."""


class NbdError(enum.IntEnum):
    """The error values that may appear on the wire."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


_ERRORS = {
    errno.EPERM: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EOVERFLOW: NbdError.EOVERFLOW,
    errno.ENOTSUP: NbdError.ENOTSUP,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def to_nbd_error(error: int) -> NbdError:
    """Return the wire value for an errno; what NBD has no word for is an I/O error."""
    return _ERRORS.get(error, NbdError.EIO)


class Style(enum.IntEnum):
    """How requests and replies look, in rising order of what they can carry."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client is told of an export.

    size             bytes                 flags      what holds for every client
    minimum_block    bytes, a power of two  preferred_block likewise, at least the minimum
    contexts         names of the metadata contexts; the id of each is its entry here
    """

    name: bytes
    description: bytes | None
    size: int
    flags: TransmissionFlag
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD
    contexts: tuple[tuple[int, bytes], ...] = ((0, ALLOCATION),)


class Directory(Protocol):
    """The exports of a server, as one client sees them."""

    def find(self, name: bytes) -> ExportInfo | None:
        """Return the export `name`, None if there is none."""

    def listed(self) -> list[ExportInfo]:
        """Return every export, in the order in which clients see them."""
