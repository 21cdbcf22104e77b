"""Dirty bitmaps as metadata contexts: the same commands, the same contexts, the same maps as QEMU's daemon."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support import nbd_wire as wire
from tests.support.daemon import RawClient
from tests.support.nbd_servers import qemu, qmpd
from tests.support.nbd_wire import meta_data

SIZE = 3 << 20
DIRTY = ((0, 1), (70_000, 100_000), (1 << 20, 65536), (SIZE - 1, 1))


def export(export_id: str, *bitmaps: Any, node: str = "q", **members: Any) -> tuple[str, dict[str, Any]]:
    return "block-export-add", {
        "type": "nbd", "id": export_id, "node-name": node, "name": export_id, "bitmaps": list(bitmaps), **members,
    }  # fmt: skip


def bitmap(verb: str, name: str, node: str = "q", **more: Any) -> tuple[str, dict[str, Any]]:
    return f"block-dirty-bitmap-{verb}", {"node": node, "name": name, **more}


def delete(export_id: str) -> tuple[str, dict[str, Any]]:
    return "block-export-del", {"id": export_id}


def node(name: str, **members: Any) -> tuple[str, dict[str, Any]]:
    return "blockdev-add", {"node-name": name, **members}


FILE = {"driver": "file", "filename": "{folder}/image.qcow2"}
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "{folder}/n.sock"}}, "max-connections": 0}),
    node("b", driver="qcow2", file={"driver": "file", "filename": "{folder}/base.qcow2"}, **{"read-only": True}),
    node("q", driver="qcow2", file=FILE, backing="b"), node("z", driver="null-co", size=SIZE),
    node("short", driver="null-co", size=65536 * 3),
    ("object-add", {"qom-type": "throttle-group", "id": "tg"}), node("top", driver="raw", file="q"),
    node("thr", driver="throttle", file="q", **{"throttle-group": "tg"}),
    bitmap("add", "on"), bitmap("add", "off", disabled=True, granularity=512), bitmap("add", "z0", "z"),
    bitmap("add", "s0", "short"),
    export("e", "nosuch"), export("e", "on"), export("e", {"node": "nosuch", "name": "on"}),
    export("e", {"node": "q", "name": "nosuch"}), export("e", "off", "on"), export("e", "on", node="top"),
    export("e", "on", node="thr"), export("w", "on", writable=True), export("e", {"node": "q", "name": "on"}),
    export("v", "on", writable=True), bitmap("disable", "on"), bitmap("clear", "on"), bitmap("remove", "on"),
    ("block-dirty-bitmap-merge", {"node": "q", "target": "off", "bitmaps": ["on"]}),
    ("block-dirty-bitmap-merge", {"node": "q", "target": "on", "bitmaps": ["off"]}),
    delete("w"), bitmap("disable", "on"), export("e", "on", node="top"),
    export("e", "in-base", "stored", "stored", "on", {"node": "z", "name": "z0"}),
    export("t", "off", {"node": "short", "name": "s0"}, node="thr", **{"allocation-depth": True}),
    ("nbd-server-add", {"device": "q", "name": "old", "bitmap": "nosuch"}),
    ("nbd-server-add", {"device": "q", "name": "old", "bitmap": "off"}), delete("t"),
    ("nbd-server-add", {"device": "q", "name": "old", "bitmap": "off"}), delete("old"),
    export("t", "off", {"node": "short", "name": "s0"}, node="thr", **{"allocation-depth": True}),
    ("query-block-exports", {}),
]  # fmt: skip
CONTEXTS = tuple(f"qemu:dirty-bitmap:{name}".encode() for name in ("in-base", "stored", "on", "z0", "off", "s0"))
CONVERSATIONS = [
    (number, meta_data(name, *queries))
    for number in (wire.LIST_META, wire.SET_META)
    for name, queries in (
        (b"e", ()), (b"t", ()), (b"e", (b"qemu:",)), (b"t", (b"qemu:",)), (b"e", (b"qemu:dirty-bitmap:",)),
        (b"e", CONTEXTS), (b"t", CONTEXTS), (b"e", CONTEXTS[::-1]), (b"e", (b"qemu:dirty-bitmap:stor",)),
        (b"t", (b"qemu:allocation-depth", b"qemu:dirty-bitmap:off", b"base:allocation")),
    )
]  # fmt: skip


def filled(value: Any, folder: Path) -> Any:
    return json.loads(json.dumps(value).replace("{folder}", str(folder)))


def converse(client: RawClient, folder: Path) -> list[Any]:
    replies = []
    for name, arguments in STEPS:
        reply = client.send({"execute": name, "arguments": filled(arguments, folder)})
        replies.append((name, arguments, json.loads(json.dumps(reply).replace(str(folder), "{folder}"))))
    return replies


def maps(folder: Path) -> dict[str, Any]:
    """Return what nbdinfo and qemu-img tell of the bitmaps."""
    found: dict[str, Any] = {}
    for name, context in (("e", "in-base"), ("e", "stored"), ("e", "on"), ("e", "z0"), ("t", "off")):
        full = f"qemu:dirty-bitmap:{context}"
        uri = f"nbd+unix:///{name}?socket={folder}/n.sock"
        said = subprocess.run(["nbdinfo", "--json", f"--map={full}", uri], capture_output=True, check=True)
        found[f"nbdinfo {context}"] = json.loads(said.stdout)
        options = f"driver=nbd,export={name},server.type=unix,server.path={folder}/n.sock,x-dirty-bitmap={full}"
        words = ["qemu-img", "map", "--output=json", "--image-opts", options]
        found[f"map {context}"] = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return found


def asked(path: str) -> list[Any]:
    """Return the replies to the conversations."""
    answers = []
    for number, data in CONVERSATIONS:
        with wire.Client(path) as client:
            answers.append([client.ask(wire.STRUCTURED), client.ask(number, data)])
    return answers


QUERIES = ((0, SIZE, 0), (0, SIZE, 8), (70_000, 1, 0), (65536, 200_000, 0), (512, 100, 8))


def statuses(path: str) -> list[Any]:
    """Return the raw answers to block status queries of several contexts at once."""
    answers = []
    for name in (b"e", b"t"):
        with wire.Client(path) as client:
            client.go(name, contexts=(*CONTEXTS, b"base:allocation", b"qemu:allocation-depth"))
            for offset, length, flags in QUERIES:
                client.send(wire.STATUS, offset, length, flags)
                while True:
                    chunk = client.chunk()
                    answers.append((chunk.kind, chunk.data))
                    if chunk.done:
                        break
    return answers


@pytest.mark.timeout(120)
def test_bitmaps_are_exported_as_qemu_does(tmp_path: Path) -> None:
    need("qemu-storage-daemon", "qemu-img", "qemu-io", "nbdinfo")
    for command in (
        f"qemu-img create -q -f qcow2 base.qcow2 {SIZE}",
        "qemu-img bitmap --add base.qcow2 in-base",
        "qemu-io -f qcow2 -c 'write -q 200k 100k' base.qcow2",
        f"qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 image.qcow2 {SIZE}",
        "qemu-img bitmap --add -g 4k image.qcow2 stored",
        *(f"qemu-io -f qcow2 -c 'write -q {offset} {length}' image.qcow2" for offset, length in DIRTY),
        "qemu-img bitmap --disable image.qcow2 stored",
    ):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    said, seen = [], []
    for name, server in (("qemu", qemu), ("qmpd", qmpd)):
        folder = tmp_path / name
        folder.mkdir()
        for image in ("base.qcow2", "image.qcow2"):
            (folder / image).write_bytes((tmp_path / image).read_bytes())
        with server(folder) as client:
            said.append(converse(client, folder))
            socket = str(folder / "n.sock")
            seen.append((maps(folder), asked(socket), statuses(socket)))
    for theirs, ours in zip(*said, strict=True):
        assert ours == theirs
    for theirs, ours in zip(*seen, strict=True):
        assert ours == theirs
    assert any(one["type"] for one in seen[1][0]["nbdinfo stored"])
