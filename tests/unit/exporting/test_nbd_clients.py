"""NBD clients that come and go, lie, stall and break off; and exports that go away under them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import struct

import pytest

from qmpd.exporting import nbd_connection
from qmpd.exporting.nbd_server import Limits
from tests.support import nbd_wire as wire
from tests.support.nbd_wire import Client, info_data, option
from tests.unit.exporting.rig import Rig, ScriptedNode

SIZE = 1 << 20


async def served(rig: Rig, **how: object) -> ScriptedNode:
    node = rig.add_node("n")
    await rig.serve(**how)
    await rig.export("n", writable=True)
    return node


def conversation() -> bytes:
    """Return all that a small client sends."""
    stream = b"\0\0\0\3" + option(wire.STRUCTURED) + option(wire.GO, info_data(b"n", 3))
    stream += wire.request(wire.WRITE, 0, 1000, 0, 1, bytes(1000)) + wire.request(wire.READ, 0, 70000, cookie=2)
    return stream + wire.request(wire.FLUSH, cookie=3) + wire.request(wire.DISC)


async def test_a_client_may_break_off_after_any_byte(rig: Rig) -> None:
    await served(rig)
    stream = conversation()

    def work() -> None:
        for length in [*range(120), *range(120, len(stream), 37), len(stream)]:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(rig.path)
                sock.sendall(stream[:length])
                if length % 3 == 0:
                    sock.shutdown(socket.SHUT_WR)

    before = len(os.listdir("/proc/self/fd"))
    await rig.in_thread(work)
    await rig.until(lambda: rig.connections == 0 and len(os.listdir("/proc/self/fd")) <= before)
    client = await rig.connect()
    assert await rig.in_thread(lambda: client.read(0, 4)) == bytes(4)


async def test_a_stream_in_single_bytes_is_understood(rig: Rig) -> None:
    await served(rig)

    def work() -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(20)
            sock.connect(rig.path)
            received = b""
            for byte in conversation():
                sock.sendall(bytes((byte,)))
            while data := sock.recv(1 << 16):
                received += data
            return received

    received = await rig.in_thread(work)
    assert received.endswith(struct.pack(">IIQ", 0x67446698, 0, 3)) or struct.pack(">IIQ", 0x67446698, 0, 3) in received


async def test_requests_sent_along_with_the_last_option_are_answered(rig: Rig) -> None:
    """Regression: what came in one piece with NBD_OPT_GO was decoded and then forgotten."""
    await served(rig)

    def work() -> None:
        with Client(rig.path) as client:
            go = option(wire.STRUCTURED) + option(wire.GO, info_data(b"n", 3))
            client.socket.sendall(go + wire.request(wire.READ, 0, 512, cookie=1) + wire.request(99, cookie=2))
            for _ in range(4):  # STRUCTURED's ACK; two INFO and the ACK of GO
                head = client.receive(20)
                client.receive(struct.unpack(">I", head[16:])[0])
            client.style = "structured"
            assert {cookie: one.error for cookie, one in client.results(2).items()} == {1: 0, 2: errno.EINVAL}

    await rig.in_thread(work)


async def test_what_was_asked_before_a_disconnect_is_answered(rig: Rig) -> None:
    node = await served(rig)
    client = await rig.connect()
    node.gate = asyncio.Event()
    client.socket.sendall(
        wire.request(wire.READ, 0, 512, cookie=1) + wire.request(wire.WRITE, 0, 1, 0, 2, b"x") + wire.request(wire.DISC)
    )
    await rig.until(lambda: node.active == 2)
    await rig.on_data_loop(node.gate.set)
    results = await rig.in_thread(lambda: client.results(2))
    assert not any(result.error for result in results.values())
    with pytest.raises(EOFError):
        await rig.in_thread(lambda: client.receive(1))


async def test_a_client_that_is_gone_leaves_its_writes_to_end(rig: Rig) -> None:
    node = await served(rig)
    client = await rig.connect()
    node.gate = asyncio.Event()
    client.send(wire.WRITE, 0, 5, payload=b"hello")
    await rig.until(lambda: node.active == 1)
    client.close()
    await asyncio.sleep(0.05)
    assert rig.connections == 1
    await rig.on_data_loop(node.gate.set)
    await rig.until(lambda: rig.connections == 0)
    assert node.data[:5] == b"hello"


async def test_slow_handshakes_are_ended(rig: Rig) -> None:
    await served(rig, limits=Limits(handshake_seconds=0.2))

    def work() -> None:
        with Client(rig.path) as idle, Client(rig.path) as busy:
            busy.go(b"n")
            with pytest.raises(EOFError):
                idle.receive(1)
            assert busy.read(0, 4) == bytes(4)

    await rig.in_thread(work)


async def test_clients_beyond_the_limit_wait_for_a_place(rig: Rig) -> None:
    await served(rig, limits=Limits(connections=2))

    def work() -> None:
        first, second = Client(rig.path), Client(rig.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as third:
            third.connect(rig.path)
            third.settimeout(0.2)
            with pytest.raises(TimeoutError):
                third.recv(18)
            first.close()
            third.settimeout(20)
            assert third.recv(18).startswith(b"NBDMAGIC")
        second.close()

    await rig.in_thread(work)


async def test_a_thousand_half_open_handshakes(rig: Rig) -> None:
    await served(rig, limits=Limits(connections=0))

    def work() -> None:
        with contextlib.ExitStack() as stack:
            for number in range(400):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                sock.connect(rig.path)
                sock.sendall(conversation()[: number % 40])
            with Client(rig.path) as client:
                assert client.go(b"n").read(0, 4) == bytes(4)

    await rig.in_thread(work)
    await rig.until(lambda: rig.connections == 0)


async def test_requests_pile_up_only_to_the_limit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks for gigabytes and takes none of them costs a bounded amount of memory."""
    monkeypatch.setattr(nbd_connection, "IN_FLIGHT", 4 << 20)
    node = await served(rig)
    client = await rig.connect()
    stream = b"".join(wire.request(wire.READ, 0, SIZE, cookie=at) for at in range(100))
    client.socket.sendall(stream)
    await asyncio.sleep(0.3)
    server = rig.exports.nbd
    assert server is not None
    [connection] = server._connections
    assert connection._in_flight <= (4 << 20) + SIZE
    done = node.kinds().count("read")
    assert done < 10
    results = await rig.in_thread(lambda: client.results(100))
    assert len(results) == 100


