"""File names and old options of NBD exports: qmpd-img reads them as qemu-img does, to the word."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd.cli.image import workshop
from qmpd.cli.img._names import Wish, open_image
from qmpd.errors import CommandError
from tests.peers.conftest import need
from tests.support.daemon import program
from tests.support.nbd_servers import wait_for
from tests.support.peers import find

NAMES = (
    "nbd:", "nbd:x", "nbd:localhost", "nbd:localhost:9", "nbd:localhost:9:exportname=foo", "nbd:localhost:9:foo",
    "nbd:unix:/tmp/none", "nbd:unix:/tmp/none:exportname=a:b", "nbd:unix:", "nbd:unix", "nbd:unix:rel:x", "nbd:[::1]:9",
    "nbd:127.0.0.1:9,ipv4=on", "nbd:unix:/tmp/none:exportname=", "nbd::9", "nbd:a:b:c:9", "nbd:[::1]9", "nbd:[]:9",
    "nbd://localhost:9/exp", "nbd://localhost", "nbd://", "nbd:///", "nbd:///exp", "nbd://:9/",
    "nbd://localhost:99999/", "nbd://localhost:x/", "nbd://localhost:/x", "nbd://localhost:0/", "nbd://[::1]:9//a//b",
    "nbd://[::1/", "nbd+tcp://127.0.0.1:9/a%20b", "nbd+unix:///a%2fb?socket=/tmp/none", "nbd+unix:///?socket=",
    "nbd+unix://?socket=/tmp/none", "nbd+unix://host/?socket=/tmp/none", "nbd+unix:///a?socket=/tmp/none&x=1",
    "nbd+unix:///a?socket=/tmp/none&socket=/b", "nbd+unix:///a?socket=/tmp/none&", "nbd+unix:///a?socket",
    "nbd://localhost:9/a?x=1", "nbd://localhost:9/a#f", "nbd://user@localhost:9/", "nbd://127.0.0.1:9?",
    "nbd+foo://x", "nbd+unix:a", "nbd+tcp:localhost:9", "nbds://localhost:9", "nbd+unix:///a?SOCKET=/b",
    "nbd+unix:///%zz?socket=/tmp/none", "nbd+unix:///a b?socket=/tmp/none", "nbd+unix:///a?socket=/tmp/no%20ne",
    "nbd+unix:///a?socket=/tmp/no+ne", "NBD://localhost:9/", "nbd:LOCALHOST:09", "nbd://127.1:9/x",
    "nbd+unix:/a?socket=/b", "nbd+unix:///a?socket=b;c=d", "nbd+unix:///é?socket=/tmp/none", "nbd://h:9/%00",
    "nbd://nosuchhost.invalid/", "nbd://%6cocalhost:9/", "nbd:nosuchhost.invalid:9",
    'json:{"driver":"nbd","host":"localhost","port":"9"}', 'json:{"driver":"nbd","host":"localhost","port":9}',
    'json:{"driver":"nbd","server":{"type":"inet","host":"localhost","port":9}}', 'json:{"driver":"nbd"}',
    'json:{"driver":"raw","file":"nbd://localhost:9"}', 'json:{"driver":"raw","file":{"filename":"nbd://localhost:9"}}',
    'json:{"file.filename":"nbd://localhost:9"}',
    'json:{"driver":"nbd","server.type":"unix","server.path":"/tmp/none"}',
    "x" + "nbd+unix:///a?socket=/tmp/none", "nbd+unix:///a?socket=" + "y" * 200,
)  # fmt: skip

OPTIONS = (
    "driver=nbd", "driver=nbd,host=localhost,port=9", "driver=nbd,host=localhost", "driver=nbd,port=9",
    "driver=nbd,path=/tmp/none", "driver=nbd,path=/tmp/none,host=a", "driver=nbd,path=/tmp/none,port=a",
    "driver=nbd,server.type=unix,server.path=/tmp/none,path=/tmp/x", "driver=nbd,path=,host=",
    "driver=raw,file.filename=nbd://localhost:9/x", "file.filename=nbd:localhost:9",
    "driver=raw,file.driver=nbd,file.path=/tmp/none", "driver=nbd,server.type=unix,server.path=/tmp/none",
    "driver=nbd,server.type=inet,server.host=localhost,server.port=9,export=",
    "driver=nbd,server.type=unix,server.path=/tmp/none,tls-creds=nosuch",
    "driver=qcow2,file.driver=nbd,file.server.type=unix,file.server.path=/tmp/none",
)  # fmt: skip


def said(tool: str, *args: str) -> str:
    """Return what `info` of a tool says, the tool's name left out."""
    done = subprocess.run([tool, "info", *args], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "GLib" not in line]
    return "\n".join(lines).replace(os.path.basename(tool), "IMG")


def both(*args: str) -> tuple[str, str]:
    theirs = find("qemu-img")
    assert theirs is not None
    return said(program("qmpd-img"), *args), said(theirs, *args)


def refused(name: str, *, image_opts: bool) -> str:
    """Return what our tool would say, without a process for each name."""

    async def attempt() -> str:
        async with workshop() as shop:
            try:
                await open_image(shop, name, Wish(image_opts=image_opts))
            except CommandError as error:
                return "\n".join([f"IMG: {error}", *filter(None, [(error.hint or "").rstrip("\n")])])
        return "opened"

    return asyncio.run(attempt())


