"""One dispatcher for all monitors: requests in turn, out of band at once, replies and events out.

Clients take turns, one request each; a client's own requests keep their order. At any moment one
handler has the turn. A handler that waits inside `ctx.out_of_turn()` lets others run meanwhile, and
gets the turn back before anybody new does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

from qmpd import trace
from qmpd.aio.clock import Clock
from qmpd.context import Services
from qmpd.errors import CommandError, CommandNotFound, QmpdError
from qmpd.events import Event, EventBus
from qmpd.monitor.outbox import RateLimiter
from qmpd.monitor.redact import redacted
from qmpd.protocols.qmp import Malformed, to_text, to_wire
from qmpd.qapi.hashorder import dict_order
from qmpd.qapi.visit import validate_arguments

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.jobs.job import JobManager
    from qmpd.machine.machine import Machine
    from qmpd.monitor.session import ClientSession
    from qmpd.qom.tree import ObjectTree

_log = logging.getLogger("qmpd.monitor")
_trace = trace.flag("monitor.commands")

SLICE = 0.005
"""Seconds of requests in one go, after which input and output of all clients get a chance."""


class CommandContext:
    """What one handler sees; see `qmpd.context.Context`."""

    __slots__ = ("_dispatcher", "_out", "services", "session")

    def __init__(self, dispatcher: Dispatcher, session: ClientSession | None, in_turn: bool) -> None:
        self._dispatcher = dispatcher
        self._out = not in_turn
        self.services = dispatcher.services
        self.session = session

    @property
    def graph(self) -> Graph:
        """The block graph."""
        return self.services.graph

    @property
    def objects(self) -> ObjectTree:
        """The QOM tree."""
        return self.services.objects

    @property
    def jobs(self) -> JobManager:
        """The long-running jobs."""
        return self.services.jobs

    @property
    def events(self) -> EventBus:
        """Where events go out."""
        return self.services.events

    @property
    def machine(self) -> Machine:
        """The modelled machine; only handlers of the system root may ask."""
        assert self.services.machine is not None
        return self.services.machine

    def out_of_turn(self) -> AbstractAsyncContextManager[None]:
        """Let other clients' commands run during the block; nested uses count once."""
        return self._leave()

    @asynccontextmanager
    async def _leave(self) -> AsyncIterator[None]:
        if self._out:
            yield
            return
        self._out = True
        self._dispatcher.give_up_turn()
        try:
            yield
        finally:
            await self._dispatcher.take_turn_back()
            self._out = False


