"""What a detached header is good for: secrecy, control, flexibility, recovery; and the page that tells so, run."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.daemon import RawClient, running

PAGE = Path(__file__).parents[2] / "docs" / "detached-headers.md"
MiB = 1 << 20
SIZE = 4 * MiB


def script() -> str:
    """Return the commands of the page; a step that is to fail starts with `!` and must fail."""
    lines = [line[4:] for line in PAGE.read_text().splitlines() if line.startswith("    ")]
    text = "\n".join(lines).replace("\\\n", " ")
    return re.sub(r"^! (.*)$", r"if \1; then echo 'went well: \1' >&2; exit 1; fi", text, flags=re.MULTILINE)


@pytest.mark.timeout(120)
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    for peer in ("blkid", "file", "gzip", "cryptsetup"):
        need(peer)
    commands = script()
    assert commands.count("then echo") == 8
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-c", f"trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{commands}"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


class Disk:
    """A payload of old bytes and a header made for it by `blockdev-create`, in one running daemon."""

    def __init__(self, folder: Path, client: RawClient, version: int) -> None:
        self.client = client
        self.payload, self.header = folder / "payload", folder / "header"
        self.payload.write_bytes(bytes(SIZE))
        self.header.write_bytes(b"")
        client.ok("object-add", qom_type="secret", id="s", data="abc123")
        where = {"driver": "file", "filename": str(self.header)}
        options: dict[str, Any] = {"driver": "luks", "header": where, "size": SIZE, "key-secret": "s"}
        options |= {"version": version, "iterations": 1000} | ({"pbkdf": "pbkdf2"} if version == 2 else {})
        client.ok("blockdev-create", job_id="make", options=options)
        while client.ok("query-jobs")[0]["status"] != "concluded":
            pass
        assert "error" not in client.ok("query-jobs")[0]
        client.ok("job-dismiss", id="make")

    def open(self, header: Path | None = None) -> dict[str, Any]:
        file, above = ({"driver": "file", "filename": str(path)} for path in (self.payload, header or self.header))
        return self.client.command(
            "blockdev-add", driver="luks", node_name="vol", file=file, header=above, key_secret="s"
        )

    def close(self) -> None:
        self.client.ok("blockdev-del", node_name="vol")

    def io(self, command: str) -> None:
        said = self.client.ok("human-monitor-command", command_line=f'qemu-io vol "{command}"')
        assert said == "", said

    def works(self, header: Path | None = None) -> None:
        """Open the volume, find in it what was written, close it."""
        assert self.open(header) == {"return": {}}
        self.io(f"read -q -P 0 0 {SIZE // 2}")
        self.close()


@pytest.mark.parametrize("version", [1, 2])
def test_the_four_benefits(tmp_path: Path, version: int) -> None:
    need("blkid")
    need("file")
    with running(tmp_path) as daemon:
        disk = Disk(tmp_path, daemon.client(), version)
        assert disk.open() == {"return": {}}
        disk.io(f"write -q -P 0 0 {SIZE // 2}")
        disk.io(f"write -q -P 65 {SIZE // 2} {SIZE // 2}")
        disk.io("flush")
        disk.close()
        nothing_to_see(disk.payload)
        # Control.
        away = disk.header.rename(tmp_path / "away")
        assert "No such file or directory" in disk.open()["error"]["desc"]
        file = {"driver": "file", "filename": str(disk.payload)}
        reply = disk.client.command("blockdev-add", driver="luks", node_name="vol", file=file, key_secret="s")
        assert reply["error"]["desc"] == "Volume is not in LUKS format"
        away.rename(disk.header)
        disk.works()
        # Flexibility.
        assert disk.payload.stat().st_size == SIZE
        # Recovery.
        backup = tmp_path / "backup"
        command = ["cryptsetup", "--disable-locks", "luksHeaderBackup", disk.header, "--header-backup-file", backup]
        subprocess.run([str(part) for part in command], check=True)
        damage(disk, version)
        disk.works(backup)
        disk.header.write_bytes(backup.read_bytes())
        disk.works()


def nothing_to_see(payload: Path) -> None:
    """Check that the payload looks like noise to the tools, and to the eye of a statistician."""
    assert subprocess.run(["blkid", "-p", payload], capture_output=True).returncode == 2
    kind = subprocess.run(["file", "-b", payload], capture_output=True, text=True, check=True).stdout.strip()
    assert kind == "data" or payload.read_bytes()[:2] != b"LU", kind
    data = payload.read_bytes()
    assert b"LUKS" not in data
    counts = [data.count(byte) for byte in range(256)]
    expected = len(data) / 256
    chi_squared = sum((count - expected) ** 2 / expected for count in counts)
    assert 140 < chi_squared < 400  # 255 on average, 22.6 of standard deviation
    sectors = {data[at : at + 16] for at in range(0, len(data), 16)}
    assert len(sectors) == len(data) // 16  # no block of a cipher twice


def damage(disk: Disk, version: int) -> None:
    """Flip bits one at a time: in the fields, which LUKS2 has twice, and in the key material, which nobody has."""
    rng = random.Random(version)
    whole = disk.header.read_bytes()
    in_material = {1: (4096, 4096 + 64 * 4000), 2: (32768, 32768 + 64 * 4000)}[version]
    fatal = 0
    for low, high in [(0, 8), (208, 208 + 40), in_material, in_material, *([(0, 16384)] if version == 2 else [])]:
        spoiled = bytearray(whole)
        spoiled[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        disk.header.write_bytes(spoiled)
        reply = disk.open()
        if "return" in reply:
            disk.close()
        else:
            fatal += 1
    assert fatal == (2 if version == 2 else 4)
