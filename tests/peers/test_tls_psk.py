"""TLS by pre-shared keys, under Python 3.13, the first that has them: our server and client against others'."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.support.daemon import running
from tests.support.nbd_servers import serving, wait_for
from tests.support.peers import find

PYTHON = "qmpd-test-python3.13"
ROOT = Path(__file__).parents[2]
SIZE = 1 << 20
KEY = "5a" * 32
PACKAGES = ("argon2-cffi", "argon2-cffi-bindings", "backports.zstd", "cffi", "cryptography", "pycparser", "qemu.qmp",
            "tqdm")  # fmt: skip


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What qmpd runs on, for Python 3.13, in the versions of requirements-dev.txt."""
    need(PYTHON)
    folder = tmp_path_factory.mktemp("packages")
    wanted = [re.escape(name) + r"==[^\s;]+" for name in PACKAGES]
    pins = re.findall(rf"^(?:{'|'.join(wanted)})", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert len(pins) == len(PACKAGES)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([*command, "--python-version", "3.13", "--only-binary", ":all:", "--no-deps", *pins], check=True)
    return folder


def start(packages: Path, function: str) -> list[str]:
    """Return the words that run one of our programs under Python 3.13."""
    module, _, name = function.partition(":")
    code = f"import sys; from {module} import {name}; sys.exit({name}())"
    return ["env", f"PYTHONPATH={ROOT}:{packages}", str(find(PYTHON)), "-c", code]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Folders `good` and `bad` with alice's key and with another one, and an image."""
    for name, key in (("good", KEY), ("bad", "5b" * 32)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.psk").write_text(f"alice:{key}\n")
    (tmp_path / "image").write_bytes(random.Random(3).randbytes(SIZE))
    return tmp_path


@pytest.fixture
def served(keys: Path, packages: Path) -> Iterator[Path]:
    """A daemon that exports the image to whoever has the key; gives its folder."""
    options = ["--object", f"tls-creds-psk,id=t,endpoint=server,dir={keys / 'good'}"]
    options += ["--blockdev", f"file,node-name=image,filename={keys / 'image'}"]
    listen = serving(keys, "nbd,id=e,node-name=image,name=image,writable=on")
    listen[1] += ",tls-creds=t"
    words = start(packages, "qmpd.daemon.main:storage_main")
    with running(keys, *options, *listen, name="qmpd-storage-daemon", start=words):
        yield keys


def run(*words: str | Path, tool: Sequence[str] = ()) -> subprocess.CompletedProcess[bytes]:
    first = list(tool) or [str(find(str(words[0])))]
    rest = words if tool else words[1:]
    return subprocess.run([*first, *map(str, rest)], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)


def qemu(folder: Path, keys: str, sock: str, export: str, user: str = "alice") -> list[str | Path]:
    """Return what qemu-img and qmpd-img take for an export behind a key."""
    creds = f"tls-creds-psk,id=c,endpoint=client,username={user},dir={folder / keys}"
    image = f"driver=nbd,server.type=unix,server.path={folder / sock},export={export},tls-creds=c"
    return ["--object", creds, "--image-opts", image]


def test_libnbd_and_qemu_read_and_write_with_the_key_and_not_without(served: Path) -> None:
    need("nbdcopy", "nbdinfo", "qemu-img")
    out = served / "out"
    uri = f"nbds+unix://alice@/image?socket={served / 'n.sock'}&tls-psk-file="
    assert run("nbdcopy", f"{uri}{served / 'good' / 'keys.psk'}", out).returncode == 0
    assert out.read_bytes() == (served / "image").read_bytes()

    fresh = served / "fresh"
    fresh.write_bytes(random.Random(4).randbytes(SIZE))
    assert run("nbdcopy", fresh, f"{uri}{served / 'good' / 'keys.psk'}").returncode == 0
    assert (served / "image").read_bytes() == fresh.read_bytes()

    read = run("qemu-img", "convert", "-O", "raw", *qemu(served, "good", "n.sock", "image"), out)
    assert read.returncode == 0, read.stderr
    assert out.read_bytes() == fresh.read_bytes()

    assert run("nbdinfo", "--size", f"{uri}{served / 'bad' / 'keys.psk'}").returncode != 0
    assert run("qemu-img", "info", *qemu(served, "bad", "n.sock", "image")).returncode == 1
    assert run("nbdinfo", "--size", f"nbd+unix:///image?socket={served / 'n.sock'}").returncode != 0


def test_our_client_reads_from_qemu_and_nbdkit_with_the_key_and_not_without(keys: Path, packages: Path) -> None:
    need("qemu-nbd", "nbdkit")
    tool = start(packages, "qmpd.cli.main:img_main")
    creds = f"tls-creds-psk,id=t,endpoint=server,dir={keys / 'good'}"
    theirs = {
        "q.sock": ["qemu-nbd", "-t", "-f", "raw", "--object", creds, "--tls-creds", "t", "-k", keys / "q.sock", "-x",
                   "image", keys / "image"],
        "k.sock": ["nbdkit", "-f", "-U", keys / "k.sock", "--tls=require", f"--tls-psk={keys / 'good' / 'keys.psk'}",
                   "file", keys / "image"],
    }  # fmt: skip
    for sock, words in theirs.items():
        process = subprocess.Popen([str(find(str(words[0]))), *map(str, words[1:])], stderr=subprocess.DEVNULL)
        try:
            wait_for(keys / sock, process)
            out = keys / "out"
            good = run("convert", "-O", "raw", *qemu(keys, "good", sock, "image"), out, tool=tool)
            assert good.returncode == 0, good.stderr
            assert out.read_bytes() == (keys / "image").read_bytes()
            bad = run("info", *qemu(keys, "bad", sock, "image"), tool=tool)
            assert bad.returncode == 1
            assert b"TLS" in bad.stderr, bad.stderr
        finally:
            process.terminate()
            process.wait(20)
