"""Scalars as people write them after `key=` on a command line: text to bool, integer, size, number.

Each parser returns None for what it does not accept; the visitor makes the error of it. The rules
are those of C's strtoll and strtod with base 0, which is what the reference reads options with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_INTEGER = re.compile(r"[ \t\n\v\f\r]*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_SIZE = re.compile(r"[ \t\n\v\f\r]*\+?(?:0[xX]([0-9a-fA-F]+)|([0-9]*)(?:\.([0-9]*))?([bBkKmMgGtTpPeE]?))")
_NUMBER = re.compile(r"[ \t\n\v\f\r]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
BOOLEANS = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
_U64 = 1 << 64


def parser(type_name: str) -> tuple[Callable[[str], Any], str] | None:
    """Return the parser of a builtin scalar type and what its error says was expected."""
    if type_name == "str":
        return str, ""
    if type_name == "bool":
        return BOOLEANS.get, "'on' or 'off'"
    if type_name == "size":
        return parse_size, "a size value"
    if type_name == "number":
        return parse_number, "number"
    if type_name.startswith("int"):
        return parse_int64, "integer"
    if type_name.startswith("uint"):
        return parse_uint64, "integer"
    return None


def _integer(text: str) -> int | None:
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match.group(2)
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    value = int(digits, base)
    return -value if match.group(1) == "-" else value


def parse_int64(text: str) -> int | None:
    """Return the integer, None if it is none or does not fit in 64 bits with sign."""
    value = _integer(text)
    return value if value is not None and -_U64 // 2 <= value < _U64 // 2 else None


def parse_uint64(text: str) -> int | None:
    """Return the integer; a negative one wraps around. None if it is none or too large."""
    value = _integer(text)
    return value % _U64 if value is not None and -_U64 < value < _U64 else None


def parse_size(text: str) -> int | None:
    """Return the bytes of "512", "1.5M", "0x200": a fraction needs a suffix, hexadecimal takes none.

    What a fraction leaves below a byte is rounded to the nearest.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    hexadecimal, whole, fraction, suffix = match.groups()
    if hexadecimal is not None:
        value = int(hexadecimal, 16)
    else:
        if not whole and not fraction:
            return None
        shift = 10 * "BKMGTPE".index((suffix or "B").upper())
        value = int(whole or "0") << shift
        if fraction and fraction.strip("0"):
            if shift == 0:
                return None
            whole_fraction = 10 ** len(fraction)
            value += ((int(fraction) << shift) + whole_fraction // 2) // whole_fraction
    return value if value < _U64 else None


def parse_number(text: str) -> float | None:
    """Return the finite floating-point number."""
    if _NUMBER.fullmatch(text) is None:
        return None
    value = float(text)
    return value if abs(value) != float("inf") else None
