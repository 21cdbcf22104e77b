"""Commands for people about the machine, its devices and objects."""

from __future__ import annotations

import json
from typing import Any

from qmpd.commands import _hmp_arguments as arguments
from qmpd.commands._hmp_call import qmp
from qmpd.commands._hmp_table import help_text, hmp
from qmpd.context import Context
from qmpd.errors import CommandError
from qmpd.machine.device import Device
from qmpd.qapi.visit import validate


@hmp("help|?", "name:S?", "[cmd]", "show this list, or one command of it")
async def help_(ctx: Context, values: dict[str, Any]) -> str:
    """Show what commands there are."""
    return help_text(values.get("name", ""))


@hmp("stop|s", help="stop the machine")
async def stop(ctx: Context, values: dict[str, Any]) -> str:
    """Stop the machine."""
    ctx.machine.stop()
    return ""


@hmp("cont|c", help="let the machine go on")
async def cont(ctx: Context, values: dict[str, Any]) -> str:
    """Let the machine go on."""
    ctx.machine.cont()
    return ""


@hmp("quit|q", help="end the program")
async def quit_(ctx: Context, values: dict[str, Any]) -> str:
    """End the program."""
    ctx.services.quit("host-qmp-quit")
    return ""


@hmp("system_reset", help="reset the machine")
async def system_reset(ctx: Context, values: dict[str, Any]) -> str:
    """Reset the machine."""
    await ctx.machine.system_reset()
    return ""


@hmp("system_powerdown", help="press the power button")
async def system_powerdown(ctx: Context, values: dict[str, Any]) -> str:
    """Press the power button."""
    ctx.machine.powerdown()
    return ""


@hmp("system_wakeup", help="wake a suspended machine")
async def system_wakeup(ctx: Context, values: dict[str, Any]) -> str:
    """Refuse: this machine never sleeps."""
    raise CommandError("Unable to wake up: guest is not in suspended state")


@hmp("device_add", "device:O", "driver[,prop=value][,...]", "plug a device")
async def device_add(ctx: Context, values: dict[str, Any]) -> str:
    """Plug a device given by key=value text."""
    members: dict[str, str] = values["device"]
    if members.get("driver") in ("help", "?"):
        return "".join(
            f'name "{name}", bus {entry.cls.bus_type}\n'
            for name, entry in sorted(ctx.services.registry.devices.items())
            if entry.cls.user_creatable
        )
    await ctx.machine.device_add(members, text=True)
    return ""


@hmp("device_del", "id:s", "device", "unplug a device")
async def device_del(ctx: Context, values: dict[str, Any]) -> str:
    """Unplug a device, or ask the guest to let go of it."""
    await ctx.machine.device_del(values["id"])
    return ""


@hmp("object_add", "object:S", "[qom-type=]type,id=str[,prop=value][,...]", "make an object")
async def object_add(ctx: Context, values: dict[str, Any]) -> str:
    """Make an object given by key=value text."""
    members = arguments.options(values["object"], "qom-type")
    options = validate(ctx.services.schema, "ObjectOptions", members, keyval=True)
    await qmp(ctx, "object-add", options=options)
    return ""


@hmp("object_del", "id:s", "id", "delete an object")
async def object_del(ctx: Context, values: dict[str, Any]) -> str:
    """Delete an object."""
    await qmp(ctx, "object-del", id=values["id"])
    return ""


@hmp("qom-list", "path:s?", "path", "list the properties of an object")
async def qom_list(ctx: Context, values: dict[str, Any]) -> str:
    """List the properties of an object; without a path, where to begin."""
    if "path" not in values:
        return "/\n"
    rows = await qmp(ctx, "qom-list", path=values["path"])
    return "".join(f"{row['name']} ({row['type']})\n" for row in rows)


@hmp("qom-get", "path:s,property:s", "path property", "show a property of an object")
async def qom_get(ctx: Context, values: dict[str, Any]) -> str:
    """Show a property as JSON."""
    value = await qmp(ctx, "qom-get", path=values["path"], property=values["property"])
    return json.dumps(value, indent=4, ensure_ascii=False) + "\n"


@hmp("qom-set", "json:-j,path:s,property:s,value:S", "[-j] path property value", "set a property of an object")
async def qom_set(ctx: Context, values: dict[str, Any]) -> str:
    """Set a property from JSON (-j) or from text."""
    target, text = ctx.objects.resolve(values["path"]), values["value"]
    if isinstance(target, Device) and not values.get("json"):
        target.assign(values["property"], text, text=True)
        return ""
    value = _json(text) if values.get("json") else _scalar(text)
    await qmp(ctx, "qom-set", path=values["path"], property=values["property"], value=value)
    return ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"JSON parse error, {error}") from error


def _scalar(text: str) -> Any:
    """Return the number or boolean that a word is, else the word."""
    words = {"on": True, "true": True, "off": False, "false": False}
    if text in words:
        return words[text]
    return int(text) if text.lstrip("-").isdigit() else text
