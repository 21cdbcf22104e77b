"""How a character device appears below /chardevs: the QOM types chardev-socket and chardev-null."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qmpd.qom.object import Property, QomObject


class NullChardev(QomObject):
    """A device that nobody is connected to."""

    qom_type = "chardev-null"
    abstract = False


class SocketChardev(QomObject):
    """A device on a UNIX socket.

    path        where the socket is
    connected   says whether somebody is connected
    """

    qom_type = "chardev-socket"
    abstract = False
    qom_properties = (
        Property("addr", "SocketAddress", get=lambda self: self.address()),
        Property("connected", "bool", get=lambda self: self.connected()),
    )

    def __init__(self, path: str, connected: Callable[[], bool]) -> None:
        super().__init__()
        self.path_of_socket = path
        self.connected = connected

    def address(self) -> dict[str, Any]:
        """Return the SocketAddress."""
        return {"type": "unix", "path": self.path_of_socket}
