"""The hotplug sequence with `--guest plug=nbd:DIR`: step 7 makes a disk that other programs read and write."""

from __future__ import annotations

import json
import random
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from qmpd.cli.steps import read_steps
from tests.peers.conftest import need
from tests.support.daemon import RawClient, listens, program, running
from tests.support.nbd_servers import wait_for

SIZE = 16 << 20
SECRET = ("--object", "secret,id=s,data=abc123")
SLIP = "libvirt-2-format-secret"


def run(*words: str | Path) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def steps(folder: Path) -> list[dict[str, Any]]:
    """Return the messages of the sequence, with files in `folder` and the secret of step 6 that step 1 adds."""
    text = resources.files("qmpd.cli.ctl").joinpath("hotplug.txt").read_text()
    messages = [json.dumps(dict(step.message)) for step in read_steps(text)]
    return [
        json.loads(one.replace("/path/to", str(folder)).replace(SLIP, "libvirt-4-format-secret")) for one in messages
    ]


def unplug(monitor: RawClient) -> None:
    """Take everything away again, in reverse."""
    monitor.ok("device_del", id="virtio-disk2")
    while monitor.wait_event("DEVICE_DELETED")["data"].get("device") != "virtio-disk2":
        pass
    for name in ("3-format", "2-format", "2-storage", "1-format", "1-storage"):
        monitor.ok("blockdev-del", node_name=f"libvirt-{name}")
    monitor.ok("object-del", id="libvirt-4-format-secret")
    assert monitor.ok("query-named-block-nodes") == []


@pytest.mark.parametrize("made_by", ["qmpd-img", "both"])
def test_nbdcopy_fills_the_plugged_disk_and_qemu_reads_it(made_by: str, tmp_path: Path) -> None:
    """The header by qmpd-img, as QEMU's tool makes none; the payload by either. The socket goes with the disk."""
    need("qemu-img", "nbdcopy", "nbdinfo", "cryptsetup")
    header, payload = tmp_path / "test-header.img", tmp_path / "test-payload.qcow2"
    options = "cipher-alg=aes-256,cipher-mode=xts,key-secret=s,detached-header=true,iter-time=10"
    run(program("qmpd-img"), "create", "-q", *SECRET, "-f", "luks", "-o", options, header)
    tool = program("qmpd-img") if made_by == "qmpd-img" else "qemu-img"
    run(tool, "create", "-q", "-f", "qcow2", payload, str(SIZE))
    content = tmp_path / "content"
    content.write_bytes(random.Random(made_by).randbytes(SIZE))
    plug = tmp_path / "plug"
    plug.mkdir()
    with running(tmp_path, "--guest", f"plug=nbd:{plug},unplug=ack") as daemon:
        monitor = daemon.client()
        for message in steps(tmp_path):
            assert monitor.send(message) == {"return": {}}
        sock = plug / "virtio-disk2.sock"
        wait_for(sock)
        uri = f"nbd+unix:///?socket={sock}"
        assert run("nbdinfo", "--size", uri).strip() == str(SIZE)
        run("nbdcopy", "--flush", content, uri)
        run("nbdcopy", uri, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content.read_bytes()
        unplug(monitor)
        assert not sock.exists()
        assert not listens(sock)
    opened = (
        "driver=luks,key-secret=s,file.driver=qcow2,file.file.driver=file,"
        f"file.file.filename={payload},header.driver=file,header.filename={header}"
    )
    run("qemu-img", "convert", *SECRET, "--image-opts", "-O", "raw", opened, tmp_path / "read")
    assert (tmp_path / "read").read_bytes() == content.read_bytes()
    run("qemu-img", "check", "-q", payload)
    run("cryptsetup", "luksDump", header)
