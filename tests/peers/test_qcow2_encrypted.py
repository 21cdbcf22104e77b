"""Encryption inside qcow2, held against QEMU in both directions: images, refusals, sizes, key slots."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.cli.main import img_main
from tests.conftest import FULL
from tests.gen.qcow2 import MemoryNode, edge, make, open_qcow2, random_delay, save
from tests.gen.qcow2_model import Disk, Op, groups
from tests.peers.conftest import need
from tests.support.daemon import RawClient, running

EXAMPLES = 300 if FULL else 30
SECRETS = ("--object", "secret,id=s,data=abc123", "--object", "secret,id=n,data=new", "--object", "secret,id=w,data=no")
LUKS = {"format": "luks", "cipher-alg": "aes-128", "iterations": 1000}
QUICK = "encrypt.format=luks,encrypt.iter-time=10"
OPTIONS = (
    QUICK,
    f"{QUICK},encrypt.cipher-alg=aes-128,cluster_size=4k,refcount_bits=1",
    f"{QUICK},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.hash-alg=sha512,cluster_size=512,compat=0.10",
    f"{QUICK},encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain,cluster_size=2M",
    f"{QUICK},preallocation=metadata,lazy_refcounts=on",
    f"{QUICK},encrypt.cipher-alg=aes-128,preallocation=full,cluster_size=1M",
    "encrypt.format=aes",
    "encrypt.format=aes,compat=0.10,cluster_size=4k",
)
SIZE = 3 << 20


def call(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program; ours in this process, as starting it takes longer than what it does."""
    words = [str(argument) for argument in arguments]
    if tool != "qmpd-img":
        return subprocess.run([tool, *words], capture_output=True, text=True, timeout=60)
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = img_main(words)
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def run(tool: str, *arguments: str | Path) -> str:
    done = call(tool, *arguments)
    assert done.returncode == 0, f"{tool} {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def opts(image: Path, secret: str = "s") -> str:
    return f"driver=qcow2,file.filename={image},encrypt.key-secret={secret}"


def raw(path: Path) -> Path:
    """Write what images are filled with: data, a hole, data that ends within a cluster."""
    text, unit = Op("write", 0, SIZE, 3).data(0, SIZE), SIZE // 6
    path.write_bytes(text[:unit] + bytes(2 * unit) + text[: unit + 512] + bytes(2 * unit - 512))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], bytes]:
    """Return a maker of images (program, options) that makes each once: QEMU takes its time to find out its speed."""
    folder = tmp_path_factory.mktemp("made")

    @functools.cache
    def make_once(maker: str, options: str) -> bytes:
        image = folder / "image.qcow2"
        image.unlink(missing_ok=True)
        if maker == "qmpd-img":
            options = options.replace("encrypt.iter-time=10", "encrypt.iterations=1000")
        run(maker, "create", "-q", *SECRETS, "-f", "qcow2", "-o", f"{options},encrypt.key-secret=s", image, str(SIZE))
        return image.read_bytes()

    return make_once


@pytest.mark.parametrize(
    ("maker", "writer", "options"),
    [
        *(("qmpd-img", "qemu-img", options) for options in OPTIONS),
        *(("qemu-img", "qmpd-img", options) for options in (*OPTIONS[:3], *OPTIONS[6:])),
    ],
)
def test_images_of_either_program_read_the_same_in_both(
    tmp_path: Path, made: Callable[[str, str], bytes], maker: str, writer: str, options: str
) -> None:
    need("qemu-img")
    image, source = tmp_path / "i.qcow2", raw(tmp_path / "source.raw")
    image.write_bytes(made(maker, options))
    run(writer, "convert", *SECRETS, "-n", "--image-opts", "--target-image-opts", f"driver=raw,file.filename={source}",
        opts(image))  # fmt: skip
    for reader in ("qemu-img", "qmpd-img"):
        run(reader, "check", *SECRETS, "--image-opts", opts(image))
        run(reader, "compare", *SECRETS, "--image-opts", f"driver=raw,file.filename={source}", opts(image))
    assert json.loads(run("qemu-img", "info", "--output=json", image)) == json.loads(
        run("qmpd-img", "info", "--output=json", image)
    )
    text = (source.read_bytes())[:64]
    assert text not in image.read_bytes()


