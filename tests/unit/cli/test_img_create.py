"""qmpd-img create and info: the document's commands, the options, the refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qmpd.cli.main import img_main
from qmpd.units import align_up

SECRET = "secret,id=sec0,data=abc123"
QUICK = "key-secret=sec0,iter-time=10"


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_documents_three_commands(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "create --object secret,id=sec0,data=abc123 -f luks -o cipher-alg=aes-256,cipher-mode=xts -o key-secret=sec0"
    )
    assert img_main([*words.split(), "-o", "detached-header=true", "--iterations", "1000", "test-header.img"]) == 0
    assert capsys.readouterr().out == (
        "Formatting 'test-header.img', fmt=luks key-secret=sec0 cipher-alg=aes-256 cipher-mode=xts"
        " detached-header=true\n"
    )
    assert Path("test-header.img").stat().st_size == 2068480
    assert img_main(["create", "-f", "qcow2", "test-payload.qcow2", "200G"]) == 0
    assert "size=214748364800 " in capsys.readouterr().out
    # The third as printed, with the line end that the document has inside the quotes: its file name is a slip.
    name = 'json:{"driver":"luks","file":{"filename": \\\n     "test-payload.img"},'
    name += '"header":{"filename":"test-header.img"}}'
    assert img_main(["info", name]) == 1
    assert capsys.readouterr().err == (
        f"qmpd-img: Could not open '{name}': Could not open 'test-payload.img': No such file or directory\n"
        "There is no 'test-payload.img', but there is 'test-payload.qcow2'.\n"
    )
    assert img_main(["info", name.replace("payload.img", "payload.qcow2")]) == 0
    text = capsys.readouterr().out
    assert "file format: luks\n" in text
    assert "    detached header: true\n" in text
    assert "Child node '/header':\n    filename: test-header.img\n" in text


def test_iterations_decide_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        img_main(["create", "--object", SECRET, "-f", "luks", "-o", "key-secret=sec0", "--iterations=1234", "v", "1M"])
        == 0
    )
    capsys.readouterr()
    assert img_main(["info", "--output=json", "v"]) == 0
    assert json.loads(capsys.readouterr().out)["format-specific"]["data"]["slots"][0]["iters"] == 1234


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("create", "Expecting image file name\nTry 'qmpd-img create --help' for more info"),
        ("create -f qcow2 a", "a: Image creation needs a size parameter"),
        ("create a 1x", "Invalid image size specified: '1x'."),
        ("create -f nope a 1M", "a: Unknown file format 'nope'"),
        ("create -f qcow2 -o nope=1 a 1M", "a: Invalid parameter 'nope'"),
        ("create -f raw -b b a 1M", "a: Backing file not supported for file format 'raw'"),
        (
            "create -f qcow2 -b a -F raw a 1M",
            "a: Error: Trying to create an image with the same filename as the backing file",
        ),
        ("create -f qcow2 x:y 1M", "x:y: Unknown protocol 'x'"),
        ("info nofile", "Could not open 'nofile': Could not open 'nofile': No such file or directory"),
        ("info --image-opts -f raw a", "--image-opts and --format are mutually exclusive"),
        ("info json:[]", "Could not open 'json:[]': Invalid JSON object given"),
        ("nonsense", "Command not found: nonsense\nTry 'qmpd-img --help' for more info"),
    ],
)
def test_refusals(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert img_main(words.split()) == 1
    assert capsys.readouterr().err == f"qmpd-img: {error}\n"
    assert list(Path().iterdir()) == []


def test_unknown_option_is_named_as_getopt_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        img_main(["create", "--foo", "a"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("qmpd-img create: unrecognized option '--foo'\n")


def test_backing_file_gives_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert img_main(["create", "-q", "base", "3M"]) == 0
    assert img_main(["create", "-f", "qcow2", "-b", "base", "-F", "raw", "over"]) == 0
    assert " size=3145728 backing_file=base backing_fmt=raw " in capsys.readouterr().out
    assert img_main(["create", "-f", "qcow2", "-b", "base", "more"]) == 1
    assert capsys.readouterr().err == (
        "qmpd-img: more: Backing file specified without backing format\nDetected format of raw.\n"
    )


def test_info_opens_nothing_that_the_image_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert img_main(["create", "-q", "-u", "-f", "qcow2", "-b", "/nowhere/secret", "-F", "raw", "a", "1M"]) == 0
    assert img_main(["info", "a"]) == 0
    assert "backing file: /nowhere/secret\n" in capsys.readouterr().out
    assert img_main(["info", "--backing-chain", "a"]) == 1
    assert "Could not open '/nowhere/secret'" in capsys.readouterr().err


def test_info_with_format_does_not_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert img_main(["create", "-q", "-f", "qcow2", "a", "1M"]) == 0
    assert img_main(["info", "-f", "raw", "--output=json", "a"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["format"], info["virtual-size"]) == ("raw", align_up(Path("a").stat().st_size, 512))


def test_cyclic_chain_ends(capsys: pytest.CaptureFixture[str]) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        assert img_main(["create", "-q", "-u", "-f", "qcow2", "-b", other, "-F", "qcow2", name, "1M"]) == 0
    assert img_main(["info", "--backing-chain", "a"]) == 1
    assert "infinite loop" in capsys.readouterr().err


def test_help_lists_the_options_of_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert img_main(["create", "-f", "luks", "-o", "help"]) == 0
    text = capsys.readouterr().out
    for name in ("cipher-alg", "detached-header", "iter-time", "key-secret"):
        assert f"  {name}=<" in text


def test_info_of_nested_nodes_is_indented(capsys: pytest.CaptureFixture[str]) -> None:
    assert img_main(["create", "-q", "-f", "qcow2", "a", "1M"]) == 0
    name = 'json:{"driver":"raw","file":{"driver":"qcow2","file":{"filename":"a"}}}'
    assert img_main(["info", name]) == 0
    text = capsys.readouterr().out
    assert "\nChild node '/file':\n    image: a\n    file format: qcow2\n" in text
    assert "\n    Child node '/file/file':\n        filename: a\n" in text


def test_a_pipe_is_no_image_and_nobody_waits_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    assert img_main(["info", "pipe"]) == 1
    assert "'file' driver requires 'pipe' to be a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "found"),
    [(b"QFI\xfb\0\0\0\1", "raw"), (b"LUKS\xba\xbe\0\7", "raw"), (b"QFI", "raw"), (b"", "raw")],
)
def test_what_only_looks_like_a_format_is_raw(head: bytes, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a").write_bytes(head.ljust(1024, b"\0"))
    assert img_main(["info", "--output=json", "a"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == found
