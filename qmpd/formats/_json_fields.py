"""Taking a JSON object of a header apart: every access checked, every error with its path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from qmpd.errors import ImageError

MAX_DEPTH = 32
"""Levels of nesting; as many as the parser that cryptsetup uses takes."""

_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1


def parse_object(area: bytes, image: str, offset: int) -> dict[str, Any]:
    """Return the object that a NUL-filled area starts with. Raises ImageError.

    Nothing may stand before it; behind it white space, then only NULs, one at least.
    """

    def refuse(at: int, found: str, expected: str) -> ImageError:
        return ImageError(image, offset + at, "LUKS2 JSON area", found, expected)

    end = area.find(b"\0")
    text = area[: end if end >= 0 else len(area)]
    if not text.startswith(b"{"):
        raise refuse(0, f"starting with {text[:1]!r}", "starting with '{'")
    if end < 0:
        raise refuse(len(area) - 1, "without end", "ended by a NUL")
    if any(area[end:]):
        raise refuse(end, "followed by more than NULs", "filled up with NULs")
    try:
        tree = json.loads(text.decode("utf-8", "surrogateescape"), parse_constant=_no_constant)
    except ValueError as error:
        raise refuse(getattr(error, "pos", 0), "no JSON", "one JSON object") from error
    except RecursionError as error:
        raise refuse(0, "nested without end", f"at most {MAX_DEPTH} levels") from error
    if _depth(tree) > MAX_DEPTH:
        raise refuse(0, f"nested more than {MAX_DEPTH} levels", "a flatter tree")
    if not isinstance(tree, dict):
        raise refuse(0, f"a {type(tree).__name__}", "an object")
    return tree


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _depth(value: object) -> int:
    """Return the levels of nesting, MAX_DEPTH + 1 for anything deeper."""
    level = [value]
    for depth in range(MAX_DEPTH + 1):
        below: list[object] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one.values())
            elif isinstance(one, list):
                below.extend(one)
        if not any(isinstance(one, dict | list) for one in level):
            return depth
        level = below
    return MAX_DEPTH + 1


class Reader:
    """One object of the tree, its path in the text of errors."""

    __slots__ = ("_image", "_offset", "name", "path", "tree")

    def __init__(self, tree: Mapping[str, Any], path: str, image: str, offset: int) -> None:
        self.tree, self.path, self._image, self._offset = tree, path, image, offset
        self.name = path.rpartition(".")[2]

    def __contains__(self, name: str) -> bool:
        return name in self.tree

    def refuse(self, name: str, found: str, expected: str) -> NoReturn:
        """Raise ImageError for member `name`, "" for this object itself."""
        path = f"{self.path}.{name}" if name else self.path
        raise ImageError(self._image, None, f"LUKS2 {path}", found, expected)

    def _get(self, name: str, kind: type, what: str) -> Any:
        if name not in self.tree:
            self.refuse(name, "missing", what)
        value = self.tree[name]
        if type(value) is not kind:
            self.refuse(name, _show(value), what)
        return value

    def object(self, name: str) -> Reader:
        """Return the object `name`."""
        return Reader(self._get(name, dict, "an object"), f"{self.path}.{name}", self._image, self._offset)

    def text(self, name: str) -> str:
        """Return the string `name`, which is not empty."""
        value: str = self._get(name, str, "a string")
        if not value:
            self.refuse(name, "empty", "a string")
        return value

    def u64(self, name: str) -> int:
        """Return the number that the string `name` stands for: digits only, 64 bits."""
        text = self.text(name)
        if not (text.isascii() and text.isdigit() and len(text) <= 32 and int(text) <= _U64):
            self.refuse(name, _show(text), "a string of digits, at most 64 bits")
        return int(text)

    def u32(self, name: str) -> int:
        """Return the number `name`, of 32 bits."""
        value: int = self._get(name, int, "a number of 32 bits")
        if not 0 <= value <= _U32:
            self.refuse(name, _show(value), "a number of 32 bits")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """Return the array of strings `name`."""
        values = self._get(name, list, "an array of strings")
        for value in values:
            if type(value) is not str:
                self.refuse(name, _show(value), "an array of strings")
        return tuple(values)

    def numbered_objects(self, limit: int) -> Iterator[tuple[str, Reader]]:
        """Yield the members, all objects with numbers as names."""
        if len(self.tree) > limit:
            self.refuse("", f"{len(self.tree)} objects", f"at most {limit}")
        for name in self.tree:
            if not (name.isascii() and name.isdigit() and len(name) <= 10):
                self.refuse(_show(name), "no number", "a number as name")
            yield name, self.object(name)


def _show(value: object) -> str:
    """Return a value as shown in an error: short, and one line."""
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
