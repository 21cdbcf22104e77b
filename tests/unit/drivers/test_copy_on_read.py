"""copy-on-read: what was read once is in the image, and nothing else of it changes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch, Request
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.drivers._qcow2_create import create_qcow2
from qmpd.errors import CommandError
from qmpd.events import EventBus
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree

SIZE = 1 << 20
CLUSTER = 4096


async def chain(tmp_path: Path, data: bytes, bottom: str | None = None) -> tuple[Graph, BlockBackend]:
    """A raw base, two overlays that hold nothing, and the filter above them."""
    discover(("drivers",))
    graph = Graph(ObjectTree(), EventBus())
    (tmp_path / "base.raw").write_bytes(data)
    await graph.blockdev_add(
        {"driver": "raw", "node-name": "base", "file": {"driver": "file", "filename": str(tmp_path / "base.raw")}}
    )
    below = "base"
    for name in ("mid", "top"):
        (tmp_path / name).touch()
        file = {"driver": "file", "node-name": f"{name}-file", "filename": str(tmp_path / name)}
        await graph.blockdev_add(file)
        maker = BlockBackend(graph, lambda: "an unnamed block device", Perm.WRITE | Perm.RESIZE, Perm.ALL)
        maker.may_grow = True
        maker.insert(graph.find_node(f"{name}-file"))
        await create_qcow2(maker, size=SIZE, cluster_size=CLUSTER)
        await maker.remove()
        await graph.blockdev_add({"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": below})
        below = name
    tree = {"driver": "copy-on-read", "node-name": "cor", "file": "top"}
    await graph.blockdev_add(tree | ({"bottom": bottom} if bottom else {}))
    user = BlockBackend(graph, lambda: "an unnamed block device", Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    user.insert(graph.find_node("cor"))
    return graph, user


async def held(graph: Graph) -> set[int]:
    """Clusters that the top image holds itself."""
    found = await graph.find_node("top").block_status(0, SIZE)
    return {at for e in found if e.allocated for at in range(e.offset // CLUSTER, (e.offset + e.length) // CLUSTER)}


async def test_clusters_that_were_read_are_copied_and_only_those(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(SIZE)
    graph, user = await chain(tmp_path, data)
    assert await user.pread(5 * CLUSTER + 100, 2 * CLUSTER) == data[5 * CLUSTER + 100 : 7 * CLUSTER + 100]
    assert await held(graph) == {5, 6, 7}
    assert await user.pread(0, SIZE) == data
    assert await held(graph) == set(range(SIZE // CLUSTER))
    await graph.close_all()


@pytest.mark.parametrize(("bottom", "copied"), [("base", set(range(SIZE // CLUSTER))), ("mid", set())])
async def test_data_below_the_bottom_node_is_not_copied(tmp_path: Path, bottom: str, copied: set[int]) -> None:
    data = random.Random(2).randbytes(SIZE)  # held by the base
    graph, user = await chain(tmp_path, data, bottom=bottom)
    assert await user.pread(0, SIZE) == data
    assert await held(graph) == copied
    await graph.close_all()


async def test_a_write_during_a_copy_is_not_overwritten_by_it(tmp_path: Path) -> None:
    rng = random.Random(3)
    data = bytearray(rng.randbytes(SIZE))
    graph, user = await chain(tmp_path, bytes(data))
    for _ in range(20):
        reads, writes = [], []
        for at in rng.sample(range(0, SIZE, 1024), 24):
            if rng.random() < 0.5:
                value = rng.randbytes(1024)
                data[at : at + 1024] = value
                writes.append(user.pwrite(at, value))
            else:
                reads.append(user.preadv(Batch([Request(at, memoryview(bytearray(1024)))])))
        await asyncio.gather(*reads, *writes)
    assert await user.pread(0, SIZE) == data
    await graph.close_all()


async def test_a_chain_that_one_filter_relies_on_is_refused_to_another_until_the_first_is_gone(tmp_path: Path) -> None:
    graph, user = await chain(tmp_path, bytes(SIZE), bottom="mid")
    with pytest.raises(CommandError, match="Cannot change 'backing' link from 'top' to 'mid'"):
        await graph.blockdev_add({"driver": "copy-on-read", "node-name": "second", "file": "top", "bottom": "base"})
    with pytest.raises(CommandError, match="Cannot change 'file' link from 'cor' to 'top'"):
        await graph.blockdev_add({"driver": "copy-on-read", "node-name": "second", "file": "cor", "bottom": "top"})
    with pytest.raises(CommandError, match="Bottom node 'cor' is a filter"):
        await graph.blockdev_add({"driver": "copy-on-read", "node-name": "second", "file": "cor", "bottom": "cor"})
    await graph.blockdev_add({"driver": "copy-on-read", "node-name": "below", "file": "mid", "bottom": "base"})
    await graph.blockdev_del("below")
    await user.remove()
    await graph.blockdev_del("cor")
    await graph.blockdev_add({"driver": "copy-on-read", "node-name": "second", "file": "top", "bottom": "base"})
