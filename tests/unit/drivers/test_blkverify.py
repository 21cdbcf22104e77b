"""blkverify: equal nodes act as one, and the first difference is an error."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.filename import node_filename
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.events import EventBus
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree

SIZE = 1 << 18


async def opened(tmp_path: Path) -> tuple[Graph, BlockBackend]:
    discover(("drivers",))
    graph = Graph(ObjectTree(), EventBus())
    for name in ("raw", "test"):
        (tmp_path / name).write_bytes(bytes(SIZE))
        await graph.blockdev_add({"driver": "file", "node-name": name, "filename": str(tmp_path / name)})
    await graph.blockdev_add({"driver": "blkverify", "node-name": "ver", "raw": "raw", "test": "test"})
    user = BlockBackend(graph, lambda: "an unnamed block device", Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    user.insert(graph.find_node("ver"))
    return graph, user


async def test_random_requests_reach_both(tmp_path: Path) -> None:
    rng = random.Random(1)
    graph, user = await opened(tmp_path)
    model = bytearray(SIZE)
    for _ in range(100):
        at = rng.randrange(SIZE)
        length = rng.randint(1, min(SIZE - at, 20_000))
        if rng.random() < 0.4:
            assert await user.pread(at, length) == model[at : at + length]
        elif rng.random() < 0.7:
            model[at : at + length] = data = rng.randbytes(length)
            await user.pwrite(at, data)
        else:
            model[at : at + length] = bytes(length)
            await user.pwrite_zeroes(at, length)
    await user.flush()
    assert node_filename(graph.find_node("ver")) == f"blkverify:{tmp_path}/raw:{tmp_path}/test"
    await graph.close_all()
    assert (tmp_path / "raw").read_bytes() == (tmp_path / "test").read_bytes() == model


async def test_a_difference_is_an_error_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph, user = await opened(tmp_path)
    with (tmp_path / "test").open("r+b") as file:
        file.seek(70_001)
        file.write(b"!")
    assert await user.pread(0, 65536) == bytes(65536)
    with pytest.raises(OSError) as caught:
        await user.pread(65536, 65536)
    assert caught.value.errno == errno.EIO
    assert "contents mismatch at offset 70001" in caplog.text
    await graph.close_all()
