"""convert and measure of snapshots and bitmaps: what qemu-img says and makes, and what qmpd-img does."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from tests.peers.test_img_snapshots import ok, run, write
from tests.support.peers import need

CASES = (
    "convert -l nosuch", "convert -l snapshot.name=nosuch", "convert -l snapshot.id=1", "convert -l 1",
    "convert -l snapshot.id=1,snapshot.name=zz", "convert -l snapshot.bad=1", "convert -l s1",
    "convert --bitmaps", "convert --bitmaps --skip-broken-bitmaps", "convert --skip-broken-bitmaps",
    "convert --bitmaps -o compat=0.10", "convert --bitmaps -l s1", "measure", "measure -l s1", "measure -l zz",
    "measure -o cluster_size=4k", "measure -o compat=0.10",
)  # fmt: skip


def source(path: Path) -> Path:
    """Make an image with two bitmaps and a snapshot."""
    ok("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    write(path, "write -q -P 3 0 100k")
    for words in ("--add", "--add -g 4k"):
        ok("qemu-img", "bitmap", *words.split(), path, f"b{len(words)}")
    ok("qemu-img", "snapshot", "-c", "s1", path)
    write(path, "write -q -P 4 64k 100k")
    ok("qemu-img", "bitmap", "--disable", path, "b5")
    return path


def broken(path: Path) -> None:
    """Set the in-use flag of the first bitmap."""
    data = bytearray(path.read_bytes())
    at = 112
    while struct.unpack_from(">I", data, at)[0] != 0x23852875:
        at += 8 + -(-struct.unpack_from(">I", data, at + 4)[0] // 8) * 8
    data[struct.unpack_from(">Q", data, at + 24)[0] + 15] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [False, True], ids=["sound", "in-use"])
def test_the_tools_agree(damage: bool, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = source(tmp_path / "source.qcow2")
    if damage:
        broken(image)
    for case in CASES:
        made = {}
        for tool in ("qemu-img", "qmpd-img"):
            target = tmp_path / "target.qcow2"
            target.unlink(missing_ok=True)
            words = [*case.split(), "-O", "qcow2", image, *([target] if case.startswith("convert") else [])]
            status, said = run(tool, *words)
            left: tuple[object, ...] = ()
            if target.exists():
                ok("qemu-img", "check", "-q", target)
                ok("qemu-img", "convert", "-O", "raw", target, tmp_path / "seen.raw")
                described = re.sub(r"(disk size|file length): .*", "", ok("qemu-img", "info", target))
                left = (described, (tmp_path / "seen.raw").read_bytes())
            made[tool] = status, said, left
        assert made["qmpd-img"] == made["qemu-img"], case


def test_what_has_no_bitmaps_or_snapshots_is_refused(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image, raw, target = source(tmp_path / "source.qcow2"), tmp_path / "disk.raw", tmp_path / "target"
    raw.write_bytes(bytes(1 << 20))
    for words in (
        ["--bitmaps", "-O", "raw", image, target],
        ["--bitmaps", "-O", "qcow2", "-f", "raw", raw, target],
        ["--bitmaps", "-O", "qcow2", image, image, target],
        ["-l", "s1", "-O", "raw", "-f", "raw", raw, target],
        ["-l", "s1", "-O", "raw", image, image, target],
    ):
        assert run("qmpd-img", "convert", *words) == run("qemu-img", "convert", *words)
    subprocess.run(["qemu-img", "convert", "--bitmaps", "-O", "qcow2", image, target], check=True)
    again = ["convert", "-n", "--bitmaps", "-O", "qcow2", image, target]
    assert run("qmpd-img", *again) == run("qemu-img", *again)
