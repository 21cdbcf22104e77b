"""Certificates with one thing wrong: a CA and what it signed, written as QEMU names the files."""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
DAY = dt.timedelta(days=1)
USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip

MODP_2048 = int(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD"
    "EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED"
    "EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F"
    "83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B"
    "E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510"
    "15728E5A8AACAA68FFFFFFFFFFFFFFFF",
    16,
)
"""The 2048-bit group of RFC 3526, section 3; its generator is 2."""


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
    now = dt.datetime.now(dt.UTC)
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
    return builder.sign(issuer.key, hashes.SHA256())


def pem(certificate: x509.Certificate) -> bytes:
    """Return the certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def dh_pem() -> bytes:
    """Return Diffie-Hellman parameters as PEM: without a file of them QEMU takes seconds to make its own."""
    prime = MODP_2048.to_bytes(257, "big")
    numbers = b"\x02\x82\x01\x01" + prime + b"\x02\x01\x02"  # two DER integers, of 257 bytes and of one
    der = b"\x30\x82" + len(numbers).to_bytes(2, "big") + numbers
    return b"-----BEGIN DH PARAMETERS-----\n" + base64.encodebytes(der) + b"-----END DH PARAMETERS-----\n"


def key_pem(key: Key, password: bytes | None = None) -> bytes:
    """Return the key as PKCS#8 in PEM, encrypted if there is a password."""
    guard: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        guard = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, guard)


def directory(
    path: Path, leaf: Spec | None = None, ca: Spec | None = None, *, role: str = "server", password: bytes | None = None
) -> Path:
    """Write ca-cert.pem, ROLE-cert.pem, ROLE-key.pem and dh-params.pem below `path` and return it."""
    path.mkdir(parents=True, exist_ok=True)
    ca = ca or authority()
    leaf = leaf or Spec("localhost")
    (path / "ca-cert.pem").write_bytes(pem(sign(ca, ca)))
    (path / f"{role}-cert.pem").write_bytes(pem(sign(leaf, ca)))
    (path / f"{role}-key.pem").write_bytes(key_pem(leaf.key, password))
    (path / "dh-params.pem").write_bytes(dh_pem())
    return path
