"""The graph: names, permissions, and changes that leave nothing behind when they fail."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.graph import Graph
from qmpd.block.info import debug_graph
from qmpd.block.perm import Perm
from qmpd.errors import CommandError, PermissionConflict
from qmpd.events import EventBus
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree

NULL = {"driver": "null-co", "size": 1 << 20}


@pytest.fixture
def graph() -> Graph:
    discover(("drivers",))
    return Graph(ObjectTree(), EventBus())


@pytest.fixture
def image(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(1 << 20))
    before = len(os.listdir("/proc/self/fd"))
    yield str(path)
    assert len(os.listdir("/proc/self/fd")) <= before, "a descriptor was left open"


def snapshot(graph: Graph) -> Any:
    return debug_graph(graph), [(n.name, n.perm, n.shared) for n in graph.nodes()]


async def add(graph: Graph, **tree: Any) -> None:
    await graph.blockdev_add({key.replace("_", "-"): value for key, value in tree.items()})


def backend(graph: Graph, perm: Perm, shared: Perm) -> BlockBackend:
    return BlockBackend(graph, lambda: "an unnamed block device", perm, shared)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("1a", "Invalid node-name: '1a'"),
        ("", "Invalid node-name: ''"),
        ("é", "Invalid node-name: 'é'"),
        ("b" * 32, "Node name too long"),
        ("taken", "Duplicate nodes with node-name='taken'"),
    ],
)
async def test_a_bad_node_name_is_refused(graph: Graph, name: str, text: str) -> None:
    await add(graph, **NULL, node_name="taken")
    with pytest.raises(CommandError, match=rf"^{text}$"):
        await add(graph, **NULL, node_name=name)
    assert [node.name for node in graph.nodes()] == ["taken"]


async def test_a_name_whose_opening_failed_can_be_used_again(graph: Graph) -> None:
    await add(graph, **NULL, node_name="n")
    with pytest.raises(CommandError, match="cannot be greater than size"):
        await add(graph, driver="raw", node_name="r", file="n", offset=2 << 20)
    await add(graph, driver="raw", node_name="r", file="n")


async def test_an_inline_child_goes_with_its_parent_and_not_before(graph: Graph) -> None:
    await add(graph, driver="raw", node_name="a", file={"driver": "raw", "node-name": "b", "file": NULL})
    with pytest.raises(CommandError, match=r"^Node b is not owned by the monitor$"):
        await graph.blockdev_del("b")
    await graph.blockdev_del("a")
    assert graph.nodes() == []


async def test_a_tree_that_fails_at_its_root_leaves_no_child_behind(graph: Graph, image: str) -> None:
    file = {"driver": "file", "filename": image, "node-name": "inner"}
    with pytest.raises(CommandError, match="not multiple of 512"):
        await add(graph, driver="raw", node_name="r", size=1000, file=file)
    assert graph.nodes() == []


async def test_a_conflict_names_the_node_both_parents_and_the_permissions(graph: Graph) -> None:
    await add(graph, **NULL, node_name="n")
    first = backend(graph, Perm.CONSISTENT_READ | Perm.WRITE, Perm.CONSISTENT_READ)
    first.insert(graph.find_node("n"))
    second = backend(graph, Perm.WRITE | Perm.RESIZE, Perm.ALL)
    before = snapshot(graph)
    with pytest.raises(PermissionConflict) as caught:
        second.insert(graph.find_node("n"))
    assert str(caught.value) == (
        "Permission conflict on node 'n': permissions 'write, resize' are both required by an unnamed block device "
        "(uses node 'n' as 'root' child) and unshared by an unnamed block device (uses node 'n' as 'root' child)."
    )
    assert snapshot(graph) == before
    assert second.node is None


async def test_write_permission_is_taken_when_it_is_needed_and_passes_through_raw(graph: Graph, image: str) -> None:
    await add(graph, driver="file", node_name="f", filename=image, read_only=True)
    await add(graph, driver="raw", node_name="r", file="f")
    writer = backend(graph, Perm.WRITE, Perm.ALL)
    before = snapshot(graph)
    with pytest.raises(CommandError, match=r"^Block node is read-only$"):
        writer.insert(graph.find_node("r"))
    assert snapshot(graph) == before
    await graph.close_all()


async def test_image_locks_exclude_a_second_writer_of_the_same_file(graph: Graph, image: str) -> None:
    for name in ("f", "g"):
        await add(graph, driver="file", node_name=name, filename=image)
    one, two = (backend(graph, Perm.WRITE, Perm.CONSISTENT_READ) for _ in range(2))
    one.insert(graph.find_node("f"))
    with pytest.raises(CommandError, match=r'^Failed to get "write" lock$'):
        two.insert(graph.find_node("g"))
    await one.remove()
    two.insert(graph.find_node("g"))
    await graph.close_all()


async def test_auto_read_only_opens_for_writing_only_when_somebody_writes(graph: Graph, image: str) -> None:
    await add(graph, driver="file", node_name="f", filename=image, auto_read_only=True)
    writer = backend(graph, Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
    writer.insert(graph.find_node("f"))
    await writer.pwrite(512, b"x" * 512)
    assert await writer.pread(510, 4) == b"\0\0xx"
    await graph.close_all()
    assert Path(image).read_bytes()[512:1024] == b"x" * 512


async def test_requests_beyond_the_end_fail_and_the_others_of_the_batch_go_on(graph: Graph) -> None:
    from qmpd.block.batch import Batch, Request

    await add(graph, **NULL, node_name="n")
    user = backend(graph, Perm.CONSISTENT_READ, Perm.ALL)
    user.insert(graph.find_node("n"))
    inside, beyond = (Request(at, memoryview(bytearray(b"?" * 512))) for at in (0, (1 << 20) - 256))
    await user.preadv(Batch([inside, beyond]))
    assert (inside.error, beyond.error) == (0, 5)
    assert bytes(inside.view) == bytes(512)
    await graph.close_all()


async def test_a_request_that_waits_when_its_backend_is_removed_finds_no_medium(graph: Graph) -> None:
    await add(graph, **NULL, node_name="n", latency_ns=20_000_000)
    user = backend(graph, Perm.CONSISTENT_READ, Perm.ALL)
    user.insert(graph.find_node("n"))
    first = asyncio.ensure_future(user.pread(0, 512))
    await asyncio.sleep(0.005)
    removal = asyncio.ensure_future(user.remove())
    await asyncio.sleep(0.005)
    late = asyncio.ensure_future(user.pread(0, 512))
    await removal
    assert await first == bytes(512)
    with pytest.raises(OSError, match="medium"):
        await late
    await graph.close_all()


async def test_a_drained_backend_holds_new_requests_until_the_drain_ends(graph: Graph) -> None:
    await add(graph, **NULL, node_name="n")
    user = backend(graph, Perm.CONSISTENT_READ, Perm.ALL)
    user.insert(graph.find_node("n"))
    async with graph.drained(graph.find_node("n")):
        held = asyncio.ensure_future(user.pread(0, 512))
        await asyncio.sleep(0.01)
        assert not held.done()
    assert await held == bytes(512)
    await graph.close_all()
