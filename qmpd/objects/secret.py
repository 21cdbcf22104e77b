"""secret: a password or key from the command itself or from a file.

Options: SecretProperties (qapi/qom.json). Texts as the reference; reading `data` back is refused
on purpose.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from typing import Any

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.objects._secret import SecretCommon, iv_bytes
from qmpd.qapi.registry import qom_type
from qmpd.qom import values
from qmpd.qom.object import Property

_log = logging.getLogger("qmpd.secrets")

MAX_FILE = 16 << 20
"""Bytes of a secret file at most: twice what cryptsetup takes as a key file by default."""


@dataclass(frozen=True, slots=True)
class SecretOptions:
    """Members of SecretProperties; exactly one of `data` and `file` is given."""

    format: str = "raw"
    keyid: str | None = None
    iv: str | None = None
    data: str | None = None
    file: str | None = None

    def __repr__(self) -> str:
        return f"<SecretOptions format={self.format!r} keyid={self.keyid!r} file={self.file!r}>"


def _set_data(self: Secret, value: Any) -> None:
    """Take the new value as QEMU does: the secret was loaded already and stays what it is."""
    values.string("data", value)


def _set_file(self: Secret, value: Any) -> None:
    self.file = values.string("file", value)


@qom_type("secret", schema="SecretProperties", options=SecretOptions)
class Secret(SecretCommon):
    """A secret whose bytes come with the command or out of a file."""

    qom_type = "secret"
    abstract = False
    qom_properties = (
        Property("data", "string", set=_set_data),
        Property("file", "string", get=lambda self: self.file or "", set=_set_file),
    )

    def __init__(self, options: SecretOptions) -> None:
        super().__init__(options.format, options.keyid, options.iv)
        self.file = options.file
        self._data = None if options.data is None else SecretBytes(iv_bytes(options.data))

    def load(self) -> bytearray:
        """Return the given data, or the whole file."""
        data, self._data = self._data, None
        if data is not None:
            with data, data.view() as view:
                if self.file is not None:
                    raise CommandError("'file' and 'data' are mutually exclusive")
                return bytearray(view)
        if self.file is None:
            raise CommandError("Either 'file' or 'data' must be provided")
        return read_file(self.file)

    def delete(self) -> None:
        """Wipe the bytes."""
        if self._data is not None:
            self._data.wipe()
        super().delete()


def read_file(name: str) -> bytearray:
    """Return the contents of a secret file, MAX_FILE bytes at most. Raises CommandError."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise CommandError(f"Unable to read {name}: Failed to open file “{name}”: {_reason(error)}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
            _log.warning("secret file %s can be read by other users (mode %04o)", name, stat.S_IMODE(mode))
        contents, part = bytearray(), bytearray(1 << 16)  # `os.read` would leave a copy in freed memory
        with memoryview(part) as view:
            while length := os.readv(descriptor, [view]):
                contents += view[:length]
                view[:length] = bytes(length)
                if len(contents) > MAX_FILE:
                    raise CommandError(f"Unable to read {name}: File is larger than {MAX_FILE} bytes")
        return contents
    except OSError as error:
        raise CommandError(f"Unable to read {name}: Error reading file “{name}”: {_reason(error)}") from error
    finally:
        os.close(descriptor)


def _reason(error: OSError | ValueError) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "No such file or directory"
