"""Random work through qcow2, many requests at once over a slow file: against a model, then against QEMU."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import FULL
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2, random_delay, save
from tests.gen.qcow2_model import Disk, Op, groups
from tests.peers.conftest import need

EXAMPLES = 1000 if FULL else 100


@dataclass(frozen=True)
class Shape:
    """An image under test; sizes in bytes, `below` of the backing file or None."""

    cluster: int
    version: int
    bits: int
    lazy: bool
    size: int
    below: int | None
    l2_cache: int | None
    no_unref: bool
    seed: int


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    cluster = draw(st.sampled_from((512, 1024, 4096, 65536)))
    version = draw(st.sampled_from((2, 3, 3)))
    size = draw(st.integers(1, 40 if cluster < 65536 else 12)) * cluster + draw(st.sampled_from((0, 512)))
    return Shape(
        cluster=cluster,
        version=version,
        bits=16 if version == 2 else draw(st.sampled_from((1, 2, 4, 8, 16, 32, 64))),
        lazy=version == 3 and draw(st.booleans()),
        size=size,
        below=draw(st.none() | st.integers(1, size + cluster).map(lambda value: -(-value // 512) * 512)),
        l2_cache=draw(st.sampled_from((None, 1))),
        no_unref=version == 3 and draw(st.integers(0, 4)) == 0,
        seed=draw(st.integers(0, 1 << 20)),
    )


@st.composite
def works(draw: st.DrawFn) -> tuple[Shape, list[list[Op]]]:
    shape = draw(shapes())
    return shape, draw(groups(shape.size, shape.cluster))


def qemu_img(*arguments: str | Path, accept: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode in accept, done.stdout + done.stderr
    return done.stdout


async def work_on(shape: Shape, work: list[list[Op]], folder: Path) -> tuple[MemoryNode, bytes]:
    """Do the work on a new image and return its file and what the disk must hold."""
    content = bytes(shape.size)
    backing: MemoryNode | None = None
    if shape.below is not None:
        text = Op("write", 0, shape.below, 99).data(0, shape.below)
        backing = MemoryNode(text, "below")
        content = text[: shape.size].ljust(shape.size, b"\0")
        backing.delay = random_delay(shape.seed + 1)
        save(backing, folder / "below.raw")
    file = await make(
        size=shape.size,
        cluster_size=shape.cluster,
        version=shape.version,
        refcount_bits=shape.bits,
        lazy_refcounts=shape.lazy,
        backing_file=None if backing is None else "below.raw",
        backing_fmt=None if backing is None else "raw",
    )
    file.delay = random_delay(shape.seed)
    node = await open_qcow2(
        file, backing=backing, l2_cache_size=shape.l2_cache, discard_no_unref=shape.no_unref or None
    )
    disk = Disk(edge(node), content)
    for group in work:
        await disk.run(group)
    await node.close()
    assert not node.image.dead
    return file, bytes(disk.model)


@pytest.mark.proof("qcow2-random", examples=EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(works())
def test_work_at_once_leaves_a_clean_image_that_reads_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    need("qemu-img")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, model = asyncio.run(work_on(shape, work, folder))
        image = save(file, folder / "image.qcow2")
        qemu_img("check", "-q", "-f", "qcow2", image)
        expected = folder / "model.raw"
        expected.write_bytes(model)
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", image, expected)


@pytest.mark.proof("qcow2-random-theirs", examples=EXAMPLES // 2)
@settings(max_examples=EXAMPLES // 2)
@given(works())
def test_images_that_qemu_wrote_read_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    need("qemu-img", "qemu-io")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asyncio.run(_read_back(shape, work, folder))


async def _read_back(shape: Shape, work: list[list[Op]], folder: Path) -> None:
    model = bytearray(shape.size)
    options = [f"cluster_size={shape.cluster}", f"compat={'0.10' if shape.version == 2 else '1.1'}"]
    if shape.version == 3:
        options += [f"refcount_bits={shape.bits}", f"lazy_refcounts={'on' if shape.lazy else 'off'}"]
    backing: MemoryNode | None = None
    if shape.below is not None:
        text = Op("write", 0, shape.below, 99).data(0, shape.below)
        backing = MemoryNode(text)
        save(backing, folder / "below.raw")
        model[:] = text[: shape.size].ljust(shape.size, b"\0")
        options += [f"backing_file={folder / 'below.raw'}", "backing_fmt=raw"]
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(options), image, str(shape.size))
    commands: list[str] = []
    for op in (op for group in work for op in group):
        if op.kind == "write":
            commands += ["-c", f"write -q -P {op.seed} {op.offset} {op.length}"]
            model[op.offset : op.end] = bytes([op.seed]) * op.length
        elif op.kind in ("zero", "unmap"):
            commands += ["-c", f"write -q -z {'-u ' if op.kind == 'unmap' else ''}{op.offset} {op.length}"]
            model[op.offset : op.end] = bytes(op.length)
        elif op.kind == "discard" and (shape.version == 3 or backing is None):
            start = -(-op.offset // shape.cluster) * shape.cluster
            end = op.end // shape.cluster * shape.cluster
            if start < end:
                commands += ["-c", f"discard -q {start} {end - start}"]
                model[start:end] = bytes(end - start)
    if commands:
        command = ["qemu-io", "-f", "qcow2", "-d", "unmap", *commands, str(image)]
        subprocess.run(command, check=True, capture_output=True)
    file = MemoryNode(image.read_bytes())
    file.delay = random_delay(shape.seed)
    node = await open_qcow2(file, backing=backing, read_only=not shape.lazy, l2_cache_size=shape.l2_cache)
    disk = Disk(edge(node), bytes(model))
    reads = [op for group in work for op in group if op.kind == "read"]
    await disk.run([Op("read", 0, shape.size), *reads])
    await node.close()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster", [512 << shift for shift in range(13)])
async def test_every_cluster_size_with_every_refcount_width(cluster: int, bits: int, tmp_path: Path) -> None:
    need("qemu-img")
    size = 8 << 20 if cluster < 1 << 20 else 24 << 20
    file = await make(size=size, cluster_size=cluster, refcount_bits=bits)
    node = await open_qcow2(file)
    disk = Disk(edge(node), bytes(size))
    await disk.run([Op("write", 12345, 70_000, 1), Op("write", size - 5000, 5000, 2), Op("zero", 1 << 20, 300_000)])
    await disk.run([Op("write", cluster, cluster, 3), Op("discard", 0, 2 * cluster), Op("unmap", 12000, 9000)])
    await disk.run([Op("read", 0, size)])
    await node.close()
    image = save(file, tmp_path / "image.qcow2")
    qemu_img("check", "-q", image)
    (tmp_path / "model.raw").write_bytes(disk.model)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", image, tmp_path / "model.raw")
