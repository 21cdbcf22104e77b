"""qmpd-img and qemu-img on each other's images: format x options x size x pattern, both directions."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpd.cli.main import img_main
from tests.support.peers import need

SECRET = "secret,id=sec0,data=abc123"
LUKS = "key-secret=sec0,iter-time=10"
TARGETS = {
    "raw": ("raw", ""),
    "qcow2": ("qcow2", ""),
    "qcow2-v2": ("qcow2", "compat=0.10"),
    "qcow2-512": ("qcow2", "cluster_size=512"),
    "qcow2-2M": ("qcow2", "cluster_size=2M"),
    "qcow2-refs1": ("qcow2", "refcount_bits=1"),
    "qcow2-refs64-lazy": ("qcow2", "refcount_bits=64,lazy_refcounts=on"),
    "qcow2-prealloc": ("qcow2", "preallocation=metadata"),
    "qcow2-full": ("qcow2", "preallocation=full"),
    "qcow2-zstd": ("qcow2", "compression_type=zstd"),
    "qcow2-extended": ("qcow2", "extended_l2=on,cluster_size=16k"),
    "luks": ("luks", LUKS),
    "luks-cbc-essiv": ("luks", f"{LUKS},cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256"),
    "luks-xts128-sha512": ("luks", f"{LUKS},cipher-alg=aes-128,hash-alg=sha512"),
}
SIZES = {"0": 0, "512": 512, "64k+512": 65536 + 512, "3M": 3 << 20}
PATTERNS = ("zero", "data", "sparse", "ends")
PEER = "qemu-img"


def content(pattern: str, size: int) -> bytes:
    """Return what the disk shows."""
    chance = random.Random(f"{pattern}{size}")
    data = bytearray(size)
    if pattern == "data":
        data[:] = chance.randbytes(size)
    elif pattern == "ends" and size:
        data[0] = data[-1] = 1
    elif pattern == "sparse":
        for at in range(0, size, 40960):
            if chance.random() < 0.4:
                piece = chance.randbytes(min(size - at, 512 * chance.randrange(1, 60)))
                data[at : at + len(piece)] = piece
    return bytes(data)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img")
    monkeypatch.chdir(tmp_path)


def peer(*words: str, status: int = 0) -> str:
    done = subprocess.run([PEER, *words], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout


def ours(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    capsys.readouterr()
    result = img_main(list(words))
    text = capsys.readouterr()
    assert result == status, text.err
    return text.out


def source_of(image_format: str, name: str) -> str:
    secret = "key-secret=sec0," if image_format == "luks" else ""
    return f"driver={image_format},{secret}file.filename={name}"


def told(text: str) -> Any:
    """Return info's JSON without what depends on the file system or on chance."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if key != "actual-size"}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(json.loads(text))


def agree(capsys: pytest.CaptureFixture[str], image_format: str, name: str) -> None:
    """Both tools tell the same of an image, show the same map of its content, and find no error in it."""
    for words in (("info", "--output=json"), ("info",)):
        mine, theirs = ours(capsys, *words, "-f", image_format, name), peer(*words, "-f", image_format, name)
        if words[1:]:
            assert told(mine) == told(theirs)
            assert list(json.loads(mine)) == list(json.loads(theirs))
        else:
            assert mine.splitlines()[0] == theirs.splitlines()[0]
            assert len(mine.splitlines()) == len(theirs.splitlines())
    if image_format == "qcow2":
        peer("check", "-q", "-f", "qcow2", name)
        assert told(ours(capsys, "check", "--output=json", name)) == told(peer("check", "--output=json", name))
    arguments = ("map", "--output=json", "--object", SECRET, "--image-opts", source_of(image_format, name))
    assert json.loads(ours(capsys, *arguments)) == json.loads(peer(*arguments))


