"""Words of the two command lines."""

from __future__ import annotations

import pytest

from qmpd.daemon.options import STORAGE, SYSTEM, Given, UsageError, help_text, read_storage, read_system


def test_the_system_emulator_takes_one_dash_or_two() -> None:
    assert read_system(["-S", "--blockdev", "null-co", "-m", "-1"]) == [
        Given("S", "", "-S"),
        Given("blockdev", "null-co", "--blockdev null-co"),
        Given("m", "-1", "-m -1"),
    ]


def test_getopt_forms() -> None:
    assert read_storage(["--blockdev=a", "--block", "b", "-Tx", "-T", "y", "plain", "--", "--z"]) == [
        Given("blockdev", "a", "--blockdev=a"),
        Given("blockdev", "b", "--block b"),
        Given("trace", "x", "-Tx"),
        Given("trace", "y", "-T y"),
        Given("", "plain", "plain"),
        Given("", "--z", "--z"),
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--nosuch"], "unrecognized option '--nosuch'"),
        (["--nosuch=1"], "unrecognized option '--nosuch=1'"),
        (["--blockdev"], "option '--blockdev' requires an argument"),
        (["--m"], "option '--monitor' requires an argument"),
        (["--daemonize=1"], "option '--daemonize' doesn't allow an argument"),
        (["-x"], "invalid option -- 'x'"),
        (["-T"], "option requires an argument -- 'T'"),
    ],
)
def test_getopt_texts(words: list[str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_storage(words)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("words", "text"),
    [(["-nosuch"], "-nosuch: invalid option"), (["-blockdev"], "-blockdev: requires an argument")],
)
def test_texts_of_the_system_emulator(words: list[str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_system(words)
    assert str(caught.value) == text


def test_the_help_names_every_option() -> None:
    for table, dashes in ((SYSTEM, "-"), (STORAGE, "--")):
        text = help_text("x", table, dashes)
        assert all(f"  {dashes}{option.name}" in text for option in table)
