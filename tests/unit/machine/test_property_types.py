"""How property values are read: strictly from JSON, leniently from text. Answers are QEMU's."""

from __future__ import annotations

from typing import Any

import pytest

from qmpd.errors import QmpdError
from qmpd.machine.property_types import KINDS


class Owner:
    type_name = "some-device"


def parse(kind: str, value: Any, *, text: bool = False) -> Any:
    reader = KINDS[kind].parse
    assert reader is not None
    return reader(Owner(), "p", value, text)


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("bool", True, True),
        ("uint16", 65535, 65535),
        ("uint64", -1, (1 << 64) - 1),
        ("bootindex", -(1 << 31), -(1 << 31)),
        ("size32", (1 << 32) - 1, (1 << 32) - 1),
        ("blocksize", 0, 0),
        ("blocksize", 2 << 20, 2 << 20),
        ("onoffauto", "auto", "auto"),
        ("pciaddr", 255, 255),
        ("pciaddr", -1, -1),
        ("pciaddr", "1f.7", 255),
        ("pciaddr", "0x5", 40),
        ("pciaddr", " 6", 48),
        ("vqmapping", [], []),
        ("vqmapping", [{"iothread": "a", "vqs": [1]}], [{"iothread": "a", "vqs": [1]}]),
    ],
)
def test_json_values_are_kept(kind: str, value: Any, kept: Any) -> None:
    assert parse(kind, value) == kept


@pytest.mark.parametrize(
    ("kind", "value", "error"),
    [
        ("bool", "on", "Invalid parameter type for 'p', expected: boolean"),
        ("bool", 1, "Invalid parameter type for 'p', expected: boolean"),
        ("str", 5, "Invalid parameter type for 'p', expected: string"),
        ("str", None, "Invalid parameter type for 'p', expected: string"),
        ("uint16", 65536, "Parameter 'p' expects uint16_t"),
        ("uint16", -1, "Parameter 'p' expects uint16_t"),
        ("uint16", "5", "Parameter 'p' expects uint64"),
        ("uint32", True, "Parameter 'p' expects uint64"),
        ("uint64", 1 << 64, "Parameter 'p' expects uint64"),
        ("int32", "x", "Invalid parameter type for 'p', expected: integer"),
        ("int32", 1 << 63, "Invalid parameter type for 'p', expected: integer"),
        ("int32", 1 << 31, "Parameter 'p' expects int32_t"),
        ("size32", 1 << 32, "Property some-device.p doesn't take value 4294967296 (maximum: 4294967295)"),
        ("size32", -1, "Property some-device.p doesn't take value 18446744073709551615 (maximum: 4294967295)"),
        ("blocksize", 513, "parameter p must be a power of 2 between 512 and 2097152"),
        ("blocksize", -512, "parameter p must be a power of 2 between 512 and 2097152"),
        ("blocksize", "4k", "Parameter 'p' expects uint64"),
        ("onerror", "nosuch", "Parameter 'p' does not accept value 'nosuch'"),
        ("onerror", 5, "Invalid parameter type for 'p', expected: string"),
        ("pciaddr", "99", "Property 'some-device.p' doesn't take value '99'"),
        ("pciaddr", "5.", "Property 'some-device.p' doesn't take value '5.'"),
        ("pciaddr", "1f.8", "Property 'some-device.p' doesn't take value '1f.8'"),
        ("pciaddr", 256, "Parameter 'p' expects a value between -1 and 255"),
        ("pciaddr", 5.5, "Invalid parameter type for 'p', expected: integer"),
        ("pciaddr", None, "Invalid parameter type for 'p', expected int or str"),
        ("vqmapping", "x", "Invalid parameter type for 'p', expected: array"),
        ("vqmapping", [5], "Invalid parameter type for 'p[0]', expected: object"),
        ("vqmapping", [{"vqs": [1]}], "Parameter 'p[0].iothread' is missing"),
        ("vqmapping", [{"iothread": 5}], "Invalid parameter type for 'p[0].iothread', expected: string"),
        ("vqmapping", [{"iothread": "a", "z": 1}], "Parameter 'p[0].z' is unexpected"),
        ("vqmapping", [{"iothread": "a", "vqs": [70000]}], "Parameter 'null' expects uint16_t"),
    ],
)
def test_bad_json_values_are_refused_in_qemus_words(kind: str, value: Any, error: str) -> None:
    with pytest.raises(QmpdError) as caught:
        parse(kind, value)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("bool", "yes", True),
        ("bool", "off", False),
        ("uint16", "0x10", 16),
        ("uint32", "010", 8),
        ("int32", "-2", -2),
        ("size", "4k", 4096),
        ("blocksize", "1M", 1 << 20),
        ("str", "5", "5"),
        ("pciaddr", "5.1", 41),
    ],
)
def test_text_values_are_kept(kind: str, value: str, kept: Any) -> None:
    assert parse(kind, value, text=True) == kept


@pytest.mark.parametrize(
    ("kind", "value", "error"),
    [
        ("bool", "maybe", "Parameter 'p' expects 'on' or 'off'"),
        ("uint16", "70000", "Parameter 'p' expects uint16_t"),
        ("uint16", "-1", "Parameter 'p' expects uint16_t"),
        ("uint16", "1k", "Parameter 'p' expects integer"),
        ("int32", "x", "Parameter 'p' expects integer"),
        ("blocksize", "x", "Parameter 'p' expects size"),
    ],
)
def test_bad_text_values_are_refused_in_qemus_words(kind: str, value: str, error: str) -> None:
    with pytest.raises(QmpdError) as caught:
        parse(kind, value, text=True)
    assert str(caught.value) == error
