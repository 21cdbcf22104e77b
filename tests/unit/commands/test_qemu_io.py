"""qemu-io by way of the monitor: what is done to the node, and what is printed where."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.perm import Perm
from qmpd.commands import _qemu_io
from tests.unit.machine.bench import MIB, Bench


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(MIB))
    bench = Bench()
    await bench.graph.blockdev_add({"driver": "file", "node-name": "f", "filename": str(image)})
    return bench


async def run(bench: Bench, line: str, node: str = "f") -> str:
    """Run one command on a backend of its own; returns what the monitor would print."""
    backend = BlockBackend(bench.graph, lambda: "an unnamed block device", Perm.NONE, Perm.ALL)
    backend.insert(bench.graph.find_node(node))
    try:
        command = _qemu_io.prepare(backend, line)
        if isinstance(command, str):
            return command
        await command.run()
        return ""
    finally:
        await backend.remove()


async def test_what_was_written_is_read_and_checked(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run(bench, "write -P 0xab 513 4k") == ""
    assert capsys.readouterr().out.startswith("wrote 4096/4096 bytes at offset 513\n4 KiB, 1 ops; 00.00 sec (")
    await run(bench, "read -P 0xab 513 4k")
    assert "Pattern" not in capsys.readouterr().out
    await run(bench, "read -q -P 0xab 512 4k")
    assert capsys.readouterr().out == "Pattern verification failed at offset 512, 4096 bytes\n"
    await run(bench, "read -q -P 0xab -s 1 -l 4k 512 5k")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "a.img").read_bytes()[512:515] == b"\x00\xab\xab"


async def test_requests_longer_than_a_piece_go_in_pieces(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_qemu_io, "_PIECE", 1000)
    source = bytes(range(256)) * 2
    backend = BlockBackend(bench.graph, lambda: "x", Perm.WRITE, Perm.ALL)
    backend.insert(bench.graph.find_node("f"))
    await _qemu_io._write_pattern(backend, 100, 5000, source, _qemu_io.WriteFlags.NONE)
    assert bytes(await backend.pread(100, 5000)) == (source * 10)[:5000]
    await backend.remove()


async def test_zeroes_discards_and_vectors(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("write -q 0 64k", "write -zq 0 32k", "write -zuq 32k 512", "writev -q -P 1 4k 512 1k", "flush"):
        assert await run(bench, line) == ""
    assert capsys.readouterr().out == ""
    await run(bench, "read -q -P 1 4k 1536")
    await run(bench, "read -q -P 0 6k 26k")
    await run(bench, "read -q -P 0xcd 33k 31k")
    assert capsys.readouterr().out == ""
    await run(bench, "discard 0 64k")
    assert capsys.readouterr().out.startswith("discard 65536/65536 bytes at offset 0\n")


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("length", "1 MiB\n"),
        ("alloc 0 1M", "1048576/1048576 bytes allocated at offset 0 bytes\n"),
        ("map", "1 MiB (0x100000) bytes     allocated at offset 0 bytes (0x0)\n"),
        ("read 0 2M", "read failed: Input/output error\n"),
        ("read x 5", "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- x\n"),
        ("read 0 8E", "Parsing error: argument too large -- 8E\n"),
        ("read 0 4G", "length cannot exceed 2147483136, given 4G\n"),
        ("read -P 256 0 512", "256 is not a valid pattern byte\n"),
        ("read -P 1 -s 512 -l 1 0 512", "pattern verification range exceeds end of read data\n"),
        ("write -u 0 512", "-u requires -z to be specified\n"),
        ("write -n 0 512", "-n requires -z to be specified\n"),
        ("write -z -P 1 0 512", "Only one of -z, -P, and -s can be specified at the same time\n"),
        ("sleep 0", ""),
        ("", ""),
    ],
)
async def test_answers_on_standard_output(
    bench: Bench, capsys: pytest.CaptureFixture[str], line: str, printed: str
) -> None:
    assert await run(bench, line) == ""
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("nosuch 1", 'command "nosuch" not found\n'),
        ("quit", 'command "quit" not found\n'),
        ("read", "bad argument count 0 to read, expected at least 2 arguments\n"),
        ("flush 1", "bad argument count 1 to flush, expected 0 arguments\n"),
        ("alloc 1 2 3", "bad argument count 3 to alloc, expected between 1 and 2 arguments\n"),
        ("read -z 0 5", "read: invalid option -- 'z'\n"),
    ],
)
async def test_answers_on_standard_error(
    bench: Bench, capsys: pytest.CaptureFixture[str], line: str, printed: str
) -> None:
    assert await run(bench, line) == ""
    assert capsys.readouterr().err == printed


async def test_dump(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    await run(bench, "write -q -P 0x41 4 2")
    capsys.readouterr()
    await run(bench, "read -v 0 17")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "00000000:  00 00 00 00 41 41 00 00 00 00 00 00 00 00 00 00  ....AA.........."
    assert lines[1] == "00000010:  00  ."


async def test_permissions_are_asked_for_and_given_back(bench: Bench) -> None:
    await bench.add("virtio-blk-pci", id="d", drive="f")
    assert await run(bench, "write 0 512") == (
        "Permission conflict on node 'f': permissions 'write' are both required by an unnamed block device "
        "(uses node 'f' as 'root' child) and unshared by block device '/machine/peripheral/d/virtio-backend' "
        "(uses node 'f' as 'root' child).\n"
    )
    ro = await bench.node(read_only=True)
    assert await run(bench, "write 0 512", ro) == "Block node is read-only\n"
    assert await run(bench, "read -q 0 512") == ""
    assert len(bench.graph.backends) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (32, "32 bytes"), (1536, "1.500 KiB"), (1 << 20, "1 MiB"), (6.141 * (1 << 20), "6.141 MiB")],
)
def test_sizes(value: float, text: str) -> None:
    assert _qemu_io.size_text(value) == text


def test_reports() -> None:
    assert _qemu_io.report("read", 7, 4096, 1, 0.5, machine=False) == (
        "read 4096/4096 bytes at offset 7\n4 KiB, 1 ops; 00.50 sec (8 KiB/sec and 2.0000 ops/sec)\n"
    )
    assert _qemu_io.report("read", 7, 4096, 1, 0.5, machine=True) == "4096,1,0:00:00.50,8192.000,2.000\n"
    assert "; 1:01:01.00 (" in _qemu_io.report("read", 7, 4096, 1, 3661, machine=False)
