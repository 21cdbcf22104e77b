"""The qcow2 driver over a file in memory: order of requests, order on disk, limits, options."""

from __future__ import annotations

import asyncio
import errno
import struct
import tracemalloc

import pytest

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.errors import CommandError
from qmpd.formats.qcow2_header import DIRTY
from tests.gen.qcow2 import MemoryNode, edge, events_of, make, open_qcow2
from tests.gen.qcow2_header import patched

CLUSTER = 4096


class Gate:
    """Holds back the requests of a file that touch a place, until it is opened."""

    def __init__(self, file: MemoryNode) -> None:
        self.file = file
        self.open = asyncio.Event()
        self.arrived = asyncio.Event()
        self.wanted: bytes | None = None
        self._pwritev = file.pwritev
        file.pwritev = self._gated  # type: ignore[method-assign]

    async def _gated(self, batch: Batch, flags: WriteFlags) -> None:
        if self.wanted is not None and any(self.wanted in bytes(request.view) for request in batch):
            self.arrived.set()
            await self.open.wait()
        await self._pwritev(batch, flags)


async def test_a_freed_cluster_is_not_reused_while_a_write_to_it_is_on_its_way() -> None:
    """A write in place and a discard of the same cluster run at once; the write arrives last."""
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    disk = edge(node)
    await disk.pwrite(0, b"a" * CLUSTER)
    await disk.flush()
    gate = Gate(file)
    gate.wanted = b"late"
    late = asyncio.create_task(disk.pwrite(0, b"late" * 1024))
    await gate.arrived.wait()
    await disk.pdiscard(0, CLUSTER)
    await disk.flush()
    for cluster in range(1, 8):
        await disk.pwrite(cluster * CLUSTER, b"b" * CLUSTER)
        await disk.flush()
    gate.open.set()
    await late
    assert bytes(await disk.pread(CLUSTER, 7 * CLUSTER)) == b"b" * 7 * CLUSTER
    await node.close()


async def test_zeroes_wait_for_the_cluster_that_is_being_copied() -> None:
    """The copy around a write was made before the zeroes came; it must not bring the old data back."""
    below = MemoryNode(b"o" * 64 * CLUSTER, "below")
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file, backing=below)
    disk = edge(node)
    gate = Gate(file)
    gate.wanted = b"new"
    write = asyncio.create_task(disk.pwrite(100, b"new"))
    await gate.arrived.wait()
    zero = asyncio.create_task(disk.pwrite_zeroes(0, CLUSTER))
    await asyncio.sleep(0.01)
    assert not zero.done()
    gate.open.set()
    await asyncio.gather(write, zero)
    assert bytes(await disk.pread(0, CLUSTER)) == bytes(CLUSTER)
    await node.close()


async def test_two_writers_of_one_new_cluster_share_it() -> None:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    disk = edge(node)
    gate = Gate(file)
    gate.wanted = b"first"
    first = asyncio.create_task(disk.pwrite(0, b"first"))
    await gate.arrived.wait()
    second = asyncio.create_task(disk.pwrite(1000, b"second"))
    elsewhere = asyncio.create_task(disk.pwrite(10 * CLUSTER, b"third"))
    await elsewhere
    assert not second.done()
    gate.open.set()
    await asyncio.gather(first, second)
    assert bytes(await disk.pread(0, 5)) == b"first"
    assert bytes(await disk.pread(1000, 6)) == b"second"
    await node.close()


async def test_a_failed_write_fails_its_own_range_and_takes_no_cluster() -> None:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    disk = edge(node)
    await disk.pwrite(0, b"a" * CLUSTER)
    size = file.size
    file.error = lambda kind, offset, length: errno.ENOSPC if kind == "write" and offset == size else 0
    batch = Batch(
        [
            Request(CLUSTER, memoryview(b"x" * CLUSTER)),
            Request(0, memoryview(b"y" * 100)),
            Request(2 * CLUSTER, memoryview(b"z" * CLUSTER)),
        ]
    )
    await disk.pwritev(batch)
    assert [request.error for request in batch] == [errno.ENOSPC, 0, 0]
    file.error = lambda *_: 0
    assert (
        bytes(await disk.pread(0, 3 * CLUSTER)) == b"y" * 100 + b"a" * (CLUSTER - 100) + bytes(CLUSTER) + b"z" * CLUSTER
    )
    await disk.pwrite(CLUSTER, b"x" * CLUSTER)
    await node.close()
    assert file.size == size + 2 * CLUSTER


