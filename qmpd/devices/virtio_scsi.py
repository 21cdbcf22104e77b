"""virtio-scsi: a paravirtual SCSI host adapter, on PCI in three modes and bare.

Properties: device-list-properties of QEMU 10.0.2; checks: hw/scsi/virtio-scsi.c, texts as there.
"""

from __future__ import annotations

from qmpd.errors import CommandError
from qmpd.machine.bus import ScsiBus
from qmpd.machine.pci import VirtioDevice, VirtioPciDevice
from qmpd.machine.property_tables import (
    PCI_DEVICE,
    VIRTIO_DEVICE,
    VIRTIO_PCI,
    VIRTIO_PCI_GENERIC,
    VIRTIO_SCSI,
    table,
)
from qmpd.qapi.registry import device

MAX_TARGET, MAX_LUN = 255, 16383
MAX_REQUEST_QUEUES = 1022
"""Queues for requests: two of the 1024 are for events and control."""
MAX_QUEUE_SIZE = 1024
_AUTOMATIC = 0xFFFFFFFF


@device("virtio-scsi-device")
class VirtioScsiDevice(VirtioDevice):
    """The adapter itself.

    bus_label   name of its SCSI bus, None for the next automatic one
    """

    qom_type = "virtio-scsi-device"
    abstract = False
    table = table(VIRTIO_DEVICE, VIRTIO_SCSI)
    bus_label: str | None = None

    async def realize(self) -> None:
        """Check the queues and make the bus."""
        values = self.values
        if values["num_queues"] == _AUTOMATIC:
            values["num_queues"] = 1
        queues, size = values["num_queues"], values["virtqueue_size"]
        if not 1 <= queues <= MAX_REQUEST_QUEUES:
            raise CommandError(
                f"Invalid number of queues (= {queues}), must be a positive integer less than {MAX_REQUEST_QUEUES}."
            )
        if size <= 2:
            raise CommandError(f"invalid virtqueue_size property (= {size}), must be > 2")
        if size > MAX_QUEUE_SIZE:
            raise CommandError(f"invalid virtqueue_size property (= {size}), must not be larger than {MAX_QUEUE_SIZE}")
        self.check_iothreads(queues)
        self.machine.add_bus(self, ScsiBus(max_target=MAX_TARGET, max_lun=MAX_LUN, handler=self.path), self.bus_label)


@device("virtio-scsi-pci")
class VirtioScsiPci(VirtioPciDevice):
    """The adapter on PCI; legacy mode by the kind of slot, or as asked for."""

    qom_type = "virtio-scsi-pci"
    abstract = False
    backend_class = VirtioScsiDevice
    table = table(PCI_DEVICE, VIRTIO_PCI, VIRTIO_PCI_GENERIC)

    def prepare_backend(self) -> None:
        """One request queue, an interrupt for each queue and the configuration, a bus named by the id."""
        backend = self.backend_device
        assert isinstance(backend, VirtioScsiDevice)
        if backend.values["num_queues"] == _AUTOMATIC:
            backend.values["num_queues"] = 1
        if self.values["vectors"] == 0xFFFFFFFF:
            self.values["vectors"] = backend.values["num_queues"] + 3
        if self.device_id is not None:
            backend.bus_label = f"{self.device_id}.0"


@device("virtio-scsi-pci-transitional")
class VirtioScsiPciTransitional(VirtioScsiPci):
    """The adapter on PCI for drivers of both ages."""

    qom_type = "virtio-scsi-pci-transitional"
    fixed_mode = "transitional"
    table = table(PCI_DEVICE, VIRTIO_PCI)


@device("virtio-scsi-pci-non-transitional")
class VirtioScsiPciModern(VirtioScsiPci):
    """The adapter on PCI without legacy mode."""

    qom_type = "virtio-scsi-pci-non-transitional"
    fixed_mode = "non-transitional"
    table = table(PCI_DEVICE, VIRTIO_PCI)