class Dispatcher:
    """Runs the commands of one daemon."""

    def __init__(self, services: Services, clock: Clock) -> None:
        self.services = services
        self.sessions: list[ClientSession] = []
        self.on_bug: Callable[[str, BaseException], None] | None = None
        """Called with (command, exception) for each defect of ours; tests make it fatal."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when a client has come or gone."""
        self._limiter = RateLimiter(self._broadcast, clock)
        self._unsubscribe = services.events.subscribe(self._limiter)
        self._ready: deque[ClientSession] = deque()
        self._queued: set[ClientSession] = set()
        self._returning: deque[asyncio.Future[None]] = deque()
        self._taken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    # Clients

    def joined(self, session: ClientSession) -> None:
        """A client has connected."""
        self.sessions.append(session)
        self.on_change()

    def left(self, session: ClientSession) -> None:
        """A client is gone."""
        if session in self.sessions:
            self.sessions.remove(session)
            self.on_change()

    def submit(self, session: ClientSession) -> None:
        """A client has requests waiting."""
        if session not in self._queued:
            self._queued.add(session)
            self._ready.append(session)
            if not self._taken:
                self._start_worker()

    def run_oob(self, session: ClientSession, request: dict[str, Any]) -> None:
        """Run an out-of-band request at once."""
        self._keep(asyncio.get_running_loop().create_task(self._serve(session, request, oob=True)))

    # Turns

    def _start_worker(self) -> None:
        self._taken = True
        self._keep(asyncio.get_running_loop().create_task(self._work()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def give_up_turn(self) -> None:
        """The handler that has the turn goes on without it."""
        if self._returning:
            self._wake_first()
        elif self._ready and not self._stopped:
            self._start_worker()
        else:
            self._taken = False

    async def take_turn_back(self) -> None:
        """Wait until the turn is free and take it; a command is never cancelled while it waits."""
        if not self._taken:
            self._taken = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._returning.append(turn)
        await turn

    def _wake_first(self) -> None:
        self._returning.popleft().set_result(None)

    async def run_in_turn(self, work: Callable[[CommandContext], Any]) -> None:
        """Do work of the daemon's own (command line, signals) like a command: `await work(ctx)`."""
        await self.take_turn_back()
        try:
            await work(CommandContext(self, None, True))
        finally:
            self.give_up_turn()

    async def _work(self) -> None:
        """Serve requests while there are any; begins with the turn taken."""
        began = time.monotonic()
        while self._ready and not self._stopped:
            if self._returning:
                self._wake_first()
                return
            session = self._ready.popleft()
            if session.requests:
                await self._serve(session, session.requests.popleft())
            if session.requests:
                self._ready.append(session)
            else:
                self._queued.discard(session)
            session.request_done()
            if time.monotonic() - began > SLICE:
                await asyncio.sleep(0)
                began = time.monotonic()
        if self._returning:
            self._wake_first()
        else:
            self._taken = False

    # Requests

    async def _serve(self, session: ClientSession, request: Any, *, oob: bool = False) -> None:
        identity = request.get("id", _ABSENT) if type(request) is dict else _ABSENT
        name = "?"
        try:
            name, arguments = _envelope(request, session.oob)
            result = await self._run(session, name, arguments, oob=oob)
        except QmpdError as error:
            session.reply(error_line(error.error_class, str(error), identity))
        except Exception as error:  # noqa: BLE001 - a defect of ours costs one reply, and is logged
            self._bug(name, error)
            session.reply(error_line("GenericError", "internal error, see log", identity))
        else:
            session.reply(_return_line(result, identity))

    async def _run(self, session: ClientSession, name: str, arguments: dict[str, Any], *, oob: bool) -> Any:
        schema = self.services.schema
        if not session.negotiated and name != "qmp_capabilities":
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        entry = self.services.registry.commands.get(name)
        command = schema.commands.get(name)
        if entry is None or command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        if oob and not command.allow_oob:
            raise CommandError(f"The command {name} does not support OOB")
        members = validate_arguments(schema, name, arguments)
        if _trace:
            _trace.log("%s: %s %s", session.chardev, name, redacted(schema, arguments))
        return await entry.handler(CommandContext(self, session, not oob), **members)

    def _bug(self, name: str, error: Exception) -> None:
        _log.error("defect while running '%s'", name, exc_info=error)
        if self.on_bug is not None:
            self.on_bug(name, error)

    # Events

    def _broadcast(self, event: Event) -> None:
        wire = to_wire(event.to_wire())
        for session in list(self.sessions):
            session.send_event(event, wire)

    # The end

    async def stop(self, patience: float) -> None:
        """Begin no further command, and wait for those that run, for `patience` seconds at most."""
        self._stopped = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience)
            if late:
                _log.warning("%d commands are still running at the end", len(late))

    async def finish(self, patience: float) -> None:
        """Give every client its last messages, for `patience` seconds at most, and close it."""
        self._limiter.close()
        self._unsubscribe()
        await asyncio.gather(*(session.finish(patience) for session in list(self.sessions)))


_ABSENT = object()


def error_line(error_class: str, text: str, identity: Any = _ABSENT) -> bytes:
    """Return an error reply; `identity` is echoed if there is one."""
    body = f'"error": {{"class": "{error_class}", "desc": {to_text(text)}}}}}\r\n'
    return ("{" + body if identity is _ABSENT else f'{{"id": {to_text(identity)}, {body}').encode("ascii")


def _return_line(result: Any, identity: Any) -> bytes:
    text = "{}" if result is None else to_text(result)
    if identity is _ABSENT:
        return f'{{"return": {text}}}\r\n'.encode("ascii")
    return f'{{"return": {text}, "id": {to_text(identity)}}}\r\n'.encode("ascii")


def _envelope(request: Any, oob: bool) -> tuple[str, dict[str, Any]]:
    """Return the command's name and arguments. Raises CommandError for a request that is none.

    oob   whether `exec-oob` counts as a member
    """
    if type(request) is not dict:
        raise CommandError(request.text if isinstance(request, Malformed) else "QMP input must be a JSON object")
    name = request.get("execute")
    arguments = request.get("arguments", _NO_ARGUMENTS)
    if type(name) is str and type(arguments) is dict:
        others = len(request) - 1 - (arguments is not _NO_ARGUMENTS) - ("id" in request)
        if not others:
            return name, arguments
    return _examine(request, oob)


_NO_ARGUMENTS: dict[str, Any] = {}


def _examine(request: dict[str, Any], oob: bool) -> tuple[str, dict[str, Any]]:
    """Check a request member by member, in the order in which the reference meets them."""
    key: str | None = None
    for member in dict_order(request):
        value = request[member]
        if member == "execute" or (member == "exec-oob" and oob):
            if type(value) is not str:
                raise CommandError(f"QMP input member '{member}' must be a string")
            if key is not None:
                raise CommandError(f"QMP input member '{member}' clashes with '{key}'")
            key = member
        elif member == "arguments":
            if type(value) is not dict:
                raise CommandError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise CommandError(f"QMP input member '{member}' is unexpected")
    if key is None:
        raise CommandError("QMP input lacks member 'execute'")
    return request[key], request.get("arguments", {})
