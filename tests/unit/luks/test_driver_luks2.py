"""The luks driver on LUKS2 volumes: where the payload lies, sector sizes, damaged copies, refusals."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from qmpd.block.batch import Batch
from qmpd.crypto.cipher import CipherSpec, open_cipher
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError, ImageError
from qmpd.luks.keys import KeyslotEdit, edit_keyslots
from qmpd.luks.shared import header_of
from tests.gen import luks2 as gen
from tests.unit.luks.memory import MemoryNode, edge, luks_node, opened

HEADER = gen.header()
TOTAL = 2 * gen.COPY + gen.AREA


def attached(offset: int, payload: bytes, **segment: Any) -> bytes:
    """Return a whole volume whose payload starts at `offset`."""
    tree = gen.tree(offset=offset)
    tree["segments"]["0"] |= segment
    return gen.header(tree).ljust(offset, b"\0") + payload


def decrypted(data: bytes, sector: int, sector_size: int = 512) -> bytes:
    buffer = bytearray(data)
    spec = CipherSpec("aes", "xts", "plain64", None, 32, sector_size)
    open_cipher(spec, gen.KEY, engine="reference").decrypt([(sector, buffer, buffer)])
    return bytes(buffer)


@pytest.mark.parametrize("sector_size", [512, 1024, 2048, 4096])
async def test_detached_volume(sector_size: int) -> None:
    payload, header = MemoryNode(bytes(64 * 1024)), MemoryNode(gen.header(gen.tree(sector_size=sector_size)))
    before = bytes(header.data)
    node = await opened(payload, header)
    assert (node.size, node.request_alignment) == (64 * 1024, sector_size)
    text = random.Random(1).randbytes(9000)
    await edge(node).pwrite(4096 + 100, text)
    assert await edge(node).pread(4096 + 100, 9000) == text
    stored = bytes(payload.data[4096:16384])
    assert decrypted(stored, 8, sector_size)[100:9100] == text
    assert bytes(header.data) == before


@pytest.mark.parametrize("offset", [TOTAL, TOTAL + 512, 4 << 20])
@pytest.mark.parametrize("tweak", [0, 77])
async def test_attached_volume(offset: int, tweak: int) -> None:
    payload = MemoryNode(attached(offset, bytes(8192), iv_tweak=str(tweak)))
    before = bytes(payload.data[:offset])
    node = await opened(payload)
    assert node.size == 8192
    await edge(node).pwrite(512, b"x" * 1024)
    assert decrypted(bytes(payload.data[offset + 512 : offset + 1536]), 1 + tweak) == b"x" * 1024
    assert bytes(payload.data[:offset]) == before


async def test_a_payload_of_fixed_size() -> None:
    node = await opened(MemoryNode(attached(TOTAL, bytes(8192), size="4096")))
    assert node.size == 4096
    await edge(node).pwrite(0, bytes(4096))
    assert node.size == 4096
    with pytest.raises(CommandError, match="fixed size"):
        await node.truncate(8192)
    with pytest.raises(CommandError, match="The LUKS payload takes 16384 bytes, there are 8192"):
        await opened(MemoryNode(attached(TOTAL, bytes(8192), size="16384")))


async def test_a_size_that_is_no_multiple_of_the_sector_size() -> None:
    header = MemoryNode(gen.header(gen.tree(sector_size=4096)))
    with pytest.raises(CommandError, match="has 4608 bytes, not a multiple of its sector size 4096"):
        await opened(MemoryNode(bytes(4608)), header)
    node = await opened(MemoryNode(bytes(8192)), header)
    with pytest.raises(CommandError, match="not a multiple of the sector size 4096"):
        await node.truncate(4608)
    await node.truncate(12288)
    assert node.size == 12288


async def test_a_payload_that_lies_over_its_own_header() -> None:
    """A header made for a payload elsewhere, opened as if it were a whole volume, would be overwritten."""
    with pytest.raises(CommandError, match="LUKS payload is overlapping with the header"):
        await opened(MemoryNode(HEADER + bytes(8192)))


@pytest.mark.parametrize("spoiled", [[(0, 6)], [(0, gen.COPY)], [(gen.COPY, 2 * gen.COPY)], [(4100, 4200)]])
async def test_one_copy_is_enough(spoiled: list[tuple[int, int]]) -> None:
    data = bytearray(HEADER)
    for low, high in spoiled:
        data[low:high] = bytes(high - low)
    header = MemoryNode(bytes(data))
    node = await opened(MemoryNode(bytes(4096)), header)
    assert " header is damaged: " in node.image_info()["format-specific"]["data"]["problem"]
    assert bytes(header.data) == bytes(data)


async def test_without_any_copy() -> None:
    with pytest.raises(CommandError, match=r"^Volume is not in LUKS format$"):
        await opened(MemoryNode(bytes(4096)), MemoryNode(bytes(len(HEADER))))
    with pytest.raises(ImageError, match=r"^memory: byte 448: LUKS2 header checksum is wrong"):
        await opened(MemoryNode(bytes(4096)), MemoryNode(HEADER[:4500] + bytes(len(HEADER) - 4500)))
    with pytest.raises(CommandError, match=r"^LUKS version 3 is not supported$"):
        await opened(MemoryNode(bytes(4096)), MemoryNode(HEADER[:6] + b"\0\3" + HEADER[8:]))


async def test_requirements_and_tokens() -> None:
    tree = gen.tree()
    tree["config"]["requirements"] = {"mandatory": ["online-reencrypt-v2"]}
    tree["tokens"]["4"] = {"type": "mine", "keyslots": ["0"], "secret": 5}
    slot = tree["keyslots"]["0"]
    area = {"type": "checksum", "offset": slot["area"]["offset"], "size": "4096", "hash": "sha256", "sector_size": 512}
    slot["area"] |= {"offset": str(2 * gen.COPY + 4096), "size": str(gen.AREA - 4096)}
    tree["keyslots"]["5"] = {
        "type": "reencrypt",
        "key_size": 1,
        "mode": "reencrypt",
        "direction": "forward",
        "area": area,
    }
    with pytest.raises(CommandError, match="The volume is being reencrypted"):
        await opened(MemoryNode(bytes(4096)), MemoryNode(gen.header(tree)))
    tree = gen.tree()
    tree["tokens"]["4"] = {"type": "mine", "keyslots": ["0"], "secret": 5}
    header = MemoryNode(gen.header(tree))
    before = bytes(header.data)
    node = await opened(MemoryNode(bytes(4096)), header)
    await edge(node).pwrite(0, b"y" * 512)
    await node.close()
    assert bytes(header.data) == before


async def test_two_volumes_written_at_once_through_one_header() -> None:
    header = MemoryNode(HEADER)
    rng = random.Random(3)
    first = await opened(MemoryNode(bytes(1 << 20), delays=rng), header)
    second = await opened(MemoryNode(bytes(1 << 19), delays=rng), header)
    texts = [rng.randbytes(5000) for _ in range(32)]
    await asyncio.gather(
        *(edge((first, second)[i % 2]).pwrite(i * 6000 + 7, text) for i, text in enumerate(texts)),
    )
    for i, text in enumerate(texts):
        assert await edge((first, second)[i % 2]).pread(i * 6000 + 7, 5000) == text
    assert bytes(header.data) == HEADER


async def test_unaligned_overlapping_writers_over_large_sectors() -> None:
    """32 writers at once over 4096-byte sectors, each to bytes of its own in sectors that they share."""
    payload = MemoryNode(bytes(64 * 1024), delays=random.Random(5))
    node = await opened(payload, MemoryNode(gen.header(gen.tree(sector_size=4096))))
    child = edge(node)
    model = bytearray(await child.pread(0, 64 * 1024))
    work = []
    for i in range(32):
        text = bytes([i + 1]) * 1900
        model[i * 2000 + 50 : i * 2000 + 1950] = text
        work.append(child.pwrite(i * 2000 + 50, text))
    await asyncio.gather(*work)
    assert await child.pread(0, 64 * 1024) == model


async def test_description_without_a_passphrase() -> None:
    node, options, _ = luks_node(MemoryNode(bytes(4096)), MemoryNode(HEADER))
    await node.open(options)
    data = node.image_info()["format-specific"]["data"]
    assert (data["version"], data["detached-header"], data["cipher-alg"]) == (2, True, "aes-128")
    await node.close()


class Moving(MemoryNode):
    """A header to which something happens just before a place in it is read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.before: dict[int, Callable[[], Awaitable[None]]] = {}

    async def preadv(self, batch: Batch) -> None:
        for request in batch:
            happens = self.before.pop(request.offset, None)
            if happens is not None:
                await happens()
        await super().preadv(batch)


