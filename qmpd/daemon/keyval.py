"""`key=value,...` text of the command line, in the reference's two dialects.

`parse_keyval`: dotted keys make a tree (`file.driver=raw`), numbered ones a list; options that end in the
QAPI schema. `parse_opts`: a flat list, where a bare word means `=on` (`-chardev`, `-device`, `-m`). In both a
doubled comma is a comma, and the first word may stand for the value of an implied key. The texts
are those of qemu-storage-daemon 10.0.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from qmpd.errors import CommandError

MAX_FRAGMENT = 127
"""Characters in one part of a dotted key."""

_NAME = re.compile(r"(?:__[A-Za-z0-9.-]+_)?[A-Za-z][A-Za-z0-9_-]*")
_INDEX = re.compile(r"[0-9]+")
_HELP = re.compile(r"(?:help|\?)(?=,|$)")


@dataclass(slots=True)
class Opts:
    """Text in the flat dialect: the pairs in order, a later one of the same name winning.

    help   True if `help` or `?` stood among them
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    help: bool = False

    def as_dict(self) -> dict[str, str]:
        """Return the pairs as a dict."""
        return dict(self.pairs)

    def check(self, known: frozenset[str]) -> None:
        """Raise CommandError for the first name that is not known."""
        for name, _ in self.pairs:
            if name not in known:
                raise CommandError(f"Invalid parameter '{name}'")


def _value(text: str, at: int) -> tuple[str, int]:
    """Read a value up to a single comma; return it and the index behind the comma."""
    pieces: list[str] = []
    while True:
        comma = text.find(",", at)
        if comma < 0:
            pieces.append(text[at:])
            return "".join(pieces), len(text)
        if text.startswith(",,", comma):
            pieces.append(text[at : comma + 1])
            at = comma + 2
            continue
        pieces.append(text[at:comma])
        return "".join(pieces), comma + 1


def parse_opts(text: str, implied: str | None = None) -> Opts:
    """Parse the flat dialect; never fails, what is known decides the caller."""
    opts = Opts()
    at = 0
    first = implied
    while at < len(text):
        end = min((i for i in (text.find("=", at), text.find(",", at)) if i >= 0), default=len(text))
        if end < len(text) and text[end] == "=":
            name = text[at:end]
            value, at = _value(text, end + 1)
        elif _HELP.match(text, at) and _HELP.match(text, at).end() == end:  # type: ignore[union-attr]
            opts.help = True
            at = end + 1
            continue
        elif first is not None:
            name = first
            value, at = _value(text, at)
        else:
            name = text[at:end]
            at = end + 1
            value = "on"
            if name.startswith("no"):
                name, value = name[2:], "off"
        opts.pairs.append((name, value))
        first = None
    return opts


def parse_bool(name: str, value: str) -> bool:
    """Return the meaning of "on", "off", "yes", "no", "true", "false", "y" or "n". Raises CommandError."""
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")


def parse_keyval(text: str, implied: str | None = None) -> tuple[dict[str, Any], bool]:
    """Parse the dotted dialect; return the tree, its leaves all strings, and whether help was asked for.

    Raises CommandError.
    """
    tree: dict[str, Any] = {}
    wanted_help = False
    at = 0
    while at < len(text):
        end = min((i for i in (text.find("=", at), text.find(",", at)) if i >= 0), default=len(text))
        bare = end > at and (end == len(text) or text[end] != "=")
        match = _HELP.match(text, at)
        if bare and match and match.end() == end:
            wanted_help = True
            at = end + 1
        elif bare and implied is not None:
            _put(tree, implied, [implied], text[at:end])
            at = end + 1
        else:
            key = text[at:end]
            fragments = _fragments(key)
            parent = tree
            for depth, fragment in enumerate(fragments[:-1]):
                parent = _descend(parent, fragment, ".".join(fragments[: depth + 1]))
            if end == len(text) or text[end] != "=":
                raise CommandError(f"Expected '=' after parameter '{key}'")
            value, at = _value(text, end + 1)
            _put(parent, key, fragments, value)
        implied = None
    return _listify(tree, ""), wanted_help


def _fragments(key: str) -> list[str]:
    parts: list[str] = []
    at = 0
    while True:
        match = (_INDEX.match(key, at) if at else None) or _NAME.match(key, at)
        end = match.end() if match else at
        if match is None or (end < len(key) and key[end] != "."):
            raise CommandError(f"Invalid parameter '{key}'")
        if end - at > MAX_FRAGMENT:
            kind = " fragment" if at or end < len(key) else ""
            raise CommandError(f"Parameter{kind} '{key[at:end]}' is too long")
        parts.append(key[at:end])
        if end == len(key):
            return parts
        at = end + 1


def _descend(parent: dict[str, Any], fragment: str, path: str) -> dict[str, Any]:
    child = parent.setdefault(fragment, {})
    if not isinstance(child, dict):
        raise CommandError(f"Parameters '{path}.*' used inconsistently")
    return child


def _put(parent: dict[str, Any], key: str, fragments: list[str], value: str) -> None:
    if isinstance(parent.get(fragments[-1]), dict):
        raise CommandError(f"Parameters '{key}.*' used inconsistently")
    parent[fragments[-1]] = value


def _listify(tree: dict[str, Any], path: str) -> Any:
    """Turn every dict of numbered members into a list."""
    numbered = named = False
    for key, value in tree.items():
        if _INDEX.match(key):
            numbered = True
        else:
            named = True
        if isinstance(value, dict):
            tree[key] = _listify(value, f"{path}{key}.")
    if numbered and named:
        raise CommandError(f"Parameters '{path}*' used inconsistently")
    if not numbered:
        return tree
    by_index = {int(key): value for key, value in tree.items()}
    for index in range(len(by_index)):
        if index not in by_index:
            raise CommandError(f"Parameter '{path}{index}' missing")
    return [by_index[index] for index in sorted(by_index)]
