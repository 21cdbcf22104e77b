"""The options every node has, and their inheritance by inline children."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


class OpenFlags(enum.Flag):
    """How a tool that only looks, or mends, wants its images opened; the daemon has none of them.

    NO_IO       nothing will be read from the nodes: encrypted ones are not unlocked
    NO_BACKING  what an image names as its backing file is not opened
    CHECK       the image is to be checked: it is not repaired on the way
    NO_AES      the old encryption of qcow2 is refused, as the system emulator does (its daemon has this one)
    """

    NONE = 0
    NO_IO = 1
    NO_BACKING = 2
    CHECK = 4
    NO_AES = 8


GENERIC_MEMBERS = (
    "driver",
    "node-name",
    "discard",
    "cache",
    "active",
    "read-only",
    "auto-read-only",
    "force-share",
    "detect-zeroes",
)
"""Members of the BlockdevOptions base: the graph's business, never a driver's."""


@dataclass(frozen=True, slots=True, eq=False)
class NodeOptions:
    """The base of BlockdevOptions; None where the option was not given (and not inherited).

    discard        "ignore" | "unmap"         detect_zeroes  "off" | "on" | "unmap"
    """

    node_name: str | None = None
    discard: str | None = None
    cache_direct: bool | None = None
    cache_no_flush: bool | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    detect_zeroes: str | None = None
    active: bool | None = None

    @classmethod
    def from_wire(cls, tree: Mapping[str, Any]) -> NodeOptions:
        """Take the generic members out of a validated BlockdevOptions tree (wire names)."""
        cache = tree.get("cache") or {}
        return cls(
            node_name=tree.get("node-name"),
            discard=tree.get("discard"),
            cache_direct=cache.get("direct"),
            cache_no_flush=cache.get("no-flush"),
            read_only=tree.get("read-only"),
            auto_read_only=tree.get("auto-read-only"),
            force_share=tree.get("force-share"),
            detect_zeroes=tree.get("detect-zeroes"),
            active=tree.get("active"),
        )

    def overridden_by(self, own: NodeOptions) -> NodeOptions:
        """Return these options with those of `own` in place of them that were given."""
        given = {field.name: value for field in fields(own) if (value := getattr(own, field.name)) is not None}
        return replace(self, **given)

    def inherited_by(self, child: NodeOptions, *, backing: bool = False, parent_is_format: bool = True) -> NodeOptions:
        """Return the options of an inline child: its own, then this parent's (bdrv_inherited_options).

        backing           a backing file is read-only unless it says otherwise, never auto-read-only
        parent_is_format  formats take care of discard themselves, so their files may unmap
        """

        def default(own: Any, parents: Any) -> Any:
            return parents if own is None else own

        merged = replace(
            child,
            cache_direct=default(child.cache_direct, self.cache_direct),
            cache_no_flush=default(child.cache_no_flush, self.cache_no_flush),
            force_share=default(child.force_share, self.force_share),
        )
        if backing:
            return replace(
                merged,
                read_only=default(child.read_only, True),
                auto_read_only=default(child.auto_read_only, False),
            )
        return replace(
            merged,
            read_only=default(child.read_only, self.read_only),
            auto_read_only=default(child.auto_read_only, self.auto_read_only),
            discard=default(child.discard, "unmap" if parent_is_format else None),
        )


def driver_members(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of a validated tree that belong to the driver (wire names)."""
    return {key: value for key, value in tree.items() if key not in GENERIC_MEMBERS}
