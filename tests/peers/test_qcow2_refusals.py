"""What is wrong with a qcow2 image, in our words and in QEMU's: the same, also with several faults at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
from pathlib import Path

import pytest

from qmpd.errors import CommandError
from tests.conftest import Proof
from tests.gen.qcow2 import MemoryNode, make, open_qcow2
from tests.gen.qcow2_header import BROKEN, EXTENSIONS, FIELDS, patched, with_extension
from tests.peers.conftest import need

UNBUILT = ("external data file", "extended L2 entries", "AES encryption", "LUKS encryption")
"""What QEMU opens, or asks a key for, and we refuse by name."""


def asked(image: bytes, folder: Path, *, read_only: bool = False) -> str:
    """Return what QEMU says of an image when it opens it, "" for nothing."""
    path = folder / "image.qcow2"
    path.write_bytes(image)
    mode = ["-r"] if read_only else []
    tree = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(path)}}
    name = f"json:{json.dumps(tree)}"
    done = subprocess.run(
        ["qemu-io", *mode, "-c", "quit", name],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=30,
    )
    text = (done.stdout + done.stderr).strip()
    return text.splitlines()[0].removeprefix(f"qemu-io: can't open device {name}: ") if text and done.returncode else ""


async def told(image: bytes, *, read_only: bool = False) -> str:
    """Return what we say of it."""
    try:
        node = await open_qcow2(MemoryNode(image), read_only=read_only)
    except CommandError as error:
        return str(error)
    await node.close()
    return "Could not refresh total sector count: File too large" if node.size > (1 << 63) - (1 << 30) else ""


def agree(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    prefix = "Unsupported qcow2 feature(s): "
    if ours.startswith(prefix) and ours.removeprefix(prefix) in UNBUILT:
        return theirs in ("", "Parameter 'encrypt.key-secret' is required for cipher")
    return False


async def compare(image: bytes, folder: Path, what: object, *, read_only: bool = False) -> None:
    ours = await told(image, read_only=read_only)
    theirs = await asyncio.to_thread(asked, image, folder, read_only=read_only)
    assert agree(ours, theirs), f"{what}: we say {ours!r}, QEMU says {theirs!r}"


@pytest.mark.parametrize(("fields", "text"), BROKEN, ids=str)
async def test_one_field_broken(fields: dict[str, int], text: str, tmp_path: Path) -> None:
    need("qemu-io")
    image = patched(bytes((await make(size=1 << 20)).content), **fields)
    assert await asyncio.to_thread(asked, image, tmp_path) == text
    await compare(image, tmp_path, fields)
    await compare(image, tmp_path, fields, read_only=True)


async def test_two_fields_broken_are_found_in_the_same_order(tmp_path: Path, proof: Proof) -> None:
    need("qemu-io")
    base = bytes((await make(size=1 << 20)).content)
    pairs = [
        {**first, **second, "incompatible": first.get("incompatible", 0) | second.get("incompatible", 0)}
        for (first, _), (second, _) in itertools.combinations(BROKEN, 2)
    ]
    for fields in random.Random(1).sample(pairs, proof.count(len(pairs))):
        await compare(patched(base, **fields), tmp_path, fields)
    proof.record("qcow2-two-faults", pairs=len(pairs))


async def test_random_fields(tmp_path: Path, proof: Proof) -> None:
    need("qemu-io")
    rng = random.Random(2)
    values = (0, 1, 2, 3, 7, 8, 64, 104, 105, 111, 112, 511, 512, 4096, 65535, 65536, 65537, 1 << 31, (1 << 32) - 1)
    wide = (*values, 1 << 32, 1 << 40, 1 << 56, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1)
    for _ in range(proof.count(2000)):
        image = await make(size=1 << 20, version=rng.choice((2, 3)), cluster_size=rng.choice((512, 4096, 65536)))
        fields = {}
        for name in rng.sample([name for name in FIELDS if name not in ("magic", "crypt_method")], rng.randint(1, 3)):
            code = FIELDS[name][1]
            fields[name] = rng.choice(wide if code == "Q" else values) & ((1 << {"Q": 64, "I": 32, "B": 8}[code]) - 1)
        await compare(patched(bytes(image.content), **fields), tmp_path, fields, read_only=True)
    proof.record("qcow2-random-fields", images=2000)


@pytest.mark.parametrize("index", range(len(EXTENSIONS)))
async def test_header_extensions(index: int, tmp_path: Path) -> None:
    need("qemu-io")
    kind, body, length, fields = EXTENSIONS[index]
    base = bytes((await make(size=1 << 20)).content)
    image = patched(with_extension(base, kind, body, length=length), **fields)
    await compare(image, tmp_path, EXTENSIONS[index], read_only=True)
