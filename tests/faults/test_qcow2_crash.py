"""Crashes of a qcow2 image in the middle of random work: leaks at most, and what was flushed is there."""

from __future__ import annotations

import asyncio
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.child import Child
from tests.conftest import Proof
from tests.faults.crash import GuestOp, Journal
from tests.gen.qcow2 import PASSPHRASE, MemoryNode, edge, make, open_qcow2, random_delay, save
from tests.gen.qcow2_model import Op
from tests.peers.conftest import need

STATES = 600
"""Crash states of a full run, over all kinds of images together."""


@dataclass(frozen=True)
class Kind:
    """A kind of image to crash; sizes in bytes."""

    name: str
    cluster: int
    size: int
    longest: int
    bits: int = 16
    version: int = 3
    lazy: bool = False
    backing: bool = False
    snapshot: bool = False
    no_unref: bool = False
    encrypt: str | None = None
    rounds: int = 12


KINDS = (
    Kind("small-clusters", 512, 96 << 10, 6000),
    Kind("pages", 4096, 512 << 10, 40_000),
    Kind("default", 65536, 2 << 20, 200_000),
    Kind("lazy", 4096, 512 << 10, 40_000, lazy=True),
    Kind("lazy-small", 512, 96 << 10, 6000, lazy=True),
    Kind("backing", 4096, 256 << 10, 20_000, backing=True),
    Kind("version-2", 1024, 128 << 10, 9000, version=2),
    Kind("snapshot", 1024, 128 << 10, 9000, snapshot=True),
    Kind("snapshot-lazy", 1024, 128 << 10, 9000, snapshot=True, lazy=True),
    Kind("growing-refcount-table", 512, 4 << 20, 400_000, bits=64, rounds=10),
    Kind("no-unref", 4096, 256 << 10, 20_000, no_unref=True),
    Kind("bit-refcounts", 512, 128 << 10, 9000, bits=1),
    Kind("luks", 4096, 256 << 10, 20_000, encrypt="luks"),
    Kind("luks-backing", 1024, 128 << 10, 9000, encrypt="luks", backing=True),
    Kind("aes", 4096, 256 << 10, 20_000, encrypt="qcow", lazy=True),
)
SECRET = ("--object", f"secret,id=s,data={PASSPHRASE.decode()}")
LUKS = {"format": "luks", "cipher-alg": "aes-128", "iterations": 1000}


def source(kind: Kind, image: Path) -> list[str]:
    """Return how qemu-img is told what to open."""
    if kind.encrypt is None:
        return ["-f", "qcow2", str(image)]
    return [*SECRET, "--image-opts", f"driver=qcow2,file.filename={image},encrypt.key-secret=s"]


def opening(kind: Kind) -> dict[str, Any]:
    """Return the options that open the image."""
    if kind.encrypt is None:
        return {}
    return {"encrypt": {"format": "luks" if kind.encrypt == "luks" else "aes", "key-secret": "s"}}


