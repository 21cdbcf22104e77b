"""External data files of qcow2, held against QEMU in both directions: random work, the tools, damage, the graph."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block.batch import WriteFlags
from qmpd.cli.main import img_main
from qmpd.formats.qcow2 import OFFSET_MASK
from tests.conftest import FULL
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2, random_delay, save
from tests.gen.qcow2_model import Disk, Op, groups
from tests.peers.conftest import need
from tests.support.daemon import RawClient, running

EXAMPLES = 500 if FULL else 40


# --- random work ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """An image under test; sizes in bytes, `below` of the backing file or None."""

    cluster: int
    size: int
    raw: bool
    extended: bool
    lazy: bool
    below: int | None
    l2_cache: int | None
    no_unref: bool
    seed: int

    @property
    def options(self) -> str:
        words = [f"cluster_size={self.cluster}", f"extended_l2={'on' if self.extended else 'off'}"]
        words += [f"lazy_refcounts={'on' if self.lazy else 'off'}", f"data_file_raw={'on' if self.raw else 'off'}"]
        return ",".join(words)


@st.composite
def works(draw: st.DrawFn) -> tuple[Shape, list[list[Op]]]:
    extended = draw(st.integers(0, 3)) == 0
    cluster = 16384 if extended else draw(st.sampled_from((512, 4096, 65536)))
    raw = draw(st.booleans())
    size = draw(st.integers(1, 40 if cluster < 16384 else 10)) * cluster + draw(st.sampled_from((0, 512)))
    below = st.none() | st.integers(1, size + cluster).map(lambda value: -(-value // 512) * 512)
    shape = Shape(
        cluster=cluster,
        size=size,
        raw=raw,
        extended=extended,
        lazy=draw(st.booleans()),
        below=None if raw else draw(below),
        l2_cache=draw(st.sampled_from((None, 1))),
        no_unref=draw(st.integers(0, 4)) == 0,
        seed=draw(st.integers(0, 1 << 20)),
    )
    return shape, draw(groups(shape.size, shape.cluster, most=12))


def qemu_img(*arguments: str | Path, folder: Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 0, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def backing_of(shape: Shape, folder: Path) -> tuple[MemoryNode | None, bytes]:
    """Return the backing file, which is in `folder` as well, and what the disk shows at first."""
    if shape.below is None:
        return None, bytes(shape.size)
    text = Op("write", 0, shape.below, 99).data(0, shape.below)
    node = MemoryNode(text, "below")
    save(node, folder / "below.raw")
    return node, text[: shape.size].ljust(shape.size, b"\0")


async def work_on(shape: Shape, work: list[list[Op]], folder: Path) -> bytes:
    """Do the work on a new image, save its files, and return what the disk must hold."""
    backing, content = backing_of(shape, folder)
    data = MemoryNode(b"", "data")
    file = await make(
        data=data,
        data_file="data.raw",
        data_file_raw=shape.raw,
        size=shape.size,
        cluster_size=shape.cluster,
        extended_l2=shape.extended,
        lazy_refcounts=shape.lazy,
        backing_file=None if backing is None else "below.raw",
        backing_fmt=None if backing is None else "raw",
    )
    file.delay, data.delay = random_delay(shape.seed), random_delay(shape.seed + 1)
    node = await open_qcow2(
        file, backing=backing, data=data, l2_cache_size=shape.l2_cache, discard_no_unref=shape.no_unref or None
    )
    disk = Disk(edge(node), content)
    for group in work:
        # Which of two requests wins that overlap may differ between the tables and a file that is read without them.
        for part in [[one] for one in group] if shape.raw else [group]:
            await disk.run(part)
    await node.close()
    assert not node.image.dead
    save(file, folder / "image.qcow2")
    save(data, folder / "data.raw")
    return bytes(disk.model)


@settings(max_examples=EXAMPLES)
@given(works())
def test_work_at_once_leaves_a_clean_image_that_reads_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    """With a raw data file, so does that file by itself."""
    need("qemu-img")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = asyncio.run(work_on(shape, work, folder))
        (folder / "model.raw").write_bytes(model)
        qemu_img("check", "-q", "-f", "qcow2", "image.qcow2", folder=folder)
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", "image.qcow2", "model.raw", folder=folder)
        if shape.raw:
            assert (folder / "data.raw").read_bytes()[: shape.size] == model


@settings(max_examples=EXAMPLES // 2)
@given(works())
def test_images_that_qemu_wrote_read_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    need("qemu-img", "qemu-io")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_read_back(shape, [op for group in work for op in group], Path(name)))


async def _read_back(shape: Shape, work: list[Op], folder: Path) -> None:
    backing, content = backing_of(shape, folder)
    options = f"{shape.options},data_file=data.raw"
    options += "" if backing is None else ",backing_file=below.raw,backing_fmt=raw"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "image.qcow2", str(shape.size), folder=folder)
    model, commands = bytearray(content), ["-c", "flush"]
    for op in work:
        if op.kind == "write":
            # qemu-io can only write one byte over and over
            commands += ["-c", f"write -q -P {op.seed or 1} {op.offset} {op.length}"]
            model[op.offset : op.end] = bytes([op.seed or 1]) * op.length
        elif op.kind in ("zero", "unmap"):
            commands += ["-c", f"write -q -z {'-u ' if op.kind == 'unmap' else ''}{op.offset} {op.length}"]
            model[op.offset : op.end] = bytes(op.length)
    done = await asyncio.to_thread(
        subprocess.run, ["qemu-io", "-f", "qcow2", *commands, "image.qcow2"], cwd=folder, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    file, data = (MemoryNode((folder / name).read_bytes(), name) for name in ("image.qcow2", "data.raw"))
    node = await open_qcow2(file, backing=backing, data=data, l2_cache_size=shape.l2_cache)
    assert bytes(await edge(node).pread(0, shape.size)) == bytes(model)
    result = await node.check(fix_leaks=False, fix_errors=False)
    assert result.corruptions + result.leaks + result.check_errors == 0, result.messages
    assert all(one.host == one.offset for one in await node.block_status(0, shape.size) if one.host is not None)
    await node.close()


# --- the tools, side by side ------------------------------------------------------------------------


def call(tool: str, *words: str) -> tuple[int, str]:
    """Run qemu-img or, in this process, qmpd-img; return the status and all that it said, its own name left out."""
    if tool == "qemu-img":
        done = subprocess.run([tool, *words], capture_output=True, timeout=60)
        return done.returncode, (done.stdout + done.stderr).decode(errors="surrogateescape").replace("qemu-img: ", "")
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = img_main(list(words))
        except SystemExit as end:
            status = int(end.code or 0)
    return status, (out.getvalue() + err.getvalue()).replace("qmpd-img: ", "")


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    """Do the block in a folder: data files lie where the program runs."""
    folder.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def told(image: str) -> list[Any]:
    """Return what QEMU says of an image: what it is, where its content lies, how long the data file is."""
    info = json.loads(call("qemu-img", "info", "--output=json", "-f", "qcow2", image)[1])
    specific = info["format-specific"]["data"]
    status, text = call("qemu-img", "map", "--output=json", "-f", "qcow2", image)
    assert status == 0, text
    sizes = {one: os.path.getsize(one) for one in sorted(os.listdir(".")) if one.endswith(".raw")}
    checked = call("qemu-img", "check", "-q", "-f", "qcow2", image)
    return [info["virtual-size"], specific, json.loads(text), sizes, checked]


PLAIN, RAW = "data_file=d.raw", "data_file=d.raw,data_file_raw=on"
WRITES = ("write -q -P 5 0 200k", "write -q -z 64k 64k", "write -q -P 6 700k 70k")
CREATE = tuple(
    f"{base}{extra}"
    for base in (PLAIN, RAW)
    for extra in (
        "",
        ",preallocation=metadata",
        ",preallocation=falloc",
        ",preallocation=full",
        ",cluster_size=512",
        ",cluster_size=2M",
        ",cluster_size=4k,lazy_refcounts=on,refcount_bits=1",
        ",extended_l2=on,cluster_size=16k" if base == PLAIN else ",cluster_size=16k",
        ",compression_type=zstd",
    )
)


@pytest.mark.parametrize("options", CREATE)
@pytest.mark.parametrize("size", ["1M", "1049088", "0"])
def test_both_tools_make_the_same(options: str, size: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    seen = []
    for tool in ("qemu-img", "qmpd-img"):
        with within(tmp_path / tool):
            said = call(tool, "create", "-f", "qcow2", "-o", options, "image", size)
            assert said[0] == 0, said
            empty = told("image")
            if size != "0":
                for command in WRITES:
                    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, "image"], check=True)
                assert call("qmpd-img", "check", "-q", "image")[0] == 0
                mine, theirs = (call(one, "map", "--output=json", "image") for one in ("qmpd-img", "qemu-img"))
                assert mine == theirs
                mine, theirs = (call(one, "map", "image") for one in ("qmpd-img", "qemu-img"))
                assert mine == theirs
            seen.append((said, empty, told("image")))
    assert seen[0] == seen[1]


SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "version 2": ("", (f"create -q -f qcow2 -o {PLAIN},compat=0.10 image 1M",)),
    "raw without a file": ("", ("create -q -f qcow2 -o data_file_raw=on image 1M",)),
    "raw over a backing file": ("", (f"create -q -f qcow2 -o {RAW} -b ../base.raw -F raw image 1M",)),
    "no name": ("", ("create -q -f qcow2 -o data_file= image 1M",)),
    "no folder": ("", ("create -q -f qcow2 -o data_file=/nonexistent/x image 1M",)),
    "no protocol": ("", ("create -q -f qcow2 -o data_file=json:{} image 1M",)),
    "over a backing file": (f"{PLAIN},backing_file=../base.raw,backing_fmt=raw", ("map --output=json image",)),
    "commit": (f"{PLAIN},backing_file=base.raw,backing_fmt=raw", ("commit -q image", "map --output=json image")),
    "grow": (PLAIN, ("resize -q image 2M", "map --output=json image")),
    "grow raw": (RAW, ("resize -q image 2M", "map --output=json image")),
    "grow metadata": (PLAIN, ("resize -q --preallocation=metadata image 2049k", "map --output=json image")),
    "grow falloc": (PLAIN, ("resize -q --preallocation=falloc image 2M", "map --output=json image")),
    "grow full": (RAW, ("resize -q --preallocation=full image 2M", "map --output=json image")),
    "shrink": (PLAIN, ("resize -q --shrink image 100k", "resize -q image 1M", "map --output=json image")),
    "shrink raw": (RAW, ("resize -q --shrink image 700k", "resize -q image 1025k", "map --output=json image")),
    "snapshots": (PLAIN, ("snapshot -c s image", "snapshot -a s image", "snapshot -d s image", "snapshot -l image")),
    "amend raw on": (PLAIN, ("amend -q -o data_file_raw=on image",)),
    "amend raw off": (RAW, ("amend -q -o data_file_raw=off image", "amend -q -o data_file_raw=on image")),
    "amend version": (PLAIN, ("amend -q -o compat=0.10 image",)),
    "amend refcounts": (PLAIN, ("amend -q -o refcount_bits=64,lazy_refcounts=on image",)),
    "amend name": (PLAIN, ("amend -q -o data_file=other.raw image", "check image", "map image")),
    "amend no name": (PLAIN, ("amend -q -o data_file= image", "check image")),
    "amend none": ("lazy_refcounts=off", ("amend -q -o data_file=d.raw image", "amend -q -o data_file_raw=on image")),
    "rebase": (PLAIN, ("rebase -u -b base.raw -F raw image", "info --output=json image")),
    "rebase raw": (RAW, ("rebase -u -b base.raw -F raw image",)),
    "measure": (RAW, (f"measure -O qcow2 -o {PLAIN} image", f"measure -O qcow2 -o {RAW} --size 1G", "measure image")),
    "bitmaps": (PLAIN, ("bitmap --add image b", "info --output=json image", "check image", "bitmap --remove image b")),
    "convert": (PLAIN, (f"convert -O qcow2 -o {PLAIN.replace('d.raw', 'e.raw')} image out", "compare image out")),
    "convert raw": (RAW, (f"convert -O qcow2 -o {RAW.replace('d.raw', 'e.raw')} image out", "compare image out")),
    "out": (PLAIN, ("convert -O raw image flat", "compare -f qcow2 -F raw image flat", "compare -f raw d.raw flat")),
    "given": (PLAIN, ("check --image-opts driver=qcow2,file.filename=image,data-file.filename=missing",)),
    "given but not read": (
        PLAIN,
        ("info --image-opts --output=json driver=qcow2,file.filename=image,data-file.filename=missing",),
    ),
    "given for nothing": (
        "lazy_refcounts=off",
        ("check --image-opts driver=qcow2,file.filename=image,data-file.filename=base.raw",),
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_tools_do_and_say_the_same(name: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    options, script = SCRIPTS[name]
    base = tmp_path / "base.raw"
    base.write_bytes(b"\7" * (1 << 20))
    seen = []
    for tool in ("qemu-img", "qmpd-img"):
        with within(tmp_path / tool):
            Path("base.raw").write_bytes(base.read_bytes())
            if options:
                assert call("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "image", "1M")[0] == 0
                for command in WRITES:
                    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, "image"], check=True)
            said = [_comparable(*call(tool, *line.split(" "))) for line in script]
            whole = options and not name.startswith("amend n")
            seen.append((said, told("image") if whole else None, Path("base.raw").read_bytes()))
    assert seen[0] == seen[1]


def _comparable(status: int, text: str) -> tuple[int, Any]:
    """Return what is to be equal: of JSON the values, without the space that files take."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        for one in value if isinstance(value, list) else [value, *(child["info"] for child in value["children"])]:
            for member in ("actual-size", "children"):
                one.pop(member, None)
        return status, value
    lines = [
        line for line in text.splitlines() if not re.search(r"hint|You can use|qe?mpd?u?-img rebase|only supp", line)
    ]
    return status, lines


