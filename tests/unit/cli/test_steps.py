"""Reading QMP steps out of texts."""

from __future__ import annotations

import pytest

from qmpd.cli.steps import Step, read_steps
from qmpd.errors import CommandError

PLAIN = """\
1. Add the secret::

    # virsh qemu-monitor-command vm '{"execute":"object-add", \\
      "arguments":{"qom-type":"secret", "id":"s0"}}'

2. Look::

    # virsh -c qemu:///system qemu-monitor-command --pretty vm '{"execute":"query-block"}'
"""


def names(text: str) -> list[str]:
    return [step.name for step in read_steps(text)]


def test_shell_steps_with_titles_and_lines() -> None:
    first, second = read_steps(PLAIN)
    assert first == Step(
        3,
        "Add the secret",
        {"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0"}},
    )
    assert (second.line, second.title, second.name) == (8, "Look", "query-block")


def test_listing_with_line_numbers_and_no_break_spaces() -> None:
    """A page that shows sources drops blank lines and keeps their numbers."""
    lines = [f"{number} {line}" for number, line in enumerate(PLAIN.splitlines(), 40) if line]
    listing = "\n".join(lines).replace("  ", "\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}")
    first, second = read_steps(listing)
    assert (first.line, first.title) == (42, "Add the secret")
    assert first.message["arguments"] == {"qom-type": "secret", "id": "s0"}
    assert (second.line, second.title) == (47, "Look")


def test_forgotten_closing_quote() -> None:
    """The published document leaves out the quote after step 7."""
    (step,) = read_steps("""# virsh qemu-monitor-command vm '{"execute":"stop"}\n\nTODO\n====\n""")
    assert step.name == "stop"


def test_quote_without_json_is_an_error_that_names_the_line() -> None:
    with pytest.raises(CommandError, match="line 2: a quote is not closed"):
        read_steps('\nvirsh qemu-monitor-command vm \'{"execute":\n')


def test_broken_json_is_an_error_that_names_the_line() -> None:
    with pytest.raises(CommandError, match="line 1: not JSON"):
        read_steps('virsh qemu-monitor-command vm \'{"execute" "x"}\'')


def test_json_that_is_no_command() -> None:
    with pytest.raises(CommandError, match="a QMP command has a member 'execute'"):
        read_steps('qmpd-ctl monitor-command \'{"exec":"x"}\'')


def test_text_without_steps() -> None:
    with pytest.raises(CommandError, match="holds no QMP command"):
        read_steps("1. Do it\n\n    # virsh list\n")


def test_transcript() -> None:
    text = """\
<- {"QMP": {"version": {}, "capabilities": ["oob"]}}
-> { "execute": "blockdev-add",
     "arguments": { "driver": "null-co",
                    "node-name": "n" } }
<- { "return": {} }
> {"execute": "query-block"}
{"exec-oob": "migrate-pause"}
{"return": {"execute": "no command"}}
"""
    assert names(text) == ["blockdev-add", "query-block", "migrate-pause"]


@pytest.mark.parametrize(
    "line",
    [
        """virsh qemu-monitor-command vm "{\\"execute\\": \\"stop\\"}" """,
        """$ virsh qemu-monitor-command "my vm" '{"execute":"stop"}'; echo done""",
        """  qmpd-ctl monitor-command '{"execute":"stop"}'""",
        """virsh qemu-monitor-command \\\n  vm \\\n  '{"execute":"stop"}'""",
        """virsh qemu-monitor-command vm '{"execute":\n"stop"}'""",
    ],
)
def test_ways_to_quote(line: str) -> None:
    assert names(line) == ["stop"]


def test_values_are_replaced_and_names_are_not() -> None:
    (step,) = read_steps("""{"execute": "x", "arguments": {"x": ["/path/to/x", {"y": "x"}], "n": 1}}""")
    changed = step.with_values([("/path/to", "/tmp"), ("x", "z")])
    assert changed.message == {"execute": "x", "arguments": {"x": ["/tmp/z", {"y": "z"}], "n": 1}}
    assert step.message["arguments"]["x"][0] == "/path/to/x"
