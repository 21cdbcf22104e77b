"""External data files of qcow2 in the graphs of both daemons: errors word for word, edges with their permissions."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gen.qcow2_model import Op
from tests.peers.conftest import need
from tests.support.daemon import RawClient, running
from tests.support.data_files import call, qemu_img
from tests.support.reference import reference


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
    with reference(folder) as client:
        yield client


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
