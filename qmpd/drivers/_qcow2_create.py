"""Making a qcow2 image: all metadata is written at once, nothing has to grow later.

Layout: header, refcount table, refcount blocks, L1 table, then for preallocated images the L2
tables and the data clusters. The header is written last: before it there is no image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmpd.block.opening import MAX_LENGTH
from qmpd.errors import CommandError, FileTooLarge
from qmpd.formats.qcow2 import (
    ALL_ALLOCATED,
    COPIED,
    ENTRY_SIZE,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    RefcountCodec,
    pack_entries,
    zero_entries,
)
from qmpd.formats.qcow2_header import (
    COMPRESSION,
    COMPRESSION_TYPES,
    DATA_FILE,
    DATA_FILE_RAW,
    EXTENDED_L2,
    LAZY_REFCOUNTS,
    MAX_BACKING_NAME,
    MAX_FORMAT_NAME,
    Header,
)
from qmpd.units import KiB, MiB, align_up, is_power_of_two

if TYPE_CHECKING:
    from qmpd.block.child import Child
    from qmpd.drivers._qcow2_create_crypto import NewEncryption, Target

MIN_EXTENDED_CLUSTER = 16 * KiB
"""Bytes in a cluster of an image with subclusters at least: each has 512."""

WRITE_CHUNK = 1 * MiB
"""Bytes written at once where tables or zeroes are long."""


@dataclass(slots=True, eq=False, repr=False)
class _Layout:
    """Counts and first numbers of clusters."""

    table: int
    blocks: int
    l1: int
    l2: int
    data: int
    encryption: int = 0

    @property
    def first_encryption(self) -> int:
        return 1 + self.table + self.blocks + self.l1

    @property
    def first_l2(self) -> int:
        return self.first_encryption + self.encryption

    @property
    def first_data(self) -> int:
        return self.first_l2 + self.l2

    @property
    def total(self) -> int:
        return self.first_data + self.data


async def create_qcow2(
    file: Target,
    *,
    encryption: NewEncryption | None = None,
    data: Child | None = None,
    **options: Any,
) -> None:
    """Make an image on `file`, which is empty or whose contents do not matter; `options` as for `new_image`.

    data   where the guest data will be, None: in the image. Raises CommandError, OSError
    """
    await write_new(file, *new_image(**options), encryption=encryption, data=data)


def new_image(
    *,
    size: int,
    cluster_size: int = 64 * KiB,
    version: int = 3,
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    backing_file: str | None = None,
    backing_fmt: str | None = None,
    preallocation: str = "off",
    compression_type: str = "zlib",
    extended_l2: bool = False,
    data_file: str | None = None,
    data_file_raw: bool = False,
) -> tuple[Header, str]:
    """Return the header of a new image of `size` bytes, without the places of its tables, and how to preallocate it.

    preallocation   off, metadata, falloc, full
    data_file       name of the file with the guest data, None: the image; `data_file_raw`: which then reads as the disk
    The backing file is only named, never opened. Raises CommandError with the reference's text
    for options that do not go together.
    """
    _check_options(size, cluster_size, version, refcount_bits, lazy_refcounts)
    if data_file_raw and data_file is None:
        raise CommandError("data-file-raw requires data-file")
    if data_file_raw and backing_file is not None:
        raise CommandError("Backing file and data-file-raw cannot be used at the same time")
    if data_file is not None and version < 3:
        raise CommandError(
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    if data_file_raw and preallocation == "off":
        preallocation = "metadata"
    if extended_l2 and version < 3:
        raise CommandError(
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    if extended_l2 and cluster_size < MIN_EXTENDED_CLUSTER:
        raise CommandError(
            f"Extended L2 entries are only supported with cluster sizes of at least {MIN_EXTENDED_CLUSTER} bytes"
        )
    if backing_file is not None and preallocation != "off" and not extended_l2:
        raise CommandError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
    if backing_fmt is not None and backing_file is None:
        raise CommandError("Backing format cannot be used without backing file")
    if compression_type != "zlib" and version < 3:
        raise CommandError(
            "Non-zlib compression type is only supported with compatibility level 1.1 and above"
            " (use version=v3 or greater)"
        )
    header = Header(
        version=version,
        cluster_bits=cluster_size.bit_length() - 1,
        size=size,
        refcount_order=refcount_bits.bit_length() - 1,
        compatible=LAZY_REFCOUNTS if lazy_refcounts else 0,
        compression_type=COMPRESSION_TYPES.index(compression_type),
        incompatible=(0 if compression_type == "zlib" else COMPRESSION)
        | (EXTENDED_L2 if extended_l2 else 0)
        | (0 if data_file is None else DATA_FILE),
        autoclear=DATA_FILE_RAW if data_file_raw else 0,
        backing_file=(backing_file or "").encode("utf-8", "surrogateescape"),
        backing_format=(backing_fmt or "").encode("utf-8", "surrogateescape"),
    )
    if len(header.backing_file) > MAX_BACKING_NAME or len(header.backing_format) > MAX_FORMAT_NAME:
        raise CommandError("Backing file name too long")
    header.set_data_file((data_file or "").encode("utf-8", "surrogateescape"))
    return header, preallocation


async def write_new(
    file: Target,
    header: Header,
    preallocation: str,
    *,
    encryption: NewEncryption | None = None,
    data: Child | None = None,
) -> None:
    """Write a new image whose header and preallocation `new_image` gave. Raises CommandError, OSError."""
    if encryption is None:
        await _write_image(file, header, preallocation, None, data)
        return
    try:
        encryption.prepare(header)
        await _write_image(file, header, preallocation, encryption, data)
    finally:
        encryption.wipe()


async def _write_image(
    file: Target, header: Header, preallocation: str, encryption: NewEncryption | None, data: Child | None
) -> None:
    cluster_size = header.cluster_size
    length = 0 if encryption is None else encryption.length
    layout = _lay_out(header, preallocated=preallocation != "off", encryption=length)
    header.refcount_table_offset = cluster_size
    header.refcount_table_clusters = layout.table
    header.l1_size = header.l1_entries_for(header.size)
    header.l1_table_offset = (1 + layout.table + layout.blocks) * cluster_size
    if encryption is not None:
        encryption.place(header, layout.first_encryption * cluster_size)
    image = header.pack().ljust(cluster_size, b"\0")
    await file.pwrite_zeroes(0, cluster_size)
    await _write_refcounts(file, header, layout)
    await _write_l1(file, header, layout)
    if encryption is not None:
        await encryption.write(file, layout.first_encryption * cluster_size, cluster_size)
    if data is None:
        await _write_data(file, header, layout, preallocation)
    else:
        await _fill_data_file(data, header, preallocation)
    await file.flush()
    await file.pwrite(0, image)
    await file.flush()


def _check_options(size: int, cluster_size: int, version: int, refcount_bits: int, lazy: bool) -> None:
    if size % 512:
        raise CommandError("Image size must be a multiple of 512 bytes")
    if not is_power_of_two(cluster_size) or not MIN_CLUSTER_BITS <= cluster_size.bit_length() - 1 <= MAX_CLUSTER_BITS:
        raise CommandError(
            f"Cluster size must be a power of two between {1 << MIN_CLUSTER_BITS} and {1 << MAX_CLUSTER_BITS - 10}k"
        )
    if lazy and version < 3:
        raise CommandError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    if not is_power_of_two(refcount_bits) or refcount_bits > 64:
        raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")
    if refcount_bits != 16 and version < 3:
        raise CommandError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above"
            " (use version=v3 or greater)"
        )
    if size > MAX_LENGTH:
        raise CommandError(f"Could not resize image: offset({size}) exceeds maximum({MAX_LENGTH})")
    entries = Header(cluster_bits=cluster_size.bit_length() - 1).l1_entries_for(size)
    if size < 0 or entries * ENTRY_SIZE > MAX_L1_BYTES:
        raise FileTooLarge("Could not resize image: Failed to grow the L1 table: File too large")


def _lay_out(header: Header, *, preallocated: bool, encryption: int) -> _Layout:
    """Return where everything lies; `encryption` is the length of a LUKS header in bytes."""
    cluster = header.cluster_size
    entries = header.l1_entries_for(header.size)
    layout = _Layout(
        table=1,
        blocks=1,
        l1=-(-entries * ENTRY_SIZE // cluster),
        l2=entries if preallocated else 0,
        data=-(-header.size // cluster) if preallocated and not header.incompatible & DATA_FILE else 0,
        encryption=-(-encryption // cluster),
    )
    while True:
        blocks = -(-layout.total >> header.refcount_block_bits)
        table = -(-blocks * ENTRY_SIZE // cluster)
        if blocks <= layout.blocks and table <= layout.table:
            break
        layout.blocks, layout.table = max(blocks, layout.blocks), max(table, layout.table)
    if layout.table * cluster > MAX_REFCOUNT_TABLE_BYTES:
        raise CommandError("Could not write refcount table: File too large")
    return layout


async def _write_refcounts(file: Target, header: Header, layout: _Layout) -> None:
    cluster = header.cluster_size
    first_block = 1 + layout.table
    table = zero_entries(layout.table * cluster // ENTRY_SIZE)
    for index in range(layout.blocks):
        table[index] = (first_block + index) * cluster
    await file.pwrite(cluster, pack_entries(table))
    codec = RefcountCodec(header.refcount_order)
    per_block = 1 << header.refcount_block_bits
    for index in range(layout.blocks):
        used = min(layout.total - index * per_block, per_block)
        counts = codec.zeroes(cluster)
        for at in range(used):
            counts[at] = 1
        await file.pwrite((first_block + index) * cluster, codec.pack(counts))


async def _write_l1(file: Target, header: Header, layout: _Layout) -> None:
    cluster = header.cluster_size
    if not layout.l2:
        if layout.l1:
            await file.pwrite_zeroes(header.l1_table_offset, header.l1_size * ENTRY_SIZE)
        return
    table = zero_entries(header.l1_size)
    per_table = 1 << header.l2_bits
    stride = 2 if header.extended else 1
    shown = header.autoclear & DATA_FILE_RAW  # else the bitmaps stay empty: nothing of the file shows yet
    external = header.incompatible & DATA_FILE
    data = 0 if external else layout.first_data
    left = -(-header.size // cluster)
    for index in range(layout.l2):
        offset = (layout.first_l2 + index) * cluster
        table[index] = offset | COPIED
        entries = zero_entries(per_table * stride)
        for at in range(min(left, per_table)):
            entries[at * stride] = (data + at) * cluster | COPIED
            if shown and header.extended:
                entries[at * stride + 1] = ALL_ALLOCATED
        await file.pwrite(offset, pack_entries(entries))
        data += per_table
        left -= per_table
    await file.pwrite(header.l1_table_offset, pack_entries(table))


async def _write_data(file: Target, header: Header, layout: _Layout, preallocation: str) -> None:
    """Fill the data clusters of a preallocated image as far as asked for."""
    if not layout.data:
        return
    start, end = layout.first_data * header.cluster_size, layout.total * header.cluster_size
    if preallocation == "metadata":
        await file.pwrite_zeroes(end - 512, 512)
    elif preallocation == "falloc":
        await file.pwrite_zeroes(start, end - start)
    else:
        chunk = bytes(WRITE_CHUNK)
        while start < end:
            await file.pwrite(start, chunk[: end - start])
            start += len(chunk)


async def _fill_data_file(data: Child, header: Header, preallocation: str) -> None:
    """Give an external data file its size, and its space as far as asked for. Raises OSError, CommandError.

    Clusters that are linked are there as a whole.
    What is in it stays, and shows, if it is to read as the disk does; otherwise it never shows.
    """
    size = header.size if preallocation == "off" else align_up(header.size, header.cluster_size)
    there = min(data.size, size)
    if preallocation != "off" and not header.autoclear & DATA_FILE_RAW and there:
        await data.pwrite_zeroes(0, there)
    if data.size < size or (preallocation == "off" and data.size != size):
        mode = preallocation if preallocation in ("falloc", "full") else "off"
        await data.node.truncate(size, exact=False, preallocation=mode)
    await data.flush()
