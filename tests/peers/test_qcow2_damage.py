"""Injected damage of qcow2 images: `qmpd-img check -r all` leaves what `qemu-img check` calls clean, data untouched.

Each kind is damage that QEMU reports, or a bit that it clears; the content shown must be what it was.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpd.cli.main import img_main
from qmpd.formats.qcow2 import COPIED, OFFSET_MASK, ZERO
from tests.peers.conftest import need

Damage = Callable[[bytearray], None]

CLUSTER = 4096
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": (f"cluster_size={CLUSTER}", ("write -q -P 1 0 400k",)),
    "zero": (f"cluster_size={CLUSTER}", ("write -q -P 1 0 400k", "write -q -z 0 16k")),
    "snapshot": (f"cluster_size={CLUSTER}", ("write -q -P 1 0 400k",)),
    "packed": (
        f"cluster_size={CLUSTER}",
        ("write -q -c -P 1 0 4k", "write -q -c -P 2 4k 4k", "write -q -c -P 4 8k 4k", "write -q -P 3 64k 8k"),
    ),
    "extended": ("cluster_size=16k,extended_l2=on", ("write -q -P 1 0 16k", "write -q -P 3 64k 1k")),
    "bitmap": (f"cluster_size={CLUSTER}", ("write -q -P 1 0 40k",)),
    "wide": (f"cluster_size={CLUSTER},refcount_bits=64", ("write -q -P 1 0 40k",)),
    "narrow": (f"cluster_size={CLUSTER},refcount_bits=1", ("write -q -P 1 0 40k",)),
}


def get(data: bytearray, at: int, code: str = "Q") -> int:
    value: int = struct.unpack_from(f">{code}", data, at)[0]
    return value


def put(data: bytearray, at: int, value: int, code: str = "Q") -> None:
    struct.pack_into(f">{code}", data, at, value)


def field(at: int, value: int, code: str = "Q") -> Damage:
    return lambda data: put(data, at, value, code)


def l1(data: bytearray) -> int:
    return get(data, 40)


def l2(data: bytearray) -> int:
    return get(data, l1(data)) & OFFSET_MASK


def table(data: bytearray) -> int:
    return get(data, 48)


def block(data: bytearray) -> int:
    return get(data, table(data))


def snapshots(data: bytearray) -> int:
    return get(data, 64)


def entry(place: Callable[[bytearray], int], index: int, change: Callable[[int], int]) -> Damage:
    def damage(data: bytearray) -> None:
        at = place(data) + 8 * index
        put(data, at, change(get(data, at)))

    return damage


def refcount(cluster: Callable[[bytearray], int], value: int) -> Damage:
    return lambda data: put(data, block(data) + 2 * cluster(data), value, "H")


def packed(data: bytearray) -> int:
    """Return the number of the cluster that the first compressed one lies in."""
    return (get(data, l2(data)) & (1 << 58) - 1) // CLUSTER


def set_entry(place: Callable[[bytearray], int], index: int, value: Callable[[bytearray], int]) -> Damage:
    return lambda data: put(data, place(data) + 8 * index, value(data))


KINDS: dict[str, tuple[str, Damage]] = {
    "leaked clusters behind the end": (
        "plain",
        lambda data: (data.extend(bytes(8192)), put(data, block(data) + 2 * 106, 7, "H"))[1],
    ),
    "a zero cluster with an unaligned place": ("zero", entry(l2, 0, lambda value: value | 512)),
    "a new zero cluster with an unaligned place": ("plain", entry(l2, 150, lambda _: 20480 + 512 | ZERO)),
    "the corrupt bit": ("plain", field(72, 2)),
    "the dirty and the corrupt bit": ("plain", field(72, 3)),
    "no clusters of refcount table": ("plain", field(56, 0, "I")),
    "the refcount table in data": ("plain", field(48, 20480)),
    "the refcount table after the end": ("plain", field(48, 1 << 30)),
    "the refcount table in the header": ("plain", field(48, 0)),
    "a refcount block in the refcount table": ("plain", set_entry(table, 0, table)),
    "a refcount block in the L2 table": ("plain", set_entry(table, 0, l2)),
    "a refcount block in data": ("plain", set_entry(table, 0, lambda _: 24576)),
    "a second refcount block after the end": ("plain", set_entry(table, 1, lambda _: 1 << 30)),
    "an L2 entry that names the L1 table": ("plain", set_entry(l2, 120, lambda data: COPIED | l1(data))),
    "an L2 entry that names its own table": ("plain", set_entry(l2, 120, lambda data: COPIED | l2(data))),
    "an L2 entry that names the refcount block": ("plain", set_entry(l2, 120, lambda data: COPIED | block(data))),
    "a refcount of shared data too low": ("snapshot", refcount(lambda _: 5, 1)),
    "a refcount of shared data too high": ("snapshot", refcount(lambda _: 6, 9)),
    "an L2 entry of shared data with copied flag": ("snapshot", entry(l2, 3, lambda value: value | COPIED)),
    "an L1 entry of a shared table with copied flag": ("snapshot", entry(l1, 0, lambda value: value | COPIED)),
    "the snapshot table counted as free": ("snapshot", refcount(lambda data: snapshots(data) // CLUSTER, 0)),
    "the L1 table of a snapshot counted as free": (
        "snapshot",
        refcount(lambda data: get(data, snapshots(data)) // CLUSTER, 0),
    ),
    "the L1 table of a snapshot counted twice": (
        "snapshot",
        refcount(lambda data: get(data, snapshots(data)) // CLUSTER, 2),
    ),
    "more snapshots than there are": ("snapshot", field(60, 2, "I")),
    "a snapshot without its size": ("snapshot", lambda data: put(data, snapshots(data) + 36, 8, "I")),
    "a refcount of compressed data too high": ("packed", refcount(packed, 9)),
    "a refcount of compressed data too low": ("packed", refcount(packed, 1)),
    "compressed data counted as free": ("packed", refcount(packed, 0)),
    "an extended entry without copied flag": ("extended", entry(l2, 0, lambda value: value & ~COPIED)),
    "a cluster of subclusters counted thrice": ("extended", lambda data: put(data, block(data) + 10, 3, "H")),
    "a bitmap's table counted twice": ("bitmap", refcount(lambda _: 15, 2)),
    "a bitmap's directory counted twice": ("bitmap", refcount(lambda _: 16, 2)),
    "a bitmap's table counted as free": ("bitmap", refcount(lambda _: 15, 0)),
    "a wide refcount far too high": ("wide", lambda data: put(data, block(data) + 8 * 5, 1 << 40)),
    "the header counted as free in one bit": ("narrow", lambda data: put(data, block(data), 0xFE, "B")),
}
HARMLESS = {"the corrupt bit", "the dirty and the corrupt bit"}
"""What `qemu-img check` calls no error before."""


def run(*command: str | Path, accept: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode in accept, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one sound image of each source, and what it shows."""
    need("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("sound")
    for name, (options, commands) in SOURCES.items():
        image = folder / name
        size = "4M" if name == "extended" else "1M"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, size)
        run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), image)
        if name == "snapshot":
            run("qemu-img", "snapshot", "-c", "one", image)
        if name == "bitmap":
            run("qemu-img", "bitmap", "--add", image, "b")
        run("qemu-img", "convert", "-O", "raw", image, folder / f"{name}.raw")
    return folder


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 25


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_repaired(kind: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, damage = KINDS[kind]
    data = bytearray((images / source).read_bytes())
    sound = bytes(data)
    damage(data)
    assert bytes(data) != sound or kind in HARMLESS
    image = tmp_path / "image"
    image.write_bytes(data)
    run("qemu-img", "check", image, accept=(0,) if kind in HARMLESS else (1, 2, 3))
    assert img_main(["check", "-q", "-f", "qcow2", "-r", "all", str(image)]) == 0, capsys.readouterr()
    run("qemu-img", "check", "-q", image)
    header = image.read_bytes()[:80]
    assert not get(bytearray(header), 72) & 3
    if "names" not in kind:
        run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", image, images / f"{source}.raw")
