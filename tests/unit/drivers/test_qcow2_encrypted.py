"""Encryption inside qcow2 on files in memory: what is and is not encrypted, key slots under load, secrets."""

from __future__ import annotations

import asyncio
import errno
from typing import Any, cast

import pytest

from qmpd.block.batch import Batch, Request
from qmpd.block.options import OpenFlags
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.drivers._qcow2_crypto import Encryption, Placed, Window
from qmpd.drivers.qcow2 import Qcow2Node
from qmpd.errors import CommandError
from qmpd.luks.keys import KeyslotEdit
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2, random_delay

CLUSTER = 4096
LUKS = {"format": "luks", "cipher-alg": "aes-128", "iterations": 1000}
AES = {"format": "qcow"}
METHODS = pytest.mark.parametrize("encrypt", [LUKS, AES], ids=["luks", "aes"])


def opening(encrypt: dict[str, Any]) -> dict[str, Any]:
    return {"encrypt": {"format": "luks" if encrypt is LUKS else "aes", "key-secret": "s"}}


async def image(encrypt: dict[str, Any], **more: Any) -> tuple[MemoryNode, Qcow2Node]:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER, encrypt=encrypt)
    return file, await open_qcow2(file, **opening(encrypt), **more)


def encryption(node: Qcow2Node) -> Encryption:
    found = node.image.encryption
    assert found is not None
    return found


@METHODS
async def test_what_surrounds_a_small_write_is_encrypted_too(encrypt: dict[str, Any]) -> None:
    """The rest of a new cluster comes from below as plaintext, or is zeroes: neither may get to the file."""
    below = MemoryNode(b"o" * 32 * CLUSTER, "below")
    file, node = await image(encrypt, backing=below)
    disk = edge(node)
    await disk.pwrite(100, b"new" * 40)
    await disk.pwrite(40 * CLUSTER + 7, b"above the end of what is below")
    await node.flush()
    for text in (b"o" * 16, b"new" * 5, b"above the end"):
        assert text not in file.content
    data = bytes(await disk.pread(0, 64 * CLUSTER))
    assert data[:220] == b"o" * 100 + b"new" * 40
    assert data[40 * CLUSTER : 40 * CLUSTER + 37] == bytes(7) + b"above the end of what is below"
    assert not any(data[40 * CLUSTER + 37 :])
    stored = next(run for run in await node.block_status(40 * CLUSTER, CLUSTER))
    assert (stored.data, stored.zero, stored.host) == (True, False, None)
    await node.close()


@METHODS
async def test_the_rest_of_a_large_cluster_is_encrypted_zeroes(encrypt: dict[str, Any]) -> None:
    """Zeroed by the file's own zero write, as in an image without encryption, it would read as garbage."""
    file = await make(size=4 << 20, cluster_size=2 << 20, encrypt=encrypt)
    node = await open_qcow2(file, **opening(encrypt))
    await edge(node).pwrite(1 << 20, b"in the middle")
    assert bytes(await edge(node).pread(0, 4 << 20)) == (bytes(1 << 20) + b"in the middle").ljust(4 << 20, b"\0")
    await node.close()


@METHODS
async def test_zero_clusters_stay_what_they_are(encrypt: dict[str, Any]) -> None:
    file, node = await image(encrypt)
    disk = edge(node)
    await disk.pwrite(0, b"x" * 4 * CLUSTER)
    writes = file.writes
    await disk.pwrite_zeroes(CLUSTER, 2 * CLUSTER)
    assert file.writes == writes
    assert bytes(await disk.pread(0, 4 * CLUSTER)) == b"x" * CLUSTER + bytes(2 * CLUSTER) + b"x" * CLUSTER
    await disk.pwrite(CLUSTER + 5, b"y")
    assert bytes(await disk.pread(CLUSTER, CLUSTER)) == bytes(5) + b"y" + bytes(CLUSTER - 6)
    await node.close()


async def test_equal_clusters_are_not_equal_in_the_file() -> None:
    """LUKS numbers a sector by its place in the file, the old method by that on the disk: both never repeat one."""
    for encrypt in (LUKS, AES):
        file, node = await image(encrypt)
        await edge(node).pwrite(0, b"x" * 16 * CLUSTER)
        await node.close()
        content = bytes(file.content)
        sectors = [content[at : at + 512] for at in range(0, len(content), 512)]
        whole = [sector for sector in sectors if any(sector) and len(set(sector)) > 150]
        assert len(whole) >= 16 * CLUSTER // 512
        assert len(set(whole)) == len(whole)


