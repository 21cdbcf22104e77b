"""Writes of NBD clients that pass the qcow2 driver by: only data of clusters that are the image's alone changes."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support import nbd_wire as wire
from tests.support.nbd_servers import qmpd, serving
from tests.support.nbd_wire import Client

SIZE = 8 << 20
AREAS = 16


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def make(folder: Path, kind: str) -> bytes:
    """Make `image` of one kind with some data in it; return what it shows."""
    start = bytearray(random.Random(kind).randbytes(SIZE))
    start[SIZE // 2 : SIZE // 4 * 3] = bytes(SIZE // 4)
    (folder / "start").write_bytes(start)
    options = {
        "extended": "extended_l2=on",
        "data-file": f"data_file={folder / 'data'}",
        "small": "cluster_size=512",
    }.get(kind, "")
    more = ["-o", options] if options else []
    if kind == "backing":
        run(folder, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "start", "-F", "raw", "image")
        run(folder, "qemu-io", "-c", "write -P 3 1M 1M", "image")
        start[1 << 20 : 2 << 20] = b"\3" * (1 << 20)
        return bytes(start)
    run(folder, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", *more, "start", "image")
    if kind == "snapshot":
        run(folder, "qemu-img", "snapshot", "-c", "s", "image")
        run(folder, "qemu-io", "-c", "write -P 5 2M 1M", "image")
        start[2 << 20 : 3 << 20] = b"\5" * (1 << 20)
    if kind == "bitmap":
        run(folder, "qemu-img", "bitmap", "--add", "image", "b")
    return bytes(start)


@pytest.mark.parametrize("kind", ["plain", "small", "extended", "data-file", "backing", "snapshot", "bitmap"])
@pytest.mark.parametrize("style", ["simple", "extended"])
def test_what_is_written_is_there_and_the_image_is_whole(kind: str, style: str, tmp_path: Path) -> None:
    """Mixed with zero writes and reads, sixteen at a time; QEMU finds no fault, and the snapshot as it was."""
    need("qemu-img", "qemu-io")
    model = bytearray(make(tmp_path, kind))
    rng = random.Random(f"{kind}{style}")
    node = f"qcow2,node-name=n,file.driver=file,file.filename={tmp_path / 'image'},discard=unmap"
    with qmpd(tmp_path / "d", "--blockdev", node, *serving(tmp_path, "nbd,id=e,node-name=n,name=n,writable=on")):
        client = Client(str(tmp_path / "n.sock")).go(b"n", style, ())
        for _ in range(40):
            some_requests(client, model, rng)
        assert not client.call(wire.FLUSH).error
        client.close()
    run(tmp_path, "qemu-img", "check", "-q", "image")
    (tmp_path / "model").write_bytes(model)
    compared = run(tmp_path, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "image", "model")
    assert compared == "Images are identical.\n"
    if kind == "snapshot":
        run(tmp_path, "qemu-img", "convert", "-l", "s", "-O", "raw", "image", "then")
        assert (tmp_path / "then").read_bytes() == (tmp_path / "start").read_bytes()


def some_requests(client: Client, model: bytearray, rng: random.Random) -> None:
    """Do one request in each area of the disk, all at once."""
    area = SIZE // AREAS
    wanted: dict[int, bytes] = {}
    for cookie in range(AREAS):
        unit = rng.choice((1, 512, 4096, 4096, 4096))
        length = unit * rng.randint(1, 16)
        offset = cookie * area + rng.randrange((area - length) // unit + 1) * unit
        kind = rng.choice((wire.READ, wire.WRITE, wire.WRITE, wire.WRITE, wire.ZERO))
        if kind == wire.WRITE:
            data = rng.randbytes(length)
            model[offset : offset + length] = data
            client.send(kind, offset, length, rng.choice((0, 0, 0, wire.FUA)), cookie, data)
        elif kind == wire.ZERO:
            model[offset : offset + length] = bytes(length)
            client.send(kind, offset, length, rng.choice((0, wire.NO_HOLE)), cookie)
        else:
            wanted[cookie] = bytes(model[offset : offset + length])
            client.send(kind, offset, length, cookie=cookie)
    found = client.results(AREAS)
    assert not any(one.error for one in found.values())
    for cookie, data in wanted.items():
        assert found[cookie].data == data
