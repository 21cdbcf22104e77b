"""Opening a qcow2 image: the reference's checks in the reference's order (qcow2_do_open)."""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING

from qmpd.drivers._qcow2_image import Image, Report
from qmpd.drivers._qcow2_options import Qcow2Options, resolve
from qmpd.errors import CommandError
from qmpd.formats import qcow2_header
from qmpd.formats.qcow2 import ENTRY_SIZE, MAX_L1_BYTES, OFFSET_MASK, SNAPSHOT_HEADER_SIZE
from qmpd.formats.qcow2_compress import can_decompress
from qmpd.formats.qcow2_header import AUTOCLEAR_OFFSET, COMPRESSION_TYPES, Header
from qmpd.formats.qcow2_snapshot import (
    MAX_TABLE,
    Snapshot,
    StoredBitmap,
    parse_bitmap_directory,
    parse_snapshot,
    snapshot_entry_size,
)

if TYPE_CHECKING:
    from qmpd.block.child import Child

log = logging.getLogger(__name__)


async def read_header(file: Child, *, writable: bool, check: bool = False) -> tuple[Header, bytes]:
    """Return the header, its tables' places checked, and the first cluster as far as it exists.

    Raises CommandError, or OSError.
    """
    head = bytes(await file.pread(0, min(qcow2_header.CURRENT_LENGTH, file.size)))
    bits = qcow2_header.first_bytes(head)
    data = bytes(await file.pread(0, min(1 << bits, file.size)))
    return qcow2_header.parse(data, writable=writable, check=check), data


async def open_image(
    options: Qcow2Options,
    *,
    writable: bool,
    unmap: bool,
    report: Report,
    check: bool = False,
    no_io: bool = False,
    data_given: bool = False,
) -> Image:
    """Return the open image on `options.file`; nothing is written yet.

    data_given  the options name a data file, which is opened later
    writable  guest writes or repairs may follow        unmap  the node passes discards on
    check     it is opened to be checked: what a repair can mend is no error
    no_io     nothing of the guest disk is going to be read: an external data file is then only told of, and
              never opened, as its name is whatever the image says
    Raises CommandError, OSError.
    """
    file = options.file
    try:
        header, data = await read_header(file, writable=writable, check=check)
    except OSError as error:
        raise CommandError("Could not read qcow2 header") from error
    settings = resolve(options, header, unmap=unmap)
    image = Image(file, header, settings, writable=writable, report=report)
    try:
        await image.load()
    except OSError as error:
        raise CommandError("Could not read L1 table") from error
    for warning in qcow2_header.parse_extensions(header, data):
        log.warning("qcow2: %s", warning)
    if header.crypt_method:
        from qmpd.drivers._qcow2_crypto import read_encryption  # what it imports takes a while

        image.encryption = await read_encryption(file, header)
    if image.encryption is not None:
        image.overlaps.protect(*image.encryption.place)
    if not no_io and not data_given:
        _check_data_file(header)
    elif no_io and image.external:
        image.dead = True
    refuse_unbuilt(header)
    qcow2_header.read_backing_name(header, data)
    image.overlaps.set_area("bitmap-directory")
    if header.bitmaps is not None:
        image.overlaps.set_area("bitmap-directory", (header.bitmaps.directory_offset, header.bitmaps.directory_size))
    image.snapshots = await read_snapshots(image, tolerant=check)
    await place_inactive(image)
    return image


def _check_data_file(header: Header) -> None:
    """Refuse an image whose data file nobody names, or that has none but says what is in it. Raises CommandError."""
    if header.incompatible & qcow2_header.DATA_FILE:
        if header.data_file is None:
            raise CommandError("'data-file' is required for this image")
    elif header.version >= 3 and header.autoclear & qcow2_header.DATA_FILE_RAW:
        raise CommandError("data-file-raw requires a data file")


def refuse_unbuilt(header: Header) -> None:
    """Refuse, by name, the features of the format that this program cannot do. Raises CommandError."""
    if not can_decompress(header.compression_type):
        raise CommandError(
            f"Unsupported qcow2 feature(s): compression type {COMPRESSION_TYPES[header.compression_type]}"
        )


async def read_snapshots(image: Image, *, tolerant: bool = False) -> list[Snapshot]:
    """Return the snapshot table, as far as the file reaches. Raises CommandError, OSError."""
    header = image.header
    found: list[Snapshot] = []
    start = offset = header.snapshots_offset
    for index in range(header.nb_snapshots):
        if offset >= image.file.size:
            break
        head = await image.read_metadata(offset, SNAPSHOT_HEADER_SIZE)
        try:
            length = snapshot_entry_size(head, index)
        except CommandError:
            if tolerant:
                break
            raise
        if offset + length - start > MAX_TABLE:
            raise CommandError("Snapshot table is too large")
        found.append(parse_snapshot(await image.read_metadata(offset, length)))
        offset += length
    image.overlaps.set_area("snapshot-table", (start, offset - start))
    return found


async def place_inactive(image: Image) -> None:
    """State where the tables of the snapshots lie, for the overlap checks. Raises OSError."""
    overlaps = image.overlaps
    areas = [(one.l1_table_offset, one.l1_size * ENTRY_SIZE) for one in image.snapshots]
    overlaps.set_area("inactive-l1", *(area for area in areas if area[1] <= MAX_L1_BYTES))
    if overlaps.wants("inactive-l2") and image.writable:
        tables: list[int] = []
        for offset, length in areas:
            if length <= MAX_L1_BYTES:
                entries = await image.read_table(offset, length // ENTRY_SIZE)
                tables.extend(entry & OFFSET_MASK for entry in entries if entry & OFFSET_MASK)
        overlaps.set_tables("inactive-l2", tables)


async def read_bitmaps(image: Image) -> list[StoredBitmap]:
    """Return the directory of persistent bitmaps. Raises CommandError, OSError."""
    place = image.header.bitmaps
    if place is None:
        return []
    if place.directory_offset + place.directory_size >= 1 << 63:
        raise CommandError("Failed to read bitmap directory: Input/output error")
    data = await image.read_metadata(place.directory_offset, place.directory_size)
    return parse_bitmap_directory(data, place.count, size=image.header.size, cluster_size=image.cluster_size)


async def clear_autoclear(image: Image) -> None:
    """Clear the autoclear features that we do not keep up to date. Raises CommandError."""
    header = image.header
    kept = header.autoclear & qcow2_header.AUTOCLEAR_MASK
    if header.version < 3 or kept == header.autoclear:
        return
    try:
        await image.write_header_field(AUTOCLEAR_OFFSET, struct.pack(">Q", kept))
    except OSError as error:
        raise CommandError("Could not update qcow2 header") from error
    header.autoclear = kept
