"""A connection to a QMP server, on qemu.qmp's client."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, Runstate

from qmpd.errors import CommandError


def default_socket() -> Path:
    """Return where a qmpd that was given no monitor listens: the same rule as the daemon's."""
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0 or not folder:
        return Path("/run/qmpd/qmp.sock")
    return Path(folder) / "qmpd" / "qmp.sock"


def add_socket_option(parser: argparse.ArgumentParser) -> None:
    """Declare --socket."""
    parser.add_argument(
        "--socket",
        type=Path,
        default=default_socket(),
        metavar="PATH",
        help="the server's UNIX socket (default: %(default)s)",
    )


class _Stream(EventListener):
    """A listener that keeps no event once it is handed on; the library's own keeps all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: asyncio.Queue[Message] = asyncio.Queue()

    async def put(self, event: Message) -> None:
        """Take one event from the library."""
        await self.queue.put(event)


class Client:
    """A negotiated session.

    Events that come from the beginning of the session on are kept until `next_event` takes them.
    """

    def __init__(self, qmp: QMPClient, stream: _Stream) -> None:
        self._qmp, self._stream = qmp, stream

    async def next_event(self) -> dict[str, Any] | None:
        """Wait for an event and return it; None when the server has hung up and all were taken."""
        event = asyncio.ensure_future(self._stream.queue.get())
        end = asyncio.ensure_future(self._ended())
        await asyncio.wait([event, end], return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        if event.done():
            return dict(event.result())
        event.cancel()
        return None

    async def _ended(self) -> None:
        while self._qmp.runstate is Runstate.RUNNING:
            await self._qmp.runstate_changed()

    async def reply(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a whole message and return the whole reply, error replies included.

        The reply has the message's own `id`, or none. Raises CommandError for what is no command.
        """
        if not {"execute", "exec-oob"} & message.keys():
            raise CommandError("a QMP command has a member 'execute'")
        try:
            value = await self._qmp.execute_msg(Message(dict(message)))
        except ExecuteError as error:
            reply = dict(error.received)
        else:
            reply = {"return": value}
        # The library numbers the messages itself.
        reply.pop("id", None)
        if "id" in message:
            reply["id"] = message["id"]
        return reply

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returned; `_` in argument names stands for `-`.

        Raises CommandError with the server's text.
        """
        wire = {name.replace("_", "-"): value for name, value in arguments.items()}
        reply = await self.reply({"execute": command, "arguments": wire})
        if "error" in reply:
            raise CommandError(reply["error"]["desc"])
        return reply["return"]


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Client]:
    """Connect to the socket at `path`, negotiate, and hang up at the end.

    Raises CommandError if nothing that speaks QMP listens there.
    """
    qmp = QMPClient("qmpd-ctl")
    # What goes wrong is told by exceptions; the library would log it besides.
    qmp.logger.disabled = True
    stream = _Stream()
    qmp.register_listener(stream)
    try:
        await qmp.connect(str(path))
    except ConnectError as error:
        cause = error.exc
        reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(cause)
        raise CommandError(f"cannot talk to {path}: {reason}", hint="--socket names another place.") from error
    try:
        yield Client(qmp, stream)
    finally:
        # A server that hung up first (`quit`) is no error here: whoever waited for a reply was told.
        with contextlib.suppress(OSError, EOFError):
            await qmp.disconnect()


def compact(value: object) -> str:
    """Return JSON on one line."""
    return json.dumps(value, ensure_ascii=False)
