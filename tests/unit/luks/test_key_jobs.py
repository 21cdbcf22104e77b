"""Key slots of open volumes of either version changed by jobs: seen by every disk on the header, by nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon, RawClient, running
from tests.unit.luks import test_keys, test_keys2

SECRETS = {name: value.decode() for name, value in test_keys2.SECRETS.items()}
LONG = 500_000
"""Rounds of pbkdf2 that take long enough to be looked at."""
_FLOCK = struct.Struct("hhxxxxqqixxxx")


def header_of(version: int) -> bytes:
    assert SECRETS["s"] == test_keys.SECRETS["s"].decode()
    return bytes(asyncio.run(test_keys.header()).data if version == 1 else test_keys2.header().data)


def opens(data: bytes, name: str) -> bool:
    return asyncio.run(test_keys2.opens(data, name))


def amend(client: RawClient, job: str, node: str, force: bool = False, **options: Any) -> str | None:
    """Run an amend job to its end and return its error."""
    start(client, job, node, force=force, **options)
    return finish(client, job)


def start(client: RawClient, job: str, node: str, force: bool = False, **options: Any) -> None:
    wire = {"driver": "luks", **{key.replace("_", "-"): value for key, value in options.items()}}
    if options["state"] != "inactive" and "iterations" not in options:
        wire["iterations"] = 1000
    if options["state"] != "inactive":
        wire["pbkdf"] = "pbkdf2"
    client.ok("blockdev-amend", job_id=job, node_name=node, options=wire, force=force)


def finish(client: RawClient, job: str) -> str | None:
    while True:
        (row,) = (row for row in client.ok("query-jobs") if row["id"] == job)
        if row["status"] == "concluded":
            client.ok("job-dismiss", id=job)
            error = row.get("error")
            assert error is None or isinstance(error, str)
            return error
        time.sleep(0.01)


@contextlib.contextmanager
def disks(folder: Path, version: int, names: str) -> Iterator[tuple[Daemon, RawClient]]:
    """A daemon with writable disks on one detached header."""
    (folder / "h.img").write_bytes(header_of(version))
    with running(folder) as daemon:
        client = daemon.client()
        for name, value in SECRETS.items():
            client.ok("object-add", qom_type="secret", id=name, data=value)
        client.ok("blockdev-add", driver="file", node_name="h", filename=str(folder / "h.img"))
        for name in names:
            (folder / name).write_bytes(bytes(1 << 20))
            file = {"driver": "file", "filename": str(folder / name)}
            client.ok("blockdev-add", driver="luks", node_name=name, file=file, header="h", key_secret="s")
            client.ok("device_add", driver="virtio-blk-pci", drive=name, id=f"disk-{name}", share_rw=True)
        yield daemon, client


def slots(client: RawClient, node: str) -> list[int]:
    rows = {row["node-name"]: row for row in client.ok("query-named-block-nodes", flat=True)}
    found = rows[node]["image"]["format-specific"]["data"]["slots"]
    return [row.get("slot", number) for number, row in enumerate(found) if row["active"]]


@pytest.mark.parametrize("version", [1, 2])
def test_a_key_change_through_one_disk_is_seen_by_the_other(tmp_path: Path, version: int) -> None:
    with disks(tmp_path, version, "ab") as (_, client):
        assert amend(client, "j1", "a", state="active", new_secret="n") is None
        assert slots(client, "a") == slots(client, "b") == [0, 1]
        assert amend(client, "j2", "b", state="inactive", old_secret="s") is None
        assert slots(client, "a") == slots(client, "b") == [1]
        error = amend(client, "j3", "a", state="active", new_secret="m")
        assert error == "Invalid password, cannot unlock any keyslot", "the node's own secret was erased"
        backup = str(tmp_path / "h.bak")
        assert amend(client, "j4", "a", state="changed", new_secret="m", old_secret="n", backup=backup) is None
        for name in "ab":
            line = f'qemu-io {name} "write -P 7 4096 8192"'
            assert client.ok("human-monitor-command", command_line=line) == ""
        file = {"driver": "file", "filename": str(tmp_path / "a"), "read-only": True}
        for name, good in (("s", False), ("n", False), ("m", True)):
            reply = client.command(
                "blockdev-add", driver="luks", node_name="c", read_only=True, header="h", key_secret=name,
                file=file | {"locking": "off"},
            )  # fmt: skip
            assert ("return" in reply) == good, reply
        error = amend(client, "j5", "b", state="inactive", old_secret="m", secret="m")
        assert error is not None
        assert error.startswith("All the active keyslots match")
        assert amend(client, "j6", "b", force=True, state="inactive", old_secret="m") is None
        assert slots(client, "a") == slots(client, "b") == []
        assert client.ok("human-monitor-command", command_line='qemu-io a "read -P 7 4096 8192"') == ""
    data = (tmp_path / "h.img").read_bytes()
    assert not any(opens(data, name) for name in SECRETS)
    saved = (tmp_path / "h.bak").read_bytes()
    assert [opens(saved, name) for name in "snm"] == [False, True, False]


def held(fd: int, byte: int) -> bool:
    reply = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    return bool(_FLOCK.unpack(reply)[0] != fcntl.F_UNLCK)


def flocked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


@pytest.mark.parametrize("version", [1, 2])
def test_other_processes_are_kept_from_the_header_while_it_changes(tmp_path: Path, version: int) -> None:
    with disks(tmp_path, version, "ab") as (daemon, client):
        fd = os.open(tmp_path / "h.img", os.O_RDONLY)
        other = daemon.client()
        assert [held(fd, byte) for byte in (101, 200, 201)] == [False, False, False]
        start(client, "j", "a", state="active", new_secret="n", iterations=LONG)
        deadline = time.monotonic() + 20
        while not held(fd, 201):
            assert time.monotonic() < deadline
        assert [held(fd, byte) for byte in (100, 101, 200, 201, 202, 203)] == [True, True, True, True, False, False]
        deadline = time.monotonic() + 20
        while version == 2 and not flocked(fd):
            assert time.monotonic() < deadline
        assert flocked(fd) == (version == 2)
        for name in "ab":  # nothing of this disturbs whoever is in this process
            line = f'qemu-io {name} "write -P 7 4096 8192"'
            assert other.ok("human-monitor-command", command_line=line) == ""
        assert held(fd, 201), "the job is still at it"
        assert finish(client, "j") is None
        assert [held(fd, byte) for byte in (101, 200, 201)] == [False, False, False]
        assert not flocked(fd)
        os.close(fd)


@pytest.mark.parametrize(
    ("byte", "text"),
    [(100, 'Failed to get shared "consistent read" lock'), (101, 'Failed to get shared "write" lock'),
     (201, 'Failed to get "write" lock')],
)  # fmt: skip
def test_a_header_that_another_process_uses_is_not_changed(tmp_path: Path, byte: int, text: str) -> None:
    with disks(tmp_path, 2, "a") as (_, client):
        before = (tmp_path / "h.img").read_bytes()
        with (tmp_path / "h.img").open("rb") as other:
            fcntl.fcntl(other.fileno(), fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
            error = amend(client, "j1", "a", state="active", new_secret="n")
            assert error is not None
            assert error.startswith(text)
        assert (tmp_path / "h.img").read_bytes() == before
        assert amend(client, "j2", "a", state="active", new_secret="n") is None
        assert slots(client, "a") == [0, 1]


def test_a_header_that_cryptsetup_holds_is_waited_for(tmp_path: Path) -> None:
    with disks(tmp_path, 2, "a") as (_, client), (tmp_path / "h.img").open("rb") as other:
        fcntl.flock(other.fileno(), fcntl.LOCK_EX)
        start(client, "j1", "a", state="active", new_secret="n")
        time.sleep(0.5)
        assert slots(client, "a") == [0]
        fcntl.flock(other.fileno(), fcntl.LOCK_UN)
        assert finish(client, "j1") is None
        assert slots(client, "a") == [0, 1]


def test_a_node_whose_key_slots_change_is_not_deleted_under_the_job(tmp_path: Path) -> None:
    with disks(tmp_path, 2, "") as (_, client):
        file = {"driver": "null-co", "size": 1 << 20}
        client.ok("blockdev-add", driver="luks", node_name="v", file=file, header="h", key_secret="s")
        start(client, "j", "v", state="active", new_secret="n", iterations=LONG)
        for name in "vh":
            reply = client.command("blockdev-del", node_name=name)
            assert reply["error"]["desc"] == f"Block device {name} is in use"
        assert finish(client, "j") is None
        client.ok("blockdev-del", node_name="v")
        client.ok("blockdev-del", node_name="h")
    data = (tmp_path / "h.img").read_bytes()
    assert [opens(data, name) for name in "snm"] == [True, True, False]


@pytest.mark.parametrize("version", [1, 2])
def test_changes_through_several_disks_at_once_happen_one_after_the_other(tmp_path: Path, version: int) -> None:
    with disks(tmp_path, version, "abc") as (_, client):
        for number, name in enumerate("abc"):
            start(client, f"j{number}", name, state="active", new_secret="snm"[number], iterations=LONG // 4)
        error = amend(client, "again", "a", state="active", new_secret="x")
        assert error == "Another job changes the key slots of this volume"
        assert [finish(client, f"j{number}") for number in range(3)] == [None] * 3
        assert slots(client, "a") == slots(client, "b") == slots(client, "c") == [0, 1, 2, 3]
    data = (tmp_path / "h.img").read_bytes()
    assert [opens(data, name) for name in "snmx"] == [True, True, True, False]
