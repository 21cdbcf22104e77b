"""An id in a header extension of a qcow2 image, by which a LUKS header knows its payload.

The extension is ours; the format has software keep those that it does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.drivers._qcow2_backing import HEADER_ROOM

if TYPE_CHECKING:
    from qmpd.drivers._qcow2_image import Image

EXTENSION = 0x716D7064
"""Type of the header extension: "qmpd" in ASCII."""

ID_SIZE = 16


def identity(image: Image) -> bytes:
    """Return the id of the image, b"" if it has none."""
    found = [data for kind, data in image.header.extensions if kind == EXTENSION]
    return found[0] if found and len(found[0]) == ID_SIZE else b""


async def mark(image: Image, value: bytes) -> None:
    """Give the image an id of ID_SIZE bytes, durably. Raises CommandError if the header has no room, OSError."""
    header = image.header
    async with image.lock:
        await image.write_metadata(durable=True, everything=True)
        before = header.extensions
        header.extensions = [(kind, data) for kind, data in before if kind != EXTENSION] + [(EXTENSION, value)]
        try:
            packed = header.pack()
            await image.write_header_field(0, packed.ljust(min(header.cluster_size, HEADER_ROOM), b"\0"))
        except BaseException:
            header.extensions = before
            raise
