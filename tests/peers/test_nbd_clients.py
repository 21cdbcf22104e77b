"""Real NBD clients against our exports of raw, qcow2 and luks nodes, in the clear and through TLS."""

from __future__ import annotations

import json
import random
import re
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.gen import certificates
from tests.peers.conftest import need
from tests.support.nbd_servers import qmpd, serving, wait_for
from tests.support.peers import find

SIZE = 8 << 20
KINDS = ("raw", "qcow2", "luks")
SECRET = ("--object", "secret,id=s,data=abc123")


def run(*command: str | Path, check: bool = True) -> str:
    program = find(str(command[0]))
    assert program is not None
    done = subprocess.run([program, *map(str, command[1:])], capture_output=True, timeout=100)
    assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout.decode(errors="replace")


@dataclass
class Served:
    """A daemon that exports the same sparse content three ways, by these names."""

    folder: Path
    content: Path

    def uri(self, kind: str) -> str:
        return f"nbd+unix:///{kind}?socket={self.folder / 'n.sock'}"

    def reset(self, kind: str) -> None:
        """Write the content into an export again."""
        run("nbdcopy", "--destination-is-zero" if kind == "none" else "--flush", self.content, self.uri(kind))


def make_images(folder: Path) -> Path:
    content = folder / "content"
    chance = random.Random(5)
    with content.open("wb") as file:
        file.truncate(SIZE)
        for start in (0, 1 << 20, (3 << 20) + 4096, SIZE - 65536):
            file.seek(start)
            file.write(chance.randbytes(65536))
    run("cp", "--sparse=always", content, folder / "raw")
    run("qemu-img", "convert", "-O", "qcow2", content, folder / "qcow2")
    luks = folder / "luks"
    run("qemu-img", "create", "-q", "-f", "luks", *SECRET, "-o", "key-secret=s,iter-time=10", luks, str(SIZE))
    target = f"driver=luks,key-secret=s,file.filename={luks}"
    run("qemu-img", "convert", "-n", *SECRET, "-f", "raw", "--target-image-opts", content, target)
    return content


def nodes(folder: Path) -> list[str]:
    return [
        *SECRET,
        "--blockdev", f"file,node-name=raw,filename={folder / 'raw'},discard=unmap",
        "--blockdev", f"qcow2,node-name=qcow2,discard=unmap,file.driver=file,file.filename={folder / 'qcow2'}",
        "--blockdev", f"luks,node-name=luks,key-secret=s,file.driver=file,file.filename={folder / 'luks'}",
    ]  # fmt: skip


def exports() -> list[str]:
    return [
        f"nbd,id={kind},node-name={kind},writable=on,allocation-depth=on,description=the {kind} one" for kind in KINDS
    ]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    need("qemu-img", "nbdinfo", "nbdcopy")
    content = make_images(tmp_path)
    with qmpd(tmp_path, *nodes(tmp_path), *serving(tmp_path, *exports())):
        yield Served(tmp_path, content)


@pytest.mark.parametrize("kind", KINDS)
def test_nbdinfo_sees_the_export(served: Served, kind: str) -> None:
    [found] = json.loads(run("nbdinfo", "--json", served.uri(kind)))["exports"]
    assert found["export-size"] == SIZE
    assert found["description"] == f"the {kind} one"
    assert found["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    for able in ("flush", "fua", "multi_conn", "trim", "zero", "fast_zero", "cache", "df"):
        assert found[f"can_{able}"], able
    assert not found["is_read_only"]
    assert found["block_size_maximum"] == 32 << 20
    assert found["block_size_minimum"] == (512 if kind == "luks" else 1)


def test_qemu_nbd_lists_the_exports(served: Served) -> None:
    need("qemu-nbd")
    text = run("qemu-nbd", "--list", "-k", served.folder / "n.sock")
    assert "exports available: 3" in text
    assert [f"export: '{kind}'" in text for kind in KINDS] == [True] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [("--request-size=4096", "--requests=32"), ("--connections=1", "--synchronous"), ()])
