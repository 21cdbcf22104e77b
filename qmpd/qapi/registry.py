"""What plug-ins declare with decorators, and how they are found.

A plug-in is a module of `drivers`, `objects`, `exports`, `jobtypes`, `devices` or `commands`; it
names its schema entry in a decorator, and `discover()` imports all of them in sorted order.
Files whose name starts with an underscore are helpers and are not imported here. Whether the code
and the schema agree is proven by `qmpd.qapi.check`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

PLUGIN_PACKAGES = ("drivers", "objects", "exports", "jobtypes", "devices", "commands")

T = TypeVar("T")
Handler = Callable[..., Any]


class CommandEntry(NamedTuple):
    """A QMP command: its wire name and `async def handler(ctx, *, snake_case_arguments)`."""

    name: str
    handler: Handler


class ClassEntry(NamedTuple):
    """A driver, object type, export type, job type, device or kind of endpoint: a class behind a schema entry.

    name     the tag on the wire ("qcow2", "secret", "virtio-blk-pci")
    cls      the implementing class
    schema   the QAPI struct of its options, "" where the schema has none (devices, endpoints)
    options  the frozen dataclass those options become
    """

    name: str
    cls: type[Any]
    schema: str
    options: type[Any] | None


@dataclass(slots=True, eq=False, repr=False)
class Registry:
    """Everything that was declared, by kind and wire name."""

    commands: dict[str, CommandEntry] = field(default_factory=dict)
    drivers: dict[str, ClassEntry] = field(default_factory=dict)
    qom_types: dict[str, ClassEntry] = field(default_factory=dict)
    creators: dict[str, ClassEntry] = field(default_factory=dict)
    exports: dict[str, ClassEntry] = field(default_factory=dict)
    jobtypes: dict[str, ClassEntry] = field(default_factory=dict)
    devices: dict[str, ClassEntry] = field(default_factory=dict)
    endpoints: dict[str, ClassEntry] = field(default_factory=dict)


registry = Registry()


def _add(table: dict[str, Any], kind: str, name: str, entry: Any) -> None:
    if name in table:
        raise RuntimeError(f"{kind} '{name}' is declared twice")
    table[name] = entry


def command(name: str) -> Callable[[T], T]:
    """Declare the decorated coroutine function as the handler of the QMP command `name`."""

    def declare(handler: T) -> T:
        _add(registry.commands, "command", name, CommandEntry(name, handler))  # type: ignore[arg-type]
        return handler

    return declare


def _class_decorator(
    table: dict[str, ClassEntry], kind: str, name: str, schema: str, options: type[Any] | None
) -> Callable[[type[T]], type[T]]:
    def declare(cls: type[T]) -> type[T]:
        _add(table, kind, name, ClassEntry(name, cls, schema, options))
        return cls

    return declare


def driver(name: str, *, schema: str, options: type[Any]) -> Callable[[type[T]], type[T]]:
    """Declare a block driver: a `BlockNode` class; `schema` is its branch of BlockdevOptions."""
    declare = _class_decorator(registry.drivers, "driver", name, schema, options)

    def named(cls: type[T]) -> type[T]:
        cls.driver_name = name  # type: ignore[attr-defined]
        return declare(cls)

    return named


def creator(name: str, *, schema: str, options: type[Any]) -> Callable[[type[T]], type[T]]:
    """Declare how the driver `name` makes an image: a class with `create(options)`.

    It is made with the graph as its argument; `schema` is its branch of BlockdevCreateOptions.
    """
    return _class_decorator(registry.creators, "creator", name, schema, options)


def qom_type(name: str, *, schema: str, options: type[Any]) -> Callable[[type[T]], type[T]]:
    """Declare a user-creatable object type; `schema` is its branch of ObjectOptions."""
    return _class_decorator(registry.qom_types, "object type", name, schema, options)


def export(name: str, *, schema: str, options: type[Any]) -> Callable[[type[T]], type[T]]:
    """Declare an export type; `schema` is its branch of BlockExportOptions."""
    return _class_decorator(registry.exports, "export", name, schema, options)


def jobtype(name: str, *, schema: str = "", options: type[Any] | None = None) -> Callable[[type[T]], type[T]]:
    """Declare a job type, for `blockdev-create` branches and the long-running commands."""
    return _class_decorator(registry.jobtypes, "job type", name, schema, options)


def device(name: str) -> Callable[[type[T]], type[T]]:
    """Declare a device model for `device_add`; its properties are checked by the machine core."""
    return _class_decorator(registry.devices, "device", name, "", None)


def endpoint(name: str) -> Callable[[type[T]], type[T]]:
    """Declare what makes endpoints of plugged disks: an `EndpointFactory`, by its word in `--guest plug=`."""
    return _class_decorator(registry.endpoints, "endpoint", name, "", None)


def discover(packages: tuple[str, ...] = PLUGIN_PACKAGES) -> Registry:
    """Import every plug-in module and return the registry; importing twice does nothing."""
    for package in packages:
        root = importlib.import_module(f"qmpd.{package}")
        for module in sorted(info.name for info in pkgutil.iter_modules(root.__path__)):
            if not module.startswith("_"):
                importlib.import_module(f"qmpd.{package}.{module}")
    return registry