@pytest.mark.parametrize("options", [OPTIONS[1], *(one for one in OPTIONS if "preallocation" in one)])
def test_convert_makes_what_qemu_reads(tmp_path: Path, options: str) -> None:
    """Also over preallocated clusters, where zeroes in the file are no zeroes once they are decrypted."""
    need("qemu-img")
    image, source = tmp_path / "i.qcow2", raw(tmp_path / "source.raw")
    options = options.replace("encrypt.iter-time=10", "encrypt.iterations=1000") + ",encrypt.key-secret=s"
    run("qmpd-img", "convert", *SECRETS, "-f", "raw", "-O", "qcow2", "-o", options, source, image)
    run("qemu-img", "check", *SECRETS, "--image-opts", opts(image))
    run("qemu-img", "compare", *SECRETS, "--image-opts", f"driver=raw,file.filename={source}", opts(image))


@dataclass(frozen=True)
class Shape:
    """An image under test; sizes in bytes, `below` of the backing file or None."""

    encrypt: dict[str, Any]
    cluster: int
    version: int
    lazy: bool
    size: int
    below: int | None
    seed: int

    def opening(self) -> dict[str, Any]:
        return {"encrypt": {"format": "aes" if self.encrypt["format"] == "qcow" else "luks", "key-secret": "s"}}


