"""The encryption of a new qcow2 image: QCryptoBlockCreateOptions (qapi/block-create.json).

The clusters of the LUKS header are zeroed first, so that what is not written of them is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from qmpd.block.batch import WriteFlags
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers._qcow2_crypto import POINTER, Secrets, Window, refuse_aes
from qmpd.errors import CommandError
from qmpd.formats.qcow2_header import CRYPT_AES, CRYPT_LUKS, EXT_CRYPTO_HEADER, Header
from qmpd.luks.create import Luks1Options, create_luks1, header_length
from qmpd.luks.volume import HeaderIO
from qmpd.units import align_up

if TYPE_CHECKING:
    from qmpd.block.options import OpenFlags

METHODS = {"qcow": CRYPT_AES, "luks": CRYPT_LUKS}


class Target(HeaderIO, Protocol):
    """What the image is made on."""

    async def pwrite_zeroes(self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE) -> None:
        """Make the range zero, growing the file."""


class NewEncryption:
    """What is asked for and, once `prepare` has been called, how much room it takes.

    length   bytes of the LUKS header, 0 with the old method
    """

    def __init__(self, options: Mapping[str, Any], objects: Secrets, flags: OpenFlags) -> None:
        self._options, self._objects, self._flags = options, objects, flags
        self._luks: Luks1Options | None = None
        self._passphrase: SecretBytes | None = None
        self.length = 0

    def prepare(self, header: Header) -> None:
        """Check the options, and state the method in the header. Raises CommandError.

        `wipe` is to be called afterwards, whatever happens.
        """
        header.crypt_method = METHODS[self._options["format"]]
        if header.crypt_method == CRYPT_AES:
            refuse_aes(self._flags)
        secret = self._options.get("key-secret")
        if secret is None:
            raise CommandError("Parameter 'encrypt.key-secret' is required for cipher")
        self._passphrase = self._objects.passphrase(secret)
        if header.crypt_method == CRYPT_LUKS:
            members = {name.replace("-", "_"): value for name, value in self._options.items()}
            known = Luks1Options.__dataclass_fields__
            self._luks = Luks1Options(**{name: value for name, value in members.items() if name in known})
            self.length = header_length(self._luks)

    def place(self, header: Header, offset: int) -> None:
        """State in the header where that of LUKS will lie, if there will be one."""
        if self.length:
            header.extensions.append((EXT_CRYPTO_HEADER, POINTER.pack(offset, self.length)))

    async def write(self, file: Target, offset: int, cluster_size: int) -> None:
        """Write the LUKS header with its first key slot at `offset`. Raises CommandError, OSError."""
        if self._luks is None:
            return
        assert self._passphrase is not None
        await file.pwrite_zeroes(offset, align_up(self.length, cluster_size))
        await create_luks1(Window(file, offset, self.length), self._luks, self._passphrase, detached=False)

    def wipe(self) -> None:
        """Forget the passphrase."""
        if self._passphrase is not None:
            self._passphrase.wipe()
