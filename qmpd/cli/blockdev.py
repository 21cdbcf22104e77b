"""Trees of options as the tools take them: BlockdevOptions, but an encrypted qcow2 need not say by which method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmpd.qapi.schema import Schema
from qmpd.qapi.visit import validate


def check_options(schema: Schema, tree: Mapping[str, Any], *, keyval: bool = False) -> dict[str, Any]:
    """Return a tree of options as the schema has it, with `encrypt.format` left out where the tree leaves it out.

    keyval   values are text
    What lies in the tree stays as it is. Raises ValidationError.
    """
    unsaid: list[tuple[str, ...]] = []
    checked = dict(validate(schema, "BlockdevOptions", _complete(tree, (), unsaid), keyval=keyval))
    for path in unsaid:
        place: Any = checked
        for step in path:
            place = place[step]
        del place["format"]
    return checked


def _complete(tree: Mapping[str, Any], path: tuple[str, ...], unsaid: list[tuple[str, ...]]) -> dict[str, Any]:
    """Return a copy of the tree with methods filled in; the places where that was done are added to `unsaid`."""
    done = dict(tree)
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            continue
        here = (*path, name)
        done[name] = _complete(value, here, unsaid)
        if name == "encrypt" and tree.get("driver") == "qcow2" and "format" not in value:
            done[name]["format"] = "luks"  # the methods have the same options
            unsaid.append(here)
    return done