@st.composite
def works(draw: st.DrawFn) -> tuple[Shape, list[list[Op]]]:
    cluster = draw(st.sampled_from((512, 1024, 4096, 65536)))
    version = draw(st.sampled_from((2, 3, 3)))
    size = draw(st.integers(1, 40 if cluster < 65536 else 12)) * cluster + draw(st.sampled_from((0, 512)))
    shape = Shape(
        encrypt=draw(st.sampled_from((LUKS, LUKS, {**LUKS, "cipher-mode": "cbc"}, {"format": "qcow"}))),
        cluster=cluster,
        version=version,
        lazy=version == 3 and draw(st.booleans()),
        size=size,
        below=draw(st.none() | st.integers(1, size + cluster).map(lambda value: -(-value // 512) * 512)),
        seed=draw(st.integers(0, 1 << 20)),
    )
    return shape, draw(groups(shape.size, shape.cluster))


def below(shape: Shape, folder: Path) -> tuple[MemoryNode | None, bytes]:
    """Return the backing file, saved for QEMU as well, and what the disk shows at first."""
    if shape.below is None:
        return None, bytes(shape.size)
    text = Op("write", 0, shape.below, 99).data(0, shape.below)
    node = MemoryNode(text, "below")
    save(node, folder / "below.raw")
    node.delay = random_delay(shape.seed + 1)
    return node, text[: shape.size].ljust(shape.size, b"\0")


async def work_on(shape: Shape, work: list[list[Op]], folder: Path) -> tuple[MemoryNode, bytes]:
    """Do the work on a new image and return its file and what the disk must hold."""
    backing, content = below(shape, folder)
    file = await make(
        size=shape.size,
        cluster_size=shape.cluster,
        version=shape.version,
        lazy_refcounts=shape.lazy,
        backing_file=None if backing is None else "below.raw",
        backing_fmt=None if backing is None else "raw",
        encrypt=shape.encrypt,
    )
    file.delay = random_delay(shape.seed)
    node = await open_qcow2(file, backing=backing, **shape.opening())
    disk = Disk(edge(node), content)
    for group in work:
        await disk.run(group)
    await node.close()
    assert not node.image.dead
    return file, bytes(disk.model)


@pytest.mark.proof("qcow2-encrypted", examples=EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(works())
def test_work_at_once_leaves_a_clean_image_that_reads_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    need("qemu-img")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, model = asyncio.run(work_on(shape, work, folder))
        image = save(file, folder / "image.qcow2")
        run("qemu-img", "check", "-q", *SECRETS, "--image-opts", opts(image))
        expected = folder / "model.raw"
        expected.write_bytes(model)
        run("qemu-img", "compare", "-q", *SECRETS, "--image-opts", f"driver=raw,file.filename={expected}", opts(image))


@pytest.mark.proof("qcow2-encrypted-theirs", examples=EXAMPLES // 2)
@settings(max_examples=EXAMPLES // 2)
@given(works())
def test_images_that_qemu_wrote_read_as_the_model(job: tuple[Shape, list[list[Op]]]) -> None:
    need("qemu-img", "qemu-io")
    shape, work = job
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_read_back(shape, work, Path(name)))


async def _read_back(shape: Shape, work: list[list[Op]], folder: Path) -> None:
    backing, content = below(shape, folder)
    model = bytearray(content)
    file = await make(
        size=shape.size, cluster_size=shape.cluster, version=shape.version, encrypt=shape.encrypt,
        backing_file=None if backing is None else "below.raw", backing_fmt=None if backing is None else "raw",
    )  # fmt: skip
    image = save(file, folder / "image.qcow2")
    commands: list[str] = []
    for op in (op for group in work for op in group):
        if op.kind in ("write", "zero", "unmap"):
            value = op.seed if op.kind == "write" else 0
            start, end = op.offset // 512 * 512, min(-(-op.end // 512) * 512, shape.size)
            commands += ["-c", f"write -q {f'-P {value}' if op.kind == 'write' else '-z'} {start} {end - start}"]
            model[start:end] = bytes([value]) * (end - start)
    await asyncio.to_thread(run, "qemu-io", *SECRETS, "--image-opts", *commands, opts(image))
    again = MemoryNode(await asyncio.to_thread(image.read_bytes))
    again.delay = random_delay(shape.seed)
    node = await open_qcow2(again, backing=backing, read_only=True, **shape.opening())
    disk = Disk(edge(node), bytes(model))
    reads = [op for group in work for op in group if op.kind == "read"]
    await disk.run([Op("read", 0, shape.size), *reads])
    await node.close()


# --- refusals: the same words ---------------------------------------------------------------------


def said(done: subprocess.CompletedProcess[str]) -> tuple[int, list[str]]:
    """Return the status and what was complained about, without the name of the program."""
    lines = done.stderr.replace("qmpd-img", "qemu-img").splitlines()
    return done.returncode, [line.partition("qemu-img: ")[2] or line for line in lines]


CREATIONS = (
    "encrypt.format=luks", "encrypt.format=aes", "encryption=on", "encryption=on,encrypt.key-secret=s",
    "encryption=on,encrypt.format=luks,encrypt.key-secret=s", "encrypt.key-secret=s", "encrypt.cipher-alg=aes-128",
    "encrypt.format=foo,encrypt.key-secret=s", "encrypt.format=aes,encrypt.key-secret=s,encrypt.cipher-alg=aes-128",
    "encrypt.format=luks,encrypt.key-secret=q", "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=foo",
    "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=x", "encrypt.format=qcow,encrypt.key-secret=s",
)  # fmt: skip


@pytest.mark.parametrize("options", CREATIONS)
def test_creation_answers_as_qemu_img(tmp_path: Path, options: str) -> None:
    need("qemu-img")
    words = ("create", "-q", *SECRETS, "-f", "qcow2", "-o", options, tmp_path / "i.qcow2", "1M")
    assert said(call("qmpd-img", *words)) == said(call("qemu-img", *words))


@pytest.mark.parametrize(
    "options",
    [
        f"{QUICK},encrypt.key-secret=s", f"{QUICK},encrypt.key-secret=s,cluster_size=4k,encrypt.cipher-alg=aes-128",
        f"{QUICK},encrypt.key-secret=q", QUICK, "encrypt.format=aes,encrypt.key-secret=s", "encrypt.format=aes",
    ],
)  # fmt: skip
def test_measure_answers_as_qemu_img(options: str) -> None:
    need("qemu-img")
    words = ("measure", *SECRETS, "-O", "qcow2", "-o", options, "--size", "4M")
    ours, theirs = call("qmpd-img", *words), call("qemu-img", *words)
    assert (said(ours), ours.stdout) == (said(theirs), theirs.stdout)


def test_opening_answers_as_qemu_img(tmp_path: Path) -> None:
    need("qemu-img")
    images = {"luks": tmp_path / "l.qcow2", "aes": tmp_path / "a.qcow2", "none": tmp_path / "n.qcow2"}
    for method, image in images.items():
        iterations = ",encrypt.iterations=1000" if method == "luks" else ""
        options = "" if method == "none" else f"encrypt.format={method},encrypt.key-secret=s{iterations},"
        run("qmpd-img", "create", "-q", *SECRETS, "-f", "qcow2", "-o", f"{options}size=1M", image)
    methods = [f",encrypt.format={method},encrypt.key-secret=s" for method in ("aes", "luks")]
    for image in images.values():
        asked: list[tuple[str | Path, ...]] = [
            ("check", "-q", *SECRETS, "--image-opts", f"driver=qcow2,file.filename={image}{extra}")
            for extra in ("", ",encrypt.key-secret=w", ",encrypt.key-secret=q", ",encrypt.format=luks", *methods)
        ]
        asked += [("map", image), ("map", "--output=json", image), ("convert", image, tmp_path / "out")]
        asked.append(("map", *SECRETS, "--image-opts", opts(image)))
        for words in asked:
            assert said(call("qmpd-img", *words)) == said(call("qemu-img", *words)), words


# --- amend ----------------------------------------------------------------------------------------

AMENDMENTS: dict[str, list[tuple[str, ...]]] = {
    "encrypt.format=aes,encrypt.key-secret=s": [
        ("-o", "encrypt.state=active,encrypt.new-secret=n"), ("-o", "compat=0.10"), ("-o", "refcount_bits=8"),
    ],
    f"{QUICK},encrypt.key-secret=s": [
        ("-o", "encrypt.state=active"), ("-o", "encrypt.new-secret=n"), ("-o", "encrypt.state=foo"),
        ("-o", "encrypt.state=active,encrypt.new-secret=x"), ("-o", "encrypt.key-secret=s"),
        ("-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10"),
        ("-o", "encrypt.state=active,encrypt.new-secret=w,encrypt.iter-time=10,encrypt.keyslot=1"),
        ("--force", "-o", "encrypt.state=active,encrypt.new-secret=w,encrypt.iter-time=10,encrypt.keyslot=1"),
        ("-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=9"),
        ("-o", "encrypt.keyslot=x"),
        ("-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10,encrypt.keyslot=5,size=8M"),
        ("-o", "encrypt.state=inactive"), ("-o", "encrypt.state=inactive,encrypt.old-secret=w"),
        ("-o", "encrypt.state=inactive,encrypt.keyslot=5"), ("-o", "encrypt.state=inactive,encrypt.keyslot=0"),
        ("-o", "compat=0.10"), ("-o", "refcount_bits=1"), ("-o", "compat=1.1,refcount_bits=1"),
    ],
    "cluster_size=4k": [
        ("-o", "compat=0.10"), ("-o", "lazy_refcounts=on"), ("-o", "compat=v3,lazy_refcounts=on"), ("-o", "compat=foo"),
        ("-o", "compat=0.10,lazy_refcounts=on"), ("-o", "refcount_bits=8"), ("-o", "compat=1.1,refcount_bits=8"),
        ("-o", "refcount_bits=1"), ("-o", "refcount_bits=64"), ("-o", "refcount_bits=3"), ("-o", "refcount_bits=0"),
        ("-o", "refcount_bits=foo"), ("-o", "compat=0.10"), ("-o", "compat=0.10,refcount_bits=16"), ("-o", "size=8M"),
        ("-o", "data_file=foo"), ("-o", "data_file_raw=on"), ("-o", "data_file_raw=off"), ("-o", "backing_file=foo"),
        ("-o", "backing_file="), ("-o", "backing_fmt=raw"), ("-o", "cluster_size=4k"), ("-o", "encryption=on"),
        ("-o", "encrypt.state=active,encrypt.new-secret=n"), ("-o", "encrypt.state=foo"), ("-o", "foo=1"),
        ("-o", "lazy_refcounts=foo"), ("-o", "compression_type=zstd"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("options", AMENDMENTS)
def test_amend_does_and_says_what_qemu_img_does_and_says(tmp_path: Path, options: str) -> None:
    """One image amended by each program, step by step; after each they say the same and hold the same."""
    need("qemu-img", "qemu-io")
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    run("qemu-img", "create", "-q", *SECRETS, "-f", "qcow2", "-o", options, theirs, "4M")

    def name(image: Path) -> str:
        return opts(image) if "encrypt" in options else f"driver=qcow2,file.filename={image}"

    fill = ("-c", "write -q -P 5 0 1M", "-c", "write -q -z 1M 1M", "-c", "write -q -P 6 2049k 3k")
    run("qemu-io", *SECRETS, "--image-opts", *fill, name(theirs))
    ours.write_bytes(theirs.read_bytes())
    before = run("qemu-io", *SECRETS, "--image-opts", "-c", "read -v 1020k 1100k", name(theirs))
    for step in AMENDMENTS[options]:
        answers = [
            said(call(tool, "amend", *SECRETS, *step, "--image-opts", name(image)))
            for tool, image in (("qmpd-img", ours), ("qemu-img", theirs))
        ]
        assert answers[0] == answers[1], step
        assert _shown(ours) == _shown(theirs), step
        run("qemu-img", "check", "-q", *SECRETS, "--image-opts", name(ours))
        seen = run("qemu-io", *SECRETS, "--image-opts", "-c", "read -v 1020k 1100k", name(ours))
        assert _without_time(seen) == _without_time(before), step


def _without_time(text: str) -> list[str]:
    return [line for line in text.splitlines() if "ops/sec" not in line]


def _shown(image: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", image))
    data = info["format-specific"]["data"]
    slots = [slot["active"] for slot in data.pop("encrypt", {}).get("slots", ())]
    return {"size": info["virtual-size"], "slots": slots, **data}


def test_passphrases_change_on_a_live_image(tmp_path: Path, made: Callable[[str, str], bytes]) -> None:
    """The commands of a session over QMP; then QEMU opens the image with the new passphrase only."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "i.qcow2"
    image.write_bytes(made("qemu-img", QUICK))
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        for name, text in (("s", "abc123"), ("n", "new")):
            client.ok("object-add", qom_type="secret", id=name, data=text)
        node = {
            "driver": "qcow2",
            "node-name": "q",
            "file": {"driver": "file", "filename": str(image)},
            "encrypt": {"format": "luks", "key-secret": "s"},
        }
        assert client.send({"execute": "blockdev-add", "arguments": node}) == {"return": {}}
        assert "abc123" not in json.dumps(client.ok("query-named-block-nodes"))
        changes: list[dict[str, Any]] = [
            {"state": "active", "new-secret": "n", "iter-time": 10},
            {"state": "inactive", "old-secret": "s"},
        ]
        for number, change in enumerate(changes):
            _amend(client, f"j{number}", {"driver": "qcow2", "encrypt": {"format": "luks", **change}})
        info = client.ok("query-named-block-nodes")[0]
        assert info["encrypted"] is True
        slots = [slot["active"] for slot in info["image"]["format-specific"]["data"]["encrypt"]["slots"]]
        assert slots == [False, True, *[False] * 6]
        client.ok("blockdev-del", node_name="q")
    assert call("qemu-io", *SECRETS, "--image-opts", "-c", "read 0 512", opts(image)).returncode == 1
    run("qemu-io", *SECRETS, "--image-opts", "-c", "write -P 5 0 4k", opts(image, "n"))
    run("qmpd-img", "check", *SECRETS, "--image-opts", opts(image, "n"))


def _amend(client: RawClient, job: str, options: dict[str, Any]) -> None:
    client.ok("x-blockdev-amend", job_id=job, node_name="q", options=options)
    while True:
        event = client.wait_event("JOB_STATUS_CHANGE")
        if event["data"] == {"id": job, "status": "concluded"}:
            break
    (found,) = [one for one in client.ok("query-jobs") if one["id"] == job]
    assert "error" not in found, found
    client.ok("job-dismiss", id=job)


# --- damaged headers ------------------------------------------------------------------------------

POINTER = struct.pack(">II", 0x0537BE77, 16)


@pytest.mark.parametrize(
    ("offset", "length", "words"),
    [
        (1 << 30, None, "Encryption header offset 1073741824 is too large: the file has {size} bytes"),
        (None, 0, "Encryption header length 0 is too small: at least 592 are needed"),
        (None, 591, "Encryption header length 591 is too small: at least 592 are needed"),
        (None, (1 << 64) - 1, "Encryption header length 18446744073709551615 is too large: at most"),
        (0, None, "overlaps with qcow2_header at offset 0"),
        (0x10000, None, "overlaps with active L1 table at offset 196608"),
        (513, None, "Encryption header offset '513' is not a multiple of cluster size '65536'"),
        (None, 100_000, "Request for data outside of extension header"),
    ],
)
def test_a_pointer_that_leads_astray_is_refused_by_what_is_wrong(
    tmp_path: Path, made: Callable[[str, str], bytes], offset: int | None, length: int | None, words: str
) -> None:
    need("qemu-img")
    image = tmp_path / "i.qcow2"
    data = bytearray(made("qemu-img", QUICK))
    at = data.index(POINTER) + 8
    found = struct.unpack_from(">QQ", data, at)
    place = found[0] if offset is None else offset, found[1] if length is None else length
    struct.pack_into(">QQ", data, at, *place)
    image.write_bytes(data)
    done = call("qmpd-img", "check", *SECRETS, "--image-opts", opts(image))
    assert done.returncode == 1
    assert words.format(size=len(data)) in done.stderr
    assert image.read_bytes() == data


def test_a_wrong_passphrase_changes_nothing_of_a_dirty_image(tmp_path: Path) -> None:
    """A dirty image is repaired when it is opened, but not before it is known who opens it."""
    need("qemu-img")
    image = tmp_path / "i.qcow2"
    options = f"{QUICK},encrypt.key-secret=s,lazy_refcounts=on"
    run("qemu-img", "create", "-q", *SECRETS, "-f", "qcow2", "-o", options, image, "4M")
    data = bytearray(image.read_bytes())
    data[79] |= 1
    image.write_bytes(data)
    done = call("qmpd-img", "resize", *SECRETS, "--image-opts", opts(image, "w"), "8M")
    assert (done.returncode, "Invalid password, cannot unlock any keyslot" in done.stderr) == (1, True)
    assert image.read_bytes() == data
    run("qmpd-img", "resize", *SECRETS, "--image-opts", opts(image), "8M")
    assert json.loads(run("qemu-img", "info", "--output=json", image))["dirty-flag"] is False


def test_an_entry_that_points_at_the_header_is_no_way_to_destroy_it(
    tmp_path: Path, made: Callable[[str, str], bytes]
) -> None:
    """Written through it, all data would be lost; QEMU looks only at tables."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "i.qcow2"
    image.write_bytes(made("qemu-img", QUICK))
    run("qemu-io", *SECRETS, "--image-opts", "-c", "write -P 5 0 64k", opts(image))
    data = bytearray(image.read_bytes())
    place = struct.unpack_from(">Q", data, data.index(POINTER) + 8)[0]
    l1 = struct.unpack_from(">Q", data, 40)[0]
    l2 = struct.unpack_from(">Q", data, l1)[0] & (1 << 56) - 1 & ~511
    struct.pack_into(">Q", data, l2, 1 << 63 | place)
    image.write_bytes(data)
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * 65536)
    done = call("qmpd-img", "convert", *SECRETS, "-n", "--image-opts", "--target-image-opts",
                f"driver=raw,file.filename={source}", opts(image))  # fmt: skip
    assert done.returncode == 1
    assert image.read_bytes()[place : place + 4096] == data[place : place + 4096]
