"""A real daemon killed with SIGKILL while a job copies, or ends: the disk shows what it showed, and nothing is torn."""

from __future__ import annotations

import contextlib
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proof
from tests.peers.conftest import need
from tests.peers.test_block_jobs_data import add, add_chain, chain, content, image, tree
from tests.support.daemon import RawClient, unguarded

KILLS = 60
MiB = 1 << 20
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": ("block-stream", {}),
    "stream a part": ("block-stream", {"base_node": "a"}),
    "commit": ("block-commit", {"top_node": "b", "base_node": "a"}),
    "active commit": ("block-commit", {"base_node": "b"}),
    "mirror": ("blockdev-mirror", {"target": "t", "sync": "full"}),
    "backup": ("blockdev-backup", {"target": "t", "sync": "full"}),
}


def follow(client: RawClient) -> None:
    """Complete the job as soon as it is ready, until the daemon is gone or the job is."""
    with contextlib.suppress(OSError, EOFError):
        while jobs := client.ok("query-jobs"):
            if jobs[0]["status"] == "ready":
                client.command("job-complete", id="j")


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_a_killed_daemon_leaves_the_disk_as_it_was(proof: Proof, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    for number in range(proof.count(KILLS)):
        rng = random.Random(number)
        name = list(JOBS)[number % len(JOBS)]
        folder = tmp_path / str(number)
        folder.mkdir()
        begin = chain(folder)
        image(folder, "t")
        process, client = unguarded(folder, name="qmpd-storage-daemon")
        add_chain(client, folder)
        add(client, tree(folder, "t"))
        command, arguments = JOBS[name]
        client.ok(command, job_id="j", device="c", speed=rng.choice((0, 4 * MiB, 40 * MiB)), **arguments)
        killer = subprocess.Popen(["sh", "-c", f"sleep {rng.random() * 0.3:.3f}; kill -9 {process.pid}"])
        follow(client)
        killer.wait(20)
        process.wait(20)
        client.close()
        for one in "abct":
            done = subprocess.run(["qemu-img", "check", folder / f"{one}.qcow2"], capture_output=True, text=True)
            assert done.returncode in (0, 3), f"{number} {name}: {one}\n{done.stdout}{done.stderr}"  # 3: leaks
        assert content(folder / "c.qcow2") == begin, f"{number} {name}"
    proof.record("block-job-kill", kills=KILLS)
