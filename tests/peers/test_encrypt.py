"""blockdev-encrypt on real daemons: used, paused, cancelled, refused meanwhile; cryptsetup takes what comes of it."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.daemon import RawClient, running

MiB = 1 << 20
SIZE = 6 * MiB + 1536
CHEAP = {"pbkdf": "pbkdf2", "iterations": 1000}


def cryptsetup(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["cryptsetup", "--disable-locks", "-q", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def images(folder: Path, size: int = SIZE) -> tuple[bytes, Path, Path]:
    plain = random.Random(4).randbytes(size)
    payload, header = folder / "disk.raw", folder / "header.luks"
    payload.write_bytes(plain)
    header.write_bytes(b"")
    (folder / "key").write_text("abc123")
    return plain, payload, header


def add_nodes(client: RawClient, payload: Path, header: Path) -> None:
    client.ok("object-add", qom_type="secret", id="sec0", data="abc123")
    client.ok("blockdev-add", driver="raw", node_name="disk", file={"driver": "file", "filename": str(payload)})
    client.ok("blockdev-add", driver="file", node_name="header", filename=str(header))


def start(client: RawClient, **options: Any) -> None:
    given = {"node_name": "vol", "file": "disk", "header": "header", "key_secret": "sec0", **CHEAP, **options}
    client.ok("blockdev-encrypt", job_id="enc", auto_dismiss=False, **given)


def wait_for(client: RawClient, done: int) -> dict[str, Any]:
    """Return the job once it has encrypted `done` bytes, or has concluded."""
    while True:
        (job,) = client.ok("query-jobs")
        if job["status"] == "concluded" or 0 < done <= job["current-progress"]:
            return dict(job)
        time.sleep(0.01)


def concluded(client: RawClient) -> dict[str, Any]:
    job = wait_for(client, 0)
    client.ok("job-dismiss", id="enc")
    return job


def qemu_io(client: RawClient, command: str) -> None:
    said = client.ok("human-monitor-command", command_line=f'qemu-io vol "{command}"')
    assert said == "", said


def decrypted(folder: Path, payload: Path, header: Path) -> bytes:
    """Let cryptsetup itself turn the payload back into plaintext; it writes whole blocks of 4096 bytes."""
    size = payload.stat().st_size
    arguments = ("--force-offline-reencrypt", "--header", header, payload, "--key-file", folder / "key")
    done = cryptsetup("reencrypt", "--decrypt", *arguments)
    assert done.returncode == 0, done.stderr
    return payload.read_bytes()[:size]


def refused(client: RawClient, text: str, **node: Any) -> None:
    reply = client.command("blockdev-add", node_name="other", **node)
    assert text in reply["error"]["desc"], reply


def test_an_image_is_encrypted_while_it_is_used(tmp_path: Path) -> None:
    need("cryptsetup")
    plain, payload, header = images(tmp_path)
    want = bytearray(plain)
    with running(tmp_path) as daemon:
        client = daemon.client()
        add_nodes(client, payload, header)
        start(client, speed=2 * MiB)
        wait_for(client, MiB)
        for pattern, offset, length in ((7, 100, 3000), (8, 5 * MiB - 700, 3000), (9, SIZE - 1000, 1000)):
            qemu_io(client, f"write -q -P {pattern} {offset} {length}")
            want[offset : offset + length] = bytes([pattern]) * length
        for offset in (0, 5 * MiB - 4096):
            assert client.ok("query-jobs")[0]["current-progress"] < SIZE
            qemu_io(client, f"read -q -P {want[offset + 3500]} {offset + 3500} 1")
        qemu_io(client, "read -q -P 7 100 3000")
        client.ok("job-pause", id="enc")
        while client.ok("query-jobs")[0]["status"] != "paused":
            time.sleep(0.01)
        stopped = client.ok("query-jobs")[0]["current-progress"]
        added = cryptsetup("luksAddKey", "--key-file", tmp_path / "key", header, tmp_path / "key")
        assert "Unmet LUKS2 requirements" in added.stderr
        assert "qmpd-encrypt-v1" in cryptsetup("luksDump", header).stdout
        refused(client, "Permission conflict", driver="luks", file="disk", header="header", key_secret="sec0")
        reply = client.command("blockdev-del", node_name="vol")
        assert reply["error"]["desc"] == "Node vol is in use"
        client.ok("blockdev-encrypt", job_id="two", node_name="vol", auto_dismiss=False)
        while client.ok("query-jobs")[0]["status"] != "concluded":
            time.sleep(0.01)
        assert client.ok("query-jobs")[0]["error"] == "Node 'vol' is being encrypted by job 'enc'"
        client.ok("job-dismiss", id="two")
        client.ok("job-resume", id="enc")
        client.ok("job-cancel", id="enc")
        assert concluded(client)["current-progress"] >= stopped
        qemu_io(client, "read -q -P 8 5242180 3000")
        start(client, speed=0)
        job = concluded(client)
        assert "error" not in job, job
        assert job["current-progress"] == job["total-progress"] == SIZE
        qemu_io(client, "read -q -P 9 6291992 1000")
        (info,) = [one for one in client.ok("query-named-block-nodes") if one["node-name"] == "vol"]
        assert info["image"]["format-specific"]["data"]["version"] == 2
        client.ok("blockdev-del", node_name="vol")
        client.ok("blockdev-add", node_name="again", driver="luks", file="disk", header="header", key_secret="sec0")
    assert payload.stat().st_size == SIZE
    assert plain[4096:8192] not in payload.read_bytes()
    tested = ("--test-passphrase", "--header", header, payload, "--key-file", tmp_path / "key")
    assert cryptsetup("open", *tested).returncode == 0
    assert "qmpd-encrypt" not in cryptsetup("luksDump", header).stdout
    assert decrypted(tmp_path, payload, header) == want
    assert "abc123" not in daemon.log


def test_four_writers_of_another_program_see_what_they_wrote(tmp_path: Path) -> None:
    """fio writes through an NBD export of the volume while it is encrypted, and verifies then and afterwards."""
    need("fio")
    plain, payload, header = images(tmp_path, 16 * MiB)
    with running(tmp_path) as daemon:
        client = daemon.client()
        add_nodes(client, payload, header)
        start(client, speed=4 * MiB)
        wait_for(client, MiB)
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}}
        client.ok("nbd-server-start", addr=address, max_connections=0)
        export = {"type": "nbd", "id": "e", "node-name": "vol", "name": "vol", "writable": True}
        assert client.send({"execute": "block-export-add", "arguments": export}) == {"return": {}}
        work = ["fio", "--ioengine=nbd", f"--uri=nbd+unix:///vol?socket={tmp_path / 'nbd.sock'}", "--rw=randwrite"]
        work += [
            "--bsrange=512-96k",
            "--bs_unaligned=0",
            "--iodepth=4",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--randseed=7",
        ]
        for number in range(4):  # two before the position at first, two behind it
            work += [f"--name=w{number}", f"--offset={number * 4 * MiB}", f"--size={3 * MiB}"]
        done = subprocess.run(work, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert client.ok("query-jobs")[0]["status"] == "running", "the job was done too early to tell"
        client.ok("job-cancel", id="enc")
        concluded(client)
        start(client)
        job = concluded(client)
        assert "error" not in job, job
        done = subprocess.run([*work, "--verify_only"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        client.ok("block-export-del", id="e")
    found = decrypted(tmp_path, payload, header)
    for number in range(4):  # nobody wrote to the rest
        rest = slice(number * 4 * MiB + 3 * MiB, (number + 1) * 4 * MiB)
        assert found[rest] == plain[rest]


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_qcow2_image_is_encrypted_below_its_own_size(tmp_path: Path, sector: int) -> None:
    """The ciphertext goes into the qcow2 image, whose virtual size stays what it was."""
    need("qemu-img")
    image, header = tmp_path / "disk.qcow2", tmp_path / "header.luks"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(3 * MiB)], check=True)
    header.write_bytes(b"")
    with running(tmp_path) as daemon:
        client = daemon.client()
        client.ok("object-add", qom_type="secret", id="sec0", data="abc123")
        client.ok("blockdev-add", driver="qcow2", node_name="disk", file={"driver": "file", "filename": str(image)})
        client.ok("human-monitor-command", command_line='qemu-io disk "write -q -P 5 1048000 4096"')
        client.ok("blockdev-add", driver="file", node_name="header", filename=str(header))
        start(client, sector_size=sector)
        job = concluded(client)
        assert "error" not in job, job
        qemu_io(client, "read -q -P 5 1048000 4096")
        qemu_io(client, "read -q -P 0 0 1048000")
    info = subprocess.run(["qemu-img", "info", "--output=json", image], capture_output=True, text=True, check=True)
    assert f'"virtual-size": {3 * MiB}' in info.stdout
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_what_does_not_fit_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    plain, payload, header = images(tmp_path)
    with running(tmp_path) as daemon:
        client = daemon.client()
        add_nodes(client, payload, header)
        start(client, sector_size=4096)
        assert concluded(client)["error"] == f"The image has {SIZE} bytes, expected a multiple of the sector size 4096"
        start(client, header="disk")
        assert concluded(client)["error"] == "The header cannot lie on the image itself, 'disk'"
        start(client, key_secret="none")
        assert concluded(client)["error"] == "No secret with id 'none'"
        os.truncate(payload, SIZE - 500)
        client.ok("blockdev-add", driver="raw", node_name="odd", file={"driver": "file", "filename": str(payload)})
        start(client, file="odd")
        assert concluded(client)["error"] == f"The image has {SIZE - 500} bytes, expected a multiple of 512"
        client.ok("blockdev-del", node_name="odd")
        payload.write_bytes(plain)
        client.ok("blockdev-del", node_name="header")
        header.write_bytes(b"precious" * 3 * MiB)
        client.ok("blockdev-add", driver="file", node_name="header", filename=str(header))
        start(client)
        assert "not blank, and it has no LUKS2 header" in concluded(client)["error"]
    assert payload.read_bytes() == plain
    assert header.read_bytes() == b"precious" * 3 * MiB
