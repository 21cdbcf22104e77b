"""What `blockdev-reopen` must not do: lose data, tear an image, or let others in or keep them out wrongly."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.daemon import Daemon, RawClient, running
from tests.support.nbd_wire import Client

KiB, MiB = 1 << 10, 1 << 20
SIZE = 4 * MiB
SECRET = ["--object", "secret,id=s,data=sesame"]


def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, done.stderr
    return done


def refusal(client: RawClient, *options: dict[str, Any]) -> str:
    return str(client.command("blockdev-reopen", options=list(options))["error"]["desc"])


def serve(client: RawClient, folder: Path, node: str, *, writable: bool = True) -> str:
    client.ok("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "n.sock")}})
    client.ok("block-export-add", type="nbd", id="e", node_name=node, writable=writable)
    return str(folder / "n.sock")


QCOW2_CHANGES: list[dict[str, Any]] = [
    {},
    {"lazy-refcounts": True},
    {"l2-cache-size": 4096, "l2-cache-entry-size": 512},
    {"cache-size": 1 * MiB},
    {"discard": "unmap", "pass-discard-other": True},
    {"discard": "unmap", "detect-zeroes": "unmap"},
    {"overlap-check": "all"},
    {"overlap-check": "none"},
    {"cache": {"direct": True, "no-flush": False}},
    {"cache": {"direct": False, "no-flush": True}},
]
ROUNDS = 40


@pytest.mark.parametrize("detached", [False, True], ids=["qcow2", "luks-over-qcow2"])
def test_data_written_while_options_change_is_all_there(tmp_path: Path, detached: bool) -> None:
    """A client writes, zeroes and trims without a pause; the nodes below it are reopened again and again."""
    need("qemu-img")
    image, header = tmp_path / "i.qcow2", tmp_path / "h.img"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    seed = random.randrange(1 << 30)
    model, stop, failures = bytearray(SIZE), threading.Event(), list[BaseException]()

    def write(path: str) -> None:
        rng = random.Random(seed)
        try:
            with Client(path) as disk:
                disk.go(top.encode()).write(0, bytes(SIZE))  # what a new volume holds is noise
                while not stop.is_set():
                    offset = rng.randrange(0, SIZE - 64 * KiB) // 512 * 512
                    data = rng.randbytes(rng.randrange(1, 128) * 512)
                    disk.write(offset, data)
                    model[offset : offset + len(data)] = data
                    if rng.random() < 0.1:
                        where = rng.randrange(0, SIZE - 64 * KiB) // 512 * 512
                        assert disk.read(where, 4096) == model[where : where + 4096]
        except BaseException as error:
            failures.append(error)

    top = "l" if detached else "q"
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        file = {"driver": "file", "filename": str(image)}
        qcow2 = {"driver": "qcow2", "node-name": "q", "file": file}
        client.ok("blockdev-add", **{name.replace("-", "_"): value for name, value in qcow2.items()})
        if detached:
            header.write_bytes(b"")
            client.ok("object-add", qom_type="secret", id="s", data="sesame")
            options = {"driver": "luks", "header": {"driver": "file", "filename": str(header)}, "size": SIZE}
            client.ok("blockdev-create", job_id="j", options={**options, "key-secret": "s", "iterations": 1000})
            while client.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded":
                pass
            above = {"driver": "file", "filename": str(header)}
            client.ok("blockdev-add", driver="luks", node_name="l", file="q", header=above, key_secret="s")
        writer = threading.Thread(target=write, args=(serve(client, tmp_path, top),))
        writer.start()
        rng = random.Random(seed)
        try:
            for _ in range(ROUNDS):
                client.ok("blockdev-reopen", options=[{**qcow2, **rng.choice(QCOW2_CHANGES)}])
        finally:
            stop.set()
            writer.join(60)
        assert not failures, (seed, failures)
        with Client(str(tmp_path / "n.sock")) as disk:
            disk.go(top.encode())
            assert disk.read(0, SIZE) == model, seed
    assert "No errors" in run("qemu-img", "check", image).stdout
    if not detached:
        run("qemu-img", "convert", "-O", "raw", image, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == model


def test_a_read_only_image_is_clean_on_disk_and_writable_again(tmp_path: Path) -> None:
    """Lazy refcounts are written and persistent bitmaps stored before the node counts as read-only."""
    need("qemu-img")
    image = tmp_path / "i.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, str(SIZE))
    node = {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": str(image)}}

    def bitmaps() -> list[dict[str, Any]]:
        info = json.loads(run("qemu-img", "info", "-U", "--output=json", image).stdout)
        return list(info["format-specific"]["data"]["bitmaps"])

    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        client.ok("blockdev-add", driver="qcow2", node_name="q", file=node["file"])
        bitmap = {"node": "q", "name": "b"}
        add = {"execute": "block-dirty-bitmap-add", "arguments": {**bitmap, "persistent": True}}
        assert "return" in client.send(add)
        path = serve(client, tmp_path, "q")
        with Client(path) as disk:
            disk.go(b"q").write(0, b"x" * 65536)
        assert json.loads(run("qemu-img", "info", "-U", "--output=json", image).stdout)["dirty-flag"]
        client.ok("block-export-del", id="e")
        client.ok("blockdev-reopen", options=[{**node, "read-only": True}])
        assert not json.loads(run("qemu-img", "info", "-U", "--output=json", image).stdout)["dirty-flag"]
        assert [(one["name"], one["flags"]) for one in bitmaps()] == [("b", ["auto"])]
        [shown] = client.ok("query-named-block-nodes")[0]["dirty-bitmaps"]
        assert shown["count"] == 65536
        run("qemu-img", "check", image)  # which asks for the locks of a reader
        reply = client.send({"execute": "block-dirty-bitmap-clear", "arguments": bitmap})
        assert "readonly" in reply["error"]["desc"]
        client.ok("blockdev-reopen", options=[node])
        assert bitmaps()[0]["flags"] == ["in-use", "auto"]
        client.ok("block-export-add", type="nbd", id="e", node_name="q", writable=True)
        with Client(path) as disk:
            disk.go(b"q").write(MiB, b"y" * 65536)
        [shown] = client.ok("query-named-block-nodes")[0]["dirty-bitmaps"]
        assert shown["count"] == 2 * 65536
    assert bitmaps()[0]["flags"] == ["auto"]
    assert "No errors" in run("qemu-img", "check", image).stdout


def flags(daemon: Daemon, image: Path) -> list[int]:
    """Return the open flags of the daemon's descriptors of a file."""
    folder = Path(f"/proc/{daemon.process.pid}")
    found = []
    for link in (folder / "fd").iterdir():
        if link.is_symlink() and os.readlink(link) == str(image):
            lines = (folder / "fdinfo" / link.name).read_text().splitlines()
            found += [int(line.split()[1], 8) for line in lines if line.startswith("flags")]
    return found


