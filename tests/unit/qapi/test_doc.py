"""The reference page and option help come from the doc comments."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.qapi import doc
from qmpd.qapi.schema import SYSTEM_ROOT, Schema, load, load_file

TEXT = """# What this is
# about.

##
# @Mode:
#
# @off: no
##
{ 'enum': 'Mode', 'data': [ 'off' ] }

##
# @Base:
#
# A base.
#
# @name: its name
##
{ 'struct': 'Base', 'data': { 'name': 'str' } }

##
# @Thing:
#
# A thing, see @mode
# or not.
#
# More of it.
#
# @mode: how
#     it goes (default: off)
#
# Features:
# @unstable: who knows
##
{ 'struct': 'Thing', 'base': 'Base', 'data': { '*mode': 'Mode' }, 'features': [ 'unstable' ] }

##
# @make:
#
# Makes a thing.
##
{ 'command': 'make', 'data': 'Thing', 'returns': [ 'Mode' ] }
"""


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    (tmp_path / "root.json").write_text(TEXT)
    return load_file(tmp_path / "root.json")


def test_a_doc_comment_is_taken_apart(schema: Schema) -> None:
    parsed = doc.parse_doc(schema.types["Thing"])
    assert parsed.text == "A thing, see @mode or not.\n\nMore of it."
    assert parsed.members == {"mode": "how it goes (default: off)"}
    assert parsed.features == {"unstable": "who knows"}


def test_the_page_lists_members_of_bases_types_and_returns(schema: Schema) -> None:
    page = doc.reference(schema, schema)
    assert "## root\n\nWhat this is about.\n\n### make\n\n*command* †\n\nMakes a thing.\n" in page
    assert (
        "- `name` (str): its name\n"
        "- `mode` ([Mode](#mode), optional): how it goes (default: off)\n"
        "\nReturns array of [Mode](#mode).\n"
    ) in page
    assert "A thing, see `mode` or not.\n\nMore of it.\n" in page
    assert "Features:\n\n- `unstable`: who knows\n" in page
    assert "\n\n\n" not in page


def test_help_for_a_command_line_has_a_line_per_member(schema: Schema) -> None:
    assert doc.help_text(schema, "Thing", prefix="file.") == (
        "  file.name=<str>                      its name\n"
        "  file.mode=<off>                      how it goes (default: off)\n"
    )
    assert doc.summary(schema, "make") == "Makes a thing."


def test_check_fails_when_the_page_is_out_of_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    assert doc.main([str(page), "--check"]) == 1
    assert "run 'make docs'" in capsys.readouterr().err
    assert doc.main([str(page)]) == 0
    assert doc.main([str(page), "--check"]) == 0
    page.write_text(page.read_text() + "x")
    assert doc.main([str(page), "--check"]) == 1


def test_every_command_has_a_text() -> None:
    schema = load(SYSTEM_ROOT)
    assert [name for name in schema.commands if not doc.summary(schema, name).endswith(".")] == []
