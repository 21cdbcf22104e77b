"""QEMU's own daemons with a monitor, for tests that ask them and us the same."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.daemon import START_SECONDS, RawClient, monitor_options
from tests.support.peers import find

STORAGE_DAEMON = "qemu-storage-daemon"
SOCKET = "ref.sock"
STARTS = 3
HANDSHAKE_SECONDS = 10.0


@contextlib.contextmanager
def reference(folder: Path, *args: str, name: str = STORAGE_DAEMON) -> Iterator[RawClient]:
    """Run `name` in `folder` with a monitor there, and `args` besides; gives the monitor.

    By then whatever the command line asks for is there: the main loop that answers runs only after that.

    One start in some thousands, QEMU 10.0.2 greets its first client and then never reads from it. What
    is asked here is what it answers to commands, so that one is ended, and another started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, STARTS + 1):
        process = _started(folder, name, args)
        try:
            try:
                client = _greeted(folder, name, process)
            except TimeoutError:
                assert attempt < STARTS, f"{name} does not answer qmp_capabilities, {STARTS} times started"
                continue
            with contextlib.closing(client):
                yield client
            return
        finally:
            _end(process)


def _started(folder: Path, name: str, args: tuple[str, ...]) -> subprocess.Popen[bytes]:
    program, path = find(name), folder / SOCKET
    assert program is not None
    path.unlink(missing_ok=True)
    monitor = monitor_options(path, system=name != STORAGE_DAEMON)
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [program, *monitor, *args], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def _greeted(folder: Path, name: str, process: subprocess.Popen[bytes]) -> RawClient:
    """Connect as soon as it listens; raises TimeoutError if it takes the connection and says nothing."""
    path, log = folder / SOCKET, folder / f"{name}.log"
    deadline = time.monotonic() + START_SECONDS
    while not _listening(path):
        assert process.poll() is None, f"{name} ended before it listened:\n{log.read_text(errors='replace')}"
        assert time.monotonic() < deadline, f"{name} does not listen at {path}"
        time.sleep(0.02)
    return RawClient(path, handshake_seconds=HANDSHAKE_SECONDS)


def _listening(path: Path) -> bool:
    """Say so without connecting: QEMU's monitor serves one client at a time."""
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(row[3] == "00010000" and row[-1] == str(path) for row in sockets)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
