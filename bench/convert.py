"""Rows about images at rest: qmpd-img beside qemu-img."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.images import run
from bench.qmp import Figure
from bench.servers import PASSPHRASE, cached_environment, program
from qmpd.units import GiB, KiB, MiB

SECRET = ("--object", f"secret,id=s,data={PASSPHRASE}")
TEXT = b"The quick brown fox jumps over the lazy dog 0123456789. " * 1200


def mixed(path: Path, size: int) -> None:
    """Write a file of random stretches, text, zeroes that are stored, and holes, in pieces of 64 KiB to 4 MiB."""
    lengths = [64 * KiB, 256 * KiB, MiB, 4 * MiB]
    at = number = 0
    with path.open("wb") as file:
        file.truncate(size)
        while at < size:
            length = min(lengths[number * 7 % 4], size - at)
            kind = number % 4
            if kind < 3:
                file.seek(at)
                text = TEXT * (length // len(TEXT) + 1)
                file.write((os.urandom(length), text[:length], bytes(length))[kind])
            at += length
            number += 1


def _prepare(folder: Path, size: int) -> None:
    mixed(folder / "mixed.raw", size)
    run("qemu-img", "convert", "-O", "qcow2", folder / "mixed.raw", folder / "mixed.qcow2")
    luks = ("-O", "luks", "-o", "key-secret=s,iter-time=10")
    run("qemu-img", "convert", *SECRET, *luks, folder / "mixed.raw", folder / "mixed.luks")
    header = ("-o", "key-secret=s,iter-time=10,detached-header=true")
    run(program("qmpd-img"), "create", "-q", *SECRET, "-f", "luks", *header, folder / "mixed.header")
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "mixed-payload.qcow2", str(size))
    run("qemu-img", "convert", *SECRET, "-n", "--target-image-opts", folder / "mixed.raw", _detached(folder))
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "sparse.qcow2", str(100 * GiB))
    writes = [word for at in range(0, 100, 2) for word in ("-c", f"write -q {at}G 1M")]
    run("qemu-io", *writes, folder / "sparse.qcow2")
    os.sync()


def _detached(folder: Path) -> str:
    payload = f"file.driver=qcow2,file.file.filename={folder / 'mixed-payload.qcow2'}"
    return f"driver=luks,key-secret=s,{payload},header.driver=file,header.filename={folder / 'mixed.header'}"


def _jobs(folder: Path) -> list[tuple[str, float | None, list[str], Path | None]]:
    """Return name, goal, words, and the file that each job makes."""

    def convert(*words: str | Path) -> list[str]:
        return ["convert", *map(str, words)]

    raw, luks = folder / "mixed.raw", f"driver=luks,key-secret=s,file.filename={folder / 'mixed.luks'}"
    to_luks = ("-O", "luks", "-o", "key-secret=s,iter-time=10")
    out = folder / "converted"
    return [
        ("convert raw to qcow2", 0.7, convert("-f", "raw", "-O", "qcow2", raw, out), out),
        ("convert qcow2 to raw", 0.7, convert("-f", "qcow2", "-O", "raw", folder / "mixed.qcow2", out), out),
        ("convert raw to luks", 1.5, convert(*SECRET, "-f", "raw", *to_luks, raw, out), out),
        ("convert luks to raw", 1.5, convert(*SECRET, "--image-opts", "-O", "raw", luks, out), out),
        (
            "convert qcow2+luks detached to raw",
            1.5,
            convert(*SECRET, "--image-opts", "-O", "raw", _detached(folder), out),
            out,
        ),
        ("check a sparse qcow2 of 100 GiB", None, ["check", str(folder / "sparse.qcow2")], None),
        ("map a sparse qcow2 of 100 GiB", None, ["map", "--output=json", str(folder / "sparse.qcow2")], None),
        ("start of the program alone", None, ["--version"], None),
    ]


def _timed(tool: str, words: list[str], made: Path | None) -> float:
    if made is not None:
        made.unlink(missing_ok=True)
    began = time.monotonic()
    done = subprocess.run([tool, *words], capture_output=True, env=cached_environment(), check=False)
    took = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{tool} {' '.join(words)}: {done.stderr.decode()}")
    return took


def figures(folder: Path, pattern: re.Pattern[str], rounds: int, size: int) -> Iterator[Figure]:
    """Measure each job whose name matches "img NAME" with both tools in turn, `size` bytes of mixed data.

    Each tool has one run before that does not count: it finds the modules not compiled, and memory of the machine that
    was never used, which a virtual machine's host then has to find first. What the last round of a conversion made is
    compared with its source.
    """
    jobs = [job for job in _jobs(folder) if pattern.search(f"img {job[0]}")]
    if not jobs:
        return
    _prepare(folder, size)
    for name, goal, words, made in jobs:
        row = Figure(name, "s", "less", "qemu-img", goal=goal)
        for tool in ("qemu-img", program("qmpd-img")):
            _timed(tool, words, made)
        for turn in range(rounds):
            for tool in ("qemu-img", program("qmpd-img")) if turn % 2 else (program("qmpd-img"), "qemu-img"):
                (row.theirs if tool == "qemu-img" else row.ours).append(_timed(tool, words, made))
                if made is not None and turn == rounds - 1 and tool != "qemu-img":
                    _same(folder, name, made)
        if made is not None:
            made.unlink(missing_ok=True)
        yield row


def _same(folder: Path, name: str, made: Path) -> None:
    """Stop if a conversion lost a byte; QEMU judges."""
    image = f"driver=raw,file.filename={made}"
    if name.endswith("to luks"):
        image = f"driver=luks,key-secret=s,file.filename={made}"
    elif name.endswith("to qcow2"):
        image = f"driver=qcow2,file.filename={made}"
    run("qemu-img", "compare", *SECRET, "--image-opts", f"driver=raw,file.filename={folder / 'mixed.raw'}", image)
