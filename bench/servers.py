"""The servers that are compared, each with every image it can open, on sockets of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PASSPHRASE = "correct horse"
START_SECONDS = 30
_TICKS = os.sysconf("SC_CLK_TCK")


def program(name: str) -> str:
    """Return one of the project's programs, from the environment that runs this."""
    return str(Path(sys.executable).with_name(name))


def cached_environment() -> dict[str, str]:
    """Return an environment in which Python keeps its compiled modules, as it does by default."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@dataclass(slots=True)
class Server:
    """A running server: sockets by export name, or one socket for all."""

    name: str
    process: subprocess.Popen[bytes]
    sockets: dict[str, tuple[str, Path]]

    def uri(self, image: str) -> str:
        """Return the address of an export."""
        export, path = self.sockets[image]
        return f"nbd+unix:///{export}?socket={path}"

    def processor_seconds(self) -> float:
        """Return the processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def resident(self) -> int:
        """Return the bytes of memory in use now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise LookupError("no VmRSS")


def _nodes(folder: Path, *, luks2: bool) -> list[str]:
    """Return command line options for the nodes; no locks, as several servers share the images."""

    def file(name: str, path: str) -> list[str]:
        return ["--blockdev", f"file,node-name={name},filename={folder / path},locking=off"]

    words = ["--object", f"secret,id=s,data={PASSPHRASE}"]
    words += file("raw", "raw.img") + file("f1", "luks1.img") + file("fq", "detached.qcow2") + file("fh", "header.img")
    words += ["--blockdev", "luks,node-name=luks1,file=f1,key-secret=s", "--blockdev", "qcow2,node-name=q,file=fq"]
    words += ["--blockdev", "luks,node-name=detached,file=q,header=fh,key-secret=s"]
    if luks2:
        words += [*file("f2", "luks2.img"), "--blockdev", "luks,node-name=luks2,file=f2,key-secret=s"]
    return words


def _exports(names: tuple[str, ...], path: Path) -> list[str]:
    words = ["--nbd-server", f"addr.type=unix,addr.path={path},max-connections=0"]
    for name in names:
        words += ["--export", f"nbd,id=export-{name},node-name={name},name={name},writable=on"]
    return words


def command(kind: str, folder: Path) -> tuple[list[str], dict[str, tuple[str, Path]]]:
    """Return the words that start a server, and where its exports will be."""
    path = folder / f"{kind}.sock"
    if kind == "nbdkit":
        words = ["nbdkit", "-f", "-U", str(path), "--filter=luks", "file", str(folder / "luks1.img")]
        return [*words, f"passphrase={PASSPHRASE}"], {"luks1": ("", path)}
    if kind == "qsd":
        names: tuple[str, ...] = ("raw", "luks1", "detached")
        sockets = {name: (name, path) for name in names}
        sockets["luks2"] = ("luks1", path)
        return ["qemu-storage-daemon", *_nodes(folder, luks2=False), *_exports(names, path)], sockets
    names = ("raw", "luks1", "luks2", "detached")
    words = [program("qmpd-storage-daemon"), *_nodes(folder, luks2=True), *_exports(names, path)]
    return words, {name: (name, path) for name in names}


@contextlib.contextmanager
def serving(kind: str, folder: Path) -> Iterator[Server]:
    """Run a server of `kind` ("qsd", "qmpd", "nbdkit") until the block ends."""
    words, sockets = command(kind, folder)
    path = next(iter(sockets.values()))[1]
    path.unlink(missing_ok=True)
    process = subprocess.Popen(words, env=cached_environment())
    try:
        server = Server(kind, process, sockets)
        _wait(server)
        yield server
    finally:
        process.terminate()
        process.wait()


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    uri = server.uri(next(reversed(server.sockets)))
    while subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False).returncode:
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{server.name} does not serve {uri}")
        time.sleep(0.05)


def missing() -> list[str]:
    """Return the programs that a whole run needs and that are not here."""
    wanted = ("qemu-storage-daemon", "qemu-img", "qemu-system-x86_64", "nbdkit", "nbdcopy", "nbdinfo", "fio", "cc")
    extra = ("cryptsetup",)
    paths = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in wanted + extra if shutil.which(name, path=paths) is None]
