"""The name by which authorization objects know a TLS client."""

from __future__ import annotations

import ssl

_SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
    "emailAddress": "EMAIL",
    "surname": "surName",
}


def peer_name(peer: ssl.SSLSocket) -> str | None:
    """Return the distinguished name of the client's certificate, None if it showed none.

    Written as QEMU's TLS library does it: in the order of the certificate, "C=GB,O=group,CN=host".
    """
    certificate = peer.getpeercert()
    if not certificate:
        return None
    subject = certificate.get("subject", ())
    assert isinstance(subject, tuple)
    parts = [(str(key), str(value)) for rdn in subject for key, value in rdn]  # type: ignore[str-unpack]
    return ",".join(f"{_SHORT.get(key, key)}={_escaped(value)}" for key, value in parts)


def _escaped(value: str) -> str:
    """Escape what RFC 4514, section 2.4 demands."""
    text = "".join(f"\\{char}" if char in ',+"\\<>;' else char for char in value)
    if text.startswith(("#", " ")):
        text = "\\" + text
    if text.endswith(" ") and len(text) > 1:
        text = text[:-1] + "\\ "
    return text
