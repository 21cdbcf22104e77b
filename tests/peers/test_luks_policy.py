"""The option luks-policy of all three programs: refusals come before any passphrase is used, weakness is told."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.formats.luks2_json import Kdf
from qmpd.luks.create2 import seal
from tests.gen import luks2 as gen
from tests.support.daemon import RawClient, program, running

RULE = "pbkdf2-min-iterations=5000"
REFUSAL = "LUKS policy: the keyslot 0 iterations is 1000, the rule is pbkdf2-min-iterations=5000"


def volume(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make a LUKS2 volume whose only slot takes 1000 iterations; return file and header options."""
    (folder / "header").write_bytes(gen.header())
    (folder / "payload").write_bytes(bytes(65536))
    file, header = ({"driver": "file", "filename": str(folder / name)} for name in ("payload", "header"))
    return file, header


def add(client: RawClient, folder: Path, passphrase: str) -> dict[str, Any]:
    file, header = volume(folder)
    client.ok("object-add", qom_type="secret", id="s", data=passphrase)
    return client.command(
        "blockdev-add", driver="luks", node_name="vol", file=file, header=header, key_secret="s", read_only=True
    )


@pytest.mark.parametrize("name", ["qmpd", "qmpd-storage-daemon"])
def test_a_volume_below_the_floor_is_refused_whatever_the_passphrase(tmp_path: Path, name: str) -> None:
    with running(tmp_path, "--luks-policy", RULE, name=name) as daemon:
        reply = add(daemon.client(), tmp_path, "wrong")
        assert reply["error"]["desc"] == REFUSAL
    (tmp_path / "policy.toml").write_text('versions = [1, 2]\nciphers = ["aes-*-xts-plain64"]\n')
    with running(tmp_path, "--luks-policy", str(tmp_path / "policy.toml"), name=name) as daemon:
        assert add(daemon.client(), tmp_path, "abc123") == {"return": {}}


def test_a_policy_that_makes_no_sense_ends_the_start(tmp_path: Path) -> None:
    for name in ("qmpd", "qmpd-storage-daemon"):
        command = [program(name), "--luks-policy", "colour=red"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 1
        assert "LUKS policy: there is no rule 'colour'" in done.stderr


def test_images_are_held_to_it_offline(tmp_path: Path) -> None:
    volume(tmp_path)
    (tmp_path / "key").write_text("abc123")
    secret = ["--object", f"secret,id=s,file={tmp_path / 'key'}"]
    opts = f"driver=luks,key-secret=s,file.filename={tmp_path / 'payload'},header.filename={tmp_path / 'header'}"

    def img(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program("qmpd-img"), *words], capture_output=True, text=True, timeout=60)

    copy = ["dd", *secret, "--image-opts", "-O", "raw", f"if={opts}", f"of={tmp_path / 'out'}"]
    assert img(*copy).returncode == 0
    refused = img("--luks-policy", RULE, *copy)
    assert (refused.returncode, REFUSAL in refused.stderr) == (1, True), refused.stderr
    assert "no rule" in img("--luks-policy", "x=1", "info", "nothing").stderr
    create = ["create", "-q", *secret, "-f", "luks", "-o"]
    made = img("--luks-policy", RULE, *create, "key-secret=s,iterations=1000", str(tmp_path / "new"), "1M")
    assert "the new keyslot iterations is 1000, the rule is pbkdf2-min-iterations=5000" in made.stderr
    forced = "key-secret=s,iterations=1000,force=on"
    assert img("--luks-policy", RULE, *create, forced, str(tmp_path / "new"), "1M").returncode == 0
    made = img("--luks-policy", RULE, *create, "key-secret=s,iter-time=1", str(tmp_path / "new"), "1M")
    assert made.returncode == 0, made.stderr
    shown = img("--luks-policy", RULE, "info", str(tmp_path / "new"))
    assert "iters:" in shown.stdout


async def test_a_weak_slot_is_told_by_an_event(tmp_path: Path) -> None:
    tree = gen.tree()
    with SecretBytes(b"abc123") as passphrase:
        weak = Kdf("pbkdf2", "", hash="sha256", iterations=500)
        slot, material = await seal(gen.KEY, passphrase, weak, "sha256", 2 * gen.COPY)
    tree["keyslots"]["0"] = slot
    header = bytearray(gen.header(tree))
    header[2 * gen.COPY : 2 * gen.COPY + len(material)] = material
    file, where = volume(tmp_path)
    (tmp_path / "header").write_bytes(header)
    with running(tmp_path) as daemon:
        client = daemon.client()
        client.ok("object-add", qom_type="secret", id="s", data="abc123")
        client.ok("blockdev-add", driver="luks", node_name="vol", file=file, header=where, key_secret="s")
        told = {"field": "keyslot 0 iterations", "value": 500, "rule": "pbkdf2-min-iterations=1000"}
        assert client.wait_event("X_LUKS_POLICY")["data"] == {"node-name": "vol", **told}
        assert "the keyslot 0 iterations is 500, below pbkdf2-min-iterations=1000" in daemon.log
