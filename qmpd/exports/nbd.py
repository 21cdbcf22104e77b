"""nbd: an export that clients of the NBD server find by name; and endpoints of devices.

Options: BlockExportOptionsNbd (qapi/block-export.json). Model: nbd_export_create of QEMU's nbd/server.c.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmpd.block import dirty_bitmap
from qmpd.block.backend import BlockBackend
from qmpd.block.dirty_bitmap import DirtyBitmap
from qmpd.block.node import BlockNode
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.exporting.export import BlockExport
from qmpd.exporting.nbd_server import NbdServer
from qmpd.exporting.nbd_target import NbdTarget
from qmpd.exporting.sockets import listen_unix
from qmpd.protocols.nbd import MAX_STRING
from qmpd.protocols.nbd_uri import standard_uri
from qmpd.qapi.registry import endpoint, export


@dataclass(frozen=True, slots=True)
class NbdExportOptions:
    """What is special to NBD.

    name          what clients ask for; None means the name of the node
    description   text for people
    bitmaps       dirty bitmaps offered as metadata contexts, by name or as {"node", "name"}
    """

    name: str | None = None
    description: str | None = None
    bitmaps: list[str | dict[str, Any]] | None = None
    allocation_depth: bool = False


@export("nbd", schema="BlockExportOptionsNbd", options=NbdExportOptions)
class NbdExport(BlockExport):
    """A target of the daemon's NBD server."""

    type_name = "nbd"

    async def start(self, options: NbdExportOptions) -> None:
        """Check the names, stop sharing resize, and serve."""
        server = self.exports.require_server()
        node = self.backend.node
        assert node is not None
        name = node.name if options.name is None else options.name
        if len(name.encode()) > MAX_STRING:
            raise CommandError(f"export name '{name}' too long")
        if options.description is not None and len(options.description.encode()) > MAX_STRING:
            raise CommandError(f"description '{options.description}' too long")
        if server.has(name.encode()):
            raise CommandError(f"NBD server already has export named '{name}'")
        self.backend.set_perm(self.backend.perm, Perm.ALL & ~Perm.RESIZE)
        self._bitmaps = [self._find_bitmap(node, bitmap) for bitmap in options.bitmaps or ()]
        self._server = server
        self._target = NbdTarget(
            self.backend,
            name.encode(),
            description=None if options.description is None else options.description.encode(),
            read_only=not self.common.writable,
            writethrough=self.common.writethrough,
            depth=options.allocation_depth,
            bitmaps=self._bitmaps,
        )
        for bitmap in self._bitmaps:
            bitmap.busy = True
        await self.exports.graph.runner.run(server.add(self._target))

    def uri(self) -> str | None:
        """Return where clients find it."""
        address = self._server.address
        if address is None:
            return None
        return standard_uri(address, self._target.name.decode(), tls=self._server.encrypted)

    def _find_bitmap(self, node: BlockNode, wanted: str | Mapping[str, Any]) -> DirtyBitmap:
        """Return a bitmap of the node or of those below it, or one named with its node. Raises CommandError."""
        if isinstance(wanted, str):
            found = _below_too(node, wanted)
            if found is None:
                raise CommandError(f"Bitmap '{wanted}' is not found")
            owner, bitmap = found
            if not self.common.writable and owner.writable and bitmap.enabled:
                raise CommandError(f"Enabled bitmap '{wanted}' incompatible with readonly export")
        else:
            owner = self._named(wanted["node"])
            bitmap = dirty_bitmap.find(owner, wanted["name"])
        bitmap.check(readonly=True)
        return bitmap

    def _named(self, name: str) -> BlockNode:
        try:
            return self.exports.graph.lookup(name, name)
        except CommandError as error:
            raise CommandError(f"Node '{name}' not found") from error

    def newest_client(self) -> int:
        """Return the number of the connection that was made last, of those that there are."""
        return max(list(self._target.clients.values()), default=0)

    async def begin_stop(self, *, only_idle: bool) -> bool:
        """Let no more clients in, unless there are some and `only_idle` forbids it."""
        return await self.exports.graph.runner.run(self._target.close(only_idle=only_idle))

    async def stop(self) -> None:
        """End the clients and leave the server."""

        async def work() -> None:
            await self._server.remove(self._target)
            await self._target.end_clients()

        await self.exports.graph.runner.run(work())
        for bitmap in self._bitmaps:
            bitmap.busy = False


def _below_too(node: BlockNode | None, name: str) -> tuple[BlockNode, DirtyBitmap] | None:
    """Return the bitmap `name` and its node: of `node`, or of what it filters or is backed by."""
    while node is not None:
        for bitmap in node.dirty_bitmaps:
            if bitmap.name == name:
                return node, bitmap
        edge = node.children.get("backing") or (node.primary() if node.is_filter else None)
        node = None if edge is None else edge.node
    return None


class NbdEndpoint:
    """A device's own NBD server, with its disk as the default export."""

    def __init__(self, server: NbdServer, target: NbdTarget, path: str) -> None:
        self._server, self._target, self._path = server, target, path

    @property
    def path(self) -> str:
        """Where the socket is."""
        return self._path

    async def close(self) -> None:
        """End the clients after their requests in flight, and remove the socket."""

        async def work() -> None:
            await self._server.stop_listening()
            await self._target.close(only_idle=False)
            await self._server.finish()

        await self._target.backend.graph.runner.run(work())


@endpoint("nbd")
class NbdEndpoints:
    """The factory behind `--guest plug=nbd:DIR`."""

    async def open(
        self, backend: BlockBackend, directory: str, device_id: str, *, read_only: bool, description: str
    ) -> NbdEndpoint:
        """Serve `backend` at DIRECTORY/DEVICE_ID.sock as the export "" and under the device's id."""
        path = os.path.join(directory, f"{device_id}.sock")
        server = NbdServer(listen_unix(path))
        target = NbdTarget(backend, b"", description=description.encode() or None, read_only=read_only, depth=True)

        async def work() -> None:
            await server.add(target)
            await server.add_alias(device_id.encode(), target)
            await server.start()

        await backend.graph.runner.run(work())
        return NbdEndpoint(server, target, path)