async def test_a_failed_flush_is_tried_again() -> None:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    disk = edge(node)
    await disk.pwrite(0, b"a" * CLUSTER)
    file.error = lambda kind, *_: errno.EIO if kind == "flush" else 0
    with pytest.raises(OSError, match="injected"):
        await disk.flush()
    file.error = lambda kind, *_: errno.EIO if kind == "write" else 0
    with pytest.raises(OSError, match="failed"):
        await disk.flush()
    file.error = lambda *_: 0
    await disk.flush()
    again = await open_qcow2(MemoryNode(bytes(file.content)), read_only=True)
    assert bytes(await edge(again).pread(0, CLUSTER)) == b"a" * CLUSTER
    await node.close()


async def test_reads_that_fail_below_fail_alone() -> None:
    below = MemoryNode(b"o" * 64 * CLUSTER, "below")
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file, backing=below)
    disk = edge(node)
    await disk.pwrite(0, b"a" * CLUSTER)
    below.error = lambda kind, offset, length: errno.EIO if kind == "read" and offset == CLUSTER else 0
    views = [memoryview(bytearray(CLUSTER)) for _ in range(3)]
    batch = Batch([Request(CLUSTER * index, view) for index, view in enumerate(views)])
    await disk.preadv(batch)
    assert [request.error for request in batch] == [0, errno.EIO, 0]
    with pytest.raises(OSError, match="failed"):
        await disk.pwrite(CLUSTER + 5, b"needs the rest of its cluster")
    await disk.pwrite(CLUSTER, b"b" * CLUSTER)
    await node.close()


