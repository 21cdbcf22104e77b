"""What the storage daemon of QEMU 10.0.2 says to arguments that do not fit the schema.

`tests/peers/test_validation_texts.py` sends the same to the real one, where it is installed.
"""

from __future__ import annotations

from typing import Any

_NODE: dict[str, Any] = {"node-name": "n"}
_NULL = {"driver": "null-co", **_NODE}
_RAW = {"driver": "raw", **_NODE}
_QCOW2 = {"driver": "qcow2", **_NODE, "file": "x"}
_NBD = {"type": "nbd", "id": "x", "node-name": "n"}
_LIST = {"qom-type": "authz-list", "id": "a"}
_KEYRING = {"qom-type": "secret_keyring", "id": "a"}
_UNIX = {"type": "unix", "data": {"path": "/x"}}


def _wrong(name: str, expected: str) -> str:
    return f"Invalid parameter type for '{name}', expected: {expected}"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # integers: a float is none, however round; unsigned ones have a text of their own
    *[
        ("blockdev-add", {**_NULL, "size": value}, _wrong("size", "integer"))
        for value in (1e3, 3.0, 1 << 63, (1 << 64) - 1, 1.8446744073709552e19, True, "5", None, [], {})
    ],
    *[
        ("blockdev-add", {**_NULL, "latency-ns": value}, "Parameter 'latency-ns' expects uint64")
        for value in (1e3, 1.8446744073709552e19, "5", None, False)
    ],
    *[
        ("object-add", {**_KEYRING, "serial": value}, "Parameter 'serial' expects int32_t")
        for value in (1 << 31, -(1 << 31) - 1)
    ],
    ("object-add", {**_KEYRING, "serial": 1.5}, _wrong("serial", "integer")),
    ("object-add", {**_KEYRING, "serial": 1 << 63}, _wrong("serial", "integer")),
    ("nbd-server-start", {"addr": _UNIX, "max-connections": -1}, "Parameter 'max-connections' expects uint32_t"),
    ("nbd-server-start", {"addr": _UNIX, "max-connections": 1 << 32}, "Parameter 'max-connections' expects uint32_t"),
    ("nbd-server-start", {"addr": _UNIX, "max-connections": "1"}, "Parameter 'max-connections' expects uint64"),
    # other scalars
    *[
        ("blockdev-add", {**_NULL, "read-zeroes": value}, _wrong("read-zeroes", "boolean"))
        for value in (0, 1, "on", None, [])
    ],
    *[
        ("blockdev-add", {"driver": value, "node-name": "n"}, _wrong("driver", "string"))
        for value in (None, 7, ["raw"], {}, True)
    ],
    ("blockdev-del", {"node-name": None}, _wrong("node-name", "string")),
    ("query-named-block-nodes", {"flat": 1}, _wrong("flat", "boolean")),
    # enumerations: the last name only, and the value
    ("blockdev-add", {"driver": "", **_NODE}, "Parameter 'driver' does not accept value ''"),
    ("blockdev-add", {"driver": "100%s", **_NODE}, "Parameter 'driver' does not accept value '100%s'"),
    ("blockdev-add", {**_NULL, "discard": "x"}, "Parameter 'discard' does not accept value 'x'"),
    ("blockdev-add", {**_NULL, "discard": 5}, _wrong("discard", "string")),
    ("blockdev-add", {**_RAW, "file": {"driver": "x"}}, "Parameter 'driver' does not accept value 'x'"),
    ("nbd-server-start", {"addr": {"type": "x", "data": 5}}, "Parameter 'type' does not accept value 'x'"),
    (
        "object-add",
        {**_LIST, "rules": [{"match": "x", "policy": "y"}]},
        "Parameter 'policy' does not accept value 'y'",
    ),
    # objects and arrays: the whole path
    ("blockdev-add", {**_NULL, "cache": None}, _wrong("cache", "object")),
    ("blockdev-add", {**_NULL, "cache": {"direct": 1}}, _wrong("cache.direct", "boolean")),
    ("blockdev-add", {**_NULL, "cache": {"bogus": 1, "direct": True}}, "Parameter 'cache.bogus' is unexpected"),
    (
        "blockdev-add",
        {**_RAW, "file": {"driver": "null-co", "cache": {"direct": 5}}},
        _wrong("file.cache.direct", "boolean"),
    ),
    ("object-add", {**_LIST, "rules": 5}, _wrong("rules", "array")),
    ("object-add", {**_LIST, "rules": [5]}, _wrong("rules[0]", "object")),
    ("object-add", {**_LIST, "rules": [{"match": "x"}]}, "Parameter 'rules[0].policy' is missing"),
    ("nbd-server-start", {"addr": 5}, _wrong("addr", "object")),
    ("nbd-server-start", {"addr": {"data": 5}}, "Parameter 'addr.type' is missing"),
    ("nbd-server-start", {"addr": {"type": "unix", "data": 5}}, _wrong("addr.data", "object")),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": 5}}}, _wrong("addr.data.path", "string")),
    ("nbd-server-start", {"addr": {"type": "unix"}}, "Parameter 'addr.data' is missing"),
    (
        "nbd-server-start",
        {"addr": {"type": "unix", "data": {"path": "/x", "bogus": 1}}},
        "Parameter 'addr.data.bogus' is unexpected",
    ),
    ("nbd-server-start", {"addr": {**_UNIX, "bogus": 1}}, "Parameter 'addr.bogus' is unexpected"),
    # alternates: the last name only and the type of the schema
    ("blockdev-add", {**_RAW, "file": 5}, _wrong("file", "BlockdevRef")),
    ("blockdev-add", {**_RAW, "file": {"driver": "raw", "file": 5}}, _wrong("file", "BlockdevRef")),
    ("blockdev-add", {**_RAW, "file": {"driver": "raw", "file": {}}}, "Parameter 'file.file.driver' is missing"),
    ("blockdev-add", {**_QCOW2, "backing": False}, _wrong("backing", "BlockdevRefOrNull")),
    ("blockdev-add", {**_QCOW2, "overlap-check": 5}, _wrong("overlap-check", "Qcow2OverlapChecks")),
    (
        "blockdev-add",
        {**_QCOW2, "overlap-check": {"main-header": 5}},
        _wrong("overlap-check.main-header", "boolean"),
    ),
    ("blockdev-add", {**_QCOW2, "overlap-check": "zz"}, "Parameter 'overlap-check' does not accept value 'zz'"),
    ("block-export-add", {**_NBD, "bitmaps": {}}, _wrong("bitmaps", "array")),
    ("block-export-add", {**_NBD, "bitmaps": [5]}, _wrong("null", "BlockDirtyBitmapOrStr")),
    ("block-export-add", {**_NBD, "bitmaps": ["a", {"node": 1}]}, _wrong("bitmaps[1].node", "string")),
    (
        "block-export-add",
        {**_NBD, "bitmaps": ["a", {"node": "x", "name": "n", "c": 1}]},
        "Parameter 'bitmaps[1].c' is unexpected",
    ),
    # unions: the tag first, then its branch
    ("blockdev-add", {}, "Parameter 'driver' is missing"),
    ("blockdev-add", _RAW, "Parameter 'file' is missing"),
    ("blockdev-add", {**_QCOW2, "encrypt": {}}, "Parameter 'encrypt.format' is missing"),
    ("blockdev-add", {**_QCOW2, "encrypt": {"format": "zz"}}, "Parameter 'format' does not accept value 'zz'"),
    (
        "blockdev-add",
        {**_QCOW2, "encrypt": {"format": "luks", "key-secret": 4}},
        _wrong("encrypt.key-secret", "string"),
    ),
    ("object-add", {"id": "a"}, "Parameter 'qom-type' is missing"),
    ("object-add", {"qom-type": "secret"}, "Parameter 'id' is missing"),
    # order: the schema's for members it knows, whatever came first; unknown ones last
    ("blockdev-add", {"bogus": 1, **_RAW, "offset": "x", "file": 5}, _wrong("file", "BlockdevRef")),
    ("blockdev-add", {"bogus": 1, "offset": "x", **_RAW, "file": "f"}, _wrong("offset", "integer")),
    ("blockdev-add", {"bogus": 1, **_RAW, "file": "f"}, "Parameter 'bogus' is unexpected"),
    ("block-export-add", {**_NBD, "iothread": 5, "id": 5}, _wrong("id", "string")),
    # several unknown ones: the one a hash table yields first
    ("blockdev-add", {**_NULL, "x1": 1, "x2": 2}, "Parameter 'x1' is unexpected"),
    ("blockdev-add", {**_NULL, "x2": 1, "x1": 2}, "Parameter 'x1' is unexpected"),
    ("blockdev-add", {**_NULL, "zz": 1, "aa": 2, "mm": 3, "bogus": 4}, "Parameter 'aa' is unexpected"),
    ("blockdev-add", {**_NULL, **dict.fromkeys(("aa", *"bcdefg"), 1)}, "Parameter 'b' is unexpected"),
    # commands without arguments, and with any value
    ("query-version", {"x": 1}, "Parameter 'x' is unexpected"),
    ("query-qmp-schema", {"x": 1}, "Parameter 'x' is unexpected"),
    ("x-debug-query-block-graph", {"a": 1}, "Parameter 'a' is unexpected"),
    ("qom-get", {"path": "/objects"}, "Parameter 'property' is missing"),
    ("qom-set", {"path": "/objects", "property": "x"}, "Parameter 'value' is missing"),
]
"""Command, arguments, text."""

