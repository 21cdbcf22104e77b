"""Random work on a disk, many requests at once, against a bytearray.

Requests of one group run at the same time and may overlap, so after the group each byte may be
what any of them left there; the model then takes over what was found. A byte that one request
alone wrote has exactly one right value.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.child import Child

PERIOD = 65521
_BASE = bytes((index * 167 + (index >> 8) * 13 + 7) % 251 + 1 for index in range(PERIOD))


@dataclass(frozen=True, slots=True)
class Op:
    """One request: kind is read, write, zero, unmap (a zero write that may), discard or flush."""

    kind: str
    offset: int = 0
    length: int = 0
    seed: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length

    def data(self, start: int, end: int) -> bytes:
        """Return what this request leaves at [start, end): bytes that tell their place."""
        if self.kind != "write":
            return bytes(end - start)
        shift = (self.seed * 7919 + start) % PERIOD
        text = _BASE[shift:] + _BASE * ((end - start) // PERIOD + 1)
        return text[: end - start]


KINDS = ("read", "read", "write", "write", "write", "zero", "unmap", "discard", "flush")


@st.composite
def ops(draw: st.DrawFn, size: int, unit: int) -> Op:
    """Draw a request within `size` bytes; sizes and offsets like to lie at multiples of `unit`."""
    kind = draw(st.sampled_from(KINDS))
    if kind == "flush":
        return Op(kind)
    offset = draw(st.integers(0, size - 1))
    length = draw(st.integers(1, min(size, 3 * unit)))
    shape = draw(st.integers(0, 3))
    if shape & 1:
        offset = offset // unit * unit
    if shape & 2:
        length = -(-length // unit) * unit
    return Op(kind, offset, min(length, size - offset), draw(st.integers(0, 255)))


def groups(size: int, unit: int, *, most: int = 32, count: int = 5) -> st.SearchStrategy[list[list[Op]]]:
    """Return a strategy for groups of requests that run at once."""
    return st.lists(st.lists(ops(size, unit), min_size=1, max_size=most), min_size=1, max_size=count)


class Disk:
    """A disk under test and what it must hold.

    loose   a discarded range may hold anything (a filter encrypts what is below)
    """

    def __init__(self, disk: Child, content: bytes, *, loose: bool = False) -> None:
        self.disk, self.model, self.loose = disk, bytearray(content), loose

    async def run(self, group: Sequence[Op]) -> None:
        """Run the requests of a group at once and check what they read and left."""
        before = bytes(self.model)
        found = await asyncio.gather(*(self._issue(op) for op in group))
        changes = [op for op in group if op.kind not in ("read", "flush")]
        for op, data in zip(group, found, strict=True):
            if data is not None:
                self._check(before, changes, op.offset, data, f"{op} read in {group}")
        touched = sorted({(op.offset, op.end) for op in changes})
        for start, end in _merged(touched):
            data = bytes(await self.disk.pread(start, end - start))
            self._check(before, changes, start, data, f"after {group}", final=True)
            self.model[start:end] = data

    async def _issue(self, op: Op) -> bytes | None:
        if op.kind == "read":
            return bytes(await self.disk.pread(op.offset, op.length))
        if op.kind == "write":
            batch = Batch.single(op.offset, memoryview(op.data(op.offset, op.end)))
            await self.disk.pwritev(batch)
            batch.raise_first()
        elif op.kind == "zero":
            await self.disk.pwrite_zeroes(op.offset, op.length)
        elif op.kind == "unmap":
            await self.disk.pwrite_zeroes(op.offset, op.length, WriteFlags.MAY_UNMAP)
        elif op.kind == "discard":
            await self.disk.pdiscard(op.offset, op.length)
        else:
            await self.disk.flush()
        return None

    def _check(
        self, before: bytes, changes: list[Op], start: int, data: bytes, what: str, *, final: bool = False
    ) -> None:
        """Check bytes from `start` on, piece by piece between the borders of the requests."""
        end = start + len(data)
        borders = {start, end}
        for op in changes:
            borders.update(at for at in (op.offset, op.end) if start < at < end)
        cuts = sorted(borders)
        for low, high in itertools.pairwise(cuts):
            over = [op for op in changes if op.offset < high and low < op.end]
            writers = [op for op in over if op.kind != "discard"]
            discards = [op for op in over if op.kind == "discard"]
            if self.loose and discards:
                continue
            allowed = [op.data(low, high) for op in writers]
            if not writers or not final:
                allowed.append(before[low:high])
            if discards:
                allowed.append(bytes(high - low))
            part = data[low - start : high - start]
            if part in allowed:
                continue
            for index, byte in enumerate(part):
                values = {one[index] for one in allowed}
                assert byte in values, f"byte {low + index} is {byte}, may be {sorted(values)}: {what}"


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
