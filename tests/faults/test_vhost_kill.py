"""A daemon that is killed under a running machine: the next one does what was under way, each request once."""

from __future__ import annotations

import os
import random
import signal
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import Proof
from tests.support.daemon import Daemon, running
from tests.support.peers import need
from tests.support.vhost_driver import FLUSH, IN, OK, OUT, Driver, Pending, Ring

SLOTS, AREA = 12, 64 << 10


def export(daemon: Daemon, image: Path, sock: Path) -> None:
    """Export the image behind a limit, so that requests end out of order and some are always under way."""
    monitor = daemon.client()
    monitor.ok("object-add", qom_type="throttle-group", id="g", limits={"iops-write": 300})
    node = {"driver": "throttle", "throttle-group": "g", "file": {"driver": "file", "filename": str(image)}}
    monitor.ok("blockdev-add", **{"node-name": "n"}, **node)
    monitor.ok(
        "block-export-add", type="vhost-user-blk", id="v", node_name="n", writable=True,
        addr={"type": "unix", "path": str(sock)},
    )  # fmt: skip


@pytest.mark.proof
def test_requests_under_way_when_the_daemon_is_killed_are_done_by_the_next(tmp_path: Path, proof: Proof) -> None:
    """The machine only sees a pause, as its `reconnect-ms` makes QEMU see one. Then the image has every write."""
    need("module:qmpd.aio._guest_memory")
    rng = random.Random(23)
    image, sock = tmp_path / "image", tmp_path / "v.sock"
    image.write_bytes(bytes(SLOTS * AREA))
    model = bytearray(SLOTS * AREA)
    kills, found_under_way = proof.count(60), 0
    disk: Driver | None = None
    pending: dict[int, tuple[Pending, bytes | None]] = {}
    for turn in range(kills):
        folder = tmp_path / f"{turn}"
        folder.mkdir()
        with running(folder, name="qmpd-storage-daemon") as daemon:
            export(daemon, image, sock)
            if disk is None:
                disk = Driver(sock, start=False)
                disk.take_notes(128)
                disk.start(disk.rings[0])
            else:
                found_under_way += len(pending)
                disk.connect_again(sock)
            ring = disk.rings[0]
            for _ in range(rng.randint(1, 40)):
                settle(disk, ring, pending, 1 if pending else 0)
                begin(disk, ring, pending, model, rng)
            if turn + 1 < kills:
                os.kill(daemon.process.pid, signal.SIGKILL)
                daemon.process.wait(20)
                daemon.process.returncode = 0  # as was meant
            else:
                settle(disk, ring, pending, len(pending))
                assert disk.request(FLUSH)[0] == OK
    assert disk is not None
    with closing(disk):
        assert image.read_bytes() == model
    assert found_under_way > kills
    proof.record("vhost-user-kills", kills=kills, seed=23, under_way=found_under_way)


def begin(
    disk: Driver, ring: Ring, pending: dict[int, tuple[Pending, bytes | None]], model: bytearray, rng: random.Random
) -> None:
    """Begin a request wherever none is under way."""
    for slot in range(SLOTS):
        if slot * 8 in pending:
            continue
        start = slot * AREA + rng.randrange(64) * 512
        if rng.random() < 0.3:
            pending[slot * 8] = (disk.begin(ring, slot, IN, start // 512, 4096), bytes(model[start : start + 4096]))
        else:
            data = rng.randbytes(4096)
            model[start : start + 4096] = data
            pending[slot * 8] = (disk.begin(ring, slot, OUT, start // 512, data), None)
    disk.kick(ring)


def settle(disk: Driver, ring: Ring, pending: dict[int, tuple[Pending, bytes | None]], count: int) -> None:
    """Wait for some requests, and look at what they did."""
    for head, _ in disk.wait(ring, count):
        one, want = pending.pop(head)  # a request that comes back twice is a KeyError
        status, data = disk.result(one)
        assert status == OK
        assert want is None or data == want