NOT_NEGOTIATED: list[tuple[str, dict[str, Any], str]] = [
    ("qmp_capabilities", {"enable": ["nosuch"]}, "Parameter 'null' does not accept value 'nosuch'"),
    ("qmp_capabilities", {"enable": "oob"}, _wrong("enable", "array")),
    ("qmp_capabilities", {"enable": [1]}, _wrong("enable[0]", "string")),
]
"""The same, for the command that ends the negotiation."""

OPTIONS: list[tuple[str, dict[str, Any], str | None]] = [
    *[
        ("--blockdev", {**_NULL, "size": text}, "Parameter 'size' expects integer")
        for text in ("abc", "1k", "1.5", "", "5 ", "0x10k", "99999999999999999999", "1e3", "0x", "08", "--5", "- 5")
    ],
    *[("--blockdev", {**_NULL, "size": text}, None) for text in (" 512", "0x200", "01000", "+512", "0")],
    ("--blockdev", {**_NULL, "latency-ns": "1k"}, "Parameter 'latency-ns' expects integer"),
    ("--blockdev", {**_NULL, "latency-ns": ""}, "Parameter 'latency-ns' expects integer"),
    ("--blockdev", {**_NULL, "latency-ns": "18446744073709551616"}, "Parameter 'latency-ns' expects integer"),
    *[
        ("--blockdev", {**_NULL, "read-zeroes": text}, "Parameter 'read-zeroes' expects 'on' or 'off'")
        for text in ("abc", "ON", "1", "")
    ],
    *[("--blockdev", {**_NULL, "read-zeroes": text}, None) for text in ("on", "off", "y", "n", "true", "false", "yes")],
    ("--blockdev", {**_NULL, "size": {"x": "1"}}, "Parameters 'size.*' are unexpected"),
    ("--blockdev", {**_NULL, "bogus": "1"}, "Parameter 'bogus' is unexpected"),
    ("--blockdev", {**_NULL, "bogus": {"x": "1"}}, "Parameter 'bogus' is unexpected"),
    ("--blockdev", {**_NULL, "discard": "x"}, "Parameter 'discard' does not accept value 'x'"),
    ("--blockdev", {**_NULL, "cache": "x"}, _wrong("cache", "object")),
    ("--blockdev", {**_NULL, "cache": {"direct": "x"}}, "Parameter 'cache.direct' expects 'on' or 'off'"),
    ("--blockdev", {**_NULL, "cache": {"x": "1"}}, "Parameter 'cache.x' is unexpected"),
    (
        "--blockdev",
        {**_RAW, "offset": "x", "file": {"driver": "null-co", "bogus": "3"}},
        "Parameter 'file.bogus' is unexpected",
    ),
    ("--blockdev", {**_RAW, "file": {"driver": "null-co", "size": "x"}}, "Parameter 'file.size' expects integer"),
    ("--blockdev", {**_RAW, "file": ["null-co"]}, _wrong("file", "BlockdevRef")),
    (
        "--blockdev",
        {"driver": "luks", **_NODE, "file": "x", "key-secret": {"x": "1"}},
        "Parameters 'key-secret.*' are unexpected",
    ),
    ("--object", {**_LIST, "rules": ["x"]}, _wrong("rules.0", "object")),
    ("--object", {**_LIST, "rules": "x"}, _wrong("rules", "array")),
    ("--object", {**_LIST, "rules": [{"match": "x"}]}, "Parameter 'rules.0.policy' is missing"),
    (
        "--object",
        {**_LIST, "rules": [{"match": "x", "policy": "y"}]},
        "Parameter 'policy' does not accept value 'y'",
    ),
    ("--object", {**_KEYRING, "serial": "x"}, "Parameter 'serial' expects integer"),
    ("--object", {**_KEYRING, "serial": "99999999999"}, "Parameter 'serial' expects int32_t"),
    (
        "--nbd-server",
        {"addr": {"type": "inet", "host": "a", "port": "b"}, "max-connections": "x"},
        "Parameter 'max-connections' expects integer",
    ),
    ("--export", {**_NBD, "bitmaps": ["n", {"x": "4"}]}, "Parameter 'bitmaps.1.node' is missing"),
]
"""Option of a command line, its value as a tree, and the text; None if it is accepted."""

OPTION_TYPES = {
    "--blockdev": "BlockdevOptions",
    "--object": "ObjectOptions",
    "--nbd-server": "NbdServerOptions",
    "--export": "BlockExportOptions",
}
"""Type of the schema for each option."""
