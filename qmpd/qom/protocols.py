"""What plug-ins ask of each other through the QOM tree.

A plug-in that offers one of these registers as a QOM type and has the methods; the one that needs
it looks the object up by its id and checks with `isinstance`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qmpd.aio.loop import DataLoop
from qmpd.crypto.secretbytes import SecretBytes

if TYPE_CHECKING:
    import ssl


@runtime_checkable
class SecretSource(Protocol):
    """An object that holds a secret (`secret`, `secret_keyring`)."""

    def reveal(self) -> SecretBytes:
        """Return a copy, which the caller wipes. Raises CommandError if there is nothing."""


@runtime_checkable
class TlsCredentials(Protocol):
    """An object of the `tls-creds` family.

    endpoint  "client" or "server": the side of the connection that it is good for
    """

    @property
    def endpoint(self) -> str:
        """Return "client" or "server"."""

    def context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """Return the context for that endpoint. Raises CommandError if this Python cannot.

        check_hostname   (clients) the server's certificate must be for the name that is then given
        """


@runtime_checkable
class Authorizer(Protocol):
    """An object of the `authz` family."""

    def is_allowed(self, identity: str) -> bool:
        """Say whether the peer known by `identity` may connect. Raises CommandError."""


@runtime_checkable
class ThrottleMember(Protocol):
    """Something whose requests a throttle group delays."""

    def limits_changed(self) -> None:
        """Called, on the monitor's loop, when the group has new limits."""


@runtime_checkable
class Throttler(Protocol):
    """A group of throttled members: the object behind `throttle-group`."""

    def wire_limits(self) -> dict[str, int]:
        """Return the members of ThrottleLimits, all of them."""

    def join(self, member: ThrottleMember) -> None:
        """Add a member; the group cannot be deleted meanwhile."""

    def leave(self, member: ThrottleMember) -> None:
        """Take a member out."""


@runtime_checkable
class DataThread(Protocol):
    """A thread with an event loop that others may run on (`iothread`)."""

    @property
    def data_loop(self) -> DataLoop:
        """Return its loop."""

    def wire_info(self) -> dict[str, Any]:
        """Return the row of query-iothreads (wire names)."""
