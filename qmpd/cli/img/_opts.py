"""The flat `key=value,...` text of -o, --image-opts and --object, as the reference's QemuOpts reads it."""

from __future__ import annotations

from qmpd.block.loose import listed

HELP_WORDS = ("help", "?")


def parse(text: str, implied: str = "") -> list[tuple[str, str]]:
    """Return the pairs of `text` in order: a doubled comma is a comma, a bare word means `=on`.

    implied   the key of a first part that has none
    """
    pairs: list[tuple[str, str]] = []
    for part in text.replace(",,", "\0").split(","):
        if not part:
            continue
        key, sign, value = part.replace("\0", ",").partition("=")
        if sign:
            pairs.append((key, value))
        elif implied and not pairs:
            pairs.append((implied, key))
        elif key.startswith("no") and len(key) > 2:
            pairs.append((key[2:], "off"))
        else:
            pairs.append((key, "on"))
    return pairs


def asks_help(texts: list[str]) -> bool:
    """Say whether a -o list holds `help` or `?` as a word of its own."""
    return any(part in HELP_WORDS for text in texts for part in text.replace(",,", "\0").split(","))


def crumple(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a tree of dotted keys: `file.driver` becomes a member of `file`; the last of two equal ones wins.

    Members that are numbered from 0 on become a list.
    """
    tree: dict[str, object] = {}
    for key, value in pairs:
        *path, last = key.split(".")
        target = tree
        for step in path:
            below = target.get(step)
            if not isinstance(below, dict):
                below = target[step] = {}
            target = below
        target[last] = value
    return {name: listed(value) for name, value in tree.items()}


def flatten(tree: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Return the leaves of a tree of dicts and lists under dotted keys."""
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list):
            value = {str(index): one for index, one in enumerate(value)}
        if isinstance(value, dict) and value:
            found += flatten(value, f"{name}.")
        else:
            found.append((name, value))
    return found
