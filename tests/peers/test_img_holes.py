"""Clusters that are holes in the file of an image: what both tools and both NBD servers tell of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support.daemon import running
from tests.support.data_files import call
from tests.support.peers import find

SIZE = 8 << 20
SECRET = ("--object", "secret,id=s,data=abc123")
LUKS = "key-secret=s,iter-time=10"

IMAGES = {
    "tables": ("qcow2", "preallocation=metadata"),
    "v2": ("qcow2", "preallocation=metadata,compat=0.10"),
    "small": ("qcow2", "preallocation=metadata,cluster_size=512"),
    "large": ("qcow2", "preallocation=metadata,cluster_size=2M"),
    "extended": ("qcow2", "preallocation=metadata,extended_l2=on,cluster_size=16k"),
    "narrow": ("qcow2", "preallocation=metadata,refcount_bits=1"),
    "falloc": ("qcow2", "preallocation=falloc"),
    "full": ("qcow2", "preallocation=full"),
    "grown": ("qcow2", "cluster_size=2M"),
    "apart": ("qcow2", "preallocation=metadata,data_file=apart.data"),
    "apart-raw": ("qcow2", "data_file=apart.raw,data_file_raw=on"),
    "encrypted": ("qcow2", f"preallocation=metadata,encrypt.format=luks,encrypt.{LUKS.replace(',', ',encrypt.')}"),
    "raw": ("raw", ""),
    "luks": ("luks", LUKS),
}


def qemu_img(*words: str) -> str:
    status, text = call("qemu-img", *words)
    assert status == 0, text
    return text


def source(name: str) -> str:
    image_format = IMAGES[name][0]
    secret = {"luks": "key-secret=s,"}.get(image_format, "encrypt.key-secret=s," if name == "encrypted" else "")
    return f"driver={image_format},{secret}file.filename={name}"


def make(name: str, seed: str = "") -> None:
    """Make an image in the working directory, and write a little into it."""
    chance = random.Random(f"{name}{seed}")
    image_format, options = IMAGES[name]
    qemu_img("create", "-q", *SECRET, "-f", image_format, *(("-o", options) if options else ()), name, str(SIZE))
    commands = []
    for _ in range(chance.randrange(1, 8)):
        at = chance.randrange(SIZE // 512) * 512
        length = min(SIZE - at, 512 * chance.choice((1, 8, 100, 2000)))
        verb = chance.choice(("write -q -P 5", "write -q -P 6", "write -q -z", "write -q -z -u", "discard -q"))
        commands += ["-c", f"{verb} {at} {length}"]
    subprocess.run(["qemu-io", *SECRET, "-d", "unmap", *commands, "--image-opts", source(name)], check=True)
    if chance.random() < 0.3 and image_format != "luks" and name != "encrypted":
        qemu_img("resize", "-q", "-f", image_format, *_growth(image_format), name, "+1M")


def _growth(image_format: str) -> tuple[str, ...]:
    return ("--preallocation=metadata",) if image_format == "qcow2" else ()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img", "qemu-io")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("seed", ["", "again"])
@pytest.mark.parametrize("name", IMAGES)
def test_both_tools_tell_the_same(name: str, seed: str) -> None:
    make(name, seed)
    for words in (("map", "--output=json"), ("map",), ("measure", "-O", "qcow2"), ("measure", "-O", "raw")):
        mine, theirs = (call(tool, *words, *SECRET, "--image-opts", source(name)) for tool in ("qmpd-img", "qemu-img"))
        assert mine == theirs, words


def test_a_hole_is_told_as_zero_and_not_as_data_that_is_copied() -> None:
    """Both ends of a conversion: no data is read where the file has none, and none is written."""
    make("tables")
    told = json.loads(call("qmpd-img", "map", "--output=json", "tables")[1])
    assert any(one["zero"] and one["data"] for one in told)
    assert call("qmpd-img", "convert", "-O", "qcow2", "tables", "copy")[0] == 0
    qemu_img("compare", "-q", "tables", "copy")
    qemu_img("convert", "-O", "qcow2", "tables", "theirs")
    mine, theirs = (json.loads(qemu_img("map", "--output=json", name)) for name in ("copy", "theirs"))
    for one in (*mine, *theirs):
        one.pop("offset", None)
    assert mine == theirs


def test_a_file_that_was_cut_off_reads_as_zeroes_there() -> None:
    for cut in (1, 512, 3000, 1 << 20, 5 << 20):
        make("tables", str(cut))
        os.truncate("tables", os.path.getsize("tables") - cut)
        mine, theirs = (call(tool, "map", "--output=json", "tables") for tool in ("qmpd-img", "qemu-img"))
        assert mine == theirs


@contextmanager
def qemu_nbd(name: str) -> Iterator[str]:
    program, path = find("qemu-nbd"), Path(f"{name}.sock").absolute()
    assert program is not None
    words = ["-r", "-t", "-k", str(path), "-x", name, *SECRET, "--image-opts", source(name)]
    process = subprocess.Popen([program, *words])
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"nbd+unix:///{name}?socket={path}"
    finally:
        process.terminate()
        process.wait()


def extents(uri: str) -> list[tuple[int, int]]:
    """Return (end, type) as nbdinfo maps them, neighbours of one type joined."""
    said = subprocess.run(["nbdinfo", "--map", "--json", uri], capture_output=True, check=True)
    found: list[tuple[int, int]] = []
    for row in json.loads(said.stdout):
        if found and found[-1][1] == row["type"]:
            found.pop()
        found.append((row["offset"] + row["length"], row["type"]))
    return found


NBD = ("tables", "large", "extended", "apart", "encrypted", "raw")


def test_nbd_clients_see_the_same_map(tmp_path: Path) -> None:
    need("qemu-nbd", "nbdinfo")
    theirs = {}
    for name in NBD:
        make(name)
        with qemu_nbd(name) as uri:
            theirs[name] = extents(uri)
    assert any(kind == 2 for _, kind in theirs["tables"])
    with running(tmp_path, *[word.replace("--", "-") for word in SECRET]) as daemon:
        path, client = tmp_path / "ours.sock", daemon.client()
        client.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        for name in NBD:
            options = {"driver": IMAGES[name][0], "node-name": name, "file": {"driver": "file", "filename": name}}
            if name == "encrypted":
                options["encrypt"] = {"format": "luks", "key-secret": "s"}
            assert client.send({"execute": "blockdev-add", "arguments": options}) == {"return": {}}
            export = {"type": "nbd", "id": name, "node-name": name, "name": name}
            assert client.send({"execute": "block-export-add", "arguments": export}) == {"return": {}}
            assert extents(f"nbd+unix:///{name}?socket={path}") == theirs[name]
