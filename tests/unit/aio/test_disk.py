"""Files on disk: every way in and out agrees with a plain bytearray."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.aio import locks
from qmpd.aio.disk import DiskFile, neighbours
from qmpd.block.batch import Batch, Request
from qmpd.errors import CommandError

SIZE = 256 * 1024


def open_disk(path: Path, *, direct: bool = False) -> DiskFile:
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
    return DiskFile(os.open(path, flags), direct=direct)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskFile]:
    (tmp_path / "d.img").write_bytes(bytes(SIZE))
    disk = open_disk(tmp_path / "d.img")
    yield disk
    disk.close()


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 70_000), st.integers(0, 255)), max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("fua", [False, True])
async def test_batches_of_writes_read_back(tmp_path: Path, fua: bool, todo: list[tuple[int, int, int]]) -> None:
    path = tmp_path / "model.img"
    path.write_bytes(bytes(SIZE))
    disk = open_disk(path)
    try:
        model = bytearray(SIZE)
        for offset, length, value in todo:
            data = bytes([value]) * min(length, SIZE - offset)
            model[offset : offset + len(data)] = data
            await disk.pwritev(Batch.single(offset, memoryview(data)), fua=fua)
        got = bytearray(SIZE + 100)
        await disk.preadv(Batch([Request(i, memoryview(got)[i : i + 65536]) for i in range(0, len(got), 65536)]))
        assert got == model + bytes(100), "what lies beyond the end reads as zeroes"
    finally:
        disk.close()


async def test_neighbouring_writes_become_one_call_and_one_failure_marks_only_its_run(disk: DiskFile) -> None:
    def request(offset: int) -> Request:
        return Request(offset, memoryview(b"x" * 512))

    batch = [request(0), request(512), request(4096), request(1024)]
    assert [[r.offset for r in run] for run in neighbours(batch)] == [[0, 512], [4096], [1024]]
    bad = Request(-512, memoryview(b"y" * 512))
    await disk.pwritev([*batch, bad])
    assert [r.error for r in batch] == [0] * 4
    assert bad.error == errno.EINVAL


async def test_zero_writes_and_holes_are_seen_as_holes(disk: DiskFile) -> None:
    await disk.pwritev(Batch.single(0, memoryview(b"z" * SIZE)))
    await disk.write_zeroes(65536, 65536, unmap=True)
    assert await disk.extents(0, SIZE) == [(0, 65536, True), (65536, 65536, False), (131072, 131072, True)]
    await disk.write_zeroes(SIZE - 4096, 8192, unmap=False)
    assert disk.refresh_size() == SIZE + 4096, "a zero write beyond the end grows the file"


async def test_direct_io_takes_any_buffer(tmp_path: Path) -> None:
    (tmp_path / "d.img").write_bytes(b"a" * 8192)
    try:
        disk = open_disk(tmp_path / "d.img", direct=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("the file system of the temporary directory has no direct I/O")
    try:
        data = memoryview(bytearray(b"?" + b"b" * 4096))[1:]
        await disk.pwritev(Batch.single(4096, data))
        got = memoryview(bytearray(8193))[1:]
        await disk.preadv(Batch.single(0, got))
        assert bytes(got) == b"a" * 4096 + b"b" * 4096
    finally:
        disk.close()


def test_a_lock_in_use_and_a_lock_not_shared_exclude_each_other(tmp_path: Path) -> None:
    path = str(tmp_path / "l.img")
    one, two = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        locks.apply(one, 0b0011, 0b0010, release=True)
        locks.check(two, 0b0001, 0b0000, path)
        with pytest.raises(CommandError, match=r'^Failed to get "write" lock$'):
            locks.check(two, 0b0010, 0b0000, path)
        with pytest.raises(CommandError, match=r'^Failed to get shared "write" lock$'):
            locks.check(two, 0b0001, 0b0010, path)
        locks.apply(one, 0b0001, 0b0000, release=True)
        locks.check(two, 0b0010, 0b0010, path)
    finally:
        os.close(one)
        os.close(two)


@pytest.mark.parametrize("unmap", [False, True])
async def test_zeroes_behind_the_end_take_space_unless_they_may_be_holes(tmp_path: Path, unmap: bool) -> None:
    """What a format zeroes at the end of its file is metadata: it is to find space later, however full the disk is."""
    disk = open_disk(tmp_path / "d")
    await disk.pwritev(Batch.single(0, memoryview(b"a" * 4096)))
    await disk.write_zeroes(65536, 1 << 20, unmap=unmap)
    assert disk.size == 65536 + (1 << 20)
    assert (disk.allocated_size() >= 1 << 20) is not unmap
    disk.close()
    assert (tmp_path / "d").read_bytes() == b"a" * 4096 + bytes(65536 - 4096 + (1 << 20))


async def test_what_others_write_at_the_end_meanwhile_is_not_cut_off(tmp_path: Path) -> None:
    """A thread has looked the size up to zero what lies behind; before it makes the file longer, a write ends."""
    disk = open_disk(tmp_path / "d")
    looked, held, extend = threading.Event(), threading.Event(), disk._extend

    def slow(end: int) -> None:
        looked.set()
        assert held.wait(10)
        extend(end)

    await disk.pwritev(Batch.single(0, memoryview(b"a" * 4096)))
    disk._extend = slow  # type: ignore[method-assign]
    work = asyncio.ensure_future(disk.write_zeroes(4096, 4096, unmap=True))
    assert await asyncio.to_thread(looked.wait, 10)
    disk._extend = extend  # type: ignore[method-assign]
    await disk.pwritev(Batch.single(8192, memoryview(b"b" * 4096)))
    held.set()
    await work
    assert disk.size == 12288
    disk.close()
    assert (tmp_path / "d").read_bytes() == b"a" * 4096 + bytes(4096) + b"b" * 4096


async def test_a_file_that_has_become_longer_than_it_was_to_be_is_left_so(tmp_path: Path) -> None:
    """Growing by truncation, while a write behind the new end is done."""
    disk = open_disk(tmp_path / "d")
    with disk._growing:  # the thread that sets the size waits for it
        work = asyncio.ensure_future(disk.truncate(4096))
        await asyncio.sleep(0.05)
        await disk.pwritev(Batch.single(8192, memoryview(b"b" * 4096)))
    await work
    assert disk.size == 12288
    await disk.truncate(4096)
    assert disk.size == 4096
    disk.close()


async def test_writes_and_zeroes_that_make_a_file_longer_at_once_lose_nothing(tmp_path: Path) -> None:
    for turn in range(200):
        disk = open_disk(tmp_path / f"{turn}")
        works = []
        for block in range(8):
            at = block * 4096
            if block % 2:
                works.append(disk.pwritev(Batch.single(at, memoryview(bytes([block]) * 4096))))
            else:
                works.append(disk.write_zeroes(at, 4096, unmap=bool(turn % 2)))
        await asyncio.gather(*works)
        disk.close()
        expected = b"".join(bytes([block if block % 2 else 0]) * 4096 for block in range(8))
        assert (tmp_path / f"{turn}").read_bytes() == expected
