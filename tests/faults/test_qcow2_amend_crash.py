"""Crashes while the width of reference counts changes: either width is there, whole, with leaks at most."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proof
from tests.faults.crash import Journal
from tests.faults.test_qcow2_crash import LUKS, qemu_img
from tests.gen.qcow2 import PASSPHRASE, MemoryNode, edge, make, open_qcow2, random_delay
from tests.gen.qcow2_model import Op
from tests.peers.conftest import need

SECRET = ("--object", f"secret,id=s,data={PASSPHRASE.decode()}")
SIZE, CLUSTER = 256 << 10, 1024
STATES = 400


async def change(before: int, after: int, seed: int) -> tuple[Journal, bytes]:
    """Fill an image, change the width; return what happened to its file meanwhile, and what the guest sees."""
    file = await make(size=SIZE, cluster_size=CLUSTER, refcount_bits=before, encrypt=LUKS)
    opening: dict[str, Any] = {"encrypt": {"format": "luks", "key-secret": "s"}}
    node = await open_qcow2(file, **opening)
    await edge(node).pwrite(0, Op("write", 0, SIZE // 2, seed).data(0, SIZE // 2))
    await edge(node).pwrite_zeroes(CLUSTER, 3 * CLUSTER)
    await node.flush()
    journal = Journal(bytes(file.content))
    file.recorder, file.delay = journal, random_delay(seed, share=0.9)
    await node.set_refcount_bits(after)
    await edge(node).pwrite(SIZE - 512, b"after")
    await node.flush()
    seen = bytes(await edge(node).pread(0, SIZE))
    await node.close()
    again = await open_qcow2(MemoryNode(bytes(file.content)), read_only=True, **opening)
    assert again.image_info()["format-specific"]["data"]["refcount-bits"] == after
    return journal, seen


@pytest.mark.proof
@pytest.mark.parametrize(("before", "after"), [(16, 64), (16, 1), (1, 32), (64, 4)])
def test_the_width_of_refcounts_changes_in_one_moment(before: int, after: int, proof: Proof, tmp_path: Path) -> None:
    need("qemu-img")
    image, raw = tmp_path / "i.qcow2", tmp_path / "seen.raw"
    source = (*SECRET, "--image-opts", f"driver=qcow2,file.filename={image},encrypt.key-secret=s")
    states = -(-proof.count(STATES) // 4)
    journal, seen = asyncio.run(change(before, after, before + after))
    rng = random.Random(after)
    for moment in journal.moments(rng, states):
        image.write_bytes(journal.state(moment, rng))
        qemu_img("check", "-q", *source, accept=(0, 3))
        qemu_img("convert", "-O", "raw", *source, raw)
        assert raw.read_bytes()[: SIZE - 512] == seen[: SIZE - 512], f"crash at {moment}"
    proof.record(f"qcow2-amend-crash-{before}-{after}", states=states, seed=before + after)
