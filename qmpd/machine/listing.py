"""What device-list-properties answers."""

from __future__ import annotations

from typing import Any

from qmpd.errors import CommandError, device_not_found
from qmpd.machine.device import Device
from qmpd.qapi.registry import Registry
from qmpd.qom.tree import ObjectTree


def device_properties(registry: Registry, objects: ObjectTree, name: str) -> list[dict[str, Any]]:
    """Return DevicePropertyInfo (wire) of the device type `name`. Raises DeviceNotFound, CommandError."""
    entry = registry.devices.get(name)
    if entry is not None:
        cls: type[Device] = entry.cls
        return cls.list_properties()
    known = objects.types.list_types(None, abstract=True)
    if all(row["name"] != name for row in known):
        raise device_not_found(name)
    concrete = objects.types.list_types("device", abstract=False)
    if any(row["name"] == name for row in concrete):
        return []
    raise CommandError("Parameter 'typename' expects a non-abstract device type")
