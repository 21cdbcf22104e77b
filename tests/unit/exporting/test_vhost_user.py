"""vhost-user-blk exports over scripted nodes: what reaches the node, and what a machine sees meanwhile."""

from __future__ import annotations

import asyncio
import errno
import importlib
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from qmpd.block.batch import WriteFlags
from qmpd.errors import CommandError
from tests.support.peers import need
from tests.support.vhost_driver import DISCARD, FLUSH, IN, IOERR, OK, OUT, SET_CONFIG, ZEROES, Driver
from tests.unit.exporting.rig import Rig

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _compiled() -> None:
    need("module:qmpd.aio._guest_memory")


async def export(rig: Rig, tmp_path: Path, **members: object) -> Path:
    importlib.import_module("qmpd.exports.vhost_user_blk")
    sock = tmp_path / "v.sock"
    wire = {key.replace("_", "-"): value for key, value in members.items()}
    address = {"type": "unix", "path": str(sock)}
    await rig.exports.add({"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": address, **wire})
    return sock


async def use(rig: Rig, sock: Path, work: Callable[[Driver], T]) -> T:
    """Run a driver's blocking work beside the loop of the test."""

    def run() -> T:
        disk = Driver(sock)
        try:
            return work(disk)
        finally:
            disk.close()

    return await rig.in_thread(run)


