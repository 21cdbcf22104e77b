"""The buses devices sit on, and how a place on them is taken.

Texts and rules of addresses: as the reference (hw/pci/pci.c, hw/scsi/scsi-bus.c, hw/ide/ide-bus.c,
hw/usb/bus.c, hw/core/bus.c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

from qmpd.errors import CommandError
from qmpd.qom.object import Property, QomObject

if TYPE_CHECKING:
    from qmpd.machine.device import Device


class Bus(QomObject):
    """A bus: a child of a device in the QOM tree, with devices on it.

    accepts       further bus types that a device may ask for and be content with this one
    max_devices   more do not fit, None for any number
    hotpluggable  devices may come and go while the machine exists
    handler       QOM path of the object that handles hot-plug here, ""
    """

    qom_type: ClassVar[str] = "bus"
    accepts: ClassVar[tuple[str, ...]] = ()
    max_devices: ClassVar[int | None] = None

    def __init__(self, *, hotpluggable: bool = False, handler: str = "") -> None:
        super().__init__()
        self.hotpluggable = hotpluggable
        self.handler = handler
        self.devices: list[Device] = []
        self._numbers: dict[int, int] = {}
        self._next = 0

    def properties(self) -> dict[str, Property]:
        """See `QomObject.properties`; each device shows as a link child[N]."""
        table = super().properties()
        table["realized"] = Property("realized", "bool", get=lambda _bus: True)
        table["hotplug-handler"] = Property("hotplug-handler", "link<hotplug-handler>", get=lambda _bus: self.handler)
        for device in self.devices:
            name = f"child[{self._numbers[id(device)]}]"
            table[name] = Property(name, f"link<{device.type_name}>", get=_path_of(device))
        return table

    def link_target(self, name: str) -> QomObject | None:
        """See `QomObject.link_target`."""
        return next((one for one in self.devices if name == f"child[{self._numbers[id(one)]}]"), None)

    @property
    def bus_name(self) -> str:
        """Its name as a bus."""
        return self.name

    @property
    def full(self) -> bool:
        """No further device fits."""
        return self.max_devices is not None and len(self.devices) >= self.max_devices

    def is_a(self, type_name: str) -> bool:
        """Say whether a device that wants a bus of `type_name` may sit here."""
        return type_name == self.qom_type or type_name in self.accepts

    def newest_first(self) -> Iterator[Device]:
        """Walk the devices in the order in which the reference searches them."""
        return reversed(self.devices)

    def place(self, device: Device) -> None:
        """Find the device its place and take it. Raises CommandError, with nothing taken."""
        self.adopt(device)

    def adopt(self, device: Device) -> None:
        """Make `device` a child without a check of addresses."""
        self.devices.append(device)
        self._numbers[id(device)] = self._next
        self._next += 1

    def remove(self, device: Device) -> None:
        """Give up the place of `device`; one that has none is no error."""
        if device in self.devices:
            self.devices.remove(device)
            del self._numbers[id(device)]


class SystemBus(Bus):
    """The root of the bus tree."""

    qom_type = "System"

    @property
    def bus_name(self) -> str:
        """See `Bus.bus_name`."""
        return "main-system-bus"


class IsaBus(Bus):
    """The ISA bus, which only can be named: nothing qmpd has fits there."""

    qom_type = "ISA"


class I2cBus(Bus):
    """The SMBus, which only can be named."""

    qom_type = "i2c-bus"


class VirtioBus(Bus):
    """The bus between a virtio transport and its one device."""

    qom_type = "virtio-pci-bus"
    accepts = ("virtio-bus",)
    max_devices = 1


class PciBus(Bus):
    """A PCI bus: 32 slots of 8 functions.

    upstream_port   the PCIe downstream port that owns it; only slot 0 is wired then
    """

    qom_type = "PCI"
    upstream_port = False

    def __init__(self, *, hotpluggable: bool = False, handler: str = "") -> None:
        super().__init__(hotpluggable=hotpluggable, handler=handler)
        self.functions: dict[int, Device] = {}

    def place(self, device: Device) -> None:
        """Take the function that property `addr` asks for, or the first free slot."""
        name = device.type_name
        address: int = device.values["addr"]
        if address < 0:
            free = (slot * 8 for slot in range(32) if slot * 8 not in self.functions)
            address = next(free, -1)
            if address < 0:
                raise CommandError(f"PCI: no slot/function available for {name}, all in use or reserved")
        elif address in self.functions:
            other = self.functions[address]
            raise CommandError(
                f"PCI: slot {address >> 3} function {address & 7} not available for {name}, "
                f"in use by {other.type_name},id={other.shown_id}"
            )
        slot, function = address >> 3, address & 7
        # What was asked for counts, as in QEMU: without an address that reads as slot 31.
        asked = device.values["addr"] >> 3 & 31
        first = self.functions.get(0 if self.upstream_port else asked * 8)
        if device.hotplugged and first is not None:
            raise CommandError(
                f"PCI: slot {first.values['addr'] >> 3} function 0 already occupied by {first.type_name}, "
                f"new func {name} cannot be exposed to guest."
            )
        self._check_functions(device, slot, function)
        device.values["addr"] = address
        self.functions[address] = device
        self.adopt(device)

    def _check_functions(self, device: Device, slot: int, function: int) -> None:
        """Refuse functions beside one that says it is the only one of its slot."""
        if function:
            first = self.functions.get(slot * 8)
            if first is not None and not first.values["multifunction"]:
                raise CommandError(f"PCI: single function device can't be populated in function {slot:x}.{function:x}")
        elif not device.values["multifunction"]:
            for other in range(1, 8):
                if slot * 8 + other in self.functions:
                    raise CommandError(
                        f"PCI: {slot:x}.0 indicates single function, but {slot:x}.{other:x} is already populated."
                    )

    def remove(self, device: Device) -> None:
        """See `Bus.remove`."""
        if device in self.devices:
            self.functions = {at: one for at, one in self.functions.items() if one is not device}
        super().remove(device)

    def in_slot(self, slot: int) -> list[Device]:
        """Return the devices of one slot, newest first."""
        return [one for one in self.newest_first() if one.values["addr"] >> 3 == slot]


class PcieBus(PciBus):
    """A PCI Express bus."""

    qom_type = "PCIE"
    accepts = ("PCI",)


class PciePortBus(PcieBus):
    """The bus below a PCIe root port."""

    upstream_port = True


class ScsiBus(Bus):
    """The bus of a SCSI host adapter: one channel, targets and logical units.

    max_target, max_lun   highest number of each
    """

    qom_type = "SCSI"
    max_channel = 0

    def __init__(self, *, max_target: int, max_lun: int, handler: str = "") -> None:
        super().__init__(hotpluggable=True, handler=handler)
        self.max_target, self.max_lun = max_target, max_lun

    def place(self, device: Device) -> None:
        """Take the target and unit that the properties name; those left open are chosen."""
        unset = 0xFFFFFFFF
        channel, target, lun = (device.values[name] for name in ("channel", "scsi-id", "lun"))
        if channel > self.max_channel:
            raise CommandError(f"bad scsi channel id: {_signed(channel)}")
        if target != unset and target > self.max_target:
            raise CommandError(f"bad scsi device id: {_signed(target)}")
        if lun != unset and lun > self.max_lun:
            raise CommandError(f"bad scsi device lun: {_signed(lun)}")
        if target == unset:
            lun = 0 if lun == unset else lun
            target = next((one for one in range(self.max_target + 1) if self._at(channel, one, lun) is None), unset)
            if target == unset:
                raise CommandError("no free target")
        elif lun == unset:
            lun = next((one for one in range(self.max_lun + 1) if self._at(channel, target, one) is None), unset)
            if lun == unset:
                raise CommandError("no free lun")
        else:
            other = self._at(channel, target, lun)
            if other is not None:
                raise CommandError(f"lun already used by '{other.shown_id}'")
        device.values |= {"scsi-id": target, "lun": lun}
        self.adopt(device)

    def _at(self, channel: int, target: int, lun: int) -> Device | None:
        wanted = (channel, target, lun)
        for one in self.devices:
            if (one.values["channel"], one.values["scsi-id"], one.values["lun"]) == wanted:
                return one
        return None


class IdeBus(Bus):
    """An IDE channel: a master and, unless it is a SATA port, a slave."""

    qom_type = "IDE"

    def __init__(self, *, units: int) -> None:
        super().__init__()
        self.units = units
        self.taken: dict[int, Device] = {}

    def place(self, device: Device) -> None:
        """Take property `unit`, or the master's place and then the slave's."""
        unit: int = device.values["unit"]
        if unit == 0xFFFFFFFF:
            unit = 1 if 0 in self.taken else 0
        if unit >= self.units:
            raise CommandError(f"Can't create IDE unit {_signed(unit)}, bus supports only {self.units} units")
        if unit in self.taken:
            raise CommandError(f"IDE unit {unit} is in use")
        device.values["unit"] = unit
        self.taken[unit] = device
        self.adopt(device)

    def remove(self, device: Device) -> None:
        """See `Bus.remove`."""
        self.taken = {unit: one for unit, one in self.taken.items() if one is not device}
        super().remove(device)


class UsbBus(Bus):
    """The bus of a USB controller: numbered ports, the last of which becomes a hub when it is wanted."""

    qom_type = "usb-bus"
    hub_ports: ClassVar[int] = 8

    def __init__(self, *, ports: int) -> None:
        super().__init__(hotpluggable=True)
        self.free = [str(port) for port in range(1, ports + 1)]
        self.taken: dict[str, Device] = {}

    def place(self, device: Device) -> None:
        """Take property `port`, or the first free one."""
        if len(self.free) == 1:
            last = self.free.pop()
            self.free = [f"{last}.{port}" for port in range(1, self.hub_ports + 1)]
        port: str = device.values["port"] or self.free[0]
        if port not in self.free:
            raise CommandError(f"usb port {port} (bus {self.bus_name}) not found (in use?)")
        self.free.remove(port)
        self.taken[port] = device
        self.adopt(device)

    def remove(self, device: Device) -> None:
        """See `Bus.remove`."""
        for port in [port for port, one in self.taken.items() if one is device]:
            del self.taken[port]
            self.free.insert(0, port)
        super().remove(device)


def _path_of(device: Device) -> Callable[[QomObject], str]:
    return lambda _bus: device.path


def _signed(value: int) -> int:
    """Return the 32 bit number as C prints it with %d."""
    return value - (1 << 32) if value >= 1 << 31 else value