@pytest.mark.parametrize("requests", [1, 32])
async def test_a_batch_is_one_request_of_each_kind_below(requests: int) -> None:
    below = MemoryNode(b"o" * 64 * CLUSTER, "below")
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file, backing=below)
    disk = edge(node)
    await disk.pwrite(0, b"a" * 32 * CLUSTER)
    await disk.pread(0, 1)
    file.reads = below.reads = file.writes = 0
    await disk.preadv(
        Batch(Request((index * 2 + 1) * CLUSTER // 2, memoryview(bytearray(40 * CLUSTER))) for index in range(requests))
        if requests == 1
        else Batch(Request(index * CLUSTER * 2, memoryview(bytearray(CLUSTER))) for index in range(requests))
    )
    assert (file.reads, below.reads) == (1, 1)
    await disk.pwritev(Batch(Request(index * CLUSTER, memoryview(bytes(CLUSTER))) for index in range(requests)))
    assert file.writes == 1
    await node.close()


async def test_memory_follows_the_file_and_not_the_header() -> None:
    image = bytes((await make(size=1 << 20)).content)
    greedy = patched(
        image,
        l1_size=4194304,
        l1_table_offset=1 << 40,
        nb_snapshots=65536,
        snapshots_offset=1 << 41,
        refcount_table_clusters=128,
        size=1 << 50,
    )
    tracemalloc.start()
    try:
        node = await open_qcow2(MemoryNode(greedy), read_only=True)
        await edge(node).pread(1 << 49, 4096)
        assert tracemalloc.get_traced_memory()[1] < len(image) * 4 + (2 << 20)
    finally:
        tracemalloc.stop()
    await node.close()


async def test_the_l2_cache_stays_small() -> None:
    file = await make(size=256 << 20, cluster_size=512)
    node = await open_qcow2(file, l2_cache_size=8192)
    disk = edge(node)
    for offset in range(0, 64 << 20, 1 << 20):
        await disk.pwrite(offset, b"x")
    await disk.flush()
    for offset in range(0, 64 << 20, 1 << 20):
        assert bytes(await disk.pread(offset, 1)) == b"x"
    assert len(node.image.l2) <= 20
    await node.close()


async def test_the_refcount_table_grows() -> None:
    file = await make(size=8 << 20, cluster_size=512, refcount_bits=64)
    assert struct.unpack_from(">I", file.content, 56)[0] == 1
    node = await open_qcow2(file)
    disk = edge(node)
    for offset in range(0, 8 << 20, 1 << 20):
        await disk.pwrite(offset, bytes([offset >> 20 & 255 or 9]) * (1 << 20))
    await node.close()
    assert struct.unpack_from(">I", file.content, 56)[0] > 1
    again = await open_qcow2(file)
    for offset in range(0, 8 << 20, 1 << 20):
        assert bytes(await edge(again).pread(offset, 1 << 20)) == bytes([offset >> 20 & 255 or 9]) * (1 << 20)
    await again.close()


async def test_the_dirty_bit_is_there_before_the_first_change_and_gone_at_the_end() -> None:
    file = await make(size=1 << 20, cluster_size=CLUSTER, lazy_refcounts=True)
    node = await open_qcow2(file)

    def dirty() -> bool:
        return bool(struct.unpack_from(">Q", file.content, 72)[0] & DIRTY)

    assert not dirty()
    await edge(node).pwrite(0, b"x")
    assert dirty()
    await edge(node).flush()
    assert node.image_info()["dirty-flag"]
    await node.close()
    assert not dirty()


@pytest.mark.parametrize("version", [2, 3])
async def test_discarded_clusters(version: int) -> None:
    file = await make(size=16 * CLUSTER, cluster_size=CLUSTER, version=version)
    below = MemoryNode(b"o" * 16 * CLUSTER, "below")
    for backing in (None, below):
        node = await open_qcow2(file, backing=backing)
        disk = edge(node)
        await disk.pwrite(0, b"a" * 4 * CLUSTER)
        await disk.pdiscard(100, 2 * CLUSTER)
        expected = b"a" * CLUSTER + bytes(CLUSTER) + b"a" * 2 * CLUSTER
        if version == 2 and backing is not None:
            expected = b"a" * 4 * CLUSTER
        assert bytes(await disk.pread(0, 4 * CLUSTER)) == expected
        await node.close()


async def test_discards_reach_the_file_only_when_asked_to() -> None:
    for given, wanted in ((None, True), (False, False), (True, True)):
        file = await make(size=16 * CLUSTER, cluster_size=CLUSTER)
        node = await open_qcow2(file, pass_discard_request=given)
        await edge(node).pwrite(0, b"a" * CLUSTER)
        await edge(node).pdiscard(0, CLUSTER)
        await node.close()
        assert (b"\xd5" * CLUSTER in file.content) == wanted
        assert (b"a" * CLUSTER in file.content) != wanted


async def test_with_discard_no_unref_a_cluster_keeps_its_place() -> None:
    file = await make(size=16 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file, discard_no_unref=True)
    disk = edge(node)
    await disk.pwrite(0, b"a" * CLUSTER)
    size = file.size
    await disk.pdiscard(0, CLUSTER)
    await disk.flush()
    await disk.pwrite(CLUSTER, b"b" * CLUSTER)
    assert file.size == size + CLUSTER
    await disk.pwrite(0, b"c")
    assert file.size == size + CLUSTER
    assert bytes(await disk.pread(0, CLUSTER)) == b"c" + bytes(CLUSTER - 1)
    await node.close()


async def test_with_discard_no_unref_a_late_discard_does_not_destroy_a_new_write() -> None:
    """Regression: the file's discard ran after the next write had taken the cluster again."""
    file = await make(size=16 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file, discard_no_unref=True)
    disk = edge(node)
    await disk.pwrite(0, b"a" * CLUSTER)
    entered, go_on = asyncio.Event(), asyncio.Event()
    zeroes = file.pwrite_zeroes

    async def slow(offset: int, length: int, flags: WriteFlags) -> None:
        entered.set()
        await go_on.wait()
        await zeroes(offset, length, flags)

    file.pwrite_zeroes = slow  # type: ignore[method-assign]
    first = asyncio.create_task(disk.pdiscard(0, CLUSTER))
    await entered.wait()
    second = asyncio.create_task(disk.pwrite(0, b"b" * CLUSTER))
    await asyncio.sleep(0.01)
    go_on.set()
    await asyncio.gather(first, second)
    assert bytes(await disk.pread(0, CLUSTER)) == b"b" * CLUSTER
    await node.close()


async def test_a_zero_write_without_fallback_changes_nothing_when_it_cannot() -> None:
    file = await make(size=16 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    disk = edge(node)
    await disk.pwrite(0, b"a" * 4 * CLUSTER)
    with pytest.raises(OSError) as caught:
        await disk.pwrite_zeroes(10, 2 * CLUSTER, WriteFlags.NO_FALLBACK)
    assert caught.value.errno == errno.ENOTSUP
    assert bytes(await disk.pread(0, 4 * CLUSTER)) == b"a" * 4 * CLUSTER
    await disk.pwrite_zeroes(8 * CLUSTER + 10, 20, WriteFlags.NO_FALLBACK)
    await node.close()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"cache_size": 262144, "l2_cache_size": 65536, "refcount_cache_size": 65536},
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        ({"cache_size": 65536, "l2_cache_size": 131072}, "l2-cache-size may not exceed cache-size"),
        ({"cache_size": 1, "refcount_cache_size": 2}, "refcount-cache-size may not exceed cache-size"),
        ({"refcount_cache_size": 1 << 62}, "Refcount cache size too big"),
        (
            {"l2_cache_entry_size": 1000},
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        ),
        ({"cache_clean_interval": -1}, "Cache clean interval too big"),
        ({"cache_clean_interval": 1 << 32}, "Cache clean interval too big"),
        ({"encrypt": {"format": "aes"}}, "No encryption in image header, but options specified format 'aes'"),
    ],
    ids=str,
)
async def test_options_are_refused_in_the_references_words(options: dict[str, object], text: str) -> None:
    with pytest.raises(CommandError) as caught:
        await open_qcow2(await make(size=1 << 20), **options)  # type: ignore[arg-type]
    assert str(caught.value) == text


