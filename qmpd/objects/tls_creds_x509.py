"""tls-creds-x509: TLS with certificates.

Options: TlsCredsX509Properties (qapi/qom.json and what it includes). File names and texts as the
reference: ca-cert.pem, ca-crl.pem, server-cert.pem, server-key.pem, client-cert.pem,
client-key.pem, dh-params.pem.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class TlsCredsX509Options:
    """Members of TlsCredsX509Properties."""

    verify_peer: bool = True
    dir: str | None = None
    endpoint: str = "client"
    priority: str | None = None
    sanity_check: bool = True
    passwordid: str | None = None


@dataclass(frozen=True, slots=True)
class _Files:
    """Paths of what is in the directory."""

    ca: str
    crl: str | None
    cert: str | None
    key: str | None
    dh: str | None


def _set_sanity_check(self: TlsCredsX509, value: Any) -> None:
    self.sanity_check = values.boolean("sanity-check", value)
    self.forget()


def _set_passwordid(self: TlsCredsX509, value: Any) -> None:
    self.passwordid = values.string("passwordid", value)
    self.forget()


@qom_type("tls-creds-x509", schema="TlsCredsX509Properties", options=TlsCredsX509Options)
class TlsCredsX509(TlsCreds):
    """Certificates of one side, and the CA that the other side is checked against."""

    qom_type = "tls-creds-x509"
    abstract = False
    qom_properties = (
        Property("sanity-check", "bool", get=lambda self: self.sanity_check, set=_set_sanity_check),
        Property("passwordid", "string", get=lambda self: self.passwordid or "", set=_set_passwordid),
    )

    def __init__(self, options: TlsCredsX509Options) -> None:
        super().__init__(options.verify_peer, options.dir, options.endpoint, options.priority)
        self.sanity_check, self.passwordid = options.sanity_check, options.passwordid
        self._objects: ObjectTree | None = None

    def complete(self, objects: ObjectTree) -> None:
        """Check the certificates and load them."""
        self._objects = objects
        self._contexts[True] = self.make_context()

    def _files(self) -> _Files:
        ca = self.required_file("ca-cert.pem")
        if self.endpoint == "server":
            return _Files(
                ca,
                self.file("ca-crl.pem", required=False),
                self.required_file("server-cert.pem"),
                self.required_file("server-key.pem"),
                self.file("dh-params.pem", required=False),
            )
        cert, key = (self.file(f"client-{what}.pem", required=False) for what in ("cert", "key"))
        return _Files(ca, None, cert, key, None)

    def make_context(self) -> ssl.SSLContext:
        """Return a context with our certificate, the CA and the CRL."""
        files = self._files()
        if self.sanity_check:
            from qmpd.objects._x509 import check_all, load_authorities, load_own  # a tenth of the start's time

            own = None if files.cert is None else load_own(files.cert, self.endpoint)
            check_all(own, load_authorities(files.ca))
        context = base_context(self.endpoint)
        try:
            context.load_verify_locations(cafile=files.ca)
        except (OSError, ValueError) as error:
            _refuse_unless_empty(files.ca, error)
        if files.cert is not None and files.key is not None:
            self._load_pair(context, files.cert, files.key)
        if files.crl is not None:
            _load_crl(context, files.crl)
        if files.dh is not None:
            load_dh_params(context, files.dh)
        if self.verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
            context.check_hostname = self.endpoint == "client"
        return context

    def _load_pair(self, context: ssl.SSLContext, cert: str, key: str) -> None:
        password = SecretBytes(b"")
        if self.passwordid is not None:
            assert self._objects is not None
            password = self._objects.passphrase(self.passwordid)
        with password, password.view() as view:
            try:
                # With a callback OpenSSL never asks on the terminal.
                context.load_cert_chain(cert, key, password=lambda: bytes(view))
            except (OSError, ValueError) as error:
                reason = _pair_fault(cert, key, error)
                raise CommandError(f"Cannot load certificate '{cert}' & key '{key}': {reason}") from error


def _refuse_unless_empty(path: str, error: OSError | ValueError) -> None:
    """Refuse a CA file that is damaged; one that holds no certificate at all just trusts nobody."""
    if b"-----BEGIN " in _peek(path):
        raise CommandError(f"Cannot load CA certificate '{path}': ASN1 parser: Error in TAG.") from error


def _load_crl(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ValueError) as error:
        raise CommandError(f"Cannot load CRL '{path}': Base64 decoding error.") from error
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _pair_fault(cert: str, key: str, error: OSError | ValueError) -> str:
    """Return the reference's words for a certificate and key that OpenSSL refuses."""
    reason = getattr(error, "reason", None) or ""
    if reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        return "The certificate and the given key do not match."
    try:
        key_text, cert_text = _peek(key), _peek(cert)
    except OSError:
        return "Error while reading file."
    if b"PRIVATE KEY-----" not in key_text:
        return "The requested data were not available."
    if b"-----BEGIN " not in cert_text:
        return "Base64 decoding error."
    if b"ENCRYPTED" in key_text:
        return "Decryption has failed."
    return str(reason) if "KEY" in reason else "ASN1 parser: Error in TAG."


def _peek(path: str) -> bytes:
    """Return the beginning of a file, enough to see what it is."""
    with open(path, "rb") as file:
        return file.read(1 << 16)
