"""A costly key slot keeps nobody waiting who did not ask for it, and two of them do not cost twice the memory."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support.daemon import Daemon, RawClient, running
from tests.support.peers import find


def formatted(folder: Path) -> tuple[Path, int]:
    """Return a header with one argon2id slot of cryptsetup's default cost, and that slot's memory in bytes."""
    need("cryptsetup")
    header, payload = folder / "h.img", folder / "p.img"
    payload.write_bytes(bytes(1 << 20))
    command = [find("cryptsetup") or "", "luksFormat", "--type", "luks2", "--batch-mode", "--key-file", "-"]
    command += ["--disable-locks", "--header", str(header), str(payload)]
    subprocess.run(command, input=b"abc123", check=True, timeout=120)
    dump = subprocess.run(
        [command[0], "luksDump", "--dump-json-metadata", str(header)], check=True, capture_output=True, timeout=60
    )
    (slot,) = json.loads(dump.stdout)["keyslots"].values()
    assert slot["kdf"]["type"] == "argon2id"
    return header, slot["kdf"]["memory"] << 10


def start_opening(client: RawClient, header: Path, name: str) -> None:
    """Send a blockdev-add and do not wait."""
    node = {"driver": "luks", "node-name": name, "key-secret": "s"}
    files = {"header": str(header), "file": str(header.with_name("p.img"))}
    children = {key: {"driver": "file", "filename": value, "read-only": True} for key, value in files.items()}
    arguments = node | children | {"read-only": True}
    client._socket.sendall(json.dumps({"execute": "blockdev-add", "arguments": arguments}).encode() + b"\n")


def peak(daemon: Daemon) -> int:
    """Return the most memory the daemon has ever held resident, in bytes."""
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(row.split()[1]) << 10


@pytest.mark.timeout(120)
def test_two_unlocks_of_default_cost_one_after_the_other_while_a_third_client_is_answered(tmp_path: Path) -> None:
    header, memory = formatted(tmp_path)
    with running(tmp_path, "-object", "secret,id=s,data=abc123") as daemon:
        first, second, other = daemon.client(), daemon.client(), daemon.client()
        before = peak(daemon)
        start_opening(first, header, "one")
        time.sleep(0.05)
        start_opening(second, header, "two")
        took: list[float] = []
        done: dict[str, float] = {}
        began = time.monotonic()
        while len(done) < 2:
            asked = time.monotonic()
            other.ok("query-status")
            took.append(time.monotonic() - asked)
            for name, client in (("one", first), ("two", second)):
                if name not in done and not client.silent(0):
                    assert client.receive() == {"return": {}}
                    done[name] = time.monotonic() - began
            time.sleep(0.002)
        took.sort()
        percentile = took[int(len(took) * 0.99)]
        print(f"{len(took)} answers, p99 {percentile * 1e3:.1f} ms, unlocked after {done}, slot {memory >> 20} MiB")
        assert len(took) > 50
        assert percentile < 0.050
        assert done["two"] > 1.5 * done["one"]  # it had its turn after the first
        assert memory <= peak(daemon) - before < 1.25 * memory
        assert {node["node-name"] for node in other.ok("query-named-block-nodes")} >= {"one", "two"}
