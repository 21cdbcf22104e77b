"""The handlers of qapi/qom.json: objects of the user, and a look at the QOM tree."""

from __future__ import annotations

from typing import Any

from qmpd.context import Context
from qmpd.errors import CommandError, device_not_found
from qmpd.qapi.registry import command


@command("object-add")
async def object_add(ctx: Context, *, options: dict[str, Any]) -> None:
    """Create an object of any user-creatable type."""
    ctx.objects.create(options)


@command("object-del")
async def object_del(ctx: Context, *, id: str) -> None:
    """Delete an object that `object-add` made."""
    ctx.objects.remove(id)


@command("qom-list")
async def qom_list(ctx: Context, *, path: str) -> list[dict[str, Any]]:
    """List the properties of the object at a path."""
    found, ambiguous = ctx.objects.find(path)
    if ambiguous:
        raise CommandError(f"Path '{path}' is ambiguous")
    if found is None:
        raise device_not_found(path)
    return [{"name": one.name, "type": one.type} for one in found.properties().values()]


@command("qom-get")
async def qom_get(ctx: Context, *, path: str, property: str) -> Any:
    """Read a property."""
    return ctx.objects.resolve(path).get_property(property)


@command("qom-set")
async def qom_set(ctx: Context, *, path: str, property: str, value: Any) -> None:
    """Write a property."""
    ctx.objects.resolve(path).set_property(property, value)


@command("qom-list-types")
async def qom_list_types(
    ctx: Context, *, implements: str | None = None, abstract: bool = False
) -> list[dict[str, Any]]:
    """List the types this program has."""
    return ctx.objects.types.list_types(implements, abstract)


@command("qom-list-properties")
async def qom_list_properties(ctx: Context, *, typename: str) -> list[dict[str, Any]]:
    """List the properties that every object of a type has."""
    return ctx.objects.types.list_properties(typename)
