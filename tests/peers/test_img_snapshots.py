"""Internal snapshots of qcow2, made, applied and deleted by QEMU's tool and by ours on the same images."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpd.cli.main import img_main
from tests.conftest import Proof
from tests.support.nbd_servers import qemu, qmpd
from tests.support.peers import need

SIZE = 1 << 20
KINDS = {
    "default": "cluster_size=64k",
    "small": "cluster_size=512",
    "pages-lazy": "cluster_size=4k,lazy_refcounts=on",
    "version-2": "compat=0.10,cluster_size=4k",
    "narrow": "cluster_size=4k,refcount_bits=32",
    "wide": "cluster_size=64k,refcount_bits=64",
}


def run(tool: str, *arguments: str | Path) -> tuple[int, str]:
    """Run qemu-img or, in this process, qmpd-img; return its status and what it said."""
    words = [str(one) for one in arguments]
    if tool != "qmpd-img":
        done = subprocess.run([tool, *words], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = img_main(words)
    return status, said.getvalue().replace("qmpd-img", "qemu-img")


def ok(tool: str, *arguments: str | Path) -> str:
    status, said = run(tool, *arguments)
    assert status == 0, f"{tool} {arguments}: {status}\n{said}"
    return said


def sound(image: Path) -> None:
    """Both tools find nothing wrong, and list the same snapshots."""
    for tool in ("qemu-img", "qmpd-img"):
        ok(tool, "check", "-f", "qcow2", image)
    theirs = json.loads(ok("qemu-img", "info", "--output=json", image))
    ours = json.loads(ok("qmpd-img", "info", "--output=json", image))
    assert ours.get("snapshots") == theirs.get("snapshots")
    assert ok("qmpd-img", "snapshot", "-l", image) == ok("qemu-img", "snapshot", "-l", image)


def write(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(image)], check=True, capture_output=True)


def shown(image: Path) -> bytes:
    raw = image.with_suffix(".raw")
    ok("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_random_histories_show_what_they_should(kind: str, proof: Proof, tmp_path: Path) -> None:
    """Writes between snapshots; the disk always is what a copy of it kept here is."""
    need("qemu-img", "qemu-io")
    chance = random.Random(kind)
    first = tmp_path / "first.raw"
    first.write_bytes(chance.randbytes(SIZE // 4) + bytes(SIZE // 2) + (b"compressible" * SIZE)[: SIZE // 4])
    image = tmp_path / "image.qcow2"
    ok("qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", KINDS[kind], first, image)
    disk = bytearray(first.read_bytes())
    kept: dict[str, bytes] = {}
    steps = {"create": 0, "apply": 0, "delete": 0}
    for number in range(proof.count(120)):
        for _ in range(chance.randrange(3)):
            at = chance.randrange(SIZE)
            length = min(chance.choice((512, 5000, 100_000)), SIZE - at)
            pattern = chance.randrange(256)
            write(image, f"write -q -P {pattern} {at} {length}" if pattern else f"write -q -z {at} {length}")
            disk[at : at + length] = bytes([pattern]) * length
        verb = chance.choice(("create", "apply", "delete")) if kept else "create"
        if len(kept) > 6:
            verb = "delete"
        tool = chance.choice(("qmpd-img", "qmpd-img", "qemu-img"))
        name = f"s{number}" if verb == "create" else chance.choice(list(kept))
        ok(tool, "snapshot", f"-{verb[0]}", name, image)
        steps[verb] += 1
        if verb == "create":
            kept[name] = bytes(disk)
        elif verb == "apply":
            disk[:] = kept[name]
        else:
            del kept[name]
        if number % 3 == 2:
            sound(image)
            assert shown(image) == bytes(disk), (number, verb)
    for name, content in kept.items():
        ok("qmpd-img", "snapshot", "-a", name, image)
        assert shown(image) == content
    for name in kept:
        ok("qmpd-img", "snapshot", "-d", name, image)
    sound(image)
    proof.record(f"qcow2-snapshots-{kind}", **steps)


SCRIPT = (
    "-c a", "-c a", "-c 7", "-c b", "-l", "-a 1", "-a 3", "-a a", "-d nosuch", "-a nosuch", "-d 3", "-d 1", "-d a",
    "-d a", "-d a", "-c c", "-l", "resize 3M", "-c d", "-a c", "-a d", "-a 5", "-a 9", "-d b", "-c ''", "-l",
    f"-c {'x' * 300}", "-l", "-a ''", "-d ''", "bitmap --add", "-a c", "-c e", "-d e", "bitmap --remove", "-a c", "-l",
)  # fmt: skip


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "refcount_bits=1"])
def test_the_tools_say_the_same(options: str, tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    said: dict[str, list[tuple[str, int, str]]] = {}
    for tool in ("qemu-img", "qmpd-img"):
        image = tmp_path / f"{tool}.qcow2"
        ok("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "2M")
        write(image, "write -q -P 1 0 100k", "write -q -P 2 1M 100k")
        for line in SCRIPT:
            words = [word.strip("'") for word in line.split()]
            if words[0] == "resize":
                done = run(tool, "resize", image, words[1])
            elif words[0] == "bitmap":
                done = run(tool, "bitmap", words[1], image, "b0")
            else:
                done = run(tool, "snapshot", *words, image)
            text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|#block\d+", "...", done[1])
            said.setdefault(tool, []).append((line, done[0], text))
        if options != "refcount_bits=1":
            sound(image)
    assert said["qmpd-img"] == said["qemu-img"]
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    for verb in ("-c", "-a", "-d", "-l"):
        words = ["snapshot", "-f", "raw", verb, *([] if verb == "-l" else ["a"]), raw]
        assert run("qmpd-img", *words) == run("qemu-img", *words)


def test_a_snapshot_that_does_not_fit_the_refcounts_leaves_the_image_as_it_was(tmp_path: Path) -> None:
    """qemu-img leaves a leaked cluster there."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "image.qcow2"
    ok("qemu-img", "create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", image, "2M")
    write(image, "write -q -P 1 0 100k")
    assert run("qmpd-img", "snapshot", "-c", "a", image) == (
        1,
        "qemu-img: Could not create snapshot 'a': Invalid argument\n",
    )
    sound(image)
    write(image, "read -q -P 1 0 100k")