def qemu_img(*arguments: str | Path, accept: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode in accept, f"qemu-img {arguments[0]}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


async def first_image(kind: Kind, folder: Path) -> MemoryNode:
    if not kind.snapshot:
        return await make(
            size=kind.size,
            cluster_size=kind.cluster,
            refcount_bits=kind.bits,
            version=kind.version,
            lazy_refcounts=kind.lazy,
            backing_file=str(folder / "below.raw") if kind.backing else None,
            backing_fmt="raw" if kind.backing else None,
            encrypt={"luks": LUKS, "qcow": {"format": "qcow"}}.get(kind.encrypt or ""),
        )
    image = folder / "first.qcow2"
    options = f"cluster_size={kind.cluster},lazy_refcounts={'on' if kind.lazy else 'off'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(kind.size))
    half = kind.size // 2
    for command in (f"write -q -P 7 0 {half}", f"write -q -z {half // 2} {half // 4}"):
        await asyncio.to_thread(subprocess.run, ["qemu-io", "-f", "qcow2", "-c", command, str(image)], check=True)
    qemu_img("snapshot", "-c", "one", image)
    return MemoryNode(await asyncio.to_thread(image.read_bytes))


def draw(rng: random.Random, kind: Kind) -> Op:
    name = rng.choice(("write",) * 5 + ("zero", "unmap", "discard", "flush"))
    length = rng.choice((rng.randint(1, kind.longest), kind.cluster, 512, kind.cluster * 2))
    offset = rng.randrange(kind.size)
    if rng.random() < 0.5:
        offset -= offset % kind.cluster
    return Op(name, offset, min(length, kind.size - offset), rng.randrange(256))


class Guest:
    """Issues requests and notes them in the journal."""

    def __init__(self, disk: Child, journal: Journal, kind: Kind) -> None:
        self.disk, self.journal, self.kind = disk, journal, kind

    async def issue(self, op: Op) -> None:
        if op.kind == "flush":
            begun = self.journal.tick()
            await self.disk.flush()
            self.journal.guest_flushes.append((begun, self.journal.tick()))
            return
        noted = GuestOp(op.offset, op.data(op.offset, op.end), self.journal.tick())
        if op.kind == "discard":
            cluster = self.kind.cluster
            start, end = -(-op.offset // cluster) * cluster, op.end // cluster * cluster
            if op.end == self.kind.size:
                end = op.end
            if start < end:
                noted.offset, noted.data = start, bytes(end - start)
                self.journal.guest.append(noted)
            await self.disk.pdiscard(op.offset, op.length)
        else:
            self.journal.guest.append(noted)
            if op.kind == "write":
                await self.disk.pwrite(op.offset, noted.data)
            else:
                await self.disk.pwrite_zeroes(op.offset, op.length)
        noted.done = self.journal.tick()


async def work(kind: Kind, seed: int, folder: Path) -> tuple[Journal, bytes]:
    """Do random work on an image; return the journal and what the guest saw at first."""
    rng = random.Random(seed)
    below = None
    if kind.backing:
        below = MemoryNode(Op("write", 0, kind.size, 5).data(0, kind.size), "below")
        save(below, folder / "below.raw")
    file = await first_image(kind, folder)
    journal = Journal(bytes(file.content))
    file.delay = random_delay(seed, share=0.9)
    file.recorder = journal
    options = {
        "l2_cache_size": rng.choice((None, 1)),
        "discard_no_unref": kind.no_unref or None,
        **opening(kind),
    }
    node = await open_qcow2(file, backing=below, **options)
    disk = edge(node)
    before = bytes(await disk.pread(0, kind.size))
    guest = Guest(disk, journal, kind)
    for _ in range(kind.rounds):
        # Only requests that do not overlap run at once: which of two wins is not for a journal to say.
        group: list[Op] = []
        for _ in range(rng.randint(1, 12)):
            op = draw(rng, kind)
            if op.kind == "flush" or all(op.end <= one.offset or one.end <= op.offset for one in group):
                group.append(op)
        await asyncio.gather(*(guest.issue(op) for op in group))
    if rng.random() < 0.7:
        await node.close()
    assert not node.image.dead
    if kind.encrypt is not None:
        _no_plaintext(journal)
    return journal, before


def _no_plaintext(journal: Journal) -> None:
    """Nothing that the guest wrote may have reached the file as it was."""
    written = b"".join(write.data for write in journal.writes)
    for op in journal.guest:
        sample = op.data[:32]
        assert len(sample) < 32 or not any(sample) or sample not in written, f"plaintext of {op.offset} in the file"


async def check_state(kind: Kind, journal: Journal, before: bytes, moment: int, state: bytes, folder: Path) -> None:
    """Open a crash state with both programs and check the image and its contents."""
    below = MemoryNode((folder / "below.raw").read_bytes(), "below") if kind.backing else None
    image = folder / "crashed.qcow2"
    image.write_bytes(state)
    if not kind.lazy:
        qemu_img("check", "-q", *source(kind, image), accept=(0, 3))
    qemu_img("convert", "-O", "raw", *source(kind, image), folder / "seen.raw")
    seen = await asyncio.to_thread((folder / "seen.raw").read_bytes)
    journal.check(moment, before, seen)
    file = MemoryNode(state)
    reader = await open_qcow2(file, backing=below, read_only=True, **opening(kind))
    assert bytes(await edge(reader).pread(0, kind.size)) == seen
    writer = await open_qcow2(file, backing=below, **opening(kind))
    assert not writer.image_info()["dirty-flag"]
    assert bytes(await edge(writer).pread(0, kind.size)) == seen
    await edge(writer).pwrite(0, b"after the crash")
    await writer.close()
    assert not writer.image.dead
    save(file, image)
    qemu_img("check", "-q", *source(kind, image), accept=(0,) if kind.lazy else (0, 3))


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_crash_leaves_leaks_at_most_and_keeps_what_was_flushed(kind: Kind, proof: Proof, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    states = -(-proof.count(STATES) // len(KINDS))
    runs = max(1, states // 10)
    done = 0
    for seed in range(runs):
        journal, before = asyncio.run(work(kind, seed, tmp_path))
        rng = random.Random(seed)
        share = states // runs + (seed < states % runs)
        for moment in journal.moments(rng, share):
            state = journal.state(moment, rng)
            asyncio.run(check_state(kind, journal, before, moment, state, tmp_path))
            done += 1
    assert done >= states
    proof.record(f"qcow2-crash-{kind.name}", states=done, runs=runs, seeds=f"0..{runs - 1}")
