"""Disks whose storage fails or goes away: clients get the right errno, one event each, and nothing hangs."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.daemon import Daemon, RawClient, running
from tests.support.nbd_servers import wait_for
from tests.support.nbd_wire import FLUSH, READ, WRITE, ZERO, Client
from tests.support.peers import find

EIO, ENOSPC = errno.EIO, errno.ENOSPC


@contextlib.contextmanager
def nbdkit(sock: Path, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    need("nbdkit")
    process = subprocess.Popen([str(find("nbdkit")), "-f", "-U", str(sock), *args])
    try:
        wait_for(sock, process)
        yield process
    finally:
        process.kill()
        process.wait(20)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    (tmp_path / "plug").mkdir()
    with running(tmp_path, "--guest", f"plug=nbd:{tmp_path / 'plug'},unplug=ack") as one:
        yield one


def plug(monitor: RawClient, sock: Path, **members: Any) -> Path:
    server = {"type": "unix", "path": str(sock)}
    monitor.ok("blockdev-add", driver="nbd", node_name="n", server=server, **members)
    monitor.ok("device_add", driver="virtio-blk-pci", id="vd", drive="n")
    path = sock.parent / "plug" / "vd.sock"
    wait_for(path)
    return path


def events(monitor: RawClient, count: int) -> list[dict[str, Any]]:
    """Return that many BLOCK_IO_ERROR events, and make sure that there are no more."""
    found = [monitor.wait_event("BLOCK_IO_ERROR")["data"] for _ in range(count)]
    monitor.ok("query-status")
    assert not [event for event in monitor.events if event["event"] == "BLOCK_IO_ERROR"]
    return found


def test_a_vanished_server_is_an_error_for_clients_and_an_event_for_managers(daemon: Daemon, tmp_path: Path) -> None:
    monitor = daemon.client()
    with nbdkit(tmp_path / "b.sock", "memory", "1M") as server:
        client = Client(str(plug(monitor, tmp_path / "b.sock")))
        client.go(b"")
        assert client.call(WRITE, 0, 512, payload=b"x" * 512).error == 0
        server.kill()
        server.wait()
        for command, offset in ((READ, 0), (WRITE, 4096), (FLUSH, 0), (ZERO, 8192)):
            begun = time.monotonic()
            length = 0 if command == FLUSH else 512
            payload = b"y" * 512 if command == WRITE else b""
            assert client.call(command, offset, length, payload=payload).error == EIO
            assert time.monotonic() - begun < 5
        # The first goes out at once, and of those within a second after it the last.
        told = events(monitor, 2)
        assert [one["operation"] for one in told] == ["read", "write"]
        assert told[0] == {
            "qom-path": "/machine/peripheral/vd/virtio-backend", "device": "", "node-name": "n", "operation": "read",
            "action": "report", "nospace": False, "reason": "Input/output error",
        }  # fmt: skip
    (tmp_path / "b.sock").unlink(missing_ok=True)
    with nbdkit(tmp_path / "b.sock", "memory", "1M"):
        deadline = time.monotonic() + 30
        while client.call(READ, 0, 512).error:
            assert time.monotonic() < deadline, "the disk does not come back"
            time.sleep(0.1)
        monitor.ok("device_del", id="vd")
        monitor.wait_event("DEVICE_DELETED")
        monitor.ok("blockdev-del", node_name="n")
        client.close()


def test_a_disk_can_be_unplugged_while_its_server_is_away(daemon: Daemon, tmp_path: Path) -> None:
    monitor = daemon.client()
    with nbdkit(tmp_path / "b.sock", "memory", "1M") as server:
        client = Client(str(plug(monitor, tmp_path / "b.sock", reconnect_delay=1)))
        client.go(b"")
        server.kill()
        server.wait()
        client.send(READ, 0, 512)
        begun = time.monotonic()
        monitor.ok("device_del", id="vd")
        monitor.wait_event("DEVICE_DELETED")
        monitor.ok("blockdev-del", node_name="n")
        assert time.monotonic() - begun < 10
        client.close()


@pytest.mark.parametrize(("error", "expected"), [("ENOSPC", ENOSPC), ("EIO", EIO), ("ENOMEM", errno.ENOMEM)])
def test_errors_of_the_storage_reach_the_client(daemon: Daemon, tmp_path: Path, error: str, expected: int) -> None:
    monitor = daemon.client()
    failing = ("memory", "1M", "--filter=error", f"error-pwrite={error}", "error-pwrite-rate=100%")
    with nbdkit(tmp_path / "b.sock", *failing):
        client = Client(str(plug(monitor, tmp_path / "b.sock")))
        client.go(b"")
        assert client.call(WRITE, 0, 512, payload=b"x" * 512).error == expected
        assert client.call(READ, 0, 512).error == 0
        [told] = events(monitor, 1)
        assert (told["nospace"], told["operation"]) == (error == "ENOSPC", "write")
        client.close()


def test_a_daemon_that_is_told_to_end_waits_for_no_server(daemon: Daemon, tmp_path: Path) -> None:
    monitor = daemon.client()
    with nbdkit(tmp_path / "b.sock", "memory", "1M") as server:
        client = Client(str(plug(monitor, tmp_path / "b.sock", reconnect_delay=1000)))
        client.go(b"")
        server.kill()
        server.wait()
        client.send(READ, 0, 512)
        time.sleep(0.3)
        begun = time.monotonic()
        assert daemon.stop() in (0, -15)
        assert time.monotonic() - begun < 10
        client.close()
