"""External data files of qcow2, held against QEMU in both directions: random work, damage."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block.batch import WriteFlags
from qmpd.formats.qcow2 import OFFSET_MASK
from tests.conftest import FULL
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2, random_delay, save
from tests.gen.qcow2_model import Disk, Op, groups
from tests.peers.conftest import need
from tests.support.data_files import PLAIN, call, qemu_img, within

EXAMPLES = 500 if FULL else 50


# --- random work ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """An image under test; sizes in bytes, `below` of the backing file or None."""

    cluster: int
    size: int
    raw: bool
    extended: bool
    lazy: bool
    below: int | None
    l2_cache: int | None
    no_unref: bool
    seed: int

    @property
    def options(self) -> str:
        words = [f"cluster_size={self.cluster}", f"extended_l2={'on' if self.extended else 'off'}"]
        words += [f"lazy_refcounts={'on' if self.lazy else 'off'}", f"data_file_raw={'on' if self.raw else 'off'}"]
        return ",".join(words)


@st.composite
def works(draw: st.DrawFn) -> tuple[Shape, list[list[Op]]]:
    extended = draw(st.integers(0, 3)) == 0
    cluster = 16384 if extended else draw(st.sampled_from((512, 4096, 65536)))
    raw = draw(st.booleans())
    size = draw(st.integers(1, 40 if cluster < 16384 else 10)) * cluster + draw(st.sampled_from((0, 512)))
    below = st.none() | st.integers(1, size + cluster).map(lambda value: -(-value // 512) * 512)
    shape = Shape(
        cluster=cluster,
        size=size,
        raw=raw,
        extended=extended,
        lazy=draw(st.booleans()),
        below=None if raw else draw(below),
        l2_cache=draw(st.sampled_from((None, 1))),
        no_unref=draw(st.integers(0, 4)) == 0,
        seed=draw(st.integers(0, 1 << 20)),
    )
    return shape, draw(groups(shape.size, shape.cluster, most=12))


def backing_of(shape: Shape, folder: Path) -> tuple[MemoryNode | None, bytes]:
    """Return the backing file, which is in `folder` as well, and what the disk shows at first."""
    if shape.below is None:
        return None, bytes(shape.size)
    text = Op("write", 0, shape.below, 99).data(0, shape.below)
    node = MemoryNode(text, "below")
    save(node, folder / "below.raw")
    return node, text[: shape.size].ljust(shape.size, b"\0")


async def work_on(shape: Shape, work: list[list[Op]], folder: Path) -> bytes:
    """Do the work on a new image, save its files, and return what the disk must hold."""
    backing, content = backing_of(shape, folder)
    data = MemoryNode(b"", "data")
    file = await make(
        data=data,
        data_file="data.raw",
        data_file_raw=shape.raw,
        size=shape.size,
        cluster_size=shape.cluster,
        extended_l2=shape.extended,
        lazy_refcounts=shape.lazy,
        backing_file=None if backing is None else "below.raw",
        backing_fmt=None if backing is None else "raw",
    )
    file.delay, data.delay = random_delay(shape.seed), random_delay(shape.seed + 1)
    node = await open_qcow2(
        file, backing=backing, data=data, l2_cache_size=shape.l2_cache, discard_no_unref=shape.no_unref or None
    )
    disk = Disk(edge(node), content)
    for group in work:
        # Which of two requests wins that overlap may differ between the tables and a file that is read without them.
        for part in [[one] for one in group] if shape.raw else [group]:
            await disk.run(part)
    await node.close()
    assert not node.image.dead
    save(file, folder / "image.qcow2")
    save(data, folder / "data.raw")
    return bytes(disk.model)


@pytest.mark.proof("qcow2-data-file", examples=EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(works())
def test_work_at_once_leaves_a_clean_image_that_reads_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    """With a raw data file, so does that file by itself."""
    need("qemu-img")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = asyncio.run(work_on(shape, work, folder))
        (folder / "model.raw").write_bytes(model)
        qemu_img("check", "-q", "-f", "qcow2", "image.qcow2", folder=folder)
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", "image.qcow2", "model.raw", folder=folder)
        if shape.raw:
            assert (folder / "data.raw").read_bytes()[: shape.size] == model


@pytest.mark.proof("qcow2-data-file-theirs", examples=EXAMPLES // 2)
@settings(max_examples=EXAMPLES // 2)
@given(works())
def test_images_that_qemu_wrote_read_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    need("qemu-img", "qemu-io")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_read_back(shape, [op for group in work for op in group], Path(name)))


async def _read_back(shape: Shape, work: list[Op], folder: Path) -> None:
    backing, content = backing_of(shape, folder)
    options = f"{shape.options},data_file=data.raw"
    options += "" if backing is None else ",backing_file=below.raw,backing_fmt=raw"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "image.qcow2", str(shape.size), folder=folder)
    model, commands = bytearray(content), ["-c", "flush"]
    for op in work:
        if op.kind == "write":
            # qemu-io can only write one byte over and over
            commands += ["-c", f"write -q -P {op.seed or 1} {op.offset} {op.length}"]
            model[op.offset : op.end] = bytes([op.seed or 1]) * op.length
        elif op.kind in ("zero", "unmap"):
            commands += ["-c", f"write -q -z {'-u ' if op.kind == 'unmap' else ''}{op.offset} {op.length}"]
            model[op.offset : op.end] = bytes(op.length)
    done = await asyncio.to_thread(
        subprocess.run, ["qemu-io", "-f", "qcow2", *commands, "image.qcow2"], cwd=folder, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    file, data = (MemoryNode((folder / name).read_bytes(), name) for name in ("image.qcow2", "data.raw"))
    node = await open_qcow2(file, backing=backing, data=data, l2_cache_size=shape.l2_cache)
    assert bytes(await edge(node).pread(0, shape.size)) == bytes(model)
    result = await node.check(fix_leaks=False, fix_errors=False)
    assert result.corruptions + result.leaks + result.check_errors == 0, result.messages
    assert all(one.host == one.offset for one in await node.block_status(0, shape.size) if one.host is not None)
    await node.close()


# --- damage -----------------------------------------------------------------------------------------

DAMAGE = {
    "not copied": (1, 0x10000),
    "elsewhere": (1, 1 << 63 | 0x50000),
    "at the start": (2, 1 << 63),
    "first elsewhere": (0, 1 << 63 | 0x20000),
    "first forgotten": (0, 0),
    "compressed": (1, 1 << 62 | 0x10000),
    "compressed and copied": (1, 3 << 62 | 0x10000),
    "zero": (1, 1 << 63 | 0x10001),
    "first zero": (0, 1 << 63 | 1),
    "reserved": (1, 1 << 63 | 0x10000 | 1 << 58),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_told_and_mended_as_qemu_does(kind: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    index, entry = DAMAGE[kind]
    with within(tmp_path):
        assert call("qemu-img", "create", "-q", "-f", "qcow2", "-o", PLAIN, "image", "1M")[0] == 0
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 256k", "image"], check=True)
        image = bytearray(Path("image").read_bytes())
        (l1,) = struct.unpack_from(">Q", image, 40)
        (l2,) = struct.unpack_from(">Q", image, l1)
        struct.pack_into(">Q", image, (l2 & OFFSET_MASK) + 8 * index, entry)
        seen = []
        for tool in ("qemu-img", "qmpd-img"):
            Path("image").write_bytes(image)
            found = call(tool, "check", "image")
            mended = call(tool, "check", "-r", "all", "image")
            left = Path("image").read_bytes()
            Path("image").write_bytes(image)
            Path("flat").unlink(missing_ok=True)
            read = call(tool, "convert", "-m", "1", "-O", "raw", "image", "flat")
            seen.append((found, mended, left, read[0], Path("flat").read_bytes() if not read[0] else b""))
            if read[0]:
                assert "Input/output error" in read[1]
        assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", ["elsewhere", "at the start", "first elsewhere"])
@pytest.mark.parametrize("work", ["read", "write", "zero", "discard"])
def test_a_misplaced_cluster_is_never_used(kind: str, work: str) -> None:
    """What belongs to another cluster is neither shown nor changed, and the image is marked."""
    index, entry = DAMAGE[kind]
    asyncio.run(_misplaced(index, entry, work))


async def _misplaced(index: int, entry: int, work: str) -> None:
    data = MemoryNode(b"", "data")
    file = await make(data=data, data_file="d.raw", size=1 << 20, preallocation="metadata")
    data.content[:] = text = Op("write", 0, 1 << 20, 4).data(0, 1 << 20)
    (l1,) = struct.unpack_from(">Q", file.content, 40)
    (l2,) = struct.unpack_from(">Q", file.content, l1)
    struct.pack_into(">Q", file.content, (l2 & OFFSET_MASK) + 8 * index, entry)
    node = await open_qcow2(file, data=data)
    disk, at = edge(node), index << 16
    works: dict[str, Callable[[], Awaitable[Any]]] = {
        "read": lambda: disk.pread(at, 512),
        "write": lambda: disk.pwrite(at, bytes(512)),
        "zero": lambda: disk.pwrite_zeroes(at, 65536, WriteFlags.MAY_UNMAP),
        "discard": lambda: disk.pdiscard(at, 65536),
    }
    with pytest.raises(OSError, match=r"does not match guest cluster offset|Errno 5"):
        await works[work]()
    assert data.content == text
    assert node.image_info()["format-specific"]["data"]["corrupt"]
