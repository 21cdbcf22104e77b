"""The NBD driver and servers that are simple, odd, slow or lying."""

from __future__ import annotations

import asyncio
import errno
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.perm import Perm
from qmpd.cli.image import workshop
from qmpd.qapi.visit import validate
from tests.support.nbd_liar import (
    HANG_UP,
    OLDSTYLE,
    SIZE,
    UNSUP,
    Asked,
    Liar,
    Script,
    chunk,
    data_chunk,
    info_export,
    info_sizes,
    lying,
    reply,
    simple,
)
from tests.support.nbd_wire import (
    ACK,
    EXPORT_NAME,
    FLUSH,
    GO,
    LIST,
    READ,
    SET_META,
    STATUS,
    STRUCTURED,
    TRIM,
    WRITE,
    ZERO,
)

Work = Callable[[BlockBackend, Liar], Awaitable[None]]
ALL = 0x4D | 0x20 | 0x800


def use(folder: Path, script: Script, work: Work, **members: Any) -> None:
    """Open a node on a server that follows `script`, and do `work` with it."""

    async def run(liar: Liar) -> None:
        async with workshop() as shop:
            server = {"type": "unix", "path": str(folder / "s")}
            tree = {"driver": "nbd", "node-name": "n", "server": server, "discard": "unmap"}
            tree |= {name.replace("_", "-"): value for name, value in members.items()}
            node = await shop.graph.blockdev_add(validate(shop.schema, "BlockdevOptions", tree))
            perm = Perm.CONSISTENT_READ if node.read_only else Perm.CONSISTENT_READ | Perm.WRITE
            backend = BlockBackend(shop.graph, lambda: "test", perm, Perm.ALL)
            backend.insert(node)
            await asyncio.wait_for(work(backend, liar), 20)

    with lying(folder / "s", script) as liar:
        asyncio.run(run(liar))


def on_read(answer: Callable[[Asked], bytes]) -> Script:
    return Script(answer=lambda asked: answer(asked) if asked.command == READ else None)


