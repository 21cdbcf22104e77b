"""Two servers with the same exports: qemu-storage-daemon and qmpd-storage-daemon."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.daemon import RawClient, listens, running
from tests.support.reference import reference

START_SECONDS = 20.0


def wait_for(path: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a socket is there and connections to it are taken."""
    deadline = time.monotonic() + START_SECONDS
    while not listens(path):
        assert process is None or process.poll() is None, "the server has ended"
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


@contextlib.contextmanager
def qmpd(folder: Path, *args: str) -> Iterator[RawClient]:
    """Run qmpd-storage-daemon with `args`; gives its monitor."""
    folder.mkdir(parents=True, exist_ok=True)
    with running(folder, *args, name="qmpd-storage-daemon") as daemon:
        yield daemon.client()


@contextlib.contextmanager
def qemu(folder: Path, *args: str) -> Iterator[RawClient]:
    """Run qemu-storage-daemon with `args`; gives its monitor."""
    with reference(folder, *args) as monitor:
        yield monitor


def serving(folder: Path, *exports: str) -> list[str]:
    """Return options for an NBD server at FOLDER/n.sock with these --export values."""
    options = ["--nbd-server", f"addr.type=unix,addr.path={folder / 'n.sock'},max-connections=0"]
    for export in exports:
        options += ["--export", export]
    return options
