"""FUSE exports: real mounts, read and written through the kernel by ordinary system calls and programs."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import RawClient, running
from tests.support.peers import need

SIZE = 4 << 20


def mounts() -> str:
    return Path("/proc/mounts").read_text()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[RawClient]:
    assert Path("/dev/fuse").exists(), "FUSE is missing: load the kernel's module (modprobe fuse)"
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        yield daemon.client()
    assert str(tmp_path) not in mounts()


def exported(client: RawClient, tmp_path: Path, size: int = SIZE, **options: Any) -> Path:
    """Return the path where a new file of `size` bytes is mounted."""
    disk, place = tmp_path / "disk", tmp_path / "place"
    with disk.open("wb") as file:
        file.truncate(size)
    place.touch()
    client.ok("blockdev-add", driver="file", node_name="disk", filename=str(disk), discard="unmap")
    client.ok("block-export-add", type="fuse", id="e", node_name="disk", mountpoint=str(place), **options)
    return place


def test_random_requests_match_a_bytearray(client: RawClient, tmp_path: Path) -> None:
    rng = random.Random(1)
    place = exported(client, tmp_path, writable=True)
    model = bytearray(SIZE)
    fd = os.open(place, os.O_RDWR)
    try:
        for _ in range(200):
            at = rng.randrange(SIZE)
            length = rng.randint(1, min(SIZE - at, rng.choice((4096, 2 << 20))))
            if rng.random() < 0.5:
                assert os.pread(fd, length, at) == model[at : at + length]
            else:
                data = rng.randbytes(length)
                assert os.pwrite(fd, data, at) == length
                model[at : at + length] = data
        os.fsync(fd)
    finally:
        os.close(fd)
    assert place.read_bytes() == model
    assert (tmp_path / "disk").read_bytes() == model


def test_many_threads_at_once(client: RawClient, tmp_path: Path) -> None:
    place = exported(client, tmp_path, writable=True)
    part = SIZE // 8

    def work(number: int) -> bool:
        data = random.Random(number).randbytes(part)
        fd = os.open(place, os.O_RDWR)
        try:
            for at in range(0, part, 50_000):
                os.pwrite(fd, data[at : at + 50_000], number * part + at)
            return os.pread(fd, part, number * part) == data
        finally:
            os.close(fd)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_sizes_modes_and_what_is_refused(client: RawClient, tmp_path: Path) -> None:
    place = exported(client, tmp_path, writable=True)
    found = place.stat()
    assert (found.st_size, found.st_mode, found.st_nlink) == (SIZE, 0o100600, 1)
    os.truncate(place, 1 << 20)
    assert (tmp_path / "disk").stat().st_size == place.stat().st_size == 1 << 20
    with place.open("r+b") as file:
        assert os.pwrite(file.fileno(), b"x" * 1000, (1 << 20) - 10) == 10
        done = subprocess.run(["fallocate", "-l", "4096", str(place)], capture_output=True, check=False)
        assert b"not supported" in done.stderr
        os.posix_fallocate(file.fileno(), 1 << 20, 1 << 20)
    assert place.stat().st_size == 2 << 20
    place.chmod(0o640)
    assert place.stat().st_mode == 0o100640
    with pytest.raises(OSError) as caught:
        os.utime(place, (1, 1))
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(OSError) as caught:
        (place / "below").stat()
    assert caught.value.errno == errno.ENOTDIR


def test_holes(client: RawClient, tmp_path: Path) -> None:
    place = exported(client, tmp_path, writable=True)
    with place.open("r+b") as file:
        fd = file.fileno()
        os.pwrite(fd, b"d" * 65536, 1 << 20)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
        assert os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 65536
        with pytest.raises(OSError) as caught:
            os.lseek(fd, 2 << 20, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        subprocess.run(["fallocate", "--punch-hole", "-o", str(1 << 20), "-l", "65536", str(place)], check=True)
        assert os.pread(fd, 65536, 1 << 20) == bytes(65536)
        with pytest.raises(OSError):
            os.lseek(fd, 0, os.SEEK_DATA)
        os.pwrite(fd, b"e" * 65536, 0)
        subprocess.run(["fallocate", "--zero-range", "-o", "4096", "-l", "4096", str(place)], check=True)
        assert os.pread(fd, 12288, 0) == b"e" * 4096 + bytes(4096) + b"e" * 4096


def test_growable(client: RawClient, tmp_path: Path) -> None:
    place = exported(client, tmp_path, size=0, writable=True, growable=True)
    data = random.Random(3).randbytes(3 << 20)
    subprocess.run(["dd", f"of={place}", "bs=64k", "conv=notrunc", "status=none"], input=data, check=True)
    assert place.read_bytes() == (tmp_path / "disk").read_bytes() == data


def test_read_only(client: RawClient, tmp_path: Path) -> None:
    place = exported(client, tmp_path)
    assert place.stat().st_mode == 0o100400
    fd = os.open(place, os.O_RDONLY)
    os.close(fd)
    for work in (lambda: os.truncate(place, 0), lambda: place.write_bytes(b"x"), lambda: place.chmod(0o600)):
        with pytest.raises(OSError):
            work()
    assert (tmp_path / "disk").stat().st_size == SIZE


def test_qemu_img_works_on_a_qcow2_disk_that_is_mounted(client: RawClient, tmp_path: Path) -> None:
    need("qemu-img")
    qemu_img = "qemu-img"
    image = tmp_path / "a.qcow2"
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    place = tmp_path / "place"
    place.touch()
    tree = {"driver": "file", "filename": str(image)}
    client.ok("blockdev-add", driver="qcow2", node_name="q", file=tree)
    client.ok("block-export-add", type="fuse", id="e", node_name="q", mountpoint=str(place), writable=True)
    source = tmp_path / "source"
    source.write_bytes(random.Random(4).randbytes(SIZE))
    subprocess.run([qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", source, place], check=True)
    client.ok("block-export-del", id="e")
    client.ok("blockdev-del", node_name="q")
    subprocess.run([qemu_img, "compare", "-f", "raw", "-F", "qcow2", source, image], check=True, capture_output=True)


def test_the_file_that_was_there_comes_back_and_open_ones_get_errors(client: RawClient, tmp_path: Path) -> None:
    place = exported(client, tmp_path, writable=True)
    again = client.command("block-export-add", type="fuse", id="f", node_name="disk", mountpoint=str(place))
    assert again["error"]["desc"] == f"There already is a FUSE export on '{place}'"
    fd = os.open(place, os.O_RDWR)
    client.ok("block-export-del", id="e")
    client.wait_event("BLOCK_EXPORT_DELETED")
    assert place.stat().st_size == 0
    with pytest.raises(OSError) as caught:
        os.pread(fd, 1, 0)
    assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(OSError):
        os.close(fd)
    client.ok("blockdev-del", node_name="disk")


def test_errors_of_the_node_reach_the_caller(client: RawClient, tmp_path: Path) -> None:
    disk, place = tmp_path / "disk", tmp_path / "place"
    disk.write_bytes(bytes(SIZE))
    place.touch()
    client.ok("blockdev-add", driver="file", node_name="disk", filename=str(disk))
    rule = {"event": "none", "errno": errno.ENOSPC, "iotype": "write"}
    client.ok("blockdev-add", driver="blkdebug", node_name="d", image="disk", inject_error=[rule])
    client.ok("block-export-add", type="fuse", id="e", node_name="d", mountpoint=str(place), writable=True)
    fd = os.open(place, os.O_RDWR)
    try:
        with pytest.raises(OSError) as caught:
            os.pwrite(fd, b"x", 0)
        assert caught.value.errno == errno.ENOSPC
        assert os.pread(fd, 4096, 0) == bytes(4096)
        fcntl.fcntl(fd, fcntl.F_GETFL)
    finally:
        os.close(fd)
