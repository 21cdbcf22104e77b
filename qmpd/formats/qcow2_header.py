"""The qcow2 header and its extensions, version 2 and 3: bytes in, values out.

Source: docs/interop/qcow2.txt of QEMU, sections "General" and "Header extensions". The order of
the checks and their texts are those of the reference (qcow2_do_open), found by asking it.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from qmpd.errors import CommandError
from qmpd.formats.qcow2 import (
    ENTRY_SIZE,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    SNAPSHOT_HEADER_SIZE,
)
from qmpd.units import align_up

MAGIC = 0x514649FB
V2_LENGTH = 72
V3_LENGTH = 104
"""Bytes of a version 3 header before the optional fields."""
CURRENT_LENGTH = 112
"""Bytes of the header we write: with the compression type and its padding."""

DIRTY = 1
CORRUPT = 2
DATA_FILE = 4
COMPRESSION = 8
EXTENDED_L2 = 16
INCOMPATIBLE_MASK = 31
"""Incompatible features this format knows by name; `driver` says which of them it can do."""

LAZY_REFCOUNTS = 1
BITMAPS = 1
DATA_FILE_RAW = 2
AUTOCLEAR_MASK = 3

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2
COMPRESSION_TYPES = ("zlib", "zstd")

EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_TABLE = 0x6803F857
EXT_CRYPTO_HEADER = 0x0537BE77
EXT_BITMAPS = 0x23852875
EXT_DATA_FILE = 0x44415441

MAX_BACKING_NAME = 1023
"""Bytes of a backing file name at most (the specification's limit)."""
MAX_FORMAT_NAME = 15
"""Bytes of a backing format name at most (the reference's buffer)."""

FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
"""The feature name table we write: kind (0 incompatible, 1 compatible, 2 autoclear), bit, name."""

_V2 = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")
_BITMAPS = struct.Struct(">IIQQ")

INCOMPATIBLE_OFFSET = 72
AUTOCLEAR_OFFSET = 88
L1_OFFSET = 36
REFCOUNT_TABLE_OFFSET = 48
SIZE_OFFSET = 24
"""Byte offsets of fields that are rewritten in place."""

_INT64_MAX = (1 << 63) - 1
_INT_MAX = (1 << 31) - 1

assert _V2.size == V2_LENGTH
assert V2_LENGTH + _V3.size == V3_LENGTH


@dataclass(frozen=True, slots=True, eq=False)
class BitmapsExtension:
    """Where the directory of persistent bitmaps lies: bytes, and bytes of length."""

    count: int
    directory_size: int
    directory_offset: int


@dataclass(slots=True, eq=False, repr=False)
class Header:
    """The header of an image, in the specification's words; sizes and offsets in bytes.

    l1_size                  entries                refcount_table_clusters  clusters
    unknown_fields           header bytes past those we know, kept as they are
    extensions               (type, data) as found, in order, without the end mark
    """

    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = CRYPT_NONE
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = CURRENT_LENGTH
    compression_type: int = 0
    unknown_fields: bytes = b""
    extensions: list[tuple[int, bytes]] = field(default_factory=list)
    backing_file: bytes = b""
    backing_format: bytes = b""
    bitmaps: BitmapsExtension | None = None

    @property
    def data_file(self) -> bytes | None:
        """The name of the external data file, None if there is no data file or the image does not name it."""
        names = [data for kind, data in self.extensions if kind == EXT_DATA_FILE]
        return names[0].split(b"\0", 1)[0] if names and self.incompatible & DATA_FILE else None

    def set_data_file(self, name: bytes) -> None:
        """Name the external data file; b"" for no name."""
        kept = [(kind, data) for kind, data in self.extensions if kind != EXT_DATA_FILE]
        self.extensions = [*kept, (EXT_DATA_FILE, name)] if name else kept

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def extended(self) -> bool:
        """True if L2 entries are extended: they describe subclusters."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def l2_bits(self) -> int:
        """log2 of the entries in an L2 table."""
        return self.cluster_bits - (4 if self.extended else 3)

    @property
    def refcount_block_bits(self) -> int:
        """log2 of the refcounts in a refcount block."""
        return self.cluster_bits + 3 - self.refcount_order

    def l1_entries_for(self, size: int) -> int:
        """Return how many L1 entries `size` bytes of guest data need."""
        shift = self.cluster_bits + self.l2_bits
        return (size + (1 << shift) - 1) >> shift

    def feature_names(self) -> dict[tuple[int, int], str]:
        """Return the names in the image's feature table by (kind, bit)."""
        names: dict[tuple[int, int], str] = {}
        for kind, data in self.extensions:
            if kind == EXT_FEATURE_TABLE:
                for at in range(0, len(data) - _FEATURE.size + 1, _FEATURE.size):
                    feature, bit, name = _FEATURE.unpack_from(data, at)
                    text = name.split(b"\0", 1)[0].decode("utf-8", "replace")
                    names.setdefault((feature, bit), text)
        return names

    def place_bitmaps(self, place: BitmapsExtension | None) -> None:
        """State where the bitmap directory lies now; None: there is none."""
        self.bitmaps = place
        kept = [(kind, data) for kind, data in self.extensions if kind != EXT_BITMAPS]
        if place is not None:
            kept.append((EXT_BITMAPS, _BITMAPS.pack(place.count, 0, place.directory_size, place.directory_offset)))
        self.extensions = kept

    def pack(self) -> bytes:
        """Return header, extensions and backing file name as they are written to the first cluster.

        The feature name table is left out where it does not fit: it is a convenience.
        Raises CommandError if the rest does not fit either.
        """
        self.backing_file_size = len(self.backing_file)
        for with_names in (True, False):
            body = self._pack_extensions(with_names)
            start = V2_LENGTH if self.version == 2 else CURRENT_LENGTH + len(self.unknown_fields)
            self.backing_file_offset = start + len(body) if self.backing_file else 0
            if start + len(body) + len(self.backing_file) <= self.cluster_size:
                return self._pack_fields() + body + self.backing_file
        raise CommandError("Could not write qcow2 header: No space left on device")

    def _pack_fields(self) -> bytes:
        data = _V2.pack(
            MAGIC,
            self.version,
            self.backing_file_offset,
            self.backing_file_size,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version == 2:
            return data
        self.header_length = CURRENT_LENGTH + len(self.unknown_fields)
        data += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length)
        return data + bytes([self.compression_type]) + bytes(7) + self.unknown_fields

    def _pack_extensions(self, with_names: bool) -> bytes:
        parts: list[bytes] = []

        def add(kind: int, data: bytes) -> None:
            parts.append(_EXTENSION.pack(kind, len(data)) + data.ljust(align_up(len(data), 8), b"\0"))

        if self.backing_format:
            add(EXT_BACKING_FORMAT, self.backing_format)
        if self.version >= 3 and with_names:
            add(EXT_FEATURE_TABLE, b"".join(_FEATURE.pack(a, b, name.encode()) for a, b, name in FEATURE_NAMES))
        for kind, data in self.extensions:
            if kind not in (EXT_BACKING_FORMAT, EXT_FEATURE_TABLE):
                add(kind, data)
        add(EXT_END, b"")
        return b"".join(parts)


def first_bytes(data: bytes) -> int:
    """Check magic, version and cluster size in the first 112 bytes; return the cluster bits.

    `data` may be shorter than that (the file is): what is missing counts as zeroes.
    """
    data = data[:V2_LENGTH].ljust(V2_LENGTH, b"\0")
    magic, version = struct.unpack_from(">II", data)
    if magic != MAGIC:
        raise CommandError("Image is not in qcow2 format")
    if version not in (2, 3):
        raise CommandError(f"Unsupported qcow2 version {version}")
    bits: int = struct.unpack_from(">I", data, 20)[0]
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise CommandError(f"Unsupported cluster size: 2^{bits}")
    return bits


def parse(data: bytes, *, writable: bool, check: bool = False) -> Header:
    """Return the header in the first cluster of an image, checked as far as its tables' places.

    data      the first cluster, as far as the file reaches
    writable  the image is to be written: a corrupt one is then refused
    check     it is opened to be checked or repaired: what that can mend is let through
    Extensions are not looked at; see `parse_extensions`. Raises CommandError.
    """
    bits = first_bytes(data)
    data = data.ljust(max(CURRENT_LENGTH, min(len(data) + CURRENT_LENGTH, 1 << bits)), b"\0")
    header = Header(*_V2.unpack_from(data)[1:])
    if header.version == 2:
        header.header_length = V2_LENGTH
    else:
        values = _V3.unpack_from(data, V2_LENGTH)
        header.incompatible, header.compatible, header.autoclear = values[:3]
        header.refcount_order, header.header_length = values[3:]
        if header.header_length < V3_LENGTH:
            raise CommandError("qcow2 header too short")
    if header.header_length > header.cluster_size:
        raise CommandError("qcow2 header exceeds cluster size")
    if header.version == 3 and header.header_length > V3_LENGTH:
        header.compression_type = data[V3_LENGTH]
        header.unknown_fields = data[CURRENT_LENGTH : header.header_length]
    if header.backing_file_offset > header.cluster_size:
        raise CommandError("Invalid backing file offset")
    _check_compression(header)
    _check_features(header, data, writable=writable, check=check)
    _check_tables(header, check=check)
    return header


def _check_compression(header: Header) -> None:
    """Check the compression type against its feature bit. Raises CommandError."""
    if header.compression_type >= len(COMPRESSION_TYPES):
        raise CommandError(f"qcow2: unknown compression type: {header.compression_type}")
    flagged = bool(header.incompatible & COMPRESSION)
    if flagged and header.compression_type == 0:
        raise CommandError("qcow2: Compression type incompatible feature bit must not be set")
    if not flagged and header.compression_type != 0:
        raise CommandError("qcow2: Compression type incompatible feature bit must be set")


def _check_features(header: Header, data: bytes, *, writable: bool, check: bool) -> None:
    unknown = header.incompatible & ~INCOMPATIBLE_MASK
    if unknown:
        raise unsupported(unknown, _names_if_readable(header, data))
    if header.incompatible & CORRUPT and writable and not check:
        raise CommandError("qcow2: Image is corrupt; cannot be opened read/write")
    if header.incompatible & EXTENDED_L2 and header.cluster_size // 32 < 512:
        raise CommandError(f"Unsupported subcluster size: {header.cluster_size // 32}")
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        raise CommandError("Reference count entry width too large; may not exceed 64 bits")


def _names_if_readable(header: Header, data: bytes) -> dict[tuple[int, int], str]:
    """Return the feature names; what of the extensions cannot be read is not worth an error here."""
    found: list[tuple[int, bytes]] = []
    with contextlib.suppress(CommandError):
        found.extend(_walk_extensions(header, data))
    return Header(extensions=found).feature_names()


def unsupported(bits: int, names: dict[tuple[int, int], str]) -> CommandError:
    """Return the error that lists incompatible feature bits by name, as far as there are names."""
    found = []
    for (kind, bit), name in names.items():
        if kind == 0 and bit < 64 and bits >> bit & 1:
            found.append(name)
            bits &= ~(1 << bit)
    if bits:
        found.append(f"Unknown incompatible feature: {bits:x}")
    return CommandError(f"Unsupported qcow2 feature(s): {', '.join(found)}")


def check_table(what: str, offset: int, entries: int, entry_size: int, limit: int, cluster_size: int) -> None:
    """Check the size and place of a table that a header names. Raises CommandError."""
    if entries > limit // entry_size:
        raise CommandError(f"{what} too large")
    if _INT64_MAX - entries * entry_size < offset or offset % cluster_size:
        raise CommandError(f"{what} offset invalid")


def _check_tables(header: Header, *, check: bool) -> None:
    cluster = header.cluster_size
    if header.refcount_table_clusters == 0 and not check:
        raise CommandError("Image does not contain a reference count table")
    check_table(
        "Reference count table",
        header.refcount_table_offset,
        header.refcount_table_clusters,
        cluster,
        MAX_REFCOUNT_TABLE_BYTES,
        cluster,
    )
    if not check:
        check_table(
            "Snapshot table",
            header.snapshots_offset,
            header.nb_snapshots,
            SNAPSHOT_HEADER_SIZE,
            SNAPSHOT_HEADER_SIZE * MAX_SNAPSHOTS,
            cluster,
        )
    check_table("Active L1 table", header.l1_table_offset, header.l1_size, ENTRY_SIZE, MAX_L1_BYTES, cluster)
    shift = header.cluster_bits + header.l2_bits
    needed = ((header.size + (1 << shift) - 1) & (1 << 64) - 1) >> shift
    if needed > _INT_MAX:
        raise CommandError("Image is too big")
    if header.l1_size < needed:
        raise CommandError("L1 table is too small")


def _walk_extensions(header: Header, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, data) up to the end mark. Raises CommandError."""
    at = header.header_length
    end = header.backing_file_offset or header.cluster_size
    while at < end:
        kind, length = _EXTENSION.unpack(data[at : at + 8].ljust(8, b"\0"))
        at += 8
        if at > end or length > end - at:
            raise CommandError("Header extension too large")
        if kind == EXT_END:
            return
        body = data[at : at + length]
        yield kind, body.ljust(length, b"\0")
        at += align_up(length, 8)


def parse_extensions(header: Header, data: bytes) -> list[str]:
    """Fill in `header` from its extensions; return warnings for the log. Raises CommandError.

    data   the first cluster, as far as the file reaches
    """
    warnings: list[str] = []
    for kind, body in _walk_extensions(header, data):
        header.extensions.append((kind, body))
        if kind == EXT_BACKING_FORMAT:
            if len(body) > MAX_FORMAT_NAME:
                raise CommandError(f"ERROR: ext_backing_format: len={len(body)} too large (>={MAX_FORMAT_NAME + 1})")
            header.backing_format = body.split(b"\0", 1)[0]
        elif kind == EXT_CRYPTO_HEADER:
            _check_crypto(header, body)
        elif kind == EXT_BITMAPS:
            header.bitmaps = _parse_bitmaps(header, body, warnings)
    return warnings


def _check_crypto(header: Header, body: bytes) -> None:
    if header.crypt_method != CRYPT_LUKS:
        raise CommandError("CRYPTO header extension only expected with LUKS encryption method")
    if len(body) != 16:
        raise CommandError(f"CRYPTO header extension size {len(body)}, but expected size 16")
    offset: int = struct.unpack_from(">Q", body)[0]
    if offset % header.cluster_size:
        raise CommandError(
            f"Encryption header offset '{offset}' is not a multiple of cluster size '{header.cluster_size}'"
        )


def _parse_bitmaps(header: Header, body: bytes, warnings: list[str]) -> BitmapsExtension | None:
    if len(body) != _BITMAPS.size:
        raise CommandError("bitmaps_ext: Invalid extension length")
    if not header.autoclear & BITMAPS:
        warnings.append(
            "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
        )
        return None
    count, reserved, size, offset = _BITMAPS.unpack(body)
    if reserved:
        raise CommandError("bitmaps_ext: Reserved field is not zero")
    if count > MAX_BITMAPS:
        raise CommandError(
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        )
    if count == 0:
        raise CommandError("found bitmaps extension with zero bitmaps")
    if offset % header.cluster_size:
        raise CommandError("bitmaps_ext: invalid bitmap directory offset")
    if size > MAX_BITMAP_DIRECTORY_BYTES:
        raise CommandError(
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size"
            f" ({MAX_BITMAP_DIRECTORY_BYTES})"
        )
    return BitmapsExtension(count, size, offset)


def read_backing_name(header: Header, data: bytes) -> None:
    """Set `backing_file` from the first cluster. Raises CommandError."""
    if not header.backing_file_offset:
        return
    length = header.backing_file_size
    if length > min(MAX_BACKING_NAME, header.cluster_size - header.backing_file_offset):
        raise CommandError("Backing file name too long")
    start = header.backing_file_offset
    name = data[start : start + length].ljust(length, b"\0")
    header.backing_file = name.split(b"\0", 1)[0]


def check_encryption(header: Header, requested: str | None) -> None:
    """Check the encryption method against the format that the options name. Raises CommandError."""
    method = header.crypt_method
    if method == CRYPT_NONE:
        if requested is not None:
            raise CommandError(f"No encryption in image header, but options specified format '{requested}'")
        return
    if method > CRYPT_LUKS:
        raise CommandError(f"Unsupported encryption method {method}")
    name = "aes" if method == CRYPT_AES else "luks"
    if requested is not None and requested != name:
        raise CommandError(f"Header reported '{name}' encryption format but options specify '{requested}'")