def test_compressed_clusters_are_refused(tmp_path: Path) -> None:
    need("qemu-img")
    with within(tmp_path):
        Path("flat").write_bytes(b"\3" * (1 << 20))
        for tool in ("qemu-img", "qmpd-img"):
            assert call(tool, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", PLAIN, "flat", "out")[0] == 1


def test_an_existing_image_becomes_the_raw_data_file(tmp_path: Path) -> None:
    """blockdev-create takes over what is in the node, and never shows it without data-file-raw."""
    need("qemu-img")
    text = Op("write", 0, 1 << 20, 4).data(0, 1 << 20)
    data = MemoryNode(text, "data")
    for raw, extended in ((True, False), (True, True), (False, False)):
        file = asyncio.run(
            make(
                data=data,
                size=len(text),
                data_file="data.raw",
                data_file_raw=raw,
                extended_l2=extended,
                preallocation="metadata",
            )
        )
        save(file, tmp_path / "image")
        save(data, tmp_path / "data.raw")
        (tmp_path / "model").write_bytes(text if raw else bytes(len(text)))
        qemu_img("check", "-q", "image", folder=tmp_path)
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", "image", "model", folder=tmp_path)


@pytest.mark.parametrize("raw", ["off", "on"])
@pytest.mark.parametrize("maker", ["qemu-img", "qmpd-img"])
def test_encrypted_data_lies_in_the_data_file(maker: str, raw: str, tmp_path: Path) -> None:
    need("qemu-img")
    other = {"qemu-img": "qmpd-img", "qmpd-img": "qemu-img"}[maker]
    secret = ("--object", "secret,id=s,data=abc123")
    options = f"data_file=d.raw,data_file_raw={raw},encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    image = "driver=qcow2,file.filename=image,encrypt.key-secret=s"
    text = Op("write", 0, 1 << 20, 4).data(0, 1 << 20)
    with within(tmp_path):
        Path("flat").write_bytes(text)
        steps = (
            (maker, "create", "-q", *secret, "-f", "qcow2", "-o", options, "image", "1M"),
            (
                maker,
                "convert",
                *secret,
                "-n",
                "--image-opts",
                "--target-image-opts",
                "driver=file,filename=flat",
                image,
            ),
            (other, "check", "-q", *secret, "--image-opts", image),
            (other, "convert", *secret, "--image-opts", "-O", "raw", image, "out"),
        )
        for step in steps:
            assert call(*step) == (0, "")
        assert Path("out").read_bytes() == text
        stored = Path("d.raw").read_bytes()
        assert len(stored) == len(text)
        assert not any(text[at : at + 32] in stored for at in range(0, len(text), 4096))


def test_a_data_file_may_be_too_short(tmp_path: Path) -> None:
    """What is not there reads as zeroes, and comes with the first write behind the end."""
    need("qemu-img", "qemu-io")
    seen = []
    for tool in ("qemu-img", "qmpd-img"):
        with within(tmp_path / tool):
            assert call("qemu-img", "create", "-q", "-f", "qcow2", "-o", PLAIN, "image", "1M")[0] == 0
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 1M", "image"], check=True)
            os.truncate("d.raw", 100_000)
            assert call(tool, "convert", "-O", "raw", "image", "short")[0] == 0
            Path("tail").write_bytes(b"\6" * (1 << 20))
            assert call(tool, "convert", "-n", "-f", "raw", "-O", "qcow2", "tail", "image") == (0, "")
            seen.append((Path("short").read_bytes(), Path("d.raw").read_bytes(), told("image")))
    assert seen[0] == seen[1]
    assert seen[0][0] == (b"\5" * 100_000).ljust(1 << 20, b"\0")


def test_an_image_is_not_written_as_its_own_data_file(tmp_path: Path) -> None:
    need("qemu-img")
    with within(tmp_path):
        assert call("qemu-img", "create", "-q", "-f", "qcow2", "-o", PLAIN, "image", "1M")[0] == 0
        assert call("qmpd-img", "amend", "-q", "-o", "data_file=image", "image") == (0, "")
        before = Path("image").read_bytes()
        mine, theirs = (call(tool, "resize", "image", "2M") for tool in ("qmpd-img", "qemu-img"))
        assert mine == theirs
        assert mine[0] == 1
        assert Path("image").read_bytes() == before


def test_blockdev_create_names_the_file_of_the_node(tmp_path: Path) -> None:
    need("qemu-img")
    text = Op("write", 0, 1 << 20, 4).data(0, 1 << 20)
    (tmp_path / "d.raw").write_bytes(text)
    (tmp_path / "image").touch()
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        for name in ("image", "d.raw"):
            client.ok("blockdev-add", driver="file", filename=str(tmp_path / name), node_name=name)
        options = {"driver": "qcow2", "file": "image", "data-file": "d.raw", "data-file-raw": True, "size": len(text)}
        client.ok("blockdev-create", job_id="j", options=options)
        while client.ok("query-jobs")[0]["status"] != "concluded":
            client.wait_event("JOB_STATUS_CHANGE")
        assert "error" not in client.ok("query-jobs")[0]
    info = json.loads(call("qemu-img", "info", "--output=json", str(tmp_path / "image"))[1])
    assert info["format-specific"]["data"]["data-file"] == str(tmp_path / "d.raw")
    qemu_img("check", "-q", "image", folder=tmp_path)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", "image", "d.raw", folder=tmp_path)
    assert (tmp_path / "d.raw").read_bytes() == text


# --- damage -----------------------------------------------------------------------------------------

DAMAGE = {
    "not copied": (1, 0x10000),
    "elsewhere": (1, 1 << 63 | 0x50000),
    "at the start": (2, 1 << 63),
    "first elsewhere": (0, 1 << 63 | 0x20000),
    "first forgotten": (0, 0),
    "compressed": (1, 1 << 62 | 0x10000),
    "compressed and copied": (1, 3 << 62 | 0x10000),
    "zero": (1, 1 << 63 | 0x10001),
    "first zero": (0, 1 << 63 | 1),
    "reserved": (1, 1 << 63 | 0x10000 | 1 << 58),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_told_and_mended_as_qemu_does(kind: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    index, entry = DAMAGE[kind]
    with within(tmp_path):
        assert call("qemu-img", "create", "-q", "-f", "qcow2", "-o", PLAIN, "image", "1M")[0] == 0
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 256k", "image"], check=True)
        image = bytearray(Path("image").read_bytes())
        (l1,) = struct.unpack_from(">Q", image, 40)
        (l2,) = struct.unpack_from(">Q", image, l1)
        struct.pack_into(">Q", image, (l2 & OFFSET_MASK) + 8 * index, entry)
        seen = []
        for tool in ("qemu-img", "qmpd-img"):
            Path("image").write_bytes(image)
            found = call(tool, "check", "image")
            mended = call(tool, "check", "-r", "all", "image")
            left = Path("image").read_bytes()
            Path("image").write_bytes(image)
            Path("flat").unlink(missing_ok=True)
            read = call(tool, "convert", "-m", "1", "-O", "raw", "image", "flat")
            seen.append((found, mended, left, read[0], Path("flat").read_bytes() if not read[0] else b""))
            if read[0]:
                assert "Input/output error" in read[1]
        assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", ["elsewhere", "at the start", "first elsewhere"])
@pytest.mark.parametrize("work", ["read", "write", "zero", "discard"])
def test_a_misplaced_cluster_is_never_used(kind: str, work: str) -> None:
    """What belongs to another cluster is neither shown nor changed, and the image is marked."""
    index, entry = DAMAGE[kind]
    asyncio.run(_misplaced(index, entry, work))


async def _misplaced(index: int, entry: int, work: str) -> None:
    data = MemoryNode(b"", "data")
    file = await make(data=data, data_file="d.raw", size=1 << 20, preallocation="metadata")
    data.content[:] = text = Op("write", 0, 1 << 20, 4).data(0, 1 << 20)
    (l1,) = struct.unpack_from(">Q", file.content, 40)
    (l2,) = struct.unpack_from(">Q", file.content, l1)
    struct.pack_into(">Q", file.content, (l2 & OFFSET_MASK) + 8 * index, entry)
    node = await open_qcow2(file, data=data)
    disk, at = edge(node), index << 16
    works: dict[str, Callable[[], Awaitable[Any]]] = {
        "read": lambda: disk.pread(at, 512),
        "write": lambda: disk.pwrite(at, bytes(512)),
        "zero": lambda: disk.pwrite_zeroes(at, 65536, WriteFlags.MAY_UNMAP),
        "discard": lambda: disk.pdiscard(at, 65536),
    }
    with pytest.raises(OSError, match=r"does not match guest cluster offset|Errno 5"):
        await works[work]()
    assert data.content == text
    assert node.image_info()["format-specific"]["data"]["corrupt"]


# --- names that an image may hold -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b'json:{"driver":"file","filename":"secret"}',
        b"nbd://127.0.0.1:1/x",
        b"file:secret",
        b"fifo",
        b"image",
        b"",
        b"\xff\xfe",
        b"a" * 5000,
        b"../missing",
        b"secret\0.raw",
    ],
    ids=lambda name: repr(name[:20]),
)
def test_names_are_those_of_files_and_info_opens_none(name: bytes, tmp_path: Path) -> None:
    """Both tools describe the image alike, and open alike what is a file of that name."""
    need("qemu-img")
    with within(tmp_path):
        Path("secret").write_bytes(b"s" * (1 << 20))
        os.mkfifo("fifo")
        file = asyncio.run(make(data=MemoryNode(b"", "data"), data_file="x", size=1 << 20))
        image = bytearray(file.content)
        at = 112
        while struct.unpack_from(">I", image, at)[0] != 0x44415441:
            at += 8 + -(-struct.unpack_from(">I", image, at + 4)[0] // 8) * 8
        image[at:60000] = bytes(60000 - at)
        struct.pack_into(">II", image, at, 0x44415441, len(name))
        image[at + 8 : at + 8 + len(name)] = name
        Path("image").write_bytes(image)
        mine, theirs = (call(tool, "info", "--output=json", "image") for tool in ("qmpd-img", "qemu-img"))
        assert _comparable(*mine) == _comparable(*theirs)
        if name == b"fifo":  # QEMU waits for somebody to write into it
            status, text = call("qmpd-img", "check", "image")
            assert status == 1, text
            return
        mine, theirs = (call(tool, "check", "image") for tool in ("qmpd-img", "qemu-img"))
        assert mine[0] == theirs[0]
        if len(name) < 1000:
            assert mine[1] == theirs[1]
        else:
            assert len(mine[1]) < 6000


# --- the graph --------------------------------------------------------------------------------------


def _graph(client: RawClient) -> set[tuple[Any, ...]]:
    """Return the edges by the names of their ends, generated ones left out."""
    graph = client.ok("x-debug-query-block-graph")
    names = {one["id"]: re.sub(r"#block\d+", "#block", one["name"]) or one["type"] for one in graph["nodes"]}
    return {
        (names[one["parent"]], names[one["child"]], one["name"], *one["perm"], "|", *one["shared-perm"])
        for one in graph["edges"]
    }


def _steps(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    def file(name: str) -> dict[str, str]:
        return {"driver": "file", "filename": str(folder / name)}

    def add(image: str, **options: Any) -> tuple[str, dict[str, Any]]:
        options = {key.replace("_", "-"): value for key, value in options.items()}
        return "blockdev-add", {"driver": "qcow2", "node-name": "b", "file": file(image), **options}

    def export(node: str, *, writable: bool) -> tuple[str, dict[str, Any]]:
        return "block-export-add", {"type": "nbd", "id": f"e-{node}", "node-name": node, "writable": writable}

    delete = ("blockdev-del", {"node-name": "b"})
    return [
        ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(folder / "socket")}}}),
        ("blockdev-add", {**file("other.raw"), "node-name": "ro", "read-only": True}),
        ("blockdev-add", {"driver": "raw", "node-name": "rw", "file": file("more.raw")}),
        add("named", data_file="nope"),
        add("named", data_file=file("nope")),
        add("plain", data_file=file("other.raw")),
        add("plain", data_file="nope"),
        add("badraw"),
        add("unnamed"),
        add("unnamed", data_file="ro"),
        export("b", writable=True),
        export("b", writable=False),
        ("block-export-del", {"id": "e-b"}),
        delete,
        add("unnamed", data_file="rw"),
        export("rw", writable=True),
        export("b", writable=True),
        delete,
        ("blockdev-del", {"node-name": "rw"}),
        ("block-export-del", {"id": "e-b"}),
        delete,
        add("named"),
        export("b", writable=True),
        ("block_resize", {"node-name": "b", "size": 2 << 20}),
        ("blockdev-snapshot-internal-sync", {"device": "b", "name": "s"}),
    ]


