"""usb-storage: a disk on a USB bus, which carries a SCSI disk of its own.

Properties: device-list-properties of QEMU 10.0.2; checks: hw/usb/dev-storage-classic.c, texts as
there.
"""

from __future__ import annotations

from qmpd.block.backend import BlockBackend
from qmpd.errors import CommandError
from qmpd.machine.bus import ScsiBus
from qmpd.machine.disk import DiskDevice
from qmpd.machine.property_tables import BLOCK, USB_STORAGE, table
from qmpd.qapi.registry import device

_PASSED_ON = (
    "logical_block_size", "physical_block_size", "min_io_size", "opt_io_size", "discard_granularity",
    "share-rw", "write-cache", "rerror", "werror", "account-failed", "account-invalid", "backend_defaults",
    "removable", "serial",
)  # fmt: skip


@device("usb-storage")
class UsbStorage(DiskDevice):
    """The USB side; the drive given to it passes on to the SCSI disk behind it."""

    qom_type = "usb-storage"
    abstract = False
    bus_type = "usb-bus"
    table = table(BLOCK, USB_STORAGE)

    async def realize(self) -> None:
        """Make the SCSI disk and hand the drive over."""
        backend = self.backend
        if backend is None:
            raise CommandError("drive property not set")
        self.values["attached"] = True
        bus = ScsiBus(max_target=0, max_lun=0)
        self.machine.add_bus(self, bus, None if self.device_id is None else f"{self.device_id}.0")
        await self._make_disk(bus, backend)

    async def _make_disk(self, bus: ScsiBus, backend: BlockBackend) -> None:
        disk = self.machine.registry.devices["scsi-hd"].cls(self.machine, hotplugged=self.hotplugged)
        assert isinstance(disk, DiskDevice)
        bus.add_child("legacy[0]", disk)
        for name in _PASSED_ON:
            disk.values[name] = self.values[name]
        disk.values["bootindex"] = self.values["bootindex"]
        self.backend = None
        disk.adopt_backend(backend)
        await self.machine.plug(disk, bus)