async def test_writes_that_wait_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_connection, "IN_FLIGHT", 2 << 20)
    node = await served(rig)
    client = await rig.connect()
    node.gate = asyncio.Event()

    def send() -> None:
        for at in range(64):
            client.send(wire.WRITE, at * 512, 65536, 0, at, bytes(65536))

    sending = asyncio.ensure_future(rig.in_thread(send))
    await asyncio.sleep(0.3)
    assert not sending.done()
    assert node.active <= 2 + (2 << 20) // 65536
    await rig.on_data_loop(node.gate.set)
    await sending
    results = await rig.in_thread(lambda: client.results(64))
    assert not any(result.error for result in results.values())


async def test_a_slow_batch_holds_back_no_later_one(rig: Rig) -> None:
    node = await served(rig)
    client = await rig.connect()
    gate = node.gate = asyncio.Event()
    client.send(wire.READ, 0, 512, cookie=1)
    await rig.until(lambda: node.active == 1)
    node.gate = None
    client.send(wire.READ, 512, 512, cookie=2)
    assert (await rig.in_thread(client.chunk)).cookie == 2
    await rig.on_data_loop(gate.set)
    assert (await rig.in_thread(client.chunk)).cookie == 1


async def test_drained_nodes_get_no_new_requests(rig: Rig) -> None:
    node = await served(rig)
    client = await rig.connect()
    async with rig.graph.drained(node):
        client.send(wire.READ, 0, 512, cookie=1)
        client.send(wire.WRITE, 0, 3, 0, 2, b"abc")
        await asyncio.sleep(0.1)
        assert node.kinds() == []
    results = await rig.in_thread(lambda: client.results(2))
    assert not any(result.error for result in results.values())


# liars


@pytest.mark.parametrize(
    "sent",
    [
        wire.request(wire.WRITE, 0, (32 << 20) + 1),
        wire.request(wire.WRITE, 0, 2**32 - 1),
        bytes(28),
        wire.request(wire.READ, 0, 512, extended=True),
    ],
)
async def test_a_stream_that_cannot_be_followed_is_ended(rig: Rig, sent: bytes) -> None:
    await served(rig)
    client = await rig.connect()
    client.socket.sendall(sent + bytes(1000))

    def work() -> None:
        while True:
            client.receive(1)

    with pytest.raises((EOFError, ConnectionResetError)):
        await rig.in_thread(work)
    await rig.until(lambda: rig.connections == 0)


async def test_overlapping_writes_leave_one_of_them(rig: Rig) -> None:
    node = await served(rig)
    node.delays = random.Random(1)
    client = await rig.connect()
    payloads = [bytes((number,)) * 4096 for number in range(1, 20)]
    for number, payload in enumerate(payloads):
        client.send(wire.WRITE, 0, 4096, 0, number, payload)
    await rig.in_thread(lambda: client.results(len(payloads)))
    assert node.data[:4096] in payloads


# exports that go


