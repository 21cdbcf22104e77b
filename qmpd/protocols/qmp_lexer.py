"""The tokens of QMP's JSON, cut from a byte stream that arrives in any pieces.

The accepted language is JSON as the reference monitor reads it: strings in double or single
quotes, no control characters and neither FE nor FF in them, numbers as RFC 8259 without `0e1`, keywords
of lower-case letters. Everything here was found out by asking qemu-storage-daemon 10.0.2.

A token that starts and ends in one piece costs one regular expression; one that does not is
carried on by a small state machine, which skips runs of plain bytes and so stays linear.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator

MAX_TOKEN = 64 << 20
"""Bytes in one token; a longer one is handed out as `Kind.OVERLONG`, as the reference does."""


class Kind(enum.IntEnum):
    """What a token is; punctuation has a kind of its own each."""

    ERROR = 0
    """Bytes that begin no token; the lexer skips to the next control (tabs aside) or structural character."""
    OPEN_OBJECT = 1
    CLOSE_OBJECT = 2
    OPEN_LIST = 3
    CLOSE_LIST = 4
    COLON = 5
    COMMA = 6
    STRING = 7
    INTEGER = 8
    FLOAT = 9
    KEYWORD = 10
    OVERLONG = 11


Token = tuple[Kind, bytes]

_PUNCTUATION = {
    b"{": Kind.OPEN_OBJECT,
    b"}": Kind.CLOSE_OBJECT,
    b"[": Kind.OPEN_LIST,
    b"]": Kind.CLOSE_LIST,
    b":": Kind.COLON,
    b",": Kind.COMMA,
}

# One whole token. A number or keyword counts only when a byte that ends it is there to be seen.
_TOKEN = re.compile(
    rb"[ \t\r\n]*(?:([{}\[\]:,])"
    rb'|("[^"\\\x00-\x1f\xfe\xff]*(?:\\[\x20-\xfd][^"\\\x00-\x1f\xfe\xff]*)*"'
    rb"|'[^'\\\x00-\x1f\xfe\xff]*(?:\\[\x20-\xfd][^'\\\x00-\x1f\xfe\xff]*)*')"
    rb"|(-?(?:0(?=[^0-9.])|[1-9][0-9]*(?=[^0-9.eE])))"
    rb"|(-?(?:0\.[0-9]+|[1-9][0-9]*(?:\.[0-9]+)?)(?:[eE][-+]?[0-9]+(?=[^0-9])|(?=[^0-9.eE])))"
    rb"|([a-z]+)(?=[^a-z]))",
    re.DOTALL,
)
_GROUP_KIND = (Kind.ERROR, Kind.ERROR, Kind.STRING, Kind.INTEGER, Kind.FLOAT, Kind.KEYWORD)


class _State(enum.IntEnum):
    START = 0
    RECOVERY = 1
    STRING = 2
    ESCAPE = 3
    SIGN = 4
    ZERO = 5
    DIGITS = 6
    POINT = 7
    FRACTION = 8
    EXPONENT = 9
    EXPONENT_SIGN = 10
    EXPONENT_DIGITS = 11
    WORD = 12


_RUN: dict[_State, re.Pattern[bytes]] = {
    _State.RECOVERY: re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff{}\[\]:,]+"),
    _State.DIGITS: re.compile(rb"[0-9]+"),
    _State.FRACTION: re.compile(rb"[0-9]+"),
    _State.EXPONENT_DIGITS: re.compile(rb"[0-9]+"),
    _State.WORD: re.compile(rb"[a-z]+"),
}
"""Runs of bytes that leave the state as it is (strings: see `_STRING_RUN`)."""

_STRING_RUN = {
    0x22: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]+'),
    0x27: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]+"),
}

_ENDS_AS = {
    _State.ZERO: Kind.INTEGER,
    _State.DIGITS: Kind.INTEGER,
    _State.FRACTION: Kind.FLOAT,
    _State.EXPONENT_DIGITS: Kind.FLOAT,
    _State.WORD: Kind.KEYWORD,
}
"""States in which any other byte ends the token without belonging to it."""

_DIGITS = frozenset(b"0123456789")
_STRUCTURAL = frozenset(b"{}[]:,")


def _next_number_state(state: _State, byte: int) -> _State | None:
    """Return where `byte` leads from a state inside a number, None if it does not go on."""
    digit = byte in _DIGITS
    exponent = byte in b"eE"
    if state is _State.SIGN and digit:
        return _State.ZERO if byte == 0x30 else _State.DIGITS
    if state in (_State.POINT, _State.FRACTION) and digit:
        return _State.FRACTION
    if state in (_State.EXPONENT, _State.EXPONENT_SIGN, _State.EXPONENT_DIGITS) and digit:
        return _State.EXPONENT_DIGITS
    if state is _State.EXPONENT and byte in b"+-":
        return _State.EXPONENT_SIGN
    if state is _State.DIGITS and digit:
        return _State.DIGITS
    if state in (_State.DIGITS, _State.FRACTION) and exponent:
        return _State.EXPONENT
    if state in (_State.ZERO, _State.DIGITS) and byte == 0x2E:
        return _State.POINT
    return None


class Lexer:
    """A stream of bytes in, tokens out."""

    def __init__(self) -> None:
        self._state = _State.START
        self._partial = bytearray()
        self._quote = 0

    @property
    def idle(self) -> bool:
        """True between tokens: nothing is held back and nothing is being skipped."""
        return self._state is _State.START

    def tokens(self, data: bytes | bytearray, start: int = 0) -> Iterator[tuple[Kind, bytes, int]]:
        """Yield (kind, bytes, end) for each token that ends in `data[start:]`.

        end   index in `data` just behind the token. The caller may stop there and go on later from
              it if the lexer is `idle`; else it has to take every token.
        """
        at, size, match_token = start, len(data), _TOKEN.match
        while at < size:
            if self._state is _State.START:
                match = match_token(data, at)
                if match is not None and match.end() - at <= MAX_TOKEN:
                    at = match.end()
                    group = match.lastindex or 1
                    text = match[group]
                    yield (_PUNCTUATION[text] if group == 1 else _GROUP_KIND[group]), text, at
                    continue
            kind, at = self._step(data, at)
            if kind is not None:
                text = bytes(self._partial)
                self._partial.clear()
                yield kind, text, at
            if len(self._partial) > MAX_TOKEN:
                text = bytes(self._partial)
                self._reset()
                yield Kind.OVERLONG, text, at

    def finish(self) -> Iterator[Token]:
        """End the input: yield the token in progress, complete or broken."""
        if self._state in _ENDS_AS:
            yield _ENDS_AS[self._state], bytes(self._partial)
        elif self._partial:
            yield Kind.ERROR, bytes(self._partial)
        self._reset()

    def _reset(self) -> None:
        self._state = _State.START
        self._partial.clear()

    def _step(self, data: bytes | bytearray, at: int) -> tuple[Kind | None, int]:
        """Take one run or one byte; a kind means that `_partial` is a finished token."""
        state = self._state
        run = _STRING_RUN[self._quote] if state is _State.STRING else _RUN.get(state)
        if run is not None and (match := run.match(data, at, at + MAX_TOKEN + 1 - len(self._partial))):
            if state is not _State.RECOVERY:
                self._partial += match[0]
            return None, match.end()
        byte = data[at]
        if state is _State.START:
            return self._begin(byte), at + 1
        if state is _State.RECOVERY:
            self._state = _State.START
            return None, at
        if state is _State.STRING or state is _State.ESCAPE:
            return self._inside_string(byte), at + 1
        following = _next_number_state(state, byte)
        if following is not None:
            self._state = following
            self._partial.append(byte)
            return None, at + 1
        if state in _ENDS_AS and not (state is _State.ZERO and byte in _DIGITS):
            self._state = _State.START
            return _ENDS_AS[state], at
        return self._broken(byte), at + 1

    def _begin(self, byte: int) -> Kind | None:
        if byte in b" \t\r\n":
            return None
        if byte in b"\"'":
            self._state, self._quote = _State.STRING, byte
        elif byte == 0x2D:
            self._state = _State.SIGN
        elif byte == 0x30:
            self._state = _State.ZERO
        elif byte in _DIGITS:
            self._state = _State.DIGITS
        elif 0x61 <= byte <= 0x7A:
            self._state = _State.WORD
        elif byte in _STRUCTURAL:
            self._partial.append(byte)
            return _PUNCTUATION[bytes((byte,))]
        else:
            return self._broken(byte)
        self._partial.append(byte)
        return None

    def _inside_string(self, byte: int) -> Kind | None:
        if byte < 0x20 or byte > 0xFD:
            return self._broken(byte)
        self._partial.append(byte)
        if self._state is _State.ESCAPE:
            self._state = _State.STRING
        elif byte == 0x5C:
            self._state = _State.ESCAPE
        elif byte == self._quote:
            self._state = _State.START
            return Kind.STRING
        return None

    def _broken(self, byte: int) -> Kind:
        self._partial.append(byte)
        self._state = _State.RECOVERY
        return Kind.ERROR
