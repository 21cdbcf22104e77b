"""Every kind of export against every client that is installed, in the clear and through TLS; and our own client."""

from __future__ import annotations

import json
import os
import random
import subprocess
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.gen import certificates
from tests.peers.conftest import need
from tests.support.daemon import program
from tests.support.nbd_servers import qmpd, serving, wait_for
from tests.support.peers import find

SIZE = 2 << 20
KINDS = ("raw", "qcow2", "luks", "luks-qcow2", "throttled", "read-only")
WRITABLE = KINDS[:-1]
ENVIRONMENT = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}
"""nbdsh looks for the Python that its module was made for."""

SECRET = ("--object", "secret,id=s,data=abc123")


def run(*command: str | Path, check: bool = True, timeout: float = 60) -> str:
    where = find(str(command[0])) or str(command[0])
    words = [where, *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL, env=ENVIRONMENT)
    assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout.decode(errors="replace")


FIO = ("--name=t", "--ioengine=nbd", "--verify_state_save=0")


@dataclass
class Served:
    """A daemon that exports the same sparse content six ways, by these names."""

    folder: Path
    content: bytes
    tls: bool

    def uri(self, kind: str) -> str:
        """Return the URI that libnbd's clients take."""
        if not self.tls:
            return f"nbd+unix:///{kind}?socket={self.folder / 'n.sock'}"
        return f"{self.plain_uri(kind)}&tls-certificates={self.folder / 'client'}"

    def plain_uri(self, kind: str) -> str:
        """Return the URI without the certificates' place: some clients may not be told of local files by URI."""
        if not self.tls:
            return self.uri(kind)
        return f"nbds+unix:///{kind}?socket={self.folder / 'n.sock'}&tls-hostname=localhost"

    def run_by(self, *command: str | Path) -> list[str]:
        """Return what runs `command` with the client's certificates where libnbd looks for them by itself.

        For root that is a folder of the system: the command gets a /etc of its own.
        """
        words = [str(find(str(command[0]))), *map(str, command[1:])]
        if not self.tls:
            return words
        steps = 'mount -t tmpfs none /etc && mkdir /etc/pki && cp -r "$0" /etc/pki/libnbd && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", steps, str(self.folder / "client"), *words]

    def qemu(self, kind: str) -> list[str]:
        """Return what qemu-img and qmpd-img take for an image, its options."""
        options = f"driver=nbd,server.type=unix,server.path={self.folder / 'n.sock'},export={kind}"
        if not self.tls:
            return ["--image-opts", options]
        return [*self.credentials(), "--image-opts", f"{options},tls-creds=t,tls-hostname=localhost"]

    def credentials(self) -> list[str]:
        if not self.tls:
            return []
        return ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={self.folder / 'client'}"]


def make_images(folder: Path) -> bytes:
    chance = random.Random(15)
    content = bytearray(SIZE)
    for start in (0, 1 << 20, SIZE - 65536):
        content[start : start + 65536] = chance.randbytes(65536)
    (folder / "content").write_bytes(content)
    run("cp", "--sparse=always", folder / "content", folder / "raw")
    for copy in ("throttled", "read-only"):
        run("cp", "--sparse=always", folder / "content", folder / copy)
    run("qemu-img", "convert", "-O", "qcow2", folder / "content", folder / "qcow2")
    options = ["-o", "key-secret=s,iter-time=10"]
    run("qemu-img", "create", "-q", "-f", "luks", *SECRET, *options, folder / "luks", str(SIZE))
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "luks-qcow2", str(SIZE + (4 << 20)))
    make_luks_over_qcow2(folder)
    for tree in luks_trees(folder):
        run("qemu-img", "convert", "-n", *SECRET, "-f", "raw", "--target-image-opts", folder / "content", tree)
    return bytes(content)


def write_certificates(folder: Path) -> None:
    ca = certificates.authority()
    usage = ("digital_signature", "key_encipherment")
    server = certificates.Spec("localhost", usage=usage, purpose=(ExtendedKeyUsageOID.SERVER_AUTH,))
    client = certificates.Spec("client one", usage=usage, purpose=(ExtendedKeyUsageOID.CLIENT_AUTH,), dns=None)
    certificates.directory(folder / "server", server, ca)
    certificates.directory(folder / "client", client, ca, role="client")


def make_luks_over_qcow2(folder: Path) -> None:
    """Put a LUKS volume into a qcow2 image: made beside it, then copied."""
    plain = folder / "luks-qcow2.plain"
    run("qemu-img", "create", "-q", "-f", "luks", *SECRET, "-o", "key-secret=s,iter-time=10", plain, str(SIZE))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", plain, folder / "luks-qcow2")


def luks_trees(folder: Path) -> list[str]:
    over = (
        f"driver=luks,key-secret=s,file.driver=qcow2,file.file.driver=file,file.file.filename={folder / 'luks-qcow2'}"
    )
    return [f"driver=luks,key-secret=s,file.filename={folder / 'luks'}", over]


