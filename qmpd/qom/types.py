"""The table of QOM types behind qom-list-types and qom-list-properties.

It holds what this program really has: the object types of the registry with their base types, and
what the machine adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmpd.errors import CommandError, DeviceNotFound
from qmpd.qapi.registry import Registry
from qmpd.qom.object import Container, Property, QomObject, type_chain, type_properties


@dataclass(frozen=True, slots=True, eq=False)
class TypeInfo:
    """One type.

    parent      name of the parent type, None for the two roots (object, interface)
    interfaces  interface types it adds to its parent's
    properties  all of them, inherited ones included; None for interfaces, which have none to show
    """

    name: str
    parent: str | None
    abstract: bool = False
    interfaces: tuple[str, ...] = ()
    properties: Mapping[str, Property] | None = field(default_factory=dict)


_INTERFACES = (
    TypeInfo("interface", None, abstract=True, properties=None),
    TypeInfo("user-creatable", "interface", abstract=True, properties=None),
)


class TypeTable:
    """Types by name: the registry's, read when asked for, and those that were added."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._added: dict[str, TypeInfo] = {}
        self._later: list[Callable[[], Iterable[TypeInfo]]] = []

    def add(self, info: TypeInfo) -> None:
        """Add a type that no class of the registry stands for (machine and device types)."""
        self._added[info.name] = info

    def add_later(self, infos: Callable[[], Iterable[TypeInfo]]) -> None:
        """Add what `infos` returns once somebody asks about types: to know them may take imports."""
        self._later.append(infos)

    def add_class(self, cls: type[QomObject]) -> None:
        """Add a class and its bases."""
        for info in _class_infos(cls):
            self._added.setdefault(info.name, info)

    def _all(self) -> dict[str, TypeInfo]:
        while self._later:
            for info in self._later[0]():
                self.add(info)
            del self._later[0]
        table = {info.name: info for info in _INTERFACES}
        classes: Iterable[type[Any]] = (Container, *(entry.cls for entry in self._registry.qom_types.values()))
        for cls in classes:
            for info in _class_infos(cls):
                table.setdefault(info.name, info)
        table.update(self._added)
        return table

    def implements(self, name: str, wanted: str) -> bool:
        """Say whether the type `name` is `wanted` or descends from it, by parent or interface."""
        return wanted in _ancestry(self._all(), name)

    def list_types(self, implements: str | None, abstract: bool) -> list[dict[str, Any]]:
        """Return ObjectTypeInfo (wire) of all types that implement `implements`."""
        table = self._all()
        rows: list[dict[str, Any]] = []
        for info in table.values():
            if info.abstract and not abstract:
                continue
            if implements is not None and implements not in _ancestry(table, info.name):
                continue
            row: dict[str, Any] = {"name": info.name}
            if info.abstract:
                row["abstract"] = True
            if info.parent is not None:
                row["parent"] = info.parent
            rows.append(row)
        return rows

    def list_properties(self, name: str) -> list[dict[str, Any]]:
        """Return ObjectPropertyInfo (wire) of the type `name`. Raises DeviceNotFound, CommandError."""
        info = self._all().get(name)
        if info is None:
            raise DeviceNotFound(f"Class '{name}' not found")
        if info.properties is None:
            raise CommandError("Parameter 'typename' expects a QOM type")
        return [_property_row(one) for one in info.properties.values()]


def _class_infos(cls: type[QomObject]) -> Iterator[TypeInfo]:
    chain = list(type_chain(cls))
    for one, parent in zip(chain, [*chain[1:], None], strict=True):
        yield TypeInfo(
            one.qom_type,
            None if parent is None else parent.qom_type,
            abstract=bool(vars(one).get("abstract", False)),
            interfaces=tuple(vars(one).get("interfaces", ())),
            properties=type_properties(one),
        )


def _ancestry(table: Mapping[str, TypeInfo], name: str) -> set[str]:
    """Return `name` with every type above it."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        info = table.get(current)
        if info is not None:
            waiting.extend(info.interfaces)
            if info.parent is not None:
                waiting.append(info.parent)
    return found


def _property_row(one: Property) -> dict[str, Any]:
    row: dict[str, Any] = {"name": one.name, "type": one.type}
    if one.description is not None:
        row["description"] = one.description
    if one.default is not None:
        row["default-value"] = one.default
    return row
