"""Arguments of the monitor for people: a line becomes typed values.

A command states its arguments as the reference does, "nodes:-n,verbose:-v,device:B?": a name, a
colon, and a type: `-x` a flag, `s` a word, `B` a block device, `F` a file name, `S` the rest of
the line, `o` a size in MiB, `i` an integer, `O` an option list; a `?` makes it optional. Texts:
monitor/hmp.c of QEMU.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

from qmpd.qapi import keyval
from qmpd.qom.tree import id_well_formed

log = logging.getLogger(__name__)

_MISSING = {"F": "filename expected", "B": "block device name expected"}
_ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_SPACE = " \t\n\v\f\r"


class Usage(Exception):
    """The line does not fit the command; the text is what the monitor prints before its hint."""


class Line:
    """What is left of a command line."""

    def __init__(self, text: str) -> None:
        self.text = text

    def skip(self) -> None:
        """Drop white space."""
        self.text = self.text.lstrip(_SPACE)

    def word(self) -> str | None:
        """Take a word, quoted by double quotes or not; None if there is none, or it is broken."""
        self.skip()
        if not self.text:
            return None
        if self.text[0] != '"':
            word, self.text = re.fullmatch(r"([^ \t\n\v\f\r]*)(.*)", self.text, re.DOTALL).groups()  # type: ignore[union-attr]
            return word
        return self._quoted()

    def _quoted(self) -> str | None:
        word, at = "", 1
        while at < len(self.text) and self.text[at] != '"':
            if self.text[at] == "\\":
                at += 1
                escape = self.text[at : at + 1]
                if escape not in _ESCAPES:
                    sys.stdout.write(f"unsupported escape code: '\\{escape}'\n")
                    return None
                word += _ESCAPES[escape]
            else:
                word += self.text[at]
            at += 1
        if at >= len(self.text):
            sys.stdout.write("unterminated string\n")
            sys.stdout.flush()
            return None
        self.text = self.text[at + 1 :]
        return word


def parse(name: str, spec: str, text: str) -> dict[str, Any]:
    """Return the arguments of the command `name` by name; absent ones are absent. Raises Usage."""
    line = Line(text)
    values: dict[str, Any] = {}
    todo = [item.split(":", 1) for item in spec.split(",") if item]
    flags = {kind[1] for _, kind in todo if kind.startswith("-")}
    for key, kind in todo:
        line.skip()
        if kind.startswith("-"):
            _flag(name, key, kind[1], flags, line, values)
            continue
        if kind.endswith("?") and not line.text:
            continue
        values[key] = _value(name, kind[0], line)
    line.skip()
    if line.text:
        raise Usage(f"{name}: extraneous characters at the end of line")
    return values


def _flag(name: str, key: str, letter: str, flags: set[str], line: Line, values: dict[str, Any]) -> None:
    if not line.text.startswith("-"):
        return
    given = line.text[1:2]
    if given == letter:
        values[key] = True
        line.text = line.text[2:]
    elif given not in flags:
        raise Usage(f"{name}: unsupported option -{given}")


def _value(name: str, kind: str, line: Line) -> Any:
    if kind == "S":
        text, line.text = line.text, ""
        if not text:
            raise Usage(f"{name}: string expected")
        return text
    if kind == "o":
        return _size(line)
    if kind == "O":
        text, line.text = line.text, ""
        return _options(text)
    word = line.word()
    if word is None:
        raise Usage(f"{name}: {_MISSING.get(kind, 'string expected')}")
    if kind == "i":
        number = keyval.parse_int64(word)
        if number is None or not -(1 << 31) <= number < 1 << 31:
            raise Usage("integer is for 32-bit values")
        return number
    return word


def _size(line: Line) -> int:
    """Take a size; a number without suffix counts MiB."""
    word = line.word() or ""
    if word.isascii() and word.replace(".", "", 1).isdigit():
        word += "M"
    size = keyval.parse_size(word)
    if size is None or size >= 1 << 63:
        raise Usage("invalid size")
    return size


def _options(text: str) -> dict[str, str]:
    """Take an option list whose first word is the driver; what is wrong with it goes to the log."""
    members = options(text, "driver")
    if "id" in members and not id_well_formed(members["id"]):
        log.error("Parameter 'id' expects an identifier")
        raise Usage("")
    return members


def options(text: str, implied: str) -> dict[str, str]:
    """Return the members of an option list, "driver,key=value,flag"; a comma in a value is doubled.

    A word without `=` is the value of `implied` if it comes first, else a switch.
    """
    members: dict[str, str] = {}
    for index, item in enumerate(_items(text)):
        key, equals, value = item.partition("=")
        if equals:
            members[key] = value
        elif index == 0:
            members[implied] = key
        elif key.startswith("no"):
            members[key[2:]] = "off"
        else:
            members[key] = "on"
    return members


def _items(text: str) -> list[str]:
    items, held = [], ""
    at = 0
    while at < len(text):
        if text.startswith(",,", at):
            held += ","
            at += 2
        elif text[at] == ",":
            items.append(held)
            held = ""
            at += 1
        else:
            held += text[at]
            at += 1
    return [*items, held] if text else []
