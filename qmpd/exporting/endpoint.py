"""Endpoints of devices: a socket through which an outsider sees a disk as the guest would.

The machine asks the factory that the guest policy names (`--guest plug=nbd:DIR`) whenever a disk is
plugged; a plug-in declares itself as one with `@endpoint(NAME)`. Endpoints are no block exports: they use the
device's own backend and end with it.
"""

from __future__ import annotations

from typing import Protocol

from qmpd.block.backend import BlockBackend
from qmpd.errors import CommandError
from qmpd.qapi.registry import Registry


class Endpoint(Protocol):
    """One device's endpoint."""

    @property
    def path(self) -> str:
        """Where the socket is."""

    async def close(self) -> None:
        """End it when the requests in flight have ended; the socket is gone on return."""


class EndpointFactory(Protocol):
    """Makes endpoints of one kind."""

    async def open(
        self, backend: BlockBackend, directory: str, device_id: str, *, read_only: bool, description: str
    ) -> Endpoint:
        """Serve `backend` at DIRECTORY/DEVICE_ID.sock, on the data loop of its graph.

        description   what a client may show to people (serial, size)
        Raises CommandError with the reason, nothing being left behind.
        """


def factory(registry: Registry, name: str) -> EndpointFactory:
    """Return the factory that the guest policy calls `name` ("nbd"). Raises CommandError."""
    if name not in registry.endpoints:
        raise CommandError(f"endpoints of type '{name}' are not available")
    made: EndpointFactory = registry.endpoints[name].cls()
    return made
