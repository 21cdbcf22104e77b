"""Trees of options as images and tools write them: dotted names, and an encryption whose method is left to the image.

A file name that a node shows is one (`json:{"driver": "qcow2", "encrypt.key-secret": "s", ...}`), and so
may be the name of a backing file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmpd.qapi.schema import Schema
from qmpd.qapi.visit import validate


def undotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with dotted names taken apart: `a.b` is member `b` of `a`; of two equal ones the last wins.

    `a.0`, `a.1` and so on are the elements of a list.
    """
    return _listed(_undotted(tree))


def _undotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for name, value in tree.items():
        *path, last = name.split(".")
        place = done
        for step in path:
            below = place.get(step)
            if not isinstance(below, dict):
                below = place[step] = {}
            place = below
        if isinstance(value, Mapping):
            value = _undotted(value)
            before = place.get(last)
            if isinstance(before, dict):
                value = before | value
        place[last] = value
    return done


def listed(value: Any) -> Any:
    """Return the tree with lists where members are numbered from 0 on."""
    if not isinstance(value, Mapping):
        return value
    if value and all(str(index) in value for index in range(len(value))):
        return [listed(value[str(index)]) for index in range(len(value))]
    return {name: listed(one) for name, one in value.items()}


def _listed(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: listed(one) for name, one in tree.items()}


def check_options(schema: Schema, tree: Any, *, keyval: bool = False) -> dict[str, Any]:
    """Return a tree of options as the schema has it, with `encrypt.format` left out where the tree leaves it out.

    keyval   values are text
    Raises ValidationError.
    """
    unsaid: list[tuple[str, ...]] = []
    if isinstance(tree, Mapping):
        tree = _complete(tree, (), unsaid)
    checked: dict[str, Any] = dict(validate(schema, "BlockdevOptions", tree, keyval=keyval))
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
