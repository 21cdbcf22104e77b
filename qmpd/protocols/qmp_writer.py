"""Values to the bytes of QMP: one line of ASCII with the spacing and escapes of the reference.

`", "` and `": "` between tokens, characters outside ASCII as upper-case `\\uXXXX` pairs, floating point
numbers with at most 17 significant digits (so 1e3 is written 1000).
"""

from __future__ import annotations

import json
import re
from typing import Any

_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SPECIAL = re.compile(r"[^ !#-\[\]-~]")

# What the C encoder writes as it should unless one of these shows up in its result: an escape by number,
# a DEL, or what may be a floating point number.
_DOUBTFUL = re.compile(r'\\u|\x7f|(?:^|": |, |\[)-?(?:[0-9]+[.e]|[IN])')
# The same in three looks that cost a tenth: two for fixed texts, one whose every match begins with one of two
# characters. It sees more than there is, so what it sees is looked at again with the exact pattern.
_PERHAPS_FLOAT = re.compile(r"[ \[]-?(?:[0-9]+[.e]|[IN])")
_compact = json.JSONEncoder(check_circular=False).encode


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    short = _SHORT.get(character)
    if short is not None:
        return short
    code = ord(character)
    if 0xD800 <= code <= 0xDFFF:
        return "\\uFFFD"
    if code > 0xFFFF:
        return f"\\u{0xD800 | (code - 0x10000) >> 10:04X}\\u{0xDC00 | code & 0x3FF:04X}"
    return f"\\u{code:04X}"


def quote(text: str) -> str:
    """Return `text` as a JSON string; what is no character becomes U+FFFD."""
    return '"' + _SPECIAL.sub(_escaped, text) + '"'


def number(value: float) -> str:
    """Return a float in the fewest of at most 17 significant digits that C's %.17g would print."""
    return f"{value:.17g}"


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return number(value)
    raise TypeError(f"{type(value).__name__} has no place in QMP")


_END = object()


def _careful(value: Any) -> str:
    """Write any value, of any depth, without recursion."""
    pieces: list[str] = []
    stack: list[tuple[Any, bool, str]] = []
    while True:
        if isinstance(value, dict):
            stack.append((iter(value.items()), True, "{"))
        elif isinstance(value, list | tuple):
            stack.append((iter(value), False, "["))
        else:
            pieces.append(_scalar(value))
        while stack:
            members, named, opening = stack.pop()
            following: Any = next(members, _END)
            if following is _END:
                pieces.append(opening if opening != ", " else "")
                pieces.append("}" if named else "]")
                continue
            pieces.append(opening)
            stack.append((members, named, ", "))
            if named:
                name, value = following
                if not isinstance(name, str):
                    raise TypeError("a member's name must be a string")
                pieces.append(quote(name))
                pieces.append(": ")
            else:
                value = following
            break
        else:
            return "".join(pieces)


def to_text(value: Any) -> str:
    """Return the JSON text of `value`. Raises TypeError for what JSON has no form for."""
    try:
        text = _compact(value)
    except RecursionError:
        return _careful(value)
    return _careful(value) if _is_doubtful(text) else text


def _is_doubtful(text: str) -> bool:
    if text[0] in '{["' and "\\u" not in text and "\x7f" not in text and _PERHAPS_FLOAT.search(text) is None:
        return False
    return _DOUBTFUL.search(text) is not None


def to_wire(value: Any) -> bytes:
    """Return one message as it goes to a client, line end included."""
    return to_text(value).encode("ascii") + b"\r\n"
