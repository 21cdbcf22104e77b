"""Transactions of bitmap actions: what QEMU's daemon replies, and what is left of those that fail."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proof
from tests.peers.conftest import need
from tests.support.daemon import RawClient
from tests.support.nbd_servers import qemu, qmpd

NAMES = ("a", "b", "c", "p")
NODES = ("q", "m")


def draw(chance: random.Random) -> dict[str, Any]:
    """Return an action that often cannot be done; "enable" is not among them, QEMU crashes where it fails."""
    kind = chance.choice(("add", "add", "remove", "clear", "disable", "merge", "merge", "snapshot", "abort"))
    if kind == "abort" and chance.random() < 0.6:
        kind = "add"
    node, name = chance.choice(NODES), chance.choice(NAMES)
    if kind == "abort":
        return {"type": "abort", "data": {}}
    if kind == "snapshot":
        return {"type": "blockdev-snapshot-internal-sync", "data": {"device": node, "name": chance.choice("xyz")}}
    data: dict[str, Any] = {"node": node, "name": name}
    if kind == "add":
        data["granularity"] = chance.choice((512, 4096, 65536))
        data["disabled"] = chance.random() < 0.3
        data["persistent"] = name == "p" and node == "q"
    if kind == "merge":
        other = chance.choice(NAMES)
        source = other if chance.random() < 0.5 else {"node": chance.choice(NODES), "name": other}
        data = {"node": node, "target": name, "bitmaps": [source, chance.choice(NAMES)]}
    return {"type": f"block-dirty-bitmap-{kind}", "data": data}


def state(client: RawClient) -> Any:
    """Return all bitmaps with their digests, and the names of the snapshots."""
    found: list[Any] = []
    for node in client.ok("query-named-block-nodes", flat=True):
        if node["node-name"] not in NODES:
            continue
        for bitmap in node.get("dirty-bitmaps", ()):
            which = {"node": node["node-name"], "name": bitmap["name"]}
            digest = client.send({"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": which})
            found.append((which, bitmap, digest))
        found.append([(one["id"], one["name"]) for one in node["image"].get("snapshots", ())])
    return found


def converse(client: RawClient, folder: Path, rounds: int) -> list[Any]:
    file = {"driver": "file", "filename": str(folder / "q.qcow2")}
    client.ok("blockdev-add", driver="qcow2", node_name="q", file=file)
    client.ok("blockdev-add", driver="null-co", node_name="m", size=4 << 20)
    chance = random.Random(7)
    seen = []
    for _ in range(rounds):
        actions = [draw(chance) for _ in range(chance.randint(1, 5))]
        arguments: dict[str, Any] = {"actions": actions}
        if chance.random() < 0.1:
            arguments["properties"] = {"completion-mode": chance.choice(("individual", "grouped"))}
        reply = client.send({"execute": "transaction", "arguments": arguments})
        seen.append((actions, json.loads(re.sub(r"#block\d+", "#block", json.dumps(reply))), state(client)))
    return seen


@pytest.mark.timeout(120)
def test_transactions_do_all_or_nothing_as_qemu_does(proof: Proof, tmp_path: Path) -> None:
    need("qemu-storage-daemon", "qemu-img", "qemu-io")
    image = tmp_path / "first.qcow2"
    for command in (
        f"qemu-img create -q -f qcow2 {image} 4M",
        f"qemu-img bitmap --add -g 4k {image} p",
        f"qemu-io -f qcow2 -c 'write -q 1M 100k' {image}",
    ):
        subprocess.run(command, shell=True, check=True)
    rounds = proof.count(400)
    seen = []
    for name, server in (("qemu", qemu), ("qmpd", qmpd)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "q.qcow2").write_bytes(image.read_bytes())
        with server(folder) as client:
            seen.append(converse(client, folder, rounds))
        subprocess.run(["qemu-img", "check", "-q", str(folder / "q.qcow2")], check=True)
    for theirs, ours in zip(*seen, strict=True):
        assert ours == theirs
    done = sum("return" in reply for _, reply, _ in seen[1])
    assert 0 < done < rounds
    proof.record("transactions", rounds=rounds, done=done)
