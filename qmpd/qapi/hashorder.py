"""Which of several unexpected members is the one an error names.

The reference keeps the members not yet visited in a glib hash table and names the first it meets
there. Nobody writes such requests on purpose, but recorded conversations hold a few, and the answer
is a pure function of the names: glib's string hash, modulo a prime, quadratic probing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_BUCKETS = 512
"""Chains of a QDict, which is walked to fill the table."""
_PRIMES = (1, 2, 3, 7, 13, 31, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749)
"""The modulus glib uses for a table of 1 << index slots."""
_MINIMUM_SHIFT = 3
_MANY = 4096
"""With more members than this the order is not reconstructed: the first as sent is named."""


def first_left(names: Sequence[str], known: Sequence[str]) -> str:
    """Return the member of `names` that is reported when those in `known` have been taken out.

    names  all members, in the order sent           known  those visited, in the order of visits
    """
    left = [name for name in names if name not in known]
    if len(left) == 1 or len(names) > _MANY:
        return left[0]
    table = HashTable()
    for name in dict_order(names):
        table.insert(name)
    for name in known:
        table.remove(name)
    return table.names()[0]


class HashTable:
    """An open-addressed glib hash table of strings; a removed entry leaves ""."""

    def __init__(self) -> None:
        self.shift = _MINIMUM_SHIFT
        self.slots: list[str | None] = [None] * (1 << self.shift)
        self.count = 0

    def _home(self, name: str) -> int:
        return (_string_hash(name) * 11 & 0xFFFFFFFF) % _PRIMES[self.shift]

    def _find(self, name: str) -> int:
        """Return the slot of `name`, or the one to put it in."""
        mask, index, step = len(self.slots) - 1, self._home(name), 0
        tombstone = -1
        while (held := self.slots[index]) is not None:
            if held == name:
                return index
            if held == "" and tombstone < 0:
                tombstone = index
            step += 1
            index = (index + step) & mask
        return index if tombstone < 0 else tombstone

    def names(self) -> list[str]:
        """Return what is in the table, in the order of a walk."""
        return [name for name in self.slots if name]

    def insert(self, name: str) -> None:
        """Put a name in that is not there."""
        self.slots[self._find(name)] = name
        self.count += 1
        self._maybe_resize()

    def remove(self, name: str) -> None:
        """Take a name out, if it is there."""
        index = self._find(name)
        if self.slots[index] == name:
            self.slots[index] = ""
            self.count -= 1
            self._maybe_resize()

    def _maybe_resize(self) -> None:
        size, occupied = len(self.slots), sum(held is not None for held in self.slots)
        if (size > max(self.count * 4, 1 << _MINIMUM_SHIFT)) or size <= occupied + occupied // 16:
            self._resize(max(int(self.count * 1.333).bit_length(), _MINIMUM_SHIFT))

    def _resize(self, shift: int) -> None:
        """Move every entry to its place in a table of 1 << shift slots, in place: one put where
        another still stands evicts it, and that one is moved next.
        """
        self.shift, old_size, size = shift, len(self.slots), 1 << shift
        slots = self.slots + [None] * (size - old_size)
        settled: set[int] = set()
        for start in range(old_size):
            if start in settled:
                continue
            moving, slots[start] = slots[start], None
            while moving:
                index, step = self._home(moving), 0
                while index in settled:
                    step += 1
                    index = (index + step) & (size - 1)
                settled.add(index)
                moving, slots[index] = slots[index], moving
        self.slots = slots[:size]


def _string_hash(text: str) -> int:
    """Return g_str_hash: h * 33 + c from 5381, c being a signed char."""
    value = 5381
    for byte in text.encode("utf-8", "surrogatepass"):
        value = (value * 33 + (byte if byte < 128 else byte - 256)) & 0xFFFFFFFF
    return value


def dict_order(names: Iterable[str]) -> list[str]:
    """Return the names as a walk of a QDict meets them: by bucket, the newest of a bucket first."""
    return [name for _, _, name in sorted((_bucket(name), -at, name) for at, name in enumerate(names))]


def _bucket(text: str) -> int:
    """Return the bucket of a name: the hash of Samba's tdb, modulo the number of buckets."""
    data = text.encode("utf-8", "surrogatepass")
    value = (0x238F13AF * len(data)) & 0xFFFFFFFF
    for index, byte in enumerate(data):
        value = (value + (byte << (index * 5 % 24))) & 0xFFFFFFFF
    return ((1103515243 * value + 12345) & 0xFFFFFFFF) % _BUCKETS
