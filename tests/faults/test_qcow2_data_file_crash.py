"""Crashes of a qcow2 image with an external data file: each file keeps what was flushed of it, and loses the rest.

The data has to be durable before the tables show it: the file may hold anything where nothing was written.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.conftest import Proof
from tests.faults.crash import Journal
from tests.faults.test_qcow2_crash import Guest, Kind, draw, qemu_img
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2, random_delay
from tests.gen.qcow2_model import Op
from tests.peers.conftest import need

STATES = 200
"""Crash states of a full run, over all kinds of images together."""

KINDS = (
    Kind("plain", 4096, 512 << 10, 40_000),
    Kind("small", 512, 96 << 10, 6000, lazy=True),
    Kind("backing", 4096, 256 << 10, 20_000, backing=True),
    Kind("raw", 4096, 256 << 10, 20_000),
    Kind("raw-lazy", 1024, 128 << 10, 9000, lazy=True),
)


class Second(Journal):
    """What happens to another file, by the clock of the first one's journal."""

    def __init__(self, start: bytes, first: Journal) -> None:
        super().__init__(start)
        self._first = first

    def tick(self) -> int:
        self.now = self._first.tick()
        return self.now


async def work(kind: Kind, seed: int, folder: Path) -> tuple[Journal, Journal, bytes]:
    """Do random work; return the journals of image and data file, and what the guest saw at first."""
    rng = random.Random(seed)
    raw = kind.name.startswith("raw")
    old = Op("write", 0, kind.size, 9).data(0, kind.size)  # nobody may see it, unless the file is the disk
    data, below = MemoryNode(old, "data"), None
    if kind.backing:
        below = MemoryNode(Op("write", 0, kind.size, 5).data(0, kind.size), "below")
        (folder / "below.raw").write_bytes(below.content)
    file = await make(
        data=data,
        data_file=str(folder / "data.raw"),
        data_file_raw=raw,
        size=kind.size,
        cluster_size=kind.cluster,
        lazy_refcounts=kind.lazy,
        backing_file=str(folder / "below.raw") if kind.backing else None,
        backing_fmt="raw" if kind.backing else None,
    )
    journal = Journal(bytes(file.content))
    second = Second(bytes(data.content), journal)
    file.recorder, data.recorder = journal, second
    file.delay, data.delay = random_delay(seed, share=0.9), random_delay(seed + 1, share=0.9)
    node = await open_qcow2(file, backing=below, data=data, l2_cache_size=rng.choice((None, 1)))
    disk = edge(node)
    before = bytes(await disk.pread(0, kind.size))
    assert before == (old if raw else bytes(kind.size) if below is None else bytes(below.content))
    guest = Guest(disk, journal, kind)
    for _ in range(kind.rounds):
        group: list[Op] = []
        for _ in range(rng.randint(1, 12)):
            op = draw(rng, kind)
            if op.kind == "flush" or all(op.end <= one.offset or one.end <= op.offset for one in group):
                group.append(op)
        await asyncio.gather(*(guest.issue(op) for op in group))
    if rng.random() < 0.7:
        await node.close()
    assert not node.image.dead
    return journal, second, before


async def check_state(kind: Kind, journal: Journal, before: bytes, moment: int, folder: Path) -> None:
    """Open a crash state, which is in `folder`, with both programs."""
    image, outside = folder / "crashed.qcow2", folder / "data.raw"
    if not kind.lazy:
        qemu_img("check", "-q", "-f", "qcow2", image, accept=(0, 3))
    qemu_img("convert", "-O", "raw", "-f", "qcow2", image, folder / "seen.raw")
    seen = (folder / "seen.raw").read_bytes()
    journal.check(moment, before, seen)
    file, data = MemoryNode(image.read_bytes()), MemoryNode(outside.read_bytes(), "data")
    if kind.name.startswith("raw"):
        journal.check(moment, before, bytes(data.content[: kind.size]))
    below = MemoryNode((folder / "below.raw").read_bytes(), "below") if kind.backing else None
    node = await open_qcow2(file, backing=below, data=data)
    assert not node.image_info()["dirty-flag"]
    assert bytes(await edge(node).pread(0, kind.size)) == seen
    await edge(node).pwrite(0, b"after the crash")
    await node.close()
    image.write_bytes(file.content)
    outside.write_bytes(data.content)
    qemu_img("check", "-q", "-f", "qcow2", image, accept=(0,) if kind.lazy else (0, 3))


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_crash_keeps_what_was_flushed_and_shows_nothing_else(kind: Kind, proof: Proof, tmp_path: Path) -> None:
    need("qemu-img")
    states = -(-proof.count(STATES) // len(KINDS))
    runs = max(1, states // 10)
    done = 0
    for seed in range(runs):
        journal, second, before = asyncio.run(work(kind, seed, tmp_path))
        rng = random.Random(seed)
        for moment in journal.moments(rng, states // runs + (seed < states % runs)):
            (tmp_path / "crashed.qcow2").write_bytes(journal.state(moment, rng))
            (tmp_path / "data.raw").write_bytes(second.state(moment, rng))
            asyncio.run(check_state(kind, journal, before, moment, tmp_path))
            done += 1
    assert done >= states
    proof.record(f"qcow2-data-file-crash-{kind.name}", states=done, runs=runs, seeds=f"0..{runs - 1}")
