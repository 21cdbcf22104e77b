"""tls-creds-psk: TLS with keys that both sides hold already.

Options: TlsCredsPskProperties (qapi/qom.json and what it includes). The keys are in keys.psk, one
`NAME:HEXADECIMAL` a line, as psktool(1) writes it. Needs Python 3.13's ssl module when used.
"""

from __future__ import annotations

import binascii
import logging
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

_log = logging.getLogger("qmpd.tls")

_DEFAULT_USERNAME = "qemu"
_MAX_FILE = 4 << 20
"""Bytes of a key file at most."""
_MIN_KEY, _MAX_KEY = 4, 256
"""Bytes of a key: what GnuTLS takes at least, what OpenSSL takes at most (PSK_MAX_PSK_LEN)."""


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
    """A key file: every key in it counts for a server, one of them for a client."""

    qom_type = "tls-creds-psk"
    abstract = False
    qom_properties = (Property("username", "string", get=lambda self: self.username or "", set=_set_username),)

    def __init__(self, options: TlsCredsPskOptions) -> None:
        super().__init__(options.verify_peer, options.dir, options.endpoint, options.priority)
        self.username = options.username
        self._key: SecretBytes | None = None

    def complete(self, objects: ObjectTree) -> None:
        """Look at the files; a client reads its key now, a server reads them when a client comes."""
        if self.endpoint == "server" and self.username is not None:
            raise CommandError("username should not be set when endpoint=server")
        path = self.required_file("keys.psk")
        if self.endpoint == "server":
            dh_path = self.file("dh-params.pem", required=False)
            if dh_path is not None:
                load_dh_params(base_context(self.endpoint), dh_path)
        else:
            self._key = client_key(path, self._name)

    @property
    def _name(self) -> str:
        return _DEFAULT_USERNAME if self.username is None else self.username

    def make_context(self) -> ssl.SSLContext:
        """Return a context that offers our key, or accepts those in the file."""
        context = base_context(self.endpoint)
        set_callback = getattr(context, f"set_psk_{self.endpoint}_callback", None)
        if set_callback is None:
            raise CommandError(
                f"TLS credentials '{self.id}' cannot be used: pre-shared keys need Python 3.13 or newer, "
                f"this is {platform.python_version()}"
            )
        # TLS 1.2, as the ssl documentation does it: there the suite itself says that keys are used.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE-PSK:DHE-PSK:PSK:!aNULL:!eNULL")
        path = self.required_file("keys.psk")
        if self.endpoint == "server":
            set_callback(lambda identity: _server_key(path, identity or ""))
        else:
            name, key = self._name, self._key or client_key(path, self._name)
            set_callback(lambda _hint: (name, _plain(key)))
        return context

    def forget(self) -> None:
        """Drop the context and the key."""
        super().forget()
        self._key = None


def _plain(key: SecretBytes) -> bytes:
    with key.view() as view:
        return bytes(view)


def _server_key(path: str, name: str) -> bytes:
    """Return the key of a client, nothing (which refuses it) if there is no good one."""
    try:
        return _plain(client_key(path, name))
    except CommandError as error:
        _log.info("TLS client refused: %s", error)
        return b""


def client_key(path: str, name: str) -> SecretBytes:
    """Return the key of `name`: that of the first line that begins with it. Raises CommandError."""
    contents = _read(path)
    try:
        prefix = name.encode() + b":"
        for line in contents.split(b"\n"):
            if line.startswith(prefix):
                return _decode(line[len(prefix) :])
    finally:
        contents[:] = bytes(len(contents))
    raise CommandError(f"Username {name} not found in PSK file {path}")


def _decode(digits: bytearray) -> SecretBytes:
    try:
        key = bytearray(binascii.unhexlify(digits))
    except ValueError as error:
        raise CommandError("Cannot set PSK client credentials: Error in parsing.") from error
    if not _MIN_KEY <= len(key) <= _MAX_KEY:
        raise CommandError("Cannot set PSK client credentials: The request is invalid.")
    return SecretBytes.take(key)


def _read(path: str) -> bytearray:
    try:
        with open(path, "rb") as file:
            contents = bytearray(file.read(_MAX_FILE + 1))
    except OSError as error:
        raise CommandError(f"Cannot read PSK file {path}: Error reading file “{path}”: {error.strerror}") from error
    if len(contents) > _MAX_FILE:
        raise CommandError(f"Cannot read PSK file {path}: File is larger than {_MAX_FILE} bytes")
    return contents
