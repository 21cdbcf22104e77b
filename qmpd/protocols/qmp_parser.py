"""From tokens to values: the grammar of QMP's JSON and the words of its errors.

Works without recursion, so that a value of 1024 levels needs no deep stack. Values are Python's:
dict, list, str, int (-2**63 to 2**64 - 1), float, bool, None; the code point 0 of an escape or of the
bytes C0 80 is an ordinary character here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from qmpd.protocols.qmp_lexer import Kind, Token


class JsonError(Exception):
    """Input that is not QMP's JSON; `str()` is the text for the client."""


_KEYWORDS = {b"true": True, b"false": False, b"null": None}
_SIMPLE = {
    b'"': '"',
    b"'": "'",
    b"\\": "\\",
    b"/": "/",
    b"b": "\b",
    b"f": "\f",
    b"n": "\n",
    b"r": "\r",
    b"t": "\t",
}
_ESCAPE = re.compile(rb"\\(?:u([0-9A-Fa-f]{4})?|(.))", re.DOTALL)
_NOT_A_CHARACTER = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)) + "]"
)


def is_character(code: int) -> bool:
    """Say whether a code point may stand in a string: no surrogate, no noncharacter."""
    return not (0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE)


def has_noncharacter(text: str) -> bool:
    """Say whether `text` holds one of Unicode's noncharacters, which QMP refuses."""
    return _NOT_A_CHARACTER.search(text) is not None


_SEQUENCE = re.compile(
    rb"[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc\xfd][\x80-\xbf]{0,5}|[\x80-\xbf\xfe\xff]"
)
"""What is taken for one character of several bytes, right or wrong."""


def displayed(data: bytes) -> str:
    """Return bytes as the text of an error shows them: U+FFFD for each sequence that is no character."""

    def character(match: re.Match[bytes]) -> bytes:
        try:
            return _plain(match[0]).encode()
        except JsonError:
            return "\ufffd".encode()

    return _SEQUENCE.sub(character, data).decode()


def _plain(piece: bytes) -> str:
    try:
        text = piece.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        raise JsonError("JSON parse error, invalid UTF-8 sequence in string") from None
    if has_noncharacter(text):
        raise JsonError("JSON parse error, invalid UTF-8 sequence in string")
    return text


def _unicode_escape(body: bytes, match: re.Match[bytes]) -> tuple[str, int]:
    """Return the character of the escape at `match` and the index behind it."""
    start = match.start()
    end = start + 6
    code = -1 if match[1] is None else int(match[1], 16)
    if 0xD800 <= code <= 0xDBFF and body[end : end + 2] == b"\\u":
        low = body[end + 2 : end + 6]
        if len(low) == 4 and re.fullmatch(rb"[Dd][C-Fc-f][0-9A-Fa-f]{2}", low):
            code = 0x10000 + ((code & 0x3FF) << 10 | int(low, 16) & 0x3FF)
            end += 6
        else:
            code = -1
    if code < 0 or not is_character(code):
        shown = body[start:end].decode("utf-8", "replace")
        raise JsonError(f"JSON parse error, {shown} is not a valid Unicode character")
    return chr(code), end


def parse_string(token: bytes) -> str:
    """Return the value of a string token, quotes included in `token`. Raises JsonError."""
    if b"\\" not in token:
        return _plain(token[1:-1])
    pieces: list[str] = []
    at, last = 1, len(token) - 1
    while at < last:
        found = token.find(b"\\", at, last)
        if found < 0:
            pieces.append(_plain(token[at:last]))
            break
        if found > at:
            pieces.append(_plain(token[at:found]))
        match = _ESCAPE.match(token, found)
        assert match is not None
        if match[2] is None:
            character, at = _unicode_escape(token, match)
            pieces.append(character)
        elif match[2] in _SIMPLE:
            pieces.append(_SIMPLE[match[2]])
            at = match.end()
        else:
            raise JsonError("JSON parse error, invalid escape sequence in string")
    return "".join(pieces)


def parse_number(kind: Kind, token: bytes) -> int | float:
    """Return an integer where 64 bits hold it, else the nearest floating point number."""
    if kind is Kind.INTEGER and len(token) <= 20:
        value = int(token)
        if -(1 << 63) <= value < 1 << 64:
            return value
    return float(token)


class _Frame:
    """A container in progress.

    key   in an object the member whose value is to come, None while the member's name is to come
    """

    __slots__ = ("container", "key")

    def __init__(self, container: dict[str, Any] | list[Any]) -> None:
        self.container = container
        self.key: str | None = None


def parse_tokens(tokens: Iterable[Token]) -> Any:
    """Return the value that the tokens spell; they end where the value ends.

    Raises JsonError with the first thing that is wrong, "premature EOI" if the tokens run out.
    """
    stream = iter(tokens)
    stack: list[_Frame] = []
    kind, text = _take(stream)
    while True:
        if kind is Kind.OPEN_OBJECT or kind is Kind.OPEN_LIST:
            opened: dict[str, Any] | list[Any] = {} if kind is Kind.OPEN_OBJECT else []
            closer = Kind.CLOSE_OBJECT if kind is Kind.OPEN_OBJECT else Kind.CLOSE_LIST
            kind, text = _take(stream)
            if kind is not closer:
                stack.append(_Frame(opened))
                continue
            value: Any = opened
        else:
            value = _scalar(kind, text)
        while stack and not _store(stack[-1], value, stream):
            value = stack.pop().container
        if not stack:
            return value
        kind, text = _take(stream)


def _take(stream: Iterator[Token]) -> Token:
    for token in stream:
        return token
    raise JsonError("JSON parse error, premature EOI")


def _scalar(kind: Kind, text: bytes) -> Any:
    if kind is Kind.STRING:
        return parse_string(text)
    if kind is Kind.INTEGER or kind is Kind.FLOAT:
        return parse_number(kind, text)
    if kind is Kind.KEYWORD:
        if text not in _KEYWORDS:
            raise JsonError(f"JSON parse error, invalid keyword '{text.decode()}'")
        return _KEYWORDS[text]
    raise JsonError("JSON parse error, expecting value")


def _store(frame: _Frame, value: Any, stream: Iterator[Token]) -> bool:
    """Put a finished value where it belongs; True if more of the container follows, False at its end."""
    container = frame.container
    if isinstance(container, list):
        container.append(value)
        closer, name = Kind.CLOSE_LIST, "list"
    elif frame.key is None:
        if not isinstance(value, str):
            raise JsonError("JSON parse error, key is not a string in object")
        if _take(stream)[0] is not Kind.COLON:
            raise JsonError("JSON parse error, missing : in object pair")
        frame.key = value
        return True
    else:
        if frame.key in container:
            raise JsonError("JSON parse error, duplicate key")
        container[frame.key] = value
        frame.key = None
        closer, name = Kind.CLOSE_OBJECT, "dict"
    kind, _ = _take(stream)
    if kind is not closer and kind is not Kind.COMMA:
        raise JsonError(f"JSON parse error, expected separator in {name}")
    return kind is Kind.COMMA
