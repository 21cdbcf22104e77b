"""What the handler of a command sees: the services of the daemon and its own place in the queue."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qmpd.block.graph import Graph
    from qmpd.events import EventBus
    from qmpd.exporting.exports import Exports
    from qmpd.jobs.job import JobManager
    from qmpd.machine.machine import Machine
    from qmpd.qapi.registry import Registry
    from qmpd.qapi.schema import Schema
    from qmpd.qom.tree import ObjectTree


class Session(Protocol):
    """The client whose command runs."""

    @property
    def chardev(self) -> str:
        """Id of the character device the client is connected to."""


@dataclass(slots=True)
class Services:
    """What one daemon consists of, made by `daemon.main`; one per process (tests make several).

    machine    None in the storage daemon
    jobs       the long-running jobs
    exports    block exports and the NBD server, made here from the other services
    chardevs   rows of query-chardev, kept true by `daemon.listen`
    quit       ends the daemon after the reply has left; the argument is the SHUTDOWN reason
    """

    program: str
    schema: Schema
    registry: Registry
    events: EventBus
    objects: ObjectTree
    graph: Graph
    machine: Machine | None
    jobs: JobManager
    quit: Callable[[str], None]
    chardevs: list[dict[str, Any]] = field(default_factory=list)
    exports: Exports = field(init=False)

    def __post_init__(self) -> None:
        from qmpd.exporting.exports import Exports

        self.exports = Exports(self.graph, self.objects, self.events, self.registry)


class Context(Protocol):
    """The first argument of every command handler."""

    @property
    def services(self) -> Services:
        """The whole daemon, for what has no shortcut below."""

    @property
    def graph(self) -> Graph:
        """The block graph."""

    @property
    def objects(self) -> ObjectTree:
        """The QOM tree."""

    @property
    def jobs(self) -> JobManager:
        """The long-running jobs."""

    @property
    def events(self) -> EventBus:
        """Where events go out."""

    @property
    def machine(self) -> Machine:
        """The modelled machine; only handlers of the system root may ask."""

    @property
    def session(self) -> Session | None:
        """The client, None for work of the command line."""

    def out_of_turn(self) -> AbstractAsyncContextManager[None]:
        """Let other clients' commands run during the block: for what takes long.

        On return the handler looks up again whatever it had checked before.
        """
