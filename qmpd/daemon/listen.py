"""Which monitors there are: character devices joined to the dispatcher, and the rows of query-chardev."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Any

from qmpd.aio.clock import Clock
from qmpd.aio.unix import Listener
from qmpd.daemon.chardev import Chardev, open_chardev
from qmpd.daemon.chardev_object import NullChardev, SocketChardev
from qmpd.daemon.keyval import parse_opts
from qmpd.errors import CommandError
from qmpd.monitor.dispatch import Dispatcher
from qmpd.monitor.session import ClientSession
from qmpd.qapi.hashorder import HashTable
from qmpd.qom.object import QomObject


class Monitors:
    """All character devices of one daemon, and the monitors on some of them."""

    def __init__(self, rows: list[dict[str, Any]], directory: QomObject) -> None:
        """`rows` is the answer of query-chardev, kept true here; `directory` is /chardevs."""
        self.chardevs: dict[str, Chardev] = {}
        self.used: list[str] = []
        """Ids of the devices with a monitor."""
        self._rows = rows
        self._directory = directory
        self._order = HashTable()
        self._listeners: list[Listener] = []
        self._dispatcher: Dispatcher | None = None

    def add(self, chardev: Chardev) -> None:
        """Add a device. Raises CommandError if its id is taken."""
        if chardev.id in self.chardevs:
            chardev.close()
            raise CommandError(f"Duplicate ID '{chardev.id}' for chardev")
        self.chardevs[chardev.id] = chardev
        self._order.insert(chardev.id)
        shown = SocketChardev(chardev.address, lambda: self._clients(chardev) > 0) if chardev.address else NullChardev()
        self._directory.add_child(chardev.id, shown)
        self.refresh()

    def open_chardev(self, text: str) -> None:
        """Add the device that the value of a -chardev option describes. Raises CommandError."""
        chardev_id = _id_of(text)
        if chardev_id in self.chardevs:
            raise CommandError(f"Duplicate ID '{chardev_id}' for chardev")
        self.add(open_chardev(text))

    def monitor(self, chardev_id: str) -> None:
        """Put a monitor on a device. Raises CommandError."""
        if chardev_id not in self.chardevs:
            raise CommandError(f'chardev "{chardev_id}" not found')
        if chardev_id in self.used:
            raise CommandError(f"Device '{chardev_id}' is in use")
        self.used.append(chardev_id)

    def refresh(self) -> None:
        """Bring the rows of query-chardev up to date."""
        self._rows[:] = [
            {
                "frontend-open": chardev.id in self.used,
                "label": chardev.id,
                "filename": chardev.filename(self._clients(chardev)),
            }
            for chardev in (self.chardevs[name] for name in reversed(self._order.names()))
        ]

    def _clients(self, chardev: Chardev) -> int:
        sessions = self._dispatcher.sessions if self._dispatcher is not None else []
        return sum(session.chardev == chardev.id for session in sessions)

    def start(self, dispatcher: Dispatcher, greeting: bytes, clock: Clock) -> None:
        """Serve clients from now on; those that wait already are served first."""
        self._dispatcher = dispatcher
        dispatcher.on_change = self.refresh
        for chardev_id in self.used:
            chardev = self.chardevs[chardev_id]

            def accepted(client: socket.socket, name: str = chardev_id) -> None:
                ClientSession(client, name, dispatcher, greeting, clock)

            while chardev.connected:
                accepted(chardev.connected.pop(0))
            if chardev.listener is not None:
                allowed = None if chardev.trusted else frozenset((0, os.geteuid()))
                self._listeners.append(Listener(chardev.listener, accepted, allowed_uids=allowed))
        self.refresh()

    def stop_listening(self) -> None:
        """Accept no more clients."""
        for listener in self._listeners:
            listener.close()

    def close(self) -> None:
        """Close all devices and remove their socket files."""
        for chardev in self.chardevs.values():
            chardev.close()


def _id_of(text: str) -> str | None:
    return parse_opts(text, "backend").as_dict().get("id")


def default_path() -> str:
    """Return where the monitor listens if none is named, and make its directory, closed to others.

    Raises CommandError if the directory is not safe or another daemon is there.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime and os.geteuid() != 0:
        raise CommandError("no monitor is named, and XDG_RUNTIME_DIR is not set")
    directory = Path(runtime or "/run") / "qmpd"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.stat(follow_symlinks=False)
    except OSError as error:
        raise CommandError(f"cannot make '{directory}': {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise CommandError(f"'{directory}' is not a directory that only this user can write to")
    path = str(directory / "qmp.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.connect(path)
        raise CommandError(f"another daemon listens at '{path}'")
    return path
