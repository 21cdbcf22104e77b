"""Which format an image has, by its first bytes.

Only used where nobody said the format: a guest can write any header into a raw disk, so whoever
can, names the format instead (CVE-2008-2004).
"""

from __future__ import annotations

PROBE_BYTES = 2048
"""How much of the start is looked at (BLOCK_PROBE_BUF_SIZE)."""

_QCOW2 = b"QFI\xfb"
_LUKS = (b"LUKS\xba\xbe\0\1", b"LUKS\xba\xbe\0\2")


def probe(head: bytes) -> str:
    """Return "qcow2", "luks" or, for everything else, "raw"."""
    if head.startswith(_QCOW2) and int.from_bytes(head[4:8], "big") >= 2:
        return "qcow2"
    return "luks" if head.startswith(_LUKS) else "raw"
