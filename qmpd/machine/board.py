"""The fixed part of a machine: host bridge, south bridge, and the buses that devices find there.

Addresses, names and places in the QOM tree are those of QEMU's pc and q35 boards, as far as they
can be seen by device_add: nothing here computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.machine.bus import Bus, I2cBus, IdeBus, IsaBus, PciBus, PcieBus, SystemBus, UsbBus
from qmpd.machine.device import FixedDevice
from qmpd.qom.object import QomObject

if TYPE_CHECKING:
    from qmpd.machine.machine import Machine

IDE_UNITS = 2
SATA_PORTS = 6
UHCI_PORTS = 2
EHCI_PORTS = 6


class BoardMemory(QomObject):
    """The object behind the machine's memory: it is there to be listed and not deleted, and holds none."""

    qom_type = "memory-backend-ram"
    abstract = False
    interfaces = ("user-creatable",)

    def in_use(self) -> bool:
        """See `QomObject.in_use`."""
        return self.parent is not None


def build(machine: Machine, board: str, *, usb: bool) -> SystemBus:
    """Make the board `board` ("pc", "q35" or "none") below `machine`; returns its root bus."""
    system = SystemBus()
    if board != "none":
        machine.objects.add("pc.ram", BoardMemory())
    machine.unattached.add_child("sysbus", system)
    if board == "pc":
        _build_pc(machine, system, usb=usb)
    elif board == "q35":
        _build_q35(machine, system, usb=usb)
    return system


def _sit(bus: Bus, device: FixedDevice) -> FixedDevice:
    device.bus = bus
    bus.place(device)
    return device


def _build_pc(machine: Machine, system: SystemBus, *, usb: bool) -> None:
    host = FixedDevice(machine, "i440FX-pcihost")
    machine.add_child("i440fx", host)
    host.bus = system
    system.adopt(host)
    pci = PciBus(hotpluggable=True, handler="/machine/unattached/device[3]/pm")
    host.add_child("pci.0", pci)
    north = _sit(pci, FixedDevice(machine, "i440FX", 0x00))
    north.values["multifunction"] = False
    machine.unattached.add_child("device[2]", north)
    south = _sit(pci, FixedDevice(machine, "PIIX3", 0x08))
    machine.unattached.add_child("device[3]", south)
    machine.add_bus(south, IsaBus())
    ide = _sit(pci, FixedDevice(machine, "piix3-ide", 0x09))
    south.add_child("ide", ide)
    for _channel in range(2):
        machine.add_bus(ide, IdeBus(units=IDE_UNITS))
    if usb:
        uhci = _sit(pci, FixedDevice(machine, "piix3-usb-uhci", 0x0A))
        south.add_child("uhci", uhci)
        machine.add_bus(uhci, UsbBus(ports=UHCI_PORTS))
    power = _sit(pci, FixedDevice(machine, "PIIX4_PM", 0x0B))
    south.add_child("pm", power)
    power.add_child("i2c", I2cBus())


def _build_q35(machine: Machine, system: SystemBus, *, usb: bool) -> None:
    host = FixedDevice(machine, "q35-pcihost")
    machine.add_child("q35", host)
    host.bus = system
    system.adopt(host)
    pcie = PcieBus()
    host.add_child("pcie.0", pcie)
    north = _sit(pcie, FixedDevice(machine, "mch", 0x00))
    north.values["multifunction"] = False
    host.add_child("mch", north)
    lpc = _sit(pcie, FixedDevice(machine, "ICH9-LPC", 0xF8))
    machine.unattached.add_child("device[2]", lpc)
    machine.add_bus(lpc, IsaBus())
    sata = _sit(pcie, FixedDevice(machine, "ich9-ahci", 0xFA))
    machine.unattached.add_child("device[12]", sata)
    for _port in range(SATA_PORTS):
        machine.add_bus(sata, IdeBus(units=1))
    smbus = _sit(pcie, FixedDevice(machine, "ICH9-SMB", 0xFB))
    machine.unattached.add_child("device[13]", smbus)
    smbus.add_child("i2c", I2cBus())
    if usb:
        ehci = _sit(pcie, FixedDevice(machine, "ich9-usb-ehci1", 0xEF))
        machine.unattached.add_child("device[14]", ehci)
        machine.add_bus(ehci, UsbBus(ports=EHCI_PORTS))
