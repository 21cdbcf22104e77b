"""Persistent dirty bitmaps of qcow2: QEMU and we say the same, and each understands what the other stored."""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proof
from tests.peers.test_img_snapshots import run
from tests.support.daemon import RawClient, program
from tests.support.nbd_servers import wait_for
from tests.support.peers import find, need

MiB = 1 << 20
PROGRAMS = ("qemu-system-x86_64", "qmpd")


def connected(path: Path) -> RawClient:
    """Return a client as soon as somebody listens."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return RawClient(path)
        except (ConnectionRefusedError, BlockingIOError):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextlib.contextmanager
def machine(name: str, folder: Path) -> Iterator[tuple[RawClient, subprocess.Popen[bytes]]]:
    """Run QEMU or qmpd without devices; `human-monitor-command` then does I/O on nodes."""
    folder.mkdir(parents=True, exist_ok=True)
    binary = find(name) if name != "qmpd" else program(name)
    assert binary is not None
    path = folder / "qmp.sock"
    path.unlink(missing_ok=True)
    kind = ["-machine", "pc,accel=tcg"] if name != "qmpd" else ["-machine", "pc"]
    arguments = [*kind, "-nodefaults", "-S", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([binary, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(path, process)
        client = connected(path)
        yield client, process
        if process.poll() is None:
            client.ok("quit")
        client.close()
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def img(tool: str, *arguments: str | Path, accept: tuple[int, ...] = (0,)) -> str:
    """Run qemu-img or qmpd-img; return what it printed, the tool's name taken out."""
    status, said = run(tool, *arguments)
    assert status in accept, f"{tool} {arguments}: {status}\n{said}"
    return said


def described(tool: str, image: Path) -> Any:
    """Return what a tool says of an image, the space it takes left out."""
    found = json.loads(img(tool, "info", "-U", "--output=json", image))
    return found["format-specific"], found["virtual-size"]


def add_node(image: Path, **more: Any) -> tuple[str, dict[str, Any]]:
    file = {"driver": "file", "filename": str(image)}
    return "blockdev-add", {"driver": "qcow2", "node-name": "q", "file": file, **more}


def digests(client: RawClient, image: Path) -> tuple[list[Any], dict[str, str]]:
    """Return what a program says of the bitmaps of an image it opens to read, and their digests."""
    client.ok("blockdev-add", **add_node(image, **{"read-only": True})[1])
    [node] = [one for one in client.ok("query-named-block-nodes", flat=True) if one["node-name"] == "q"]
    bitmaps = node.get("dirty-bitmaps", [])
    found = {}
    for one in bitmaps:
        command, named = digest(one["name"])
        found[one["name"]] = client.send({"execute": command, "arguments": named})["return"]["sha256"]
    client.ok("blockdev-del", node_name="q")
    return bitmaps, found


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RawClient]]:
    """Both programs, started once."""
    need(PROGRAMS[0])
    folder = tmp_path_factory.mktemp("machines")
    with machine(PROGRAMS[0], folder / "0") as (theirs, _), machine(PROGRAMS[1], folder / "1") as (ours, _):
        yield dict(zip(PROGRAMS, (theirs, ours), strict=True))


