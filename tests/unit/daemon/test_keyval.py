"""key=value text as qemu-storage-daemon 10.0.2 reads it."""

from __future__ import annotations

from typing import Any

import pytest

from qmpd.daemon.keyval import parse_bool, parse_keyval, parse_opts
from qmpd.errors import CommandError

TREES: list[tuple[str, Any]] = [
    ("null-co", {"driver": "null-co"}),
    ("null-co,node-name=a", {"driver": "null-co", "node-name": "a"}),
    ("driver=a,,b", {"driver": "a,b"}),
    ("node-name=,,", {"node-name": ","}),
    ("a=1,a=2", {"a": "2"}),
    ("raw,file.driver=file,file.filename=/x", {"driver": "raw", "file": {"driver": "file", "filename": "/x"}}),
    ("a.0=x,a.1=y", {"a": ["x", "y"]}),
    ("a.1.b=y,a.0.b=x", {"a": [{"b": "x"}, {"b": "y"}]}),
    ("a=b=c", {"a": "b=c"}),
    ("a=", {"a": ""}),
    ("", {}),
    ("__org.x_thing=1", {"__org.x_thing": "1"}),
]


@pytest.mark.parametrize(("text", "tree"), TREES)
def test_trees(text: str, tree: Any) -> None:
    assert parse_keyval(text, "driver") == (tree, False)


ERRORS = [
    ("null-co,node-name", "Expected '=' after parameter 'node-name'"),
    ("null-co,no-foo", "Expected '=' after parameter 'no-foo'"),
    ("a..b=1", "Invalid parameter 'a..b'"),
    ("=1", "Invalid parameter ''"),
    ("null-co,=1", "Invalid parameter ''"),
    ("1a=1", "Invalid parameter '1a'"),
    ("a.=1", "Invalid parameter 'a.'"),
    ("x=1,x.y=2", "Parameters 'x.*' used inconsistently"),
    ("x.y=2,x=1", "Parameters 'x.*' used inconsistently"),
    ("x.y.z=2,x.y=1", "Parameters 'x.y.*' used inconsistently"),
    ("a.0=1,a.b=2", "Parameters 'a.*' used inconsistently"),
    ("a.0=1,a.2=2", "Parameter 'a.1' missing"),
    ("a.b.1=1", "Parameter 'a.b.0' missing"),
    ("a" * 128 + "=1", f"Parameter '{'a' * 128}' is too long"),
]


@pytest.mark.parametrize(("text", "error"), ERRORS)
def test_errors(text: str, error: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_keyval(text, "driver")
    assert str(caught.value) == error


def test_help_is_a_word_of_its_own() -> None:
    assert parse_keyval("help", "qom-type") == ({}, True)
    assert parse_keyval("secret,help", "qom-type") == ({"qom-type": "secret"}, True)
    assert parse_keyval("secret,?", "qom-type") == ({"qom-type": "secret"}, True)
    assert parse_keyval("help=on", "qom-type") == ({"help": "on"}, False)


def test_flat_options() -> None:
    opts = parse_opts("socket,id=c,path=/a,,b,server,nowait,host=", "backend")
    assert opts.pairs == [
        ("backend", "socket"),
        ("id", "c"),
        ("path", "/a,b"),
        ("server", "on"),
        ("wait", "off"),
        ("host", ""),
    ]
    with pytest.raises(CommandError, match="Invalid parameter 'path'"):
        opts.check(frozenset(("backend", "id")))


def test_flags() -> None:
    assert parse_bool("x", "on")
    assert not parse_bool("x", "n")
    with pytest.raises(CommandError, match="Parameter 'x' expects 'on' or 'off'"):
        parse_bool("x", "maybe")
