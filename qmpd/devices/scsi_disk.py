"""scsi-hd and scsi-cd: a disk and a CD drive on a SCSI bus.

Properties: device-list-properties of QEMU 10.0.2; checks: hw/scsi/scsi-disk.c, texts as there.
"""

from __future__ import annotations

from qmpd.errors import CommandError
from qmpd.machine.disk import UNSET_GRANULARITY, DiskDevice
from qmpd.machine.property_tables import BLOCK, GEOMETRY, SCSI_CD, SCSI_DEVICE, SCSI_HD, table
from qmpd.qapi.registry import device

MAX_SERIAL = 36
DEFAULT_GRANULARITY = 4096
DEFAULT_VERSION = "2.5+"


class ScsiDisk(DiskDevice):
    """What both have in common.

    product   default of the property
    """

    qom_type = "scsi-disk-base"
    abstract = True
    bus_type = "SCSI"
    product = ""

    async def realize(self) -> None:
        """Check in the reference's order, and take the node."""
        self.require_medium()
        self.check_block_sizes()
        values = self.values
        if self.has_geometry:
            self.check_geometry()
        self.apply_backend_options(read_only=self.reads_only(), resizable=self.has_geometry)
        if values["discard_granularity"] == UNSET_GRANULARITY:
            values["discard_granularity"] = max(values["logical_block_size"], DEFAULT_GRANULARITY)
        if len(values["serial"]) > MAX_SERIAL:
            raise CommandError(f"The serial number can't be longer than {MAX_SERIAL} characters")
        for name, default in (("ver", DEFAULT_VERSION), ("vendor", "QEMU"), ("product", self.product)):
            values[name] = values[name] or default
        if not values["device_id"]:
            values["device_id"] = values["serial"] or (self.backend.name if self.backend else "")

    @property
    def has_geometry(self) -> bool:
        """It is a disk."""
        return "cyls" in self.table

    def reads_only(self) -> bool:
        """Whether it never writes."""
        return self.medium_read_only()

    def reset(self) -> None:
        """See `Device.reset`."""
        self.tray_open = False


@device("scsi-hd")
class ScsiHd(ScsiDisk):
    """A SCSI disk; with `removable`, one whose medium may change."""

    qom_type = "scsi-hd"
    abstract = False
    product = "QEMU HARDDISK"
    table = table(SCSI_DEVICE, BLOCK, GEOMETRY, SCSI_HD)

    @property
    def removable(self) -> bool:
        """See `DiskDevice.removable`."""
        return bool(self.values["removable"])


@device("scsi-cd")
class ScsiCd(ScsiDisk):
    """A SCSI CD drive, empty unless a drive is given."""

    qom_type = "scsi-cd"
    abstract = False
    product = "QEMU CD-ROM"
    table = table(SCSI_DEVICE, BLOCK, SCSI_CD)

    @property
    def removable(self) -> bool:
        """See `DiskDevice.removable`."""
        return True

    def reads_only(self) -> bool:
        """See `ScsiDisk.reads_only`."""
        return True

    async def realize(self) -> None:
        """See `ScsiDisk.realize`."""
        if self.backend is None:
            self.make_empty()
        await super().realize()
