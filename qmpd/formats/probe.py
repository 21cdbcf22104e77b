"""Which format an image has, by its first bytes.

Only used where nobody said the format: a guest can write any header into a raw disk, so whoever
can, names the format instead (CVE-2008-2004).
"""

from __future__ import annotations

PROBE_BYTES = 2048
"""How much of the start is looked at (BLOCK_PROBE_BUF_SIZE)."""

_MAGICS = (
    (b"QFI\xfb", "qcow2"),
    (b"LUKS\xba\xbe", "luks"),
)


def probe(head: bytes) -> str:
    """Return "qcow2", "luks" or, for everything else, "raw"."""
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    return "raw"