def test_the_file_is_open_as_the_options_say_and_locked_for_others(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = tmp_path / "i.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    node = {"driver": "file", "node-name": "f", "filename": str(image)}
    write = ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4k", image]
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        client.ok("blockdev-add", driver="file", node_name="f", filename=str(image))
        for options, access in (
            ({}, os.O_RDWR),
            ({"read-only": True}, os.O_RDONLY),
            ({"cache": {"direct": True}}, os.O_RDWR | os.O_DIRECT),
            ({"read-only": True, "cache": {"direct": True}}, os.O_RDONLY | os.O_DIRECT),
            ({"auto-read-only": True}, os.O_RDONLY),
            ({}, os.O_RDWR),
        ):
            client.ok("blockdev-reopen", options=[{**node, **options}])
            [now] = flags(daemon, image)
            assert now & (os.O_ACCMODE | os.O_DIRECT) == access, options
        client.ok("blockdev-add", driver="qcow2", node_name="q", file="f")
        path = serve(client, tmp_path, "q")
        for direct in (True, False):
            assert run(*write, check=False).returncode == 1  # another process must not write
            client.ok("blockdev-reopen", options=[{**node, "cache": {"direct": direct}}])
            assert run(*write, check=False).returncode == 1
            with Client(path) as disk:
                disk.go(b"q").write(512, b"d" * 512)
                assert disk.read(0, 2048) == bytes(512) + b"d" * 512 + bytes(1024)
        client.ok("block-export-del", id="e")
        reader = {"driver": "qcow2", "node-name": "q", "file": "f", "read-only": True}
        client.ok("blockdev-reopen", options=[reader, {**node, "read-only": True}])
        assert run(*write, check=False).returncode == 1  # not while somebody relies on what it reads
        run("qemu-img", "check", image)
        client.ok("blockdev-del", node_name="q")
        run(*write)
        assert refusal(client, {**node, "locking": "off"}) == "Cannot change the option 'locking'"
        assert flags(daemon, image)[0] & os.O_ACCMODE == os.O_RDONLY


def test_a_filter_comes_and_goes_below_a_volume_in_use(tmp_path: Path) -> None:
    """The encrypted volume goes on while its payload is throttled, and its header stays shared."""
    payload, header = tmp_path / "p.img", tmp_path / "h.img"
    payload.write_bytes(bytes(SIZE))
    header.write_bytes(b"")
    with running(tmp_path, "--object", "secret,id=s,data=sesame", name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        client.ok("object-add", qom_type="throttle-group", id="t", limits={"iops-total": 100000})
        client.ok("blockdev-add", driver="file", node_name="h", filename=str(header))
        options = {"driver": "luks", "header": "h", "size": SIZE, "key-secret": "s", "iterations": 1000}
        client.ok("blockdev-create", job_id="j", options=options)
        while client.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded":
            pass
        client.ok("blockdev-add", driver="file", node_name="p", filename=str(payload))
        client.ok("blockdev-add", driver="luks", node_name="l", file="p", header="h", key_secret="s")
        client.ok("blockdev-add", driver="throttle", node_name="th", file="p", throttle_group="t")
        with Client(serve(client, tmp_path, "l")) as disk:
            disk.go(b"l").write(0, b"1" * 4096)
            node = {"driver": "luks", "node-name": "l", "key-secret": "s", "header": "h"}
            client.ok("blockdev-reopen", options=[{**node, "file": "th"}])
            graph = client.ok("x-debug-query-block-graph")
            names = {one["id"]: one["name"] for one in graph["nodes"]}
            edges = {(names[one["parent"]], one["name"], names[one["child"]]) for one in graph["edges"]}
            assert {("l", "file", "th"), ("th", "file", "p"), ("l", "header", "h")} <= edges
            disk.write(4096, b"2" * 4096)
            assert disk.read(0, 8192) == b"1" * 4096 + b"2" * 4096
            assert "is in use" in client.command("blockdev-del", node_name="th")["error"]["desc"]
            client.ok("blockdev-reopen", options=[{**node, "file": "p"}])
            client.ok("blockdev-del", node_name="th")
            assert disk.read(0, 8192) == b"1" * 4096 + b"2" * 4096


def test_a_dirty_image_that_cannot_be_repaired_stays_read_only_and_as_it_was(tmp_path: Path) -> None:
    need("qemu-img")
    image = tmp_path / "i.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, str(SIZE))
    data = bytearray(image.read_bytes())
    data[79] |= 1  # dirty: refcounts are to be made anew when it is written to
    image.write_bytes(data)
    rules = [{"event": "none", "errno": 5, "iotype": "write"}]
    with running(tmp_path, name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        client.ok("blockdev-add", driver="file", node_name="f", filename=str(image))
        client.ok("blockdev-add", driver="blkdebug", node_name="d", image="f", inject_error=rules)
        client.ok("blockdev-add", driver="qcow2", node_name="q", file="d", read_only=True)
        node = {"driver": "qcow2", "node-name": "q", "file": "d"}
        assert "repair" in refusal(client, {**node, "cache": {"no-flush": True}})
        [shown] = [one for one in client.ok("query-named-block-nodes") if one["node-name"] == "q"]
        assert shown["ro"]
        assert not shown["cache"]["no-flush"]
        assert image.read_bytes() == data
        client.ok("blockdev-reopen", options=[{**node, "file": "f"}])  # now it can
    assert "No errors" in run("qemu-img", "check", image).stdout
    assert not image.read_bytes()[79] & 1
