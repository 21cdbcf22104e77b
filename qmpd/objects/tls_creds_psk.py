"""tls-creds-psk: TLS with keys that both sides hold already.

Options: TlsCredsPskProperties (qapi/qom.json and what it includes). The keys are in keys.psk, one
`NAME:HEXADECIMAL` a line, as psktool(1) writes it. Needs Python 3.13's ssl module when used.
"""

from __future__ import annotations

import binascii
import platform
import ssl
from dataclasses import dataclass
from typing import Any

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.objects._tls import TlsCreds, base_context, load_dh_params
from qmpd.qapi.registry import qom_type
from qmpd.qom import values
from qmpd.qom.object import Property
from qmpd.qom.tree import ObjectTree

_DEFAULT_USERNAME = "qemu"
_MAX_FILE = 4 << 20
_MAX_KEY = 64
"""Bytes of a key at most, as GnuTLS has it (MAX_PSK_KEY_SIZE)."""


@dataclass(frozen=True, slots=True)
class TlsCredsPskOptions:
    """Members of TlsCredsPskProperties."""

    verify_peer: bool = True
    dir: str | None = None
    endpoint: str = "client"
    priority: str | None = None
    username: str | None = None


def _set_username(self: TlsCredsPsk, value: Any) -> None:
    self.username = values.string("username", value)
    self.forget()


@qom_type("tls-creds-psk", schema="TlsCredsPskProperties", options=TlsCredsPskOptions)
class TlsCredsPsk(TlsCreds):
    """A key file: all keys in it for a server, one of them for a client."""

    qom_type = "tls-creds-psk"
    abstract = False
    qom_properties = (Property("username", "string", get=lambda self: self.username or "", set=_set_username),)

    def __init__(self, options: TlsCredsPskOptions) -> None:
        super().__init__(options.verify_peer, options.dir, options.endpoint, options.priority)
        self.username = options.username
        self._keys: dict[str, SecretBytes] = {}

    def complete(self, objects: ObjectTree) -> None:
        """Read the keys."""
        if self.endpoint == "server" and self.username is not None:
            raise CommandError("username should not be set when endpoint=server")
        path = self.required_file("keys.psk")
        if self.endpoint == "server":
            dh_path = self.file("dh-params.pem", required=False)
            if dh_path is not None:
                load_dh_params(base_context(self.endpoint), dh_path)
            self._keys = read_keys(path, None)
            return
        name = self.username or _DEFAULT_USERNAME
        self._keys = read_keys(path, name)
        if name not in self._keys:
            raise CommandError(f"Username {name} not found in PSK file {path}")

    def make_context(self) -> ssl.SSLContext:
        """Return a context that offers or accepts the keys."""
        context = base_context(self.endpoint)
        set_callback = getattr(context, f"set_psk_{self.endpoint}_callback", None)
        if set_callback is None:
            raise CommandError(
                f"TLS credentials '{self.id}' cannot be used: pre-shared keys need Python 3.13 or newer, "
                f"this is {platform.python_version()}"
            )
        # Python's PSK callbacks serve TLS 1.2 and below; the suites are those without certificates.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE-PSK:DHE-PSK:PSK:!aNULL:!eNULL")
        if self.endpoint == "server":
            set_callback(lambda identity: self._key(identity or ""))
        else:
            name = self.username or _DEFAULT_USERNAME
            set_callback(lambda _hint: (name, self._key(name)))
        return context

    def _key(self, name: str) -> bytes:
        """Return the key of `name`, nothing if there is none."""
        found = self._keys.get(name)
        if found is None:
            return b""
        with found.view() as view:
            return bytes(view)

    def delete(self) -> None:
        """Wipe the keys."""
        for key in self._keys.values():
            key.wipe()
        self._keys.clear()
        super().delete()


def read_keys(path: str, wanted: str | None) -> dict[str, SecretBytes]:
    """Return the keys in a file by name, only that of `wanted` if it is given.

    Lines that are no keys are passed over, as GnuTLS does. Raises CommandError.
    """
    try:
        with open(path, "rb") as file:
            contents = bytearray(file.read(_MAX_FILE + 1))
    except OSError as error:
        raise CommandError(f"Cannot read PSK file {path}: Error reading file “{path}”: {error.strerror}") from error
    if len(contents) > _MAX_FILE:
        raise CommandError(f"Cannot read PSK file {path}: File is larger than {_MAX_FILE} bytes")
    keys: dict[str, SecretBytes] = {}
    for line in contents.splitlines():
        name, colon, digits = line.partition(b":")
        try:
            text, key = name.decode(), bytearray(binascii.unhexlify(digits))
        except ValueError:
            continue
        if colon and not text.startswith("#") and 0 < len(key) <= _MAX_KEY and wanted in (None, text):
            keys.setdefault(text, SecretBytes.take(key))
    contents[:] = bytes(len(contents))
    return keys
