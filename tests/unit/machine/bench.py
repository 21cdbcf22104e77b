"""A machine on a real graph, with its events kept and its clock in the test's hands."""

from __future__ import annotations

import asyncio
from typing import Any

from qmpd.block.graph import Graph
from qmpd.errors import QmpdError
from qmpd.events import Event, EventBus
from qmpd.machine.machine import Machine
from qmpd.machine.options import GuestPolicy, MachineOptions, resolve_machine
from qmpd.qapi.registry import discover
from qmpd.qom.tree import ObjectTree

MIB = 1 << 20


class Bench:
    """One machine, ready for hot-plug unless `cold`."""

    def __init__(
        self, *guest: str, machine: str = "pc", usb: bool = False, cold: bool = False, paused: bool = True
    ) -> None:
        discover(("drivers", "devices", "objects"))
        self.events: list[tuple[str, dict[str, Any] | None]] = []
        self.now = 100.0
        bus = EventBus()
        bus.subscribe(self._heard)
        self.objects = ObjectTree()
        self.graph = Graph(self.objects, bus)
        board, machine_type = resolve_machine(machine)
        options = MachineOptions(
            board=board, machine_type=machine_type, usb=usb, paused=paused, guest=GuestPolicy.parse(guest)
        )
        self.machine = Machine(self.graph, self.objects, bus, options, clock=lambda: self.now)
        if not cold:
            self.machine.start()
        self._nodes = 0

    def _heard(self, event: Event) -> None:
        self.events.append((event.name, event.data))

    async def node(self, **options: Any) -> str:
        """Add a null node of 1 MiB and return its name."""
        name = f"n{self._nodes}"
        self._nodes += 1
        tree = {"driver": "null-co", "size": MIB, "node-name": name}
        await self.graph.blockdev_add(tree | {key.replace("_", "-"): value for key, value in options.items()})
        return name

    async def add(self, driver: str, text: bool = False, **properties: Any) -> str:
        """device_add with `_` for `-`; returns the error text, "" for success."""
        members = {key.replace("__", "-"): value for key, value in properties.items()}
        try:
            await self.machine.device_add({"driver": driver, **members}, text=text)
        except QmpdError as error:
            return str(error)
        return ""

    async def remove(self, name: str) -> str:
        """device_del; returns the error text, "" for success."""
        try:
            await self.machine.device_del(name)
        except QmpdError as error:
            return str(error)
        await self.settle()
        return ""

    async def settle(self) -> None:
        """Let events that follow a reply arrive."""
        for _ in range(3):
            await asyncio.sleep(0)

    def deleted(self) -> list[str]:
        """Return the paths in DEVICE_DELETED events so far, without /machine/peripheral."""
        found = [data["path"] for name, data in self.events if name == "DEVICE_DELETED" and data]
        return [path.removeprefix("/machine/peripheral") for path in found]
