"""Images that qmpd-img makes, in the eyes of qemu-img and cryptsetup; and the document's own commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support.daemon import program
from tests.support.peers import find

SECRET = "secret,id=sec0,data=abc123"


def img(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("qmpd-img"), *args], capture_output=True, text=True, timeout=60)


def made(*args: str) -> None:
    done = img(*args)
    assert done.returncode == 0, done.stderr


def qemu_img(*args: str) -> str:
    return subprocess.run(["qemu-img", *args], check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_documents_own_creation_commands(tmp_path: Path) -> None:
    """What `qemu-img create` of QEMU 10.0.2 refuses: a detached header, as the document prints it."""
    need("qemu-img", "cryptsetup")
    header, payload = tmp_path / "test-header.img", tmp_path / "test-payload.qcow2"
    options = ["-o", "cipher-alg=aes-256,cipher-mode=xts", "-o", "key-secret=sec0,iter-time=10"]
    made("create", "--object", SECRET, "-f", "luks", *options, "-o", "detached-header=true", str(header))
    made("create", "-f", "qcow2", str(payload), "200G")
    volume = {
        "driver": "luks",
        "key-secret": "sec0",
        "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(payload)}},
        "header": {"driver": "file", "filename": str(header)},
    }
    info = json.loads(qemu_img("info", "--output=json", "--object", SECRET, "json:" + json.dumps(volume)))
    assert info["virtual-size"] == 200 << 30
    assert info["format-specific"]["data"]["detached-header"] is True
    qemu_img("check", str(payload))
    subprocess.run(
        [str(find("cryptsetup")), "open", "--test-passphrase", "--type", "luks1", str(header)],
        input=b"abc123",
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("cluster_size=4096,lazy_refcounts=on", {"compat": "1.1", "lazy-refcounts": True, "refcount-bits": 16}),
        ("compat=0.10", {"compat": "0.10", "refcount-bits": 16}),
        ("compat=1.1,refcount_bits=1", {"compat": "1.1", "lazy-refcounts": False, "refcount-bits": 1}),
    ],
)
def test_qcow2_options(tmp_path: Path, options: str, shown: dict[str, object]) -> None:
    need("qemu-img")
    image = tmp_path / "i.qcow2"
    made("create", "-q", "-f", "qcow2", "-o", options, str(image), "10M")
    info = json.loads(qemu_img("info", "--output=json", str(image)))
    data = info["format-specific"]["data"]
    assert info["virtual-size"] == 10 << 20
    assert {key: data[key] for key in shown} == shown
    qemu_img("check", str(image))


def test_whole_luks_volume(tmp_path: Path) -> None:
    need("qemu-img")
    image = tmp_path / "v.luks"
    made("create", "-q", "--object", SECRET, "-f", "luks", "-o", "key-secret=sec0,iter-time=10", str(image), "1M")
    info = json.loads(qemu_img("info", "--output=json", str(image)))
    assert (info["format"], info["virtual-size"]) == ("luks", 1 << 20)


def test_raw(tmp_path: Path) -> None:
    image = tmp_path / "r.img"
    made("create", str(image), "1.5M")
    assert image.stat().st_size == 3 << 19


@pytest.mark.parametrize(
    "args",
    [
        ["-f", "qcow2", "x"],
        ["-f", "qcow2", "-o", "bogus=1", "x", "1M"],
        ["-f", "qcow2", "-o", "detached-header=true", "x", "1M"],
        ["-f", "luks", "-o", "key-secret=none,iter-time=10", "x", "1M"],
        ["-o", "nokey", "x", "1M"],
    ],
    ids=" ".join,
)
def test_refusals_are_those_of_qemu_img(tmp_path: Path, args: list[str]) -> None:
    need("qemu-img")
    words = ["create", *(str(tmp_path / arg) if arg == "x" else arg for arg in args)]
    done = img(*words)
    theirs = subprocess.run(["qemu-img", *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, theirs.stderr.replace("qemu-img:", "qmpd-img:", 1))