async def test_options_of_version_3() -> None:
    file = await make(size=1 << 20, version=2)
    with pytest.raises(CommandError, match=r"^Lazy refcounts require a qcow2 image with at least qemu 1.1"):
        await open_qcow2(file, lazy_refcounts=True)
    with pytest.raises(CommandError, match=r"^discard-no-unref is only supported since qcow2 version 3$"):
        await open_qcow2(file, discard_no_unref=True)


async def test_a_file_that_ends_within_its_last_cluster() -> None:
    file = await make(size=1 << 20)
    node = await open_qcow2(file)
    await edge(node).pwrite(0, b"x" * 1000)
    await node.close()
    del file.content[-65536 + 1024 :]
    file.size = len(file.content)
    node = await open_qcow2(file)
    assert bytes(await edge(node).pread(0, 65536)) == b"x" * 1000 + bytes(65536 - 1000)
    assert not events_of(node)
    await node.close()


async def test_unknown_autoclear_features_are_cleared_by_a_writer_only() -> None:
    image = patched(bytes((await make(size=1 << 20)).content), autoclear=1 << 50)
    file = MemoryNode(image)
    await (await open_qcow2(file, read_only=True)).close()
    assert file.content == image
    await (await open_qcow2(file)).close()
    assert struct.unpack_from(">Q", file.content, 88)[0] == 0


def pattern(seed: int, clusters: int) -> bytes:
    """Return data in which every 8 bytes differ."""
    return b"".join(struct.pack(">II", seed, number) for number in range(clusters * CLUSTER // 8))


async def test_a_large_write_fills_the_free_clusters_between_others() -> None:
    file = await make(size=256 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    disk = edge(node)
    first, second = pattern(1, 64), pattern(2, 64)
    await disk.pwrite(0, first)
    for cluster in (3, 4, 7, 20, 21, 22, 40):
        await disk.pdiscard(cluster * CLUSTER, CLUSTER)
    await disk.flush()
    size = file.size
    await disk.pwrite(100 * CLUSTER, second)
    await disk.flush()
    assert file.size == size + (64 - 7) * CLUSTER
    assert bytes(await disk.pread(100 * CLUSTER, 64 * CLUSTER)) == second
    for cluster in range(64):
        wanted = bytes(CLUSTER) if cluster in (3, 4, 7, 20, 21, 22, 40) else first[cluster * CLUSTER :][:CLUSTER]
        assert bytes(await disk.pread(cluster * CLUSTER, CLUSTER)) == wanted
    await node.close()


async def test_a_large_write_meets_clusters_that_another_one_took_meanwhile() -> None:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    disk = edge(node)
    one, other = pattern(1, 24), pattern(2, 24)
    gate = Gate(file)
    gate.wanted = one[:64]
    first = asyncio.create_task(disk.pwrite(0, one))
    await gate.arrived.wait()
    second = asyncio.create_task(disk.pwrite(20 * CLUSTER, other))
    await asyncio.sleep(0.01)
    gate.open.set()
    await asyncio.gather(first, second)
    assert bytes(await disk.pread(0, 44 * CLUSTER)) == one[: 20 * CLUSTER] + other
    await node.close()


async def test_requests_of_one_batch_may_cover_each_other() -> None:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    one, other, last = pattern(1, 8), pattern(2, 4), pattern(3, 8)
    requests = [Request(2 * CLUSTER + 512, memoryview(other)), Request(16 * CLUSTER, memoryview(last))]
    for batch in (Batch([Request(0, memoryview(one[: 2 * CLUSTER + 512])), *requests]), Batch(requests[::-1])):
        await edge(node).pwritev(batch)
        batch.raise_first()
        assert bytes(await edge(node).pread(2 * CLUSTER + 512, len(other))) == other
        assert bytes(await edge(node).pread(16 * CLUSTER, len(last))) == last
    assert bytes(await edge(node).pread(0, 2 * CLUSTER + 512)) == one[: 2 * CLUSTER + 512]
    await node.close()


async def test_a_large_write_that_fails_takes_no_cluster() -> None:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    disk = edge(node)
    await disk.pwrite(0, b"a" * CLUSTER)
    await disk.flush()
    size = file.size
    file.error = lambda kind, offset, length: errno.ENOSPC if kind == "write" and length > CLUSTER else 0
    with pytest.raises(OSError, match="Errno 28"):
        await disk.pwrite(CLUSTER, pattern(1, 16))
    file.error = lambda *_: 0
    await disk.pwrite(CLUSTER, pattern(2, 16))
    await disk.flush()
    assert file.size == size + 16 * CLUSTER
    assert bytes(await disk.pread(CLUSTER, 16 * CLUSTER)) == pattern(2, 16)
    await node.close()
