"""The images that all servers serve: made once per run, the same random bytes in each."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from bench.servers import PASSPHRASE, program, serving

STEP = 1 << 20


def run(*words: str | Path, feed: bytes | None = None) -> None:
    """Run a program that must succeed."""
    done = subprocess.run([str(word) for word in words], input=feed, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr.decode().strip()}")


def fill_random(path: Path, size: int) -> None:
    """Write `size` random bytes."""
    with path.open("wb") as file:
        for _ in range(0, size, STEP):
            file.write(os.urandom(STEP))


def make(folder: Path, size: int) -> None:
    """Make every image of `size` bytes in `folder`, with QEMU's own tools where they can."""
    secret = ("--object", f"secret,id=s,data={PASSPHRASE}")
    fill_random(folder / "raw.img", size)
    luks = ("-f", "luks", "-o", "key-secret=s,iter-time=10")
    run("qemu-img", "create", "-q", *secret, *luks, folder / "luks1.img", str(size))
    (folder / "luks2.img").write_bytes(b"")
    os.truncate(folder / "luks2.img", size + (16 << 20))
    key = folder / "key"
    key.write_text(PASSPHRASE)
    kdf = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--luks2-metadata-size", "16k")
    layout = ("--sector-size", "4096", "--offset", str((16 << 20) // 512), "--key-file", key)
    run("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", *kdf, *layout, folder / "luks2.img")
    header = ("-o", "key-secret=s,iter-time=10,detached-header=true")
    run(program("qmpd-img"), "create", "-q", *secret, "-f", "luks", *header, folder / "header.img")
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "detached.qcow2", str(size))
    with serving("qsd", folder) as server:
        for name in ("luks1", "detached"):
            run("nbdcopy", "--connections=1", "--requests=1", folder / "raw.img", server.uri(name))
    with serving("qmpd", folder) as server:
        run("nbdcopy", "--connections=1", "--requests=1", folder / "raw.img", server.uri("luks2"))
    os.sync()
