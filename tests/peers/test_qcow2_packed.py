"""Compressed clusters and subclusters under random work, many requests at once: against a model, then against QEMU."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from qmpd.block.batch import Batch, Request, WriteFlags
from qmpd.block.node import BlockNode
from qmpd.block.options import NodeOptions
from qmpd.drivers._qcow2_check import check_image
from qmpd.drivers.compress import CompressNode, CompressOptions
from tests.conftest import FULL
from tests.gen.qcow2 import MemoryNode, Qcow2Node, edge, make, open_qcow2, random_delay, save
from tests.gen.qcow2_model import Disk, Op
from tests.peers.conftest import need

SEEDS = 400 if FULL else 40


def qemu_img(*arguments: str | Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def random_group(chance: random.Random, size: int, cluster: int) -> list[Op]:
    group = []
    for _ in range(chance.randint(1, 20)):
        kind = chance.choice(("write", "write", "write", "read", "zero", "unmap", "discard", "flush"))
        unit = chance.choice((1, 512, cluster // 32 or 1, cluster))
        offset = chance.randrange(size) // unit * unit
        length = max(chance.randrange(1, 2 * cluster) // unit * unit, unit)
        group.append(Op(kind, offset, min(length, size - offset), chance.randrange(256)))
    return group


async def write_packed(chance: random.Random, disk: Disk, cluster: int) -> None:
    """Write some whole clusters compressed; one of five does not get smaller."""
    size = len(disk.model)
    batch = Batch()
    for _ in range(chance.randint(0, 4)):
        start = chance.randrange(size // cluster + 1) * cluster
        length = min(chance.randint(1, 3) * cluster, size - start)
        if length <= 0 or any(one.offset < start + length and start < one.end for one in batch):
            continue
        data = bytes([chance.randrange(255)]) * length if chance.random() < 0.8 else chance.randbytes(length)
        batch.append(Request(start, memoryview(data)))
        disk.model[start : start + length] = data
    await disk.disk.pwritev(batch, WriteFlags.COMPRESSED)
    batch.raise_first()


def extents(node: Qcow2Node, found: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(one["start"], one["length"], one["zero"], one["data"], one.get("offset")) for one in found]


@pytest.mark.proof("qcow2-packed", seeds=SEEDS)
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_packed_clusters_and_subclusters(seed: int, tmp_path: Path) -> None:
    need("qemu-img")
    chance = random.Random(seed)
    extended = seed % 4 != 0
    cluster = chance.choice((16384, 32768, 65536) if extended else (512, 4096, 65536))
    size = chance.randint(1, 30) * cluster + chance.choice((0, 512))
    bits = chance.choice((1, 2, 16))
    backing: BlockNode | None = None
    content = bytes(size)
    if chance.random() < 0.5:
        below = chance.randint(1, size // 512) * 512
        text = Op("write", 0, below, 99).data(0, below)
        backing = MemoryNode(text, "below")
        save(backing, tmp_path / "below.raw")
        content = text.ljust(size, b"\0")
    file = await make(
        size=size,
        cluster_size=cluster,
        extended_l2=extended,
        compression_type=chance.choice(("zlib", "zstd")),
        refcount_bits=bits,
        lazy_refcounts=chance.random() < 0.3,
        backing_file=None if backing is None else "below.raw",
        backing_fmt=None if backing is None else "raw",
    )
    file.delay = random_delay(seed)
    node = await open_qcow2(file, backing=backing, discard_no_unref=chance.random() < 0.2 or None)
    disk = Disk(edge(node), content)
    for number in range(5):
        await disk.run(random_group(chance, size, cluster))
        await write_packed(chance, disk, cluster)
        if bits == 16 and chance.random() < 0.2:
            await node.snapshot_create(f"s{number}")
    assert bytes(await edge(node).pread(0, size)) == bytes(disk.model)
    await edge(node).flush()
    if not node.image.settings.lazy_refcounts:
        found = await check_image(node.image)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
    await node.close()
    image = save(file, tmp_path / "image.qcow2")
    qemu_img("check", "-q", image)
    (tmp_path / "model.raw").write_bytes(disk.model)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", image, tmp_path / "model.raw")


@pytest.mark.proof("qcow2-compress-filter", seeds=SEEDS // 4)
@pytest.mark.parametrize("seed", range(SEEDS // 4))
async def test_all_that_goes_through_the_compress_filter(seed: int, tmp_path: Path) -> None:
    """Requests of any size and place, many at once: each rewrites its clusters compressed."""
    need("qemu-img")
    chance = random.Random(seed)
    size = chance.randint(1, 40) * 4096 + chance.choice((0, 512))
    file = await make(size=size, cluster_size=4096)
    file.delay = random_delay(seed)
    node = await open_qcow2(file)
    above = CompressNode(node.graph, "c", NodeOptions(discard="unmap"), {})
    above.children["file"] = edge(node, parent=above)
    await above.open(CompressOptions(file=above.children["file"]))
    disk = Disk(edge(above), bytes(size))
    for _ in range(5):
        await disk.run(random_group(chance, size, 4096)[:8])
    await node.close()
    image = save(file, tmp_path / "image.qcow2")
    qemu_img("check", "-q", image)
    (tmp_path / "model.raw").write_bytes(disk.model)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", image, tmp_path / "model.raw")


@pytest.mark.parametrize("cluster", [16384, 65536, 2 << 20])
@pytest.mark.parametrize("preallocation", ["off", "metadata"])
async def test_subclusters_that_qemu_wrote(cluster: int, preallocation: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    size = 64 * cluster
    image = tmp_path / "image.qcow2"
    options = f"extended_l2=on,cluster_size={cluster},preallocation={preallocation}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(size))
    chance = random.Random(cluster)
    model = bytearray(size)
    commands: list[str] = []
    for number in range(40):
        offset, length = chance.randrange(size // 512) * 512, chance.randrange(1, 3 * cluster // 512) * 512
        length = min(length, size - offset)
        if number % 4 == 3:
            commands += ["-c", f"write -q -z {offset} {length}"]
            model[offset : offset + length] = bytes(length)
        else:
            commands += ["-c", f"write -q -P {number + 1} {offset} {length}"]
            model[offset : offset + length] = bytes([number + 1]) * length
    subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(image)], check=True, capture_output=True)
    node = await open_qcow2(MemoryNode(image.read_bytes()))
    assert bytes(await edge(node).pread(0, size)) == model
    ours = await edge(node).block_status(0, size)
    theirs = json.loads(qemu_img("map", "--output=json", image))
    assert [(one.offset, one.length, one.zero, one.data, one.host) for one in ours] == extents(node, theirs)
    found = await check_image(node.image)
    assert (found.corruptions, found.leaks) == (0, 0), found.messages
    disk = Disk(edge(node), bytes(model))
    for _ in range(3):
        await disk.run(random_group(chance, size, cluster))
    await node.close()
