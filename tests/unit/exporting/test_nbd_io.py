"""What NBD clients read and write through an export."""

from __future__ import annotations

import errno
import random
import struct

import pytest

from qmpd.block.batch import WriteFlags
from tests.support import nbd_wire as wire
from tests.support.nbd_wire import STYLES, Client
from tests.unit.exporting.rig import Rig

SIZE = 1 << 20


@pytest.mark.parametrize("style", STYLES)
async def test_bytes_come_back(rig: Rig, style: str) -> None:
    node = rig.add_node("n")
    await rig.serve()
    await rig.export("n", writable=True)
    client = await rig.connect(style=style)

    def work() -> None:
        client.write(4096, b"hello" * 1000)
        client.write(1, b"x")
        client.write(SIZE - 1, b"y", wire.FUA)
        assert client.read(4096, 5000) == b"hello" * 1000
        assert client.read(0, 3) == b"\0x\0"
        assert client.read(SIZE, 0) == b""
        assert not client.call(wire.FLUSH).error
        assert not client.call(wire.CACHE, 0, SIZE).error
        assert not client.call(wire.WRITE, 5, 0).error

    await rig.in_thread(work)
    assert node.data[SIZE - 1] == ord("y")
    assert [entry[2] for entry in node.log if entry[0] == "write"] == [0, 0, WriteFlags.FUA]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("delayed", [False, True])
