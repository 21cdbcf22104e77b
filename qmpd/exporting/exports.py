"""All exports of a daemon: how they come and go, and the one NBD server that most of them use.

Model: block/export/export.c and blockdev-nbd.c of QEMU; texts and order of checks are theirs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine, Mapping
from typing import Any

from qmpd.block.backend import BlockBackend
from qmpd.block.graph import Graph
from qmpd.block.perm import Perm
from qmpd.errors import CommandError
from qmpd.events import EventBus
from qmpd.exporting.export import BlockExport, CommonOptions
from qmpd.exporting.nbd_server import Limits, NbdServer
from qmpd.exporting.sockets import listen
from qmpd.qapi.bind import build
from qmpd.qapi.registry import Registry
from qmpd.qom.protocols import Authorizer
from qmpd.qom.tree import ObjectTree, id_well_formed

log = logging.getLogger(__name__)

COMMON_MEMBERS = frozenset(
    ("type", "id", "node-name", "writable", "writethrough", "iothread", "fixed-iothread", "allow-inactive")
)
"""Members of BlockExportOptions that are not the type's own."""


class Exports:
    """The exports of one daemon, and its NBD server; on the monitor's loop."""

    def __init__(self, graph: Graph, objects: ObjectTree, events: EventBus, registry: Registry) -> None:
        self.graph, self.objects, self.events = graph, objects, events
        self._registry = registry
        self._exports: dict[str, BlockExport] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self.nbd: NbdServer | None = None
        """The running NBD server, None if there is none."""

    # --- exports ----------------------------------------------------------------------------------

    def get(self, export_id: str) -> BlockExport:
        """Return an export. Raises CommandError."""
        if export_id not in self._exports:
            raise CommandError(f"Export '{export_id}' is not found")
        return self._exports[export_id]

    def query(self) -> list[dict[str, Any]]:
        """Return BlockExportInfo of every export, newest first."""
        return [
            {
                "node-name": one.backend.node.name if one.backend.node is not None else "",
                "shutting-down": one.shutting_down,
                "type": one.type_name,
                "id": one.id,
            }
            for one in reversed(self._exports.values())
        ]

    async def add(self, members: Mapping[str, Any], *, inherited: bool = False) -> BlockExport:
        """Make an export of validated BlockExportOptions (wire names). Raises CommandError.

        inherited   `fd` addresses may name a descriptor of the process by its number
        """
        common = build(CommonOptions, {name: members[name] for name in COMMON_MEMBERS & members.keys() - _NOT_COMMON})
        if not id_well_formed(common.id):
            raise CommandError("Invalid block export id")
        if common.id in self._exports:
            raise CommandError(f"Block export id '{common.id}' is already in use")
        entry = self._registry.exports.get(members["type"])
        if entry is None:
            raise CommandError("No driver found for the requested export type")
        node = self.graph.lookup(None, members["node-name"])
        if common.writable and node.read_only:
            raise CommandError("Cannot export read-only node as writable")
        if common.iothread is not None:
            found = self.objects.get(common.iothread)
            if found is None or found.qom_type != "iothread":
                raise CommandError(f'iothread "{common.iothread}" not found')
        perm = Perm.CONSISTENT_READ | (Perm.WRITE if common.writable else Perm.NONE)
        backend = BlockBackend(self.graph, lambda: "an unnamed block device", perm, Perm.ALL)
        try:
            backend.insert(node)
            export: BlockExport = entry.cls(self, common, backend)
            export.inherited = inherited
            options = {name: value for name, value in members.items() if name not in COMMON_MEMBERS}
            assert entry.options is not None
            await export.start(build(entry.options, options))
        except BaseException:
            await backend.remove()
            raise
        self._exports[common.id] = export
        return export

    async def remove(self, export_id: str, mode: str = "safe") -> None:
        """End an export: "safe" only if nobody uses it, "hard" in any case. Raises CommandError.

        With clients this returns at once and the end is told by BLOCK_EXPORT_DELETED.
        """
        export = self.get(export_id)
        if export.shutting_down:
            raise CommandError(f"Export '{export_id}' is already shutting down")
        if await export.begin_stop(only_idle=True):
            await self._end(export)
            return
        if mode != "hard":
            raise CommandError(f"export '{export_id}' still in use", hint="Use mode='hard' to force client disconnect")
        self._in_background(self._stop_hard(export))

    async def _stop_hard(self, export: BlockExport) -> None:
        await self._cut(export)
        await self._gone(export)

    async def _cut(self, export: BlockExport) -> None:
        export.shutting_down = True
        await export.begin_stop(only_idle=False)
        await export.stop()

    async def _end(self, export: BlockExport) -> None:
        export.shutting_down = True
        await export.stop()
        await self._gone(export)

    async def _gone(self, export: BlockExport) -> None:
        await export.backend.remove()
        if self._exports.get(export.id) is export:
            del self._exports[export.id]
            self.events.emit("BLOCK_EXPORT_DELETED", id=export.id)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def end_all(self, type_name: str | None = None) -> None:
        """End every export (of one type) and wait for it.

        Those with clients are gone first, in the order in which their last client came; then the
        others, newest first.
        """
        ending = [
            one
            for one in reversed(self._exports.values())
            if not one.shutting_down and type_name in (None, one.type_name)
        ]
        ending.sort(key=lambda one: one.newest_client() or sys.maxsize)
        await asyncio.gather(*(self._cut(one) for one in ending))
        for one in ending:
            await self._gone(one)
        if self._ending:
            await asyncio.gather(*self._ending)

    # --- the NBD server -----------------------------------------------------------------------------

    def require_server(self) -> NbdServer:
        """Return the NBD server. Raises CommandError if none runs."""
        if self.nbd is None:
            raise CommandError("NBD server not running")
        return self.nbd

    async def start_server(
        self,
        address: Mapping[str, Any],
        *,
        limits: Limits | None = None,
        tls_creds: str | None = None,
        tls_authz: str | None = None,
        inherited: bool = False,
    ) -> None:
        """Start the NBD server at a SocketAddress (flat form, wire names). Raises CommandError.

        inherited   `fd` addresses may name a descriptor of the process by its number
        """
        if self.nbd is not None:
            raise CommandError("NBD server already running")
        context = None
        if tls_creds is not None:
            credentials = self.objects.tls_credentials(tls_creds)
            if credentials.endpoint != "server":
                raise CommandError("Expecting TLS credentials with a server endpoint")
            context = credentials.context()
        listening = await listen(address, inherited=inherited)
        authorize = None if tls_authz is None else self._authorizer(tls_authz)
        server = NbdServer(listening, limits, context=context, authorize=authorize)
        self.nbd = server
        await self.graph.runner.run(server.start())

    def _authorizer(self, object_id: str) -> Any:
        """Return the question to an authorization object, which is looked up when it is asked."""

        def allowed(name: str) -> bool:
            found: object = self.objects.get(object_id)
            if not isinstance(found, Authorizer):
                log.warning("no authorization object '%s'; the client is refused", object_id)
                return False
            try:
                return found.is_allowed(name)
            except CommandError as error:
                log.warning("authorization object '%s': %s; the client is refused", object_id, error)
                return False

        return allowed

    async def stop_server(self) -> None:
        """End the NBD server and all NBD exports. Raises CommandError if none runs."""
        server = self.require_server()
        self.nbd = None
        await self.graph.runner.run(server.stop_listening())
        await self.end_all("nbd")
        await self.graph.runner.run(server.finish())

    async def close(self) -> None:
        """End everything, at the end of the daemon."""
        if self.nbd is not None:
            await self.stop_server()
        await self.end_all()


_NOT_COMMON = frozenset(("type", "node-name"))
