"""Unplugging: at once, or by the leave of a guest that is only modelled.

A SCSI or USB device goes at once. A PCI device is asked for: the guest has to let go of its slot.
Model: hw/acpi/pcihp.c of QEMU with a guest that never answers (policy `reset`); the other policies
stand for guests that do.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from qmpd.errors import CommandError
from qmpd.machine.bus import PciBus
from qmpd.machine.options import GuestPolicy, Unplug

if TYPE_CHECKING:
    from qmpd.machine.device import Device
    from qmpd.machine.machine import Machine

log = logging.getLogger(__name__)


class Unplugger:
    """Carries out removals for one machine, as its guest allows."""

    def __init__(self, machine: Machine, policy: GuestPolicy) -> None:
        self._machine = machine
        self._policy = policy
        self._pending: list[tuple[PciBus, int]] = []
        self._timers: set[asyncio.Task[None]] = set()

    async def request(self, device: Device, name: str) -> None:
        """Remove `device`, which the client called `name`, or start to. Raises CommandError."""
        until = device.pending_until_ms
        if device.pending_unplug and (not until or until > self._machine.virtual_ms):
            raise CommandError(f"Device {name} is already in the process of unplug")
        bus = device.bus
        if bus is not None and not bus.hotpluggable:
            raise CommandError(f"Bus '{bus.bus_name}' does not support hotplugging")
        if not device.hotpluggable:
            raise CommandError(f"Device '{device.type_name}' does not support hotplugging")
        if not isinstance(bus, PciBus):
            self._tell(await self._machine.dismantle(device))
            return
        device.pending_unplug = True
        device.pending_until_ms = self._machine.virtual_ms
        slot: int = device.values["addr"] >> 3
        if self._policy.unplug is Unplug.ACK:
            self._tell(await self._eject(bus, slot))
        elif self._policy.unplug is Unplug.DELAY:
            self._later(bus, slot)
        elif self._policy.unplug is Unplug.REFUSE:
            device.pending_unplug = False
            self._emit_soon("DEVICE_UNPLUG_GUEST_ERROR", _names(device))
        elif (bus, slot) not in self._pending:
            self._pending.append((bus, slot))

    async def machine_was_reset(self) -> None:
        """Complete what the guest never answered, lowest slot first."""
        pending, self._pending = self._pending, []
        deleted: list[dict[str, Any]] = []
        for bus, slot in sorted(pending, key=lambda one: one[1]):
            deleted += await self._eject(bus, slot)
        self._tell(deleted)

    async def _eject(self, bus: PciBus, slot: int) -> list[dict[str, Any]]:
        """Remove every device of a slot that may go; a bridge that was there from the start may not.

        Returns the data of the events.
        """
        deleted: list[dict[str, Any]] = []
        for device in bus.in_slot(slot):
            if device.hotpluggable and (device.hotplugged or not getattr(device, "is_bridge", False)):
                deleted += await self._machine.dismantle(device)
            else:
                device.pending_unplug = False
        return deleted

    def _tell(self, deleted: list[dict[str, Any]]) -> None:
        for data in deleted:
            self._emit_soon("DEVICE_DELETED", data)

    def _emit_soon(self, name: str, data: dict[str, Any]) -> None:
        """Emit an event behind the reply of the command that runs."""
        asyncio.get_running_loop().call_soon(lambda: self._machine.events.emit(name, **data))

    def _later(self, bus: PciBus, slot: int) -> None:
        async def answer() -> None:
            await asyncio.sleep(self._policy.delay_ms / 1000)
            self._tell(await self._eject(bus, slot))

        task = asyncio.ensure_future(answer())
        self._timers.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._timers.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a delayed removal failed", exc_info=task.exception())

    def close(self) -> None:
        """Forget removals that still wait for their time."""
        for task in self._timers:
            task.cancel()


def _names(device: Device) -> dict[str, Any]:
    if device.device_id is None:
        return {"path": device.path}
    return {"device": device.device_id, "path": device.path}
