"""BlockCrypto: the cipher of an open volume, applied to requests; shared by luks and qcow2.

The only holder of the volume key of an open node. What it does is synchronous and runs without the
interpreter's lock; who spreads large work over threads is `luks.work`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from qmpd.crypto.cipher import Buffer, CipherSpec, CompiledCipher, Span, extents_work, open_cipher
from qmpd.units import KiB

PIECE = 512 * KiB
"""Bytes that one thread takes at a time: smaller ones are lost in handing the interpreter's lock about."""

_SECTOR_SHIFT = 9


class Piece(Protocol):
    """What this module needs of a request."""

    offset: int
    view: memoryview
    error: int


class BlockCrypto:
    """Encrypts and decrypts requests whose offsets count from the start of the encrypted area.

    first   number of the area's first sector, in 512-byte units (a LUKS2 segment's IV tweak)
    """

    def __init__(self, spec: CipherSpec, key: Buffer, *, first: int = 0, engine: str | None = None) -> None:
        self.spec = spec
        self.sector_size = spec.sector_size
        self._first = first
        self.cipher = open_cipher(spec, key, engine=engine)

    @property
    def direct(self) -> bool:
        """True if `cipher` is one that `read_extents` takes."""
        return extents_work() and isinstance(self.cipher, CompiledCipher)

    @property
    def first(self) -> int:
        """Number of the area's first sector, in 512-byte units."""
        return self._first

    def in_place(self, requests: Iterable[Piece]) -> list[Span]:
        """Return the spans of all requests that have no error, each onto itself."""
        first = self._first
        return [(first + (r.offset >> _SECTOR_SHIFT), r.view, r.view) for r in requests if not r.error]

    def onto(self, requests: Iterable[Piece], target: memoryview) -> list[Span]:
        """Return the spans of all requests, their outcome laid out one after the other in `target`."""
        spans: list[Span] = []
        at = 0
        for request in requests:
            length = len(request.view)
            sector = self._first + (request.offset >> _SECTOR_SHIFT)
            spans.append((sector, request.view, target[at : at + length]))
            at += length
        return spans

    def decrypt(self, spans: Sequence[Span]) -> None:
        """Decrypt `spans` on this thread."""
        self.cipher.decrypt(spans)

    def encrypt(self, spans: Sequence[Span]) -> None:
        """Encrypt `spans` on this thread."""
        self.cipher.encrypt(spans)

    def wipe(self) -> None:
        """Destroy the key."""
        self.cipher.wipe()


def total(spans: Sequence[Span]) -> int:
    """Return the bytes in all spans."""
    return sum(len(target) for _, _, target in spans)


def pieces(spans: Sequence[Span], size: int = PIECE) -> list[list[Span]]:
    """Cut spans into groups of about `size` bytes (a multiple of every sector size), in order."""
    groups: list[list[Span]] = []
    current: list[Span] = []
    room = size
    for sector, source, target in spans:
        if len(target) <= room:
            current.append((sector, source, target))
            room -= len(target)
            if room:
                continue
            groups.append(current)
            current, room = [], size
            continue
        into = memoryview(target)
        start = into if source is target else memoryview(source)
        at = 0
        while at < len(into):
            end = min(at + room, len(into))
            cut = into[at:end]
            current.append((sector + (at >> _SECTOR_SHIFT), cut if start is into else start[at:end], cut))
            room -= end - at
            at = end
            if not room:
                groups.append(current)
                current, room = [], size
    if current:
        groups.append(current)
    return groups