async def test_writes_are_durable_where_there_is_no_cache(rig: Rig, tmp_path: Path) -> None:
    """`writethrough`, or the machine's word; zero writes as well."""
    node = rig.add_node("n")
    sock = await export(rig, tmp_path, writable=True)

    def work(disk: Driver) -> None:
        assert disk.request(OUT, 0, b"x" * 512)[0] == OK
        assert disk.wire.acknowledged(SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\0") == 0
        assert disk.request(OUT, 1, b"x" * 512)[0] == OK
        assert disk.request(ZEROES, 2, struct.pack("<QII", 2, 1, 1))[0] == OK

    await use(rig, sock, work)
    changed = [entry for entry in node.log if entry[0] in ("write", "zero")]
    fua, unmap = WriteFlags.FUA, WriteFlags.MAY_UNMAP
    assert [entry[-1] for entry in changed] == [WriteFlags.NONE, fua, fua | unmap]


async def test_requests_that_are_there_together_are_one_batch(rig: Rig, tmp_path: Path) -> None:
    node = rig.add_node("n")
    sock = await export(rig, tmp_path, writable=True)

    def work(disk: Driver) -> None:
        ring = disk.rings[0]
        for slot in range(8):
            disk.begin(ring, slot, IN if slot % 2 else OUT, slot, 512 if slot % 2 else b"x" * 512)
        disk.kick(ring)
        disk.wait(ring, 8)

    await use(rig, sock, work)
    assert [(entry[0], len(entry[1])) for entry in node.log if entry[0] in ("read", "write")] == [
        ("read", 4),
        ("write", 4),
    ]


@pytest.mark.parametrize(
    ("kind", "request_type", "data"),
    [
        ("read", IN, 512),
        ("write", OUT, b"x" * 512),
        ("flush", FLUSH, b""),
        ("zero", ZEROES, struct.pack("<QII", 0, 1, 0)),
        ("discard", DISCARD, struct.pack("<QII", 0, 1, 0)),
    ],
)
async def test_what_fails_is_an_error_of_that_request(
    rig: Rig, tmp_path: Path, kind: str, request_type: int, data: bytes | int
) -> None:
    """And memory of the machine that was to be filled stays as it was."""
    node = rig.add_node("n")
    node.errors[kind] = errno.EIO
    sock = await export(rig, tmp_path, writable=True)

    def work(disk: Driver) -> tuple[int, bytes]:
        found = disk.request(request_type, 0, data)
        assert disk.wire.is_open()
        return found

    status, left = await use(rig, sock, work)
    assert status == IOERR
    assert left == (data if isinstance(data, bytes) else b"\xaa" * data)


async def test_data_is_taken_once_and_shown_only_when_it_is_whole(rig: Rig, tmp_path: Path) -> None:
    """A machine that changes its memory during a request changes nothing: its disk may be encrypted in between."""
    node = rig.add_node("n")
    node.data[:512] = b"r" * 512
    sock = await export(rig, tmp_path, writable=True)
    gate = node.gate = await rig.on_data_loop(asyncio.Event)

    def work(disk: Driver) -> list[tuple[int, bytes]]:
        ring = disk.rings[0]
        write = disk.begin(ring, 0, OUT, 8, b"w" * 512)
        read = disk.begin(ring, 1, IN, 0, 512)
        disk.kick(ring)
        while node.active < 2:
            threading.Event().wait(0.01)
        disk.memory[write.data : write.data + 512] = b"!" * 512
        assert disk.result(read)[1] == b"\xaa" * 512
        rig.loop.loop.call_soon_threadsafe(gate.set)
        disk.wait(ring, 2)
        return [disk.result(write), disk.result(read)]

    written, read = await use(rig, sock, work)
    assert bytes(node.data[8 * 512 : 9 * 512]) == b"w" * 512
    assert (written[0], read) == (OK, (OK, b"r" * 512))


async def test_a_ring_is_stopped_after_what_is_under_way(rig: Rig, tmp_path: Path) -> None:
    """GET_VRING_BASE is answered when the memory is not used any more."""
    node = rig.add_node("n")
    sock = await export(rig, tmp_path, writable=True)
    gate = node.gate = await rig.on_data_loop(asyncio.Event)

    def work(disk: Driver) -> tuple[int, tuple[int, bytes]]:
        pending = disk.begin(disk.rings[0], 0, IN, 0, 512)
        disk.kick(disk.rings[0])
        while not node.active:
            threading.Event().wait(0.01)
        timer = threading.Timer(0.2, lambda: rig.loop.loop.call_soon_threadsafe(gate.set))
        timer.start()
        base = disk.stop(disk.rings[0])
        assert gate.is_set()
        return base, disk.result(pending)

    assert await use(rig, sock, work) == (1, (OK, bytes(512)))


async def test_a_machine_that_goes_leaves_nothing_under_way(rig: Rig, tmp_path: Path) -> None:
    """Its requests end before its memory is given up, and the export can go then."""
    node = rig.add_node("n")
    sock = await export(rig, tmp_path, writable=True)
    gate = node.gate = await rig.on_data_loop(asyncio.Event)

    def work(disk: Driver) -> None:
        for slot in range(4):
            disk.begin(disk.rings[0], slot, IN, slot, 512)
        disk.kick(disk.rings[0])
        while not node.active:
            threading.Event().wait(0.01)

    await use(rig, sock, work)
    removal = asyncio.ensure_future(rig.exports.remove("e"))
    await asyncio.sleep(0.05)
    assert not removal.done()
    await rig.on_data_loop(gate.set)
    await removal
    assert rig.deleted() == ["e"]
    assert node.active == 0


async def test_more_than_a_machine_may_have_under_way_waits_in_its_ring(rig: Rig, tmp_path: Path) -> None:
    """The largest reads go through one after the other, and all come back."""
    rig.add_node("n", 64 << 20)
    sock = await export(rig, tmp_path)
    size = 20 << 20

    def run() -> list[tuple[int, bool]]:
        disk = Driver(sock, memory=size + (16 << 20))
        ring = disk.rings[0]
        requests = [disk.begin(ring, slot, IN, 0, size) for slot in range(5)]
        disk.kick(ring)
        disk.wait(ring, 5)
        found = [(disk.memory[one.status], disk.memory[one.data + size - 512 : one.data + size]) for one in requests]
        disk.close()
        return [(status, data == bytes(512)) for status, data in found]

    assert await rig.in_thread(run) == [(OK, True)] * 5


async def test_blocks_are_checked_before_the_socket_is_made(rig: Rig, tmp_path: Path) -> None:
    """In QEMU's order and words."""
    rig.add_node("n")
    wrong = {"logical_block_size": 1000, "num_queues": 0}
    with pytest.raises(CommandError, match="parameter logical-block-size must be a power of 2 between 512 and 2097152"):
        await export(rig, tmp_path, **wrong)
    with pytest.raises(CommandError, match="num-queues must be greater than 0"):
        await export(rig, tmp_path, num_queues=0)
    assert not (tmp_path / "v.sock").exists()
