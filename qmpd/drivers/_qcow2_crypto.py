"""Encryption inside a qcow2 image: LUKS, its header in clusters of the image, and the old AES-CBC method.

Only guest data of plain clusters is encrypted: tables, zero clusters and compressed clusters are not.
With LUKS a sector is numbered by its place in the file that holds the data, so that a cluster that
moves is encrypted anew; with the old method by its place on the guest's disk.
Source: docs/interop/qcow2.txt of QEMU, "Full disk encryption header pointer" and "crypt_method".
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from qmpd.aio.pool import BufferPool
from qmpd.block.batch import Batch, Request
from qmpd.block.options import OpenFlags
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.cipher import CipherSpec
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers._qcow2_placed import Placed
from qmpd.errors import CommandError
from qmpd.formats import luks1
from qmpd.formats.qcow2 import ENTRY_SIZE
from qmpd.formats.qcow2_header import CRYPT_AES, CRYPT_LUKS, EXT_CRYPTO_HEADER, Header
from qmpd.luks.payload import POOL_CAP, write_encrypted
from qmpd.luks.volume import HeaderIO, Volume, read_volume
from qmpd.luks.work import transform
from qmpd.units import SECTOR, align_up

if TYPE_CHECKING:
    from qmpd.block.child import Child
    from qmpd.drivers._qcow2_image import Image
    from qmpd.luks.keys import KeyslotEdit, Passphrase

POINTER = struct.Struct(">QQ")
"""Body of the header extension: offset and length in bytes of the LUKS header."""

AES_KEY = 16
"""Bytes of the old method's key: the passphrase itself, cut or filled up with zeroes."""
AES = CipherSpec("aes", "cbc", "plain64", None, AES_KEY)

_INT64_MAX = (1 << 63) - 1


class Secrets(Protocol):
    """Where secrets are looked up: the tree of objects."""

    def passphrase(self, object_id: str) -> SecretBytes:
        """Return a copy of a secret. Raises CommandError."""


