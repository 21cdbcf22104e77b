"""Checks on the certificates of a credentials directory, before a session would fail over them.

The order of checks and the texts are those of QEMU's tls-creds-x509: our own certificate first,
then every CA, then the one against the others. Only the first certificate of our own file counts.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from qmpd.errors import CommandError

MAX_FILE = 4 << 20
"""Bytes of a certificate file at most; a system's whole CA bundle has a quarter of a megabyte."""

_INSECURE = (hashes.MD5, hashes.SHA1)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A parsed certificate with what error texts call it.

    role  "CA", "server" or "client"        path  the file it came from
    """

    parsed: x509.Certificate
    role: str
    path: str


def read_file(path: str) -> bytes:
    """Return the contents of a certificate file. Raises CommandError."""
    try:
        with open(path, "rb") as file:
            contents = file.read(MAX_FILE + 1)
    except OSError as error:
        raise CommandError(f"Cannot load CA cert list {path}: Error reading file “{path}”: {error.strerror}") from error
    if len(contents) > MAX_FILE:
        raise CommandError(f"Cannot load CA cert list {path}: File is larger than {MAX_FILE} bytes")
    return contents


def pem_fault(contents: bytes, what: bytes = b"-----BEGIN ") -> str:
    """Return the reference's words for PEM that cannot be parsed."""
    return "ASN1 parser: Error in TAG." if what in contents else "Base64 unexpected header error."


def load_own(path: str, role: str) -> Certificate:
    """Return the first certificate in the file. Raises CommandError."""
    contents = read_file(path)
    try:
        return Certificate(x509.load_pem_x509_certificate(contents), role, path)
    except ValueError as error:
        raise CommandError(f"Unable to import {role} certificate {path}: {pem_fault(contents)}") from error


def load_authorities(path: str) -> list[Certificate]:
    """Return all certificates in the file. Raises CommandError."""
    contents = read_file(path)
    try:
        return [Certificate(one, "CA", path) for one in x509.load_pem_x509_certificates(contents)]
    except ValueError as error:
        raise CommandError(f"Unable to import CA certificate list {path}") from error


def check_all(own: Certificate | None, authorities: Sequence[Certificate]) -> None:
    """Raise CommandError for the first thing wrong with the certificates."""
    if own is not None:
        check_one(own)
    for authority in authorities:
        check_one(authority)
    if own is not None and authorities:
        check_issuer(own, authorities)


def check_one(certificate: Certificate) -> None:
    """Check validity, basic constraints, key usage and, unless it is a CA, purpose."""
    _check_times(certificate)
    try:
        extensions = certificate.parsed.extensions
    except (ValueError, x509.DuplicateExtension) as error:
        raise CommandError(
            f"Unable to query certificate {certificate.path} basic constraints: ASN1 parser: Error in DER parsing."
        ) from error
    _check_constraints(certificate, extensions)
    _check_usage(certificate, extensions)
    if certificate.role != "CA":
        _check_purpose(certificate, extensions)


def _check_times(certificate: Certificate) -> None:
    now = dt.datetime.now(dt.UTC)
    if certificate.parsed.not_valid_after_utc < now:
        raise CommandError(f"The {certificate.role} certificate {certificate.path} has expired")
    if certificate.parsed.not_valid_before_utc > now:
        raise CommandError(f"The {certificate.role} certificate {certificate.path} is not yet active")


def _check_constraints(certificate: Certificate, extensions: x509.Extensions) -> None:
    path, role = certificate.path, certificate.role
    try:
        is_ca = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound as error:
        if role == "CA":
            raise CommandError(f"The certificate {path} is missing basic constraints for a CA") from error
        return
    if is_ca and role != "CA":
        raise CommandError(f"The certificate {path} basic constraints show a CA, but we need one for a {role}")
    if not is_ca and role == "CA":
        raise CommandError(f"The certificate {path} basic constraints do not show a CA")


def _check_usage(certificate: Certificate, extensions: x509.Extensions) -> None:
    """A usage that is not marked critical forbids nothing here."""
    try:
        extension = extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound:
        return
    if not extension.critical:
        return
    usage = extension.value
    needed = [("certificate signing", usage.key_cert_sign)]
    if certificate.role != "CA":
        needed = [("digital signature", usage.digital_signature), ("key encipherment", usage.key_encipherment)]
    for purpose, permitted in needed:
        if not permitted:
            raise CommandError(f"Certificate {certificate.path} usage does not permit {purpose}")


def _check_purpose(certificate: Certificate, extensions: x509.Extensions) -> None:
    try:
        extension = extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return
    needed = ExtendedKeyUsageOID.SERVER_AUTH if certificate.role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    allowed = {needed, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(extension.value)
    if extension.critical and not allowed:
        raise CommandError(f"Certificate {certificate.path} purpose does not allow use with a TLS {certificate.role}")


def check_issuer(own: Certificate, authorities: Sequence[Certificate]) -> None:
    """Check that one of the authorities issued our certificate. Raises CommandError."""
    reason = _distrust(own.parsed, [one.parsed for one in authorities])
    if reason is not None:
        place = f"Our own certificate {own.path} failed validation against {authorities[0].path}"
        raise CommandError(f"{place}: {reason}")


def _distrust(own: x509.Certificate, authorities: Sequence[x509.Certificate]) -> str | None:
    issuers = [one for one in authorities if one.subject == own.issuer]
    if not issuers:
        return "The certificate hasn't got a known issuer"
    signers = [one for one in issuers if _signed_by(own, one) and _may_sign(one)]
    if not signers:
        return "The certificate is not trusted"
    if isinstance(own.signature_hash_algorithm, _INSECURE):
        return "The certificate uses an insecure algorithm"
    return None


def _signed_by(own: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        own.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _may_sign(issuer: x509.Certificate) -> bool:
    try:
        return issuer.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True
