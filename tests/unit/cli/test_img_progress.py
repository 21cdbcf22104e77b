"""Progress where people see it: a bar on a terminal, a line on SIGUSR1."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import pytest

from qmpd.cli.img._progress import Progress
from tests.support.daemon import program


def on_a_terminal(*words: str) -> tuple[int, str]:
    """Run a program with a terminal as its output; return its status and what came out."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux says that the other side is closed
                break
            shown += piece
        return process.wait(30), shown.decode()
    finally:
        os.close(ours)


def test_a_bar_with_rate_and_time_left_on_a_terminal(tmp_path: Path) -> None:
    source, target = tmp_path / "s.img", tmp_path / "t.qcow2"
    source.write_bytes(os.urandom(4 << 20))
    convert = [program("qmpd-img"), "convert", "-f", "raw", "-O", "qcow2", str(source), str(target)]
    status, shown = on_a_terminal(*convert, "-p")
    assert status == 0
    last = shown.rstrip().split("\r")[-1]
    assert re.search(r"100%\|.+\| 4\.00M/4\.00M \[.+B/s\]", last)
    assert "/100%)" not in shown
    assert on_a_terminal(*convert) == (0, "")


async def test_sigusr1_asks_once_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, shown=False) as progress:
        progress.add(250)
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.sleep(0.05)
        assert capsys.readouterr() == ("", "    (25.00/100%)\n")
