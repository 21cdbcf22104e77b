"""ide-hd and ide-cd: a disk and a CD drive on an IDE channel or SATA port.

Properties: device-list-properties of QEMU 10.0.2; checks: hw/ide/ide-dev.c, texts as there.
"""

from __future__ import annotations

from qmpd.errors import CommandError
from qmpd.machine.disk import UNSET_GRANULARITY, DiskDevice
from qmpd.machine.property_tables import BLOCK, GEOMETRY, IDE_DEVICE, IDE_HD, table
from qmpd.qapi.registry import device
from qmpd.units import SECTOR

DEFAULT_VERSION = "2.5+"


class IdeDisk(DiskDevice):
    """What both have in common."""

    qom_type = "ide-device"
    abstract = True
    bus_type = "IDE"
    max_geometry = (65535, 16, 255)

    async def realize(self) -> None:
        """Check in the reference's order, and take the node."""
        values = self.values
        if self.backend is None:
            raise CommandError("No drive specified")
        if values["discard_granularity"] == UNSET_GRANULARITY:
            values["discard_granularity"] = SECTOR
        elif values["discard_granularity"] != SECTOR:
            raise CommandError("discard_granularity must be 512 for ide")
        self.check_block_sizes()
        if values["logical_block_size"] != SECTOR:
            raise CommandError("logical_block_size must be 512 for IDE")
        if not self.removable:
            self.check_geometry()
        self.apply_backend_options(read_only=self.removable, resizable=not self.removable)
        if self.backend.node is None and not self.removable:
            raise CommandError("Device needs media, but drive is empty")
        values["ver"] = values["ver"] or DEFAULT_VERSION
        if not values["serial"]:
            channel = int(self.bus.bus_name.rpartition(".")[2]) if self.bus else 0
            values["serial"] = f"QM{2 * channel + values['unit'] + 1:05}"


@device("ide-hd")
class IdeHd(IdeDisk):
    """An IDE disk."""

    qom_type = "ide-hd"
    abstract = False
    table = table(IDE_DEVICE, BLOCK, GEOMETRY, IDE_HD)


@device("ide-cd")
class IdeCd(IdeDisk):
    """An IDE CD drive, empty unless a drive is given."""

    qom_type = "ide-cd"
    abstract = False
    table = table(IDE_DEVICE, BLOCK)

    @property
    def removable(self) -> bool:
        """See `DiskDevice.removable`."""
        return True

    async def realize(self) -> None:
        """See `IdeDisk.realize`."""
        if self.backend is None:
            self.make_empty()
        await super().realize()

    def reset(self) -> None:
        """See `Device.reset`."""
        self.tray_open = False
