"""Encryption in place when things go wrong: errors of either file, journals that do not belong, who may open."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import Callable
from typing import Any

import pytest

from qmpd.block.batch import Batch
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers.luks import LuksNode
from qmpd.errors import CommandError
from qmpd.formats.luks2_json import Metadata
from qmpd.luks.create2 import Luks2Options, header_length
from qmpd.luks.encrypt import BLOCK, REQUIREMENT, Encryption, journal_of
from qmpd.luks.encrypt_header import prepare_header
from qmpd.luks.luks2 import Luks2Volume, read_copies
from qmpd.luks.shared import header_of
from qmpd.luks.update2 import update_header
from tests.gen.qcow2 import MemoryNode
from tests.unit.luks.memory import edge, luks_node

ZONE, SIZE = 8192, 5 * 8192 + 1024


async def begun(plain: bytes | None = None) -> tuple[LuksNode, MemoryNode, MemoryNode]:
    payload = MemoryNode(random.Random(1).randbytes(SIZE) if plain is None else plain, "payload")
    header = MemoryNode(bytes(header_length()), "header")
    options = Luks2Options(pbkdf="pbkdf2", iterations=1000)
    with SecretBytes(b"abc123") as passphrase:
        await prepare_header(edge(header), options, passphrase, payload.size, zone=ZONE)
    return await opened(payload, header), payload, header


async def opened(payload: MemoryNode, header: MemoryNode) -> LuksNode:
    node, options, _ = luks_node(payload, header)
    header_of(header).admitted = node.name
    await node.open(options)
    await node.unlock()
    return node


def encryption_of(node: LuksNode) -> Encryption:
    assert node.encryption is not None
    return node.encryption


async def finish(node: LuksNode) -> None:
    while not encryption_of(node).done:
        await encryption_of(node).step()
    await node.finish_encryption()


def failing(kind: str, number: int) -> Callable[[str, int, int], int]:
    """Return an `error` that fails the request of that kind after so many."""
    seen = 0

    def error(what: str, offset: int, length: int) -> int:
        nonlocal seen
        seen += what == kind
        return errno.EIO if what == kind and seen > number else 0

    return error


@pytest.mark.parametrize("where", ["payload", "header"])
@pytest.mark.parametrize("kind", ["read", "write", "flush"])
@pytest.mark.parametrize("number", range(8))
async def test_a_file_that_fails_for_a_while(where: str, kind: str, number: int) -> None:
    """Whatever fails, users see right data or an error, and afterwards the job goes on, here or after a start."""
    node, payload, header = await begun()
    plain = bytes(payload.content)
    broken = payload if where == "payload" else header
    await encryption_of(node).step()
    broken.error = failing(kind, number)
    with contextlib.suppress(OSError):
        while not encryption_of(node).done:
            await encryption_of(node).step()
    broken.error = lambda *_: 0
    for offset in range(0, SIZE, 1024):
        encryption = encryption_of(node)
        if encryption.stuck and 0 <= offset - encryption.position < ZONE:
            with pytest.raises(OSError, match="failed"):
                await edge(node).pread(offset, 1024)
        else:
            assert await edge(node).pread(offset, 1024) == plain[offset : offset + 1024]
    if number % 2:
        node = await opened(MemoryNode(bytes(payload.content), "payload"), MemoryNode(bytes(header.content), "header"))
    await finish(node)
    assert await edge(node).pread(0, SIZE) == plain


async def test_a_stuck_zone_is_for_nobody() -> None:
    node, payload, _ = await begun()
    plain = bytes(payload.content)
    await encryption_of(node).step()
    payload.error = lambda what, *_: errno.ENOSPC if what == "write" else 0
    with pytest.raises(OSError, match="failed"):
        await encryption_of(node).step()
    payload.error = lambda *_: 0
    assert encryption_of(node).stuck
    views = [bytearray(1024) for _ in range(3)]
    batch = Batch()
    for offset, view in zip((ZONE - 1024, ZONE, 2 * ZONE), views, strict=True):
        batch.extend(Batch.single(offset, memoryview(view)))
    await edge(node).preadv(batch)
    assert [one.error for one in batch] == [0, errno.EIO, 0]
    assert (bytes(views[0]), bytes(views[2])) == (plain[ZONE - 1024 : ZONE], plain[2 * ZONE : 2 * ZONE + 1024])
    with pytest.raises(OSError, match="failed"):
        await edge(node).pwrite(ZONE + 100, b"lost")
    with pytest.raises(OSError, match="half encrypted"):
        await node.pdiscard(ZONE, 512)
    await finish(node)
    assert await edge(node).pread(0, SIZE) == plain


async def test_requests_over_the_border_and_many_at_once() -> None:
    node, payload, _ = await begun(bytes(SIZE))
    model = bytearray(SIZE)
    rng = random.Random(3)

    async def user() -> None:
        while not encryption_of(node).done:
            offset = rng.randrange(SIZE - 3000)
            data = rng.randbytes(rng.choice((1, 700, 3000)))
            model[offset : offset + len(data)] = data  # the writes below are one at a time
            await edge(node).pwrite(offset, data)
            assert await edge(node).pread(max(0, offset - 5000), 8000 if offset > 5000 else 100) is not None
            await asyncio.sleep(0)

    payload.delay = lambda: 0
    job = asyncio.gather(user(), steps(node))
    await job
    assert await edge(node).pread(0, SIZE) == model
    await node.finish_encryption()
    assert await edge(node).pread(0, SIZE) == model


async def steps(node: LuksNode) -> None:
    while not encryption_of(node).done:
        await encryption_of(node).step()
        for _ in range(20):
            await asyncio.sleep(0)


async def test_only_the_job_opens_the_volume() -> None:
    _, payload, header = await begun()
    header_of(header).admitted = None
    node, options, _ = luks_node(payload, header)
    with pytest.raises(CommandError, match="it opens for the job blockdev-encrypt only"):
        await node.open(options)


async def test_another_payload_is_refused() -> None:
    _, payload, header = await begun()
    with pytest.raises(CommandError, match=f"being encrypted with {SIZE} bytes of payload, not {SIZE + 512}"):
        await opened(MemoryNode(bytes(payload.content) + bytes(512)), header)


async def test_a_journal_that_somebody_changed_is_not_believed() -> None:
    """Moving the position would leave plaintext behind, or encrypt twice: it is authenticated, as is the zone."""
    node, payload, header = await begun()
    plain = bytes(payload.content)
    for _ in range(2):
        await encryption_of(node).step()
    place = encryption_of(node).journal.offset
    newest = place if header.content[place + 15] > header.content[place + BLOCK + 15] else place + BLOCK
    lies = MemoryNode(bytes(header.content), "header")
    lies.content[newest + 16 : newest + 24] = (4 * ZONE).to_bytes(8, "big")
    older = encryption_of(await opened(MemoryNode(bytes(payload.content)), lies))
    assert older.position == ZONE  # the one before, of which the journal has nothing any more
    lies.content[place : place + 2 * BLOCK] = bytes(2 * BLOCK)
    with pytest.raises(CommandError, match="how far it came is not known"):
        await opened(MemoryNode(bytes(payload.content)), lies)
    await finish(node)
    assert await edge(node).pread(0, SIZE) == plain
    assert not any(header.content[place : place + 3 * BLOCK + ZONE])


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda slot: slot.update(zone="4097"), "zones of 4097 bytes"),
        (lambda slot: slot.update(zone="0"), "zones of 0 bytes"),
        (lambda slot: slot.update(zone=str(2 << 20)), "zones of 2097152 bytes, expected 4096 to 1048576"),
        (lambda slot: slot.update(zone=8192), "'zone' is not a number"),
        (lambda slot: slot.update(payload_size="-1"), "'payload_size' is not a number"),
        (lambda slot: slot.pop("payload_size"), "'payload_size' is not a number"),
        (lambda slot: slot["area"].update(size="4096"), "area of 4096 bytes, expected 20480"),
        (lambda slot: slot.update(type="other"), f"requires '{REQUIREMENT}' and has 0 keyslots of that kind, not 1"),
    ],
)
async def test_a_description_that_makes_no_sense(change: Callable[[dict[str, Any]], object], refusal: str) -> None:
    _, _, header = await begun()
    await update_header(edge(header), lambda tree: change(tree["keyslots"]["1"]) and None)
    with pytest.raises(CommandError, match=refusal):
        Luks2Volume(await read_copies(edge(header), "header"))


async def test_other_volumes_have_no_journal() -> None:
    node, _, header = await begun()
    await finish(node)
    metadata: Metadata = (await read_copies(edge(header), "header")).copy.metadata
    assert journal_of(metadata) is None
    assert metadata.requirements == ()
    assert list(metadata.keyslots) == ["0"]


async def test_a_node_for_the_header_that_holds_something() -> None:
    options = Luks2Options(pbkdf="pbkdf2", iterations=1000)
    node, _, header = await begun()
    with SecretBytes(b"abc123") as passphrase:
        await prepare_header(edge(header), options, passphrase, SIZE)  # an interrupted one is left as it is
        await finish(node)
        with pytest.raises(CommandError, match="the header of another LUKS volume"):
            await prepare_header(edge(header), options, passphrase, SIZE)
        data = MemoryNode(bytes(header_length() - 1) + b"x")
        with pytest.raises(CommandError, match="not blank, and it has no LUKS2 header"):
            await prepare_header(edge(data), options, passphrase, SIZE)
        with pytest.raises(CommandError, match="The image has 0 bytes"):
            await prepare_header(edge(MemoryNode(bytes(header_length()))), options, passphrase, 0)
