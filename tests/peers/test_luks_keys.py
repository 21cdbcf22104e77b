"""Passphrases that qmpd-img adds and erases are added and erased for QEMU and cryptsetup as well."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support.daemon import program

OLD, NEW = "abc123", "newpass"
OBJECTS = ["--object", f"secret,id=s,data={OLD}", "--object", f"secret,id=n,data={NEW}"]


def amend(image: Path, options: str, secret: str = "s") -> None:
    source = f"driver=luks,key-secret={secret},file.filename={image}"
    command = [program("qmpd-img"), "amend", *OBJECTS, "--image-opts", source, "-o", options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def qemu_opens(image: Path, secret: str) -> bool:
    source = f"driver=luks,key-secret={secret},file.filename={image}"
    command = ["qemu-img", "map", "--output=json", *OBJECTS, "--image-opts", source]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def cryptsetup_opens(image: Path, passphrase: str) -> bool:
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(image)]
    return subprocess.run(command, input=passphrase.encode(), capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("slot", [1, 6, 7])
def test_a_rotated_passphrase_is_the_only_one_that_opens(tmp_path: Path, slot: int) -> None:
    need("qemu-img", "cryptsetup")
    image = tmp_path / "v.luks"
    options = "key-secret=s,iter-time=10"
    subprocess.run(
        ["qemu-img", "create", "-q", *OBJECTS[:2], "-f", "luks", "-o", options, str(image), "1M"],
        check=True,
        timeout=60,
    )
    amend(image, f"state=active,new-secret=n,keyslot={slot},iter-time=10")
    assert [qemu_opens(image, name) for name in ("s", "n")] == [True, True]
    assert [cryptsetup_opens(image, text) for text in (OLD, NEW)] == [True, True]
    amend(image, "state=inactive,old-secret=s", secret="n")
    assert [qemu_opens(image, name) for name in ("s", "n")] == [False, True]
    assert [cryptsetup_opens(image, text) for text in (OLD, NEW)] == [False, True]
