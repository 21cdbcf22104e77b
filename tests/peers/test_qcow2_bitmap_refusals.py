"""Broken bitmap directories and tables: what QEMU says of them when it opens the image, and what we say."""

from __future__ import annotations

import asyncio
import struct
import subprocess
from pathlib import Path

import pytest

from qmpd.block import dirty_bitmap
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2
from tests.peers.conftest import need
from tests.peers.test_qcow2_refusals import asked, told

CLUSTER = 4096
ENTRY = {
    "table_offset": (0, ">Q"), "table_size": (8, ">I"), "flags": (12, ">I"), "type": (16, ">B"),
    "granularity": (17, ">B"), "name_size": (18, ">H"), "extra_size": (20, ">I"),
}  # fmt: skip
EXTENSION = {"count": (0, ">I"), "reserved": (4, ">I"), "size": (8, ">Q"), "offset": (16, ">Q")}


async def image() -> bytes:
    """Return an image with the bitmaps "first" and "other", some of their bits set."""
    file = await make(size=1 << 20, cluster_size=CLUSTER)
    node = await open_qcow2(file)
    for name in ("first", "other"):
        dirty_bitmap.add(node, name, 512, persistent=True, disabled=False)
    await edge(node).pwrite(5000, b"x" * 5000)
    await node.close()
    return bytes(file.content)


def extension(data: bytes) -> int:
    """Return where the data of the bitmaps extension is."""
    at: int = struct.unpack_from(">I", data, 100)[0]
    while True:
        kind, length = struct.unpack_from(">II", data, at)
        if kind == 0x23852875:
            return at + 8
        at += 8 + -(-length // 8) * 8


def patched(data: bytes, where: str, field: str, value: int) -> bytes:
    """Return the image with one field changed of the "extension", the "first" or "other" entry, or a "table"."""
    changed = bytearray(data)
    place = extension(data)
    directory = struct.unpack_from(">Q", data, place + 16)[0]
    if where == "extension":
        at, kind = EXTENSION[field]
        struct.pack_into(kind, changed, place + at, value)
    elif where == "table":
        table = struct.unpack_from(">Q", data, directory)[0]
        struct.pack_into(">Q", changed, table + 8 * int(field), value)
    else:
        at, kind = ENTRY[field]
        entry = directory + (32 if where == "other" else 0)
        struct.pack_into(kind, changed, entry + at, value)
    return bytes(changed)


CASES = (
    *(("extension", "count", value) for value in (0, 1, 3, 65536, 2**32 - 1)),
    ("extension", "reserved", 1),
    *(("extension", "size", value) for value in (0, 1, 24, 32, 63, 65, 96, 4096, 2**20, 65535 * 1024 + 1, 2**63)),
    *(("extension", "offset", value) for value in (0, 512, CLUSTER, 1 << 30, 2**62, 2**64 - CLUSTER)),
    *(("first", "table_offset", value) for value in (0, 512, CLUSTER, 1 << 30, 2**63)),
    *(("first", "table_size", value) for value in (0, 2, 3, 2**17 - 1, 2**17, 2**17 + 1, 2**32 - 1)),
    *(("first", "flags", value) for value in (0, 1, 2, 3, 4, 8, 2**31)),
    *(("first", "type", value) for value in (0, 2, 255)),
    *(("first", "granularity", value) for value in (0, 8, 10, 31, 32, 63, 64, 255)),
    *(("first", "name_size", value) for value in (0, 1, 4, 6, 100, 1023, 1024, 65535)),
    *(("first", "extra_size", value) for value in (1, 8, 32, 2**32 - 1)),
    *(("other", field, 2**8 - 1) for field in ENTRY),
    *(("table", "0", value) for value in (0, 1, 2, 512, CLUSTER + 1, CLUSTER, 1 << 30, 1 << 62, 1 << 56, 1 << 55)),
)  # fmt: skip


@pytest.mark.timeout(120)
async def test_what_is_wrong_is_said_in_the_same_words(tmp_path: Path) -> None:
    need("qemu-io")
    good = await image()
    (tmp_path / "good.qcow2").write_bytes(good)
    subprocess.run(["qemu-img", "check", "-q", str(tmp_path / "good.qcow2")], check=True)
    different = []
    for case in CASES:
        broken = patched(good, *case)
        for read_only in (True, False):
            theirs = await asyncio.to_thread(asked, broken, tmp_path, read_only=read_only)
            ours = await told(broken, read_only=read_only)
            if ours != theirs:
                different.append((*case, read_only, ours, theirs))
    assert not different


async def test_a_table_that_names_one_cluster_often_is_refused() -> None:
    """QEMU reads it again and again; a small file could then stand for any amount of bits in memory."""
    file = await make(size=64 << 20, cluster_size=512)
    node = await open_qcow2(file)
    dirty_bitmap.add(node, "b", 512, persistent=True, disabled=False)
    await edge(node).pwrite(0, b"x" * (16 << 20))
    await node.close()
    data = bytearray(file.content)
    directory = struct.unpack_from(">Q", data, extension(bytes(data)) + 16)[0]
    table = struct.unpack_from(">Q", data, directory)[0]
    data[table + 8 : table + 16] = data[table : table + 8]
    said = await told(bytes(data))
    assert said == "Could not read bitmap 'b' from image: Invalid argument"
    assert MemoryNode(bytes(data)).size
