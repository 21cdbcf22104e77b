"""`blockdev-snapshot`, `blockdev-snapshot-sync` and `change-backing-file` beside QEMU's, and what they do to data."""

from __future__ import annotations

import json
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.answers import Request, converse, node
from tests.support.daemon import RawClient, running
from tests.support.nbd_wire import Client

KiB, MiB = 1 << 10, 1 << 20
SIZE = 2 * MiB
SHOWN: Request = ("query-named-block-nodes", {})
GRAPH: Request = ("x-debug-query-block-graph", {})
EXPORTS: Request = ("query-block-exports", {})
SERVER: Request = ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "n.sock"}}})


def run(*words: str | Path) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, timeout=60).stdout


def prepare(folder: Path) -> None:
    for name in ("a", "n1", "n2", "n3"):
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / f"{name}.qcow2", "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "large.qcow2", "2M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "n1.qcow2", "-F", "qcow2", folder / "o.qcow2")


def qcow2(name: str, file: str, **members: Any) -> Request:
    return node("qcow2", name, file={"driver": "file", "filename": f"{file}.qcow2"}, **members)


def export(name: str, *, writable: bool = True) -> Request:
    return "block-export-add", {"type": "nbd", "id": f"e-{name}", "node-name": name, "writable": writable}


def sync(name: str | None, file: str, overlay: str | None, **members: Any) -> Request:
    given = {"node-name": name, "snapshot-file": file, "snapshot-node-name": overlay, **members}
    return "blockdev-snapshot-sync", {key: value for key, value in given.items() if value is not None}


def snapshot(name: str, overlay: str) -> Request:
    return "blockdev-snapshot", {"node": name, "overlay": overlay}


def test_overlays_that_are_made(tmp_path: Path) -> None:
    need("qemu-img")
    options = {"cache": {"direct": True, "no-flush": True}, "discard": "unmap", "detect_zeroes": "unmap"}
    requests = [SERVER, qcow2("a", "a", **options), export("a")]
    requests += [sync("a", "s1.qcow2", "s1"), SHOWN, GRAPH, EXPORTS]
    requests += [sync("s1", "s2.qcow2", "s2", mode="absolute-paths"), SHOWN]
    for file in ("s2.qcow2", "s1.qcow2", "", "foo:bar", 'json:{"driver":"file","filename":"s9.qcow2"}', "none/x"):
        requests.append(sync("s2", file, "s3"))
    for image_format in ("luks", "file", "null-co", "throttle", "raw", "none"):
        requests.append(sync("s2", "s4.img", "s4", format=image_format))
    requests += [sync("s2", "b.img", "s4", format="raw", mode="existing"), sync("s2", "none", "s4", mode="existing")]
    requests += [sync("s2", "b.img", "s4", mode="existing"), sync("s2", "s5.qcow2", "1"), sync("s2", "s5.qcow2", "a")]
    requests += [sync("s2", "o.qcow2", "s4", mode="existing"), SHOWN, GRAPH, sync("a", "x", "x"), sync("s4", "x", None)]
    requests += [sync(None, "s6.qcow2", "s6", device="s4"), sync(None, "s6.qcow2", "s6")]
    requests += [sync("s4", "s6.qcow2", "s6", device="s4"), SHOWN, ("block-export-del", {"id": "e-a"}), SHOWN]
    requests += [("blockdev-del", {"node-name": "s1"}), ("blockdev-del", {"node-name": "a"}), SHOWN]
    converse(tmp_path, requests, prepare=prepare)