def node(name: str, image: str, **more: Any) -> tuple[str, dict[str, Any]]:
    file = {"driver": "file", "filename": "{folder}/" + image, "node-name": f"{name}-file"}
    return "blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, **more}


def make(device: str, name: str) -> tuple[str, dict[str, Any]]:
    return "blockdev-snapshot-internal-sync", {"device": device, "name": name}


def delete(device: str, **which: str) -> tuple[str, dict[str, Any]]:
    return "blockdev-snapshot-delete-internal-sync", {"device": device, **which}


DIALOGUE = [
    node("q", "one.qcow2"), ("blockdev-add", {"driver": "raw", "node-name": "top", "file": "q"}), make("q", "a"),
    make("top", "a"), make("top", "a"), make("q-file", "a"), delete("q", name="a"), delete("top", name="a"),
    ("blockdev-del", {"node-name": "top"}), make("q", "a"), make("q", "b"), make("q", "c"), make("q", ""),
    delete("q", name="b", id="2"), delete("q", name="c", id="2"), delete("q", id="3"), delete("q", id=""),
    delete("nosuch"), delete("nosuch", name="x"), delete("q"), node("r", "two.qcow2", **{"read-only": True}),
    make("r", ""), delete("r", name="z"), ("blockdev-del", {"node-name": "r"}), make("q", "x" * 300),
    node("over", "three.qcow2", backing={"driver": "raw", "file": {"driver": "null-co", "size": 1 << 20}}),
    make("over", "o"), delete("over", name="o"), make("nosuch", "o"),
    ("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 1 << 20}), make("n", "w"), make("n", ""),
    delete("n", name="a"),
]  # fmt: skip


def test_the_commands_answer_as_qemu_does(tmp_path: Path) -> None:
    need("qemu-storage-daemon", "qemu-img")
    said = []
    for name, server in (("qemu", qemu), ("qmpd", qmpd)):
        folder = tmp_path / name
        folder.mkdir()
        for image in ("one", "two", "three"):
            ok("qemu-img", "create", "-q", "-f", "qcow2", folder / f"{image}.qcow2", "1M")
        replies = []
        with server(folder) as client:
            for command, arguments in DIALOGUE:
                text = json.dumps({"execute": command, "arguments": arguments}).replace("{folder}", str(folder))
                reply = client.send(json.loads(text))
                if isinstance(reply.get("return"), dict):
                    for key in ("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"):
                        reply["return"].pop(key, None)
                replies.append((command, arguments, reply))
        said.append(replies)
        sound(folder / "one.qcow2")
        sound(folder / "three.qcow2")
    for theirs, ours in zip(*said, strict=True):
        assert ours == theirs
