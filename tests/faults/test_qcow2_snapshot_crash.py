"""Crashes while snapshots are made, applied, deleted, and while bitmaps are stored: nothing that was there is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpd.block import dirty_bitmap
from tests.conftest import Proof
from tests.faults.crash import Journal
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2, save
from tests.peers.conftest import need

STATES = 200
"""Crash states of a full run of each kind of change."""

SIZE = 64 << 10
IMAGES: tuple[dict[str, Any], ...] = (
    {"cluster_size": 512},
    {"cluster_size": 512, "lazy_refcounts": True},
    {"cluster_size": 1024, "version": 2},
    {"cluster_size": 4096, "refcount_bits": 64},
)
CHANGES = ("create", "apply", "delete", "resized-apply")


def qemu_img(*arguments: str | Path, accept: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode in accept, f"qemu-img {arguments[0]}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def shown(image: Path, *arguments: str) -> bytes:
    """Return what QEMU reads from the disk, or from a snapshot that `arguments` name, of which it shows too much."""
    qemu_img("convert", *arguments, "-O", "raw", image, image.with_suffix(".raw"))
    data = image.with_suffix(".raw").read_bytes()
    return data[:SIZE] if arguments else data


async def scribble(disk: MemoryNode, rng: random.Random) -> None:
    node = await open_qcow2(disk)
    for _ in range(12):
        at = rng.randrange(SIZE)
        await edge(node).pwrite(at, bytes([rng.randrange(256)]) * min(rng.randrange(1, 9000), node.size - at))
    await node.close()


async def work(change: str, seed: int, rng: random.Random) -> tuple[Journal, list[dict[str, bytes]], int]:
    """Do a change; return its journal, what is allowed afterwards (name -> content, "" the disk), the version."""
    options = IMAGES[seed % len(IMAGES)]
    file = await make(size=SIZE, **options)
    contents: dict[str, bytes] = {}
    for name in ("one", "two"):
        await scribble(file, rng)
        node = await open_qcow2(file)
        await node.snapshot_create(name)
        contents[name] = bytes(await edge(node).pread(0, node.size))
        await node.close()
    if change == "resized-apply" and options.get("version") != 2:
        node = await open_qcow2(file)
        await node.truncate(SIZE * 3 // 2)
        await node.close()
    await scribble(file, rng)
    node = await open_qcow2(file)
    contents[""] = bytes(await edge(node).pread(0, node.size))
    after = dict(contents)
    journal = Journal(bytes(file.content))
    file.recorder = journal
    if change == "create":
        await node.snapshot_create("three")
        after["three"] = contents[""]
    elif change == "delete":
        await node.snapshot_delete("one")
        del after["one"]
    else:
        await node.snapshot_apply("one")
        after[""] = contents["one"]
    if rng.random() < 0.5:
        await node.close()
    return journal, [contents, after], int(options.get("version", 3))


async def check_state(state: bytes, allowed: list[dict[str, bytes]], version: int, folder: Path) -> int:
    """Check a crash state with both programs; return which of the two it shows."""
    image = folder / "crashed.qcow2"
    image.write_bytes(state)
    info = json.loads(qemu_img("info", "--output=json", image))
    names = [one["name"] for one in info.get("snapshots", ())]
    found = {"": shown(image)} | {name: shown(image, "-l", f"snapshot.name={name}") for name in names}
    assert found in allowed
    if version == 3 and not info["dirty-flag"]:
        qemu_img("check", "-q", image, accept=(0, 3))
    file = MemoryNode(state)
    node = await open_qcow2(file)
    assert bytes(await edge(node).pread(0, node.size)) == found[""]
    await node.close()
    save(file, image)
    if version == 2:
        qemu_img("check", "-q", "-r", "all", image, accept=(0,))
    qemu_img("check", "-q", image, accept=(0, 3))
    again = {"": shown(image)} | {name: shown(image, "-l", f"snapshot.name={name}") for name in names}
    assert again == found
    return allowed.index(found)


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_shows_the_image_before_or_after(change: str, proof: Proof, tmp_path: Path) -> None:
    need("qemu-img")
    states = proof.count(STATES)
    seen: set[int] = set()
    done = 0
    for seed in range(len(IMAGES)):
        rng = random.Random(f"{change}{seed}")
        journal, allowed, version = asyncio.run(work(change, seed, rng))
        for moment in journal.moments(rng, -(-states // len(IMAGES))):
            state = journal.state(moment, rng)
            seen.add(asyncio.run(check_state(state, allowed, version, tmp_path)))
            done += 1
    assert seen == {0, 1}
    proof.record(f"qcow2-snapshot-crash-{change}", states=done)


STORES: tuple[dict[str, Any], ...] = (
    {"cluster_size": 512},
    {"cluster_size": 512, "lazy_refcounts": True},
    {"cluster_size": 4096, "backing_file": "below" * 20, "backing_fmt": "raw"},
    {"cluster_size": 1024, "backing_file": "below" * 4},
)


async def store(rng: random.Random, options: dict[str, Any], *, first: bool) -> tuple[Journal, list[dict[str, str]]]:
    """Store bitmaps where there were none (`first`) or others; return the journal and the digests before and after."""
    file = await make(size=SIZE << 4, **options)
    node = await open_qcow2(file)
    journal = Journal(bytes(file.content))
    file.recorder = journal if first else None
    for name in ("a", "b"):
        dirty_bitmap.add(node, name, 512, persistent=True, disabled=False)
    await edge(node).pwrite(rng.randrange(SIZE), b"x" * 5000)
    if not first:
        await node.close()
        node = await open_qcow2(file)
        file.recorder = journal = Journal(bytes(file.content))
        dirty_bitmap.add(node, "c", 512, persistent=True, disabled=False)
        for _ in range(20):
            await edge(node).pwrite(rng.randrange(SIZE << 4), b"y")
    after = {str(one.name): one.sha256() for one in node.dirty_bitmaps}
    await node.close()
    return journal, [{}, after]


async def check_bitmaps(state: bytes, allowed: list[dict[str, str]], backing: str | None, folder: Path) -> int:
    image = folder / "crashed.qcow2"
    image.write_bytes(state)
    info = json.loads(qemu_img("info", "--output=json", image))
    assert info.get("backing-filename") == backing
    if not info["dirty-flag"]:
        qemu_img("check", "-q", image, accept=(0, 3))
    file = MemoryNode(state)
    node = await open_qcow2(file)
    assert node.backing_file == backing
    trusted = {str(one.name): one.sha256() for one in node.dirty_bitmaps if not one.inconsistent}
    assert trusted in allowed
    await node.close()
    qemu_img("check", "-q", save(file, image), accept=(0, 3))
    return allowed.index(trusted)


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_a_crash_leaves_no_bitmap_that_misses_something(proof: Proof, tmp_path: Path) -> None:
    need("qemu-img")
    states = proof.count(STATES)
    seen: set[int] = set()
    done = 0
    for number, (options, first) in enumerate(itertools.product(STORES, (False, True))):
        rng = random.Random(f"bitmaps{number}")
        backing = options.get("backing_file")
        if backing:
            (tmp_path / str(backing)).write_bytes(bytes(SIZE << 4))
        journal, allowed = asyncio.run(store(rng, options, first=first))
        for moment in journal.moments(rng, -(-states // 8)):
            state = journal.state(moment, rng)
            seen.add(asyncio.run(check_bitmaps(state, allowed, str(backing) if backing else None, tmp_path)))
            done += 1
    assert seen == {0, 1}
    proof.record("qcow2-bitmap-crash", states=done)