class Window:
    """The clusters of the LUKS header as a volume of their own; a `HeaderIO`.

    offset, size   bytes; nothing outside of it is read or written
    """

    def __init__(self, file: HeaderIO, offset: int, size: int) -> None:
        self._file, self._offset, self.size = file, offset, size

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise CommandError(
                f"Request for data outside of extension header (bytes {offset} to {offset + length} of {self.size})"
            )

    async def pread(self, offset: int, length: int) -> bytearray:
        """Return bytes within the header; those after the end of the file are zero."""
        self._check(offset, length)
        there = max(min(length, self._file.size - self._offset - offset), 0)
        data = await self._file.pread(self._offset + offset, there) if there else bytearray()
        return data + bytes(length - there)

    async def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes within the header."""
        self._check(offset, len(data))
        await self._file.pwrite(self._offset + offset, data)

    async def flush(self) -> None:
        """Make what was written durable."""
        await self._file.flush()


class Encryption:
    """How one image is encrypted, and once `unlock` was called, the cipher.

    method      CRYPT_AES or CRYPT_LUKS           volume  the LUKS header, None with the old method
    place       (offset, length) of that header in the file, in bytes
    key_secret  id of the secret that opens the image, as the options name it
    """

    key_secret: str | None = None

    def __init__(self, method: int, window: Window | None, volume: Volume | None, place: tuple[int, int]) -> None:
        self.method, self.window, self.volume, self.place = method, window, volume, place
        self._crypto: BlockCrypto | None = None
        self._editing = False
        self._buffers = BufferPool(POOL_CAP)

    def passphrase(self, objects: Secrets) -> SecretBytes:
        """Return the secret that opens the image, which the caller wipes. Raises CommandError."""
        if self.key_secret is None:
            raise CommandError("Parameter 'encrypt.key-secret' is required for cipher")
        return objects.passphrase(self.key_secret)

    async def unlock(self, passphrase: SecretBytes) -> None:
        """Derive the key; the caller wipes the passphrase. Raises CommandError, OSError."""
        if self.volume is None:
            with passphrase.view() as secret:
                key = bytearray(secret[:AES_KEY]).ljust(AES_KEY, b"\0")
            self._set(AES, key)
            return
        assert self.window is not None
        _check_slots(self.volume, self.window.size)
        unlocked = await self.volume.unlock(self.window, passphrase)
        self._set(self.volume.spec, unlocked.key)

    def _set(self, spec: CipherSpec, key: bytearray) -> None:
        try:
            self._crypto = BlockCrypto(spec, key)
        finally:
            key[:] = bytes(len(key))

    def wipe(self) -> None:
        """Destroy the key."""
        if self._crypto is not None:
            self._crypto.wipe()
            self._crypto = None

    @property
    def _cipher(self) -> BlockCrypto:
        assert self._crypto is not None, "the image is not unlocked"
        return self._crypto

    def _numbered(self, batch: Batch) -> Batch:
        """Return the requests at the offsets that number their sectors."""
        if self.method == CRYPT_LUKS:
            return batch
        numbered = Batch()
        for request in batch:
            assert isinstance(request, Placed)
            numbered.append(Request(request.guest, request.view, request))
        return numbered

    async def decrypt(self, batch: Batch) -> None:
        """Decrypt in place what was read for `batch`, its offsets those in the file."""
        batch = Batch(request for request in batch if not request.error)
        spans = self._cipher.in_place(self._numbered(batch))
        if spans:
            await transform(self._cipher.decrypt, spans)

    async def write(self, file: Child, batch: Batch) -> None:
        """Encrypt a batch and write it to the file; errors are marked on the requests."""
        await write_encrypted(self._cipher, self._buffers, batch, file.pwritev, numbered=self._numbered)

    async def edit_keyslots(self, edit: KeyslotEdit, passphrase: Passphrase, *, force: bool) -> None:
        """Add or erase a passphrase; see `luks.keys.edit_keyslots`. Raises CommandError, OSError."""
        assert self.window is not None
        if self._editing:
            raise CommandError("Another job changes the key slots of this volume")
        self._editing = True
        try:
            from qmpd.luks.keys import edit_keyslots

            await edit_keyslots(self.window, edit, passphrase, self.key_secret, detached=False, force=force)
        finally:
            self._editing = False
            self.volume = await read_volume(self.window, detached=False)

    def info(self) -> dict[str, Any]:
        """Return ImageInfoSpecificQCow2Encryption (wire names)."""
        if self.volume is None:
            return {"format": "aes"}
        return {"format": "luks", **self.volume.info()}


def refuse_aes(flags: OpenFlags) -> None:
    """Refuse the old method where the reference does. Raises CommandError."""
    if OpenFlags.NO_AES in flags:
        raise CommandError("Use of AES-CBC encrypted qcow2 images is no longer supported in system emulators")


async def read_encryption(file: Child, header: Header) -> Encryption | None:
    """Return how the image on `file` is encrypted, its LUKS header read and checked; None if it is not.

    Raises CommandError, OSError.
    """
    if header.crypt_method == CRYPT_AES:
        return Encryption(CRYPT_AES, None, None, (0, 0))
    if header.crypt_method != CRYPT_LUKS:
        return None
    pointers = [body for kind, body in header.extensions if kind == EXT_CRYPTO_HEADER]
    if not pointers:
        raise CommandError(f"Missing CRYPTO header for crypt method {header.crypt_method}")
    offset, length = POINTER.unpack(pointers[-1])
    _check_place(header, offset, length, file.size)
    window = Window(file, offset, length)
    return Encryption(CRYPT_LUKS, window, await read_volume(window, detached=False), (offset, length))


def _check_place(header: Header, offset: int, length: int, file_size: int) -> None:
    """Check where the LUKS header is said to lie. Raises CommandError; sizes in bytes."""
    if length < luks1.HEADER_SIZE:
        raise CommandError(f"Encryption header length {length} is too small: at least {luks1.HEADER_SIZE} are needed")
    if length > _INT64_MAX - offset:
        raise CommandError(
            f"Encryption header length {length} is too large: at most {_INT64_MAX - offset} are possible"
        )
    if offset >= file_size:
        raise CommandError(f"Encryption header offset {offset} is too large: the file has {file_size} bytes")
    areas = (
        ("qcow2_header", 0, header.cluster_size),
        ("active L1 table", header.l1_table_offset, header.l1_size * ENTRY_SIZE),
        ("refcount table", header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size),
    )
    for name, start, size in areas:
        if size and offset < start + size and start < offset + length:
            raise CommandError(
                f"Encryption header of {length} bytes at offset {offset} overlaps with {name} at offset {start}"
                f" ({size} bytes)"
            )


def _check_slots(volume: Volume, length: int) -> None:
    """Refuse a LUKS header whose key slots lie beyond its `length`. Raises CommandError."""
    for slot in volume.info()["slots"]:
        end = slot["key-offset"] + align_up(volume.spec.key_length * luks1.STRIPES, SECTOR)
        if slot["active"] and end > length:
            raise CommandError(f"Request for data outside of extension header (up to {end} of {length} bytes)")


async def amend_encryption(
    image: Image, options: Mapping[str, Any] | None, passphrase: Passphrase, *, force: bool
) -> None:
    """Change key slots (QCryptoBlockAmendOptions, wire names); None changes nothing. Raises CommandError, OSError."""
    if options is None:
        return
    encryption = image.encryption
    if encryption is None:
        raise CommandError("image is not encrypted, can't amend")
    if options["format"] != "luks":
        raise CommandError("Amend can't be used to change the qcow2 encryption format")
    if encryption.method != CRYPT_LUKS:
        raise CommandError("Only LUKS encryption options can be amended for qcow2 with blockdev-amend")
    from qmpd.luks.keys import KeyslotEdit

    edit = KeyslotEdit(**{name.replace("-", "_"): value for name, value in options.items() if name != "format"})
    if not image.writable:
        raise CommandError(f"Could not read encryption header: {os.strerror(errno.EPERM)}")
    await encryption.edit_keyslots(edit, passphrase, force=force)
