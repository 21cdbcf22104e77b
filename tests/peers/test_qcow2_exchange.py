"""qcow2 images of every kind between QEMU and us: what one wrote the other reads, checks and mends."""

from __future__ import annotations

import asyncio
import json
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpd.drivers._qcow2_check import check_image
from qmpd.formats.qcow2 import COPIED
from qmpd.formats.qcow2_header import DIRTY
from tests.gen.qcow2 import MemoryNode, edge, events_of, make, open_qcow2, save
from tests.gen.qcow2_model import Disk, Op
from tests.peers.conftest import need

MIB = 1 << 20


def run(*command: str | Path, accept: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode in accept, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def raw_of(image: Path) -> bytes:
    out = image.with_suffix(".out")
    run("qemu-img", "convert", "-O", "raw", image, out)
    return out.read_bytes()


def layered(path: Path, *, size: int = MIB, options: str = "cluster_size=4096", commands: tuple[str, ...] = ()) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    for command in commands:
        run("qemu-io", "-f", "qcow2", "-d", "unmap", "-c", command, path)
    return path


async def overwrite(image: Path, seed: int, **options: object) -> MemoryNode:
    """Work on an image QEMU made; compare with the model and with QEMU, and return the file."""
    before = raw_of(image)
    file = MemoryNode(image.read_bytes())
    node = await open_qcow2(file, **options)  # type: ignore[arg-type]
    disk = Disk(edge(node), before)
    size = len(before)
    rng = random.Random(seed)
    await disk.run([Op("read", 0, size)])
    for _ in range(6):
        group = []
        for _ in range(8):
            kind = rng.choice(("write", "write", "read", "zero", "unmap", "discard", "flush"))
            offset = rng.randrange(size)
            group.append(Op(kind, offset, min(rng.randint(1, 20_000), size - offset), rng.randrange(256)))
        await disk.run(group)
    await node.close()
    save(file, image)
    run("qemu-img", "check", "-q", image)
    assert raw_of(image) == bytes(disk.model)
    return file


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [4096, 65536])
async def test_compressed_clusters(compression: str, cluster: int, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    source = tmp_path / "source.raw"
    source.write_bytes(
        b"".join(bytes([number % 251]) * 700 + b"text" * number for number in range(1000)).ljust(MIB, b"-")[:MIB]
    )
    image = tmp_path / "image.qcow2"
    options = f"compression_type={compression},cluster_size={cluster}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, image)
    assert b'"compressed": true' in run("qemu-img", "map", "--output=json", image).encode()
    await overwrite(image, 1)


@pytest.mark.parametrize("version", ["0.10", "1.1"])
async def test_clusters_that_a_snapshot_shares(version: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = layered(
        tmp_path / "image.qcow2",
        options=f"cluster_size=4096,compat={version}",
        commands=("write -q -P 1 0 300k", "write -q -P 2 500k 100k"),
    )
    run("qemu-img", "snapshot", "-c", "one", image)
    kept = raw_of(image)
    file = await overwrite(image, 2)
    node = await open_qcow2(MemoryNode(bytes(file.content)), read_only=True)
    [info] = node.image_info()["snapshots"]
    [theirs] = json.loads(run("qemu-img", "info", "--output=json", image))["snapshots"]
    assert info == theirs
    run("qemu-img", "snapshot", "-a", "one", image)
    assert raw_of(image) == kept


@pytest.mark.parametrize("cluster", [512, 65536])
async def test_an_image_that_was_not_closed_is_mended_when_opened(cluster: int, tmp_path: Path) -> None:
    """Lazy refcounts: QEMU is killed after its writes, so that no refcount was ever written."""
    need("qemu-img", "qemu-io")
    image = layered(tmp_path / "image.qcow2", options=f"lazy_refcounts=on,cluster_size={cluster}")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 300k", "-c", "flush", "-c", "abort", str(image)]
    await asyncio.to_thread(subprocess.run, command, check=False, capture_output=True)
    content = image.read_bytes()
    assert struct.unpack_from(">Q", content, 72)[0] & DIRTY
    assert raw_of(image)[: 300 << 10] == b"\5" * (300 << 10)
    file = MemoryNode(content)
    node = await open_qcow2(file, read_only=True)
    assert node.image_info()["dirty-flag"]
    await node.close()
    node = await open_qcow2(file)
    assert not node.image_info()["dirty-flag"]
    await node.close()
    run("qemu-img", "check", "-q", save(file, image))
    assert raw_of(image)[: 300 << 10] == b"\5" * (300 << 10)


async def test_our_dirty_images_are_mended_by_qemu(tmp_path: Path) -> None:
    need("qemu-img")
    file = await make(size=MIB, cluster_size=4096, lazy_refcounts=True)
    node = await open_qcow2(file)
    await edge(node).pwrite(0, b"x" * 300_000)
    await edge(node).flush()
    image = save(file, tmp_path / "image.qcow2")
    assert "ERROR" in run("qemu-img", "check", image, accept=(2,))
    run("qemu-img", "check", "-q", "-r", "all", image)
    assert raw_of(image)[:300_000] == b"x" * 300_000


def _set(at: int, code: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(f">{code}", data, at, value)


def _entry(table: int, index: int, change: Callable[[int], int]) -> Callable[[bytearray], None]:
    def damage(data: bytearray) -> None:
        at = table + 8 * index
        struct.pack_into(">Q", data, at, change(struct.unpack_from(">Q", data, at)[0]))

    return damage


REFCOUNTS, BLOCK, L1 = 4096, 8192, 12288
"""Where the tables of the damaged image lie; its L2 table follows."""

DAMAGE: dict[str, Callable[[bytearray], None]] = {
    "a leaked cluster": lambda data: (data.extend(bytes(8192)), _set(BLOCK + 2 * 106, "H", 1)(data))[1],
    "a refcount too high": _set(BLOCK + 2 * 5, "H", 2),
    "a refcount far too high": _set(BLOCK + 2 * 6, "H", 65535),
    "a data cluster counted as free": _set(BLOCK + 2 * 6, "H", 0),
    "the header counted as free": _set(BLOCK, "H", 0),
    "the L2 table counted as free": _set(BLOCK + 2 * 4, "H", 0),
    "the refcount block counted as free": _set(BLOCK + 2 * 2, "H", 0),
    "no refcount block": _set(REFCOUNTS, "Q", 0),
    "an unaligned refcount block": _set(REFCOUNTS, "Q", BLOCK + 512),
    "a refcount block after the end": _set(REFCOUNTS, "Q", 1 << 40),
    "reserved bits in the refcount table": _set(REFCOUNTS, "Q", BLOCK | 4),
    "two blocks in one place": _set(REFCOUNTS + 8, "Q", BLOCK),
    "an L1 entry without copied flag": _entry(L1, 0, lambda entry: entry & ~COPIED),
    "an L2 entry without copied flag": _entry(16384, 0, lambda entry: entry & ~COPIED),
    "two L2 entries for one cluster": lambda data: data.__setitem__(slice(16384 + 8, 16384 + 16), data[16384:16392]),
    "all refcounts gone": lambda data: data.__setitem__(slice(BLOCK, BLOCK + 4096), bytes(4096)),
    "the dirty bit": _set(72, "Q", 1),
}


@pytest.mark.parametrize("kind", DAMAGE)
async def test_damage_is_mended_to_what_qemu_calls_clean(kind: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = layered(tmp_path / "image.qcow2", commands=("write -q -P 1 0 400k",))
    sound = raw_of(image)
    data = bytearray(image.read_bytes())
    DAMAGE[kind](data)
    image.write_bytes(data)
    if kind != "the dirty bit":
        run("qemu-img", "check", image, accept=(1, 2, 3))
    file = MemoryNode(bytes(data))
    node = await open_qcow2(file)
    if kind != "the dirty bit":
        found = await check_image(node.image)
        assert found.corruptions + found.leaks > 0
    result = await check_image(node.image, fix_leaks=True, fix_errors=True)
    assert not result.check_errors, result.messages
    again = await check_image(node.image)
    assert (again.corruptions, again.leaks) == (0, 0), again.messages
    await node.close()
    run("qemu-img", "check", "-q", save(file, image))
    assert raw_of(image) == sound
    json_of = json.loads(run("qemu-img", "check", "--output=json", image))
    assert json_of["allocated-clusters"] == again.allocated_clusters
    assert json_of["total-clusters"] == again.total_clusters
    assert json_of.get("fragmented-clusters", 0) == again.fragmented_clusters


OVERLAPS: dict[str, tuple[dict[str, int], int]] = {
    "qcow2_header": ({"free": 0}, 0),
    "active L1 table": ({"free": 3}, 3),
    "refcount table": ({"free": 1}, 1),
    "refcount block": ({"free": 2}, 2),
    "active L2 table": ({"free": 4}, 4),
}


@pytest.mark.parametrize("name", OVERLAPS)
async def test_a_write_into_metadata_is_prevented_as_qemu_prevents_it(name: str, tmp_path: Path) -> None:
    """The refcount of a table says that its cluster is free; the next allocation takes it."""
    need("qemu-img", "qemu-io")
    image = layered(tmp_path / "image.qcow2", commands=("write -q -P 1 0 4k",))
    data = bytearray(image.read_bytes())
    struct.pack_into(">H", data, BLOCK + 2 * OVERLAPS[name][1], 0)
    image.write_bytes(data)
    theirs = run("qemu-io", "-f", "qcow2", "-c", "write 64k 4k", image, accept=(0, 1))
    file = MemoryNode(bytes(data))
    node = await open_qcow2(file)
    with pytest.raises(OSError, match="failed"):
        await edge(node).pwrite(64 << 10, bytes(4096))
    [event] = events_of(node)
    assert event.name == "BLOCK_IMAGE_CORRUPTED"
    assert event.data is not None
    assert event.data["fatal"] is True
    assert event.data["node-name"] == "q"
    assert f"Marking image as corrupt: {event.data['msg']};" in theirs
    with pytest.raises(OSError, match="corrupt"):
        await node.preadv([])  # type: ignore[arg-type]
    await node.close()
    assert struct.unpack_from(">Q", file.content, 72)[0] & 2
    assert file.content[: len(data)].count(b"\1" * 4096) == 1


BROKEN_ENTRIES: dict[str, Callable[[bytearray], None]] = {
    "L2 table": _set(L1, "Q", COPIED | (16384 + 512)),
    "data cluster": _set(16384, "Q", COPIED | (20480 + 512)),
    "zero cluster": _set(16384, "Q", COPIED | (20480 + 512) | 1),
    "data cluster in the second slice": _set(16384 + 8 * 300, "Q", COPIED | (20480 + 1024)),
}


@pytest.mark.parametrize("request_kind", ["read", "write"])
@pytest.mark.parametrize("kind", BROKEN_ENTRIES)
async def test_broken_entries_are_reported_as_qemu_reports_them(kind: str, request_kind: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = layered(tmp_path / "image.qcow2", size=2 * MIB, commands=("write -q -P 1 0 64k",))
    data = bytearray(image.read_bytes())
    BROKEN_ENTRIES[kind](data)
    image.write_bytes(data)
    offset = 300 * 4096 if "second" in kind else 0
    theirs = run("qemu-io", "-f", "qcow2", "-c", f"{request_kind} {offset} 4k", image, accept=(0, 1))
    node = await open_qcow2(MemoryNode(bytes(data)), l2_cache_entry_size=4096)
    disk = edge(node)
    with pytest.raises(OSError, match="failed"):
        await (disk.pread(offset, 4096) if request_kind == "read" else disk.pwrite(offset, bytes(4096)))
    [event] = events_of(node)
    assert event.data is not None
    assert f"Marking image as corrupt: {event.data['msg']};" in theirs
    quiet = await open_qcow2(MemoryNode(bytes(data)), read_only=True)
    with pytest.raises(OSError, match="failed"):
        await edge(quiet).pread(offset, 4096)
    with pytest.raises(OSError, match="failed"):
        await edge(quiet).pread(offset, 4096)
    [event] = events_of(quiet)
    assert event.data is not None
    assert event.data["fatal"] is False


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster", [512, 4096, 65536])
async def test_growing_and_shrinking(cluster: int, version: int, tmp_path: Path) -> None:
    need("qemu-img")
    file = await make(size=64 * cluster, cluster_size=cluster, version=version)
    node = await open_qcow2(file)
    disk = edge(node)
    model = bytearray()
    rng = random.Random(cluster)
    for step in range(12):
        size = rng.randint(1, 300) * cluster + rng.choice((0, 512))
        await node.truncate(size)
        assert node.size == size
        model = model[:size].ljust(size, b"\0")
        for _ in range(3):
            offset = rng.randrange(size)
            data = Op("write", offset, min(rng.randint(1, 9 * cluster), size - offset), step)
            await disk.pwrite(offset, data.data(offset, data.end))
            model[offset : data.end] = data.data(offset, data.end)
        assert bytes(await disk.pread(0, size)) == bytes(model)
    await node.close()
    image = save(file, tmp_path / "image.qcow2")
    run("qemu-img", "check", "-q", image)
    assert raw_of(image) == bytes(model)


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize(("cluster", "size"), [(512, MIB), (4096, 3 * MIB), (65536, 10 * MIB + 512), (65536, 0)])
async def test_new_images_are_clean(preallocation: str, cluster: int, size: int, tmp_path: Path) -> None:
    need("qemu-img")
    file = await make(size=size, cluster_size=cluster, preallocation=preallocation)
    image = save(file, tmp_path / "image.qcow2")
    run("qemu-img", "check", "-q", image)
    info = json.loads(run("qemu-img", "info", "--output=json", image))
    theirs = tmp_path / "theirs.qcow2"
    options = f"cluster_size={cluster},preallocation={preallocation}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, theirs, str(size))
    expected = json.loads(run("qemu-img", "info", "--output=json", theirs))
    assert info["format-specific"] == expected["format-specific"]
    assert info["virtual-size"] == expected["virtual-size"]
    assert raw_of(image) == bytes(size)
    node = await open_qcow2(file)
    ours = node.image_info()
    assert ours["format-specific"] == expected["format-specific"]
    assert ours["cluster-size"] == expected["cluster-size"]
    await node.close()


async def test_block_status_is_what_qemu_maps(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = layered(
        tmp_path / "image.qcow2",
        commands=(
            "write -q -P 1 0 20k",
            "write -q -z 40k 20k",
            "write -q -P 1 100k 8k",
            "write -q -z 100k 4k",
            "discard -q 0 4k",
        ),
    )
    theirs = json.loads(run("qemu-img", "map", "--output=json", image))
    node = await open_qcow2(MemoryNode(image.read_bytes()), read_only=True)
    ours = [
        {"start": one.offset, "length": one.length, "zero": one.zero, "data": one.data, "offset": one.host}
        for one in await edge(node).block_status(0, node.size)
    ]
    expected = [
        {
            key: value
            for key, value in ({"offset": None} | one).items()
            if key in ("start", "length", "zero", "data", "offset")
        }
        for one in theirs
    ]
    assert ours == expected


async def test_bitmaps_are_in_use_while_the_image_is_open_for_writing(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = layered(tmp_path / "image.qcow2", commands=("write -q -P 1 0 20k",))
    for name in ("b0", "b1"):
        run("qemu-img", "bitmap", "--add", image, name)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 2 100k 20k", image)
    stored = image.read_bytes()
    theirs = json.loads(run("qemu-img", "info", "--output=json", image))["format-specific"]
    file = MemoryNode(stored)
    reader = await open_qcow2(file, read_only=True)
    assert reader.image_info()["format-specific"] == theirs
    assert bytes(file.content[: len(stored)]) == stored
    node = await open_qcow2(file)
    used = json.loads(run("qemu-img", "info", "--output=json", save(file, image)))["format-specific"]
    assert [one["flags"] for one in used["data"]["bitmaps"]] == [["in-use", "auto"]] * 2
    assert node.image_info()["format-specific"] == used
    await edge(node).pwrite(200 << 10, b"x")
    marked = [bitmap.sha256() for bitmap in node.dirty_bitmaps]
    await node.close()
    assert json.loads(run("qemu-img", "info", "--output=json", save(file, image)))["format-specific"] == theirs
    run("qemu-img", "check", "-q", image)
    again = await open_qcow2(MemoryNode(image.read_bytes()))
    assert [bitmap.sha256() for bitmap in again.dirty_bitmaps] == marked[::-1]
    assert (await check_image(again.image)).corruptions == 0
    await again.close()
