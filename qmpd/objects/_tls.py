"""What the tls-creds types share: the directory, the endpoint and what was made of them."""

from __future__ import annotations

import os
import ssl
from typing import Any, ClassVar

from qmpd.errors import CommandError
from qmpd.qom import values
from qmpd.qom.object import Property, QomObject

ENDPOINTS = ("client", "server")

_PRIORITIES = (None, "NORMAL", "@SYSTEM")
"""GnuTLS priority strings that mean the library's own defaults."""


def _set_endpoint(self: TlsCreds, value: Any) -> None:
    self.endpoint = values.enum("endpoint", value, ENDPOINTS)
    self.forget()


def _set_dir(self: TlsCreds, value: Any) -> None:
    self.dir = values.string("dir", value)
    self.forget()


def _set_priority(self: TlsCreds, value: Any) -> None:
    self.priority = values.string("priority", value)
    self.forget()


def _set_verify_peer(self: TlsCreds, value: Any) -> None:
    self.verify_peer = values.boolean("verify-peer", value)
    self.forget()


class TlsCreds(QomObject):
    """Credentials of one side of a TLS connection (TlsCredentials).

    They are checked and loaded on creation; a property that is set later counts from the next
    connection on.
    """

    qom_type = "tls-creds"
    abstract = True
    interfaces = ("user-creatable",)
    qom_properties: ClassVar[tuple[Property, ...]] = (
        Property("endpoint", "QCryptoTLSCredsEndpoint", get=lambda self: self.endpoint, set=_set_endpoint),
        Property("dir", "string", get=lambda self: self.dir or "", set=_set_dir),
        Property("verify-peer", "bool", get=lambda self: self.verify_peer, set=_set_verify_peer),
        Property("priority", "string", get=lambda self: self.priority or "", set=_set_priority),
    )

    def __init__(self, verify_peer: bool, directory: str | None, endpoint: str, priority: str | None) -> None:
        super().__init__()
        self.verify_peer, self.dir, self.endpoint, self.priority = verify_peer, directory, endpoint, priority
        self._contexts: dict[bool, ssl.SSLContext] = {}

    def make_context(self) -> ssl.SSLContext:
        """Return a new context for these credentials. Raises CommandError."""
        raise NotImplementedError

    def context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """Return the context, made anew after a property has changed (TlsCredentials)."""
        if self.priority not in _PRIORITIES:
            raise CommandError(
                f"Unable to set TLS session priority {self.priority}: GnuTLS priority strings are not supported"
            )
        context = self._contexts.get(check_hostname)
        if context is None:
            context = self._contexts[check_hostname] = self.make_context()
            context.check_hostname = context.check_hostname and check_hostname
        return context

    def forget(self) -> None:
        """Drop the contexts."""
        self._contexts.clear()

    def delete(self) -> None:
        """Drop the context, with the key in it, once the last connection is through."""
        self.forget()

    def file(self, name: str, *, required: bool) -> str | None:
        """Return the path of a file in the directory, None if it is not there and need not be.

        Raises CommandError.
        """
        if self.dir is None:
            if required:
                raise CommandError("Missing 'dir' property value")
            return None
        path = f"{self.dir}/{name}"
        try:
            os.stat(path)
        except (OSError, ValueError) as error:
            if not required and isinstance(error, FileNotFoundError):
                return None
            reason = error.strerror if isinstance(error, OSError) else "No such file or directory"
            raise CommandError(f"Unable to access credentials {path}: {reason}") from error
        return path

    def required_file(self, name: str) -> str:
        """Return the path of a file that has to be there. Raises CommandError."""
        path = self.file(name, required=True)
        assert path is not None
        return path


def base_context(endpoint: str) -> ssl.SSLContext:
    """Return a context for one side, peer verification still off."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if endpoint == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def load_dh_params(context: ssl.SSLContext, path: str) -> None:
    """Use the Diffie-Hellman parameters in a file. Raises CommandError."""
    try:
        context.load_dh_params(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"Unable to load DH parameters from {path}: Base64 unexpected header error.") from error
