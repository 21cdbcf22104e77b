"""Devices with a drive: the backend they hold, their geometry and block sizes, tray and medium.

Model: hw/block/block.c (BlockConf) and block/qapi-sysemu.c of QEMU; texts as there.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qmpd.block.backend import BlockBackend
from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.exporting.endpoint import Endpoint, EndpointFactory
from qmpd.machine.device import Device
from qmpd.machine.property_tables import DeviceProperty
from qmpd.machine.property_types import KINDS
from qmpd.units import SECTOR, human_size

if TYPE_CHECKING:
    from qmpd.machine.machine import Machine

UNSET_GRANULARITY = 0xFFFFFFFF
_AUTOMATIC = {"rerror": "report", "werror": "enospc"}


class DiskDevice(Device):
    """A device whose property `drive` names its medium.

    removable     the medium may change                tray_open  (removable) the tray is out
    write_cache   writes may stay in caches until a flush
    medium_was_read_only  so was the last medium that was taken out; true before the first
    endpoint      the socket through which outsiders use it, if the guest policy says so
    max_geometry  largest cylinders, heads and sectors, None: the device has no geometry
    default_granularity  discard granularity, in bytes, where none was given; None keeps it open
    """

    qom_type = "disk-device"
    abstract = True
    max_geometry: ClassVar[tuple[int, int, int] | None] = (65535, 255, 255)
    default_granularity: ClassVar[int | None] = None

    def __init__(self, machine: Machine, *, hotplugged: bool = False) -> None:
        super().__init__(machine, hotplugged=hotplugged)
        self.backend: BlockBackend | None = None
        self.tray_open = False
        self.write_cache = True
        self.medium_was_read_only = True
        self.endpoint: Endpoint | None = None
        machine.track_disk(self)

    @property
    def removable(self) -> bool:
        """Whether the medium may be changed."""
        return False

    # --- drive ------------------------------------------------------------------------------

    def store(self, spec: DeviceProperty, value: Any) -> None:
        """See `Device.store`."""
        if spec.kind is KINDS["drive"]:
            self._set_drive(value)
        else:
            super().store(spec, value)

    def read(self, name: str) -> Any:
        """See `Device.read`."""
        if self.table[name].kind is not KINDS["drive"]:
            return super().read(name)
        if self.backend is None:
            return ""
        return self.backend.name or (self.backend.node.name if self.backend.node else "")

    def _set_drive(self, name: str) -> None:
        if self.backend is not None:
            self._replace_node(name)
            return
        if not name:
            return
        graph = self.machine.graph
        found = graph.find_backend(name)
        if found is not None:
            self._take_backend(name, found)
            return
        node = graph.get(name)
        if node is None:
            raise CommandError(f"Property '{self.type_name}.drive' can't find value '{name}'")
        self.backend = self._new_backend()
        self.backend.insert(node)

    def _take_backend(self, name: str, found: BlockBackend) -> None:
        """Attach to the backend of a -drive."""
        if any(one.backend is found for one in self.machine.block_devices()):
            raise CommandError(f"Drive '{name}' is already in use by another device")
        self.adopt_backend(found)

    def adopt_backend(self, backend: BlockBackend) -> None:
        """Hold a backend that somebody else made."""
        self.backend = backend
        backend.describe_parent = self._describe
        backend.label = self.qdev

    def _replace_node(self, name: str) -> None:
        """Put another node in place of the present one (qom-set on a running device)."""
        backend = self.backend
        assert backend is not None
        node = self.machine.graph.lookup(None, name)
        old = backend.eject()
        try:
            backend.insert(node)
        except BaseException:
            if old is not None:
                backend.insert(old)
            raise

    def _new_backend(self) -> BlockBackend:
        return BlockBackend(self.machine.graph, self._describe, Perm.NONE, Perm.ALL, label=self.qdev)

    def _describe(self) -> str:
        backend = self.backend
        return f"block device '{backend.name if backend and backend.name else self.qdev}'"

    def make_empty(self) -> None:
        """Give a drive without medium its backend."""
        self.backend = self._new_backend()

    @property
    def node(self) -> BlockNode | None:
        """The medium."""
        return self.backend.node if self.backend else None

    # --- realize ----------------------------------------------------------------------------

    def require_medium(self) -> None:
        """Refuse a fixed disk without drive or medium. Raises CommandError."""
        if self.backend is None:
            raise CommandError("drive property not set")
        if self.backend.node is None and not self.removable:
            raise CommandError("Device needs media, but drive is empty")

    def apply_backend_options(self, *, read_only: bool, resizable: bool) -> None:
        """Take and share what this device needs of its node. Raises PermissionConflict, CommandError."""
        assert self.backend is not None
        perm = Perm.CONSISTENT_READ if read_only else Perm.CONSISTENT_READ | Perm.WRITE
        shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        if resizable:
            shared |= Perm.RESIZE
        if self.values["share-rw"]:
            shared |= Perm.WRITE
        self.backend.set_perm(perm, shared)
        if self.values["write-cache"] != "auto":
            self.write_cache = self.values["write-cache"] == "on"
        for name in ("account-failed", "account-invalid"):
            if self.values[name] != "auto":
                setattr(self.backend.stats, name.replace("-", "_"), self.values[name] == "on")

    def medium_read_only(self) -> bool:
        """Whether there is a medium and it cannot be written to."""
        return self.node is not None and self.node.read_only

    def check_block_sizes(self) -> None:
        """Settle block sizes and check what must be a multiple of them. Raises CommandError."""
        values = self.values
        for name in ("physical_block_size", "logical_block_size"):
            if not values[name]:
                values[name] = SECTOR
        logical: int = values["logical_block_size"]
        if logical > values["physical_block_size"]:
            raise CommandError("logical_block_size > physical_block_size not supported")
        if values["min_io_size"] % logical:
            raise CommandError("min_io_size must be a multiple of logical_block_size")
        if values["min_io_size"] // logical > 0xFFFF:
            raise CommandError(f"min_io_size must not exceed {0xFFFF} logical blocks")
        if values["opt_io_size"] % logical:
            raise CommandError("opt_io_size must be a multiple of logical_block_size")
        granularity: int = values["discard_granularity"]
        if granularity != UNSET_GRANULARITY and granularity % logical:
            raise CommandError("discard_granularity must be a multiple of logical_block_size")

    def check_geometry(self) -> None:
        """Settle the geometry: as given, or guessed from the size. Raises CommandError."""
        values = self.values
        names = ("cyls", "heads", "secs")
        if not any(values[name] for name in names):
            sectors = self.backend.size // SECTOR if self.backend else 0
            values |= {"cyls": min(max(sectors // (16 * 63), 2), 16383), "heads": 16, "secs": 63}
        assert self.max_geometry is not None
        for name, limit in zip(names, self.max_geometry, strict=True):
            if not 1 <= values[name] <= limit:
                raise CommandError(f"{name} must be between 1 and {limit}")

    async def open_endpoint(self, factory: EndpointFactory, directory: str, name: str) -> None:
        """Let outsiders reach the medium through a socket, as the guest would. Raises CommandError."""
        if self.backend is None or self.backend.node is None or self.endpoint is not None:
            return
        self.backend.on_error = self._request_failed
        serial = f"serial {self.values['serial']}, " if self.values["serial"] else ""
        self.endpoint = await factory.open(
            self.backend,
            directory,
            name,
            read_only=not self.backend.perm & Perm.WRITE,
            description=f"{self.type_name}, {serial}{human_size(self.backend.size)}",
        )

    def _request_failed(self, reading: bool, error: int) -> None:
        """(BlockBackend) Tell of a request that failed. No guest runs that could be stopped: its client is told."""
        backend = self.backend
        if backend is None:
            return
        policy = self.values["rerror" if reading else "werror"]
        self.machine.events.emit(
            "BLOCK_IO_ERROR",
            qom_path=self.path,
            device=backend.name,
            node_name=backend.node.name if backend.node is not None else None,
            operation="read" if reading else "write",
            action="ignore" if policy == "ignore" else "report",
            nospace=error == errno.ENOSPC if self.io_status_shown else None,
            reason=os.strerror(error),
        )

    async def unrealize(self) -> None:
        """See `Device.unrealize`."""
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            await endpoint.close()
        backend, self.backend = self.backend, None
        if backend is not None:
            await backend.remove()

    # --- what others see --------------------------------------------------------------------

    @property
    def io_status_shown(self) -> bool:
        """An error policy that stops the guest makes the status worth showing."""
        policy = {name: self.values[name] for name in ("rerror", "werror")}
        policy = {name: _AUTOMATIC[name] if chosen == "auto" else chosen for name, chosen in policy.items()}
        return policy["werror"] in ("enospc", "stop") or policy["rerror"] == "stop"

    def query_block_row(self) -> dict[str, Any]:
        """Return BlockInfo (wire names) without `inserted`."""
        assert self.backend is not None
        row: dict[str, Any] = {
            "device": self.backend.name,
            "qdev": self.qdev,
            "type": "unknown",
            "removable": self.removable,
            "locked": False,
        }
        if self.removable:
            row["tray_open"] = self.tray_open
        if self.io_status_shown:
            row["io-status"] = "ok"
        return row

    # --- tray and medium --------------------------------------------------------------------

    def move_tray(self, *, opened: bool) -> None:
        """Open or close the tray and say so, if that changes anything."""
        if self.tray_open == opened:
            return
        self.tray_open = opened
        assert self.backend is not None
        self.machine.events.emit("DEVICE_TRAY_MOVED", device=self.backend.name, id=self.qdev, tray_open=opened)

    async def take_medium(self) -> None:
        """Take the medium out, if there is one; a node that nobody else holds is closed."""
        backend = self.backend
        assert backend is not None
        node = backend.node
        if node is None:
            return
        async with self.machine.graph.drained(node):
            backend.eject()
        self.medium_was_read_only = node.read_only
        await self.machine.graph.drop_unreferenced(node)


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """A device with a drive, as query-block and its relatives see it.

    backend   holds the medium, if there is one
    """

    device: DiskDevice
    backend: BlockBackend

    @property
    def qdev(self) -> str:
        """Id, or QOM path of a device without one."""
        return self.device.qdev

    @property
    def write_cache(self) -> bool:
        """Whether the device may leave writes in caches until a flush (`cache.writeback`)."""
        return self.device.write_cache

    def query_block_row(self) -> dict[str, Any]:
        """Return BlockInfo (wire names) without `inserted`."""
        return self.device.query_block_row()
