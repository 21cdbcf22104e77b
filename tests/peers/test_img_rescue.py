"""`convert --salvage` and `--rate`, `rebase -c`: what qemu-img does with the same words."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support.data_files import call

SIZE = 1 << 20
TOOLS = ("qmpd-img", "qemu-img")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img", "qemu-io")
    monkeypatch.chdir(tmp_path)
    Path("source").write_bytes(random.Random(5).randbytes(SIZE))


def failing(*sectors: int, kind: str = "read") -> str:
    """Return the name of the source with sectors that cannot be read."""
    errors = [{"event": "none", "iotype": kind, "errno": 5, "sector": one, "once": False} for one in sectors]
    image = {"driver": "file", "filename": "source"}
    return "json:" + json.dumps(
        {"driver": "raw", "file": {"driver": "blkdebug", "image": image, "inject-error": errors}}
    )


@pytest.mark.parametrize("options", [(), ("-m", "1"), ("-c",), ("-q",), ("-S", "0")], ids=" ".join)
def test_what_cannot_be_read_is_zero_and_warned_of(options: tuple[str, ...]) -> None:
    """Sector by sector; everything around it is saved."""
    bad = [0, 7, 8, 900, SIZE // 512 - 1]
    seen = []
    for tool in TOOLS:
        status, said = call(tool, "convert", "--salvage", *options, "-O", "qcow2", failing(*bad), f"{tool}.qcow2")
        seen.append((status, sorted(said.splitlines())))
        call("qemu-img", "convert", "-O", "raw", f"{tool}.qcow2", f"{tool}.raw")
    assert seen[0] == seen[1]
    expected = bytearray(Path("source").read_bytes())
    for one in bad:
        expected[one * 512 : one * 512 + 512] = bytes(512)
    assert Path("qmpd-img.raw").read_bytes() == Path("qemu-img.raw").read_bytes() == expected


def test_without_salvage_an_error_is_an_error() -> None:
    seen = []
    for tool in TOOLS:
        status, said = call(tool, "convert", "-O", "raw", failing(900), f"{tool}.raw")
        seen.append((status, "Input/output error" in said))
    assert seen == [(1, True)] * 2


def test_copy_offloading_does_not_go_with_it() -> None:
    seen = [call(tool, "convert", "--salvage", "-C", "-O", "raw", "source", "target") for tool in TOOLS]
    assert seen[0] == seen[1]
    assert seen[0][0] == 1


def test_where_nobody_can_say_what_is_there_it_is_read_all_the_same() -> None:
    for tool in TOOLS:
        status, said = call(tool, "convert", "--salvage", "-O", "raw", failing(900, kind="block-status"), f"{tool}.raw")
        assert status == 0
        assert "warning: error while reading block status at offset" in said
        assert Path(f"{tool}.raw").read_bytes() == Path("source").read_bytes()


def test_a_table_of_a_qcow2_image_that_cannot_be_read_costs_what_it_tells_of() -> None:
    """The L2 table of the first 32 MiB is on a bad sector; what the second one tells of is saved."""
    call("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "image", "4M")
    call("qemu-img", "dd", "-f", "raw", "-O", "raw", "if=source", "of=wide", "bs=1M")
    call("qemu-img", "resize", "-q", "-f", "raw", "wide", "4M")
    call("qemu-img", "convert", "-n", "-O", "qcow2", "wide", "image")
    status, said = call("qemu-img", "map", "--output=json", "image")
    assert status == 0, said
    header = Path("image").read_bytes()
    l1 = int.from_bytes(header[40:48], "big")
    first_table = int.from_bytes(header[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    errors = [{"event": "none", "iotype": "read", "errno": 5, "sector": first_table // 512, "once": False}]
    inner = {"driver": "blkdebug", "image": {"driver": "file", "filename": "image"}, "inject-error": errors}
    name = "json:" + json.dumps({"driver": "qcow2", "file": inner})
    status, said = call("qmpd-img", "convert", "--salvage", "-O", "raw", name, "saved")
    assert status == 0
    assert "warning: error while reading block status at offset 0: Input/output error" in said
    assert "warning: error while reading offset 0: Input/output error" in said
    assert os.path.getsize("saved") == 4 << 20


@pytest.mark.parametrize("tool", TOOLS)
def test_writes_keep_to_the_rate(tool: str) -> None:
    began = time.monotonic()
    assert call(tool, "convert", "-r", "2M", "-O", "raw", "source", "source", "source", "target") == (0, "")
    assert 0.5 < time.monotonic() - began < 10
    assert Path("target").read_bytes() == Path("source").read_bytes() * 3


def test_a_rate_that_is_none() -> None:
    seen = [call(tool, "convert", "-r", "fast", "-O", "raw", "source", "target") for tool in TOOLS]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
def test_what_a_rebase_copies_is_compressed(cluster: str) -> None:
    """The clusters are marked so, what the image shows is the same, and qemu-img finds nothing wrong."""
    Path("old").write_bytes((b"0123456789abcdef" * 4096) * 64)
    seen = []
    for tool in TOOLS:
        options = f"cluster_size={cluster},backing_file=old,backing_fmt=raw"
        assert call("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, f"{tool}.qcow2")[0] == 0
        subprocess.run(["qemu-io", "-c", "write -P 7 1M 100k", f"{tool}.qcow2"], check=True, capture_output=True)
        seen.append(call(tool, "rebase", "-c", "-b", "", f"{tool}.qcow2"))
        assert call("qemu-img", "check", "-q", f"{tool}.qcow2") == (0, "")
        told = json.loads(call("qemu-img", "map", "--output=json", f"{tool}.qcow2")[1])
        assert any(one["compressed"] for one in told)
    assert seen[0] == seen[1] == (0, "")
    assert call("qemu-img", "compare", "qmpd-img.qcow2", "qemu-img.qcow2") == (0, "Images are identical.\n")


def test_a_format_without_compression_is_refused() -> None:
    call("qemu-img", "create", "-q", "-f", "raw", "plain", "1M")
    seen = [call(tool, "rebase", "-c", "-f", "raw", "-b", "", "plain") for tool in TOOLS]
    assert seen[0] == seen[1]
