"""How `bus=` and an id find their bus or device: by name, by type, or along a path.

Model: qbus_find, qbus_find_recursive and find_device_state (QEMU system/qdev-monitor.c); texts as
there.
"""

from __future__ import annotations

from qmpd.errors import CommandError, device_not_found
from qmpd.machine.bus import Bus
from qmpd.machine.device import Device
from qmpd.qom.object import QomObject
from qmpd.qom.tree import ObjectTree


def search(bus: Bus, name: str | None, type_name: str | None) -> Bus | None:
    """Return the first bus below and including `bus` that fits; one that is full only if all are."""
    fallback: Bus | None = None
    if (name is None or bus.bus_name == name) and (type_name is None or bus.is_a(type_name)):
        if not bus.full:
            return bus
        fallback = bus
    for device in bus.newest_first():
        for child in device.child_buses:
            found = search(child, name, type_name)
            if found is not None and not found.full:
                return found
            fallback = fallback or found
    return fallback


def find_bus(system: Bus, path: str) -> Bus:
    """Return the bus that `path` names: NAME, or NAME/DEVICE/BUS/..., or /DEVICE/... Raises CommandError."""
    parts = path.split("/")
    bus: Bus
    if path.startswith("/"):
        bus = system
    else:
        named = search(system, parts[0], None)
        if named is None:
            raise CommandError(f"Bus '{parts[0]}' not found")
        bus = named
    rest = [part for part in parts[1:] if part]
    while rest:
        device = _device_on(bus, rest.pop(0))
        buses = device.child_buses
        if rest:
            wanted = rest.pop(0)
            chosen = next((one for one in buses if one.bus_name == wanted), None)
            if chosen is None:
                raise CommandError(f"Bus '{wanted}' not found")
            bus = chosen
        elif not buses:
            raise CommandError(f"Device '{path.split('/')[-1]}' has no child bus")
        elif len(buses) > 1:
            raise CommandError(f"Device '{path.split('/')[-1]}' has multiple child buses")
        else:
            bus = buses[0]
    if bus.full:
        raise CommandError(f"Bus '{path}' is full")
    return bus


def _device_on(bus: Bus, name: str) -> Device:
    """Return the device of `bus` with the id `name`, or else of that type."""
    by_id = [one for one in bus.devices if one.device_id == name]
    by_type = [one for one in bus.devices if one.type_name == name]
    if by_id or by_type:
        return (by_id or by_type)[0]
    raise device_not_found(name)


def find_device(tree: ObjectTree, peripheral: QomObject, name: str) -> Device:
    """Return the device of an id or a QOM path. Raises DeviceNotFound, CommandError."""
    found: QomObject | None
    if name.startswith("/"):
        found, _ = tree.find(name)
    else:
        found = peripheral
        for part in name.split("/"):
            if part and found is not None:
                found = found.children.get(part) or found.link_target(part)
    if found is None:
        raise device_not_found(name)
    if not isinstance(found, Device):
        raise CommandError(f"{name} is not a device")
    return found
