"""Headers bound to their payloads, and headers that several payloads share: on a real daemon, with QEMU's images."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import need
from tests.support.daemon import RawClient, running

MiB = 1 << 20
OTHER = "is none of those that the header is bound to; 'force' opens it all the same"


def qemu_img(*arguments: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def make_header(client: RawClient, folder: Path, version: int) -> Path:
    """Make a detached header and open it as node `header`."""
    header = folder / "header.luks"
    header.write_bytes(b"")
    client.ok("object-add", qom_type="secret", id="sec0", data="abc123")
    client.ok("blockdev-add", driver="file", node_name="header", filename=str(header))
    options: dict[str, Any] = {"driver": "luks", "header": "header", "size": MiB, "key-secret": "sec0"}
    options |= {"version": version, "iterations": 1000} | ({"pbkdf": "pbkdf2"} if version == 2 else {})
    client.ok("blockdev-create", job_id="make", options=options)
    while client.ok("query-jobs")[0]["status"] != "concluded":
        pass
    assert "error" not in client.ok("query-jobs")[0]
    client.ok("job-dismiss", id="make")
    return header


def add(client: RawClient, payload: str, name: str = "vol", **more: Any) -> dict[str, Any]:
    node = {"driver": "luks", "node_name": name, "file": payload, "header": "header", "key_secret": "sec0"}
    return client.command("blockdev-add", **node, **more)


def details(client: RawClient, name: str = "vol") -> dict[str, Any]:
    (info,) = [one for one in client.ok("query-named-block-nodes") if one["node-name"] == name]
    return dict(info["image"]["format-specific"]["data"])


@pytest.mark.parametrize("version", [1, 2])
def test_two_qcow2_payloads_of_one_size_are_not_taken_for_each_other(tmp_path: Path, version: int) -> None:
    need("qemu-img")
    with running(tmp_path) as daemon:
        client = daemon.client()
        header = make_header(client, tmp_path, version)
        for name in ("mine", "other"):
            image = tmp_path / f"{name}.qcow2"
            qemu_img("create", "-q", "-f", "qcow2", image, str(2 * MiB))
            file = {"driver": "file", "filename": str(image)}
            client.ok("blockdev-add", driver="qcow2", node_name=name, file=file)
        assert "return" in add(client, "mine")
        assert "binding" not in details(client)
        for _ in range(2):
            assert client.ok("luks-payload-bind", node_name="vol", mark=True) == {"binding": "id"}
        assert details(client)["binding"] == "id"
        client.ok("blockdev-del", node_name="vol")
        reply = add(client, "other")
        assert reply["error"]["desc"] == f"The payload, of {2 * MiB} bytes and with no id, {OTHER}"
        assert "return" in add(client, "other", force=True)
        assert details(client)["binding"] == "forced"
        assert client.ok("luks-payload-bind", node_name="vol", mark=True) == {"binding": "id"}
        for name in ("vol", "mine", "other"):
            client.ok("blockdev-del", node_name=name)
        # QEMU rewrites the header, writes data, and keeps what it does not know.
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", tmp_path / "mine.qcow2"], check=True)
        qemu_img("amend", "-f", "qcow2", "-o", "lazy_refcounts=on", tmp_path / "mine.qcow2")
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", tmp_path / "mine.qcow2")
        for name in ("mine", "other"):
            qemu_img("check", "-q", tmp_path / f"{name}.qcow2")
            file = {"driver": "file", "filename": str(tmp_path / f"{name}.qcow2")}
            client.ok("blockdev-add", driver="qcow2", node_name=name, file=file)
            assert "return" in add(client, name)
            assert details(client)["binding"] == "id"
            if name == "mine":
                client.ok("blockdev-del", node_name="vol")
        assert client.ok("luks-payload-unbind", node_name="vol") == {"removed": 2}
        assert "binding" not in details(client)
        dump = subprocess.run(["cryptsetup", "--disable-locks", "luksDump", header], capture_output=True, check=True)
        assert b"abc123" not in dump.stdout
    assert [path.name for path in tmp_path.glob("*.binding*")] == []


@pytest.mark.parametrize("version", [1, 2])
def test_raw_payloads_are_bound_by_their_size(tmp_path: Path, version: int) -> None:
    with running(tmp_path) as daemon:
        client = daemon.client()
        header = make_header(client, tmp_path, version)
        for name, size in (("mine", MiB), ("other", 2 * MiB)):
            (tmp_path / name).write_bytes(b"\x5a" * size)
            file = {"driver": "file", "filename": str(tmp_path / name)}
            client.ok("blockdev-add", driver="raw", node_name=name, file=file)
        assert "return" in add(client, "mine")
        reply = client.command("luks-payload-bind", node_name="vol", mark=True)
        assert reply["error"]["desc"] == "Driver 'raw' cannot store an id: bind the payload by its size"
        assert client.ok("luks-payload-bind", node_name="vol") == {"binding": "size"}
        assert details(client)["binding"] == "size"
        client.ok("blockdev-del", node_name="vol")
        reply = add(client, "other")
        assert reply["error"]["desc"] == f"The payload, of {2 * MiB} bytes and with no id, {OTHER}"
        assert "return" in add(client, "mine")
        client.ok("blockdev-del", node_name="vol")
        damage(client, header, version)
        assert add(client, "mine")["error"]["desc"].endswith(OTHER)
    for name in ("mine", "other"):
        assert set((tmp_path / name).read_bytes()) == {0x5A}
    assert "abc123" not in daemon.log


def damage(client: RawClient, header: Path, version: int) -> None:
    """Change a record as somebody would who has no passphrase: its size, and for LUKS2 with the checksum made right."""
    if version == 1:
        place = header.with_name(header.name + ".binding")
        tree = json.loads(place.read_text())
        assert place.stat().st_mode & 0o777 == 0o600
        tree["records"][0]["mac"] = "A" * 43 + "="
        place.write_text(json.dumps(tree))
        return
    client.ok("blockdev-del", node_name="header")
    command = ["cryptsetup", "--disable-locks", "token", "export", "--token-id", "0", header]
    tree = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (tree["type"], tree["records"][0]["size"]) == ("qmpd-payload-binding", str(MiB))
    tree["records"][0]["mac"] = "A" * 43 + "="
    command = ["cryptsetup", "--disable-locks", "token", "import", "--token-replace", "--token-id", "0", header]
    subprocess.run([str(part) for part in command], input=json.dumps(tree).encode(), capture_output=True, check=True)
    client.ok("blockdev-add", driver="file", node_name="header", filename=str(header))


def test_who_cannot_be_bound_is_told_so(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        client = daemon.client()
        make_header(client, tmp_path, 2)
        (tmp_path / "mine").write_bytes(bytes(MiB))
        client.ok("blockdev-add", driver="file", node_name="mine", filename=str(tmp_path / "mine"))
        reply = client.command("luks-payload-bind", node_name="mine")
        assert reply["error"]["desc"] == "Node 'mine' is no LUKS volume"
        assert "return" in add(client, "mine")
        client.ok("luks-payload-bind", node_name="vol")
        reply = client.command("block_resize", node_name="vol", size=2 * MiB)
        assert "bound to: unbind it first" in reply["error"]["desc"]
        client.ok("luks-payload-unbind", node_name="vol")
        client.ok("block_resize", node_name="vol", size=2 * MiB)


def test_payloads_under_one_key_are_warned_of(tmp_path: Path) -> None:
    """Opening them is no danger yet; writing to one of them is, and is told once."""
    with running(tmp_path) as daemon:
        client = daemon.client()
        make_header(client, tmp_path, 2)
        for name in ("a", "b", "c"):
            (tmp_path / name).write_bytes(bytes(MiB))
            client.ok("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / name))
        assert "return" in add(client, "a", "va")
        assert "shared-key" not in details(client, "va")
        assert "return" in add(client, "b", "vb")
        assert (details(client, "va")["shared-key"], details(client, "vb")["shared-key"]) == (["vb"], ["va"])
        assert [one for one in client.events if one["event"].startswith("X_LUKS")] == []
        assert client.ok("human-monitor-command", command_line='qemu-io va "write -q 0 512"') == ""
        assert client.wait_event("X_LUKS_SHARED_KEY")["data"] == {"node-name": "va", "shared-with": ["vb"]}
        client.ok("device_add", driver="virtio-blk-pci", id="d", drive="va")
        assert client.wait_event("X_LUKS_SHARED_KEY")["data"] == {"node-name": "va", "shared-with": ["vb"]}
        assert "return" in add(client, "c", "vc")
        assert client.wait_event("X_LUKS_SHARED_KEY")["data"] == {"node-name": "vc", "shared-with": ["va"]}
        client.ok("blockdev-del", node_name="vb")
        assert details(client, "vc")["shared-key"] == ["va"]
        (other,) = [tmp_path / "copy.luks"]
        other.write_bytes((tmp_path / "header.luks").read_bytes())
        (tmp_path / "e").write_bytes(bytes(MiB))
        file, copied = ({"driver": "file", "filename": str(tmp_path / name)} for name in ("e", "copy.luks"))
        client.ok("blockdev-add", driver="luks", node_name="ve", file=file, header=copied, key_secret="sec0")
        assert details(client, "ve")["shared-key"] == ["va", "vc"]