async def test_a_volume_is_unlocked_while_its_passphrase_moves_to_another_place() -> None:
    """Between the header and its key material, slot 1 went elsewhere: "Invalid password" for a good passphrase."""
    tree = gen.tree()
    tree["config"]["keyslots_size"] = str(4 * gen.AREA)
    target = Moving(gen.header(tree) + bytes(3 * gen.AREA))
    header = edge(target)
    text = {"s": gen.PASSPHRASE, "n": b"newpass", "x": b"other"}

    async def change(**options: Any) -> None:
        edit = KeyslotEdit(iterations=1000, pbkdf="pbkdf2", **options)
        work = partial(edit_keyslots, header, edit, lambda name: SecretBytes(text[name]), "s", detached=True)
        await header_of(target).change(partial(work, force=False))

    await change(state="active", new_secret="n")
    node, options, secrets = luks_node(MemoryNode(bytes(4096)), target)
    secrets._secrets["s"] = text["n"]
    await node.open(options)
    place = 2 * gen.COPY + gen.AREA
    target.before[place] = partial(change, state="changed", new_secret="n", keyslot=1)
    await node.unlock()
    assert not target.before
    assert await edge(node).pread(0, 16)
    await node.close()
    node, options, secrets = luks_node(MemoryNode(bytes(4096)), target)
    secrets._secrets["s"] = text["n"]
    await node.open(options)
    target.before[2 * gen.COPY] = partial(change, state="changed", new_secret="x", keyslot=1)
    with pytest.raises(CommandError, match="Invalid password"):
        await node.unlock()
    assert not target.before
    await node.close()