def bitmap(verb: str, name: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return f"block-dirty-bitmap-{verb}", {"node": "q", "name": name, **more}


def merge(target: str, *sources: Any) -> tuple[str, dict[str, Any]]:
    return "block-dirty-bitmap-merge", {"node": "q", "target": target, "bitmaps": list(sources)}


def io(text: str) -> tuple[str, dict[str, Any]]:
    return "human-monitor-command", {"command-line": f'qemu-io q "{text}"'}


def digest(name: str) -> tuple[str, dict[str, Any]]:
    return "x-debug-block-dirty-bitmap-sha256", {"node": "q", "name": name}


QUERY = ("query-named-block-nodes", {"flat": True})
DELETE = ("blockdev-del", {"node-name": "q"})

FIRST = [
    bitmap("add", "kept", persistent=True), bitmap("add", "small", persistent=True, granularity=512),
    bitmap("add", "off", persistent=True, disabled=True), bitmap("add", "here"),
    bitmap("add", "gone", persistent=True), bitmap("add", "kept", persistent=True),
    bitmap("add", "x" * 1024, persistent=True), bitmap("add", "x" * 1023, persistent=True, granularity=65536),
    bitmap("add", "huge", persistent=True, granularity=1 << 31), bitmap("add", "", persistent=True),
    QUERY, io("write -q -P 1 1M 100k"), io("write -q -z 5M 1M"), io("discard -q 7M 1M"), io("write -q -P 3 700 100"),
    digest("kept"), digest("small"), digest("off"), digest("here"), digest("huge"), QUERY,
    merge("off", "small", {"node": "q", "name": "kept"}), digest("off"), bitmap("clear", "small"),
    bitmap("disable", "kept"), io("write -q -P 2 3M 64k"), digest("kept"), bitmap("enable", "off"),
    ("block_resize", {"node-name": "q", "size": 33 * MiB + 512}), QUERY, digest("small"),
    io("write -q -P 2 33M 512"), digest("small"), bitmap("remove", "gone"), bitmap("remove", "nosuch"),
    ("block_resize", {"node-name": "q", "size": 20 * MiB}), digest("off"), QUERY, DELETE,
]  # fmt: skip

AGAIN = [
    QUERY, digest("kept"), digest("small"), digest("off"), digest("huge"), bitmap("clear", "kept"),
    io("write -q -P 9 4M 4M"), digest("kept"), digest("small"), bitmap("remove", "huge"),
    bitmap("add", "more", persistent=True),
    QUERY, DELETE,
]  # fmt: skip

READING = [
    QUERY, bitmap("clear", "kept"), bitmap("enable", "kept"), bitmap("disable", "off"), bitmap("remove", "kept"),
    bitmap("add", "new", persistent=True), bitmap("add", "temporary"), merge("kept", "off"),
    merge("temporary", "off"), digest("temporary"), QUERY, DELETE,
]  # fmt: skip

BROKEN = [
    QUERY, bitmap("clear", "kept"), bitmap("enable", "kept"), bitmap("disable", "kept"), merge("kept", "fresh"),
    bitmap("add", "fresh"), merge("fresh", "kept"), digest("kept"), io("write -q 0 64k"), digest("kept"),
    ("block_resize", {"node-name": "q", "size": 24 * MiB}), bitmap("remove", "kept"), QUERY, DELETE,
]  # fmt: skip


def plain(value: Any, folder: Path) -> Any:
    """Return a reply without paths, generated names, and the space taken."""
    text = json.dumps(value).replace(str(folder), "{folder}")
    value = json.loads(re.sub(r"#block\d+", "#block", text))
    if isinstance(value.get("return"), list):
        for node in value["return"]:
            node["image"].pop("actual-size", None)
            if node["drv"] == "file":
                node["image"].pop("virtual-size")
        value["return"] = [node for node in value["return"] if node["node-name"] == "q"]
    return value


def converse(client: RawClient, folder: Path, steps: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [(step, plain(client.send({"execute": step[0], "arguments": step[1]}), folder)) for step in steps]


def both(clients: dict[str, RawClient], tmp_path: Path, steps: list[tuple[str, dict[str, Any]]], **more: Any) -> None:
    """Have QEMU and qmpd do `steps` on an image each, and compare every reply and what is in the image then."""
    said, images = [], []
    for name, client in clients.items():
        folder = tmp_path / name
        image = folder / "image.qcow2"
        client.ok("blockdev-add", **add_node(image, **more)[1])
        said.append(converse(client, folder, steps))
        images.append(image)
        img("qemu-img", "check", "-q", image)
        img("qmpd-img", "check", "-q", image)
    for theirs, ours in zip(*said, strict=True):
        assert ours[1] == theirs[1], theirs[0]
    seen = [described("qemu-img", image) for image in images]
    assert seen[0] == seen[1]
    assert described("qmpd-img", images[1]) == seen[1]
    assert digests(clients["qmpd"], images[0]) == digests(clients[PROGRAMS[0]], images[1])


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512,lazy_refcounts=on"])
def test_replies_and_what_is_stored_are_those_of_qemu(
    options: str, clients: dict[str, RawClient], tmp_path: Path
) -> None:
    need("qemu-img")
    for name in PROGRAMS:
        (tmp_path / name).mkdir()
        img("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, tmp_path / name / "image.qcow2", "32M")
    both(clients, tmp_path, FIRST)
    one, other = (tmp_path / name / "image.qcow2" for name in PROGRAMS)
    swap = tmp_path / "swap"
    one.rename(swap)
    other.rename(one)
    swap.rename(other)
    both(clients, tmp_path, AGAIN)
    both(clients, tmp_path, READING, **{"read-only": True})


@pytest.mark.parametrize("killed", PROGRAMS)
def test_bitmaps_of_a_killed_program_are_not_trusted(
    killed: str, clients: dict[str, RawClient], tmp_path: Path
) -> None:
    need("qemu-img")
    image = tmp_path / "image.qcow2"
    img("qemu-img", "create", "-q", "-f", "qcow2", image, "20M")
    img("qmpd-img", "bitmap", "--add", image, "kept")
    img("qemu-img", "bitmap", "--add", "--disable", image, "off")
    with machine(killed, tmp_path / "killed") as (client, process):
        client.ok(add_node(image)[0], **add_node(image)[1])
        converse(client, tmp_path, [bitmap("add", "fresh", persistent=True), io("write -q 1M 1M"), io("flush")])
        process.kill()
        process.wait()
    flags = [one["flags"] for one in described("qmpd-img", image)[0]["data"]["bitmaps"]]
    assert flags == [["in-use", "auto"], ["in-use"]]
    for name in PROGRAMS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.qcow2").write_bytes(image.read_bytes())
    both(clients, tmp_path, READING, **{"read-only": True})
    both(clients, tmp_path, BROKEN)


VERBS = ("add", "add -g 4k", "add --disable", "remove", "clear", "enable", "disable", "merge b0", "merge b1")


def test_the_tools_do_the_same(proof: Proof, clients: dict[str, RawClient], tmp_path: Path) -> None:
    """Random actions of both on copies of one image, now and then on the image that the other wrote."""
    need("qemu-img", "qemu-io")
    chance = random.Random(4)
    images = {"qemu-img": tmp_path / "theirs.qcow2", "qmpd-img": tmp_path / "ours.qcow2"}
    for image in images.values():
        img("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "9M")
    done = refused = 0
    for number in range(proof.count(60)):
        name, verb = chance.choice(("b0", "b1", "b2")), chance.choice(VERBS)
        at, length = chance.randrange(9 * MiB), chance.randrange(1, 300_000)
        said = {}
        for tool, image in images.items():
            io_command = f"write -q -P 7 {at} {min(length, 9 * MiB - at)}"
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", io_command, str(image)], check=True)
            words = f"--{verb}".split()
            said[tool] = re.sub(r"#block\d+", "#block", img(tool, "bitmap", *words, image, name, accept=(0, 1)))
        assert said["qmpd-img"] == said["qemu-img"], verb
        done += not said["qemu-img"]
        refused += bool(said["qemu-img"])
        assert described("qmpd-img", images["qmpd-img"]) == described("qemu-img", images["qemu-img"])
        if number % 5 == 4:
            for image in images.values():
                img("qemu-img", "check", "-q", image)
            ours, theirs = images["qmpd-img"], images["qemu-img"]
            assert digests(clients[PROGRAMS[0]], ours) == digests(clients["qmpd"], theirs)
            images = {"qemu-img": ours, "qmpd-img": theirs}
    assert done
    assert refused
    proof.record("qcow2-bitmaps", actions=done, refused=refused)
