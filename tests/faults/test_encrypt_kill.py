"""An encryption in place, by a daemon or by the tool, killed with SIGKILL: it goes on, and the data is right."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Proof
from tests.peers.conftest import need
from tests.peers.test_encrypt import MiB, add_nodes, concluded, cryptsetup, decrypted, images, qemu_io, start, wait_for
from tests.support.daemon import RawClient, listens, program

KILLS = 20


def test_the_tool_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    need("cryptsetup")
    plain, payload, header = images(tmp_path, 8 * MiB)
    header.unlink()
    command = [program("qmpd-img"), "luks", "encrypt", "--key-file", str(tmp_path / "key")]
    command += ["--pbkdf", "pbkdf2", "--iterations", "1000", str(payload), str(header)]
    with subprocess.Popen(command) as process:
        begun = payload.stat().st_mtime_ns
        while payload.stat().st_mtime_ns == begun:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert header.stat().st_mode & 0o777 == 0o600
    assert "qmpd-encrypt-v1" in cryptsetup("luksDump", header).stdout
    state = subprocess.run([program("qmpd-img"), "luks", "verify", header], capture_output=True, text=True)
    assert (state.returncode, "qmpd-encrypt-v1" in state.stdout) == (0, True)
    assert f" of {8 * MiB} bytes are" in state.stdout
    subprocess.run(command, check=True, timeout=60)
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "the header of another LUKS volume" in again.stderr
    assert payload.stat().st_size == 8 * MiB
    assert decrypted(tmp_path, payload, header) == plain


@contextlib.contextmanager
def mortal(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], RawClient]]:
    """Start a daemon that may be killed."""
    socket = folder / "qmp.sock"
    socket.unlink(missing_ok=True)
    monitor = ["-nodefaults", "-S", "-display", "none", "-qmp", f"unix:{socket},server=on,wait=off"]
    with (folder / "daemon.log").open("ab") as log:
        process = subprocess.Popen([program("qmpd"), *monitor], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not listens(socket):
            assert process.poll() is None, (folder / "daemon.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with contextlib.closing(RawClient(socket)) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


@pytest.mark.proof
@pytest.mark.timeout(300)
def test_a_killed_daemon_goes_on_where_it_was(proof: Proof, tmp_path: Path) -> None:
    need("cryptsetup")
    kills, rng, reached = proof.count(KILLS), random.Random(6), 0
    size = 2 * (kills + 3) * MiB
    plain, payload, header = images(tmp_path, size)
    want = bytearray(plain)
    done = 0
    while reached < size - 3 * MiB and done < kills:
        with mortal(tmp_path) as (process, client):
            add_nodes(client, payload, header)
            start(client, speed=8 * MiB)
            job = wait_for(client, reached + MiB)
            assert "error" not in job, job["error"]
            reached = job["current-progress"]
            for _ in range(3):
                offset, pattern = rng.randrange(size - 9000), rng.randrange(256)
                length = rng.randrange(1, 9000)
                qemu_io(client, f"write -q -P {pattern} {offset} {length}")
                want[offset : offset + length] = bytes([pattern]) * length
            time.sleep(rng.random() / 50)
            process.kill()
            process.wait()
            done += 1
    assert done > kills // 2
    with mortal(tmp_path) as (_, client):
        add_nodes(client, payload, header)
        start(client)
        job = concluded(client)
        assert "error" not in job, job["error"]
    assert os.path.getsize(payload) == size
    assert decrypted(tmp_path, payload, header) == want
    proof.record("encrypt-kill", kills=done)
