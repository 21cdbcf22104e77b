"""Reads QMP commands out of texts that people write: documents, shell histories, QMP transcripts.

Three forms are understood, also mixed:

    # virsh qemu-monitor-command vm '{"execute":"query-block"}'      also qmpd-ctl monitor-command '{...}'
    -> { "execute": "query-block" }                                  a transcript; `>` and `C:` as well
    { "execute": "query-block" }                                     JSON at the start of a line

A command may go on over lines that end in a backslash. The text may be one copied from a web page: with line
numbers and no-break spaces. Nothing here does I/O.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qmpd.errors import CommandError

_CONTINUED = re.compile(r"\\[ \t]*\n[ \t]*")
_NUMBERED = re.compile(r"(\d+)(?: |$)")
_SHELL = re.compile(r"\b(?:virsh\b[^\n'\"]*\bqemu-monitor-command|qmpd-ctl\s+monitor-command)\b")
_BARE = re.compile(r"^[ \t]*(?:->|>|C:)?[ \t]*(?=\{)", re.MULTILINE)
_HEADING = re.compile(r"^\s*(?:\d+\.|[-*]|#(?! virsh| qmpd-ctl)+)\s+(.+)$")


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a text.

    line      where it starts, from 1, for messages
    title     the sentence that introduces it, "" if there is none
    message   the QMP message
    """

    line: int
    title: str
    message: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the command."""
        return str(self.message.get("execute", self.message.get("exec-oob")))

    def with_values(self, replacements: Sequence[tuple[str, str]]) -> Step:
        """Return the step with OLD replaced by NEW in every string value of its arguments."""
        arguments = self.message.get("arguments")
        if arguments is None or not replacements:
            return self
        return replace(self, message={**self.message, "arguments": _replaced(arguments, replacements)})


def _replaced(value: Any, replacements: Sequence[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        for old, new in replacements:
            value = value.replace(old, new)
        return value
    if isinstance(value, list):
        return [_replaced(one, replacements) for one in value]
    if isinstance(value, dict):
        return {key: _replaced(one, replacements) for key, one in value.items()}
    return value


@dataclass(frozen=True, slots=True)
class _Text:
    """A text and the number of each of its lines."""

    text: str
    numbers: Sequence[int]

    def line(self, position: int) -> int:
        return self.numbers[self.text.count("\n", 0, position)]

    def message(self, position: int, word: str) -> Mapping[str, Any]:
        """Return the command in `word`, which begins at `position`."""
        try:
            value = json.loads(word)
        except ValueError as error:
            raise CommandError(f"line {self.line(position)}: not JSON: {error}") from error
        if not _is_command(value):
            raise CommandError(f"line {self.line(position)}: a QMP command has a member 'execute'")
        return dict(value)


def read_steps(text: str) -> list[Step]:
    """Return the commands of a text in their order.

    Raises CommandError, with the line, for a command that is begun and cannot be read, and for a text
    without any.
    """
    # Text copied from a web page has no-break spaces, which JSON does not take for spaces.
    source = _without_numbers(text.replace("\N{NO-BREAK SPACE}", " ").splitlines())
    steps = []
    taken = 0
    for start, end, message in sorted([*_shell_steps(source), *_bare_steps(source)], key=lambda found: found[0]):
        if start >= taken:
            taken = end
            steps.append(Step(source.line(start), _title(source.text[:start]), message))
    if not steps:
        raise CommandError("the text holds no QMP command")
    return steps


def _is_command(value: object) -> bool:
    return isinstance(value, dict) and bool({"execute", "exec-oob"} & value.keys())


def _without_numbers(lines: list[str]) -> _Text:
    """Drop the line numbers of a listing, if it has them."""
    matches = [_NUMBERED.match(line) for line in lines]
    numbers = [int(match[1]) for match in matches if match]
    filled = sum(bool(line.strip()) for line in lines)
    if not numbers or len(numbers) * 2 < filled or any(a >= b for a, b in itertools.pairwise(numbers)):
        return _Text("\n".join(lines), range(1, len(lines) + 2))
    bare: list[str] = []
    shown: list[int] = []
    for line, match in zip(lines, matches, strict=True):
        number = int(match[1]) if match else (shown[-1] if shown else 1)
        if shown and number > shown[-1] + 1:
            # Lines left out were blank: they end a paragraph.
            bare.append("")
            shown.append(number - 1)
        bare.append(line[match.end() :] if match else line)
        shown.append(number)
    return _Text("\n".join(bare), [*shown, shown[-1]])


def _shell_steps(source: _Text) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Yield start, end and message of every shell command that sends one."""
    for match in _SHELL.finditer(source.text):
        for word, end in _shell_words(source, match.end()):
            if word.startswith("{"):
                yield match.start(), end, source.message(match.start(), word)
                break


def _shell_words(source: _Text, at: int) -> Iterator[tuple[str, int]]:
    """Yield the words, and where each ends, from `at` to the end of the shell command.

    The shell would keep a backslash and a line end within single quotes; who writes them there means
    the line to go on, so that is how they are read.
    """
    text = source.text
    word: list[str] | None = None
    quote = ""
    begun = at
    while at <= len(text):
        character = text[at : at + 1]
        continued = _CONTINUED.match(text, at)
        if continued:
            at = continued.end()
            if quote:
                assert word is not None
                word.append(" ")
            elif word is not None:
                yield "".join(word), at
                word = None
            continue
        if quote:
            assert word is not None
            if not character:
                yield _leading_json(source, begun, "".join(word))
                return
            if character == quote:
                quote = ""
            elif character == "\\" and quote == '"' and text[at + 1 : at + 2] in tuple('"\\$`'):
                at += 1
                word.append(text[at])
            else:
                word.append(character)
        elif character in ("", *" \t\n;|&"):
            if word is not None:
                yield "".join(word), at
                word = None
            if character not in (" ", "\t"):
                return
        else:
            if word is None:
                word, begun = [], at
            if character in ("'", '"'):
                quote = character
            elif character == "\\":
                at += 1
                word.append(text[at : at + 1])
            else:
                word.append(character)
        at += 1


def _leading_json(source: _Text, begun: int, word: str) -> tuple[str, int]:
    """Return the JSON that an unclosed quoted `word` starts with, and an end before the next command.

    The document this is made for forgets a closing quote; where the JSON ends is plain all the same.
    """
    try:
        _, end = json.JSONDecoder().raw_decode(word)
    except ValueError as error:
        raise CommandError(f"line {source.line(begun)}: a quote is not closed") from error
    return word[:end], begun + 1


def _bare_steps(source: _Text) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Yield start, end and message of every command that stands as JSON at the start of a line."""
    decoder = json.JSONDecoder()
    at = 0
    while match := _BARE.search(source.text, at):
        try:
            value, at = decoder.raw_decode(source.text, match.end())
        except ValueError:
            at = match.end() + 1
            continue
        if _is_command(value):
            yield match.start(), at, value


def _title(before: str) -> str:
    """Return the paragraph that introduces what follows, if it is an item of a list or ends in a colon."""
    lines = before.rpartition("\n")[0].rstrip().splitlines()
    paragraph: list[str] = []
    while lines and lines[-1].strip():
        paragraph.insert(0, lines.pop().strip())
        if _HEADING.match(paragraph[0]):
            break
    title = " ".join(paragraph)
    heading = _HEADING.match(title)
    if heading is None and not title.endswith(":"):
        return ""
    return (heading[1] if heading else title).rstrip(":").strip()