def test_nbdcopy_reads_and_writes(served: Served, kind: str, how: tuple[str, ...]) -> None:
    out, fresh = served.folder / "out", served.folder / "fresh"
    run("nbdcopy", *how, served.uri(kind), out)
    assert out.read_bytes() == served.content.read_bytes()
    fresh.write_bytes(random.Random(7).randbytes(SIZE))
    run("nbdcopy", *how, "--flush", fresh, served.uri(kind))
    run("nbdcopy", *how, served.uri(kind), out)
    assert out.read_bytes() == fresh.read_bytes()
    run("nbdcopy", *how, served.content, served.uri(kind))
    run("nbdcopy", *how, served.uri(kind), out)
    assert out.read_bytes() == served.content.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_img_reads_writes_and_compares(served: Served, kind: str) -> None:
    out = served.folder / "out"
    assert json.loads(run("qemu-img", "info", "--output=json", served.uri(kind)))["virtual-size"] == SIZE
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri(kind), served.content)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri(kind), out)
    assert out.read_bytes() == served.content.read_bytes()
    fresh = served.folder / "fresh"
    fresh.write_bytes(bytes(SIZE // 2) + random.Random(8).randbytes(SIZE // 2))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", fresh, served.uri(kind))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri(kind), fresh)


def extents(uri: str, context: str = "base:allocation") -> list[tuple[int, int, int]]:
    """Return (offset, length, type) as nbdinfo maps them, neighbours of one type joined."""
    found: list[tuple[int, int, int]] = []
    for row in json.loads(run("nbdinfo", f"--map={context}", "--json", uri)):
        if found and found[-1][2] == row["type"]:
            offset, length, kind = found.pop()
            found.append((offset, length + row["length"], kind))
        else:
            found.append((row["offset"], row["length"], row["type"]))
    return found


@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_that_of_qemu_nbd(tmp_path: Path, kind: str, context: str) -> None:
    need("qemu-img", "nbdinfo", "nbdcopy", "qemu-nbd")
    make_images(tmp_path)
    path = tmp_path / "q.sock"
    options = ["--read-only", "--persistent", "--allocation-depth", "-x", kind, "-k", str(path)]
    image = (
        [*SECRET, "--image-opts", f"driver=luks,key-secret=s,file.filename={tmp_path / 'luks'}"]
        if kind == "luks"
        else ["-f", kind, str(tmp_path / kind)]
    )
    program = find("qemu-nbd")
    assert program is not None
    process = subprocess.Popen([program, *options, *image])
    try:
        wait_for(path, process)
        theirs = extents(f"nbd+unix:///{kind}?socket={path}", context)
    finally:
        process.terminate()
        process.wait()
    with qmpd(tmp_path, *nodes(tmp_path), *serving(tmp_path, *exports())):
        assert extents(f"nbd+unix:///{kind}?socket={tmp_path / 'n.sock'}", context) == theirs


def test_the_depth_of_a_backing_chain_is_that_of_qemu_nbd(tmp_path: Path) -> None:
    need("qemu-img", "nbdinfo", "qemu-io", "qemu-nbd")
    for name, backing, write in (("a", None, "0 1M"), ("b", "a", "512k 1M"), ("c", "b", "3M 64k")):
        base = ["-b", f"{backing}.qcow2", "-F", "qcow2"] if backing else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *base, tmp_path / f"{name}.qcow2", "2M" if name == "a" else "4M")
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 {write}", tmp_path / f"{name}.qcow2")
    path = tmp_path / "q.sock"
    program = find("qemu-nbd")
    assert program is not None
    command = [program, "--read-only", "--persistent", "-A", "-f", "qcow2", "-k", str(path), str(tmp_path / "c.qcow2")]
    process = subprocess.Popen(command)
    try:
        wait_for(path, process)
        theirs = [extents(f"nbd+unix:///?socket={path}", one) for one in ("base:allocation", "qemu:allocation-depth")]
    finally:
        process.terminate()
        process.wait()
    node = f"qcow2,node-name=c,read-only=on,file.driver=file,file.filename={tmp_path / 'c.qcow2'}"
    export = serving(tmp_path, "nbd,id=c,node-name=c,allocation-depth=on")
    with qmpd(tmp_path, "--blockdev", node, *export):
        uri = f"nbd+unix:///c?socket={tmp_path / 'n.sock'}"
        assert [extents(uri, one) for one in ("base:allocation", "qemu:allocation-depth")] == theirs
    assert len(theirs[1]) > 2


LIBNBD = """
    import nbd, random, sys
    uri, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    model = None
    for structured in (True, False):
        h = nbd.NBD()
        h.set_request_structured_replies(structured)
        h.set_strict_mode(0)
        h.connect_uri(uri)
        if model is None:
            model = bytearray(h.pread(size, 0))
        for _ in range(40):
            jobs, taken = [], []
            for _ in range(16):
                offset, length = chance.randrange(size), chance.randrange(1, 200000)
                length = min(length, size - offset)
                if any(offset < end and start < offset + length for start, end in taken):
                    continue
                taken.append((offset, offset + length))
                kind = chance.choice(["read", "read", "write", "zero", "flush", "cache"])
                if kind == "read":
                    buffer = nbd.Buffer(length)
                    jobs.append((h.aio_pread(buffer, offset), buffer, offset, length))
                elif kind == "write":
                    data = chance.randbytes(length)
                    model[offset:offset + length] = data
                    jobs.append((h.aio_pwrite(data, offset, flags=chance.choice([0, nbd.CMD_FLAG_FUA])), None, 0, 0))
                elif kind == "zero":
                    model[offset:offset + length] = bytes(length)
                    flags = chance.choice([0, nbd.CMD_FLAG_NO_HOLE])
                    jobs.append((h.aio_zero(length, offset, flags=flags), None, 0, 0))
                elif kind == "flush":
                    jobs.append((h.aio_flush(), None, 0, 0))
                else:
                    jobs.append((h.aio_cache(length, offset), None, 0, 0))
            for cookie, buffer, offset, length in jobs:
                while not h.aio_command_completed(cookie):
                    h.poll(-1)
                if buffer is not None:
                    assert buffer.to_bytearray() == model[offset:offset + length]
        assert h.pread(size, 0) == model
        for call in (lambda: h.pread(1, size), lambda: h.pwrite(b"x", size), lambda: h.trim(1, size)):
            try:
                call()
                raise SystemExit("a request beyond the end passed")
            except nbd.Error:
                pass
        h.shutdown()
    print("done")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_libnbd_with_many_requests_at_once(served: Served, kind: str) -> None:
    if subprocess.run(["/usr/bin/python3", "-c", "import nbd"], capture_output=True).returncode:
        need("module:nbd")
    seed = random.randrange(1 << 30)
    done = subprocess.run(
        ["/usr/bin/python3", "-c", textwrap.dedent(LIBNBD), served.uri(kind), str(SIZE), str(seed)],
        capture_output=True,
        timeout=100,
    )
    assert done.stdout == b"done\n", (seed, done.stderr.decode())
    out = served.folder / "out"
    run("nbdcopy", served.uri(kind), out)
    if kind == "qcow2":
        run("qemu-img", "check", "-U", "-f", "qcow2", served.folder / "qcow2", check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_fio_verifies_what_it_wrote(served: Served, kind: str) -> None:
    need("fio")
    if "nbd" not in run("fio", "--enghelp"):
        need("fio's nbd engine")
    text = run(
        "fio", "--name=t", "--ioengine=nbd", f"--uri={served.uri(kind)}", "--rw=randrw", "--bsrange=512-64k",
        "--iodepth=16", f"--size={SIZE}", "--verify=crc32c",
        "--verify_state_save=0", "--do_verify=1", "--io_size=16m", "--output-format=json",
    )  # fmt: skip
    [job] = json.loads(text[text.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_nbdkits_nbd_plugin_passes_us_on(served: Served, kind: str) -> None:
    need("nbdkit")
    out = served.folder / "out"
    command = f'nbdcopy "$uri" {out} && nbdinfo --size "$uri"'
    text = run("nbdkit", "-U", "-", "nbd", f"uri={served.uri(kind)}", "--run", command)
    assert text.strip() == str(SIZE)
    assert out.read_bytes() == served.content.read_bytes()


# TLS


def authority(folder: Path) -> tuple[Path, Path]:
    """Make directories of the server's and the client's certificates under one CA."""
    ca = certificates.authority()
    usage = ("digital_signature", "key_encipherment")
    server = certificates.Spec("localhost", usage=usage, purpose=(ExtendedKeyUsageOID.SERVER_AUTH,))
    client = certificates.Spec("client one", usage=usage, purpose=(ExtendedKeyUsageOID.CLIENT_AUTH,), dns=None)
    first = certificates.directory(folder / "server", server, ca)
    second = certificates.directory(folder / "client", client, ca, role="client")
    return first, second


@pytest.mark.parametrize("identity", ["CN=client one", "CN=client two"])
@pytest.mark.parametrize("transport", ["unix", "inet"])
def test_tls(tmp_path: Path, identity: str, transport: str) -> None:
    need("qemu-img", "nbdinfo", "nbdcopy")
    content = make_images(tmp_path)
    server, client = authority(tmp_path)
    objects = [
        "--object", f"tls-creds-x509,id=tls0,dir={server},endpoint=server",
        "--object", f"authz-simple,id=az0,identity={identity}",
    ]  # fmt: skip
    port = random.randrange(20000, 30000)
    address = f"addr.type=unix,addr.path={tmp_path / 'n.sock'}"
    if transport == "inet":
        address = f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"
    listen = ["--nbd-server", f"{address},tls-creds=tls0,tls-authz=az0"]
    with qmpd(tmp_path, *nodes(tmp_path), *objects, *listen, "--export", "nbd,id=e,node-name=luks,writable=on"):
        where = f"socket={tmp_path / 'n.sock'}&" if transport == "unix" else ""
        host = "" if transport == "unix" else f"localhost:{port}"
        scheme = "nbds+unix" if transport == "unix" else "nbds"
        uri = f"{scheme}://{host}/luks?{where}tls-certificates={client}&tls-hostname=localhost"
        out = tmp_path / "out"
        if identity != "CN=client one":
            assert run("nbdinfo", "--size", uri, check=False) == ""
            return
        run("nbdcopy", uri, out)
        assert out.read_bytes() == content.read_bytes()
        fresh = tmp_path / "fresh"
        fresh.write_bytes(random.Random(9).randbytes(SIZE))
        run("nbdcopy", fresh, uri)
        creds = f"tls-creds-x509,id=t,dir={client},endpoint=client"
        opts = "driver=nbd,export=luks,tls-creds=t,tls-hostname=localhost,"
        opts += (
            f"server.type=unix,server.path={tmp_path / 'n.sock'}"
            if transport == "unix"
            else f"server.type=inet,server.host=127.0.0.1,server.port={port}"
        )
        run("qemu-img", "compare", "--object", creds, "--image-opts", opts, f"driver=file,filename={fresh}")
        plain = uri.replace("nbds", "nbd")
        assert run("nbdinfo", "--size", re.sub(r"tls-[^&]*&?", "", plain), check=False) == ""
