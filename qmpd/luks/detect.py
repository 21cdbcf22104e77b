"""Which version of LUKS a header is, and what follows from where the payload lies."""

from __future__ import annotations

from qmpd.errors import CommandError, ImageError
from qmpd.formats import luks1, luks2
from qmpd.luks.luks2 import Luks2Volume, read_copies
from qmpd.luks.volume import HeaderIO, Volume, read_padded, read_volume


async def read_header(
    source: HeaderIO, *, detached: bool, image: str = "header", key_length: int | None = None
) -> Volume:
    """Read and check the header on `source`, of either version.

    detached   the payload is elsewhere, so that it cannot overlap the header
    image      what errors of a LUKS2 header call it
    key_length bytes of the volume key of a volume that is open, should it have lost its last slot
    A LUKS2 header whose first copy is destroyed is found by its second. Raises CommandError with
    QEMU's text for what is no LUKS header, ImageError for LUKS2 headers that break their rules, OSError.
    """
    phdr = luks1.Phdr.unpack_from(await read_padded(source, 0, luks1.Phdr.SIZE))
    if phdr.magic == luks1.MAGIC and phdr.version != luks2.VERSION:
        return await read_volume(source, detached=detached)
    try:
        found = await read_copies(source, image)
    except ImageError:
        if phdr.magic == luks1.MAGIC:
            raise
        return await read_volume(source, detached=detached)  # no copy at all: refused in QEMU's words
    volume = Luks2Volume(found, key_length)
    if not detached and volume.payload_offset < found.copy.metadata.total_size:
        raise CommandError("LUKS payload is overlapping with the header")
    return volume


async def is_luks2(source: HeaderIO) -> bool:
    """Say whether `source` starts with a LUKS2 header, or has the second copy of one. Raises OSError."""
    phdr = luks1.Phdr.unpack_from(await read_padded(source, 0, luks1.Phdr.SIZE))
    if phdr.magic == luks1.MAGIC:
        return phdr.version == luks2.VERSION
    magic = luks2.MAGIC[1]
    for offset in luks2.COPY_SIZES:
        if await read_padded(source, offset, len(magic)) == magic:
            return True
    return False