def _replies(client: RawClient, folder: Path) -> list[Any]:
    found: list[Any] = []
    for name, arguments in _steps(folder):
        reply = client.send({"execute": name, "arguments": arguments})
        if name == "block-export-del" and "return" in reply:
            client.wait_event("BLOCK_EXPORT_DELETED")
        found.append((name, arguments, reply.get("error", reply.get("return")), sorted(_graph(client), key=str)))
    return found


def _images(folder: Path) -> None:
    folder.mkdir()
    for name in ("other.raw", "more.raw"):
        (folder / name).write_bytes(bytes(1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={folder}/d.raw", "named", "1M", folder=folder)
    qemu_img("create", "-q", "-f", "qcow2", "plain", "1M", folder=folder)
    image = bytearray((folder / "plain").read_bytes())
    struct.pack_into(">Q", image, 88, 2)
    (folder / "badraw").write_bytes(image)
    image = bytearray((folder / "named").read_bytes())
    at = image.index(b"DATA\0\0\0")
    struct.pack_into(">I", image, at, 0x12345678)
    (folder / "unnamed").write_bytes(image)


def test_the_daemons_reply_and_attach_alike(tmp_path: Path) -> None:
    """Errors word for word; edges with what they take and share."""
    need("qemu-storage-daemon", "qemu-img")
    found = []
    folder = tmp_path / "x"
    for kind in ("qemu", "qmpd"):
        _images(folder)
        with _daemon(kind, tmp_path) as client:
            found.append(_replies(client, folder))
        folder.rename(tmp_path / kind)
    for theirs, mine in zip(*found, strict=True):
        assert mine == theirs


@contextlib.contextmanager
def _daemon(kind: str, folder: Path) -> Iterator[RawClient]:
    if kind == "qmpd":
        with running(folder, name="qmpd-storage-daemon") as daemon:
            yield daemon.client()
        return
    path = folder / "qemu.socket"
    words = ["--chardev", f"socket,id=q,path={path},server=on,wait=off", "--monitor", "chardev=q"]
    process = subprocess.Popen(["qemu-storage-daemon", *words])
    try:
        for _ in range(200):
            if path.exists():
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        client = RawClient(path)
        yield client
        client.close()
    finally:
        process.terminate()
        process.wait()