async def test_a_random_load_with_many_requests_at_once(rig: Rig, style: str, delayed: bool) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    node = rig.add_node("n")
    model = bytearray(chance.randbytes(SIZE))
    node.data[:] = model
    if delayed:
        node.delays = random.Random(seed)
    await rig.serve()
    await rig.export("n", writable=True)
    client = await rig.connect(style=style)

    def one_round(model: bytearray) -> None:
        """Send requests whose ranges do not meet, all at once; then compare."""
        edges = sorted(chance.sample(range(SIZE // 512), 40))
        reads: dict[int, tuple[int, int]] = {}
        for cookie, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
            offset, length = start * 512 + chance.randrange(100), (end - start) * 512 - 200
            kind = chance.choice([wire.READ, wire.READ, wire.WRITE, wire.ZERO, wire.TRIM, wire.FLUSH])
            if length <= 0:
                kind = wire.FLUSH
            if kind == wire.WRITE:
                payload = chance.randbytes(length)
                client.send(kind, offset, length, chance.choice([0, wire.FUA]), cookie, payload)
                model[offset : offset + length] = payload
            elif kind == wire.FLUSH:
                client.send(kind, cookie=cookie)
            else:
                client.send(kind, offset, length, 0, cookie)
                if kind == wire.ZERO:
                    model[offset : offset + length] = bytes(length)
                if kind == wire.READ:
                    reads[cookie] = offset, length
        results = client.results(len(edges) // 2)
        assert not any(result.error for result in results.values())
        for cookie, (offset, length) in reads.items():
            assert results[cookie].data == model[offset : offset + length], f"seed {seed}"

    def work() -> None:
        for _ in range(25):
            one_round(model)
        assert client.read(0, SIZE) == model, f"seed {seed}"

    await rig.in_thread(work)


async def test_one_receive_becomes_one_batch(rig: Rig) -> None:
    node = rig.add_node("n")
    await rig.serve()
    await rig.export("n", writable=True)
    client = await rig.connect()
    stream = b"".join(wire.request(wire.READ, at * 4096, 4096, cookie=at) for at in range(32))
    stream += b"".join(wire.request(wire.WRITE, at * 512, 512, 0, 100 + at, bytes(512)) for at in range(32))
    client.socket.sendall(stream)
    results = await rig.in_thread(lambda: client.results(64))
    assert not any(result.error for result in results.values())
    assert len([kind for kind in node.kinds() if kind == "read"]) == 1
    assert len([kind for kind in node.kinds() if kind == "write"]) == 1


async def test_large_payloads(rig: Rig) -> None:
    node = rig.add_node("n", 40 << 20)
    await rig.serve()
    await rig.export("n", writable=True)
    client = await rig.connect()
    payload = random.randbytes(32 << 20)

    def work() -> None:
        client.write(3, payload)
        assert client.read(3, len(payload)) == payload

    await rig.in_thread(work)
    assert node.data[3:7] == payload[:4]


@pytest.mark.parametrize("style", ["structured", "extended"])
async def test_holes_are_neither_read_nor_sent(rig: Rig, style: str) -> None:
    node = rig.add_node("n")
    node.data[:] = random.randbytes(SIZE)
    for start, length in ((0, 65536), (131072, 4096), (200000, 100), (SIZE - 65536, 65536)):
        node.data[start : start + length] = bytes(length)
        node.holes.append((start, length))
    await rig.serve()
    await rig.export("n")
    client = await rig.connect(style=style)

    def work() -> None:
        result = client.call(wire.READ, 0, SIZE)
        assert result.data == node.data
        assert [chunk.kind for chunk in result.chunks] == [2, 1, 2, 1, 2]
        assert len(client.call(wire.READ, 0, SIZE, wire.DF).chunks) == 1
        assert [chunk.kind for chunk in client.call(wire.READ, 0, 65536).chunks] == [2]
        assert [chunk.kind for chunk in client.call(wire.READ, 1000, 4096).chunks] == [1]

    await rig.in_thread(work)
    read = sum(length for entry in node.log if entry[0] == "read" for _, length in entry[1])
    assert read == SIZE - 2 * 65536 - 4096 + SIZE + 4096


async def test_known_data_is_not_asked_about_again(rig: Rig) -> None:
    node = rig.add_node("n")
    await rig.serve()
    await rig.export("n", writable=True)
    client = await rig.connect()

    def work() -> None:
        for at in range(16):
            client.read(at * 65536, 65536)
        assert node.kinds().count("status") == 1
        node.holes.append((0, SIZE))
        assert not client.call(wire.TRIM, 0, 65536).error
        assert [chunk.kind for chunk in client.call(wire.READ, 0, SIZE).chunks] == [2]

    await rig.in_thread(work)


async def test_zeroes_and_discards(rig: Rig) -> None:
    node = rig.add_node("n")
    await rig.serve()
    await rig.export("n", writable=True)
    client = await rig.connect()

    def work() -> None:
        for flags in (0, wire.NO_HOLE, wire.FAST_ZERO, wire.FUA | wire.NO_HOLE):
            assert not client.call(wire.ZERO, 512, 512, flags).error
        assert not client.call(wire.TRIM, 0, 1024).error
        assert not client.call(wire.TRIM, 0, 1024, wire.FUA).error

    await rig.in_thread(work)
    unmap, fast, fua = WriteFlags.MAY_UNMAP, WriteFlags.NO_FALLBACK, WriteFlags.FUA
    assert [entry[3] for entry in node.log if entry[0] == "zero"] == [unmap, 0, unmap | fast, fua]
    assert node.kinds()[-3:] == ["discard", "discard", "flush"]


async def test_writethrough_makes_everything_durable(rig: Rig) -> None:
    node = rig.add_node("n")
    await rig.serve()
    await rig.export("n", writable=True, writethrough=True)
    client = await rig.connect()

    def work() -> None:
        client.write(0, b"x")
        assert not client.call(wire.ZERO, 0, 512).error
        assert not client.call(wire.TRIM, 0, 512).error

    await rig.in_thread(work)
    assert node.log[0][2] == WriteFlags.FUA
    assert node.log[1][3] == WriteFlags.FUA | WriteFlags.MAY_UNMAP
    assert node.kinds()[-1] == "flush"


def extents(result: wire.Result, wide: bool) -> list[list[tuple[int, int]]]:
    found = []
    for chunk in result.chunks:
        body = chunk.data[8:] if wide else chunk.data[4:]
        numbers = struct.unpack(f">{len(body) // (8 if wide else 4)}{'Q' if wide else 'I'}", body)
        found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


@pytest.mark.parametrize("style", ["structured", "extended"])
async def test_block_status(rig: Rig, style: str) -> None:
    node = rig.add_node("n")
    node.holes = [(65536, 4096)]
    await rig.serve()
    await rig.export("n", allocation_depth=True)
    client = await rig.connect(style=style, contexts=(b"base:allocation", b"qemu:allocation-depth"))
    wide = style == "extended"

    def work() -> None:
        whole = client.call(wire.STATUS, 0, SIZE)
        assert [chunk.data[:4] for chunk in whole.chunks] == [b"\0\0\0\0", b"\0\0\0\1"]
        assert extents(whole, wide) == [[(65536, 0), (4096, 3), (SIZE - 69632, 0)], [(SIZE, 1)]]
        assert extents(client.call(wire.STATUS, 65536, SIZE - 65536, wire.REQ_ONE), wide) == [
            [(4096, 3)],
            [(SIZE - 65536, 1)],
        ]
        assert client.call(wire.STATUS, 0, 0).error == errno.EINVAL

    await rig.in_thread(work)


# errors


@pytest.mark.parametrize(
    ("raised", "answered"), [(errno.ENOSPC, 28), (errno.EIO, 5), (errno.EDQUOT, 28), (errno.EBADF, 5)]
)
async def test_errors_of_the_node_reach_the_client(rig: Rig, raised: int, answered: int) -> None:
    node = rig.add_node("n")
    await rig.serve()
    await rig.export("n", writable=True)
    client = await rig.connect(contexts=(b"base:allocation",))
    node.errors = dict.fromkeys(("read", "write", "flush", "discard", "zero", "status"), raised)

    def work() -> None:
        results = [
            client.call(wire.READ, 0, 512),
            client.call(wire.READ, 0, 65536),
            client.call(wire.WRITE, 0, 3, payload=b"abc"),
            client.call(wire.FLUSH),
            client.call(wire.TRIM, 0, 512),
            client.call(wire.ZERO, 0, 512),
            client.call(wire.CACHE, 0, 512),
            client.call(wire.STATUS, 0, 512),
        ]
        assert [result.error for result in results] == [answered] * len(results)
        assert [result.chunks[-1].text for result in results] == [
            "reading from file failed",
            "reading from file failed",
            "writing to file failed",
            "flush failed",
            "discard failed",
            "writing to file failed",
            "caching data failed",
            "can't get block status",
        ]
        node.errors = {}
        client.read(0, 512)

    await rig.in_thread(work)


async def test_one_bad_request_does_not_spoil_its_batch(rig: Rig) -> None:
    node = rig.add_node("n")
    await rig.serve()
    await rig.export("n", writable=True)
    client = await rig.connect()
    node.bad_offsets = {4096: errno.EIO, 8192: errno.ENOSPC}
    stream = b"".join(wire.request(wire.READ, at * 4096, 4096, cookie=at) for at in range(4))
    stream += b"".join(wire.request(wire.WRITE, at * 4096, 4096, 0, 10 + at, bytes(4096)) for at in range(4))
    client.socket.sendall(stream)
    results = await rig.in_thread(lambda: client.results(8))
    assert {cookie: result.error for cookie, result in results.items()} == {
        0: 0, 1: 5, 2: 28, 3: 0, 10: 0, 11: 5, 12: 28, 13: 0,
    }  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
async def test_refused_requests_are_answered_and_the_session_goes_on(rig: Rig, style: str) -> None:
    rig.add_node("n", read_only=True)
    await rig.serve()
    await rig.export("n")
    client = await rig.connect(style=style)

    def work() -> None:
        assert client.call(wire.WRITE, 0, 3, payload=b"abc").error == errno.EPERM
        assert client.call(wire.TRIM, 0, 512).error == errno.EPERM
        assert client.call(wire.ZERO, 0, 512).error == errno.EPERM
        assert client.call(wire.READ, SIZE, 1).error == errno.EINVAL
        assert client.call(99, 0, 1).error == errno.EINVAL
        assert client.read(0, 512) == bytes(512)

    await rig.in_thread(work)


async def test_what_the_client_is_told(rig: Rig) -> None:
    rig.add_node("n", 12345)
    await rig.serve()
    await rig.export("n", writable=True, name="w", description="two words")
    await rig.export("n", "r", name="r")

    def work() -> None:
        with Client(rig.path) as client:
            assert client.ask(wire.LIST)[0] == (2, b"\0\0\0\1wtwo words")
            client.go(b"w", "simple")
            assert (client.size, client.flags) == (12345, 0xD6D)
        with Client(rig.path) as client:
            client.go(b"r", "structured")
            assert (client.size, client.flags) == (12345, 0x58F)

    await rig.in_thread(work)
