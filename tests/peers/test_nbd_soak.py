"""Two hundred connections of verified reads and writes while the graph below and beside them changes all the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Proof
from tests.support.daemon import Daemon, RawClient, program, running
from tests.support.nbd_wire import Client

CONNECTIONS = 200
SIZE = 24_000_000 // 512 * 512
SECRET = ("--object", "secret,id=s,data=abc123")


def make(folder: Path) -> list[str]:
    """Make the images of four disks; return the daemon's options that export them."""
    luks = ("-f", "luks", "--object", "secret,id=s,data=abc123", "--iterations", "1000")
    images: list[tuple[str, ...]] = [
        ("-f", "raw", "raw.img", str(SIZE)),
        ("-f", "qcow2", "q.qcow2", str(SIZE)),
        (*luks, "-o", "key-secret=s", "l.img", str(SIZE)),
        (*luks, "-o", "key-secret=s,detached-header=true", "h.img"),
        ("-f", "qcow2", "payload.qcow2", str(SIZE)),
    ]
    for image in images:
        subprocess.run([program("qmpd-img"), "create", "-q", *image], cwd=folder, check=True, timeout=60)
    file = '{"driver":"file","filename":"%s"}'
    nodes = {
        "raw": f'{{"driver":"raw","node-name":"raw","file":{file % (folder / "raw.img")}}}',
        "q": f'{{"driver":"qcow2","node-name":"q","file":{file % (folder / "q.qcow2")}}}',
        "l": f'{{"driver":"luks","key-secret":"s","node-name":"l","file":{file % (folder / "l.img")}}}',
        "d": f'{{"driver":"luks","key-secret":"s","node-name":"d","header":{file % (folder / "h.img")},'
        f'"file":{{"driver":"qcow2","file":{file % (folder / "payload.qcow2")}}}}}',
    }
    words = [*SECRET, "--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd.sock'},max-connections=0"]
    for name, node in nodes.items():
        words += ["--blockdev", node, "--export", f"nbd,id=x-{name},node-name={name},writable=on"]
    return words


def resident(daemon: Daemon) -> int:
    """Return the memory the daemon holds, in bytes."""
    pages = int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def settled(daemon: Daemon, most: int) -> int:
    """Return the count of open descriptors once it is down to `most`, or what it still is after a while."""
    deadline = time.monotonic() + 10
    while descriptors(daemon) > most and time.monotonic() < deadline:
        time.sleep(0.05)
    return descriptors(daemon)


def churn(client: RawClient, folder: Path, turn: int) -> None:
    """Add a node, export it, use it, take the export away under its client, delete the node."""
    image = folder / f"extra-{turn % 4}.qcow2"
    if not image.exists():
        words = [program("qmpd-img"), "create", "-q", "-f", "qcow2", str(image), "1M"]
        subprocess.run(words, check=True, timeout=60)
    file = {"driver": "file", "filename": str(image)}
    client.ok("blockdev-add", driver="qcow2", node_name="extra", file=file)
    client.ok("block-export-add", type="nbd", id="x-extra", node_name="extra", writable=True)
    with Client(str(folder / "nbd.sock")).go(b"extra") as other:
        mark = f"turn {turn}".encode()
        other.write(turn % 1000, mark)
        assert other.read(turn % 1000, len(mark)) == mark
        client.ok("block-export-del", id="x-extra", mode="hard")
        client.wait_event("BLOCK_EXPORT_DELETED")
    client.ok("blockdev-del", node_name="extra")
    client.events.clear()


@pytest.mark.proof
@pytest.mark.timeout(300)
def test_two_hundred_connections_lose_no_byte_and_leak_nothing(tmp_path: Path, proof: Proof) -> None:
    seconds = proof.count(120)
    words = make(tmp_path)
    with running(tmp_path, *words) as daemon:
        changes, other = daemon.client(), daemon.client()
        for turn in range(4):
            churn(changes, tmp_path, turn)
        before = descriptors(daemon)
        load = [sys.executable, "-m", "tests.support.nbd_load", str(tmp_path / "nbd.sock"), "7"]
        load += [f"{name}:{SIZE}" for name in ("raw", "q", "l", "d")] + [str(CONNECTIONS)]
        with subprocess.Popen(load, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "ready\n"
            began, turn, took = time.monotonic(), 4, list[float]()
            held = 0
            while time.monotonic() < began + seconds:
                churn(changes, tmp_path, turn)
                turn += 1
                for _ in range(5):
                    asked = time.monotonic()
                    other.ok("query-status")
                    took.append(time.monotonic() - asked)
                    time.sleep(0.005)
                if not held and time.monotonic() > began + seconds / 3:
                    held = resident(daemon)
            grown = resident(daemon) - held
            process.stdin.close()
            last = process.stdout.readlines()[-1]
            assert process.wait(60) == 0, last
        took.sort()
        percentile = took[int(len(took) * 0.99)]
        done = json.loads(last)
        print(f"{done}, {turn} turns, {len(took)} answers, p99 {percentile * 1e3:.1f} ms, grown by {grown >> 10} KiB")
        assert done["connections"] == CONNECTIONS
        assert min(done.values()) > 0
        assert settled(daemon, before) == before
        assert grown < 16 << 20
        assert percentile < 0.050
        proof.record("nbd-soak", seconds=seconds, seed=7, turns=turn, **done)
    for image in ("q.qcow2", "payload.qcow2"):
        subprocess.run([program("qmpd-img"), "check", "-q", str(tmp_path / image)], check=True, timeout=60)
