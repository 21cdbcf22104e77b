"""One daemon from its parts to its end: what both programs share.

Order of the end (ARCHITECTURE, Cancellation): listeners, commands that still run, devices and
exports, nodes, objects, and last the monitors, so that a client still hears what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from qmpd.aio.clock import LoopClock
from qmpd.aio.loop import DataLoop
from qmpd.block.graph import Graph
from qmpd.block.loose import check_options
from qmpd.commands.control import version_info
from qmpd.context import Services
from qmpd.daemon.listen import Monitors
from qmpd.events import EventBus
from qmpd.jobs.job import JobManager
from qmpd.monitor.dispatch import CommandContext, Dispatcher
from qmpd.monitor.session import greeting_line
from qmpd.qapi import schema as qapi_schema
from qmpd.qapi.check import offered
from qmpd.qapi.offered import load_rest
from qmpd.qom.tree import ObjectTree

_log = logging.getLogger("qmpd.daemon")

COMMAND_PATIENCE = 8.0
"""Seconds that a command which runs at the end may still take; libvirt kills what needs more than 10."""

CLIENT_PATIENCE = 2.0
"""Seconds in which a client has to take its last messages."""


class Daemon:
    """Services, monitors and dispatcher of one process, on the running loop.

    Making one raises SchemaError if the schema lists what no code declares.
    """

    def __init__(self, program: str, schema: qapi_schema.Schema) -> None:
        registry = offered(schema)
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_defect)
        self._ending: asyncio.Future[str] = self._loop.create_future()
        self._data_loop = DataLoop()
        events = EventBus(schema.events)
        events.bind(self._loop)
        objects = ObjectTree(registry)
        graph = Graph(objects, events, self._data_loop, registry)
        graph.validate = lambda tree: check_options(schema, tree)
        jobs = JobManager(events)
        self.services = Services(program, schema, registry, events, objects, graph, None, jobs, self._end)
        self.monitors = Monitors(self.services.chardevs, objects.root.children["chardevs"])
        self.dispatcher = Dispatcher(self.services, LoopClock())
        self.at_end: list[Callable[[], Awaitable[None]]] = []
        """What is to be ended before the graph, last added first."""

    def context(self) -> CommandContext:
        """Return the context for work of the command line, before any client is served."""
        return CommandContext(self.dispatcher, None, False)

    def _end(self, reason: str) -> None:
        """End the daemon; the first reason counts."""
        if self._ending.done():
            return
        self.services.events.emit("SHUTDOWN", guest=reason.startswith("guest"), reason=reason)
        self._ending.set_result(reason)

    def heed_signals(self) -> None:
        """Let signals end the daemon in good order from now on: before, they end it at once, however long it starts.

        Called before anything serves a client: what it wrote would be lost.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._end, "host-signal")
        self._loop.add_signal_handler(signal.SIGUSR1, self.dump_tasks)

    async def serve(self, ready: Callable[[], None]) -> None:
        """Serve clients until somebody ends the daemon; `ready` is called when they can connect."""
        self.heed_signals()
        self.monitors.start(self.dispatcher, greeting_line(version_info()), LoopClock())
        ready()
        loading = asyncio.create_task(self._load_rest(), name="load plug-ins")
        try:
            await self._ending
        finally:
            loading.cancel()

    async def _load_rest(self) -> None:
        """Import the plug-ins nobody asked for yet, between what clients ask for; then collect garbage again."""
        rest = load_rest(self.services.registry)
        # In a thread, so that nobody waits longer for an answer than until the interpreter changes threads.
        while (loaded := await asyncio.to_thread(next, rest, None)) is not None:
            module, error = loaded
            if error is not None:  # and it fails again where it is asked for
                _log.error("defect in %s", module, exc_info=error)
        gc.freeze()
        gc.enable()

    def dump_tasks(self) -> None:
        """Write what is going on to the log."""
        for task in asyncio.all_tasks(self._loop):
            frames = [f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in reversed(task.get_stack())]
            _log.warning("task %s: %s", task.get_name(), " <- ".join(frames))
        for backend in self.services.graph.backends:
            _log.warning("%s: %d requests in flight", backend.describe_parent(), backend.in_flight)

    async def close(self) -> None:
        """Take everything down; one part that fails does not keep the others up."""
        self.monitors.stop_listening()
        await self.dispatcher.stop(COMMAND_PATIENCE)
        for step in (
            self.services.graph.stop_waiting,
            *reversed(self.at_end),
            self.services.exports.close,
            self.services.jobs.close,
            self.services.graph.close_all,
            self._close_objects,
        ):
            try:
                await step()
            except Exception:  # noqa: BLE001 - logged; the rest still has to end
                _log.exception("while the daemon ends")
        await self.dispatcher.finish(CLIENT_PATIENCE)
        self.monitors.close()
        with contextlib.suppress(RuntimeError):
            self._data_loop.close()

    async def _close_objects(self) -> None:
        self.services.objects.close()


def _log_defect(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a callback of the loop raised: a defect, which is to end nothing."""
    _log.error("defect in a callback: %s", context.get("message"), exc_info=context.get("exception"))
