"""pcie-root-port: a PCI Express port with one slot, into which a device can be hot-plugged.

Properties: device-list-properties of QEMU 10.0.2; checks: hw/pci-bridge/pcie_root_port.c and
hw/pci/pcie_port.c, texts as there.
"""

from __future__ import annotations

from qmpd.errors import CommandError
from qmpd.machine.bus import PciePortBus
from qmpd.machine.pci import PciDevice
from qmpd.machine.property_tables import PCI_DEVICE, PCIE_ROOT_PORT, table
from qmpd.qapi.registry import device

MAX_AER_LOG = 128
EBUSY = 16
_UNSET = (1 << 64) - 1


@device("pcie-root-port")
class PcieRootPort(PciDevice):
    """The port; its bus is called by its id."""

    qom_type = "pcie-root-port"
    abstract = False
    is_bridge = True
    table = table(PCI_DEVICE, PCIE_ROOT_PORT)

    async def realize_function(self) -> None:
        """Make the bus below, and take chassis and slot number."""
        values = self.values
        bus = PciePortBus(hotpluggable=values["hotplug"], handler=self.path if values["hotplug"] else "")
        self.machine.add_bus(self, bus, self.device_id)
        number = (values["chassis"], values["slot"])
        for other in self.machine.devices():
            if not (isinstance(other, PcieRootPort) and other.realized):
                continue
            if (other.values["chassis"], other.values["slot"]) == number:
                raise CommandError(f"Can't add chassis slot, error -{EBUSY}")
        if values["aer_log_max"] > MAX_AER_LOG:
            raise CommandError(
                f"Invalid aer_log_max {values['aer_log_max']}. The max number of aer log is {MAX_AER_LOG}"
            )
        if _UNSET not in (values["pref32-reserve"], values["pref64-reserve"]):
            raise CommandError("PCI resource reserve cap: PREF32 and PREF64 conflict")
