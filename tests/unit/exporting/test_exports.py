"""Exports as commands see them: ids, names, order of checks, texts, endings and endpoints.

The texts are qemu-storage-daemon's; tests/peers/test_nbd_texts.py asks it again.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.backend import BlockBackend
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.exporting import endpoint
from qmpd.exporting.sockets import listen
from qmpd.qapi.registry import registry
from tests.support import nbd_wire as wire
from tests.support.nbd_wire import Client
from tests.unit.exporting.rig import Rig

LONG = "x" * 4097
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"id": "1 bad", "node_name": "nosuch"}, "Invalid block export id"),
    ({"id": "", "node_name": "nosuch"}, "Invalid block export id"),
    ({"id": "taken", "node_name": "nosuch"}, "Block export id 'taken' is already in use"),
    ({"node_name": "nosuch", "name": LONG}, "Cannot find device='' nor node-name='nosuch'"),
    ({"node_name": "r", "writable": True, "name": LONG}, "Cannot export read-only node as writable"),
    ({"iothread": "nosuch", "name": LONG}, 'iothread "nosuch" not found'),
    ({"name": LONG, "description": LONG}, f"export name '{LONG}' too long"),
    ({"name": "ok", "description": LONG}, f"description '{LONG}' too long"),
    ({"bitmaps": ["nosuch"]}, "Bitmap 'nosuch' is not found"),
    ({"bitmaps": [{"node": "nosuch", "name": "b"}]}, "Node 'nosuch' not found"),
    ({"bitmaps": [{"node": "n", "name": "b"}]}, "Dirty bitmap 'b' not found"),
    ({"node_name": "m", "name": "taken"}, "NBD server already has export named 'taken'"),
]


@pytest.mark.parametrize(("members", "text"), WRONG)
async def test_a_refused_export_leaves_nothing(rig: Rig, members: dict[str, Any], text: str) -> None:
    for name in ("n", "m"):
        rig.add_node(name)
    rig.add_node("r", read_only=True)
    await rig.serve()
    await rig.export("m", "taken", name="taken")
    backends = len(rig.graph.backends)
    with pytest.raises(CommandError, match=f"^{re.escape(text)}$"):
        await rig.exports.add(
            {"type": "nbd", "id": "e", "node-name": "n"} | {key.replace("_", "-"): members[key] for key in members}
        )
    assert len(rig.graph.backends) == backends
    await rig.graph.blockdev_del("n")


async def test_without_a_server_there_are_no_exports(rig: Rig) -> None:
    rig.add_node("n")
    with pytest.raises(CommandError, match=r"^NBD server not running$"):
        await rig.export("n")
    with pytest.raises(CommandError, match=r"^NBD server not running$"):
        await rig.exports.stop_server()
    with pytest.raises(CommandError, match=r"^Export 'e' is not found$"):
        await rig.exports.remove("e")
    await rig.serve()
    with pytest.raises(CommandError, match=r"^NBD server already running$"):
        await rig.serve()


async def test_names_of_the_longest_kind(rig: Rig) -> None:
    rig.add_node("n")
    await rig.serve()
    await rig.export("n", "a" * 1000, name="x" * 4096, description="d" * 4096)
    await rig.export("n", "empty", name="")
    client = await rig.connect(b"")
    assert client.size == 1 << 20
    assert [row["id"] for row in rig.exports.query()] == ["empty", "a" * 1000]


async def test_the_name_is_that_of_the_node_by_default(rig: Rig) -> None:
    rig.add_node("n")
    await rig.serve()
    await rig.export("n", "e")
    await rig.connect(b"n")


async def test_permissions(rig: Rig) -> None:
    node = rig.add_node("n")
    await rig.serve()
    await rig.export("n", "r", name="r")
    assert (node.perm, node.shared) == (Perm.CONSISTENT_READ, Perm.ALL & ~Perm.RESIZE)
    await rig.export("n", "w", name="w", writable=True)
    assert node.perm == Perm.CONSISTENT_READ | Perm.WRITE
    other = BlockBackend(rig.graph, lambda: "block device 'd'", Perm.RESIZE, Perm.ALL)
    text = (
        "Permission conflict on node 'n': permissions 'resize' are both required by block device 'd' (uses node 'n' as "
        "'root' child) and unshared by an unnamed block device (uses node 'n' as 'root' child)."
    )
    with pytest.raises(CommandError, match=f"^{re.escape(text)}$"):
        other.insert(node)
    await other.remove()


async def test_an_idle_export_is_gone_when_the_command_returns(rig: Rig) -> None:
    rig.add_node("n")
    await rig.serve()
    for mode in ("safe", "hard"):
        await rig.export("n", "e")
        await rig.exports.remove("e", mode)
        assert rig.exports.query() == []
    assert rig.deleted() == ["e", "e"]


# sockets


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ({"type": "unix", "path": "{folder}/nodir/n.sock"},
         "Failed to bind socket to {folder}/nodir/n.sock: No such file or directory"),
        ({"type": "unix", "path": "{folder}"}, "Failed to unlink socket {folder}: Is a directory"),
        ({"type": "unix", "path": "{folder}/file"}, "Failed to bind socket to {folder}/file: Address already in use"),
        ({"type": "unix", "path": "x" * 108}, f"UNIX socket path '{'x' * 108}' is too long"),
        ({"type": "inet", "host": "127.0.0.1", "port": "notaport"},
         "address resolution failed for 127.0.0.1:notaport: Servname not supported for ai_socktype"),
        ({"type": "inet", "host": "localhost", "port": "1", "ipv4": False, "ipv6": False},
         "Cannot disable IPv4 and IPv6 at same time"),
        ({"type": "inet", "host": "127.0.0.1", "port": "1", "ipv6": True},
         "address resolution failed for 127.0.0.1:1: Address family for hostname not supported"),
        ({"type": "fd", "str": "nosuch"}, "only QEMU supports file descriptor passing"),
        ({"type": "vsock", "cid": "x", "port": "1"}, "Failed to parse cid 'x'"),
    ],
)  # fmt: skip
async def test_addresses_that_cannot_be_listened_at(tmp_path: Path, address: dict[str, Any], text: str) -> None:
    (tmp_path / "file").write_text("do not delete")
    given = {
        key: value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value
        for key, value in address.items()
    }
    with pytest.raises(CommandError, match=f"^{re.escape(text.replace('{folder}', str(tmp_path)))}$"):
        await listen(given, inherited=False)
    assert (tmp_path / "file").read_text() == "do not delete"


async def test_a_stale_socket_is_replaced_and_a_new_one_is_not_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    address = {"type": "unix", "path": path}
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    first = await listen(address, inherited=False)
    second = await listen(address, inherited=False)
    first.close()
    assert os.path.exists(path)
    second.close()
    assert not os.path.exists(path)


async def test_abstract_inet_and_inherited_sockets(rig: Rig) -> None:
    rig.add_node("n")
    for address in (
        {"type": "inet", "host": "127.0.0.1", "port": "0"},
        {"type": "unix", "path": "qmpd-t", "abstract": True},
    ):
        await rig.exports.start_server(address)
        await rig.exports.stop_server()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(rig.path)
        await rig.exports.start_server({"type": "fd", "str": str(listener.fileno())}, inherited=True)
        await rig.export("n")
        assert (await rig.connect()).size == 1 << 20
        await rig.exports.stop_server()


async def test_a_range_of_ports(rig: Rig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        address: dict[str, Any] = {"type": "inet", "host": "127.0.0.1", "port": str(port)}
        with pytest.raises(CommandError, match=r"^Failed to find an available port: Address already in use$"):
            await rig.exports.start_server(address)
        if port < 65000:
            await rig.exports.start_server(address | {"to": port + 100})


# endpoints of devices


async def test_an_endpoint_serves_the_backend_of_a_device(rig: Rig, tmp_path: Path) -> None:
    node = rig.add_node("n")
    backend = BlockBackend(
        rig.graph, lambda: "block device 'd'", Perm.CONSISTENT_READ | Perm.WRITE, Perm.CONSISTENT_READ
    )
    backend.insert(node)
    made = await endpoint.factory(registry, "nbd").open(
        backend, str(tmp_path), "disk0", read_only=False, description="serial 1, 1 MiB"
    )
    assert made.path == str(tmp_path / "disk0.sock")
    assert rig.exports.query() == []

    def work() -> None:
        for name in (b"", b"disk0"):
            with Client(made.path) as client:
                assert client.ask(wire.LIST) == [(2, b"\0\0\0\0serial 1, 1 MiB"), (wire.ACK, b"")]
                client.go(name)
                client.write(0, b"guest")

    await rig.in_thread(work)
    assert node.data[:5] == b"guest"
    assert backend.stats.wr_operations == 2
    gate = node.gate = asyncio.Event()
    client = await rig.in_thread(lambda: Client(made.path).go(b""))
    client.send(wire.WRITE, 0, 5, payload=b"GUEST")
    await rig.until(lambda: node.active == 1)
    closing = asyncio.ensure_future(made.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    await rig.on_data_loop(gate.set)
    await closing
    assert not (await rig.in_thread(lambda: client.results(1)))[1].error
    client.close()
    assert not os.path.exists(made.path)
    assert node.data[:5] == b"GUEST"
    await backend.remove()


async def test_an_endpoint_that_cannot_be_made(rig: Rig, tmp_path: Path) -> None:
    backend = BlockBackend(rig.graph, lambda: "block device 'd'", Perm.CONSISTENT_READ, Perm.ALL)
    with pytest.raises(CommandError, match=r"No such file or directory$"):
        await endpoint.factory(registry, "nbd").open(backend, str(tmp_path / "no"), "d", read_only=True, description="")
    with pytest.raises(CommandError, match=r"^endpoints of type 'nosuch' are not available$"):
        endpoint.factory(registry, "nosuch")
    await backend.remove()
