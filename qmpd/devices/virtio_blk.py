"""virtio-blk: a paravirtual disk, on PCI in three modes and bare.

Properties: device-list-properties of QEMU 10.0.2; checks: hw/block/virtio-blk.c, texts as there.
"""

from __future__ import annotations

from qmpd.errors import CommandError
from qmpd.machine.disk import DiskDevice
from qmpd.machine.pci import MAX_QUEUES, VirtioDevice, VirtioPciDevice
from qmpd.machine.property_tables import (
    BLOCK,
    GEOMETRY,
    PCI_DEVICE,
    VIRTIO_BLK,
    VIRTIO_BLK_PCI,
    VIRTIO_DEVICE,
    VIRTIO_PCI,
    VIRTIO_PCI_GENERIC,
    table,
)
from qmpd.qapi.registry import device
from qmpd.units import is_power_of_two

MAX_QUEUE_SIZE = 1024
"""Descriptors in one queue (VIRTQUEUE_MAX_SIZE)."""
MAX_SECTORS = (2**31 - 512) // 512
"""Sectors of one discard or zero request (BDRV_REQUEST_MAX_SECTORS)."""
_AUTOMATIC = 0xFFFF


@device("virtio-blk-device")
class VirtioBlkDevice(VirtioDevice, DiskDevice):
    """The disk itself."""

    qom_type = "virtio-blk-device"
    abstract = False
    table = table(VIRTIO_DEVICE, BLOCK, GEOMETRY, VIRTIO_BLK)

    async def realize(self) -> None:
        """Check in the reference's order, and take the node."""
        self.require_medium()
        values = self.values
        if values["num-queues"] == _AUTOMATIC:
            values["num-queues"] = 1
        queues, size = values["num-queues"], values["queue-size"]
        if not queues:
            raise CommandError("num-queues property must be larger than 0")
        if queues > MAX_QUEUES:
            raise CommandError(f"num-queues property must not be larger than {MAX_QUEUES}")
        if size <= 2:
            raise CommandError(f"invalid queue-size property ({size}), must be > 2")
        if not is_power_of_two(size) or size > MAX_QUEUE_SIZE:
            raise CommandError(f"invalid queue-size property ({size}), must be a power of 2 (max {MAX_QUEUE_SIZE})")
        self.apply_backend_options(read_only=self.medium_read_only(), resizable=True)
        self.check_geometry()
        self.check_block_sizes()
        for enabled, limit in (("discard", "max-discard-sectors"), ("write-zeroes", "max-write-zeroes-sectors")):
            if values[enabled] and not 1 <= values[limit] <= MAX_SECTORS:
                raise CommandError(f"invalid {limit} property ({values[limit]}), must be between 1 and {MAX_SECTORS}")
        self.check_iothreads(queues)


@device("virtio-blk-pci")
class VirtioBlkPci(VirtioPciDevice):
    """The disk on PCI; legacy mode by the kind of slot, or as asked for."""

    qom_type = "virtio-blk-pci"
    abstract = False
    backend_class = VirtioBlkDevice
    table = table(PCI_DEVICE, VIRTIO_PCI, VIRTIO_PCI_GENERIC, VIRTIO_BLK_PCI)

    def prepare_backend(self) -> None:
        """One queue, and an interrupt for each queue and for the configuration."""
        backend = self.backend_device.values
        if backend["num-queues"] == _AUTOMATIC:
            backend["num-queues"] = 1
        if self.values["vectors"] == 0xFFFFFFFF:
            self.values["vectors"] = backend["num-queues"] + 1


@device("virtio-blk-pci-transitional")
class VirtioBlkPciTransitional(VirtioBlkPci):
    """The disk on PCI for drivers of both ages."""

    qom_type = "virtio-blk-pci-transitional"
    fixed_mode = "transitional"
    table = table(PCI_DEVICE, VIRTIO_PCI, VIRTIO_BLK_PCI)


@device("virtio-blk-pci-non-transitional")
class VirtioBlkPciModern(VirtioBlkPci):
    """The disk on PCI without legacy mode."""

    qom_type = "virtio-blk-pci-non-transitional"
    fixed_mode = "non-transitional"
    table = table(PCI_DEVICE, VIRTIO_PCI, VIRTIO_BLK_PCI)
