"""Conversions of what is stored plainly, which go from file to file past the graph: the same bytes, sound images."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.aio import copying
from qmpd.block import filling
from qmpd.cli.img import _copy, _copy_plain
from qmpd.cli.main import img_main
from qmpd.units import KiB, MiB
from tests.conftest import FULL
from tests.support.peers import need

EXAMPLES = 600 if FULL else 60
CLUSTERS = ("512", "4k", "64k", "2M")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img", "qemu-io")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Say of each step of a copy whether the target took it from file to file."""
    seen: list[bool] = []
    real = filling.begin_filling

    async def noted(node: object, ranges: object) -> object:
        found = await real(node, ranges)  # type: ignore[arg-type]
        seen.append(found is not None)
        return found

    monkeypatch.setattr(_copy_plain, "begin_filling", noted)
    return seen


def peer(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr, done.stdout)
    return done.stdout


def write_raw(name: str, size: int, pieces: list[tuple[int, int, int]]) -> None:
    """Make a sparse file; a piece is (offset, length, byte), byte 0 being zeroes that are stored."""
    with open(name, "wb") as file:
        file.truncate(size)
        for offset, length, value in pieces:
            file.seek(offset)
            file.write(bytes([value]) * min(length, size - offset))


def same(one: str, other: str, *formats: str) -> None:
    first, second = formats or ("raw", "qcow2")
    peer("qemu-img", "compare", "-q", "-f", first, "-F", second, one, other)


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]]]:
    size = draw(st.integers(1, 12 * MiB // 512)) * 512
    at = st.integers(0, size // 512 - 1).map(lambda number: number * 512)
    length = st.sampled_from((512, 1536, 4 * KiB, 20 * KiB, 64 * KiB, 300 * KiB, 2 * MiB, 5 * MiB))
    return size, draw(st.lists(st.tuples(at, length, st.sampled_from((0, 1, 2, 3))), max_size=14))


@pytest.mark.proof("convert-plain", examples=EXAMPLES)
@given(
    disk=disks(),
    kind=st.sampled_from(("raw", *CLUSTERS)),
    target=st.sampled_from(("raw", *CLUSTERS)),
    sparse=st.sampled_from(("512", "4k", "64k", "96k", "1M")),
    step=st.sampled_from((64 * MiB, 2 * MiB, 64 * KiB)),
    pieces=st.sampled_from((2048, 3)),
    unordered=st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_disk_arrives_whole_and_qemu_finds_the_image_sound(
    disk: tuple[int, list[tuple[int, int, int]]],
    kind: str,
    target: str,
    sparse: str,
    step: int,
    pieces: int,
    unordered: bool,
) -> None:
    for name in ("raw", "source", "made"):
        Path(name).unlink(missing_ok=True)
    write_raw("raw", *disk)
    source, source_format = "raw", "raw"
    if kind != "raw":
        source, source_format = "source", "qcow2"
        peer("qemu-img", "convert", "-O", "qcow2", "-o", f"cluster_size={kind}", "-S", "512", "raw", "source")
    options = [] if target == "raw" else ["-o", f"cluster_size={target}"]
    target_format = "raw" if target == "raw" else "qcow2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_copy_plain, "AT_ONCE", step)
        patch.setattr(_copy_plain, "PIECES_AT_ONCE", pieces)
        words = ["convert", "-f", source_format, "-O", target_format, "-S", sparse, *options, source, "made"]
        assert img_main([*words, "-W"] if unordered else words) == 0
    same("raw", "made", "raw", target_format)
    if target != "raw":
        peer("qemu-img", "check", "-q", "-f", "qcow2", "made")


def data_of(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_plain_images_go_from_file_to_file(kind: str, target: str, fills: list[bool]) -> None:
    Path("raw").write_bytes(data_of(3 * MiB + 512, 1))
    peer("qemu-img", "convert", "-O", kind, "raw", "source")
    assert img_main(["convert", "-f", kind, "-O", target, "source", "made"]) == 0
    assert fills == [True]
    same("raw", "made", "raw", target)


def test_what_is_laid_out_is_in_the_order_of_the_disk_and_no_larger_than_needed() -> None:
    """Room is taken for every cluster that could be needed; what zeroes leave of it is filled by what follows."""
    need("qemu-img")
    with open("raw", "wb") as file:
        for number in range(24):
            file.write((data_of(MiB, number), bytes(MiB))[number % 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_copy_plain, "AT_ONCE", 4 * MiB)
        assert img_main(["convert", "-f", "raw", "-O", "qcow2", "raw", "made"]) == 0
    peer("qemu-img", "convert", "-O", "qcow2", "raw", "theirs")
    same("raw", "made")
    assert Path("made").stat().st_size <= Path("theirs").stat().st_size + 5 * 64 * KiB


def test_a_chain_a_compressed_part_and_sources_in_a_row(fills: list[bool]) -> None:
    """What is plain goes one way, what is compressed the other, into the same clusters."""
    Path("base").write_bytes(data_of(5 * MiB, 1))
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "over")
    for at in range(0, 5 * MiB, 640 * KiB):
        peer(
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            f"write -q -c -P 7 {at} 64k",
            "-c",
            f"write -q -P 8 {at + 128 * KiB} 100k",
            "over",
        )
    peer("qemu-img", "create", "-q", "-f", "raw", "first", str(300 * KiB + 512))
    peer("qemu-io", "-f", "raw", "-c", f"write -q -P 9 1000 {200 * KiB}", "first")
    peer("qemu-img", "convert", "-O", "raw", "over", "flat")
    Path("raw").write_bytes(Path("first").read_bytes() + Path("flat").read_bytes() + Path("first").read_bytes())
    peer("qemu-img", "convert", "-O", "qcow2", "first", "first.qcow2")
    peer("qemu-img", "convert", "-O", "qcow2", "over", "plain")
    for cluster in ("512", "64k", "2M"):
        Path("made").unlink(missing_ok=True)
        words = [
            "convert",
            "-O",
            "qcow2",
            "-o",
            f"cluster_size={cluster}",
            "first.qcow2",
            "over",
            "first.qcow2",
            "made",
        ]
        assert img_main(words) == 0
        same("raw", "made")
        peer("qemu-img", "check", "-q", "-f", "qcow2", "made")
    assert True in fills


@pytest.mark.parametrize(
    "source",
    [
        "driver=qcow2,file.driver=blkdebug,file.image.filename=source",
        "driver=throttle,throttle-group=t,file.driver=qcow2,file.file.filename=source",
    ],
    ids=["blkdebug", "throttle"],
)
def test_a_node_that_counts_or_watches_sees_every_request(source: str, fills: list[bool]) -> None:
    Path("raw").write_bytes(data_of(MiB, 1))
    peer("qemu-img", "convert", "-O", "qcow2", "raw", "source")
    group = ["--object", "throttle-group,id=t,x-bps-read=1000000000"]
    assert img_main(["convert", *group, "--image-opts", "-O", "raw", source, "made"]) == 0
    assert fills == []
    same("raw", "made", "raw", "raw")


def test_a_target_that_counts_or_keeps_something_is_written_through_the_graph(fills: list[bool]) -> None:
    Path("raw").write_bytes(data_of(MiB, 1))
    peer("qemu-img", "create", "-q", "-f", "qcow2", "made", "1M")
    opts = "driver=qcow2,file.driver=blkdebug,file.image.filename=made"
    words = ["convert", "-n", "--target-is-zero", "-f", "raw", "--target-image-opts", "raw", opts]
    assert img_main(words) == 0
    same("raw", "made")
    peer("qemu-img", "create", "-q", "-f", "qcow2", "marked", "1M")
    peer("qemu-img", "bitmap", "--add", "marked", "b")
    assert img_main(["convert", "-n", "--target-is-zero", "-f", "raw", "-O", "qcow2", "raw", "marked"]) == 0
    same("raw", "marked")
    said = peer("qemu-img", "info", "-f", "qcow2", "marked")
    assert "name: b" in said
    assert fills == [False, False]


def test_a_target_that_holds_something_already_is_written_where_it_is(fills: list[bool]) -> None:
    """Preallocated clusters have their places; only empty ones get new ones."""
    Path("raw").write_bytes(data_of(2 * MiB, 1))
    for preallocation in ("metadata", "full"):
        words = ["convert", "-f", "raw", "-O", "qcow2", "-o", f"preallocation={preallocation}", "raw", preallocation]
        assert img_main(words) == 0
        same("raw", preallocation)
        peer("qemu-img", "check", "-q", "-f", "qcow2", preallocation)
    assert fills == [False, False]


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_without_the_compiled_loop_the_outcome_is_the_same(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("raw", "wb") as file:
        file.truncate(9 * MiB)
        for at in range(0, 9 * MiB, MiB):
            file.seek(at)
            file.write(data_of(300 * KiB, at))
    assert img_main(["convert", "-f", "raw", "-O", target, "raw", "one"]) == 0
    monkeypatch.setattr(_copy, "available", lambda: False)
    assert img_main(["convert", "-f", "raw", "-O", target, "raw", "two"]) == 0
    same("one", "two", target, target)
    same("raw", "two", "raw", target)
    maps = [json.loads(peer("qemu-img", "map", "--output=json", "-f", target, name)) for name in ("one", "two")]
    if target == "qcow2":
        one, two = ([(part["start"], part["length"], part["data"]) for part in found] for found in maps)
        assert one == two
        assert Path("one").stat().st_size == Path("two").stat().st_size


def limited(size: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run qmpd-img with files that may have `size` bytes."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "from qmpd.cli.main import img_program\n"
        "img_program()\n"
    )
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def test_a_full_disk_fails_the_conversion_and_leaves_a_sound_image() -> None:
    Path("raw").write_bytes(data_of(20 * MiB, 1))
    done = limited(5 * MiB, "convert", "-f", "raw", "-O", "qcow2", "raw", "made")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "qmpd-img: error while converting: File too large\n"
    peer("qemu-img", "check", "-q", "-f", "qcow2", "made")


def test_an_interrupted_conversion_ends_and_leaves_a_sound_image() -> None:
    Path("raw").write_bytes(data_of(8 * MiB, 1))
    code = (
        "import os, signal, sys\n"
        "from qmpd.aio import copying\n"
        "work = copying._work\n"
        "async def interrupted(*given):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    await work(*given)\n"
        "copying._work = interrupted\n"
        "from qmpd.cli.main import img_program\n"
        "img_program()\n"
    )
    words = [sys.executable, "-c", code, "convert", "-f", "raw", "-O", "qcow2", "raw", "made"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    peer("qemu-img", "check", "-q", "-f", "qcow2", "made")


def test_a_file_made_this_way_is_allocated_and_as_sparse_as_its_source() -> None:
    write_raw("raw", 64 * MiB, [(0, 3 * MiB, 1), (32 * MiB, 2 * MiB, 0), (48 * MiB, MiB, 2)])
    assert img_main(["convert", "-f", "raw", "-O", "raw", "raw", "made"]) == 0
    same("raw", "made", "raw", "raw")
    os.sync()
    assert Path("made").stat().st_blocks * 512 <= 4 * MiB + 64 * KiB


async def test_two_fillings_of_one_image_are_linked_and_one_given_up_leaves_nothing(tmp_path: Path) -> None:
    """Room is taken for both before either is filled; neither sees the other's clusters."""
    from qmpd.aio.pool import BufferPool
    from qmpd.block.backend import BlockBackend
    from qmpd.block.perm import Perm
    from qmpd.cli.image import make_image, workshop

    data = data_of(4 * MiB, 1)
    Path("raw").write_bytes(data)
    async with workshop() as shop:
        await make_image(shop, "made", "qcow2", {}, size="8M")
        tree = {"driver": "qcow2", "file": {"driver": "file", "filename": "made"}}
        source = await shop.graph.blockdev_add({"driver": "file", "filename": "raw", "node-name": "raw"})
        node = await shop.graph.blockdev_add({**tree, "node-name": "made"})
        readers = []
        for one, perm in ((source, Perm.CONSISTENT_READ), (node, Perm.CONSISTENT_READ | Perm.WRITE)):
            backend = BlockBackend(shop.graph, lambda: "test", perm, Perm.ALL)
            backend.insert(one)
            readers.append(backend)
        found = filling.plain_source(source)
        assert found is not None
        disk, start = found
        one = await filling.begin_filling(node, [(0, MiB)])
        two = await filling.begin_filling(node, [(2 * MiB, 3 * MiB)])
        three = await filling.begin_filling(node, [(5 * MiB, 6 * MiB)])
        assert one is not None
        assert two is not None
        assert three is not None
        await three.give_up()
        parts = [[copying.Part(at, MiB, start + at, disk)] for at in (0, 2 * MiB)]
        pool = BufferPool()
        await asyncio.gather(
            two.fill(parts[1], grain=64 * KiB, in_order=True, pool=pool),
            one.fill(parts[0], grain=64 * KiB, in_order=True, pool=pool),
        )
        assert await filling.begin_filling(node, [(MiB - 512, MiB)]) is None, "what holds something is not filled"
        assert node.wr_highest_offset == 3 * MiB
        got = await readers[1].pread(0, 4 * MiB)
        for backend in readers:
            await backend.remove()
    assert bytes(got) == data[:MiB] + bytes(MiB) + data[2 * MiB : 3 * MiB] + bytes(MiB)
    peer("qemu-img", "check", "-q", "-f", "qcow2", "made")
