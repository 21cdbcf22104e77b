"""Copies from file to file in threads: what arrives, where, and what is left out."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.aio import copying
from qmpd.aio.copying import Part, copy
from qmpd.aio.disk import DiskFile
from tests.unit.aio.test_disk import open_disk

SIZE = 1 << 20
GRAINS = (512, 4096, 65536)


def test_the_loop_is_compiled_where_the_gate_runs() -> None:
    assert copying.available()


def disk_of(path: Path, data: bytes = b"") -> DiskFile:
    path.write_bytes(data)
    return open_disk(path)


@st.composite
def copies(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]], list[tuple[int, int, bool]]]:
    """Return grain, size of the disk, ranges (at, length) of it to copy, and (at, length, zero) of the source."""
    grain = draw(st.sampled_from(GRAINS))
    size = draw(st.integers(1, SIZE // 512)) * 512
    marks = sorted(set(draw(st.lists(st.integers(0, size), max_size=12))) | {0, size})
    ranges = [(at, end - at) for at, end in pairwise(marks) if draw(st.booleans())]
    source = draw(st.lists(st.tuples(st.integers(0, size), st.integers(1, 200_000), st.booleans()), max_size=8))
    return grain, size, ranges, source


def expected(shown: bytearray, ranges: list[tuple[int, int]], unit: int, grain: int) -> list[tuple[int, int]]:
    """Return the stretches (start, end) that are to be written of a disk that shows `shown` after the copy."""
    touched: list[tuple[int, int]] = []
    for at, length in ranges:
        start, end = at // unit * unit, -(-(at + length) // unit) * unit
        if touched and touched[-1][1] >= start:
            start = touched.pop()[0]
        touched.append((start, end))
    found: list[tuple[int, int]] = []
    for start, end in touched:
        for low in range(start // grain * grain, end, grain):
            first, last = max(start, low), min(end, low + grain)
            if any(shown[first:last]):
                if found and found[-1][1] == first:
                    first = found.pop()[0]
                found.append((first, last))
    return found


@given(given_copy=copies(), times=st.sampled_from((1, 3)), late=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("roomy", [False, True], ids=["in-place", "in-rooms"])
async def test_what_is_copied_agrees_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roomy: bool, late: bool, times: int, given_copy: Any
) -> None:
    """The source lies 1000 bytes into its file, which may end early: what is missing counts as zero."""
    monkeypatch.setattr(copying, "WINDOW", 128 << 10)
    unit, size, ranges, pieces = given_copy
    grain = unit * times
    if not roomy:
        unit = 1
    content = bytearray(size)
    for number, (at, length, zero) in enumerate(pieces):
        length = min(length, size - at)
        content[at : at + length] = bytes([0 if zero else number + 1]) * length
    whole = bytes(1000) + bytes(content)
    source = disk_of(tmp_path / "source", whole.rstrip(b"\0") if late else whole)
    target = disk_of(tmp_path / "target", b"" if roomy else b"." * (size + 7))
    shown = bytearray(size)
    for at, length in ranges:
        shown[at : at + length] = content[at : at + length]
    units = len({at // unit for start, length in ranges for at in range(start, start + length)}) if roomy else 0
    # two rooms with something between them, the second of them larger than needed
    first = (units + 1) // 2
    rooms = [(unit, first * unit), ((first + 3) * unit, (units + 1) * unit)] if roomy else None
    try:
        puts = await copy(
            [Part(at, length, 1000 + at, source) for at, length in ranges],
            target,
            grain=grain,
            end=size,
            unit=unit,
            shift=0 if roomy else 7,
            rooms=rooms,
        )
    finally:
        source.close()
        target.close()
    made = (tmp_path / "target").read_bytes()
    written: list[tuple[int, int]] = []
    for at, length, place in sorted(puts):
        there = bytes(shown[at : at + length]).ljust(length, b"\0")
        assert made[place : place + length] == there, "zeroes follow the end of the disk in its last unit"
        written.append((written.pop()[0] if written and written[-1][1] == at else at, at + length))
    assert written == expected(shown, ranges, unit, grain)
    if roomy:
        in_order = [put.place for put in sorted(puts)]
        assert in_order == sorted(in_order), "rooms are filled in the order of the disk"
    else:
        model = bytearray(b"." * (size + 7))
        for start, end in written:
            model[7 + start : 7 + end] = shown[start:end]
        assert made == model, "nothing else was touched"


async def test_parts_out_of_order_or_beyond_the_end_are_a_fault_of_the_caller(tmp_path: Path) -> None:
    source, target = disk_of(tmp_path / "source", b"x" * 8192), disk_of(tmp_path / "target")
    for parts in ([(4096, 512), (0, 512)], [(0, 1024), (512, 512)], [(7680, 1024)]):
        with pytest.raises(ValueError, match="not in order, or beyond the end"):
            await copy([Part(at, length, at, source) for at, length in parts], target, grain=512, end=8192)
    assert target.refresh_size() == 0
    source.close()
    target.close()


async def test_rooms_that_do_not_suffice_are_an_error_not_an_overrun(tmp_path: Path) -> None:
    source, target = disk_of(tmp_path / "source", b"x" * 65536), disk_of(tmp_path / "target")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        await copy([Part(0, 65536, 0, source)], target, grain=4096, unit=4096, end=65536, rooms=[(0, 8192)])
    assert target.refresh_size() <= 8192
    source.close()
    target.close()


async def test_errors_of_reading_and_of_writing_come_out(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    folder = DiskFile(os.open(tmp_path / "folder", os.O_RDONLY))
    source, target = disk_of(tmp_path / "source", b"x" * 65536), disk_of(tmp_path / "target")
    with pytest.raises(OSError, match=os.strerror(errno.EISDIR)):
        await copy([Part(0, 4096, 0, folder)], target, grain=4096, end=65536)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            await copy([Part(0, 65536, 0, source)], target, grain=4096, end=65536)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
        for one in (folder, source, target):
            one.close()


async def test_a_copy_that_is_cancelled_has_ended_when_it_says_so(tmp_path: Path) -> None:
    """The source is a pipe that gives nothing until the copy was cancelled."""
    ends = os.pipe()
    target = disk_of(tmp_path / "target")
    source = disk_of(tmp_path / "source", b"x" * (8 << 20))
    running = [0]
    most = threading.Lock()
    real = copying.in_disk_thread

    async def counted(function: Any) -> Any:
        def call() -> Any:
            with most:
                running[0] += 1
            os.read(ends[0], 1)
            try:
                return function()
            finally:
                with most:
                    running[0] -= 1

        return await real(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "in_disk_thread", counted)
        work = asyncio.ensure_future(copy([Part(0, 8 << 20, 0, source)], target, grain=4096, end=8 << 20))
        while running[0] < copying.THREADS:
            await asyncio.sleep(0.001)
        work.cancel()
        await asyncio.sleep(0.01)
        work.cancel()
        await asyncio.sleep(0.01)
        assert not work.done(), "the threads still use the files"
        os.write(ends[1], bytes(copying.THREADS))
        with pytest.raises(asyncio.CancelledError):
            await work
    assert running[0] == 0
    assert target.refresh_size() == 0, "threads that begin after it was cancelled copy nothing"
    source.close()
    target.close()
    os.close(ends[0])
    os.close(ends[1])
