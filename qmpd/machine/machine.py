"""Machine: a board with devices and a run state, and no processor.

It is the root of /machine in the QOM tree. Devices come by `device_add` and go by `device_del`,
which asks the modelled guest (`GuestPolicy`) where the bus of the device does. Model:
system/qdev-monitor.c, system/runstate.c, hw/acpi/pcihp.c of QEMU; texts as there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qmpd.errors import CommandError, DeviceNotFound, device_not_found
from qmpd.exporting import endpoint
from qmpd.machine import board, lookup, types
from qmpd.machine.bus import Bus
from qmpd.machine.device import Device
from qmpd.machine.disk import BlockDevice, DiskDevice
from qmpd.machine.options import MachineOptions
from qmpd.machine.unplug import Unplugger
from qmpd.qapi.hashorder import dict_order
from qmpd.qapi.registry import Registry
from qmpd.qapi.registry import registry as default_registry
from qmpd.qom.object import Container, QomObject
from qmpd.qom.tree import ID_HINT, id_well_formed

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.events import EventBus
    from qmpd.qom.tree import ObjectTree

log = logging.getLogger(__name__)

ALIASES = {
    "virtio-blk": "virtio-blk-pci",
    "virtio-scsi": "virtio-scsi-pci",
}
"""Other names that device_add knows a type by."""


class Machine(QomObject):
    """The machine of one daemon.

    status    "prelaunch", "running" or "paused"
    ready     the command line is done: devices are hot-plugged from now on
    """

    qom_type = "machine"
    abstract = True

    def __init__(
        self,
        graph: Graph,
        objects: ObjectTree,
        events: EventBus,
        options: MachineOptions | None = None,
        *,
        registry: Registry = default_registry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.options = options or MachineOptions()
        plug = self.options.guest.plug
        self._endpoints = None if plug is None else (endpoint.factory(registry, plug[0]), plug[1])
        self.graph, self.objects, self.events = graph, objects, events
        self.ready = False
        self.status = "prelaunch"
        self.registry = registry
        self._clock = clock
        self._ran_before = 0.0
        self._running_since: float | None = None
        self._bus_numbers: dict[str, int] = {}
        self._anonymous = 0
        self._text_ids: set[str] = set()
        self._bootindexes: dict[int, Device] = {}
        self._disks: list[DiskDevice] = []
        self.unattached, self.peripheral, self.peripheral_anon = Container(), Container(), Container()
        objects.root.add_child("machine", self)
        for name in ("unattached", "peripheral", "peripheral-anon"):
            self.add_child(name, getattr(self, name.replace("-", "_")))
        types.add_types(objects.types, registry, self.options.machine_type)
        self.system_bus = board.build(self, self.options.board, usb=self.options.usb)
        self.unplugger = Unplugger(self, self.options.guest)

    @property
    def type_name(self) -> str:
        """See `QomObject.type_name`."""
        return self.options.machine_type

    # --- run state --------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """The guest's processors would run."""
        return self.status == "running"

    def start(self) -> None:
        """End the command line: run, unless -S was given."""
        self.ready = True
        if not self.options.paused:
            self.cont()

    def cont(self) -> None:
        """Run; nothing happens if it does."""
        if not self.running:
            self.status = "running"
            self._running_since = self._clock()
            self.events.emit("RESUME")

    def stop(self) -> None:
        """Stop; nothing happens if it does not run."""
        if self.running:
            self.status = "paused"
            assert self._running_since is not None
            self._ran_before += self._clock() - self._running_since
            self._running_since = None
            self.events.emit("STOP")

    @property
    def virtual_ms(self) -> int:
        """Milliseconds that the machine has run for; 0 only if it never did."""
        if self._running_since is None:
            return int(self._ran_before * 1000) + (self._ran_before > 0)
        return int((self._ran_before + self._clock() - self._running_since) * 1000) + 1

    async def system_reset(self) -> None:
        """Reset; removals that the guest never answered are completed."""
        if not self.running:
            self.status = "prelaunch"
        self.events.emit("RESET", guest=False, reason="host-qmp-system-reset")
        for device in self.devices():
            device.reset()
        await self.unplugger.machine_was_reset()

    def powerdown(self) -> None:
        """Press the power button, which no guest sees."""
        self.events.emit("POWERDOWN")

    # --- what devices ask -------------------------------------------------------------------

    def add_bus(self, owner: Device, bus: Bus, name: str | None = None) -> None:
        """Give `owner` a bus: called `name`, or after its type with the next number."""
        if name is None:
            number = self._bus_numbers.get(bus.qom_type, 0)
            self._bus_numbers[bus.qom_type] = number + 1
            name = f"{bus.qom_type.lower()}.{number}"
        owner.add_child(name, bus)

    def claim_bootindex(self, device: Device, index: int) -> None:
        """Note the boot order of a device; below 0 it gives its place up. Raises CommandError."""
        if index >= 0 and self._bootindexes.get(index, device) is not device:
            raise CommandError(f"The bootindex {index} has already been used")
        self._bootindexes = {at: one for at, one in self._bootindexes.items() if one is not device}
        if index >= 0:
            self._bootindexes[index] = device

    def acpi_index_taken(self, device: Device, index: int) -> bool:
        """Say whether another device has the ACPI index."""
        return any(
            one is not device and one.realized and one.values.get("acpi-index") == index for one in self.devices()
        )

    def iothread_path(self, name: str) -> str:
        """Return the QOM path of the iothread that `name` (id or path) means, "" for "". Raises DeviceNotFound."""
        if not name:
            return ""
        found, ambiguous = self.objects.find(name)
        if ambiguous:
            raise CommandError(f"Path '{name}' does not uniquely identify an object")
        if found is None:
            raise device_not_found(name)
        if found.type_name != "iothread":
            raise CommandError("Invalid parameter type for 'iothread', expected: iothread")
        return found.path

    def has_iothread(self, name: str) -> bool:
        """Say whether there is an iothread with the id `name`."""
        found = self.objects.get(name)
        return found is not None and found.type_name == "iothread"

    # --- devices ----------------------------------------------------------------------------

    def devices(self) -> list[Device]:
        """Return every device that was added, with the parts it consists of."""
        found: list[Device] = []
        for container in (self.peripheral, self.peripheral_anon):
            for child in container.children.values():
                _collect(child, found)
        return found

    def block_devices(self) -> list[BlockDevice]:
        """Return the devices with a drive, in order of their backends' making."""
        order = {id(backend): at for at, backend in enumerate(self.graph.backends)}
        held = [BlockDevice(one, one.backend) for one in self._disks if one.backend is not None]
        return sorted(held, key=lambda one: order.get(id(one.backend), len(order)))

    def find_device(self, name: str) -> Device:
        """Return the device of an id or a QOM path. Raises DeviceNotFound, CommandError."""
        return lookup.find_device(self.objects, self.peripheral, name)

    def track_disk(self, disk: DiskDevice) -> None:
        """Note a device that may hold a drive; it goes by `dismantle`."""
        self._disks.append(disk)

    async def device_add(self, arguments: Mapping[str, Any], *, text: bool = False) -> Device:
        """Make a device: `driver`, `bus`, `id` and the properties of its type.

        text   values are the strings of key=value text, else JSON values
        Raises QmpdError; nothing is left then.
        """
        driver, id_, path = (_string(arguments.get(name)) for name in ("driver", "id", "bus"))
        cls = self._device_class(driver)
        bus = self._choose_bus(cls, path)
        if self.ready and not bus.hotpluggable:
            raise CommandError(f"Bus '{bus.bus_name}' does not support hotplugging")
        if text and id_ is not None:
            self._check_text_id(id_)
        device = cls(self, hotplugged=self.ready)
        self._name_device(device, id_)
        try:
            for name in dict_order(arguments):
                if name not in ("driver", "id", "bus"):
                    device.assign(name, arguments[name], text=text)
            await self.plug(device, bus)
        except BaseException:
            for data in await self.dismantle(device):
                self.events.emit("DEVICE_DELETED", **data)
            raise
        return device

    def _device_class(self, driver: str | None) -> type[Device]:
        if driver is None:
            raise CommandError("Parameter 'driver' is missing")
        entry = self.registry.devices.get(ALIASES.get(driver, driver))
        if entry is not None:
            cls: type[Device] = entry.cls
            if not cls.user_creatable or (self.ready and not cls.hotpluggable):
                raise CommandError("Parameter 'driver' expects a pluggable device type")
            return cls
        self._refuse_known_type(driver)
        raise CommandError(f"'{driver}' is not a valid device model name")

    def _refuse_known_type(self, driver: str) -> None:
        """Refuse a device type that device_add cannot make; other names are left to the caller."""
        known = self.objects.types
        if known.implements(driver, "device"):
            if any(row["name"] == driver for row in known.list_types("device", abstract=False)):
                raise CommandError("Parameter 'driver' expects a pluggable device type")
            raise CommandError("Parameter 'driver' expects a non-abstract device type")

    def _choose_bus(self, cls: type[Device], path: str | None) -> Bus:
        if path is not None:
            bus = lookup.find_bus(self.system_bus, path)
            if not bus.is_a(cls.bus_type):
                raise CommandError(f"Device '{cls.qom_type}' can't go on {bus.qom_type} bus")
            return bus
        found = lookup.search(self.system_bus, None, cls.bus_type)
        if found is None or found.full:
            raise CommandError(f"No '{cls.bus_type}' bus found for device '{cls.qom_type}'")
        return found

    def _check_text_id(self, id_: str) -> None:
        """Check an id of key=value text, which has rules of its own. Raises CommandError."""
        if not id_well_formed(id_):
            raise CommandError("Parameter 'id' expects an identifier", hint=ID_HINT)
        if not self.ready and id_ in self._text_ids:
            raise CommandError(f"Duplicate ID '{id_}' for device")
        self._text_ids.add(id_)

    def _name_device(self, device: Device, id_: str | None) -> None:
        if id_ is None:
            self.peripheral_anon.add_child(f"device[{self._anonymous}]", device)
            self._anonymous += 1
        elif id_ in self.peripheral.children:
            raise CommandError(f"Duplicate device ID '{id_}'")
        else:
            self.peripheral.add_child(id_, device)
            device.device_id = id_

    async def plug(self, device: Device, bus: Bus) -> None:
        """Place a device on `bus` and realize it. Raises QmpdError; the caller dismantles it then."""
        device.bus = bus
        if not device.places_itself:
            bus.place(device)
        await device.realize()
        if self._endpoints is not None:
            factory, directory = self._endpoints
            for disk in _disks(device):
                await disk.open_endpoint(factory, directory, _socket_name(device))
        device.realized = True

    async def dismantle(self, device: Device) -> list[dict[str, Any]]:
        """Take a device with all that hangs on it out of the machine; returns the data of its
        DEVICE_DELETED events, which the caller emits."""
        deleted: list[dict[str, Any]] = []
        for bus in device.child_buses:
            for child in list(bus.newest_first()):
                deleted += await self.dismantle(child)
        for part in device.child_devices:
            deleted += await self.dismantle(part)
        data = {"path": device.path} if device.device_id is None else {"device": device.device_id, "path": device.path}
        await device.unrealize()
        if device.realized:
            deleted.append(data)
        device.realized = False
        if device.bus is not None:
            device.bus.remove(device)
        self.claim_bootindex(device, -1)
        if isinstance(device, DiskDevice) and device in self._disks:
            self._disks.remove(device)
        if device.parent is not None:
            device.parent.remove_child(device.name)
        return deleted

    async def device_del(self, name: str) -> None:
        """Remove a device, or ask the guest to let go of it. Raises CommandError."""
        await self.unplugger.request(self.find_device(name), name)

    def refuse_sync(self, name: str) -> CommandError:
        """Return why device-sync-config cannot be done for the device `name`."""
        try:
            device = self.find_device(name)
        except DeviceNotFound as error:
            return CommandError(str(error))
        owner = device.find_owner("drive")
        return CommandError(f"device-sync-config is not supported for '{owner.type_name}'")

    async def close(self) -> None:
        """Take every device out: the end of the daemon."""
        self.unplugger.close()
        for container in (self.peripheral_anon, self.peripheral):
            for child in reversed(list(container.children.values())):
                if isinstance(child, Device) and child.parent is container:
                    await self.dismantle(child)


def _collect(device: QomObject, found: list[Device]) -> None:
    if isinstance(device, Device):
        found.append(device)
    for child in device.children.values():
        _collect(child, found)


def _disks(device: Device) -> list[DiskDevice]:
    """Return the disks that a device is or consists of."""
    found: list[Device] = []
    _collect(device, found)
    return [one for one in found if isinstance(one, DiskDevice)]


def _socket_name(device: Device) -> str:
    """Return a file name for an endpoint: the id, or the path of a device without; no slash in either."""
    name = device.device_id or device.path.removeprefix("/machine/")
    return name.replace("/", "-")


def _string(value: Any) -> str | None:
    """Return a string, None for anything else: the reference takes ids and names that way."""
    return value if isinstance(value, str) else None