def same_content(image_format: str, name: str, raw: str) -> None:
    peer("compare", "-q", "--object", SECRET, "--image-opts", source_of(image_format, name), source_of("raw", raw))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_convert_both_ways(target: str, size: int, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    image_format, options = TARGETS[target]
    data = content(pattern, size)
    Path("raw").write_bytes(data)
    name = f"{target}.img"
    asked = ("convert", "--object", SECRET, "-f", "raw", "-O", image_format, *(("-o", options) if options else ()))
    ours(capsys, *asked, "raw", name)
    same_content(image_format, name, "raw")
    agree(capsys, image_format, name)
    back = ("convert", "--object", SECRET, "--image-opts", "-O", "raw", source_of(image_format, name))
    ours(capsys, *back, "back")
    assert Path("back").read_bytes() == data
    os.unlink(name)
    peer(*asked, "raw", name)
    agree(capsys, image_format, name)
    ours(capsys, *back, "back2")
    assert Path("back2").read_bytes() == data
    compared = ("compare", "--object", SECRET, "--image-opts", source_of(image_format, name), source_of("raw", "raw"))
    assert ours(capsys, *compared) == "Images are identical.\n"


PACKED = ["", "compression_type=zstd", "cluster_size=512", "cluster_size=2M", "compat=0.10", "extended_l2=on"]


@pytest.mark.parametrize("pattern", ["data", "sparse"])
@pytest.mark.parametrize("options", PACKED)
def test_convert_compressed(options: str, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both tools compress; each reads what the other wrote, and finds no error in it."""
    data = content(pattern, (1 << 20) + 512)
    Path("raw").write_bytes(data)
    asked = ("convert", "-c", "-f", "raw", "-O", "qcow2", *(("-o", options) if options else ()), "raw")
    ours(capsys, *asked, "mine")
    peer(*asked, "theirs")
    for name in ("mine", "theirs"):
        agree(capsys, "qcow2", name)
        same_content("qcow2", name, "raw")
        ours(capsys, "convert", "-f", "qcow2", "-O", "raw", name, "back")
        assert Path("back").read_bytes() == data
    packed = [
        sum(one["length"] for one in json.loads(peer("map", "--output=json", name)) if one["compressed"])
        for name in ("mine", "theirs")
    ]
    assert packed[0] == packed[1]


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on", "refcount_bits=1"])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_resize_with_preallocation(mode: str, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is new has its clusters, and reads as zeroes."""
    data = content("data", (1 << 20) + 512)
    Path("raw").write_bytes(data)
    ours(capsys, "convert", "-f", "raw", "-O", "qcow2", *(("-o", options) if options else ()), "raw", "image")
    ours(capsys, "resize", "-q", f"--preallocation={mode}", "image", "3M")
    peer("check", "-q", "image")
    told_of = json.loads(peer("check", "--output=json", "image"))
    assert told_of["allocated-clusters"] == told_of["total-clusters"]
    Path("raw").write_bytes(data.ljust(3 << 20, b"\0"))
    same_content("qcow2", "image", "raw")
    if mode == "full":
        assert Path("image").stat().st_blocks * 512 >= 3 << 20


@pytest.mark.parametrize("raw", ["off", "on"])
def test_info_tells_of_a_data_file_and_does_not_open_it(raw: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The name is whatever the image says: a file that is not there is not missed."""
    peer("create", "-q", "-f", "qcow2", "-o", f"data_file=data,data_file_raw={raw}", "image", "1M")
    os.unlink("data")
    mine, theirs = (tool("info", "--output=json", "image") for tool in (lambda *words: ours(capsys, *words), peer))
    assert told(mine) == told(theirs)
    assert ours(capsys, "info", "image").count("data file") == 2
    assert img_main(["convert", "-O", "raw", "image", "out"]) == 1
    assert not Path("out").exists()


def test_unknown_header_extensions_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """An extension that nobody knows is still there after the header was written anew."""
    ours(capsys, "create", "-q", "-f", "qcow2", "image", "1M")
    Path("below").write_bytes(bytes(1 << 20))
    image = bytearray(Path("image").read_bytes())
    at = 112
    while kind := int.from_bytes(image[at : at + 4], "big"):
        at += 8 + -(-int.from_bytes(image[at + 4 : at + 8], "big") // 8) * 8
        assert kind != 0x12345678
    image[at : at + 16] = bytes.fromhex("12345678 00000005") + b"hello\0\0\0"
    Path("image").write_bytes(image)
    for words in (
        ("rebase", "-u", "-b", "below", "-F", "raw", "image"),
        ("rebase", "-u", "-b", "", "image"),
        ("amend", "-o", "lazy_refcounts=on", "image"),
        ("bitmap", "--add", "image", "b"),
    ):
        ours(capsys, *words)
        assert b"\x12\x34\x56\x78\0\0\0\5hello\0\0\0" in Path("image").read_bytes()[:4096]
        peer("check", "-q", "image")


@pytest.mark.parametrize("words", ["", "-W", "-m 1", "-m 16", "-S 0", "-S 64k", "-S 512", "-t none", "-t writethrough"])
def test_convert_options(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("raw").write_bytes(content("sparse", 5 << 20))
    ours(capsys, "convert", *words.split(), "-f", "raw", "-O", "qcow2", "raw", "out")
    peer("check", "-q", "out")
    same_content("qcow2", "out", "raw")
    ours(capsys, "convert", *words.split(), "-f", "qcow2", "-O", "raw", "out", "out.raw")
    assert Path("out.raw").read_bytes() == Path("raw").read_bytes()


def test_convert_joins_sources_and_keeps_chains(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = content("sparse", 1 << 20), content("data", 65536 + 512)
    Path("a").write_bytes(first)
    Path("b").write_bytes(second)
    ours(capsys, "convert", "-f", "raw", "-O", "qcow2", "a", "b", "both")
    Path("all").write_bytes(first + second)
    same_content("qcow2", "both", "all")
    peer("create", "-q", "-f", "qcow2", "-b", "both", "-F", "qcow2", "over", "3M")
    subprocess.run(
        ["qemu-io", "-c", "write -P 7 300k 100k", "-c", "write -z 64k 64k", "over"], check=True, capture_output=True
    )
    ours(capsys, "convert", "-O", "qcow2", "-B", "both", "-F", "qcow2", "over", "copy")
    peer("compare", "-q", "over", "copy")
    kinds = [
        [(one["start"], one["length"], one["depth"]) for one in json.loads(peer("map", "--output=json", name))]
        for name in ("over", "copy")
    ]
    assert kinds[0] == kinds[1]


def test_a_source_is_not_its_own_target(capsys: pytest.CaptureFixture[str]) -> None:
    """A conversion of a file onto itself emptied the file before it was read."""
    data = content("data", 65536)
    Path("a").write_bytes(data)
    assert img_main(["convert", "-f", "raw", "a", "a"]) == 1
    assert 'Failed to get "write" lock' in capsys.readouterr().err
    assert Path("a").read_bytes() == data


MEASURED = [
    ("raw", ""),
    ("luks", LUKS),
    ("qcow2", ""),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "refcount_bits=1,cluster_size=2M"),
    ("qcow2", "preallocation=full"),
]


@pytest.mark.parametrize(("image_format", "options"), MEASURED)
@pytest.mark.parametrize("size", ["0", "1M", "100G", "1234567"])
def test_measure(image_format: str, options: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "measure",
        "--object",
        SECRET,
        "-O",
        image_format,
        *(("-o", options) if options else ()),
        "--output=json",
        "--size",
        size,
    )
    assert ours(capsys, *words) == peer(*words)


DIFFERENT = [("first", 0), ("middle", 300_000), ("last", 999_999)]


@pytest.mark.parametrize("place", [place for _, place in DIFFERENT], ids=[name for name, _ in DIFFERENT])
def test_compare_finds_the_sector(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(content("sparse", 1_000_448))
    Path("a").write_bytes(data)
    data[place] ^= 255
    Path("b").write_bytes(data)
    words = ("compare", "-f", "raw", "-F", "raw", "a", "b")
    assert ours(capsys, *words, status=1) == peer(*words, status=1)