def nodes(folder: Path) -> list[str]:
    qcow2 = f"file.driver=file,file.filename={folder}"
    return [
        *SECRET,
        "--object", "throttle-group,id=g,limits.iops-total=100000",
        "--blockdev", f"file,node-name=raw,filename={folder / 'raw'},discard=unmap",
        "--blockdev", f"qcow2,node-name=qcow2,discard=unmap,{qcow2}/qcow2",
        "--blockdev", f"luks,node-name=luks,key-secret=s,file.driver=file,file.filename={folder / 'luks'}",
        "--blockdev", f"qcow2,node-name=q,discard=unmap,{qcow2}/luks-qcow2",
        "--blockdev", "luks,node-name=luks-qcow2,key-secret=s,file=q",
        "--blockdev", f"file,node-name=t,filename={folder / 'throttled'},discard=unmap",
        "--blockdev", "throttle,node-name=throttled,throttle-group=g,file=t",
        "--blockdev", f"file,node-name=read-only,read-only=on,filename={folder / 'read-only'}",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["clear", "tls"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    need("qemu-img")
    folder = tmp_path_factory.mktemp("kinds")
    content = make_images(folder)
    tls = request.param == "tls"
    options = []
    if tls:
        write_certificates(folder)
        options = ["--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={folder / 'server'}"]
    exports = [
        f"nbd,id=e{at},node-name={kind},writable={'off' if kind == 'read-only' else 'on'}"
        for at, kind in enumerate(KINDS)
    ]
    listening = serving(folder, *exports)
    if tls:
        listening[1] += ",tls-creds=tls0"
    with qmpd(folder, *nodes(folder), *options, *listening):
        yield Served(folder, content, tls)


def test_nbdinfo_and_listings(served: Served) -> None:
    need("nbdinfo", "qemu-nbd")
    for kind in KINDS:
        [found] = json.loads(run("nbdinfo", "--json", served.uri(kind)))["exports"]
        assert found["export-size"] == SIZE
        assert found["is_read_only"] == (kind == "read-only")
    listed = json.loads(run("nbdinfo", "--list", "--json", served.uri("")))["exports"]
    assert sorted(one["export-name"] for one in listed) == sorted(KINDS)
    tls = ["--tls-creds=t", "--tls-hostname=localhost"] if served.tls else []
    text = run("qemu-nbd", *served.credentials(), *tls, "--list", "-k", served.folder / "n.sock")
    assert [f"export: '{kind}'" in text for kind in KINDS] == [True] * len(KINDS)


def test_nbdcopy_and_qemu_img_read_every_kind(served: Served) -> None:
    need("nbdcopy")
    out = served.folder / "out"
    for kind in KINDS:
        run("nbdcopy", served.uri(kind), out)
        assert out.read_bytes() == served.content, kind
        run("qemu-img", "convert", "-O", "raw", *served.qemu(kind), out)
        assert out.read_bytes() == served.content, kind


def test_every_writable_kind_is_written(served: Served) -> None:
    need("nbdcopy")
    fresh = served.folder / "fresh"
    fresh.write_bytes(random.Random(3).randbytes(SIZE))
    for kind in WRITABLE:
        run("nbdcopy", fresh, served.uri(kind))
        run(
            "qemu-img",
            "compare",
            *served.credentials(),
            "--image-opts",
            f"driver=raw,file.filename={fresh}",
            *served.qemu(kind)[-1:],
        )
        target = served.qemu(kind)
        run(
            "qemu-img",
            "convert",
            "-n",
            *target[:-2],
            "-f",
            "raw",
            "--target-image-opts",
            served.folder / "content",
            target[-1],
        )
        run("nbdcopy", served.uri(kind), served.folder / "out")
        assert (served.folder / "out").read_bytes() == served.content, kind


def connect(uri: str) -> str:
    return f"h.set_uri_allow_local_file(True); h.connect_uri('{uri}')"


def test_nbdsh_does_what_the_protocol_has(served: Served) -> None:
    need("nbdsh")
    lines = textwrap.dedent(
        """
        data = h.pread(65536, 0)
        h.pwrite(data[::-1], 4096, nbd.CMD_FLAG_FUA)
        assert h.pread(65536, 4096) == data[::-1]
        h.zero(65536, 4096)
        assert h.pread(65536, 4096) == bytes(65536)
        h.trim(65536, 65536)
        h.cache(65536, 0)
        h.flush()
        h.pwrite(data, 0)
        h.zero(65536, 65536)
        """
    )
    for kind in WRITABLE:
        run("nbdsh", "-c", connect(served.uri(kind)), "-c", lines)
        run("nbdcopy", served.folder / "content", served.uri(kind))
    with pytest.raises(AssertionError, match="Operation not permitted"):
        run("nbdsh", "-c", connect(served.uri("read-only")), "-c", "h.set_strict_mode(0); h.pwrite(bytes(512), 0)")


def test_fio_verifies_what_it_wrote(served: Served) -> None:
    need("fio")
    for kind in WRITABLE:
        work = ["--rw=randwrite", "--bs=4k", f"--size={SIZE}", "--io_size=256k", "--verify=crc32c", "--iodepth=8"]
        text = run(*served.run_by("fio", *FIO, f"--uri={served.plain_uri(kind)}", *work))
        assert "err= 0" in text, kind
        run("nbdcopy", served.folder / "content", served.uri(kind))


def test_nbdkit_passes_every_kind_on(served: Served) -> None:
    need("nbdkit", "nbdcopy")
    out, sock = served.folder / "out", served.folder / "k.sock"
    for kind in KINDS:
        origin = [f"socket={served.folder / 'n.sock'}", f"export={kind}"]
        if served.tls:
            origin += ["tls=require", f"tls-certificates={served.folder / 'client'}", "tls-verify=false"]
        process = subprocess.Popen([str(find("nbdkit")), "-f", "-U", str(sock), "nbd", *origin])
        try:
            wait_for(sock, process)
            run("nbdcopy", f"nbd+unix:///?socket={sock}", out)
            assert out.read_bytes() == served.content, kind
        finally:
            process.kill()
            process.wait(20)
            sock.unlink(missing_ok=True)


def test_nbdfuse_shows_every_kind_as_a_file(served: Served) -> None:
    need("nbdfuse")
    assert Path("/dev/fuse").exists(), "this machine has no FUSE"
    for kind in KINDS:
        point = served.folder / f"mount-{kind}"
        point.write_bytes(b"")
        process = subprocess.Popen(served.run_by("nbdfuse", point, served.plain_uri(kind)))
        shown = Path(f"/proc/{process.pid}/root{point}")  # with TLS mounted in a namespace of its own
        try:
            deadline = time.monotonic() + 20
            while shown.stat().st_size != SIZE:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert shown.read_bytes() == served.content, kind
        finally:
            process.terminate()
            process.wait(20)


def extents(uri: str) -> list[list[int]]:
    """Return (offset, length, type) as nbdinfo maps them, neighbours of one type joined."""
    found: list[list[int]] = []
    for one in json.loads(run("nbdinfo", "--map", "--json", uri)):
        if found and found[-1][2] == one["type"]:
            found[-1][1] += one["length"]
        else:
            found.append([one["offset"], one["length"], one["type"]])
    return found


@pytest.mark.parametrize("kind", ["read-only", "qcow2"])
def test_maps_agree_with_those_of_qemu_nbd(served: Served, kind: str) -> None:
    need("nbdinfo", "qemu-nbd")
    image, sock = served.folder / f"copy-{kind}", served.folder / "q.sock"
    run("cp", "--sparse=always", served.folder / kind, image)
    image_format = "qcow2" if kind == "qcow2" else "raw"
    process = subprocess.Popen([str(find("qemu-nbd")), "-r", "-t", "-k", str(sock), "-f", image_format, str(image)])
    try:
        wait_for(sock, process)
        assert extents(served.uri(kind)) == extents(f"nbd+unix:///?socket={sock}")
    finally:
        process.terminate()
        process.wait(20)
        sock.unlink(missing_ok=True)


def test_our_own_client_reads_and_writes_every_kind(served: Served) -> None:
    tool, out = program("qmpd-img"), served.folder / "out"
    for kind in ("qcow2", "read-only"):
        run(tool, "convert", "-O", "raw", *served.qemu(kind), out)
        assert out.read_bytes() == served.content, kind
    fresh = served.folder / "fresh"
    fresh.write_bytes(os.urandom(SIZE))
    target = served.qemu("luks-qcow2")
    run(tool, "convert", "-n", *target[:-2], "-f", "raw", "--target-image-opts", fresh, target[-1])
    run("nbdcopy", served.uri("luks-qcow2"), out)
    assert out.read_bytes() == fresh.read_bytes()
    run("nbdcopy", served.folder / "content", served.uri("luks-qcow2"))


def test_certificates_are_looked_at(served: Served) -> None:
    """A client without credentials, with another name in mind, or with strange ones gets nowhere."""
    tool = program("qmpd-img")
    if not served.tls:
        options = ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={served.folder}", "--image-opts"]
        text = run(tool, "info", *options, served.qemu("raw")[-1] + ",tls-creds=t", check=False)
        assert "virtual size" not in text
        return
    options = served.qemu("raw")
    plain = options[-1].partition(",tls-creds")[0]
    for wrong in ([*options[:-1], options[-1].replace("localhost", "elsewhere")], ["--image-opts", plain]):
        done = subprocess.run([tool, "info", *wrong], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "virtual size" not in done.stdout
        wanted = "TLS" if wrong[-1] == plain else "certificate"
        assert wanted.lower() in done.stderr.lower(), done.stderr
