"""The NBD server: listeners, limits, and the exports that clients find.

It lives on the data loop, where clients come and go; the monitor changes it through `Runner.run`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qmpd.exporting.nbd_connection import Connection
from qmpd.exporting.nbd_target import NbdTarget
from qmpd.exporting.sockets import Listening
from qmpd.exporting.tls_identity import peer_name
from qmpd.protocols.nbd import ExportInfo

log = logging.getLogger(__name__)

DEFAULT_CONNECTIONS = 100
"""Clients at a time, if the user does not say; 0 means as many as come."""

DEFAULT_HANDSHAKE_SECONDS = 10
"""Seconds a client has to choose an export, if the user does not say; 0 means for ever."""

ACCEPTS = 16
"""Clients let in before the loop sees to those it has."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server grants its clients; 0 for no limit."""

    connections: int = DEFAULT_CONNECTIONS
    handshake_seconds: float = DEFAULT_HANDSHAKE_SECONDS


class NbdServer:
    """Serves targets to whoever connects.

    context     for TLS; None serves in the clear
    authorize   says whether a peer of that distinguished name may go on; None asks nobody
    """

    def __init__(
        self,
        listening: Listening,
        limits: Limits | None = None,
        *,
        context: ssl.SSLContext | None = None,
        authorize: Callable[[str], bool] | None = None,
    ) -> None:
        self._listening = listening
        self._limits = limits or Limits()
        self._context, self._authorize = context, authorize
        self._targets: dict[bytes, NbdTarget] = {}
        self._connections: set[Connection] = set()
        self._accepting = False
        self._stopped = False
        self._emptied: asyncio.Future[None] | None = None

    @property
    def address(self) -> Mapping[str, str] | None:
        """Where it listens, as a SocketAddress with host and port as they turned out; None if no URI can say it."""
        if self._listening.path is not None:
            return {"type": "unix", "path": os.path.abspath(self._listening.path)}
        for sock in self._listening.sockets:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                host, port = sock.getsockname()[:2]
                anywhere = not any(socket.inet_pton(sock.family, host))
                return {"type": "inet", "host": "localhost" if anywhere else host, "port": str(port)}
        return None

    @property
    def encrypted(self) -> bool:
        """Whether clients must use TLS."""
        return self._context is not None

    # --- exports ----------------------------------------------------------------------------------

    def has(self, name: bytes) -> bool:
        """Say whether an export of that name is served (any loop)."""
        return name in self._targets

    async def add(self, target: NbdTarget) -> None:
        """Serve `target` under its name, which is free."""
        self._targets[target.name] = target

    async def add_alias(self, name: bytes, target: NbdTarget) -> None:
        """Serve `target` under a second name, which is not listed."""
        self._targets[name] = target

    async def remove(self, target: NbdTarget) -> None:
        """Let no new client find `target`."""
        for name in [name for name, one in self._targets.items() if one is target]:
            del self._targets[name]

    # --- what connections ask ---------------------------------------------------------------------

    def find(self, name: bytes) -> ExportInfo | None:
        """(Directory) Describe the export `name`."""
        target = self._targets.get(name)
        return None if target is None or target.closing else target.info()

    def listed(self) -> list[ExportInfo]:
        """(Directory) Describe all exports, oldest first."""
        return [one.info() for name, one in self._targets.items() if name == one.name and not one.closing]

    def target(self, name: bytes) -> NbdTarget | None:
        """(Host) Return what the export `name` stands for."""
        return self._targets.get(name)

    def tls(self) -> ssl.SSLContext | None:
        """(Host) Return the context for TLS."""
        return self._context

    def allowed(self, peer: ssl.SSLSocket) -> bool:
        """(Host) Ask the authorization object, if there is one."""
        if self._authorize is None:
            return True
        name = peer_name(peer)
        return name is not None and self._authorize(name)

    def connection_closed(self, connection: Connection) -> None:
        """(Host) Forget a client, and let the next one in."""
        self._connections.discard(connection)
        self._update()
        if self._emptied is not None and not self._connections and not self._emptied.done():
            self._emptied.set_result(None)

    # --- listening, on the data loop ----------------------------------------------------------------

    async def start(self) -> None:
        """Accept clients."""
        self._update()

    def _update(self) -> None:
        """Accept clients, or leave them waiting, as the limit says."""
        room = not self._limits.connections or len(self._connections) < self._limits.connections
        wanted = room and not self._stopped
        if wanted == self._accepting:
            return
        self._accepting = wanted
        loop = asyncio.get_running_loop()
        for sock in self._listening.sockets:
            if wanted:
                loop.add_reader(sock.fileno(), self._accept, sock)
            else:
                loop.remove_reader(sock.fileno())

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS):
            if not self._accepting or not self._accept_one(listener):
                return

    def _accept_one(self, listener: socket.socket) -> bool:
        """Let one client in; False if none waits."""
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.error("cannot accept an NBD client: %s", os.strerror(error.errno))
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener.fileno())
            loop.call_later(1.0, self._accept_again, listener)
            return False
        connection = Connection(self, sock, handshake_seconds=self._limits.handshake_seconds or None)
        self._connections.add(connection)
        connection.start()
        self._update()
        return True

    def _accept_again(self, listener: socket.socket) -> None:
        if self._accepting and listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    async def stop_listening(self) -> None:
        """Accept no more clients, and remove the socket file."""
        self._stopped = True
        self._update()
        self._listening.close()

    async def finish(self) -> None:
        """End the clients that have not chosen an export, and wait until all are gone."""
        for connection in list(self._connections):
            connection.shut_down()
        while self._connections:
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied
