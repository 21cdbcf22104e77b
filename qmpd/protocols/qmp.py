"""QMP framing: bytes of a client in, requests out; values in, lines of bytes out.

Sans-io. A request needs no line end; several may come in one piece, one in many. Whatever is wrong
with the input costs one answer and never the stream. The rules, limits and texts were found by
asking qemu-storage-daemon 10.0.2.

A well-formed piece takes the fast way: Python's C scanner cuts objects off it. Everything
doubtful, and what is not complete yet, goes through `qmp_lexer` and `qmp_parser`, which know it all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qmpd.protocols.qmp_lexer import Kind, Lexer, Token
from qmpd.protocols.qmp_parser import JsonError, displayed, has_noncharacter, parse_number, parse_tokens
from qmpd.protocols.qmp_writer import to_text, to_wire

__all__ = ["CommandFramer", "Malformed", "from_text", "to_text", "to_wire"]

NUL = b"\0"
"""Where the reference stops to show a token."""

MAX_TOTAL = 64 << 20
"""Bytes in all tokens of one message, one more counted for the newest: a limit of the reference."""

MAX_TOKENS = 2 << 20
"""Tokens in one message: a limit of the reference."""

MAX_NESTING = 1024
"""Brackets open at once: a limit of the reference."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Input that is no JSON; `text` answers it."""

    text: str


class _Doubtful(Exception):
    """The fast way is not sure what the reference would say."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Doubtful
    return members


def _no_constant(name: str) -> Any:
    raise _Doubtful(name)


def _integer(text: str) -> int | float:
    return int(text) if len(text) < 19 else parse_number(Kind.INTEGER, text.encode())


def _float(text: str) -> float:
    if text.startswith(("0e", "0E", "-0e", "-0E")):
        raise _Doubtful  # JSON to Python, two tokens to the reference
    return float(text)


_decoder: Any = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_no_constant
)
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once
_SPACE = re.compile(r"[ \t\r\n]*")
_ESCAPED_NONCHARACTER = re.compile(r"\\u(?:[dD][89a-fA-F]|[fF][dD][dDeE]|[fF]{3})")


def _is_plain(text: str) -> bool:
    """Say whether no string in `text` holds what Python's scanner takes and the reference refuses."""
    if "\\u" in text and _ESCAPED_NONCHARACTER.search(text) is not None:
        return False
    return text.isascii() or not has_noncharacter(text)


class CommandFramer:
    """The input side of one client."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._message = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._message = bytearray()
        self._total = self._count = self._braces = self._brackets = 0

    def feed(self, data: bytes | bytearray) -> list[Any]:
        """Take the next bytes, of which nothing but what is not complete is kept; return what they complete, in order.

        Each item is a JSON value (of any type; a request should be a dict) or a `Malformed`.
        """
        found: list[Any] = []
        at = 0
        if self._message or not self._lexer.idle:
            at = self._slow(data, at, found, pause=True)
        if at < len(data):
            at += self._fast(data[at:] if at else data, found)
        if at < len(data):
            self._slow(data, at, found)
        return found

    def finish(self) -> list[Any]:
        """End the input; return what the bytes held back still give."""
        found = [outcome[0] for token in self._lexer.finish() if (outcome := self._take(*token)) is not None]
        if self._message:
            found.append(_parse(bytes(self._message), Kind.ERROR, self._count))
            self._reset()
        return found

    def _fast(self, data: bytes | bytearray, found: list[Any]) -> int:
        """Cut whole objects off the start of `data`; return the bytes that are done with."""
        end = data.rfind(b"}") + 1
        if not end:
            return 0
        try:
            text = str(memoryview(data)[:end], "utf-8")
        except UnicodeDecodeError:
            return 0
        if not _is_plain(text):
            return 0
        at, size = 0, len(text)
        skip, scan = _SPACE.match, _scan
        while at < size:
            if text[at] != "{":
                start = skip(text, at).end()  # type: ignore[union-attr]
                if start == size or text[start] != "{":
                    break
            else:
                start = at
            try:
                value, stop = scan(text, start)
            except (ValueError, StopIteration, RecursionError, _Doubtful):
                break
            if stop - start > MAX_NESTING and text.count("{", start, stop) + text.count("[", start, stop) > MAX_NESTING:
                break
            found.append(value)
            at = stop
        return at if text.isascii() else len(text[:at].encode("utf-8"))

    def _slow(self, data: bytes | bytearray, at: int, found: list[Any], *, pause: bool = False) -> int:
        """Take `data[at:]` token by token; return the bytes that are done with.

        pause   stop behind the first message, if the fast way can go on from there
        """
        for kind, text, end in self._lexer.tokens(data, at):
            outcome = self._take(kind, text)
            if outcome is not None:
                found.append(outcome[0])
                if pause and self._lexer.idle:
                    return end
        return len(data)

    def _take(self, kind: Kind, text: bytes) -> tuple[Any] | None:
        """Add a token to the message; return what is to be handed out, if anything, in a tuple."""
        if kind is Kind.ERROR:
            self._reset()
            return (Malformed(f"JSON parse error, stray '{displayed(text.split(NUL, 1)[0])}'"),)
        if kind is Kind.OPEN_OBJECT:
            self._braces += 1
        elif kind is Kind.CLOSE_OBJECT:
            self._braces -= 1
        elif kind is Kind.OPEN_LIST:
            self._brackets += 1
        elif kind is Kind.CLOSE_LIST:
            self._brackets -= 1
        refusal = None
        if self._total + len(text) + 1 > MAX_TOTAL:
            refusal = "JSON token size limit exceeded"
        elif self._count + 1 > MAX_TOKENS:
            refusal = "JSON token count limit exceeded"
        elif self._braces + self._brackets > MAX_NESTING:
            refusal = "JSON nesting depth limit exceeded"
        if refusal is not None:
            self._reset()
            return (Malformed(refusal),)
        if self._braces >= 0 and self._brackets >= 0 and (self._braces or self._brackets):
            self._total += len(text)
            self._count += 1
            self._message += text
            self._message += b" "
            return None
        outcome = _parse(text + b" " if not self._count else bytes(self._message) + text + b" ", kind, self._count)
        self._reset()
        return (outcome,)


def _parse(message: bytes, last: Kind, before: int) -> Any:
    """Return the value of one message, its tokens separated by spaces, or a `Malformed`.

    last    kind of its last token         before   tokens before that one
    """
    try:
        if not before:
            return parse_tokens([(last, message[:-1])])
        text = message.decode("utf-8")
        if text[0] in "{[" and _is_plain(text):
            value, end = _scan(text, 0)
            if end == len(text) - 1:
                return value
    except (ValueError, StopIteration, RecursionError, _Doubtful):
        pass
    except JsonError as error:
        return Malformed(str(error))
    try:
        return parse_tokens(_tokens(message))
    except JsonError as error:
        return Malformed(str(error))


def _tokens(message: bytes) -> Iterator[Token]:
    for kind, text, _ in Lexer().tokens(message):
        yield kind, text


def from_text(text: str) -> Any:
    """Return the one JSON value in `text`, as options of the command line carry it.

    Raises JsonError with the reference's words: a value cut short is a "premature EOI", nothing at
    all is "Expecting a JSON value".
    """
    framer = CommandFramer()
    outcomes = framer.feed(text.encode("utf-8", "surrogateescape")) + framer.finish()
    result: Any = None
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, Malformed):
            raise JsonError(outcome.text)
        if number:
            raise JsonError("Expecting at most one JSON value")
        result = outcome
    if not outcomes:
        raise JsonError("Expecting a JSON value")
    return result
