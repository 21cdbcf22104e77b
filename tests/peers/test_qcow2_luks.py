"""Random work through luks over qcow2 over a slow file, many requests at once: a model, then QEMU with the secret."""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.luks.create import Luks1Options, create_luks1, header_length
from tests.conftest import FULL
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2, random_delay, save
from tests.gen.qcow2_model import Disk, Op, groups
from tests.peers.conftest import need
from tests.unit.luks import memory as luks

EXAMPLES = 500 if FULL else 50
SECRET = ("--object", "secret,id=s,data=abc123")
VOLUME = Luks1Options(cipher_alg="aes-128", iterations=1000)


@dataclass(frozen=True)
class Shape:
    """A volume under test; sizes in bytes."""

    cluster: int
    lazy: bool
    bits: int
    size: int
    unmap: bool
    detached: bool
    seed: int


@st.composite
def works(draw: st.DrawFn) -> tuple[Shape, list[list[Op]]]:
    cluster = draw(st.sampled_from((512, 4096, 65536)))
    shape = Shape(
        cluster=cluster,
        lazy=draw(st.booleans()),
        bits=draw(st.sampled_from((1, 16, 64))),
        size=draw(st.integers(1, 20)) * cluster + draw(st.sampled_from((0, 512))),
        unmap=draw(st.booleans()),
        detached=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 20)),
    )
    return shape, draw(groups(shape.size, cluster))


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def header_of_volume(detached: bool) -> bytes:
    """Return the bytes of a header made once: deriving its key is the slow part."""

    async def work() -> bytes:
        area = MemoryNode(bytes(header_length(VOLUME)))
        await create_luks1(edge(area), VOLUME, SecretBytes(b"abc123"), detached=detached)
        return bytes(area.content)

    return asyncio.run(work())


def name_for_qemu(image: Path, header: Path | None) -> str:
    """Return a json: name of the decrypted volume."""
    tree: dict[str, object] = {
        "driver": "luks",
        "key-secret": "s",
        "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}},
    }
    if header is not None:
        tree["header"] = {"driver": "file", "filename": str(header)}
    return "json:" + json.dumps(tree)


async def work_on(shape: Shape, work: list[list[Op]], header: bytes) -> tuple[MemoryNode, bytes]:
    """Do the work on a new volume; return the file below and what the disk must hold."""
    room = 0 if shape.detached else len(header)
    file = await make(
        size=room + shape.size, cluster_size=shape.cluster, refcount_bits=shape.bits, lazy_refcounts=shape.lazy
    )
    node = await open_qcow2(file)
    if not shape.detached:
        await edge(node).pwrite(0, header)
    volume = await luks.opened(
        node, MemoryNode(header) if shape.detached else None, discard="unmap" if shape.unmap else None
    )
    file.delay = random_delay(shape.seed)
    first = Op("write", 0, shape.size, 77)
    disk = Disk(edge(volume), bytes(shape.size), loose=True)
    await disk.run([first])
    for group in work:
        await disk.run(group)
    await volume.close()
    await node.close()
    return file, bytes(disk.model)


@pytest.mark.proof("luks-over-qcow2", examples=EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(works())
def test_work_at_once_through_luks_reads_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    need("qemu-img")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, model = asyncio.run(work_on(shape, work, header_of_volume(shape.detached)))
        image = save(file, folder / "image.qcow2")
        run("qemu-img", "check", "-q", "-f", "qcow2", image)
        expected = folder / "model.raw"
        expected.write_bytes(model)
        header = None
        if shape.detached:
            header = folder / "header.img"
            header.write_bytes(header_of_volume(shape.detached))
        source = f"json:{json.dumps({'driver': 'raw', 'file': {'driver': 'file', 'filename': str(expected)}})}"
        run("qemu-img", "compare", "-q", *SECRET, name_for_qemu(image, header), source)


@pytest.mark.proof("luks-over-qcow2-theirs", examples=EXAMPLES // 2)
@settings(max_examples=EXAMPLES // 2)
@given(works())
def test_volumes_that_qemu_wrote_read_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    need("qemu-img", "qemu-io")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_read_back(shape, work, header_of_volume(shape.detached), Path(name)))


async def _read_back(shape: Shape, work: list[list[Op]], content: bytes, folder: Path) -> None:
    header = folder / "header.img"
    header.write_bytes(content)
    image = folder / "image.qcow2"
    room = 0 if shape.detached else len(content)
    options = f"cluster_size={shape.cluster},refcount_bits={shape.bits},lazy_refcounts={'on' if shape.lazy else 'off'}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(room + shape.size))
    if not shape.detached:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", header, image)
    model = bytearray(shape.size)
    commands = ["-c", f"write -q -P 77 0 {shape.size}"]
    model[:] = bytes([77]) * shape.size
    for op in (op for group in work for op in group):
        if op.kind in ("write", "zero", "unmap"):
            value = op.seed if op.kind == "write" else 0
            start, end = op.offset // 512 * 512, min(-(-op.end // 512) * 512, shape.size)
            text = f"-P {value}" if op.kind == "write" else "-z"
            commands += ["-c", f"write -q {text} {start} {end - start}"]
            model[start:end] = bytes([value]) * (end - start)
    target = name_for_qemu(image, header if shape.detached else None)
    await asyncio.to_thread(run, "qemu-io", *SECRET, *commands, target)
    file = MemoryNode(image.read_bytes())
    file.delay = random_delay(shape.seed)
    node = await open_qcow2(file, read_only=True)
    volume = await luks.opened(node, MemoryNode(content) if shape.detached else None)
    disk = Disk(edge(volume), bytes(model))
    reads = [op for group in work for op in group if op.kind == "read"]
    await disk.run([Op("read", 0, shape.size), *reads])
    await volume.close()
    await node.close()
