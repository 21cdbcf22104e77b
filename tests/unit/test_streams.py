"""Programs that are started without standard streams: no image gets the number of one of them."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.support.daemon import RawClient, listens, program

CLOSED = ("<&-", ">&-", "2>&-", "<&- >&- 2>&-")


def without(streams: str, *words: str | Path) -> int:
    """Run a program from a shell that closes `streams` first; return its exit status."""
    return subprocess.run(["sh", "-c", f"exec {shlex.join(map(str, words))} {streams}"], check=False).returncode


def numbers_of(path: Path, process: int) -> list[int]:
    """Return the descriptors of a process that are this file; others come and go meanwhile."""
    found = []
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):
            if link.readlink() == path:
                found.append(int(link.name))
    return found


@pytest.mark.parametrize("streams", CLOSED)
def test_qmpd_img_works_and_says_nothing_into_an_image(streams: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "raw").write_bytes(data)
    tool = program("qmpd-img")
    assert without(streams, tool, "convert", "-p", "-f", "raw", "-O", "raw", tmp_path / "raw", tmp_path / "made") == 0
    assert (tmp_path / "made").read_bytes() == data
    assert without(streams, tool, "info", tmp_path / "made") == 0
    assert without(streams, tool, "info", tmp_path / "nosuch") == 1
    assert (tmp_path / "made").read_bytes() == data


@pytest.mark.parametrize("streams", CLOSED)
@pytest.mark.parametrize("name", ["qmpd", "qmpd-storage-daemon"])
def test_a_daemon_keeps_its_images_apart_from_them(name: str, streams: str, tmp_path: Path) -> None:
    image, path = tmp_path / "image", tmp_path / "qmp.sock"
    image.write_bytes(bytes(1 << 20))
    if name == "qmpd":
        words = ["-nodefaults", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
    else:
        words = ["--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"]
    command = f"exec {shlex.join([program(name), *words])} {streams}"
    with subprocess.Popen(["sh", "-c", command]) as process:
        try:
            while not listens(path):
                assert process.poll() is None, "it has ended"
                time.sleep(0.02)
            with closing(RawClient(path)) as client:
                client.ok("blockdev-add", driver="file", filename=str(image), **{"node-name": "n"})
                assert min(numbers_of(image, process.pid)) > 2
                client.ok("quit")
        finally:
            if process.poll() is None:
                process.terminate()
    assert process.returncode == 0