def test_names_mean_the_same() -> None:
    need("qemu-img")
    for name in NAMES:
        assert refused(name, image_opts=False) == said(str(find("qemu-img")), name), name


def test_options_mean_the_same() -> None:
    need("qemu-img")
    for options in OPTIONS:
        assert refused(options, image_opts=True) == said(str(find("qemu-img")), "--image-opts", options), options


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Path]:
    """Two exports of qemu-nbd: a raw image, and one that holds a qcow2 image with a relative backing file."""
    need("qemu-img", "qemu-nbd")
    folder = tmp_path
    (folder / "base").write_bytes(os.urandom(1 << 20))
    (folder / "other").write_bytes(os.urandom(1 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "other", "-F", "raw", folder / "relative")
    processes = []
    for name in ("base", "relative"):
        sock = folder / f"{name}.sock"
        command = [
            str(find("qemu-nbd")),
            "-k",
            str(sock),
            "-f",
            "raw",
            "-x",
            "exp",
            "-t",
            "-e",
            "9",
            str(folder / name),
        ]
        processes.append(subprocess.Popen(command))
        wait_for(sock, processes[-1])
    yield folder
    for process in processes:
        process.terminate()
        process.wait(20)


def run(*command: str | Path) -> str:
    where = find(str(command[0]))
    assert where is not None
    return subprocess.run([where, *map(str, command[1:])], capture_output=True, check=True, text=True).stdout


def test_images_on_exports_are_described_alike(export: Path) -> None:
    base = f"nbd+unix:///exp?socket={export}/base.sock"
    top = str(export / "top")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    server = f'{{"type":"unix","path":"{export}/base.sock"}}'
    by_json = str(export / "json")
    described = f'json:{{"driver":"raw","file":{{"driver":"nbd","export":"exp","server":{server}}}}}'
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", described, "-F", "raw", by_json)
    for args in (
        [base], ["--output=json", base], ["--backing-chain", top], ["--backing-chain", by_json],
        ["--output=json", "--backing-chain", top],
        [f"nbd+unix:///exp?socket={export}/relative.sock"],
        ["--output=json", f"nbd:unix:{export}/relative.sock:exportname=exp"],
        [f"nbd+unix:///nosuch?socket={export}/base.sock"],
    ):  # fmt: skip
        ours, theirs = both(*args)
        assert ours == theirs, args


def test_relative_backing_names_have_no_place_to_start_from(export: Path) -> None:
    name = f"nbd+unix:///exp?socket={export}/relative.sock"
    tool, theirs = program("qmpd-img"), find("qemu-img")
    assert theirs is not None
    texts = []
    for one in (tool, theirs):
        done = subprocess.run([one, "map", "-f", "qcow2", name], capture_output=True, text=True, check=False)
        texts.append((done.returncode, done.stderr.replace(os.path.basename(one), "IMG")))
    assert texts[0] == texts[1]


def test_data_goes_to_and_from_an_export(export: Path) -> None:
    base = f"nbd+unix:///exp?socket={export}/base.sock"
    out = export / "out"
    tool = program("qmpd-img")
    subprocess.run([tool, "convert", "-f", "raw", "-O", "raw", base, str(out)], check=True)
    assert out.read_bytes() == (export / "base").read_bytes()
    fresh = export / "fresh"
    fresh.write_bytes(bytes(1 << 19) + os.urandom(1 << 19))
    subprocess.run([tool, "convert", "-n", "-f", "raw", "-O", "raw", str(fresh), base], check=True)
    subprocess.run([tool, "compare", "-f", "raw", "-F", "raw", str(fresh), base], check=True)
    assert (export / "base").read_bytes() == fresh.read_bytes()
    refused = subprocess.run([tool, "resize", "-f", "raw", base, "2M"], capture_output=True, text=True, check=False)
    assert refused.stderr == "qmpd-img: Cannot resize NBD nodes\n"


def test_no_image_is_made_on_an_export(export: Path) -> None:
    name = f"nbd+unix:///exp?socket={export}/base.sock"
    done = subprocess.run(
        [program("qmpd-img"), "create", "-f", "qcow2", name, "1M"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "does not support image creation" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_contexts_are_shown_as_status(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io", "qemu-nbd")
    base, top, sock = tmp_path / "base", tmp_path / "top", tmp_path / "a.sock"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "write -z 1M 64k", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-io", "-f", "qcow2", "-c", "write 128k 64k", "-c", "write -z 2M 64k", top)
    process = subprocess.Popen(
        [str(find("qemu-nbd")), "-r", "-t", "-A", "-e", "9", "-k", str(sock), "-f", "qcow2", str(top)]
    )
    try:
        wait_for(sock, process)
        for context in ("base:allocation", "qemu:allocation-depth"):
            options = f"driver=nbd,server.type=unix,server.path={sock},x-dirty-bitmap={context}"
            maps = [
                run(tool, "map", "--output=json", "--image-opts", options) for tool in (program("qmpd-img"), "qemu-img")
            ]
            assert maps[0] == maps[1]
    finally:
        process.terminate()
        process.wait(20)
