"""preallocate: the file is ahead of its users while they write, and exactly as long as they left it afterwards."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.drivers._qcow2_create import create_qcow2
from qmpd.errors import CommandError
from qmpd.events import EventBus
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree

WRITER = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
KIB = 1024


async def opened(tmp_path: Path, size: int = 0, align: int = 4096, ahead: int = 64 * KIB) -> Graph:
    discover(("drivers",))
    graph = Graph(ObjectTree(), EventBus())
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(size)
    await graph.blockdev_add({"driver": "file", "node-name": "file", "filename": str(tmp_path / "disk")})
    tree = {"driver": "preallocate", "node-name": "pre", "file": "file"}
    await graph.blockdev_add(tree | {"prealloc-align": align, "prealloc-size": ahead})
    return graph


def user_of(graph: Graph, name: str, perm: Perm = WRITER) -> BlockBackend:
    user = BlockBackend(graph, lambda: "an unnamed block device", perm, Perm.ALL)
    user.may_grow = bool(perm & Perm.RESIZE)
    user.insert(graph.find_node(name))
    return user


async def test_the_file_runs_ahead_and_is_cut_when_the_writer_leaves(tmp_path: Path) -> None:
    graph = await opened(tmp_path)
    user = user_of(graph, "pre")
    await user.pwrite(0, b"a" * 1000)
    assert (tmp_path / "disk").stat().st_size == 68 * KIB
    assert graph.find_node("pre").size == 1000
    await user.pwrite(1000, b"b" * 1000)
    assert (tmp_path / "disk").stat().st_size == 68 * KIB
    await user.remove()
    for _ in range(100):
        if (tmp_path / "disk").stat().st_size == 2000:
            break
        await asyncio.sleep(0.01)
    assert (tmp_path / "disk").read_bytes() == b"a" * 1000 + b"b" * 1000
    await asyncio.sleep(0.05)
    assert graph.find_node("pre").children["file"].perm == Perm.NONE
    other = user_of(graph, "file", Perm.WRITE)
    await other.remove()
    await graph.close_all()


async def test_nobody_else_writes_below_while_there_is_space_ahead(tmp_path: Path) -> None:
    graph = await opened(tmp_path)
    user = user_of(graph, "pre")
    with pytest.raises(CommandError, match="permissions 'write' are both required by"):
        user_of(graph, "file", Perm.WRITE)
    await user.remove()
    await graph.close_all()


async def test_closing_cuts(tmp_path: Path) -> None:
    graph = await opened(tmp_path, size=512)
    user = user_of(graph, "pre")
    await user.pwrite(4096, b"x")
    await graph.close_all()
    assert (tmp_path / "disk").read_bytes() == bytes(4096) + b"x"


@pytest.mark.parametrize("seed", range(4))
async def test_random_growing_writes_match_a_bytearray(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    graph = await opened(tmp_path, size=10 * KIB, align=512, ahead=rng.choice((0, 5000, 64 * KIB)))
    user = user_of(graph, "pre")
    model = bytearray(10 * KIB)
    for _ in range(40):
        works, taken = [], set()
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(model) + 4 * KIB)
            length = rng.randint(1, 6 * KIB)
            blocks = set(range(at // 512, (at + length) // 512 + 1))
            if blocks & taken:
                continue
            taken |= blocks
            model.extend(bytes(max(0, at + length - len(model))))
            if rng.random() < 0.6:
                data = rng.randbytes(length)
                works.append(user.pwrite(at, data))
                model[at : at + length] = data
            else:
                works.append(user.pwrite_zeroes(at, length))
                model[at : at + length] = bytes(length)
        await asyncio.gather(*works)
        if rng.random() < 0.2:
            size = rng.randrange(len(model) // 2, len(model) + 30 * KIB)
            await user.truncate(size, preallocation="off")
            model = model[:size] + bytes(max(0, size - len(model)))
        assert graph.find_node("pre").size == len(model)
        assert await user.pread(0, len(model)) == model
    await graph.close_all()
    assert (tmp_path / "disk").read_bytes() == model


async def test_qcow2_above_it_is_whole_afterwards(tmp_path: Path) -> None:
    graph = await opened(tmp_path, align=1 << 20, ahead=4 << 20)
    maker = user_of(graph, "pre")
    await create_qcow2(maker, size=8 << 20, cluster_size=4096)
    await maker.remove()
    await graph.blockdev_add({"driver": "qcow2", "node-name": "q", "file": "pre"})
    user = user_of(graph, "q", Perm.CONSISTENT_READ | Perm.WRITE)
    data = random.Random(1).randbytes(2 << 20)
    await user.pwrite(12345, data)
    assert (tmp_path / "disk").stat().st_size >= 5 << 20
    result = await graph.find_node("q").check(fix_leaks=False, fix_errors=False)
    assert (result.corruptions, result.leaks) == (0, 0)
    await graph.close_all()
    assert (tmp_path / "disk").stat().st_size < 3 << 20
    discover(("drivers",))
    again = Graph(ObjectTree(), EventBus())
    tree = {"driver": "file", "filename": str(tmp_path / "disk")}
    await again.blockdev_add({"driver": "qcow2", "node-name": "q", "file": tree})
    assert await user_of(again, "q", Perm.CONSISTENT_READ).pread(12345, len(data)) == data
    await again.close_all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prealloc-align": 1000}, "prealloc-align parameter of preallocate filter is not aligned to 512"),
        ({"prealloc-align": -1}, "Value '-1' is out of range for parameter 'prealloc-align'"),
        ({"prealloc-size": -1}, "Value '-1' is out of range for parameter 'prealloc-size'"),
        (
            {"prealloc-align": 512},
            "prealloc-align parameter of preallocate filter is not aligned to underlying node request alignment (4096)",
        ),
    ],
)
async def test_refusals(tmp_path: Path, options: dict[str, int], message: str) -> None:
    graph = await opened(tmp_path)
    await graph.blockdev_add({"driver": "blkdebug", "node-name": "wide", "image": "file", "align": 4096})
    with pytest.raises(CommandError) as caught:
        await graph.blockdev_add({"driver": "preallocate", "node-name": "two", "file": "wide"} | options)
    assert str(caught.value) == message
    await graph.close_all()
