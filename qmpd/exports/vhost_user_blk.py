"""vhost-user-blk: an export that virtual machines use as a disk, by rings in their memory.

Options: BlockExportOptionsVhostUserBlk (qapi/block-export.json). Model: vu_blk_exp_create of QEMU's
block/export/vhost-user-blk-server.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmpd.aio import guest_memory
from qmpd.errors import CommandError
from qmpd.exporting.export import BlockExport
from qmpd.exporting.sockets import listen
from qmpd.exporting.vhost_user import VhostUserServer
from qmpd.exporting.virtio_disk import VirtioDisk
from qmpd.qapi.registry import export
from qmpd.units import is_power_of_two

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 512, 2 << 20

SERIAL = b"vhost_user_blk"
"""What every such disk of qemu-storage-daemon calls itself."""


@dataclass(frozen=True, slots=True)
class VhostUserBlkExportOptions:
    """What is special to vhost-user-blk.

    addr                 SocketAddress to listen at, of a UNIX socket or an inherited one
    logical_block_size   bytes, as the driver is told
    num_queues           rings that a front end may use
    """

    addr: dict[str, Any]
    logical_block_size: int = 512
    num_queues: int = 1


@export("vhost-user-blk", schema="BlockExportOptionsVhostUserBlk", options=VhostUserBlkExportOptions)
class VhostUserBlkExport(BlockExport):
    """A node as a disk of one virtual machine at a time."""

    type_name = "vhost-user-blk"

    async def start(self, options: VhostUserBlkExportOptions) -> None:
        """Check the options, listen, and serve."""
        size = options.logical_block_size
        if not is_power_of_two(size) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
            raise CommandError(
                f"parameter logical-block-size must be a power of 2 between {MIN_BLOCK_SIZE} and {MAX_BLOCK_SIZE}"
            )
        if not options.num_queues:
            raise CommandError("num-queues must be greater than 0")
        if options.addr["type"] not in ("unix", "fd"):
            raise CommandError("Only socket address types 'unix' and 'fd' are supported")
        if not guest_memory.available():
            raise CommandError(
                "vhost-user-blk exports need a module that was not compiled",
                hint="Install qmpd where there is a C compiler, on a little-endian machine",
            )
        disk = VirtioDisk(
            self.backend,
            read_only=not self.common.writable,
            block_size=size,
            queues=options.num_queues,
            write_cache=not self.common.writethrough,
            serial=SERIAL,
        )
        self._server = VhostUserServer(disk, await listen(options.addr, inherited=self.inherited))
        self.backend.on_resize = self._server.config_changed
        await self.exports.graph.runner.run(self._server.start())

    async def begin_stop(self, *, only_idle: bool) -> bool:
        """Who is connected does not keep the export, as the reference has it."""
        return True

    async def stop(self) -> None:
        """End the front end and leave."""
        self.backend.on_resize = None
        await self.exports.graph.runner.run(self._server.stop())
