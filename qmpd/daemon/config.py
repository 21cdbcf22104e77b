"""What the options ask for, done through the same handlers as a client's commands.

Two dialects of values: JSON if it begins with `{`, else key=value text; both end in the schema's own
types, so the command line and QMP cannot drift apart.
"""

from __future__ import annotations

from typing import Any

from qmpd.context import Services
from qmpd.daemon.keyval import parse_keyval
from qmpd.daemon.listen import Monitors
from qmpd.errors import CommandError
from qmpd.monitor.dispatch import CommandContext
from qmpd.protocols.qmp import from_text
from qmpd.protocols.qmp_parser import JsonError
from qmpd.qapi.visit import snake_case, validate, validate_arguments
from qmpd.qom.tree import ID_HINT, id_well_formed


class HelpWanted(Exception):
    """The user asked what there is; `str()` is the answer, for standard output."""


def read_tree(text: str, implied: str | None) -> tuple[Any, bool, bool]:
    """Return the tree a value spells, whether it was key=value text, and whether help was asked for.

    Raises CommandError.
    """
    if text.startswith("{"):
        try:
            return from_text(text), False, False
        except JsonError as error:
            raise CommandError(str(error)) from error
    tree, wanted_help = parse_keyval(text, implied)
    return tree, True, wanted_help


class Configurator:
    """Applies options to a daemon that is being built."""

    def __init__(self, services: Services, monitors: Monitors) -> None:
        self._services = services
        self._monitors = monitors

    def read(self, text: str, implied: str | None, type_name: str) -> dict[str, Any]:
        """Return the value of an option as the schema type `type_name`. Raises CommandError, ValidationError."""
        tree, is_keyval, wanted_help = read_tree(text, implied)
        if wanted_help:
            raise CommandError("Help is not available for this option")
        value = validate(self._services.schema, type_name, tree, keyval=is_keyval)
        assert isinstance(value, dict)
        return value

    def read_object(self, text: str) -> dict[str, Any]:
        """Return the value of -object, checked. Raises HelpWanted besides what `read` raises."""
        tree, is_keyval, wanted_help = read_tree(text, "qom-type")
        if wanted_help:
            raise HelpWanted(self._object_help(tree.get("qom-type")))
        value = validate(self._services.schema, "ObjectOptions", tree, keyval=is_keyval)
        assert isinstance(value, dict)
        if not id_well_formed(value["id"]):
            raise CommandError("Parameter 'id' expects an identifier", hint=ID_HINT)
        return value

    def _object_help(self, qom_type: str | None) -> str:
        schema = self._services.schema
        branches = schema.object_type("ObjectOptions").branches
        names = [name for name in schema.enum("ObjectType").value_names if name in self._services.registry.qom_types]
        if qom_type is None:
            return "List of user creatable objects:\n" + "".join(f"  {name}\n" for name in sorted(names))
        if qom_type not in names:
            raise CommandError(f"invalid object type: {qom_type}")
        lines = [
            f"  {member.name}=<{'string' if member.type == 'str' else member.type}>"
            for member in sorted(schema.members(branches.get(qom_type)))
        ]
        return (
            f"{qom_type} options:\n" + "".join(f"{line}\n" for line in lines)
            if lines
            else (f"There are no options for {qom_type}.\n")
        )

    async def run(self, name: str, ctx: CommandContext, **members: Any) -> Any:
        """Run the handler of a command with validated members. Raises CommandError if there is none."""
        entry = self._services.registry.commands.get(name)
        if entry is None or name not in self._services.schema.commands:
            raise CommandError(f"the command '{name}', which this option stands for, is not available")
        return await entry.handler(ctx, **members)

    async def add_object(self, ctx: CommandContext, value: dict[str, Any]) -> None:
        """Make the object of a -object option that was read."""
        await self.run("object-add", ctx, options=value)

    async def add_blockdev(self, ctx: CommandContext, value: dict[str, Any]) -> None:
        """Make the node of a -blockdev option that was read."""
        await self.run("blockdev-add", ctx, options=value)

    async def add_device(self, ctx: CommandContext, properties: dict[str, Any], is_text: bool) -> None:
        """Make a device; `is_text`: its values are words of key=value text. Raises CommandError."""
        if not is_text:
            properties = validate_arguments(self._services.schema, "device_add", properties)["options"]
        await ctx.machine.device_add(properties, text=is_text)

    async def add_export(self, ctx: CommandContext, value: dict[str, Any]) -> None:
        """Make the export of a --export option that was read."""
        await self.run("block-export-add", ctx, options=value)

    def read_export(self, text: str) -> dict[str, Any]:
        """Return the value of an --export option, checked. Raises CommandError, ValidationError."""
        return self.read(text, "type", "BlockExportOptions")

    async def start_nbd_server(self, ctx: CommandContext, text: str) -> None:
        """Start the NBD server of a --nbd-server option; its address has the flat form here."""
        if "NbdServerOptions" not in self._services.schema.types:
            raise CommandError("the NBD server is not available")
        members = self.read(text, None, "NbdServerOptions")
        address = dict(members.pop("addr"))
        kind = address.pop("type")
        members["addr"] = {"type": kind, "data": address}
        await self.run("nbd-server-start", ctx, **{snake_case(name): value for name, value in members.items()})

    def add_monitor(self, text: str, *, storage: bool) -> None:
        """Put the monitor of a -mon or --monitor option on its character device. Raises CommandError."""
        members = self.read(text, "chardev", "MonitorOptions")
        if members.get("mode", "control" if storage else "readline") != "control":
            raise CommandError("a monitor for people is not available here, say mode=control (and see qmpd-ctl)")
        if members.get("pretty"):
            raise CommandError("indented output (pretty=on) is not available")
        self._monitors.monitor(members["chardev"])
