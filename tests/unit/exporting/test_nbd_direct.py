"""Reads and writes that go the short way: the same bytes, the same counters, and only where nothing is in the way."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from qmpd.aio.disk import DiskFile
from qmpd.block import dirty_bitmap
from qmpd.block.batch import Batch, WriteFlags
from qmpd.block.direct import DirectRead
from qmpd.block.graph import Graph
from qmpd.block.options import NodeOptions
from qmpd.crypto.block import BlockCrypto
from qmpd.crypto.cipher import CipherSpec, extents_work
from tests.support import nbd_wire as wire
from tests.support.nbd_wire import STYLES
from tests.unit.exporting.rig import Rig, ScriptedNode

SIZE = 4 << 20
KEY = bytes(range(64))
SHIFT = 4096

pytestmark = pytest.mark.skipif(not extents_work(), reason="the compiled engine is not built")


class StoredNode(ScriptedNode):
    """Plain bytes for the long way, and their ciphertext in a file for the short one.

    With `scattered`, every second 64 KiB lie elsewhere and cannot be told in one piece with the next.
    """

    def __init__(self, graph: Graph, name: str, path: Path, *, scattered: bool = False) -> None:
        super().__init__(graph, name, SIZE)
        self.node_options = NodeOptions(node_name=name, read_only=False, discard="unmap")
        self.data[:] = random.Random(name).randbytes(SIZE)
        self.scattered = scattered
        crypto = BlockCrypto(CipherSpec("aes", "xts", "plain64", None, 64), KEY)
        stored = bytearray(self.data)
        crypto.encrypt([(0, memoryview(stored), memoryview(stored))])
        path.write_bytes(bytes(SHIFT) + bytes(stored))
        self.disk = DiskFile(os.open(path, os.O_RDONLY))
        self.crypto = crypto
        self.request_alignment = 512

    def direct_read(self) -> DirectRead | None:
        below: DirectRead | None = DirectRead(self.disk)
        if self.scattered:
            below = DirectRead(self.disk).mapped(self._locate)
        assert below is not None
        return below.decrypted(self.crypto, SHIFT)

    def _locate(self, offset: int, length: int) -> int:
        return offset if (offset - SHIFT) // 65536 == (offset - SHIFT + length - 1) // 65536 else -1


async def serve(rig: Rig, tmp_path: Path, **how: bool) -> StoredNode:
    node = StoredNode(rig.graph, rig.graph.reserve("n"), tmp_path / "stored", **how)
    node.sequence = rig.graph.next_sequence()
    rig.graph.publish(node)
    node.monitor_owned = True
    await rig.serve()
    await rig.export("n", writable=True)
    return node


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scattered", [False, True])
async def test_many_reads_at_once(rig: Rig, tmp_path: Path, style: str, scattered: bool) -> None:
    node = await serve(rig, tmp_path, scattered=scattered)
    client = await rig.connect(style=style)
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)

    def work() -> None:
        for _ in range(20):
            wanted = {}
            for cookie in range(chance.choice((1, 7, 40))):  # more, and both sides wait for the other to read
                unit = chance.choice((1, 512, 512, 4096, 4096, 4096))
                length = unit * chance.randint(1, min(400, (1 << 20) // unit))
                offset = chance.randrange((SIZE - length) // unit + 1) * unit
                length = min(length, 65536) if len(wanted) > 10 else length
                wanted[cookie] = (offset, length)
                client.send(wire.READ, offset, length, cookie=cookie)
            found = client.results(len(wanted))
            for cookie, (offset, length) in wanted.items():
                assert found[cookie].data == node.data[offset : offset + length], f"seed {seed}"

    await rig.in_thread(work)


async def test_no_way_through_the_node_is_taken(rig: Rig, tmp_path: Path) -> None:
    node = await serve(rig, tmp_path)
    client = await rig.connect(style="simple")
    assert await rig.in_thread(lambda: client.read(4096, 8192)) == node.data[4096 : 4096 + 8192]
    assert "read" not in node.kinds()
    stats = rig.graph.backends[-1].stats
    assert (stats.rd_operations, stats.rd_bytes, stats.failed_rd_operations) == (1, 8192, 0)


async def test_what_the_file_does_not_have_is_read_the_long_way(rig: Rig, tmp_path: Path) -> None:
    node = await serve(rig, tmp_path)
    os.truncate(tmp_path / "stored", SHIFT + 100_000)
    client = await rig.connect(style="simple")

    def work() -> None:
        for cookie, offset in enumerate((0, 65536, 98304, 131072)):
            client.send(wire.READ, offset, 4096, cookie=cookie)
        found = client.results(4)
        for cookie, offset in enumerate((0, 65536, 98304, 131072)):
            assert found[cookie].data == node.data[offset : offset + 4096]

    await rig.in_thread(work)
    assert [entry[1] for entry in node.log if entry[0] == "read"] == [[(98304, 4096), (131072, 4096)]]


async def test_unaligned_reads_and_those_beyond_the_end(rig: Rig, tmp_path: Path) -> None:
    node = await serve(rig, tmp_path)
    client = await rig.connect(style="structured")

    def work() -> None:
        assert client.read(1, 4096) == node.data[1:4097]
        assert client.call(wire.READ, SIZE - 4096, 8192).error
        assert client.read(SIZE - 4096, 4096) == node.data[-4096:]

    await rig.in_thread(work)


async def test_a_change_of_the_graph_is_noticed(rig: Rig, tmp_path: Path) -> None:
    node = await serve(rig, tmp_path)
    client = await rig.connect(style="simple")
    await rig.in_thread(lambda: client.read(0, 512))
    node.crypto = BlockCrypto(CipherSpec("aes", "xts", "plain64", None, 64), bytes(reversed(KEY)))
    with rig.graph.change() as tran:
        tran.touch(node)
    plain = bytearray(node.data[:512])
    BlockCrypto(CipherSpec("aes", "xts", "plain64", None, 64), KEY).encrypt([(0, plain, plain)])
    node.crypto.decrypt([(0, plain, plain)])
    assert await rig.in_thread(lambda: client.read(0, 512)) == plain


async def test_a_throttled_backend_takes_the_long_way(rig: Rig, tmp_path: Path) -> None:
    node = await serve(rig, tmp_path)
    client = await rig.connect(style="simple")
    rig.graph.backends[-1].set_throttle("g", {"iops-total": 1_000_000})
    assert await rig.in_thread(lambda: client.read(0, 512)) == node.data[:512]
    assert node.kinds().count("read") == 1


class WrittenNode(StoredNode):
    """The same, but what is written the long way ends in the file as well."""

    def __init__(self, graph: Graph, name: str, path: Path) -> None:
        super().__init__(graph, name, path)
        self.path = path
        self.disk = DiskFile(os.open(path, os.O_RDWR))

    async def pwritev(self, batch: Batch, flags: WriteFlags) -> None:
        await super().pwritev(batch, flags)
        for request in batch:
            stored = bytearray(request.view)
            self.crypto.encrypt([(request.offset // 512, memoryview(stored), memoryview(stored))])
            os.pwrite(self.disk.fd, stored, SHIFT + request.offset)

    def direct_write(self) -> DirectRead | None:
        return self.direct_read()

    async def preadv(self, batch: Batch) -> None:
        content = self.content()
        for request in batch:
            request.view[:] = content[request.offset : request.end]

    def content(self) -> bytes:
        stored = bytearray(self.path.read_bytes()[SHIFT:])
        self.crypto.decrypt([(0, memoryview(stored), memoryview(stored))])
        return bytes(stored)


async def written(rig: Rig, tmp_path: Path, **how: Any) -> WrittenNode:
    node = WrittenNode(rig.graph, rig.graph.reserve("n"), tmp_path / "stored")
    node.sequence = rig.graph.next_sequence()
    rig.graph.publish(node)
    node.monitor_owned = True
    await rig.serve()
    await rig.export("n", writable=True, **how)
    return node


@pytest.mark.parametrize("style", STYLES)
async def test_many_writes_at_once(rig: Rig, tmp_path: Path, style: str) -> None:
    """Of all sizes, aligned and not, durable and not: the file holds their ciphertext."""
    node = await written(rig, tmp_path)
    client = await rig.connect(style=style)
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    model = bytearray(node.data)

    def work() -> None:
        for _ in range(20):
            count = chance.choice((1, 7, 60))
            area = SIZE // count // 4096 * 4096
            for cookie in range(count):  # none meets another
                unit = chance.choice((1, 512, 512, 4096, 4096, 4096))
                length = min(unit * chance.randint(1, 100), area - 4096)
                offset = cookie * area + chance.randrange((area - length) // unit + 1) * unit
                data = chance.randbytes(length)
                model[offset : offset + length] = data
                flags = wire.FUA if chance.random() < 0.1 else 0
                client.send(wire.WRITE, offset, length, flags, cookie, data)
            assert not any(one.error for one in client.results(count).values())

    await rig.in_thread(work)
    assert node.content() == model, f"seed {seed}"
    assert "write" in node.kinds()  # the unaligned ones


async def test_plain_writes_pass_the_node_by(rig: Rig, tmp_path: Path) -> None:
    node = await written(rig, tmp_path)
    client = await rig.connect(style="simple")

    def work() -> None:
        client.write(4096, b"x" * 8192)
        client.write(1 << 20, b"y" * (1 << 20))

    await rig.in_thread(work)
    assert "write" not in node.kinds()
    assert node.content()[4096:12288] == b"x" * 8192
    assert node.content()[1 << 20 : 2 << 20] == b"y" * (1 << 20)
    stats = rig.graph.backends[-1].stats
    assert (stats.wr_operations, stats.wr_bytes, stats.failed_wr_operations) == (2, 8192 + (1 << 20), 0)
    assert node.wr_highest_offset == 2 << 20


async def test_a_bitmap_that_looks_on_is_told_of_every_write(rig: Rig, tmp_path: Path) -> None:
    node = await written(rig, tmp_path)
    client = await rig.connect(style="simple")
    bitmap = dirty_bitmap.create(node, "b", 65536)
    await rig.in_thread(lambda: client.write(65536, b"x" * 4096))
    assert [*bitmap.dirty_areas()] == [(65536, 65536)]
    assert node.content()[65536 : 65536 + 4096] == b"x" * 4096


async def test_a_threshold_is_told_of(rig: Rig, tmp_path: Path) -> None:
    node = await written(rig, tmp_path)
    client = await rig.connect(style="simple")
    node.write_threshold = 8192
    await rig.in_thread(lambda: client.write(8192, b"x" * 4096))
    await asyncio.sleep(0.05)
    assert [event.name for event in rig.events] == ["BLOCK_WRITE_THRESHOLD"]


@pytest.mark.parametrize("how", ["fua", "writethrough", "busy", "throttled"])
async def test_what_is_out_of_the_ordinary_goes_the_long_way(rig: Rig, tmp_path: Path, how: str) -> None:
    node = await written(rig, tmp_path, writethrough=how == "writethrough")
    client = await rig.connect(style="simple")
    mine = []
    if how == "busy":
        mine = await node.ranges.acquire([(1 << 20, 2 << 20, True)])
    elif how == "throttled":
        rig.graph.backends[-1].set_throttle("g", {"iops-total": 1_000_000})
    flags = wire.FUA if how == "fua" else 0
    await rig.in_thread(lambda: client.write(0, b"x" * 512, flags))
    assert node.kinds().count("write") == 1
    assert node.content()[:512] == b"x" * 512
    node.ranges.release(mine)


async def test_a_file_that_is_shorter_than_the_node_grows_the_long_way(rig: Rig, tmp_path: Path) -> None:
    node = await written(rig, tmp_path)
    os.truncate(node.path, SHIFT + 100_000)
    node.disk.refresh_size()
    client = await rig.connect(style="simple")
    await rig.in_thread(lambda: client.write(98304, b"x" * 4096))
    assert node.kinds().count("write") == 1
    assert node.content()[98304:102400] == b"x" * 4096