LIES: dict[str, Callable[[Asked], bytes]] = {
    "junk": lambda asked: bytes(range(200)),
    "another cookie": lambda asked: data_chunk(asked.cookie + 1, 0, bytes(asked.length)),
    "short": lambda asked: data_chunk(asked.cookie, asked.offset, bytes(asked.length - 1)),
    "elsewhere": lambda asked: data_chunk(asked.cookie, asked.offset + 512, bytes(asked.length)),
    "simple": lambda asked: simple(asked.cookie, 0, bytes(asked.length)),
    "empty": lambda asked: chunk(asked.cookie, 0),
    "huge": lambda asked: chunk(asked.cookie, 1, b"", length=0xFFFFFFF0),
    "unasked": lambda asked: simple(99) + data_chunk(asked.cookie, asked.offset, bytes(asked.length)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_is_not_asked_again(tmp_path: Path, lie: str) -> None:
    async def work(backend: BlockBackend, liar: Liar) -> None:
        for _ in range(3):
            with pytest.raises(OSError, match="failed") as caught:
                await backend.pread(0, 4096)
            assert caught.value.errno == errno.EIO
        assert liar.connections == 1

    use(tmp_path, on_read(LIES[lie]), work, reconnect_delay=30)


def test_all_requests_under_way_fail_with_the_first_lie(tmp_path: Path) -> None:
    async def work(backend: BlockBackend, _: Liar) -> None:
        reads = (backend.pread(at * 4096, 4096) for at in range(200))
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert {getattr(one, "errno", None) for one in results} == {errno.EIO}

    use(tmp_path, on_read(lambda asked: b"x" * 100), work)


def test_a_connection_cut_within_a_reply_is_made_again(tmp_path: Path) -> None:
    cuts = iter([1, 5, 20, 27, 28, 29, 1000, 4123])

    def answer(asked: Asked) -> bytes:
        data = data_chunk(asked.cookie, asked.offset, bytes(range(256)) * 16)
        length = next(cuts, None)
        return data if length is None else data[:length] + HANG_UP

    async def work(backend: BlockBackend, liar: Liar) -> None:
        assert await backend.pread(0, 4096) == bytes(range(256)) * 16
        assert liar.connections == 9

    use(tmp_path, on_read(answer), work, reconnect_delay=30)


@pytest.mark.parametrize("kind", ["oldstyle", "not fixed", "export name", "simple replies"])
def test_servers_that_know_little_are_used(tmp_path: Path, kind: str) -> None:
    script = {
        "oldstyle": Script(greeting=OLDSTYLE + struct.pack(">QI", SIZE, 0x4D) + bytes(124)),
        "not fixed": Script(greeting=Script().greeting[:-1] + b"\0"),
        "export name": Script(options={GO: reply(GO, UNSUP)}),
        "simple replies": Script(options={STRUCTURED: reply(STRUCTURED, UNSUP)}),
    }[kind]

    async def work(backend: BlockBackend, liar: Liar) -> None:
        data = bytes(range(256)) * 1024
        await backend.pwrite(512, data)
        assert await backend.pread(0, 1 << 19) == bytes(512) + data + bytes((1 << 19) - 512 - len(data))
        extents = await backend.block_status(0, SIZE)
        assert [(one.offset, one.length, one.data) for one in extents] == [(0, SIZE, True)]
        assert liar.memory[512 : 512 + len(data)] == data

    use(tmp_path, script, work)


def test_a_size_that_is_no_whole_sector(tmp_path: Path) -> None:
    async def work(backend: BlockBackend, liar: Liar) -> None:
        assert backend.size == 1024
        await backend.pwrite(990, b"y" * 10)
        assert await backend.pread(980, 44) == bytes(10) + b"y" * 10 + bytes(24)
        batch = Batch((Request(1000, memoryview(bytes(24))),))
        await backend.pwritev(batch)
        assert batch[0].error == errno.ENOSPC
        extents = await backend.block_status(0, 1024)
        assert [(one.offset, one.length, one.zero) for one in extents] == [(0, 1000, False), (1000, 24, True)]
        await backend.pwrite_zeroes(0, 1024)
        assert not any(liar.memory)

    use(tmp_path, Script(size=1000, flags=ALL), work)


def test_flags_are_sent_as_the_server_can_take_them(tmp_path: Path) -> None:
    async def work(backend: BlockBackend, liar: Liar) -> None:
        await backend.pwrite(0, b"z" * 512, WriteFlags.FUA)
        await backend.pwrite_zeroes(0, 512)
        await backend.pwrite_zeroes(0, 512, WriteFlags.MAY_UNMAP | WriteFlags.NO_FALLBACK | WriteFlags.FUA)
        await backend.pdiscard(0, 512)
        await backend.flush()
        sent = [(asked.command, asked.flags) for asked in liar.asked]
        assert sent == [(WRITE, 1), (ZERO, 2), (ZERO, 1 | 16), (TRIM, 0), (FLUSH, 0)]

    use(tmp_path, Script(flags=ALL), work)


def test_a_server_that_can_nothing_is_asked_nothing(tmp_path: Path) -> None:
    async def work(backend: BlockBackend, liar: Liar) -> None:
        await backend.pwrite(0, b"z" * 512, WriteFlags.FUA)
        await backend.pdiscard(0, 512)
        await backend.flush()
        with pytest.raises(OSError, match="zero") as caught:
            await backend.pwrite_zeroes(0, 512, WriteFlags.NO_FALLBACK)
        assert caught.value.errno == errno.ENOTSUP
        await backend.pwrite_zeroes(0, 512)
        assert {asked.command for asked in liar.asked} == {WRITE}
        assert not any(liar.memory)

    use(tmp_path, Script(flags=1), work)


def test_block_sizes_become_limits(tmp_path: Path) -> None:
    sizes = info_sizes(4096, 8192, 65536) + info_export(SIZE, ALL) + reply(GO, ACK)

    async def work(backend: BlockBackend, liar: Liar) -> None:
        node = backend.node
        assert node is not None
        assert (node.request_alignment, node.zero_alignment) == (4096, 8192)
        data = bytes(range(250)) * 1000
        await backend.pwrite(100, data)
        assert await backend.pread(100, len(data)) == data
        for asked in liar.asked:
            assert asked.offset % 4096 == asked.length % 4096 == 0
            assert asked.length <= 65536

    use(tmp_path, Script(options={GO: sizes}), work)


def test_many_requests_are_under_way_at_once(tmp_path: Path) -> None:
    """The server answers only when sixteen have arrived, the last one first."""
    waiting: list[Asked] = []

    def answer(asked: Asked) -> bytes:
        waiting.append(asked)
        if len(waiting) < 16:
            return b""
        replies = [data_chunk(one.cookie, one.offset, bytes([one.offset >> 12]) * one.length) for one in waiting[::-1]]
        waiting.clear()
        return b"".join(replies)

    async def work(backend: BlockBackend, _: Liar) -> None:
        batch = Batch(Request(at << 12, memoryview(bytearray(4096))) for at in range(160))
        await backend.preadv(batch)
        batch.raise_first()
        assert [bytes(request.view[:1]) for request in batch] == [bytes([at]) for at in range(160)]

    use(tmp_path, on_read(answer), work)


def test_status_in_small_answers_is_joined(tmp_path: Path) -> None:
    def answer(asked: Asked) -> bytes | None:
        if asked.command != STATUS:
            return None
        flags = 3 if asked.offset >= SIZE // 2 else 0
        return chunk(asked.cookie, 5, struct.pack(">III", 1, min(asked.length, SIZE // 8), flags))

    async def work(backend: BlockBackend, _: Liar) -> None:
        extents = await backend.block_status(100, SIZE - 200)
        found = [(one.offset, one.length, one.data, one.zero) for one in extents]
        assert found == [(100, SIZE // 2, True, False), (100 + SIZE // 2, SIZE // 2 - 200, False, True)]

    use(tmp_path, Script(answer=answer), work)


def test_errors_of_single_requests_harm_no_other(tmp_path: Path) -> None:
    def answer(asked: Asked) -> bytes | None:
        if asked.command == READ and asked.offset == 4096:
            return chunk(asked.cookie, 0x8001, struct.pack(">IH", 28, 0))
        return None

    async def work(backend: BlockBackend, liar: Liar) -> None:
        batch = Batch(Request(at * 4096, memoryview(bytearray(4096))) for at in range(3))
        await backend.preadv(batch)
        assert [request.error for request in batch] == [0, errno.ENOSPC, 0]
        assert liar.connections == 1

    use(tmp_path, Script(answer=answer), work)


def test_leave_is_taken(tmp_path: Path) -> None:
    seen: list[Liar] = []

    async def work(_: BlockBackend, liar: Liar) -> None:
        seen.append(liar)

    use(tmp_path, Script(), work)
    deadline = time.monotonic() + 5
    while not seen[0].farewells and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert seen[0].farewells == 1


def test_names_are_looked_up_where_go_is_unknown(tmp_path: Path) -> None:
    listed = reply(LIST, 2, struct.pack(">I", 3) + b"exp") + reply(LIST, ACK)

    async def work(backend: BlockBackend, _: Liar) -> None:
        assert backend.size == SIZE

    options = {
        GO: reply(GO, UNSUP),
        LIST: listed,
        EXPORT_NAME: Script().polite(EXPORT_NAME),
        SET_META: reply(SET_META, ACK),
    }
    use(tmp_path, Script(options=options), work, export="exp")
