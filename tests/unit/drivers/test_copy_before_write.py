"""copy-before-write: the snapshot shows the old data whatever is written, and the disk shows the new."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from qmpd.block import dirty_bitmap
from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch, Request
from qmpd.block.filename import node_filename
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.events import EventBus
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree

CLUSTER = 64 << 10
SIZE = 20 * CLUSTER + 3 * 512
READER = Perm.CONSISTENT_READ


async def opened(tmp_path: Path, data: bytes, target: dict[str, Any] | None = None, **options: Any) -> Graph:
    """A file under a copy-before-write node with an empty target, and the view of the past above it."""
    discover(("drivers",))
    graph = Graph(ObjectTree(), EventBus())
    (tmp_path / "disk").write_bytes(data)
    with (tmp_path / "old").open("wb") as file:
        file.truncate(len(data))
    await graph.blockdev_add(
        {"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk"), "discard": "unmap"}
    )
    target = target or {"driver": "file", "filename": str(tmp_path / "old"), "discard": "unmap"}
    await graph.blockdev_add(target | {"node-name": "target"})
    if "bitmap" in options:
        chosen = dirty_bitmap.create(graph.find_node("file"), "chosen", CLUSTER)
        for at in options["bitmap"]:
            chosen.set(at * CLUSTER, CLUSTER)
        options["bitmap"] = {"node": "file", "name": "chosen"}
    tree = {"driver": "copy-before-write", "node-name": "cbw", "file": "file", "target": "target", "discard": "unmap"}
    await graph.blockdev_add(tree | {name.replace("_", "-"): options[name] for name in options})
    await graph.blockdev_add({"driver": "snapshot-access", "node-name": "past", "file": "cbw", "discard": "unmap"})
    return graph


def user_of(graph: Graph, name: str, perm: Perm = READER | Perm.WRITE) -> BlockBackend:
    user = BlockBackend(graph, lambda: "an unnamed block device", perm, Perm.ALL)
    user.insert(graph.find_node(name))
    return user


async def errno_of(work: Any) -> int:
    try:
        await work
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize("seed", range(6))
async def test_the_past_stays_under_random_requests(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    before = rng.randbytes(SIZE // 2) + bytes(SIZE - SIZE // 2)
    size = rng.choice((0, CLUSTER * 2))
    graph = await opened(tmp_path, before, min_cluster_size=size)
    disk, past = user_of(graph, "cbw"), user_of(graph, "past", READER)
    model = bytearray(before)
    for _ in range(25):
        taken: set[int] = set()
        works = []
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(SIZE)
            length = rng.randint(1, min(SIZE - at, 3 * CLUSTER))
            blocks = set(range(at // 512, (at + length) // 512 + 1))
            if blocks & taken:
                continue
            taken |= blocks
            if rng.random() < 0.7:
                data = rng.randbytes(length)
                works.append(disk.pwrite(at, data))
                model[at : at + length] = data
            else:
                works.append(disk.pwrite_zeroes(at, length))
                model[at : at + length] = bytes(length)
        places = [rng.randrange(SIZE - 100) for _ in range(4)]
        looks = [past.pread(at, min(SIZE - at, 2 * CLUSTER)) for at in places]
        results = await asyncio.gather(*works, *looks)
        for at, got in zip(places, results[len(works) :], strict=True):
            assert got == before[at : at + len(got)]
        assert await disk.pread(0, SIZE) == model
    assert await past.pread(0, SIZE) == before
    status = await past.block_status(0, SIZE)
    assert sum(e.length for e in status) == SIZE
    assert all(e.allocated for e in status)
    await graph.close_all()
    assert (tmp_path / "disk").read_bytes() == model


async def test_only_what_is_overwritten_is_copied_and_once(tmp_path: Path) -> None:
    before = random.Random(1).randbytes(SIZE)
    graph = await opened(tmp_path, before)
    disk = user_of(graph, "cbw")
    await disk.pwrite(5 * CLUSTER + 10, b"new")
    await disk.pwrite(5 * CLUSTER + 20, b"newer")
    old = (tmp_path / "old").read_bytes()
    assert old[5 * CLUSTER : 6 * CLUSTER] == before[5 * CLUSTER : 6 * CLUSTER]
    assert not any(old[: 5 * CLUSTER])
    assert not any(old[6 * CLUSTER :])
    shown = [bitmap.to_wire() for bitmap in graph.find_node("cbw").dirty_bitmaps]
    whole = 21 * CLUSTER
    assert [one["count"] for one in shown] == [whole, CLUSTER, whole - CLUSTER]
    assert all(one["granularity"] == CLUSTER and not one["recording"] and "name" not in one for one in shown)
    await graph.close_all()


async def test_a_bitmap_says_what_is_kept(tmp_path: Path) -> None:
    before = random.Random(2).randbytes(SIZE)
    graph = await opened(tmp_path, before, bitmap=[3, 4])
    disk, past = user_of(graph, "cbw"), user_of(graph, "past", READER)
    await disk.pwrite(2 * CLUSTER, bytes(3 * CLUSTER))
    assert await past.pread(3 * CLUSTER, 2 * CLUSTER) == before[3 * CLUSTER : 5 * CLUSTER]
    assert await errno_of(past.pread(2 * CLUSTER, 512)) == errno.EACCES
    assert await errno_of(past.block_status(0, SIZE)) == errno.EACCES
    assert not any((tmp_path / "old").read_bytes()[2 * CLUSTER : 3 * CLUSTER])
    await graph.close_all()


async def test_discarding_the_past_gives_it_up(tmp_path: Path) -> None:
    before = random.Random(3).randbytes(SIZE)
    graph = await opened(tmp_path, before)
    disk, past = user_of(graph, "cbw"), user_of(graph, "past")
    await disk.pwrite(CLUSTER, bytes(CLUSTER))
    await past.pdiscard(CLUSTER - 1, 2 * CLUSTER + 1)
    assert await errno_of(past.pread(CLUSTER, 512)) == errno.EACCES
    assert await errno_of(past.pread(2 * CLUSTER, 512)) == errno.EACCES
    assert await past.pread(0, CLUSTER) == before[:CLUSTER]
    await disk.pwrite(2 * CLUSTER, bytes(CLUSTER))
    assert not any((tmp_path / "old").read_bytes()[CLUSTER : 3 * CLUSTER])
    assert await errno_of(past.pwrite(0, b"x")) == errno.ENOTSUP
    await graph.close_all()


def broken(tmp_path: Path) -> dict[str, Any]:
    """A target that cannot be written to."""
    rules = [{"event": "none", "errno": errno.ENOSPC, "iotype": kind} for kind in ("write", "write-zeroes")]
    return {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(tmp_path / "old")},
        "inject-error": rules,
    }


async def test_a_failed_copy_fails_the_write(tmp_path: Path) -> None:
    before = random.Random(4).randbytes(SIZE)
    graph = await opened(tmp_path, before, broken(tmp_path))
    disk, past = user_of(graph, "cbw"), user_of(graph, "past", READER)
    batch = Batch((Request(0, memoryview(b"n" * 512)), Request(CLUSTER, memoryview(b"n" * 512))))
    await disk.pwritev(batch)
    assert [request.error for request in batch] == [errno.ENOSPC] * 2
    assert await disk.pread(0, SIZE) == before
    assert await past.pread(0, SIZE) == before
    await graph.close_all()


async def test_a_failed_copy_may_give_up_the_snapshot(tmp_path: Path) -> None:
    before = random.Random(5).randbytes(SIZE)
    graph = await opened(tmp_path, before, broken(tmp_path), on_cbw_error="break-snapshot")
    disk, past = user_of(graph, "cbw"), user_of(graph, "past", READER)
    await disk.pwrite(0, b"n" * 512)
    assert await disk.pread(0, 512) == b"n" * 512
    assert await errno_of(past.pread(10 * CLUSTER, 512)) == errno.EACCES
    await graph.close_all()


async def test_a_copy_that_takes_too_long_counts_as_failed(tmp_path: Path) -> None:
    slow = {"driver": "null-co", "size": SIZE, "latency-ns": 1_500_000_000}
    graph = await opened(tmp_path, b"a" * SIZE, slow, cbw_timeout=1)
    disk = user_of(graph, "cbw")
    assert await errno_of(disk.pwrite(0, b"n" * 512)) == errno.ETIMEDOUT
    assert await disk.pread(0, 512) == b"a" * 512
    await graph.close_all()


async def test_a_target_that_is_too_small(tmp_path: Path) -> None:
    graph = await opened(tmp_path, b"a" * SIZE, {"driver": "null-co", "size": CLUSTER})
    disk = user_of(graph, "cbw")
    assert await errno_of(disk.pwrite(0, b"n" * 512)) == 0
    assert await errno_of(disk.pwrite(CLUSTER, b"n" * 512)) == errno.EIO
    await graph.close_all()


async def test_names_and_permissions(tmp_path: Path) -> None:
    graph = await opened(tmp_path, bytes(SIZE))
    for name in ("cbw", "past"):
        assert node_filename(graph.find_node(name)) == f"{tmp_path}/disk"
    file, target = graph.find_node("cbw").children.values()
    assert (file.perm, file.shared) == (Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED)
    assert (target.perm, target.shared) == (Perm.WRITE, Perm.ALL & ~Perm.RESIZE)
    await graph.close_all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bitmap": {"node": "nosuch", "name": "x"}}, "Node 'nosuch' not found"),
        ({"bitmap": {"node": "file", "name": "x"}}, "Dirty bitmap 'x' not found"),
        (
            {"min-cluster-size": 1000},
            "Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
        ),
        (
            {"min-cluster-size": (1 << 64) - 1},
            "Cannot create block-copy-state: min-cluster-size too large: 18446744073709551615 > 9223372036854775807",
        ),
    ],
)
async def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    graph = await opened(tmp_path, bytes(SIZE))
    tree = {"driver": "copy-before-write", "node-name": "two", "file": "file", "target": "target"}
    with pytest.raises(CommandError) as caught:
        await graph.blockdev_add(tree | options)
    assert str(caught.value) == message
    await graph.close_all()


async def test_over_a_node_that_keeps_nothing_every_read_fails(tmp_path: Path) -> None:
    graph = await opened(tmp_path, bytes(SIZE))
    await graph.blockdev_add({"driver": "snapshot-access", "node-name": "none", "file": "file"})
    assert await errno_of(user_of(graph, "none", READER).pread(0, 512)) == errno.ENOTSUP
    await graph.close_all()
