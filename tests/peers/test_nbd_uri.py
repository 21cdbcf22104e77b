"""The URI of an export, as the daemon and qmpd-ctl tell it, is one that libnbd takes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.daemon import program
from tests.support.nbd_servers import qemu, qmpd
from tests.support.peers import find

NAMES = ("disk", "a b/c?d&e#é", "")


def size(uri: str) -> str:
    return subprocess.run(
        [str(find("nbdinfo")), "--size", uri], capture_output=True, text=True, check=True, timeout=30
    ).stdout


def test_the_reply_carries_the_uri_where_it_was_asked_for(tmp_path: Path) -> None:
    need("nbdinfo")
    for data in ({"type": "unix", "path": str(tmp_path / "n &.sock")}, {"type": "inet", "host": "", "port": "0"}):
        folder = tmp_path / data["type"]
        with qmpd(folder, "--blockdev", "null-co,node-name=disk,size=1048576") as client:
            rest: dict[str, Any] = {key: value for key, value in data.items() if key != "type"}
            client.ok("nbd-server-start", addr={"type": data["type"], "data": rest})
            for at, name in enumerate(NAMES):
                members = {"type": "nbd", "id": f"e{at}", "node-name": "disk", "name": name, "report-uri": True}
                reply = client.send({"execute": "block-export-add", "arguments": members})["return"]
                assert size(reply["uri"]) == "1048576\n", reply
            members = {"type": "nbd", "id": "plain", "node-name": "disk", "name": "plain"}
            assert client.send({"execute": "block-export-add", "arguments": members}) == {"return": {}}


@pytest.mark.parametrize("kind", ["qmpd", "qemu"])
def test_qmpd_ctl_prints_it(kind: str, tmp_path: Path) -> None:
    need("nbdinfo", "qemu-storage-daemon")
    disk = ["--blockdev", "null-co,node-name=disk,size=1048576"]
    # A monitor of its own for qmpd-ctl: QEMU's take one client at a time.
    second = ["--chardev", f"socket,id=q2,path={tmp_path / 'q2.sock'},server=on,wait=off", "--monitor", "chardev=q2"]
    with (qmpd if kind == "qmpd" else qemu)(tmp_path / "d", *disk, *second):
        command = [program("qmpd-ctl"), "export", "--socket", str(tmp_path / "q2.sock"), "disk"]
        listen = ["--listen", str(tmp_path / "n.sock")]
        wrong = subprocess.run(
            [*command[:-1], "nosuch", *listen], capture_output=True, text=True, check=False, timeout=30
        )
        assert wrong.returncode == 1
        assert "nosuch" in wrong.stderr
        first = subprocess.run([*command, *listen], capture_output=True, text=True, check=True, timeout=30).stdout
        assert first == f"nbd+unix:///disk?socket={tmp_path / 'n.sock'}\n"
        assert size(first.strip()) == "1048576\n"
        if kind == "qmpd":
            more = [*command, "--name", "other", "--writable"]
            other = subprocess.run(more, capture_output=True, text=True, check=True, timeout=30).stdout
            assert size(other.strip()) == "1048576\n"
