"""PCI devices, and the pair that a virtio device on PCI is: a transport and what it carries.

Model: hw/pci/pci.c, hw/virtio/virtio-pci.c of QEMU; texts as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qmpd.errors import CommandError
from qmpd.machine.bus import PciBus, PcieBus, PciePortBus, VirtioBus
from qmpd.machine.device import Device
from qmpd.machine.property_tables import PCI_DEVICE, VIRTIO_PCI, VIRTIO_PCI_GENERIC, DeviceProperty, table
from qmpd.qom.object import Property
from qmpd.units import is_power_of_two

if TYPE_CHECKING:
    from qmpd.machine.machine import Machine

MAX_ACPI_INDEX = 16383
MAX_QUEUES = 1024
"""Queues of one virtio device (VIRTIO_QUEUE_MAX)."""


class PciDevice(Device):
    """A device on a PCI or PCI Express bus.

    is_bridge   it carries a PCI bus itself
    """

    qom_type = "pci-device"
    abstract = True
    bus_type = "PCI"
    places_itself = True
    is_bridge: ClassVar[bool] = False
    table: ClassVar[Mapping[str, DeviceProperty]] = table(PCI_DEVICE)

    def properties(self) -> dict[str, Property]:
        """See `QomObject.properties`."""
        found = super().properties()
        found["legacy-addr"] = Property("legacy-addr", "str", lambda _d: self.legacy_address)
        return found

    @property
    def legacy_address(self) -> str:
        """SLOT.FUNCTION, as people write it."""
        address: int = self.values["addr"]
        return "<unset>" if address < 0 else f"{address >> 3:02x}.{address & 7:x}"

    @property
    def on_express_port(self) -> bool:
        """It sits below a PCIe root port."""
        return isinstance(self.bus, PciePortBus)

    async def realize(self) -> None:
        """Take the address, then do what the device itself needs."""
        self._check_acpi_index()
        size: int = self.values["romsize"]
        if size != 0xFFFFFFFF and not is_power_of_two(size):
            raise CommandError(f"ROM size {size} is not a power of two")
        assert isinstance(self.bus, PciBus)
        self.bus.place(self)
        await self.realize_function()
        if self.values["failover_pair_id"]:
            if not isinstance(self.bus, PcieBus):
                raise CommandError("failover primary device must be on PCIExpress bus")
            raise CommandError("failover primary device is not an Ethernet device")
        if self.values["romfile"]:
            raise CommandError(f'failed to find romfile "{self.values["romfile"]}"')

    @classmethod
    def type_properties(cls) -> dict[str, Property]:
        """See `Device.type_properties`."""
        return super().type_properties() | {"legacy-addr": Property("legacy-addr", "str")}

    async def realize_function(self) -> None:
        """What the device does once it has its address. Raises QmpdError."""

    def _check_acpi_index(self) -> None:
        index: int = self.values["acpi-index"]
        if index > MAX_ACPI_INDEX:
            raise CommandError(f"acpi-index should be less or equal to {MAX_ACPI_INDEX}")
        if index and self.machine.acpi_index_taken(self, index):
            raise CommandError(f"a PCI device with acpi-index = {index} already exist")


class VirtioDevice(Device):
    """The device behind a transport.

    transport   set when a PCI proxy made it
    """

    qom_type = "virtio-device"
    abstract = True
    bus_type = "virtio-bus"
    hotpluggable = True
    transport: PciDevice | None = None

    def properties(self) -> dict[str, Property]:
        """See `QomObject.properties`."""
        found = super().properties()
        found["legacy-iothread"] = Property("legacy-iothread", "str")
        return found

    @classmethod
    def type_properties(cls) -> dict[str, Property]:
        """See `Device.type_properties`."""
        return super().type_properties() | {"legacy-iothread": Property("legacy-iothread", "str")}

    def check_iothreads(self, queues: int) -> None:
        """Check `iothread` and `iothread-vq-mapping` against each other and `queues`. Raises CommandError."""
        mapping: list[dict[str, Any]] = self.values["iothread-vq-mapping"]
        if self.values["iothread"] and mapping:
            raise CommandError("iothread and iothread-vq-mapping properties cannot be set at the same time")
        if mapping:
            check_queue_mapping(self.machine, mapping, queues)
        elif self.values["iothread"] and self.transport is not None and not self.transport.values["ioeventfd"]:
            raise CommandError("ioeventfd is required for iothread")


def check_queue_mapping(machine: Machine, mapping: list[dict[str, Any]], queues: int) -> None:
    """Check that a list of iothreads serves each of `queues` exactly once. Raises CommandError."""
    seen: set[str] = set()
    assigned: dict[int, str] = {}
    explicit = bool(mapping[0].get("vqs"))
    for entry in mapping:
        name: str = entry["iothread"]
        if not machine.has_iothread(name):
            raise CommandError(f'IOThread "{name}" object does not exist')
        if name in seen:
            raise CommandError(f'duplicate IOThread name "{name}" in iothread-vq-mapping')
        seen.add(name)
        if bool(entry.get("vqs")) != explicit:
            raise CommandError("either all items in iothread-vq-mapping must have vqs or none of them must have it")
        for queue in entry.get("vqs", ()):
            if queue >= queues:
                raise CommandError(
                    f'vq index {queue} for IOThread "{name}" must be less than num_queues {queues} '
                    "in iothread-vq-mapping"
                )
            if queue in assigned:
                raise CommandError(f'cannot assign vq {queue} to IOThread "{name}" because it is already assigned')
            assigned[queue] = name
    if explicit:
        for queue in range(queues):
            if queue not in assigned:
                raise CommandError(f"missing vq {queue} IOThread assignment in iothread-vq-mapping")


class VirtioPciDevice(PciDevice):
    """A PCI transport with its virtio device as the child `virtio-backend`, whose properties are
    reached through it as well.

    backend_class   the device it carries
    fixed_mode      "" or "transitional", "non-transitional": types without disable-* properties
    """

    qom_type = "virtio-pci"
    abstract = True
    backend_class: ClassVar[type[VirtioDevice]]
    fixed_mode: ClassVar[str] = ""
    table: ClassVar[Mapping[str, DeviceProperty]] = table(PCI_DEVICE, VIRTIO_PCI, VIRTIO_PCI_GENERIC)

    def __init__(self, machine: Machine, *, hotplugged: bool = False) -> None:
        super().__init__(machine, hotplugged=hotplugged)
        self.backend_device = self.backend_class(machine, hotplugged=hotplugged)
        self.backend_device.transport = self
        self.add_child("virtio-backend", self.backend_device)

    def properties(self) -> dict[str, Property]:
        """See `QomObject.properties`."""
        backend = self.backend_device
        found = {name: one for name, one in backend.properties().items() if self.find_owner(name) is backend}
        return found | super().properties()

    def get_property(self, name: str) -> Any:
        """See `QomObject.get_property`; errors name the owner of the property."""
        owner = self.find_owner(name)
        return super().get_property(name) if owner is self else owner.get_property(name)

    def set_property(self, name: str, value: Any) -> None:
        """See `QomObject.set_property`; errors name the owner of the property."""
        owner = self.find_owner(name)
        if owner is self:
            super().set_property(name, value)
        else:
            owner.set_property(name, value)

    def find_owner(self, name: str) -> Device:
        """See `Device.find_owner`."""
        backend = self.backend_device
        if name in backend.table or name == "legacy-iothread":
            return backend
        return self

    @classmethod
    def list_properties(cls) -> list[dict[str, Any]]:
        """See `Device.list_properties`."""
        child = {"name": "virtio-backend", "type": f"child<{cls.backend_class.qom_type}>"}
        return [*super().list_properties(), child, *cls.backend_class.list_properties()]

    @classmethod
    def type_properties(cls) -> dict[str, Property]:
        """See `Device.type_properties`."""
        return super().type_properties() | {"legacy-iothread": Property("legacy-iothread", "str")}

    async def realize_function(self) -> None:
        """Settle the transport's mode, then plug the backend."""
        express = self.on_express_port
        values = self.values
        if not self.fixed_mode:
            if values["disable-legacy"] == "auto":
                values["disable-legacy"] = "on" if express else "off"
            if values["disable-legacy"] == "on" and values["disable-modern"]:
                raise CommandError(
                    "device cannot work as neither modern nor legacy mode is enabled",
                    hint="Set either disable-modern or disable-legacy to off",
                )
        legacy = self.fixed_mode == "transitional" or (not self.fixed_mode and values["disable-legacy"] == "off")
        bus = VirtioBus()
        self.add_child("virtio-bus", bus)
        self.prepare_backend()
        backend = self.backend_device
        backend.bus = bus
        bus.place(backend)
        await backend.realize()
        if legacy and backend.values["iommu_platform"]:
            raise CommandError("VIRTIO_F_IOMMU_PLATFORM was supported by neither legacy nor transitional device")
        backend.realized = True

    def prepare_backend(self) -> None:
        """Choose what the transport decides for its backend: numbers of vectors and queues."""
