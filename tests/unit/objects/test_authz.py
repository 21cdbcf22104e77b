"""Access lists: who gets in, and what is no access list."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from qmpd.errors import CommandError, QmpdError
from qmpd.objects._authz import AccessList, Rule
from qmpd.objects.authz_list import AuthzList, AuthzListOptions
from qmpd.objects.authz_list_file import AuthzListFile, AuthzListFileOptions
from qmpd.objects.authz_simple import AuthzSimple, AuthzSimpleOptions
from qmpd.qom.object import QomObject
from qmpd.qom.protocols import Authorizer
from qmpd.qom.tree import ObjectTree


def test_simple_lets_one_in() -> None:
    authz = AuthzSimple(AuthzSimpleOptions("client1"))
    assert isinstance(authz, Authorizer)
    assert authz.is_allowed("client1")
    assert not authz.is_allowed("client")
    authz.set_property("identity", "other")
    assert authz.get_property("identity") == "other"
    assert authz.is_allowed("other")
    with pytest.raises(QmpdError, match=r"^Invalid parameter type for 'identity', expected: string$"):
        authz.set_property("identity", 1)


def test_the_first_rule_that_matches_decides() -> None:
    access = AccessList("deny", (Rule("bob", "deny"), Rule("b*", "allow", "glob"), Rule("b*", "allow")))
    assert not access.is_allowed("bob")
    assert access.is_allowed("bobby")
    assert access.is_allowed("b*")
    assert not access.is_allowed("alice")
    assert AccessList("allow").is_allowed("alice")


@pytest.mark.parametrize(
    ("pattern", "identity", "matches"),
    [
        ("*", "", True),
        ("a*c", "abbbc", True),
        ("a*c", "a\nc", True),
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("?", "é", True),
        ("[ab]", "a", False),
        ("[ab]", "[ab]", True),
        ("CN=*,O=x", "CN=me,O=x", True),
        ("a.c", "abc", False),
        ("a*", "ba", False),
        ("*" * 40 + "b", "a" * 60, False),
        ("*a" * 30 + "b", "a" * 2000, False),
        ("*ab*ab", "abxabab", True),
        ("a", "a*", False),
    ],
)
def test_in_a_glob_only_star_and_question_mark_are_special(pattern: str, identity: str, matches: bool) -> None:
    assert Rule(pattern, "allow", "glob").matches(identity) is matches


def test_list_properties_read_and_write_as_in_the_reference() -> None:
    rules = [{"match": "a*", "policy": "allow", "format": "glob"}, {"match": "b", "policy": "deny"}]
    authz = AuthzList(AuthzListOptions(rules=rules))
    assert authz.get_property("rules") == rules
    assert authz.get_property("policy") == "deny"
    for value, text in (
        ([{"match": "a"}], "Parameter 'rules[0].policy' is missing"),
        ([{"match": "a", "policy": "x"}], "Parameter 'policy' does not accept value 'x'"),
        ([{"match": "a", "policy": "deny", "zz": 1}], "Parameter 'rules[0].zz' is unexpected"),
        (
            [{"match": "a", "policy": "deny", "format": 3}],
            "Invalid parameter type for 'rules[0].format', expected: string",
        ),
        ([rules[0], 5], "Invalid parameter type for 'rules[1]', expected: object"),
        (5, "Invalid parameter type for 'rules', expected: array"),
    ):
        with pytest.raises(QmpdError) as caught:
            authz.set_property("rules", value)
        assert str(caught.value) == text
    assert authz.get_property("rules") == rules
    authz.set_property("rules", [])
    authz.set_property("policy", "allow")
    assert authz.is_allowed("anyone")
    with pytest.raises(QmpdError, match=r"^Parameter 'policy' does not accept value 'zz'$"):
        authz.set_property("policy", "zz")


# --- in a file --------------------------------------------------------------------------------


def write(path: Path, value: Any) -> None:
    """Write JSON so that the time stamp differs from that of any earlier content."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    os.utime(path, ns=(before + 10**9, before + 10**9))


def add(path: Path, **options: Any) -> AuthzListFile:
    authz = AuthzListFile(AuthzListFileOptions(filename=str(path), **options))
    ObjectTree().add("acl", authz)
    return authz


ALLOW_A = {"rules": [{"match": "a", "policy": "allow"}], "policy": "deny"}


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "acl.json"
    write(path, ALLOW_A)
    authz = add(path)
    fixed = add(path, refresh=False)
    assert authz.is_allowed("a")
    write(path, {"policy": "allow", "rules": [{"match": "a", "policy": "deny"}]})
    assert not authz.is_allowed("a")
    assert authz.is_allowed("b")
    assert fixed.is_allowed("a")
    with caplog.at_level(logging.WARNING):
        write(path, "{")
        assert not authz.is_allowed("b")
        assert not authz.is_allowed("b")
    assert [record.getMessage() for record in caplog.records] == [
        f"authz 'acl' lets nobody in: File '{path}' is not valid JSON"
    ]
    path.unlink()
    assert not authz.is_allowed("b")
    write(path, ALLOW_A)
    assert authz.is_allowed("a")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"rules":5}', "Invalid parameter type for 'rules', expected: array"),
        ("[]", "File '{path}' must contain a JSON object"),
        ("nonsense", "File '{path}' is not valid JSON"),
        ('{"policy":"maybe"}', "Parameter 'policy' does not accept value 'maybe'"),
        ('{"rules":[{}]}', "Parameter 'rules[0].match' is missing"),
        ('{"zz":1}', "Parameter 'zz' is unexpected"),
        ("[" * 100000, "File '{path}' is not valid JSON"),
    ],
)
def test_files_that_are_no_access_list(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "acl.json"
    path.write_text(content)
    with pytest.raises(QmpdError) as caught:
        add(path)
    assert str(caught.value) == text.format(path=path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(CommandError) as caught:
        add(path)
    assert str(caught.value) == f"Unable to read '{path}': Failed to open file “{path}”: No such file or directory"


def test_names_of_the_types() -> None:
    chain: list[type[QomObject]] = [AuthzSimple, AuthzList, AuthzListFile]
    assert [cls.qom_type for cls in chain] == ["authz-simple", "authz-list", "authz-list-file"]
