"""A daemon's memory, searched as a core dump of it would be: what is left of passphrases and volume keys.

Best effort: what the interpreter and OpenSSL copy on the way in cannot be overwritten for sure. The
strings searched for are random ones of one run, so that a hit is no accident.
"""

from __future__ import annotations

import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.luks.detect import read_header
from tests.support.daemon import Daemon, running
from tests.unit.luks.memory import MemoryNode, edge

MiB = 1 << 20
PART = 16
"""Bytes of a secret that are searched for: a shorter piece is no use to anybody."""


def memory(pid: int) -> dict[str, bytes]:
    """Return every mapping of the process that can be written to, by name; pages left out of dumps are included."""
    found: dict[str, bytes] = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)", line)
            assert match is not None
            if match[3][0] != "r" or "w" not in match[3] or match[4].startswith("[v"):
                continue
            low, high = int(match[1], 16), int(match[2], 16)
            parts = []
            try:
                mem.seek(low)
                while low < high:
                    part = mem.read(min(high - low, MiB))
                    if not part:
                        break
                    parts.append(part)
                    low += len(part)
            except OSError:
                continue
            found[f"{match[1]} {match[4]}"] = b"".join(parts)
    return found


def hits(daemon: Daemon, needle: bytes) -> list[str]:
    """Return where in the daemon's memory the first bytes of `needle` are."""
    return [name for name, data in memory(daemon.process.pid).items() if needle[:PART] in data]


async def volume_key(header: Path, passphrase: str) -> bytes:
    source = edge(MemoryNode(header.read_bytes()))
    volume = await read_header(source, detached=True)
    with SecretBytes(passphrase.encode()) as secret:
        unlocked = await volume.unlock(source, secret)
    return bytes(unlocked.key)


@pytest.mark.parametrize("source", ["file", "data"])
@pytest.mark.parametrize("version", [1, 2])
async def test_nothing_is_left_when_secret_and_node_are_gone(tmp_path: Path, version: int, source: str) -> None:
    passphrase = secrets.token_hex(24)
    (tmp_path / "key").write_text(passphrase)
    (tmp_path / "payload").write_bytes(bytes(MiB))
    header = tmp_path / "header"
    header.write_bytes(b"")
    replies: list[Any] = []
    with running(tmp_path) as daemon:
        client = daemon.client()

        def ok(name: str, **arguments: Any) -> None:
            replies.append(client.ok(name, **arguments))

        file, above = ({"driver": "file", "filename": str(tmp_path / name)} for name in ("payload", "header"))
        given = {"file": str(tmp_path / "key")} if source == "file" else {"data": passphrase}
        ok("object-add", qom_type="secret", id="s", **given)
        options: dict[str, Any] = {"driver": "luks", "header": above, "size": MiB, "key-secret": "s"}
        options |= {"version": version, "iterations": 1000} | ({"pbkdf": "pbkdf2"} if version == 2 else {})
        ok("blockdev-create", job_id="make", options=options)
        while client.ok("query-jobs")[0]["status"] != "concluded":
            pass
        ok("job-dismiss", id="make")
        ok("blockdev-add", driver="luks", node_name="vol", file=file, header=above, key_secret="s")
        ok("human-monitor-command", command_line='qemu-io vol "write -q -P 5 0 1M"')
        ok("query-named-block-nodes")
        key = await volume_key(header, passphrase)
        assert hits(daemon, key), "the search does not find the key of an open volume"
        arguments = Path(f"/proc/{daemon.process.pid}/cmdline").read_bytes()
        ok("blockdev-del", node_name="vol")
        ok("object-del", id="s")
        ok("query-status")
        assert hits(daemon, passphrase.encode()) == []
        assert hits(daemon, key) == []
        assert hits(daemon, key[len(key) // 2 :]) == []
        said = f"{replies}{client.events}{daemon.log}"
    for secret in (passphrase, key.hex()):
        assert secret not in said
        assert secret.encode() not in arguments


def test_a_core_dump_is_not_made_at_all(tmp_path: Path) -> None:
    """The daemon's limit for core files is zero, and other processes of its user may not trace it."""
    with running(tmp_path) as daemon:
        limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert line.split()[4:6] == ["0", "0"], line
        owner = subprocess.run(["stat", "-c", "%U", f"/proc/{daemon.process.pid}/mem"], capture_output=True, text=True)
        assert owner.stdout.strip() == "root"
