"""A qcow2 image and its backing file: naming another one, and giving up what the image itself holds."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qmpd.drivers._qcow2_zero import _change, _forget
from qmpd.errors import CommandError
from qmpd.formats.qcow2_header import LAZY_REFCOUNTS, MAX_BACKING_NAME, MAX_FORMAT_NAME
from qmpd.units import KiB, align_up

if TYPE_CHECKING:
    from qmpd.drivers._qcow2_image import Image

COMPATIBLE_OFFSET = 80
"""Where the compatible feature bits lie in the header (qcow2 specification, "Header")."""

HEADER_ROOM = 64 * KiB
"""Bytes of the first cluster that are written with a new header; what lies behind is not looked at."""


async def change_backing(image: Image, name: bytes, image_format: bytes) -> None:
    """Name another backing file in the header, none if `name` is empty. Raises CommandError, OSError."""
    header = image.header
    if name and image.raw:
        raise OSError(errno.EINVAL, "what an image with a raw data file holds is all in that file")
    if len(name) > MAX_BACKING_NAME or len(image_format) > MAX_FORMAT_NAME:
        raise OSError(errno.EINVAL, f"a backing file's name has {MAX_BACKING_NAME} bytes at most")
    before = header.backing_file, header.backing_format
    header.backing_file, header.backing_format = name, image_format if name else b""
    try:
        data = header.pack()
    except CommandError:
        header.backing_file, header.backing_format = before
        raise
    await image.flush()
    await image.file.pwrite(0, data.ljust(min(header.cluster_size, HEADER_ROOM), b"\0"))
    await image.file.flush()


async def name_data_file(image: Image, name: bytes) -> None:
    """Name another external data file in the header, none if `name` is empty. Raises CommandError, OSError."""
    header = image.header
    before = header.extensions
    header.set_data_file(name)
    try:
        data = header.pack()
        await image.flush()
        await image.write_header_field(0, data.ljust(min(header.cluster_size, HEADER_ROOM), b"\0"))
    except BaseException:
        header.extensions = before
        raise


async def make_empty(image: Image, size: int) -> None:
    """Give up every cluster of the guest disk: it then shows the backing file, or zeroes. Raises OSError."""
    image.file.debug_event("empty_image_prepare")
    end = align_up(size, image.cluster_size)
    await _change(image, 0, end, _forget, make_tables=False, pass_on=image.external, reason="snapshot")


async def set_lazy(image: Image, lazy: bool) -> None:
    """Let refcounts be brought up to date late, or not. Raises CommandError, OSError."""
    header = image.header
    if header.version < 3:
        raise CommandError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )
    bits = header.compatible & ~LAZY_REFCOUNTS | (LAZY_REFCOUNTS if lazy else 0)
    await image.flush()
    if not lazy:
        await image.write_metadata(everything=True, durable=True)
    await image.write_header_field(COMPATIBLE_OFFSET, bits.to_bytes(8, "big"))
    header.compatible = bits
