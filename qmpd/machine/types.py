"""The QOM types of machine, buses and devices, for qom-list-types and its relatives.

Names and descent are facts of QEMU 10.0.2; the Python classes are cut differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmpd.machine.device import Device
from qmpd.qom.object import Property
from qmpd.qom.types import TypeInfo, TypeTable

if TYPE_CHECKING:
    from qmpd.qapi.registry import Registry

_ABSTRACT = """
device:object bus:object
machine:object
x86-machine:machine generic-pc-machine:x86-machine
memory-backend:object
pci-device:device sys-bus-device:device pci-host-bridge:sys-bus-device
pci-piix:pci-device pci-ide:pci-device
base-pci-bridge:pci-device pcie-port:base-pci-bridge pcie-slot:pcie-port pcie-root-port-base:pcie-slot
virtio-pci:pci-device virtio-blk-pci-base:virtio-pci virtio-scsi-pci-base:virtio-pci
virtio-device:device virtio-scsi-common:virtio-device
scsi-device:device scsi-disk-base:scsi-device
ide-device:device
usb-device:device usb-storage-dev:usb-device
virtio-bus:bus
"""
_CONCRETE = """
memory-backend-ram:memory-backend
System:bus ISA:bus i2c-bus:bus IDE:bus SCSI:bus PCI:bus PCIE:PCI usb-bus:bus virtio-pci-bus:virtio-bus
i440FX-pcihost:pci-host-bridge i440FX:pci-device PIIX3:pci-piix piix3-ide:pci-ide PIIX4_PM:pci-device
piix3-usb-uhci:pci-device q35-pcihost:pci-host-bridge mch:pci-device ICH9-LPC:pci-device ich9-ahci:pci-device
ICH9-SMB:pci-device ich9-usb-ehci1:pci-device
"""
_DEVICES = {
    "virtio-blk-pci": "virtio-blk-pci-base",
    "virtio-blk-pci-transitional": "virtio-blk-pci-base",
    "virtio-blk-pci-non-transitional": "virtio-blk-pci-base",
    "virtio-scsi-pci": "virtio-scsi-pci-base",
    "virtio-scsi-pci-transitional": "virtio-scsi-pci-base",
    "virtio-scsi-pci-non-transitional": "virtio-scsi-pci-base",
    "virtio-blk-device": "virtio-device",
    "virtio-scsi-device": "virtio-scsi-common",
    "scsi-hd": "scsi-disk-base",
    "scsi-cd": "scsi-disk-base",
    "ide-hd": "ide-device",
    "ide-cd": "ide-device",
    "usb-storage": "usb-storage-dev",
    "pcie-root-port": "pcie-root-port-base",
}


def add_types(types: TypeTable, registry: Registry, machine_type: str) -> None:
    """Enter the types of a machine, of its buses, and of every device in the registry."""
    plain = {"type": Property("type", "string")}
    for text, abstract in ((_ABSTRACT, True), (_CONCRETE, False)):
        for item in text.split():
            name, _, parent = item.partition(":")
            types.add(TypeInfo(name, parent or "object", abstract, properties=plain))
    types.add(TypeInfo("device", "object", abstract=True, properties=Device.type_properties()))
    parent = "machine" if machine_type == "none-machine" else "generic-pc-machine"
    types.add(TypeInfo(machine_type, parent, properties=plain))

    def devices() -> Iterator[TypeInfo]:
        for name, entry in registry.devices.items():
            cls: type[Device] = entry.cls
            yield TypeInfo(name, _DEVICES.get(name, "device"), properties=cls.type_properties())

    types.add_later(devices)
