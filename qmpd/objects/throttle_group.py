"""throttle-group: limits that several throttled users share.

Options: ThrottleGroupProperties (qapi/qom.json). Checks and texts as the reference's throttle core.
The object keeps limits and members; delaying requests is the members' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qmpd.block.throttle_limits import LENGTH_MAX, LIMITS, check, merge, no_limits
from qmpd.errors import CommandError
from qmpd.qapi.registry import qom_type
from qmpd.qom import values
from qmpd.qom.object import Property, QomObject
from qmpd.qom.protocols import ThrottleMember
from qmpd.qom.tree import ObjectTree


@dataclass(frozen=True, slots=True)
class ThrottleGroupOptions:
    """Members of ThrottleGroupProperties; `limits` holds wire names."""

    limits: dict[str, Any] | None = None
    x_iops_total: int | None = None
    x_iops_total_max: int | None = None
    x_iops_total_max_length: int | None = None
    x_iops_read: int | None = None
    x_iops_read_max: int | None = None
    x_iops_read_max_length: int | None = None
    x_iops_write: int | None = None
    x_iops_write_max: int | None = None
    x_iops_write_max_length: int | None = None
    x_bps_total: int | None = None
    x_bps_total_max: int | None = None
    x_bps_total_max_length: int | None = None
    x_bps_read: int | None = None
    x_bps_read_max: int | None = None
    x_bps_read_max_length: int | None = None
    x_bps_write: int | None = None
    x_bps_write_max: int | None = None
    x_bps_write_max_length: int | None = None
    x_iops_size: int | None = None


def _set_limits(self: ThrottleGroup, value: Any) -> None:
    given = values.struct("limits", value)
    numbers = {name: values.integer(f"limits.{name}", given[name]) for name in LIMITS if name in given}
    values.no_more("limits", given, list(numbers))
    self.change(numbers)


def _single(name: str) -> Property:
    """Return the property `x-NAME`, which can be set on creation only."""

    def get(self: ThrottleGroup) -> int:
        return self.limits[name]

    def set_(self: ThrottleGroup, value: Any) -> None:
        raise CommandError("Property cannot be set after initialization")

    return Property(f"x-{name}", "int", get, set_)


@qom_type("throttle-group", schema="ThrottleGroupProperties", options=ThrottleGroupOptions)
class ThrottleGroup(QomObject):
    """A group of throttled members (Throttler).

    limits  all members of ThrottleLimits by wire name
    """

    qom_type = "throttle-group"
    abstract = False
    interfaces = ("user-creatable",)
    qom_properties = (
        Property("limits", "ThrottleLimits", get=lambda self: self.wire_limits(), set=_set_limits),
        *(_single(name) for name in LIMITS),
    )

    def __init__(self, options: ThrottleGroupOptions) -> None:
        super().__init__()
        self.limits = no_limits()
        self._members: list[ThrottleMember] = []
        for one in fields(options):
            name, value = one.name.replace("_", "-"), getattr(options, one.name)
            if name != "limits" and value is not None:
                self.limits[name.removeprefix("x-")] = _check_single(name, value)
        if options.limits is not None:
            self.limits = merge(self.limits, options.limits)

    def complete(self, objects: ObjectTree) -> None:
        """Check what the single properties set together."""
        check(self.limits)

    def change(self, limits: Mapping[str, int]) -> None:
        """Change some limits, or none. Raises CommandError."""
        self.limits = merge(self.limits, limits)
        for member in list(self._members):
            member.limits_changed()

    def wire_limits(self) -> dict[str, int]:
        """Return ThrottleLimits."""
        return dict(self.limits)

    def join(self, member: ThrottleMember) -> None:
        """Add a member; the group cannot be deleted while it has any."""
        self._members.append(member)

    def leave(self, member: ThrottleMember) -> None:
        """Take a member out."""
        self._members.remove(member)

    def in_use(self) -> bool:
        """Say whether there are members."""
        return bool(self._members)


def _check_single(name: str, value: int) -> int:
    if value < 0:
        raise CommandError("Property values cannot be negative")
    if name.endswith("-max-length") and value > LENGTH_MAX:
        # The two words run together in the reference's text, too.
        raise CommandError(f"{name} value must be in therange [0, {LENGTH_MAX}]")
    return value
