"""Node names, and the file names that nodes show: plain where that says all, json: elsewhere.

Model: bdrv_refresh_filename and bdrv_assign_node_name (QEMU block.c).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qmpd.block.node import BlockNode
from qmpd.errors import CommandError

MAX_NODE_NAME = 31
"""Bytes in a node name (the reference's field has 32 with its terminator)."""

MAX_FILENAME = 4095
"""Bytes in a plain file name that a driver puts together (PATH_MAX)."""

_ID = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*\Z")


_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def check_node_name(name: str) -> None:
    """Raise CommandError unless `name` is a letter, then letters, digits, '-', '.' and '_'."""
    if not _ID.match(name):
        raise CommandError(f"Invalid node-name: '{name}'")


def full_options(node: BlockNode) -> dict[str, Any]:
    """Return the options that would open this node's tree again, without names and cache."""
    options: dict[str, Any] = {}
    for name in node.strong_options:
        if name.endswith("."):
            _flatten(name, node.given.get(name[:-1]), options)
        elif name in node.given:
            options[name] = node.given[name]
    for child in node.children.values():
        if child.name != "backing" or node.backing_overridden:
            options[child.name] = full_options(child.node)
    if node.backing_overridden and "backing" not in node.children:
        options["backing"] = None
    options["driver"] = node.driver_name
    return options


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    """Put the members of a list or a dictionary into `into`, with dotted names."""
    if isinstance(value, Mapping):
        items = [(name, value[name]) for name in value]
    else:
        items = [(str(at), one) for at, one in enumerate(value or ())]
    for name, one in items:
        if isinstance(one, Mapping | list | tuple):
            _flatten(f"{prefix}{name}.", one, into)
        else:
            into[prefix + name] = one


def exact_filename(node: BlockNode) -> str:
    """Return the plain name that opens this node, "" if options are needed to say it."""
    own = node.exact_filename()
    if own is not None:
        return own
    primary = node.primary()
    overridden = node.backing_overridden or any(name in node.given for name in node.strong_options)
    if primary is None or overridden or node.is_filter:
        return ""
    if not (primary.node.is_protocol or primary.node.has_protocol_name):
        return ""
    return exact_filename(primary.node)


def node_filename(node: BlockNode) -> str:
    """Return the file name shown for a node."""
    return exact_filename(node) or "json:" + _encode(full_options(node))
