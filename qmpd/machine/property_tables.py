"""Tables of properties: which device has which, of what type, with what default.

Facts of QEMU 10.0.2's device-list-properties. A line is NAME TYPE [DEFAULT]; TYPE is a key of
`property_types.KINDS`; a property without default is listed without `default-value`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmpd.machine.property_types import KINDS, Kind


@dataclass(frozen=True, slots=True)
class DeviceProperty:
    """One property of a device type.

    default   as listed; None: listed without default
    """

    name: str
    kind: Kind
    default: Any = None

    @property
    def initial(self) -> Any:
        """The value it has until it is set."""
        return self.kind.empty if self.default is None else self.default

    def to_wire(self) -> dict[str, Any]:
        """Return its row of device-list-properties."""
        row: dict[str, Any] = {"name": self.name, "type": self.kind.wire}
        if self.kind.description is not None:
            row["description"] = self.kind.description
        if self.default is not None:
            row["default-value"] = self.default
        return row


def table(*texts: str) -> Mapping[str, DeviceProperty]:
    """Return the properties of all `texts`, by name."""
    found: dict[str, DeviceProperty] = {}
    for text in texts:
        for line in text.strip().splitlines():
            name, kind, *default = line.split()
            found[name] = DeviceProperty(name, KINDS[kind], json.loads(default[0]) if default else None)
    return found


PCI_DEVICE = """
acpi-index uint32 0
addr pciaddr -1
busnr busnr
failover_pair_id str
multifunction bool false
rombar int32 -1
romfile str
romsize uint32 4294967295
x-max-bounce-buffer-size bounce 4096
x-pcie-ari-nextfn-1 bool false
x-pcie-err-unc-mask bool true
x-pcie-ext-tag bool true
x-pcie-extcap-init bool true
x-pcie-lnksta-dllla bool true
"""

VIRTIO_PCI = """
aer bool false
ats bool false
ioeventfd bool true
migrate-extra bool true
modern-pio-notify bool false
page-per-vq bool false
vectors uint32 4294967295
virtio-pci-bus-master-bug-migration bool false
x-ats-page-aligned bool true
x-disable-pcie bool false
x-ignore-backend-features bool false
x-pcie-deverr-init bool true
x-pcie-flr-init bool true
x-pcie-lnkctl-init bool true
x-pcie-pm-init bool true
x-pcie-pm-no-soft-reset bool false
"""

VIRTIO_PCI_GENERIC = """
disable-legacy onoffauto "auto"
disable-modern bool false
"""

VIRTIO_DEVICE = """
any_layout bool true
event_idx bool true
in_order bool false
indirect_desc bool true
iommu_platform bool false
iothread iothread
iothread-vq-mapping vqmapping
notify_on_empty bool true
packed bool false
queue_reset bool true
use-disabled-flag bool true
use-started bool true
x-disable-legacy-check bool false
"""

BLOCK = """
account-failed onoffauto "auto"
account-invalid onoffauto "auto"
backend_defaults onoffauto "auto"
bootindex bootindex
discard_granularity size32 4294967295
drive drive
logical_block_size blocksize 0
min_io_size size32 0
opt_io_size size32 0
physical_block_size blocksize 0
rerror onerror "auto"
serial str
share-rw bool false
werror onerror "auto"
write-cache onoffauto "auto"
"""

GEOMETRY = """
cyls uint32 0
heads uint32 0
lcyls uint32 0
lheads uint32 0
lsecs uint32 0
secs uint32 0
"""

VIRTIO_BLK = """
config-wce bool true
discard bool true
max-discard-sectors uint32 4194303
max-write-zeroes-sectors uint32 4194303
num-queues uint16 65535
queue-size uint16 256
report-discard-granularity bool true
request-merging bool true
seg-max-adjust bool true
write-zeroes bool true
x-enable-wce-if-config-wce bool true
"""

VIRTIO_BLK_PCI = """
class uint32 0
"""

VIRTIO_SCSI = """
cmd_per_lun uint32 128
hotplug bool true
max_sectors uint32 65535
num_queues uint32 4294967295
param_change bool true
seg_max_adjust bool true
virtqueue_size uint32 256
"""

SCSI_DEVICE = """
channel uint32 0
device_id str
lun uint32 4294967295
max_io_size uint64 2147483647
migrate-emulated-scsi-request bool true
port_index uint16 0
port_wwn uint64 0
product str
quirk_mode_page_vendor_specific_apple bool false
scsi-id uint32 4294967295
scsi_version int32 5
vendor str
ver str
wwn uint64 0
"""

SCSI_HD = """
dpofua bool false
max_unmap_size uint64 1073741824
removable bool false
rotation_rate uint16 0
"""

SCSI_CD = """
quirk_mode_page_apple_vendor bool false
quirk_mode_page_truncated bool false
quirk_mode_sense_rom_use_dbd bool false
"""

IDE_DEVICE = """
model str
unit uint32 4294967295
ver str
win2k-install-hack bool false
wwn uint64 0
"""

IDE_HD = """
bios-chs-trans translation "auto"
rotation_rate uint16 0
"""

USB_STORAGE = """
attached attached
commandlog bool false
msos-desc bool true
pcap str
port str
removable bool false
"""

PCIE_ROOT_PORT = """
aer_log_max uint16 8
bus-reserve uint32 4294967295
chassis uint8 0
disable-acs bool false
hotplug bool true
io-reserve size 18446744073709551615
mem-reserve size 18446744073709551615
port uint8 0
power_controller_present bool true
pref32-reserve size 18446744073709551615
pref64-reserve size 18446744073709551615
slot uint16 0
x-do-not-expose-native-hotplug-cap bool false
x-migrate-msix bool true
x-pci-express-writeable-slt-bug bool false
x-speed linkspeed "16"
x-width linkwidth "32"
"""