def test_overlays_that_are_open(tmp_path: Path) -> None:
    need("qemu-img")
    requests = [
        SERVER,
        node("null-co", "z", size=MiB),
        node("raw", "r", file="z"),
        node("copy-on-read", "cor", file="z"),
    ]
    requests += [snapshot("z", "cor"), snapshot("z", "r"), snapshot("z", "z"), snapshot("z", "none")]
    requests += [qcow2("o", "o"), snapshot("z", "o"), qcow2("n2", "n2", read_only=True), snapshot("z", "n2")]
    requests += [qcow2("n3", "n3"), export("n3", writable=False), snapshot("z", "n3"), export("z"), snapshot("z", "n2")]
    requests += [("block-export-del", {"id": "e-n3"}), snapshot("z", "n3"), SHOWN, GRAPH, EXPORTS]
    requests += [snapshot("z", "n3"), snapshot("n3", "n3"), snapshot("n3", "z"), ("blockdev-del", {"node-name": "n3"})]
    requests += [qcow2("l", "large"), snapshot("n3", "l"), SHOWN, GRAPH]
    requests += [
        ("block_resize", {"node-name": "n3", "size": 2 * MiB}),
        ("block_resize", {"node-name": "l", "size": MiB}),
    ]
    converse(tmp_path, requests, prepare=prepare)


def test_transactions(tmp_path: Path) -> None:
    need("qemu-img")

    def act(*actions: Request) -> Request:
        return "transaction", {"actions": [{"type": name, "data": data} for name, data in actions]}

    abort: Request = ("abort", {})
    requests = [SERVER, qcow2("a", "a"), qcow2("n1", "n1"), qcow2("n2", "n2"), export("a"), export("n1")]
    requests += [act(snapshot("a", "n2"), abort), SHOWN, GRAPH, EXPORTS]
    requests += [act(sync("a", "t1.qcow2", "t1"), snapshot("n1", "n2"), abort), GRAPH]
    requests += [act(snapshot("a", "n2"), snapshot("n1", "n2")), GRAPH]
    requests += [act(sync("a", "t1.qcow2", "t1"), snapshot("n1", "n2")), SHOWN, GRAPH, EXPORTS]
    requests += [act(sync("t1", "t2.qcow2", "t2"), sync("t2", "t3.qcow2", "t3")), SHOWN, GRAPH]
    converse(tmp_path, requests, prepare=prepare)


def test_another_name_of_the_backing_file(tmp_path: Path) -> None:
    need("qemu-img")

    def change(device: str, image: str, name: str) -> Request:
        return "change-backing-file", {"device": device, "image-node-name": image, "backing-file": name}

    requests = [SERVER, qcow2("a", "a"), export("a"), sync("a", "s1.qcow2", "s1"), sync("s1", "s2.qcow2", "s2")]
    requests += [change("s2", "s1", "./a.qcow2"), SHOWN, change("s2", "a", "x"), change("s2", "none", "x")]
    requests += [change("none", "s1", "x"), change("s1", "s1", "x"), change("s2", "s2", "y" * 1100), SHOWN]
    requests += [change("s2", "s2", "other.qcow2"), SHOWN, node("null-co", "z"), change("z", "s2", "x")]
    converse(tmp_path, requests, prepare=prepare)


def test_disks_of_a_machine(tmp_path: Path) -> None:
    """The device goes on with the overlay, and nothing else has to hold it."""
    need("qemu-img", "qemu-system-x86_64")
    disk: Request = ("device_add", {"driver": "virtio-blk-pci", "drive": "a", "id": "d", "addr": "5"})
    queries: list[Request] = [("query-block", {}), ("query-blockstats", {}), SHOWN, GRAPH]
    file = {"driver": "file", "filename": "a.qcow2"}
    requests = [qcow2("a", "a"), disk, sync("a", "s1.qcow2", "s1"), *queries, qcow2("n1", "n1"), snapshot("s1", "n1")]
    requests += [*queries, sync(None, "x", "x", device="d"), sync("n1", "s2.qcow2", "s2"), *queries]
    for change in ({"read-only": True}, {"cache": {"no-flush": True}}, {"file": "n1"}):
        options = {"driver": "qcow2", "node-name": "a", "file": file, "read-only": False, **change}
        requests += [("blockdev-reopen", {"options": [options]}), SHOWN]
    converse(tmp_path, requests, prepare=prepare, theirs="qemu-system-x86_64")