async def test_an_export_in_use_goes_only_by_force(rig: Rig) -> None:
    await served(rig)
    client = await rig.connect()
    with pytest.raises(Exception, match=r"^export 'e' still in use$"):
        await rig.exports.remove("e")
    assert await rig.in_thread(lambda: client.read(0, 4)) == bytes(4)
    await rig.exports.remove("e", "hard")
    with pytest.raises(EOFError):
        await rig.in_thread(lambda: client.receive(1))
    await rig.until(lambda: rig.connections == 0)
    await asyncio.sleep(0.05)
    assert rig.deleted() == ["e"]
    await rig.graph.blockdev_del("n")


async def test_removal_under_load_ends_what_was_begun(rig: Rig) -> None:
    """Every request that reached the node is answered; then the client is hung up on, then the event."""
    node = await served(rig)
    client = await rig.connect()
    gate = node.gate = asyncio.Event()
    client.send(wire.WRITE, 0, 5, 0, 1, b"hello")
    client.send(wire.READ, 512, 512, cookie=2)
    await rig.until(lambda: node.active == 2)
    await rig.exports.remove("e", "hard")
    await asyncio.sleep(0.05)
    assert rig.exports.query() == [{"node-name": "n", "shutting-down": True, "type": "nbd", "id": "e"}]
    with pytest.raises(Exception, match=r"^Export 'e' is already shutting down$"):
        await rig.exports.remove("e", "hard")
    with pytest.raises(Exception, match=r"^Node n is in use$"):
        await rig.graph.blockdev_del("n")
    assert rig.deleted() == []
    await rig.on_data_loop(gate.set)
    results = await rig.in_thread(lambda: client.results(2))
    assert not any(result.error for result in results.values())
    with pytest.raises(EOFError):
        await rig.in_thread(lambda: client.receive(1))
    await rig.until(lambda: rig.connections == 0)
    await asyncio.sleep(0.05)
    assert rig.deleted() == ["e"]
    assert rig.exports.query() == []


async def test_requests_that_wait_are_told_of_the_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_connection, "IN_FLIGHT", 1)
    node = await served(rig)
    client = await rig.connect()
    gate = node.gate = asyncio.Event()
    client.socket.sendall(wire.request(wire.READ, 0, SIZE, cookie=1) + wire.request(wire.READ, 0, 512, cookie=2))
    await rig.until(lambda: node.active == 1)
    await rig.exports.remove("e", "hard")
    await asyncio.sleep(0.05)
    await rig.on_data_loop(gate.set)
    results = await rig.in_thread(lambda: client.results(2))
    assert (results[1].error, results[2].error) == (0, errno.ESHUTDOWN)


async def test_a_client_that_reads_nothing_cannot_keep_an_export(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_connection, "LINGER", 0.1)
    await served(rig)
    client = await rig.connect()
    client.socket.sendall(b"".join(wire.request(wire.READ, 0, SIZE, cookie=at) for at in range(20)))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(rig.exports.stop_server(), 5)
    assert rig.deleted() == ["e"]


async def test_stopping_the_server_ends_handshakes_clients_and_exports(rig: Rig) -> None:
    await served(rig)
    rig.add_node("m")
    await rig.export("m", "f")
    client = await rig.connect()

    def half_open() -> Client:
        return Client(rig.path)

    waiting = await rig.in_thread(half_open)
    await rig.exports.stop_server()
    assert rig.deleted() == ["e", "f"]
    for one in (client, waiting):
        with pytest.raises(EOFError):
            await rig.in_thread(lambda one=one: one.receive(1))
        one.close()
    assert not os.path.exists(rig.path)
    await rig.serve()
    assert os.path.exists(rig.path)


async def test_exports_come_and_go_under_many_clients(rig: Rig) -> None:
    """Clients at random moments of their lives see replies or the end, never something else."""
    rig.add_node("n")
    await rig.serve(limits=Limits(connections=0))
    stop = False

    def worker(seed: int) -> int:
        chance, served = random.Random(seed), 0
        while not stop:
            try:
                with Client(rig.path) as client:
                    client.go(b"n")
                    for _ in range(chance.randrange(20)):
                        client.send(wire.WRITE, chance.randrange(1000) * 512, 512, 0, 1, bytes(512))
                        client.send(wire.READ, chance.randrange(1000) * 512, 512, cookie=2)
                        results = client.results(2)
                        served += sum(not one.error for one in results.values())
            except (EOFError, ConnectionError, AssertionError):
                continue
        return served

    workers = [asyncio.ensure_future(rig.in_thread(lambda seed=seed: worker(seed))) for seed in range(4)]
    for number in range(40):
        await rig.export("n", f"e{number}", writable=True)
        await asyncio.sleep(random.random() * 0.02)
        await rig.exports.remove(f"e{number}", "hard")
        while rig.exports.query():
            await asyncio.sleep(0.001)
    await rig.export("n", "last", writable=True)
    await asyncio.sleep(0.1)
    stop = True
    assert sum(await asyncio.gather(*workers)) > 0
    assert rig.deleted() == [f"e{number}" for number in range(40)]
    await rig.until(lambda: rig.connections == 0)
