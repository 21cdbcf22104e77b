"""The NBD driver against real servers: random I/O as on a bytearray, while connections break."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.perm import Perm
from qmpd.cli.image import Workshop, create_image, workshop
from qmpd.errors import CommandError
from qmpd.qapi.visit import validate
from tests.peers.conftest import need
from tests.support.nbd_proxy import Proxy, proxy
from tests.support.nbd_servers import qmpd, serving, wait_for
from tests.support.peers import find

SIZE = 4 << 20
SLICE = 1 << 18
ROUNDS = 60
SECRET = {"qom-type": "secret", "id": "s", "data": "abc123"}


@contextlib.contextmanager
def server(kind: str, folder: Path) -> Iterator[Path]:
    """Run a server with an empty disk of SIZE bytes as its default export; gives its socket."""
    sock = folder / "n.sock"
    if kind == "qmpd":
        need("qemu-img")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(folder / "disk"), str(SIZE)], check=True)
        disk = f"qcow2,node-name=d,discard=unmap,file.driver=file,file.filename={folder / 'disk'}"
        with qmpd(folder, "--blockdev", disk, *serving(folder, "nbd,id=e,node-name=d,name=,writable=on")):
            wait_for(sock)
            yield sock
        return
    if kind == "nbdkit":
        need("nbdkit")
        command = [str(find("nbdkit")), "-f", "-U", str(sock), "memory", str(SIZE)]
    else:
        need("qemu-nbd")
        (folder / "disk").write_bytes(bytes(SIZE))
        command = [str(find("qemu-nbd")), "-k", str(sock), "-t", "-e", "9", "-f", "raw", "--discard=unmap"]
        command.append(str(folder / "disk"))
    process = subprocess.Popen(command)
    try:
        wait_for(sock, process)
        yield sock
    finally:
        process.kill()  # told to end, nbdkit would wait for its clients
        process.wait(20)


@contextlib.asynccontextmanager
async def opened(path: Path, **members: Any) -> AsyncIterator[BlockBackend]:
    """Open an export as a node and give a backend that may do everything."""
    async with workshop() as shop:
        yield await attach(shop, path, **members)


async def attach(shop: Workshop, path: Path, **members: Any) -> BlockBackend:
    tree = {"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": str(path)}, "discard": "unmap"}
    tree |= {name.replace("_", "-"): value for name, value in members.items()}
    node = await shop.graph.blockdev_add(validate(shop.schema, "BlockdevOptions", tree))
    perm = Perm.CONSISTENT_READ if node.read_only else Perm.CONSISTENT_READ | Perm.WRITE
    backend = BlockBackend(shop.graph, lambda: "test", perm, Perm.ALL)
    backend.insert(node)
    return backend


class Model:
    """The disk as it must be; each slice is used by one request at a time."""

    def __init__(self, backend: BlockBackend, seed: int) -> None:
        self.backend, self.data, self.chance = backend, bytearray(SIZE), random.Random(seed)

    async def step(self, start: int) -> None:
        """Do one thing to the slice that begins at `start`, and check it."""
        chance = self.chance
        low = start + chance.randrange(SLICE)
        length = min(chance.choice((1, 511, 512, 4096, 65536, SLICE)), start + SLICE - low)
        what = chance.choice(("read", "read", "write", "write", "batch", "zero", "discard", "flush", "status"))
        if what == "read":
            assert await self.backend.pread(low, length) == self.data[low : low + length]
        elif what == "write":
            flags = WriteFlags.FUA if chance.random() < 0.2 else WriteFlags.NONE
            self.data[low : low + length] = data = chance.randbytes(length)
            await self.backend.pwrite(low, data, flags)
        elif what == "batch":
            await self._batch(start)
        elif what == "zero":
            flags = WriteFlags.MAY_UNMAP if chance.random() < 0.5 else WriteFlags.NONE
            self.data[low : low + length] = bytes(length)
            await self.backend.pwrite_zeroes(low, length, flags)
        elif what == "discard":
            await self.backend.pdiscard(low, length)
            self.data[low : low + length] = await self.backend.pread(low, length)
        elif what == "flush":
            await self.backend.flush()
        else:
            await self._status(low, length)

    async def _batch(self, start: int) -> None:
        """Write many small pieces at once, then read them back in one batch."""
        step = SLICE // 32
        pieces = [(start + at * step, self.chance.randbytes(self.chance.randrange(1, step))) for at in range(32)]
        batch = Batch(Request(at, memoryview(data)) for at, data in pieces)
        await self.backend.pwritev(batch)
        batch.raise_first()
        for at, data in pieces:
            self.data[at : at + len(data)] = data
        back = Batch(Request(at, memoryview(bytearray(len(data)))) for at, data in pieces)
        await self.backend.preadv(back)
        back.raise_first()
        assert [bytes(request.view) for request in back] == [data for _, data in pieces]

    async def _status(self, low: int, length: int) -> None:
        at = low
        for extent in await self.backend.block_status(low, length):
            assert extent.offset == at
            assert extent.length > 0
            if extent.zero:
                assert not any(self.data[at : at + extent.length])
            at += extent.length
        assert at == low + length

    async def rounds(self, count: int) -> None:
        for _ in range(count):
            slices = self.chance.sample(range(0, SIZE, SLICE), 8)
            await asyncio.gather(*(self.step(start) for start in slices))

    async def check(self) -> None:
        assert await self.backend.pread(0, SIZE) == self.data


async def disturb(between: Proxy, chance: random.Random) -> None:
    """Cut the line again and again: at once, or after some bytes of a reply."""
    while True:
        await asyncio.sleep(chance.uniform(0.1, 0.5))
        if chance.random() < 0.5:
            between.cut()
        else:
            between.cut_after = chance.randrange(1, 200_000)


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "qmpd"])
def test_random_requests_through_lost_connections(kind: str, tmp_path: Path) -> None:
    async def run(sock: Path) -> None:
        async with proxy(tmp_path / "p.sock", sock) as between:
            async with opened(tmp_path / "p.sock", reconnect_delay=30) as backend:
                model = Model(backend, 11)
                await model.rounds(ROUNDS // 4)
                disturber = asyncio.create_task(disturb(between, random.Random(12)))
                deadline = time.monotonic() + 4
                while time.monotonic() < deadline or between.connections < 4:
                    await model.rounds(4)
                disturber.cancel()
                await model.check()
            assert between.connections >= 4
        async with opened(sock) as backend:
            model.backend = backend
            await model.check()

    with server(kind, tmp_path) as sock:
        asyncio.run(run(sock))


def test_without_delay_requests_fail_at_once_and_work_again_later(tmp_path: Path) -> None:
    async def run(sock: Path) -> None:
        async with proxy(tmp_path / "p.sock", sock) as between, opened(tmp_path / "p.sock") as backend:
            await backend.pwrite(0, b"x" * 4096)
            between.down = True
            between.cut()
            await asyncio.sleep(0.2)
            for _ in range(3):
                begun = time.monotonic()
                with pytest.raises(OSError) as caught:
                    await backend.pread(0, 4096)
                assert caught.value.errno == errno.EIO
                assert time.monotonic() - begun < 1
            between.down = False
            for _ in range(100):
                await asyncio.sleep(0.1)
                with contextlib.suppress(OSError):
                    assert await backend.pread(0, 4096) == b"x" * 4096
                    return
            pytest.fail("the connection was not made again")

    with server("nbdkit", tmp_path) as sock:
        asyncio.run(run(sock))


def test_requests_wait_no_longer_than_the_delay(tmp_path: Path) -> None:
    async def run(sock: Path) -> None:
        async with proxy(tmp_path / "p.sock", sock) as between:
            async with opened(tmp_path / "p.sock", reconnect_delay=1) as backend:
                await backend.pread(0, 512)
                between.down = True
                between.cut()
                begun = time.monotonic()
                results = await asyncio.gather(
                    *(backend.pread(at << 16, 512) for at in range(20)), backend.flush(), return_exceptions=True
                )
                assert 0.8 < time.monotonic() - begun < 5
                assert [getattr(error, "errno", 0) for error in results] == [errno.EIO] * 21
                begun = time.monotonic()
                with pytest.raises(OSError):
                    await backend.pread(0, 512)
                assert time.monotonic() - begun < 0.5

    with server("nbdkit", tmp_path) as sock:
        asyncio.run(run(sock))


def test_open_timeout_waits_for_the_server(tmp_path: Path) -> None:
    async def run() -> None:
        begun = time.monotonic()
        with pytest.raises(CommandError, match=r"Failed to connect to .*: No such file or directory"):
            async with opened(tmp_path / "n.sock", open_timeout=1):
                pass
        assert 0.9 < time.monotonic() - begun < 4
        async with workshop() as shop:
            opening = asyncio.create_task(attach(shop, tmp_path / "n.sock", open_timeout=20))
            await asyncio.sleep(0.3)
            with server("nbdkit", tmp_path):
                backend = await opening
                assert await backend.pread(0, 512) == bytes(512)

    asyncio.run(run())


def test_a_disk_that_came_back_changed_is_not_used(tmp_path: Path) -> None:
    async def run() -> None:
        with server("nbdkit", tmp_path):
            shop = Workshop()
            backend = await attach(shop, tmp_path / "n.sock", reconnect_delay=1)
            await backend.pwrite(0, b"y" * 512)
        (tmp_path / "n.sock").unlink(missing_ok=True)
        process = subprocess.Popen([str(find("nbdkit")), "-f", "-U", str(tmp_path / "n.sock"), "memory", "1M"])
        try:
            wait_for(tmp_path / "n.sock", process)
            with pytest.raises(OSError, match="failed"):
                await backend.pread(0, 512)
        finally:
            await shop.graph.close_all()
            process.kill()
            process.wait(20)

    asyncio.run(run())


def test_a_detached_header_and_its_payload_from_two_exports(tmp_path: Path) -> None:
    """The header comes from qemu-nbd, the payload from another daemon of ours; QEMU reads what was written."""
    need("qemu-img", "qemu-nbd")
    secret = ["--object", "secret,id=s,data=abc123"]
    header, payload = tmp_path / "header", tmp_path / "payload"
    made = {"key-secret": "s", "iter-time": "10"}
    asyncio.run(create_image(str(header), "luks", made, size="1M", header_only=True, objects=[SECRET]))
    payload.write_bytes(bytes(1 << 20))
    data = random.Random(4).randbytes(1 << 20)

    async def run(header_sock: Path, payload_sock: Path) -> None:
        async with workshop() as shop:
            shop.add_object(SECRET)
            nodes = {
                name: {"driver": "nbd", "server": {"type": "unix", "path": str(sock)}, "reconnect-delay": 5}
                for name, sock in (("file", payload_sock), ("header", header_sock))
            }
            tree = {"driver": "luks", "node-name": "l", "key-secret": "s", **nodes}
            node = await shop.graph.blockdev_add(validate(shop.schema, "BlockdevOptions", tree))
            assert node.size == 1 << 20
            backend = BlockBackend(shop.graph, lambda: "test", Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
            backend.insert(node)
            await backend.pwrite(0, data)
            assert await backend.pread(1000, 5000) == data[1000:6000]
            await backend.flush()

    header_sock = tmp_path / "h.sock"
    command = [str(find("qemu-nbd")), "-k", str(header_sock), "-t", "-e", "9", "-f", "raw", str(header)]
    process = subprocess.Popen(command)
    try:
        wait_for(header_sock, process)
        disk = f"file,node-name=d,filename={payload}"
        with qmpd(tmp_path, "--blockdev", disk, *serving(tmp_path, "nbd,id=e,node-name=d,name=,writable=on")):
            asyncio.run(run(header_sock, tmp_path / "n.sock"))
    finally:
        process.terminate()
        process.wait(20)
    image = f"driver=luks,key-secret=s,file.driver=file,file.filename={payload}"
    image += f",header.driver=file,header.filename={header}"
    out = tmp_path / "out"
    subprocess.run(["qemu-img", "convert", *secret, "-O", "raw", "--image-opts", image, str(out)], check=True)
    assert out.read_bytes() == data