ROUNDS = 12


@pytest.mark.parametrize("detached", [False, True], ids=["qcow2", "below-luks"])
def test_every_overlay_begins_where_its_snapshot_ended(tmp_path: Path, detached: bool) -> None:
    """A client writes all the while; the layers, put together, are the disk as it was and as it is."""
    need("qemu-img")
    seed = random.randrange(1 << 30)
    model, stop, failures = bytearray(SIZE), threading.Event(), list[BaseException]()

    def write() -> None:
        rng = random.Random(seed)
        try:
            with Client(str(tmp_path / "n.sock")) as disk:
                disk.go(b"disk").write(0, bytes(SIZE))
                while not stop.is_set():
                    offset = rng.randrange(0, SIZE - 64 * KiB) // 512 * 512
                    data = rng.randbytes(rng.randrange(1, 128) * 512)
                    disk.write(offset, data)
                    model[offset : offset + len(data)] = data
        except BaseException as error:
            failures.append(error)

    with running(tmp_path, "--object", "secret,id=s,data=sesame", name="qmpd-storage-daemon") as daemon:
        client = daemon.client()
        top = _volume(client, tmp_path) if detached else "s0"
        if not detached:
            run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "s0.qcow2", str(SIZE))
            client.send({"execute": "blockdev-add", "arguments": _node(tmp_path, "s0")})
        client.ok("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "n.sock")}})
        disk = {"type": "nbd", "id": "e", "node-name": top, "name": "disk", "writable": True}
        assert "return" in client.send({"execute": "block-export-add", "arguments": disk})
        writer = threading.Thread(target=write)
        writer.start()
        try:
            for at in range(1, ROUNDS + 1):
                wanted = {"node-name": f"s{at - 1}", "snapshot-node-name": f"s{at}"}
                wanted["snapshot-file"] = str(tmp_path / f"s{at}.qcow2")
                assert "return" in client.send({"execute": "blockdev-snapshot-sync", "arguments": wanted})
        finally:
            stop.set()
            writer.join(60)
        assert not failures, (seed, failures)
        with Client(str(tmp_path / "n.sock")) as reader:
            reader.go(b"disk")
            assert reader.read(0, SIZE) == model, seed
        below = [one for one in client.ok("query-named-block-nodes", flat=True) if one["drv"] == "qcow2"]
        assert {one["node-name"]: one["ro"] for one in below} == {f"s{at}": at < ROUNDS for at in range(ROUNDS + 1)}
    for at in range(ROUNDS + 1):
        assert "No errors" in run("qemu-img", "check", tmp_path / f"s{at}.qcow2")
    if not detached:
        run("qemu-img", "convert", "-O", "raw", tmp_path / f"s{ROUNDS}.qcow2", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == model
    chain = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", tmp_path / f"s{ROUNDS}.qcow2"))
    assert [Path(one["filename"]).name for one in chain] == [f"s{at}.qcow2" for at in range(ROUNDS, -1, -1)]


def _node(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(folder / f"{name}.qcow2")}}


def _volume(client: RawClient, folder: Path) -> str:
    """Open a volume whose header is apart and whose payload is s0.qcow2; return its name."""
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "s0.qcow2", str(SIZE))
    header = {"driver": "file", "filename": str(folder / "h.img")}
    (folder / "h.img").write_bytes(b"")
    options = {"driver": "luks", "header": header, "size": SIZE, "key-secret": "s", "iterations": 1000}
    client.ok("blockdev-create", job_id="j", options=options)
    while client.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded":
        pass
    client.send({"execute": "blockdev-add", "arguments": _node(folder, "s0")})
    client.ok("blockdev-add", driver="luks", node_name="vol", file="s0", header=header, key_secret="s")
    return "vol"
