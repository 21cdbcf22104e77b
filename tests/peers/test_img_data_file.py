"""qmpd-img and qemu-img side by side over external data files of qcow2: what they make, do, say and refuse."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.gen.qcow2 import MemoryNode, make, save
from tests.gen.qcow2_model import Op
from tests.peers.conftest import need
from tests.support.data_files import PLAIN, RAW, call, comparable, qemu_img, within


def told(image: str) -> list[Any]:
    """Return what QEMU says of an image: what it is, where its content lies, how long the data file is."""
    info = json.loads(call("qemu-img", "info", "--output=json", "-f", "qcow2", image)[1])
    specific = info["format-specific"]["data"]
    status, text = call("qemu-img", "map", "--output=json", "-f", "qcow2", image)
    assert status == 0, text
    sizes = {one: os.path.getsize(one) for one in sorted(os.listdir(".")) if one.endswith(".raw")}
    checked = call("qemu-img", "check", "-q", "-f", "qcow2", image)
    return [info["virtual-size"], specific, json.loads(text), sizes, checked]


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


@pytest.mark.parametrize(
    ("options", "size"),
    [(options, "1049088") for options in CREATE]
    + [(options, size) for options in (PLAIN, RAW) for size in ("1M", "0")],
)
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
            said = [comparable(*call(tool, *line.split(" "))) for line in script]
            whole = options and not name.startswith("amend n")
            seen.append((said, told("image") if whole else None, Path("base.raw").read_bytes()))
    assert seen[0] == seen[1]


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
        assert comparable(*mine) == comparable(*theirs)
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
