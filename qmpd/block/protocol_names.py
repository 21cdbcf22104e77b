"""File names that begin with a protocol, as `nbd://host/export`: which driver they mean, with which options.

Model: bdrv_find_protocol and bdrv_parse_filename (QEMU block.c).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.qapi.registry import Registry

_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-.")


def protocol_of(name: str) -> str | None:
    """Return the protocol that a name begins with, None if it is a plain path."""
    protocol, colon, _ = name.partition(":")
    return protocol if colon and protocol and _CHARACTERS.issuperset(protocol) else None


def is_foreign(name: str) -> bool:
    """Say whether a name means something else than a file of this host."""
    return protocol_of(name) not in (None, "file")


def options_of(registry: Registry, name: str) -> dict[str, Any]:
    """Return the options of the protocol node that a path, `file:PATH` or `PROTOCOL:...` means.

    Raises CommandError, with the reference's texts, for what no driver knows or can read.
    """
    protocol = protocol_of(name)
    if protocol is None or protocol == "file":
        return {"driver": "file", "filename": name if protocol is None else name.partition(":")[2]}
    for driver, entry in registry.drivers.items():
        if protocol in entry.cls.filename_protocols:
            return {"driver": driver, **entry.cls.parse_filename(name)}
    raise CommandError(f"Unknown protocol '{protocol}'")


def modern(registry: Registry, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with old spellings of the driver's members replaced; only its own level is looked at.

    Raises CommandError for spellings that exclude each other.
    """
    entry = registry.drivers.get(str(tree.get("driver")))
    return dict(tree) if entry is None else dict(entry.cls.modern_options(tree))
