"""The commands of exports, one by one, to qemu-storage-daemon and to us: the same replies and events."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

from tests.peers.conftest import need
from tests.support.daemon import RawClient
from tests.support.nbd_servers import qemu, qmpd
from tests.support.nbd_wire import Client

LONG = "x" * 4097
UNIX = {"type": "unix", "data": {"path": "{folder}/n.sock"}}


def start(kind: str, **data: Any) -> tuple[str, dict[str, Any]]:
    return "nbd-server-start", {"addr": {"type": kind, "data": data}}


def export(export_id: str, node: str = "n", **members: Any) -> tuple[str, dict[str, Any]]:
    wire = {key.replace("_", "-"): value for key, value in members.items()}
    return "block-export-add", {"type": "nbd", "id": export_id, "node-name": node, **wire}


def node(name: str, **members: Any) -> tuple[str, dict[str, Any]]:
    return "blockdev-add", {"driver": "null-co", "node-name": name, "size": 65536, **members}


STEPS: list[tuple[str, dict[str, Any]]] = [
    node("n"), node("r", **{"read-only": True}), node("odd", size=1000),
    ("blockdev-add", {"driver": "raw", "node-name": "top", "file": "n"}),
    ("object-add", {"qom-type": "secret", "id": "s0", "data": "abc"}),
    ("object-add", {"qom-type": "iothread", "id": "io0"}),
    export("1 bad", "nosuch"), export("", "nosuch"), export("a" * 300, "nosuch"), export("e", "nosuch", name=LONG),
    export("e", "r", writable=True, name=LONG, iothread="nosuch"), export("e", iothread="nosuch", name=LONG),
    export("e", iothread="s0"), export("e", iothread="io0"),
    ("nbd-server-add", {"device": "nosuch"}), ("nbd-server-stop", {}), ("nbd-server-remove", {"name": "n"}),
    start("inet", host="127.0.0.1", port="notaport"), start("inet", host="nosuch.invalid", port="10809"),
    start("inet", host="", port=""), start("inet", host="127.0.0.1", port="1", ipv4=False, ipv6=False),
    start("inet", host="127.0.0.1", port="10809", ipv4=False, ipv6=True),
    start("inet", host="127.0.0.1", port="{port}"),
    start("fd", str="nosuch"), start("fd", str="99"), start("vsock", cid="x", port="1"),
    start("unix", path="{folder}"), start("unix", path="x" * 200), start("unix", path="{folder}/no/n.sock"),
    ("nbd-server-start", {"addr": UNIX, "tls-creds": "nosuch"}),
    ("nbd-server-start", {"addr": UNIX, "tls-creds": "s0"}),
    ("nbd-server-start", {"addr": UNIX, "tls-authz": "nosuch"}), ("nbd-server-start", {"addr": UNIX}),
    ("nbd-server-stop", {}), ("nbd-server-start", {"addr": UNIX}),
    export("e", name=LONG), export("e", name="ok", description=LONG), export("e", "r", writable=True, name=LONG),
    export("e", bitmaps=["a", "b"]), export("e", bitmaps=[{"node": "nosuch", "name": "b"}]),
    export("e", bitmaps=[{"node": "n", "name": "b"}]), export("e", iothread="io0", fixed_iothread=False),
    export("e"), export("e2"), export("e2", name="two", writable=True, writethrough=True, allocation_depth=True),
    export("e3", "top", name="three"), export("odd", "odd", writable=True), ("query-block-exports", {}),
    ("nbd-server-add", {"device": "n", "name": "n5", "bitmap": "nosuch"}),
    ("nbd-server-add", {"device": "n", "name": "1 x"}),
    ("nbd-server-add", {"device": "r", "name": "rr", "writable": True}), ("nbd-server-add", {"device": "n"}),
    ("query-block-exports", {}), ("blockdev-del", {"node-name": "n"}), ("blockdev-del", {"node-name": "r"}),
    ("connect", {"name": "two"}), ("block-export-del", {"id": "e2"}), ("block-export-del", {"id": "e2", "mode": "x"}),
    ("nbd-server-remove", {"name": "e2"}), ("block-export-del", {"id": "e3"}), ("block-export-del", {"id": "e3"}),
    ("disconnect", {}), ("block-export-del", {"id": "nosuch", "mode": "hard"}), ("nbd-server-stop", {}),
    ("query-block-exports", {}), ("nbd-server-stop", {}),
]  # fmt: skip


def filled(value: Any, folder: Path, port: int) -> Any:
    if isinstance(value, dict):
        return {key: filled(member, folder, port) for key, member in value.items()}
    if isinstance(value, list):
        return [filled(member, folder, port) for member in value]
    return value.replace("{folder}", str(folder)).replace("{port}", str(port)) if isinstance(value, str) else value


def converse(client: RawClient, folder: Path, port: int) -> list[Any]:
    """Return the reply to every step, with paths taken out; then the events, sorted."""
    replies: list[Any] = []
    connected = contextlib.ExitStack()
    for name, arguments in STEPS:
        if name == "connect":
            connected.enter_context(Client(str(folder / "n.sock")).go(arguments["name"].encode()))
            continue
        if name == "disconnect":
            connected.close()
            continue
        reply = client.send({"execute": name, "arguments": filled(arguments, folder, port)})
        if "error" in reply:
            reply["error"]["desc"] = reply["error"]["desc"].replace(str(folder), "{folder}")
        replies.append((name, arguments, reply))
    while not client.silent(0.3):
        client.events.append(client.receive())
    return [replies, sorted(str(event.get("data")) for event in client.events)]


def test_replies_and_events_are_those_of_qemu(tmp_path: Path) -> None:
    need("qemu-storage-daemon")
    answers = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, server in (("qemu", qemu), ("qmpd", qmpd)):
            with server(tmp_path / name) as client:
                answers.append(converse(client, tmp_path / name, taken.getsockname()[1]))
    for theirs, ours in zip(answers[0][0], answers[1][0], strict=True):
        assert ours == theirs
    assert answers[0][1] == answers[1][1]
