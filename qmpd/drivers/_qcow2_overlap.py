"""Where the metadata of a qcow2 image lies, so that no write destroys it.

An image whose refcounts are wrong offers clusters that are in use; before anything is written,
its place is compared with that of all metadata the options name.
"""

from __future__ import annotations

from collections.abc import Iterable

from qmpd.drivers._qcow2_options import OVERLAP_KINDS

_TEXT = {
    "main-header": "qcow2_header",
    "active-l1": "active L1 table",
    "active-l2": "active L2 table",
    "refcount-table": "refcount table",
    "refcount-block": "refcount block",
    "snapshot-table": "snapshot table",
    "inactive-l1": "inactive L1 table",
    "inactive-l2": "inactive L2 table",
    "bitmap-directory": "bitmap directory",
}
assert tuple(_TEXT) == OVERLAP_KINDS

_PROTECTED = "encryption header"
"""What is checked whatever the options say: without it all data is lost."""


class Overlaps:
    """The places of metadata by kind (the names of the option).

    areas   kind -> (offset, length) in bytes       tables   kind -> numbers of host clusters
    """

    __slots__ = ("_bits", "_kinds", "_protected", "_sets", "_spans", "areas", "tables")

    def __init__(self, kinds: Iterable[str], cluster_bits: int) -> None:
        wanted = frozenset(kinds)
        self._kinds = tuple(kind for kind in OVERLAP_KINDS if kind in wanted)
        self._bits = cluster_bits
        self.areas: dict[str, list[tuple[int, int]]] = {"main-header": [(0, 1 << cluster_bits)]}
        self.tables: dict[str, set[int]] = {}
        self._protected: tuple[int, int] | None = None
        self._spans: list[tuple[int, int]] = []
        self._sets: list[set[int]] = []
        self._collect()

    def _collect(self) -> None:
        """Gather what `clear` looks at: areas in whole clusters, and the sets of tables."""
        self._spans = [
            (place >> self._bits, place + size - 1 >> self._bits)
            for kind in self._kinds
            for place, size in self.areas.get(kind, ())
        ]
        if self._protected is not None:
            place, size = self._protected
            self._spans.append((place >> self._bits, place + size - 1 >> self._bits))
        self._sets = [self.tables[kind] for kind in self._kinds if kind in self.tables]

    def clear(self, offset: int, length: int) -> bool:
        """Say whether no metadata of any kind lies in the clusters of [offset, offset + length)."""
        first = offset >> self._bits
        last = offset + length - 1 >> self._bits
        for low, high in self._spans:
            if low <= last and first <= high:
                return False
        if first == last:
            return not any(first in tables for tables in self._sets)
        wide = last - first
        for tables in self._sets:
            if wide < len(tables):
                if not tables.isdisjoint(range(first, last + 1)):
                    return False
            elif any(first <= number <= last for number in tables):
                return False
        return True

    def protect(self, offset: int, length: int) -> None:
        """State where the header of the encryption lies, if `length` is not 0."""
        self._protected = (offset, length) if length else None
        self._collect()

    def wants(self, kind: str) -> bool:
        """Say whether `kind` is checked."""
        return kind in self._kinds

    def set_area(self, kind: str, *areas: tuple[int, int]) -> None:
        """State where `kind` lies now: (offset, length) in bytes."""
        self.areas[kind] = [(offset, length) for offset, length in areas if length]
        self._collect()

    def set_tables(self, kind: str, offsets: Iterable[int]) -> None:
        """State the host offsets of all tables of `kind`, one cluster each."""
        if kind in self._kinds:
            self.tables[kind] = {offset >> self._bits for offset in offsets}
            self._collect()

    def add_table(self, kind: str, offset: int) -> None:
        """Note a new table of `kind`."""
        if kind in self.tables:
            self.tables[kind].add(offset >> self._bits)

    def remove_table(self, kind: str, offset: int) -> None:
        """Note that a table of `kind` is gone."""
        if kind in self.tables:
            self.tables[kind].discard(offset >> self._bits)

    def find(self, offset: int, length: int, ignore: str = "") -> str | None:
        """Return the reference's name of what [offset, offset + length) would destroy, or None."""
        first = offset >> self._bits
        last = offset + length - 1 >> self._bits
        start, end = first << self._bits, last + 1 << self._bits
        for kind in self._kinds:
            if kind == ignore:
                continue
            tables = self.tables.get(kind)
            if tables:
                if first == last:
                    hit = first in tables
                elif last - first < len(tables):
                    hit = any(number in tables for number in range(first, last + 1))
                else:
                    hit = any(first <= number <= last for number in tables)
                if hit:
                    return _TEXT[kind]
            for place, size in self.areas.get(kind, ()):
                if place < end and start < place + size:
                    return _TEXT[kind]
        if self._protected is not None:
            place, size = self._protected
            if place < end and start < place + size:
                return _PROTECTED
        return None
