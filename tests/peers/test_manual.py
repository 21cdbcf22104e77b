"""Man pages and completions: true to --help, and good in the programs that read them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qmpd.manual.__main__ import ROOT, files
from qmpd.manual.pages import collect
from tests.peers.conftest import need

FILES = files()
MAN = sorted(name for name in FILES if name.startswith("man/"))


def run(*words: str | Path) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), words
    return done.stdout


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_page_and_script_says_what_help_says(name: str) -> None:
    assert (ROOT / name).read_text() == FILES[name], "write them anew: python -m qmpd.manual"


@pytest.mark.parametrize("name", MAN)
def test_groff_sets_every_page_without_a_warning(name: str) -> None:
    need("groff")
    run("groff", "-man", "-Tutf8", "-ww", "-z", ROOT / name)


def test_every_option_of_every_program_has_its_line_on_a_page() -> None:
    need("groff")
    for page in collect():
        shown = run("groff", "-man", "-Tascii", "-P-cbou", ROOT / f"man/{page.name}.{page.section}")
        for arguments in (page.arguments, *(one.arguments for one in page.subpages)):
            for argument in arguments:
                if "--help" not in argument.flags:
                    assert ", ".join(argument.flags) in shown


def bash_offers(line: str) -> list[str]:
    words = line.split(" ")
    script = f"""
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
        _{words[0].replace("-", "_")}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return [
        word
        for word in run("bash", "-c", script, "-", ROOT / f"completions/{words[0]}.bash", *words).split("\n")
        if word
    ]


def fish_offers(line: str) -> list[str]:
    script = ROOT / f"completions/{line.split()[0]}.fish"
    return [one.split("\t")[0] for one in run("fish", "-c", f"source {script}; complete -C '{line}'").splitlines()]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("qmpd-img con", {"convert"}),
        ("qmpd-img convert -O l", {"luks"}),
        ("qmpd-img check --repair l", {"leaks"}),
        ("qmpd-img create --iter", {"--iterations"}),
        ("qmpd-ctl gr", {"graph"}),
        ("qmpd-storage-daemon --blo", {"--blockdev"}),
    ],
)
def test_bash_and_fish_offer_what_fits(line: str, offered: set[str]) -> None:
    need("bash", "fish")
    assert set(bash_offers(line)) == offered
    assert {word for word in fish_offers(line) if word in offered} == offered


def test_bash_offers_files_after_the_subcommand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.qcow2").touch()
    assert bash_offers("qmpd-img info di") == ["disk.qcow2"]


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("completions/_")))
def test_zsh_reads_every_function(name: str) -> None:
    need("zsh")
    run("zsh", "-n", ROOT / name)
