"""Device: what sits on a bus, with a table of typed properties.

Life of one: made, properties set, placed and `realize`d by the machine, later `unrealize`d and
taken out of the tree. Model: DeviceState (QEMU hw/core/qdev.c); texts as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qmpd.errors import CommandError
from qmpd.machine.bus import Bus
from qmpd.machine.property_tables import DeviceProperty
from qmpd.machine.property_types import KINDS
from qmpd.qom.object import Property, QomObject

if TYPE_CHECKING:
    from qmpd.machine.machine import Machine

_STATE = ("realized", "hotplugged", "hotpluggable")
_ALWAYS_SETTABLE = (KINDS["bootindex"], KINDS["drive"])


class Device(QomObject):
    """A device.

    bus_type       type of the bus it wants, "" for none
    hotpluggable   may come and go while the machine exists
    user_creatable device_add may make it
    places_itself  `realize` takes the place on the bus, not the machine before it
    table          its properties, beside those every device has
    device_id      the id given to it, None if it has none
    values         value of each property of `table`
    pending_unplug the guest was asked to let go of it
    """

    qom_type: ClassVar[str] = "device"
    abstract = True
    bus_type: ClassVar[str] = ""
    hotpluggable: ClassVar[bool] = True
    user_creatable: ClassVar[bool] = True
    places_itself: ClassVar[bool] = False
    table: ClassVar[Mapping[str, DeviceProperty]] = {}

    def __init__(self, machine: Machine, *, hotplugged: bool = False) -> None:
        super().__init__()
        self.machine = machine
        self.device_id: str | None = None
        self.bus: Bus | None = None
        self.hotplugged = hotplugged
        self.realized = False
        self.values: dict[str, Any] = {name: one.initial for name, one in self.table.items()}
        self.pending_unplug = False
        self.pending_until_ms = 0

    # --- names ------------------------------------------------------------------------------

    @property
    def shown_id(self) -> str:
        """The id in texts of the bus."""
        return "(null)" if self.device_id is None else self.device_id

    @property
    def qdev(self) -> str:
        """How query-block and events name it: the id, or the path of one without."""
        return self.device_id or self.path

    @property
    def child_buses(self) -> list[Bus]:
        """Its buses, newest first, as the reference searches them."""
        return [one for one in reversed(self.children.values()) if isinstance(one, Bus)]

    @property
    def child_devices(self) -> list[Device]:
        """Devices that are a part of this one."""
        return [one for one in self.children.values() if isinstance(one, Device)]

    # --- properties -------------------------------------------------------------------------

    def properties(self) -> dict[str, Property]:
        """See `QomObject.properties`."""
        table = super().properties()
        table |= {
            "parent_bus": Property("parent_bus", "link<bus>", lambda _d: self.bus.path if self.bus else ""),
            "realized": Property("realized", "bool", lambda _d: self.realized, self._set("realized")),
            "hotplugged": Property("hotplugged", "bool", lambda _d: self.hotplugged),
            "hotpluggable": Property("hotpluggable", "bool", lambda _d: self._may_leave()),
        }
        for one in self.table.values():
            table[one.name] = Property(one.name, one.kind.wire, self._get(one.name), self._set(one.name))
        return table

    def _may_leave(self) -> bool:
        return self.hotpluggable and (self.bus is None or self.bus.hotpluggable)

    def _get(self, name: str) -> Callable[[QomObject], Any]:
        return lambda _device: self.read(name)

    def _set(self, name: str) -> Callable[[QomObject, Any], None]:
        return lambda _device, value: self.assign(name, value)

    def read(self, name: str) -> Any:
        """Return the JSON value of a property of `table`."""
        return self.values[name]

    def link_target(self, name: str) -> QomObject | None:
        """See `QomObject.link_target`."""
        return self.bus if name == "parent_bus" else None

    def find_owner(self, name: str) -> Device:
        """Return the object that really has the property `name`: this one or a part of it."""
        return self

    def assign(self, name: str, value: Any, *, text: bool = False) -> None:
        """Set a property from a JSON value, or from key=value text. Raises QmpdError."""
        owner = self.find_owner(name)
        if owner is not self:
            owner.assign(name, value, text=text)
            return
        spec = self.table.get(name)
        if name == "realized":
            self._assign_realized(KINDS["bool"].parse(self, name, value, text))  # type: ignore[misc]
        elif spec is None and name not in self.properties():
            raise CommandError(f"Property '{self.type_name}.{name}' not found")
        elif spec is None or spec.kind.parse is None:
            raise CommandError(f"Property '{self.type_name}.{name}' is not writable")
        else:
            if self.realized and spec.kind not in _ALWAYS_SETTABLE:
                if spec.kind is KINDS["iothread"]:
                    self.machine.iothread_path(spec.kind.parse(self, name, value, text))
                raise self._too_late(name, link=spec.kind is KINDS["iothread"])
            self.store(spec, spec.kind.parse(self, name, value, text))

    def store(self, spec: DeviceProperty, value: Any) -> None:
        """Keep a parsed value; subclasses act on those that mean more than their value."""
        if spec.kind is KINDS["bootindex"]:
            self.machine.claim_bootindex(self, value)
        elif spec.kind is KINDS["iothread"]:
            value = self.machine.iothread_path(value)
        self.values[spec.name] = value

    def _assign_realized(self, wanted: bool) -> None:
        if wanted != self.realized:
            raise CommandError(f"Property '{self.type_name}.realized' cannot be changed; use device_add and device_del")

    def _too_late(self, name: str, *, link: bool) -> CommandError:
        if link:
            which, what = f"device '{self.shown_id}'", "link property"
        else:
            which = "anonymous device" if self.device_id is None else f"device '{self.device_id}'"
            what = "property"
        return CommandError(
            f"Attempt to set {what} '{name}' on {which} (type '{self.type_name}') after it was realized"
        )

    @classmethod
    def list_properties(cls) -> list[dict[str, Any]]:
        """Return DevicePropertyInfo (wire) of the properties that device_add takes."""
        return [one.to_wire() for one in cls.table.values()]

    @classmethod
    def type_properties(cls) -> dict[str, Property]:
        """Return every property of an instance, for qom-list-properties."""
        fixed = (("type", "string"), ("parent_bus", "link<bus>"), *((name, "bool") for name in _STATE))
        found = {name: Property(name, kind) for name, kind in fixed}
        for row in cls.list_properties():
            found[row["name"]] = Property(
                row["name"], row["type"], description=row.get("description"), default=row.get("default-value")
            )
        return found

    # --- life -------------------------------------------------------------------------------

    async def realize(self) -> None:
        """Check the properties against each other and acquire what they ask for.

        Raises QmpdError; `unrealize` is called in any case. The device is in the tree, its bus is
        known, its place on it is taken (PCI devices take theirs here).
        """

    async def unrealize(self) -> None:
        """Release everything; called once, also if `realize` failed or was never reached."""

    def reset(self) -> None:
        """The machine was reset."""


class FixedDevice(Device):
    """A device of the board: it takes an address and carries buses, nothing else.

    shown_type   its QOM type
    """

    qom_type = "board-device"
    hotpluggable = False
    user_creatable = False

    def __init__(self, machine: Machine, shown_type: str, address: int = -1) -> None:
        super().__init__(machine)
        self.shown_type = shown_type
        self.values |= {"addr": address, "multifunction": True}
        self.realized = True

    @property
    def type_name(self) -> str:
        """See `QomObject.type_name`."""
        return self.shown_type
