"""What qmpd-img does with encrypted qcow2 images besides making and reading them; QEMU judges every outcome."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.peers.conftest import need
from tests.peers.test_qcow2_encrypted import SECRETS, call, opts, run

SIZE = 8 << 20
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iterations=1000,encrypt.cipher-alg=aes-128"
AES = "encrypt.format=aes,encrypt.key-secret=s"


@pytest.fixture(params=[LUKS, AES], ids=["luks", "aes"])
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """An encrypted image, an encrypted overlay whose name for it is dotted JSON, and what the overlay shows."""
    need("qemu-img", "qemu-io")
    base, top, shown = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "shown.raw"))
    run("qmpd-img", "create", "-q", *SECRETS, "-f", "qcow2", "-o", request.param, base, str(SIZE))
    io(base, "write -q -P 1 0 8M")
    name = json.dumps({"driver": "qcow2", "encrypt.key-secret": "s", "file.filename": str(base)})
    run(
        "qmpd-img",
        "create",
        "-q",
        *SECRETS,
        "-f",
        "qcow2",
        "-o",
        request.param,
        "-b",
        f"json:{name}",
        "-F",
        "qcow2",
        top,
    )
    io(top, "write -q -P 2 1M 100k", "write -q -z 2M 1M", "write -q -P 4 5000k 1k")
    run("qemu-img", "convert", *SECRETS, "--image-opts", "-O", "raw", opts(top), shown)
    return base, top, shown


def io(image: Path, *commands: str) -> None:
    """Run commands of qemu-io, all of which must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    text = run("qemu-io", *SECRETS, "--image-opts", *words, opts(image))
    assert "failed" not in text, text


def sound(image: Path, shown: Path) -> None:
    """The image is clean, and shows the same in both programs."""
    run("qemu-img", "check", "-q", *SECRETS, "--image-opts", opts(image))
    for tool in ("qemu-img", "qmpd-img"):
        run(tool, "compare", "-q", *SECRETS, "--image-opts", opts(image), f"driver=raw,file.filename={shown}")


def test_a_chain_is_read_and_rebased(chain: tuple[Path, Path, Path]) -> None:
    _, top, shown = chain
    sound(top, shown)
    run("qmpd-img", "rebase", *SECRETS, "--image-opts", "-b", "", opts(top))
    sound(top, shown)


def test_an_overlay_is_committed(chain: tuple[Path, Path, Path]) -> None:
    base, top, shown = chain
    run("qmpd-img", "commit", "-q", *SECRETS, "--image-opts", opts(top))
    sound(base, shown)


def test_sizes_change(chain: tuple[Path, Path, Path]) -> None:
    """What is new is zero, also where the overlay's backing file is shorter."""
    _, top, _ = chain
    for size, more in (("12M", ()), ("5M", ("--shrink",)), ("8M", ())):
        run("qmpd-img", "resize", "-q", *more, *SECRETS, "--image-opts", opts(top), size)
        run("qemu-img", "check", "-q", *SECRETS, "--image-opts", opts(top))
    io(top, "read -q -P 2 1M 100k", "read -q -P 1 3M 1880k", "read -q -P 0 5M 3M")


def test_snapshots_are_taken_and_gone_back_to(chain: tuple[Path, Path, Path]) -> None:
    """With the new data elsewhere in the file, its sectors are numbered anew; those of the snapshot are not."""
    _, top, shown = chain
    for maker, other in (("qmpd-img", "qemu-img"), ("qemu-img", "qmpd-img")):
        run(maker, "snapshot", *SECRETS, "--image-opts", "-c", "one", opts(top))
        io(top, "write -q -P 9 100k 3M", "write -q -z 6M 100k")
        run("qmpd-img", "bench", "-q", "-w", "-c", "5", *SECRETS, "--image-opts", opts(top))
        run(other, "check", "-q", *SECRETS, "--image-opts", opts(top))
        run(other, "snapshot", *SECRETS, "--image-opts", "-a", "one", opts(top))
        sound(top, shown)
        run(maker, "snapshot", *SECRETS, "--image-opts", "-d", "one", opts(top))
        sound(top, shown)


def test_the_version_goes_down_and_up_and_refcounts_get_wide(chain: tuple[Path, Path, Path]) -> None:
    """Version 2 has no zero clusters: over a backing file they become encrypted zeroes."""
    _, top, shown = chain
    for options in (
        "compat=0.10",
        "compat=1.1,refcount_bits=64",
        "refcount_bits=1",
        "lazy_refcounts=on,refcount_bits=4",
    ):
        run("qmpd-img", "amend", *SECRETS, "--image-opts", "-o", options, opts(top))
        sound(top, shown)


@pytest.mark.parametrize("below", [True, False], ids=["backing", "alone"])
def test_snapshots_keep_their_zeroes_in_version_2(chain: tuple[Path, Path, Path], below: bool) -> None:
    """Two snapshots share tables; one cluster is marked as zero with its old place kept, another without a place."""
    _, top, shown = chain
    if not below:
        run("qemu-img", "rebase", *SECRETS, "--image-opts", "-b", "", opts(top))
    io(top, "write -q -P 3 4M 128k", "write -q -z 4M 64k", "write -q -z 7M 128k")
    run("qemu-img", "convert", *SECRETS, "--image-opts", "-O", "raw", opts(top), shown)
    for name in ("one", "two"):
        run("qemu-img", "snapshot", *SECRETS, "--image-opts", "-c", name, opts(top))
    io(top, "write -q -P 9 7M 64k", "write -q -z 1M 64k")
    run("qmpd-img", "amend", *SECRETS, "--image-opts", "-o", "compat=0.10", opts(top))
    for name in ("one", "two"):
        run("qemu-img", "check", "-q", *SECRETS, "--image-opts", opts(top))
        run("qemu-img", "snapshot", *SECRETS, "--image-opts", "-a", name, opts(top))
        sound(top, shown)
        run("qemu-img", "snapshot", *SECRETS, "--image-opts", "-d", name, opts(top))
    sound(top, shown)


def test_lost_refcounts_are_counted_again_those_of_the_luks_header_too(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image, shown = tmp_path / "i.qcow2", tmp_path / "shown.raw"
    run("qmpd-img", "create", "-q", *SECRETS, "-f", "qcow2", "-o", LUKS, image, str(SIZE))
    io(image, "write -q -P 1 0 2M")
    run("qemu-img", "convert", *SECRETS, "--image-opts", "-O", "raw", opts(image), shown)
    data = bytearray(image.read_bytes())
    table = struct.unpack_from(">Q", data, 48)[0]
    block = struct.unpack_from(">Q", data, table)[0]
    place, length = struct.unpack_from(">QQ", data, data.index(struct.pack(">II", 0x0537BE77, 16)) + 8)
    for cluster in range(place >> 16, (place + length - 1 >> 16) + 1):
        assert struct.unpack_from(">H", data, block + 2 * cluster)[0] == 1
        struct.pack_into(">H", data, block + 2 * cluster, 0)
    image.write_bytes(data)
    clusters = (place + length - 1 >> 16) - (place >> 16) + 1
    found = call("qmpd-img", "check", "--output=json", *SECRETS, "--image-opts", opts(image))
    assert (found.returncode, json.loads(found.stdout)["corruptions"]) == (2, clusters)
    run("qmpd-img", "check", "-q", "-r", "all", *SECRETS, "--image-opts", opts(image))
    sound(image, shown)
