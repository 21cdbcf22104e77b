"""What the command line says about the machine: type, name, uuid, and how its guest behaves."""

from __future__ import annotations

import re
import uuid as uuids
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from qmpd.errors import CommandError
from qmpd.qapi import keyval

LATEST = "10.0"
_VERSIONED = re.compile(r"pc-(i440fx|q35)-(2\.(?:[4-9]|1[0-2])|[3-9]\.[0-2]|4\.0\.1|10\.0)")
_ACCELERATORS = ("kvm", "tcg", "xen", "qtest")
NIL_UUID = "00000000-0000-0000-0000-000000000000"


class Unplug(Enum):
    """What the modelled guest does when it is asked to let go of a device.

    ACK     agrees at once
    DELAY   agrees after a while
    RESET   never answers; the next reset of the machine settles it
    REFUSE  says no
    """

    ACK = "ack"
    DELAY = "delay"
    RESET = "reset"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class GuestPolicy:
    """The guest's behaviour (`--guest`).

    delay_ms   milliseconds that Unplug.DELAY takes
    plug       kind and directory of the endpoints that disks get, ("nbd", "/run/disks"); None for no endpoints
    """

    unplug: Unplug = Unplug.ACK
    delay_ms: int = 0
    plug: tuple[str, str] | None = None

    @classmethod
    def parse(cls, texts: Iterable[str]) -> GuestPolicy:
        """Read the key=value lists of all `--guest` options; later keys win. Raises CommandError."""
        policy = cls()
        for text in texts:
            for item in filter(None, text.split(",")):
                key, equals, value = item.partition("=")
                if key == "unplug" and equals:
                    policy = policy._with_unplug(value)
                elif key == "plug" and equals:
                    policy = policy._with_plug(value)
                else:
                    raise CommandError(f"Invalid parameter '{key}'")
        return policy

    def _with_unplug(self, value: str) -> GuestPolicy:
        word, colon, amount = value.partition(":")
        if word == Unplug.DELAY.value and amount.isascii() and amount.isdigit():
            return replace(self, unplug=Unplug.DELAY, delay_ms=int(amount))
        if colon or word not in (one.value for one in Unplug if one is not Unplug.DELAY):
            raise CommandError(f"Parameter 'unplug' does not accept value '{value}'")
        return replace(self, unplug=Unplug(word), delay_ms=0)

    def _with_plug(self, value: str) -> GuestPolicy:
        kind, _, directory = value.partition(":")
        if not kind or not directory:
            raise CommandError(f"Parameter 'plug' does not accept value '{value}'")
        return replace(self, plug=(kind, directory))


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """The machine to model.

    board     "pc", "q35" or "none"          machine_type  its QOM type
    name      None if none was given         uuid          canonical text
    paused    start in prelaunch (-S)        usb           with a USB controller
    kvm       the command line asks for KVM  guest         see GuestPolicy
    """

    board: str = "pc"
    machine_type: str = f"pc-i440fx-{LATEST}-machine"
    name: str | None = None
    uuid: str = NIL_UUID
    paused: bool = False
    usb: bool = False
    kvm: bool = False
    guest: GuestPolicy = field(default_factory=GuestPolicy)


@dataclass(frozen=True, slots=True)
class MachineChoice:
    """What one `-machine` option says; None where it says nothing."""

    name: str | None = None
    usb: bool | None = None
    kvm: bool | None = None


def parse_machine(text: str) -> MachineChoice:
    """Read a `-machine` option: NAME or type=NAME, accel=A:B, usb=on|off, and what changes nothing here.

    Raises CommandError.
    """
    name: str | None = None
    usb: bool | None = None
    kvm: bool | None = None
    for index, item in enumerate(filter(None, text.split(","))):
        key, equals, value = item.partition("=")
        if key == "type" or (index == 0 and not equals):
            name = value if equals else key
        elif key == "accel":
            for one in value.split(":"):
                if one not in _ACCELERATORS:
                    raise CommandError(f"invalid accelerator {one}")
            kvm = "kvm" in value.split(":")
        elif key == "usb":
            if value not in keyval.BOOLEANS:
                raise CommandError("Parameter 'usb' expects 'on' or 'off'")
            usb = keyval.BOOLEANS[value]
    return MachineChoice(name, usb, kvm)


def resolve_machine(name: str) -> tuple[str, str]:
    """Return board and QOM type of the machine called `name`. Raises CommandError."""
    full = {"pc": f"pc-i440fx-{LATEST}", "q35": f"pc-q35-{LATEST}"}.get(name, name)
    if full == "none":
        return "none", "none-machine"
    match = _VERSIONED.fullmatch(full)
    if match is None:
        raise CommandError(f'unsupported machine type: "{name}"', hint="Use -machine help to list supported machines")
    return "q35" if match[1] == "q35" else "pc", f"{full}-machine"


def parse_uuid(text: str) -> str:
    """Return the canonical form of a UUID. Raises CommandError."""
    try:
        if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
            raise ValueError(text)
        return str(uuids.UUID(text))
    except ValueError as error:
        raise CommandError("failed to parse UUID string: wrong format") from error
