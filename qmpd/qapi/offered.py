"""What one program offers, by name, before the plug-ins behind the names are imported.

`declared()` reads the names in the plug-ins' source, which takes a hundredth of a second; importing all of
them takes a third. The first look at an entry imports its module. `load_rest` brings in what nobody asked
for yet, piece by piece once the daemon serves: nothing is imported from a package that was replaced in the
meantime, and what a client asks for first does not wait.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from qmpd.qapi.registry import PLUGIN_PACKAGES, Registry, registry

T = TypeVar("T")

TABLES = {
    "command": "commands",
    "driver": "drivers",
    "creator": "creators",
    "qom_type": "qom_types",
    "export": "exports",
    "jobtype": "jobtypes",
    "device": "devices",
    "endpoint": "endpoints",
}
"""Decorator of a plug-in -> table of the registry."""

_DECLARATION = re.compile(rf'^@({"|".join(TABLES)})\(\s*"([^"]+)"', re.MULTILINE)


def declared(packages: tuple[str, ...] = PLUGIN_PACKAGES) -> dict[str, dict[str, str]]:
    """Return table -> wire name -> module, as the source says it, in the order in which `discover` meets them.

    A name counts if the decorator begins its line and the name stands in it as a plain string.
    """
    tables: dict[str, dict[str, str]] = {table: {} for table in TABLES.values()}
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for package in packages:
        folder = os.path.join(root, package)
        for module in sorted(file[:-3] for file in os.listdir(folder) if file.endswith(".py") and file[0] != "_"):
            with open(os.path.join(folder, f"{module}.py"), encoding="utf-8") as source:
                for decorator, name in _DECLARATION.findall(source.read()):
                    tables[TABLES[decorator]][name] = f"qmpd.{package}.{module}"
    return tables


class Offered(dict[str, T]):
    """A table of the registry whose entries come when they are looked at.

    All that asks for names only (`in`, iteration, `len`) imports nothing.
    """

    def __init__(self, modules: Mapping[str, str], entry: Callable[[str, str], T]) -> None:
        """Make a table.

        modules  wire name -> module that declares it
        entry    returns the entry of a name and module; what it raises, the lookup raises
        """
        super().__init__()
        self.modules = modules
        self._entry = entry

    def __missing__(self, name: str) -> T:
        module = self.modules.get(name)
        if module is None:
            raise KeyError(name)
        found = self._entry(name, module)
        self[name] = found
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """Return the entry of `name`, imported if need be, or `default` without one."""
        return self[name] if name in self.modules else default

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def keys(self) -> Any:
        """Return the names."""
        return self.modules.keys()

    def values(self) -> Any:
        """Return all entries, imported."""
        return [self[name] for name in self.modules]

    def items(self) -> Any:
        """Return all names with their entries, imported."""
        return [(name, self[name]) for name in self.modules]


def declared_entry(table: str, check: Callable[[str, Any], None]) -> Callable[[str, str], Any]:
    """Return what gets an entry of `table` for `Offered`: imports its module, then has the entry checked."""

    def entry(name: str, module: str) -> Any:
        importlib.import_module(module)
        found = getattr(registry, table)[name]
        check(table, found)
        return found

    return entry


@functools.cache
def lazily(packages: tuple[str, ...]) -> Registry:
    """Return what the plug-ins of `packages` declare, each imported when it is looked at, and not checked."""
    modules = declared(packages)
    tables: dict[str, Any] = {
        table: Offered(modules[table], declared_entry(table, lambda _, entry: None)) for table in TABLES.values()
    }
    return Registry(**tables)


def load_rest(offered: Registry) -> Iterator[tuple[str, Exception | None]]:
    """Import what nobody asked for yet, one module at each step; yields its name and what went wrong, if anything."""
    for table in TABLES.values():
        entries: Offered[Any] = getattr(offered, table)
        last = ""
        for name, module in entries.modules.items():
            try:
                entries[name]
            except Exception as error:  # noqa: BLE001 - told to the caller; the others are loaded all the same
                yield module, error
            else:
                if module != last:
                    yield module, None
            last = module
