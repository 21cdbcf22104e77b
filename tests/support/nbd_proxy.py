"""Stands between an NBD client and its server, and cuts the line when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path


class Proxy:
    """Passes bytes on. After a cut the server first ends what it was told; only then a new client is served:
    a request that comes twice then never overtakes a later one.

    down   while true, clients are turned away
    """

    def __init__(self, server: Path) -> None:
        self._server = server
        self._free = asyncio.Lock()
        self._client: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.down = False
        self.connections = 0
        self.cut_after = 0
        """Bytes to the client after which the line is cut by itself; 0: never."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.down:
            writer.close()
            return
        async with self._free:
            self.connections += 1
            up_reader, up_writer = await asyncio.open_unix_connection(str(self._server))
            self._client = writer
            back = asyncio.create_task(self._back(up_reader, writer))
            try:
                with contextlib.suppress(OSError):
                    await self._pass(reader, up_writer)
                with contextlib.suppress(OSError):
                    up_writer.write_eof()
                await back
            finally:
                back.cancel()
                up_writer.close()
                writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what the server says, to its end even if nobody listens any more."""
        while True:
            try:
                data = await reader.read(1 << 16)
            except OSError:
                return
            if not data:
                writer.close()
                return
            if self.cut_after:
                self.cut_after -= len(data)
                if self.cut_after <= 0:
                    writer.write(data[: len(data) + self.cut_after])
                    self.cut_after = 0
                    writer.close()
            if not writer.is_closing():
                writer.write(data)

    def cut(self) -> None:
        """End the connection, if there is one."""
        if self._client is not None:
            self._client.close()

    async def end(self) -> None:
        self.down = True
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def proxy(path: Path, server: Path) -> AsyncIterator[Proxy]:
    """Serve at `path` what `server` serves."""
    between = Proxy(server)
    listener = await asyncio.start_unix_server(between.serve, str(path))
    try:
        yield between
    finally:
        listener.close()
        await between.end()
