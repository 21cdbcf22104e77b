"""A real daemon killed with SIGKILL in the middle of its writes: its image is consistent, flushed data is there."""

from __future__ import annotations

import random
import subprocess
import threading
from pathlib import Path

import pytest

from tests.conftest import Proof
from tests.faults.crash import GuestOp, Journal
from tests.peers.conftest import need
from tests.support.daemon import RawClient, unguarded

KILLS = 20
SIZE = 8 << 20


def qemu_img(*arguments: str | Path, accept: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode in accept, f"qemu-img {arguments[0]}: {done.returncode}\n{done.stdout}{done.stderr}"


def start(folder: Path, image: Path) -> tuple[subprocess.Popen[bytes], RawClient]:
    blockdev = f"driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={image}"
    return unguarded(folder, "-blockdev", blockdev)


def work_until_killed(client: RawClient, journal: Journal, cluster: int, rng: random.Random) -> None:
    """Write, zero, discard and flush one request after the other until the daemon is gone."""
    while True:
        kind = rng.choice(("write", "write", "write", "zero", "discard", "flush"))
        offset = rng.randrange(SIZE // 512) * 512
        length = min(rng.choice((512, cluster, 40 * 1024, 300 * 1024)), SIZE - offset)
        begun = journal.tick()
        text = {
            "write": f"write -q -P {(seed := rng.randrange(1, 256))} {offset} {length}",
            "zero": f"write -q -z {offset} {length}",
            "discard": f"discard -q {offset} {length}",
            "flush": "flush",
        }[kind]
        noted = None
        if kind == "write":
            noted = GuestOp(offset, bytes([seed]) * length, begun)
        elif kind == "zero":
            noted = GuestOp(offset, bytes(length), begun)
        elif kind == "discard":
            start, end = -(-offset // cluster) * cluster, (offset + length) // cluster * cluster
            noted = GuestOp(start, bytes(max(end - start, 0)), begun)
        if noted is not None:
            journal.guest.append(noted)
        try:
            said = client.ok("human-monitor-command", command_line=f'qemu-io disk "{text}"')
        except (OSError, EOFError):
            return
        assert said == "", said
        if noted is not None:
            noted.done = journal.tick()
        else:
            journal.guest_flushes.append((begun, journal.tick()))


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_a_killed_daemon_leaves_a_consistent_image(proof: Proof, tmp_path: Path) -> None:
    need("qemu-img")
    acknowledged = 0
    for number in range(proof.count(KILLS)):
        rng = random.Random(number)
        lazy, cluster = bool(number % 2), rng.choice((512, 4096, 65536))
        image = tmp_path / "image.qcow2"
        options = f"lazy_refcounts={'on' if lazy else 'off'},cluster_size={cluster}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(SIZE))
        before = bytes(SIZE)
        journal = Journal(b"")
        process, client = start(tmp_path, image)
        killer = threading.Timer(rng.uniform(0.2, 1.0), process.kill)
        killer.start()
        try:
            work_until_killed(client, journal, cluster, rng)
        finally:
            killer.cancel()
            process.kill()
            process.wait()
            client.close()
        acknowledged += sum(op.done is not None for op in journal.guest)
        if not lazy:
            qemu_img("check", "-q", image, accept=(0, 3))
        process, client = start(tmp_path, image)
        client.ok("quit")
        assert process.wait(20) == 0
        client.close()
        qemu_img("check", "-q", image, accept=(0,) if lazy else (0, 3))
        qemu_img("convert", "-O", "raw", image, tmp_path / "seen.raw")
        journal.check(journal.now, before, (tmp_path / "seen.raw").read_bytes())
    assert acknowledged > 0
    proof.record("qcow2-kill", kills=KILLS, acknowledged=acknowledged)
