"""qmpd-img's working subcommands on images of its own making; what QEMU says of them is in tests/peers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from pathlib import Path

import pytest

from qmpd.cli.img import _opts
from qmpd.cli.img._copy import runs
from qmpd.cli.img._progress import Progress
from qmpd.cli.main import img_main

SECRET = ("--object", "secret,id=sec0,data=abc123")


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str, status: int = 0) -> None:
    assert img_main(list(words)) == status


def pattern(size: int, *places: int) -> bytes:
    data = bytearray(size)
    for place in places:
        data[place : place + 5000] = random.Random(place).randbytes(5000)
    return bytes(data[:size])


def test_convert_there_and_back() -> None:
    data = pattern(1 << 20, 0, 300_000, 900_000)
    Path("a").write_bytes(data)
    run("convert", "-f", "raw", "-O", "qcow2", "a", "b")
    run("convert", *SECRET, "-O", "luks", "-o", "key-secret=sec0,iter-time=10", "b", "c")
    assert data[300_000:305_000] not in Path("c").read_bytes()
    run("convert", *SECRET, "--image-opts", "driver=luks,key-secret=sec0,file.filename=c", "-O", "raw", "d")
    assert Path("d").read_bytes() == data
    assert Path("d").stat().st_blocks * 512 < len(data) // 2, "zeroes are holes again"


def test_convert_refuses_compression_before_it_makes_anything(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").write_bytes(bytes(512))
    run("convert", "-c", "-f", "raw", "-O", "raw", "a", "b", status=1)
    assert capsys.readouterr().err == "qmpd-img: Compression not supported for this file format\n"
    assert not Path("b").exists()


def test_compare_tells_where_and_by_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").write_bytes(pattern(1 << 20, 4096))
    Path("b").write_bytes(pattern(1 << 20, 4096, 700_000))
    run("compare", "a", "a")
    run("compare", "a", "b", status=1)
    run("compare", "a", "none", status=2)
    out, err = capsys.readouterr()
    assert out == "Images are identical.\nContent mismatch at offset 699904!\n"
    assert "No such file" in err


def test_map_follows_the_chain(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").write_bytes(pattern(65536, 0))
    run("resize", "-q", "-f", "raw", "a", "1M")
    run("create", "-q", "-f", "qcow2", "-b", "a", "-F", "raw", "b")
    capsys.readouterr()
    run("map", "--output=json", "b")
    found = json.loads(capsys.readouterr().out)
    assert [one["depth"] for one in found] == [1, 1]
    assert found[0]["data"]
    assert found[1]["zero"]


def test_check_names_formats_without_checks(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").write_bytes(bytes(512))
    run("check", "a", status=63)
    assert capsys.readouterr().err == "qmpd-img: This image format does not support checks\n"


def test_check_leaks_and_mends(capsys: pytest.CaptureFixture[str]) -> None:
    Path("raw").write_bytes(pattern(1 << 20, 0, 70_000))
    run("convert", "-f", "raw", "-O", "qcow2", "raw", "a")
    data = bytearray(Path("a").read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    data[l2 : l2 + 8] = bytes(8)
    Path("a").write_bytes(data)
    run("check", "a", status=3)
    assert "1 leaked clusters were found on the image." in capsys.readouterr().out
    run("check", "-r", "leaks", "a")
    assert "    1 leaked clusters\n    0 corruptions\n" in capsys.readouterr().out
    run("check", "a")


@pytest.mark.parametrize(
    ("words", "size"), [(("+1M",), 2 << 20), (("3M",), 3 << 20), (("--shrink", "-512k"), 512 << 10)]
)
def test_resize(words: tuple[str, ...], size: int, capsys: pytest.CaptureFixture[str]) -> None:
    run("create", "-q", "-f", "qcow2", "a", "1M")
    run("resize", *words[:-1], "a", words[-1])
    assert capsys.readouterr().out == "Image resized.\n"
    run("info", "--output=json", "a")
    assert json.loads(capsys.readouterr().out)["virtual-size"] == size


def test_shrinking_has_to_be_meant(capsys: pytest.CaptureFixture[str]) -> None:
    run("create", "-q", "a", "1M")
    run("resize", "-f", "raw", "a", "-512k", status=1)
    assert "Use the --shrink option" in capsys.readouterr().err
    assert Path("a").stat().st_size == 1 << 20


def test_rebase_keeps_what_is_shown() -> None:
    Path("old").write_bytes(pattern(1 << 20, 0, 500_000))
    Path("new").write_bytes(pattern(1 << 20, 0, 800_000))
    run("create", "-q", "-f", "qcow2", "-b", "old", "-F", "raw", "a")
    run("rebase", "-b", "new", "-F", "raw", "a")
    run("convert", "-f", "qcow2", "a", "shown")
    assert Path("shown").read_bytes() == Path("old").read_bytes()
    run("rebase", "-b", "", "a")
    Path("new").unlink()
    run("convert", "-f", "qcow2", "a", "shown")
    assert Path("shown").read_bytes() == Path("old").read_bytes()


def test_commit_writes_below_and_empties() -> None:
    Path("base").write_bytes(pattern(1 << 20, 0))
    Path("data").write_bytes(pattern(1 << 20, 0, 600_000))
    run("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "a")
    run("dd", "if=data", "of=b", "-O", "qcow2")
    run("rebase", "-u", "-b", "base", "-F", "raw", "b")
    run("commit", "-q", "b")
    assert Path("base").read_bytes() == Path("data").read_bytes()
    run("compare", "-q", "-f", "qcow2", "-F", "raw", "b", "data")


def test_bench_takes_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    run("create", "-q", *SECRET, "-f", "luks", "-o", "key-secret=sec0,iter-time=10", "v", "1M")
    for words in ((), ("-w", "--flush-interval", "8"), ("-w", "--flush-interval", "8", "--no-drain")):
        run(
            "bench", *SECRET, "-c", "50", "-d", "8", *words, "--image-opts",
            "driver=luks,key-secret=sec0,file.filename=v",
        )  # fmt: skip
        out = capsys.readouterr().out
        assert out.startswith("Sending 50 ")
        assert "Run completed in " in out


def test_runs_are_those_of_a_plain_scan() -> None:
    chance = random.Random(1)
    for _ in range(300):
        grain = chance.choice([512, 4096])
        offset, length, at = (512 * chance.randrange(20), 512 * chance.randrange(1, 40), 512 * chance.randrange(5))
        buffer = bytearray(at + length)
        for _ in range(chance.randrange(4)):
            buffer[chance.randrange(at + length)] = 1
        start, place = at, offset
        wanted: list[tuple[int, int, bool]] = []
        while start < at + length:
            stop = min(at + length, start + grain - place % grain)
            zero = not any(buffer[start:stop])
            if wanted and wanted[-1][2] == zero:
                wanted[-1] = (wanted[-1][0], stop - wanted[-1][0], zero)
            else:
                wanted.append((start, stop - start, zero))
            place += stop - start
            start = stop
        assert runs(buffer, at, length, grain, offset) == wanted


async def test_progress_in_the_form_of_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, shown=True) as progress:
        for length in (5, 500, 495):
            progress.add(length)
    assert capsys.readouterr().out == ("    (0.00/100%)\r    (50.50/100%)\r    (100.00/100%)\r    (100.00/100%)\r\n")


def test_sigusr1_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        with Progress(1000, shown=False) as progress:
            progress.add(250)
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(0.05)

    asyncio.run(work())
    out, err = capsys.readouterr()
    assert (out, err) == ("", "    (25.00/100%)\n")


def test_progress_of_a_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").write_bytes(bytes(1 << 20))
    run("convert", "-p", "-f", "raw", "a", "b")
    assert capsys.readouterr().out.endswith("    (100.00/100%)\r    (100.00/100%)\r\n")


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a=1,b=2", [("a", "1"), ("b", "2")]),
        ("a=1,,2", [("a", "1,2")]),
        ("lazy_refcounts", [("lazy_refcounts", "on")]),
        ("secret,id=s", [("qom-type", "secret"), ("id", "s")]),
        ("", []),
    ],
)
def test_option_lists(text: str, pairs: list[tuple[str, str]]) -> None:
    assert _opts.parse(text, "qom-type" if text.startswith("secret") else "") == pairs


def test_trees_and_dotted_names_are_the_same() -> None:
    tree = {"file": {"driver": "raw", "file": {"filename": "a"}}, "x": 1}
    assert _opts.crumple(_opts.flatten(tree)) == tree
