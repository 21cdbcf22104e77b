"""Options of `qmpd` that describe the modelled machine; what only a guest could feel is checked and dropped.

Texts as the system emulator's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qmpd.daemon.config import Configurator, read_tree
from qmpd.daemon.keyval import Opts, parse_bool, parse_keyval, parse_opts
from qmpd.daemon.log import Complaints
from qmpd.daemon.options import Given
from qmpd.errors import CommandError
from qmpd.machine.options import (
    GuestPolicy,
    MachineOptions,
    parse_machine,
    parse_uuid,
    resolve_machine,
)
from qmpd.monitor.dispatch import CommandContext
from qmpd.qapi.keyval import parse_int64, parse_size

SIZE_HINT = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."


@dataclass(slots=True)
class SystemOptions:
    """What was read so far."""

    machine: str = "pc"
    usb: bool = False
    kvm: bool = False
    name: str | None = None
    uuid: str | None = None
    paused: bool = False
    guest: list[str] = field(default_factory=list)

    def build(self) -> MachineOptions:
        """Return the machine's options. Raises CommandError for a machine there is not."""
        board, machine_type = resolve_machine(self.machine)
        known = {} if self.uuid is None else {"uuid": self.uuid}
        return MachineOptions(
            board=board,
            machine_type=machine_type,
            name=self.name,
            paused=self.paused,
            usb=self.usb,
            kvm=self.kvm,
            guest=GuestPolicy.parse(self.guest),
            **known,
        )


def take(options: SystemOptions, complaints: Complaints, given: Given) -> None:
    """Note one option. Raises CommandError with the reference's text."""
    value = given.value
    match given.name:
        case "machine" | "M":
            _take_machine(options, value)
        case "accel":
            name = parse_opts(value, "accel").as_dict().get("accel", "")
            if name not in ("kvm", "tcg", "qtest"):
                raise CommandError(f"invalid accelerator {name}")
            options.kvm = options.kvm or name == "kvm"
        case "name":
            options.name = _checked(value, "guest", "guest", "process", "debug-threads").get("guest")
        case "uuid":
            options.uuid = parse_uuid(value)
        case "smp":
            check_cpus(value)
        case "m":
            check_ram(value)
        case "S":
            options.paused = True
        case "guest":
            GuestPolicy.parse([value])
            options.guest.append(value)
        case "msg":
            complaints.timestamps = parse_bool(
                "timestamp", _checked(value, None, "timestamp", "guest-name").get("timestamp", "off")
            )
        case _:
            pass


def _checked(text: str, implied: str | None, *known: str) -> dict[str, str]:
    opts: Opts = parse_opts(text, implied)
    opts.check(frozenset(known))
    return opts.as_dict()


def _take_machine(options: SystemOptions, text: str) -> None:
    choice = parse_machine(text)
    if choice.name is not None:
        options.machine = choice.name
    if choice.usb is not None:
        options.usb = choice.usb
    if choice.kvm is not None:
        options.kvm = choice.kvm


def check_cpus(text: str) -> None:
    """Check the numbers of an -smp option. Raises CommandError."""
    tree, _ = parse_keyval(text, "cpus")
    for key, value in tree.items():
        number = parse_int64(value) if isinstance(value, str) else None
        if number is None:
            raise CommandError(f"Parameter 'smp.{key}' expects integer")
        if number <= 0:
            raise CommandError("Invalid CPU topology: CPU topology parameters must be greater than zero")


def check_ram(text: str) -> None:
    """Check the size of an -m option. Raises CommandError."""
    size = _checked(text, "size", "size", "slots", "maxmem").get("size")
    if size is not None and parse_size(size) is None:
        raise CommandError("Parameter 'size' expects a non-negative number below 2^64", hint=SIZE_HINT)


def read_device(text: str) -> tuple[dict[str, Any], bool]:
    """Return the properties of a -device option, and whether they are text (key=value) or JSON values.

    Raises CommandError.
    """
    if text.startswith("{"):
        tree, _, _ = read_tree(text, None)
        return tree, False
    return dict(parse_opts(text, "driver").pairs), True


async def add_device(configure: Configurator, ctx: CommandContext, value: tuple[dict[str, Any], bool]) -> None:
    """Make the device of a -device option that was read."""
    properties, is_text = value
    await configure.add_device(ctx, properties, is_text)
