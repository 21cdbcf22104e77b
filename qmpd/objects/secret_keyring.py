"""secret_keyring: a password or key from the Linux key retention service.

Options: SecretKeyringProperties (qapi/qom.json). The key is read once, by keyctl(2) KEYCTL_READ.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from typing import Any

from qmpd.errors import CommandError, ValidationError
from qmpd.objects._secret import SecretCommon
from qmpd.qapi.registry import qom_type
from qmpd.qom import values
from qmpd.qom.object import Property

_KEYCTL_READ = 11
_SYSCALL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280, "i686": 288, "armv7l": 311}
"""Number of keyctl(2) by machine, from the kernel's system call tables."""
_MAX_KEY = 1 << 20
"""Bytes; the kernel's own limit is 32767 for user keys and 1 MiB for big_key."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class SecretKeyringOptions:
    """Members of SecretKeyringProperties; `serial` names the key."""

    serial: int
    format: str = "raw"
    keyid: str | None = None
    iv: str | None = None


def _check_serial(value: Any) -> int:
    serial = values.integer("serial", value)
    if not -(1 << 31) <= serial < 1 << 31:
        raise ValidationError("Parameter 'serial' expects int32_t")
    if serial == 0:
        raise CommandError("'serial' should not be equal to 0")
    return serial


def _set_serial(self: SecretKeyring, value: Any) -> None:
    self.serial = _check_serial(value)


@qom_type("secret_keyring", schema="SecretKeyringProperties", options=SecretKeyringOptions)
class SecretKeyring(SecretCommon):
    """A secret whose bytes are a key of the kernel."""

    qom_type = "secret_keyring"
    abstract = False
    qom_properties = (Property("serial", "int32_t", get=lambda self: self.serial, set=_set_serial),)

    def __init__(self, options: SecretKeyringOptions) -> None:
        super().__init__(options.format, options.keyid, options.iv)
        self.serial = _check_serial(options.serial)

    def load(self) -> bytearray:
        """Return the key's payload."""
        length = self._read(None)
        if length > _MAX_KEY:
            raise CommandError(f"Unable to read serial key {self.serial & 0xFFFFFFFF:08x}: Message too long")
        payload = bytearray(length)
        # A key that shrank or grew between the calls is taken as far as both agree.
        del payload[self._read(payload) :]
        return payload

    def _read(self, into: bytearray | None) -> int:
        number = _SYSCALL.get(platform.machine())
        if number is None:
            raise CommandError("The kernel keyring is not supported on this machine")
        room = 0 if into is None else len(into)
        target = None if into is None else (ctypes.c_char * room).from_buffer(into)
        result = int(
            _libc.syscall(
                ctypes.c_long(number),
                ctypes.c_long(_KEYCTL_READ),
                ctypes.c_long(self.serial),
                target,
                ctypes.c_size_t(room),
            )
        )
        if result <= 0:
            reason = os.strerror(ctypes.get_errno())
            raise CommandError(f"Unable to read serial key {self.serial & 0xFFFFFFFF:08x}: {reason}")
        return result
