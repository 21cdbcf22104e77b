"""The header of a volume that is encrypted in place: made before the first byte of payload changes."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError
from qmpd.luks.create2 import Luks2Options, create_luks2, header_length
from qmpd.luks.detect import read_header
from qmpd.luks.encrypt import ZONE, add_journal, begin_journal, journal_key
from qmpd.luks.volume import HeaderIO
from qmpd.units import MiB


async def prepare_header(
    target: HeaderIO, options: Luks2Options, passphrase: SecretBytes, payload_size: int, *, zone: int = ZONE
) -> None:
    """See to it that `target` holds the header of an encryption in place, a new one or an interrupted one's.

    target         at least `header_length()` bytes, blank or with such a header
    payload_size   bytes of the image
    Raises CommandError if something else is there or the options do not fit the image, ImageError, OSError.
    """
    if not await _blank(target):
        try:
            volume = await read_header(target, detached=True)
        except (CommandError, ImageError) as error:
            raise CommandError(f"The node for the header is not blank, and it has no LUKS2 header: {error}") from error
        if volume.journal is None:
            raise CommandError("The node for the header holds the header of another LUKS volume")
        return
    sector = options.checked().sector_size
    if not payload_size or payload_size % sector:
        raise CommandError(f"The image has {payload_size} bytes, expected a multiple of the sector size {sector}")
    named = replace(options, uuid=options.uuid or str(uuid.uuid4()))
    assert named.uuid is not None
    volume_uuid = named.uuid

    async def prepare(header: HeaderIO, tree: dict[str, Any], key: bytearray) -> None:
        with journal_key(key, volume_uuid) as secret:
            await begin_journal(header, add_journal(tree, payload_size, zone), secret)

    await create_luks2(target, named, passphrase, detached=True, prepare=prepare)


async def _blank(target: HeaderIO) -> bool:
    for at in range(0, header_length(), MiB):
        data = await target.pread(at, min(MiB, header_length() - at))
        if data.count(0) < len(data):
            return False
    return True
