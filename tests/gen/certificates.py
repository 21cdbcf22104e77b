"""Certificates with one thing wrong: a CA and what it signed, written as QEMU names the files."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
DAY = datetime.timedelta(days=1)
USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


@dataclass
class Spec:
    """What goes into one certificate; None leaves an extension out.

    days   start and end of validity, counted from now
    usage  names of key usages; purpose: OIDs of the extended key usage
    """

    name: str
    days: tuple[int, int] = (-1, 30)
    ca: bool | None = False
    usage: Sequence[str] | None = None
    usage_critical: bool = True
    purpose: Sequence[ObjectIdentifier] | None = None
    purpose_critical: bool = True
    key: Key = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    digest: hashes.HashAlgorithm = field(default_factory=hashes.SHA256)
    dns: str | None = "localhost"

    def subject(self) -> x509.Name:
        """Return the distinguished name."""
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])


def authority(**changes: object) -> Spec:
    """Return a sound CA."""
    values: dict[str, object] = {"name": "test CA", "ca": True, "usage": ("key_cert_sign", "crl_sign"), "dns": None}
    return Spec(**{**values, **changes})  # type: ignore[arg-type]


def sign(spec: Spec, issuer: Spec) -> x509.Certificate:
    """Return the certificate of `spec`, signed by `issuer`."""
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(spec.subject())
        .issuer_name(issuer.subject())
        .public_key(spec.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + spec.days[0] * DAY)
        .not_valid_after(now + spec.days[1] * DAY)
    )
    if spec.ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=spec.ca, path_length=None), critical=True)
    if spec.usage is not None:
        flags = {usage: usage in spec.usage for usage in USAGES}
        builder = builder.add_extension(x509.KeyUsage(**flags), critical=spec.usage_critical)
    if spec.purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(spec.purpose)), critical=spec.purpose_critical)
    if spec.dns is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(spec.dns)]), critical=False)
    return builder.sign(issuer.key, spec.digest)


def pem(certificate: x509.Certificate) -> bytes:
    """Return the certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: Key, password: bytes | None = None) -> bytes:
    """Return the key as PKCS#8 in PEM, encrypted if there is a password."""
    guard: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        guard = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, guard)


def directory(
    path: Path, leaf: Spec | None = None, ca: Spec | None = None, *, role: str = "server", password: bytes | None = None
) -> Path:
    """Write ca-cert.pem, ROLE-cert.pem and ROLE-key.pem below `path` and return it."""
    path.mkdir(parents=True, exist_ok=True)
    ca = ca or authority()
    leaf = leaf or Spec("localhost")
    (path / "ca-cert.pem").write_bytes(pem(sign(ca, ca)))
    (path / f"{role}-cert.pem").write_bytes(pem(sign(leaf, ca)))
    (path / f"{role}-key.pem").write_bytes(key_pem(leaf.key, password))
    return path
