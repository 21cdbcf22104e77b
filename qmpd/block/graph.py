"""The graph: every node by name, and the ways in which it changes.

Opening is bottom-up, one short change per node (`opening.py`); between the changes only awaits.
Model: block.c and blockdev.c of QEMU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from qmpd.aio.loop import InlineLoop, Runner
from qmpd.block import filename, opening
from qmpd.block.backend import BlockBackend
from qmpd.block.change import Transaction
from qmpd.block.node import BlockNode
from qmpd.block.options import OpenFlags
from qmpd.block.perm import ChildRole
from qmpd.block.throttle_group import BackendGroup
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.events import EventBus
    from qmpd.qapi.registry import Registry
    from qmpd.qom.tree import ObjectTree

log = logging.getLogger(__name__)

Slow = Callable[[], AbstractAsyncContextManager[None]]
"""Makes the block during which other commands may run (`Context.out_of_turn`)."""


class Graph:
    """All nodes and backends of one program.

    objects   where drivers find secrets         events   where nodes report
    runner    runs open, close and all I/O       registry the drivers there are
    validate  checks a BlockdevOptions tree that an image names by json:; None refuses such names
    open_flags  how the nodes opened from now on are meant
    """

    def __init__(
        self, objects: ObjectTree, events: EventBus, runner: Runner | None = None, registry: Registry | None = None
    ) -> None:
        if registry is None:
            from qmpd.qapi.registry import registry as default_registry

            registry = default_registry
        self.objects = objects
        self.events = events
        self.runner: Runner = runner or InlineLoop()
        self.registry = registry
        self.validate: Callable[[Any], dict[str, Any]] | None = None
        self.open_flags = OpenFlags.NONE
        self.backends: list[BlockBackend] = []
        self.throttle_groups: dict[str, BackendGroup] = {}
        self._nodes: dict[str, BlockNode] = {}
        self._reserved: set[str] = set()
        self.generation = 0
        """Changes with every change of the graph: what was found out about nodes before is out of date."""
        self._generated = 0
        self._sequence = 0

    # --- names ----------------------------------------------------------------------------------

    def nodes(self) -> list[BlockNode]:
        """Return every published node, newest name first, anonymous ones included."""
        return sorted(self._nodes.values(), key=lambda node: -node.sequence)

    def get(self, name: str) -> BlockNode | None:
        """Return the node `name`, None if there is none."""
        return self._nodes.get(name)

    def find_node(self, name: str) -> BlockNode:
        """Return the node `name`. Raises CommandError with the text of blockdev-del."""
        if name not in self._nodes:
            raise CommandError(f"Failed to find node with node-name='{name}'")
        return self._nodes[name]

    def find_backend(self, name: str) -> BlockBackend | None:
        """Return the backend of the -drive `name`, None if there is none."""
        return next((one for one in self.backends if name and one.name == name), None)

    def lookup(self, device: str | None = None, node_name: str | None = None) -> BlockNode:
        """Return the node that a device id or a node name means (bdrv_lookup_bs).

        Where one string may be either, it is given for both. Raises CommandError.
        """
        if device:
            backend = self.find_backend(device)
            if backend is not None:
                if backend.node is None:
                    raise CommandError(f"Device '{device}' has no medium")
                return backend.node
        if node_name and node_name in self._nodes:
            return self._nodes[node_name]
        raise CommandError(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")

    def reserve(self, name: str | None) -> str:
        """Check a new node's name, or generate one for None, and keep others from taking it.

        Raises CommandError. `publish` or `release` ends the reservation.
        """
        if name is None:
            name = self._generate()
        else:
            filename.check_node_name(name)
            if self.find_backend(name):
                raise CommandError(f"node-name={name} is conflicting with a device id")
            if name in self._nodes or name in self._reserved:
                raise CommandError(f"Duplicate nodes with node-name='{name}'")
            if len(name.encode()) > filename.MAX_NODE_NAME:
                raise CommandError("Node name too long")
        self._reserved.add(name)
        return name

    def _generate(self) -> str:
        while True:
            name = f"#block{self._generated}{int.from_bytes(os.urandom(4)) % 100:02}"
            self._generated += 1
            if name not in self._nodes and name not in self._reserved:
                return name

    def next_sequence(self) -> int:
        """Return the place of a node in the order of naming."""
        self._sequence += 1
        return self._sequence

    def release(self, name: str) -> None:
        """Give up a reserved name."""
        self._reserved.discard(name)

    def publish(self, node: BlockNode) -> None:
        """Make an opened node visible under its reserved name."""
        self._reserved.discard(node.name)
        self._nodes[node.name] = node

    # --- change -----------------------------------------------------------------------------------

    @contextmanager
    def change(self) -> Iterator[Transaction]:
        """Change the graph: all of it, or on any exception nothing. Contains no await.

        Raises PermissionConflict or CommandError from the permissions that result.
        """
        tran = Transaction()
        self.generation += 1
        try:
            yield tran
            tran.refresh()
        except BaseException:
            tran.undo()
            raise
        finally:
            self.generation += 1
        tran.commit()

    async def blockdev_add(self, tree: Mapping[str, Any], slow: Slow | None = None) -> BlockNode:
        """Open the validated BlockdevOptions `tree` (wire names) as a node owned by the monitor.

        slow   taken around what lasts long. Raises QmpdError; the graph is then as it was.
        """
        if "node-name" not in tree:
            raise CommandError("'node-name' must be specified for the root node")
        node = await opening.open_tree(self, tree, slow or nullcontext)
        node.monitor_owned = True
        return node

    @asynccontextmanager
    async def borrowed(self, reference: str | Mapping[str, Any]) -> AsyncIterator[BlockNode]:
        """Give the node that a validated BlockdevRef means; one opened for it is closed afterwards."""
        if isinstance(reference, str):
            yield self.lookup(reference, reference)
            return
        node = await opening.open_tree(self, reference, nullcontext)
        node.monitor_owned = True
        try:
            yield node
        finally:
            node.monitor_owned = False
            await self.drop_unreferenced(node)

    async def blockdev_del(self, name: str) -> None:
        """Delete a node of the monitor. Raises CommandError if it is in use."""
        node = self.find_node(name)
        if any(isinstance(edge.parent, BlockBackend) and not edge.parent.internal for edge in node.parents):
            raise CommandError(f"Node {name} is in use")
        self.check_blocked(node)
        if not node.monitor_owned:
            raise CommandError(f"Node {name} is not owned by the monitor")
        if node.parents:
            raise CommandError(f"Block device {name} is in use")
        node.monitor_owned = False
        await self.drop_unreferenced(node)

    def check_blocked(self, node: BlockNode, *, in_chain: bool = False) -> None:
        """Raise CommandError if a job or, unless the command is about parts of a chain, an overlay keeps `node` from
        being changed."""
        for reason in node.blockers:
            raise CommandError(f"Node '{node.name}' is busy: {reason}")
        for edge in node.parents:
            if edge.role & ChildRole.COW and isinstance(edge.parent, BlockNode) and not in_chain:
                raise CommandError(f"Node '{node.name}' is busy: node is used as backing hd of '{edge.parent.name}'")

    async def drop_unreferenced(self, node: BlockNode) -> None:
        """Close `node` if neither the monitor nor a parent holds it, then its children likewise."""
        if node.parents or node.monitor_owned or self._nodes.get(node.name) is not node:
            return
        del self._nodes[node.name]
        self._reserved.add(node.name)
        try:
            await opening.close_node(self, node)
        finally:
            self._reserved.discard(node.name)

    async def stop_waiting(self) -> None:
        """Have every node fail what waits for something outside that may never come: the program ends."""

        async def work() -> None:
            for node in list(self._nodes.values()):
                node.stop_waiting()

        await self.runner.run(work())

    async def close_all(self) -> None:
        """Close every node, parents first: at the end of the program."""
        for backend in list(self.backends):
            await backend.remove()
        for node in self._nodes.values():
            node.monitor_owned = False
        while self._nodes:
            roots = [node for node in self._nodes.values() if not node.parents]
            if not roots:
                log.error("nodes that nothing owns hold each other: %s", ", ".join(self._nodes))
                return
            for node in roots:
                await self.drop_unreferenced(node)

    # --- drain ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def drained(self, *nodes: BlockNode) -> AsyncIterator[None]:
        """Keep new requests from the backends above `nodes`, and wait for those under way."""
        backends, filters = _above(nodes)

        async def begin() -> None:
            for backend in backends:
                backend.drained_begin()
            for node in filters:
                node.drained_begin()
            for backend in backends:
                await backend.wait_idle()

        async def end() -> None:
            for node in filters:
                node.drained_end()
            for backend in backends:
                backend.drained_end()

        await self.runner.run(begin())
        try:
            yield
        finally:
            await self.runner.run(end())


def _above(nodes: tuple[BlockNode, ...]) -> tuple[list[BlockBackend], list[BlockNode]]:
    """Return the backends above `nodes`, and the nodes between: those given and all their ancestors."""
    found: dict[int, BlockBackend] = {}
    seen: dict[int, BlockNode] = {}
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        for edge in node.parents:
            if isinstance(edge.parent, BlockBackend):
                found[id(edge.parent)] = edge.parent
            elif isinstance(edge.parent, BlockNode):
                todo.append(edge.parent)
    return list(found.values()), list(seen.values())
