"""A disk served to vhost-user front ends, one at a time. Lives on the data loop.

Model: QEMU's util/vhost-user-server.c.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket

from qmpd.exporting.sockets import Listening
from qmpd.exporting.vhost_front import FrontEnd
from qmpd.exporting.virtio_disk import VirtioDisk

log = logging.getLogger(__name__)


class VhostUserServer:
    """Serves one disk on listening sockets, to one front end at a time; the others wait to be accepted."""

    def __init__(self, disk: VirtioDisk, listening: Listening) -> None:
        self._disk, self._listening = disk, listening
        self._front: FrontEnd | None = None
        self._stopped = False
        self._gone: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Accept a front end."""
        self._listen()

    def _listen(self) -> None:
        for sock in self._listening.sockets:
            asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _pause(self) -> None:
        for sock in self._listening.sockets:
            asyncio.get_running_loop().remove_reader(sock.fileno())

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.error("cannot accept a vhost-user front end: %s", os.strerror(error.errno))
            self._pause()
            asyncio.get_running_loop().call_later(1.0, self._accept_again)
            return
        self._pause()
        self._disk.reset()
        self._front = FrontEnd(sock, self._disk, self._client_gone)

    def _accept_again(self) -> None:
        if not self._stopped and self._front is None:
            self._listen()

    def _client_gone(self) -> None:
        self._front = None
        if self._gone is not None:
            self._gone.set_result(None)
        self._accept_again()

    def config_changed(self) -> None:
        """Tell the front end, if there is one, to read the config space anew."""
        if self._front is not None:
            self._front.config_changed()

    async def stop(self) -> None:
        """Accept no more, end the front end after what it has under way, and remove the socket."""
        self._stopped = True
        self._pause()
        self._listening.close()
        if self._front is not None:
            self._gone = asyncio.get_running_loop().create_future()
            self._front.hang_up()
            await self._gone
