"""qmpd-img luks and qmpd-ctl luks: headers looked after, offline and through a daemon."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.support.daemon import program
from tests.unit.luks.test_key_jobs import SECRETS, disks, header_of, opens

CHEAP = ("--pbkdf", "pbkdf2", "--iterations", "1000")


def run(name: str, *arguments: str | Path, status: int = 0, stdin: str = "") -> str:
    """Run a program's `luks`; return what it printed, or what it complained of."""
    command = [program(name), "luks", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60)
    assert done.returncode == status, (command, done.returncode, done.stdout, done.stderr)
    return done.stderr if status == 1 and done.stderr else done.stdout


def keys(folder: Path) -> dict[str, Path]:
    for name, value in SECRETS.items():
        (folder / f"{name}.key").write_text(value)
    return {name: folder / f"{name}.key" for name in SECRETS}


def test_a_header_is_looked_after_offline(tmp_path: Path) -> None:
    key, image, saved = keys(tmp_path), tmp_path / "h.img", tmp_path / "h.bak"
    image.write_bytes(header_of(2))
    out = run("qmpd-img", "backup", image, saved)
    assert out == f"{image.stat().st_size} bytes of header saved in '{saved}'\n"
    run("qmpd-img", "add-key", "--new-key-file", key["n"], "-d", key["s"], *CHEAP, image)
    assert [opens(image.read_bytes(), name) for name in "snm"] == [True, True, False]
    assert run("qmpd-img", "compare", image, saved, status=1) == (
        "slot 1 is in use in the first header only\n"
    )  # fmt: skip
    run("qmpd-img", "change-key", image, "-d", "-", "--new-key-file", key["m"], *CHEAP, stdin=SECRETS["n"])
    assert [opens(image.read_bytes(), name) for name in "snm"] == [True, False, True]
    second = tmp_path / "second.bak"
    run("qmpd-img", "remove-key", "-S", "0", "--backup", second, image)
    assert opens(second.read_bytes(), "s")
    assert [opens(image.read_bytes(), name) for name in "snm"] == [False, False, True]
    text = run("qmpd-img", "remove-key", "-S", "1", image, status=1)
    assert "Attempt to erase the only active keyslot 1" in text
    objects = ("--object", f"secret,id=k,data={SECRETS['m']}")
    report = json.loads(run("qmpd-img", "verify", "--output", "json", *objects, "--secret", "k", image))
    assert [(row["slot"], row["opens"]) for row in report["slots"]] == [(1, True)]
    run("qmpd-img", "restore", image, saved)
    assert run("qmpd-img", "compare", image, saved) == "The headers are equal\n"
    assert [opens(image.read_bytes(), name) for name in "snm"] == [True, False, False]


def test_a_damaged_header_is_told_by_the_exit_status(tmp_path: Path) -> None:
    image = tmp_path / "h.img"
    data = header_of(2)
    image.write_bytes(data)
    lines = run("qmpd-img", "verify", image).splitlines()
    assert lines[0] == "LUKS version 2, uuid 01234567-89ab-4def-8123-456789abcdef"
    assert "  slot 0: pbkdf2, 1000 rounds" in lines
    assert lines[-1] == "The header is well."
    image.write_bytes(data[:5000] + b"\xff" + data[5001:])
    lines = run("qmpd-img", "verify", image, status=2).splitlines()
    assert lines[-1] == "The header is damaged."
    assert any(line.startswith("PROBLEM: the primary header is damaged: ") for line in lines)


def test_a_wrong_command_line_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "h.img"
    image.write_bytes(header_of(2))
    assert "Expecting one of backup, restore" in run("qmpd-img", "open", image, status=1)
    assert "'backup' takes an image and a file" in run("qmpd-img", "backup", image, status=1)
    assert "There is no terminal to ask for the passphrase: use --key-file" in run(
        "qmpd-img", "add-key", image, *CHEAP, status=1
    )
    assert "Could not open" in run("qmpd-img", "add-key", image, "-d", tmp_path / "none", *CHEAP, status=1)
    assert image.read_bytes() == header_of(2)


def test_a_header_is_looked_after_through_the_daemon(tmp_path: Path) -> None:
    saved = tmp_path / "h.bak"
    with disks(tmp_path, 2, "a") as (daemon, _):

        def ctl(verb: str, *arguments: str | Path, status: int = 0) -> str:
            return run("qmpd-ctl", verb, "--socket", daemon.socket, *arguments, status=status)

        assert ctl("backup", "a", saved).endswith(f"bytes of header saved in '{saved}'\n")
        ctl("add-key", "a", "--new-secret", "n", *CHEAP)
        ctl("change-key", "a", "--old-secret", "s", "--new-secret", "m", "--backup", tmp_path / "2.bak", *CHEAP)
        ctl("remove-key", "a", "--old-secret", "n")
        text = ctl("remove-key", "a", "--old-secret", "m", status=1)
        assert "All the active keyslots match" in text
        assert ctl("compare", "a", saved, status=1) == "slot 0 differs\n"
        state = json.loads(ctl("verify", "a", "--json", "--secret", "m"))
        assert [row["opens"] for row in state["slots"]] == [True]
        ctl("restore", "a", saved)
        assert ctl("compare", "a", saved) == "The headers are equal\n"
        assert "The header is well." in ctl("verify", "h")
    assert opens((tmp_path / "h.img").read_bytes(), "s")
    assert opens((tmp_path / "2.bak").read_bytes(), "n")


def test_the_options_of_amend_are_told() -> None:
    command = [program("qmpd-img"), "amend", "-f", "luks", "-o", "help", "x"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert lines[0] == "Amend options for 'luks':"
    assert "  state=<str>            - active adds a passphrase, inactive erases one, changed does both" in lines