@METHODS
async def test_a_failed_write_fails_no_neighbour(encrypt: dict[str, Any]) -> None:
    file, node = await image(encrypt)
    disk = edge(node)
    await disk.pwrite(0, b"a" * 3 * CLUSTER)
    place = len(file.content) - 2 * CLUSTER
    file.error = lambda kind, offset, length: errno.EIO if kind == "write" and offset == place else 0
    batch = Batch(Request(at * CLUSTER, memoryview(b"b" * CLUSTER)) for at in range(3))
    await disk.pwritev(batch)
    assert sorted(request.error for request in batch) == [0, 0, errno.EIO]
    file.error = lambda *_: 0
    for request in batch:
        seen = bytes(await disk.pread(request.offset, CLUSTER))
        assert seen == (b"a" if request.error else b"b") * CLUSTER
    await node.close()


class Texts:
    """Secrets with their ids for passphrases, but `s`, which is that of the images."""

    def passphrase(self, object_id: str) -> SecretBytes:
        return SecretBytes(b"abc123" if object_id == "s" else object_id.encode())


async def test_key_slots_change_under_writes() -> None:
    file, node = await image(LUKS)
    file.delay = random_delay(3)
    disk = edge(node)

    async def writer(number: int) -> None:
        for turn in range(20):
            await disk.pwrite((number * 16 + turn % 16) * CLUSTER + 100, bytes([number + 1]) * CLUSTER)

    async def change() -> None:
        for edit in (KeyslotEdit("active", new_secret="n", iter_time=1), KeyslotEdit("inactive", old_secret="s")):
            await encryption(node).edit_keyslots(edit, Texts().passphrase, force=False)

    await asyncio.gather(change(), *(writer(number) for number in range(3)))
    before = bytes(await disk.pread(0, 64 * CLUSTER))
    assert [slot["active"] for slot in node.image_info()["format-specific"]["data"]["encrypt"]["slots"]][:2] == [
        False,
        True,
    ]
    await node.close()
    with pytest.raises(CommandError, match="Invalid password, cannot unlock any keyslot"):
        await open_qcow2(MemoryNode(bytes(file.content)), **opening(LUKS))
    again = await open_qcow2(MemoryNode(bytes(file.content)), read_only=True, flags=OpenFlags.NO_IO, **opening(LUKS))
    await encryption(again).unlock(SecretBytes(b"n"))
    assert bytes(await edge(again).pread(0, 64 * CLUSTER)) == before


async def test_two_changes_of_key_slots_do_not_meet() -> None:
    file, node = await image(LUKS)
    file.delay = lambda: 0.001
    first = asyncio.create_task(
        encryption(node).edit_keyslots(KeyslotEdit("inactive", old_secret="x"), Texts().passphrase, force=False)
    )
    await asyncio.sleep(0)
    with pytest.raises(CommandError, match="Another job changes the key slots of this volume"):
        await encryption(node).edit_keyslots(KeyslotEdit("inactive", keyslot=0), Texts().passphrase, force=True)
    with pytest.raises(CommandError, match="No keyslots match"):
        await first
    await node.close()


async def test_nothing_is_unlocked_to_be_described() -> None:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER, encrypt=LUKS)
    node = await open_qcow2(file, read_only=True, flags=OpenFlags.NO_IO)
    info = node.image_info()
    assert info["encrypted"] is True
    assert info["format-specific"]["data"]["encrypt"]["format"] == "luks"


async def test_the_old_method_is_not_for_machines() -> None:
    file = await make(size=64 * CLUSTER, cluster_size=CLUSTER, encrypt=AES)
    with pytest.raises(CommandError, match="no longer supported in system emulators"):
        await open_qcow2(file, flags=OpenFlags.NO_AES, **opening(AES))


async def test_no_key_shows() -> None:
    file, node = await image(LUKS)
    text = f"{node!r} {vars(encryption(node))!r} {vars(node)!r} {vars(node.image)!r}"
    crypto = encryption(node)._cipher
    assert "abc123" not in text
    await node.close()
    with pytest.raises((ValueError, AssertionError)):
        crypto.decrypt([(0, bytearray(512), bytearray(512))])
    assert b"abc123" not in bytes(file.content)


async def test_a_window_does_not_let_through() -> None:
    file = MemoryNode(bytes(8192))
    window = Window(cast(Any, edge(file)), 4096, 1024)
    for offset, length in ((-1, 1), (1024, 1), (1000, 25)):
        with pytest.raises(CommandError, match="outside of extension header"):
            await window.pread(offset, length)
        with pytest.raises(CommandError, match="outside of extension header"):
            await window.pwrite(offset, bytes(length))
    assert bytes(await window.pread(0, 1024)) == bytes(1024)


def test_a_part_of_a_placed_request_knows_its_place() -> None:
    part = Placed(8192, 100, memoryview(bytes(10))).part(9000, 3, 4)
    assert isinstance(part, Placed)
    assert (part.offset, part.guest, len(part.view)) == (9000, 103, 4)
