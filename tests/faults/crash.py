"""Crash states: what a disk may hold when the machine stops at some moment.

A write that a completed flush covers is there. Any other that had begun may be there, in part or
not at all, sector by sector.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.gen.qcow2 import Recorder

SECTOR = 512


@dataclass
class Write:
    """A write to the file; `begun` and `done` are moments, done None if it never ended."""

    offset: int
    data: bytes
    begun: int
    done: int | None = None


@dataclass
class GuestOp:
    """A change the guest asked for: bytes to be found at `offset`; `done` None if not answered."""

    offset: int
    data: bytes
    begun: int
    done: int | None = None


@dataclass
class Journal(Recorder):
    """Everything that happened, in moments counted from 0.

    flushes, guest_flushes   (begun, done) of completed ones, in order of completion
    """

    start: bytes
    writes: list[Write] = field(default_factory=list)
    flushes: list[tuple[int, int]] = field(default_factory=list)
    guest: list[GuestOp] = field(default_factory=list)
    guest_flushes: list[tuple[int, int]] = field(default_factory=list)
    now: int = 0
    _begun: dict[int, int] = field(default_factory=dict)

    def tick(self) -> int:
        self.now += 1
        return self.now

    def begin(self, offset: int, data: bytes) -> int:
        self.writes.append(Write(offset, data, self.tick()))
        return len(self.writes) - 1

    def end(self, number: int) -> None:
        self.writes[number].done = self.tick()

    def begin_flush(self) -> int:
        return self.tick()

    def end_flush(self, number: int) -> None:
        self.flushes.append((number, self.tick()))

    # --- states ---------------------------------------------------------------------------------

    def moments(self, rng: random.Random, count: int) -> Iterator[int]:
        """Yield moments of a crash, more of them just before and after a flush ended."""
        ends = [done for _, done in self.flushes] or [self.now]
        for number in range(count):
            if number % 3 == 0:
                yield rng.randint(1, self.now)
            else:
                yield max(1, min(self.now, rng.choice(ends) + rng.choice((-1, 0, 1, 2, 5, 20))))

    def state(self, moment: int, rng: random.Random) -> bytes:
        """Return what the file may hold after a crash at `moment`."""
        covered = max((begun for begun, done in self.flushes if done <= moment), default=0)
        content = bytearray(self.start)
        loose: list[Write] = []
        for write in self.writes:
            if write.begun > moment:
                continue
            if write.done is not None and write.done <= covered:
                _put(content, write.offset, write.data)
            else:
                loose.append(write)
        style = rng.randrange(4)
        chosen = loose if style == 0 else [one for one in loose if rng.random() < (0.5, 0.9, 0.15)[style - 1]]
        rng.shuffle(chosen)
        for write in chosen:
            torn = rng.random() < 0.3
            at = 0
            while at < len(write.data):
                step = min(SECTOR - (write.offset + at) % SECTOR, len(write.data) - at)
                if not torn or rng.random() < 0.5:
                    _put(content, write.offset + at, write.data[at : at + step])
                at += step
        return bytes(content)

    def check(self, moment: int, before: bytes, found: bytes) -> None:
        """Check what the guest's disk holds after a crash at `moment`; `before` is what it held at first."""
        covered = max((begun for begun, done in self.guest_flushes if done <= moment), default=0)
        sure = bytearray(before)
        loose: list[GuestOp] = []
        for op in self.guest:
            if op.begun > moment:
                continue
            if op.done is not None and op.done <= covered:
                sure[op.offset : op.offset + len(op.data)] = op.data
        for op in self.guest:
            if op.begun <= moment and not (op.done is not None and op.done <= covered):
                loose.append(op)
        if found == sure:
            return
        wrong = [at for at in range(len(sure)) if found[at] != sure[at]]
        for at in wrong:
            allowed = {op.data[at - op.offset] for op in loose if op.offset <= at < op.offset + len(op.data)}
            assert found[at] in allowed, (
                f"crash at {moment} (flushed to {covered}): byte {at} is {found[at]}, flushed was {sure[at]},"
                f" later writes {sorted(allowed)}"
            )


def _put(content: bytearray, offset: int, data: bytes) -> None:
    end = offset + len(data)
    if end > len(content):
        content.extend(bytes(-(-end // SECTOR) * SECTOR - len(content)))
    content[offset:end] = data
