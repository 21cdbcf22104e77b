"""The types of device properties: how a value is read from JSON or from key=value text.

Two ways lead in: `device_add` over QMP and JSON on the command line are strictly typed, while
key=value text (`-device virtio-blk-pci,num-queues=4`, the human monitor) is parsed as strings.
Texts: as the reference (qapi visitors, hw/core/qdev-properties*.c).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from qmpd.errors import CommandError, ValidationError
from qmpd.qapi import keyval
from qmpd.units import is_power_of_two

MIN_BLOCK_SIZE = 512
MAX_BLOCK_SIZE = 2 << 20
ON_OFF_AUTO = ("on", "off", "auto")
ON_ERROR = ("report", "ignore", "enospc", "stop", "auto")
ATA_TRANSLATION = ("auto", "none", "lba", "large", "rechs")
LINK_SPEED = ("2_5", "5", "8", "16", "32", "64")
LINK_WIDTH = ("1", "2", "4", "8", "12", "16", "32")
_INT64 = range(-(1 << 63), 1 << 63)


class Owner(Protocol):
    """The object that has the property, for error texts."""

    @property
    def type_name(self) -> str:
        """Its QOM type."""


Parse = Callable[[Owner, str, Any, bool], Any]
"""(owner, property name, value, value is key=value text) -> the value kept. Raises QmpdError."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of property.

    wire         its name in device-list-properties and qom-list
    parse        reads a value
    description  what device-list-properties says about every property of this type
    empty        the value of one that was never set and has no default
    """

    wire: str
    parse: Parse | None
    description: str | None = None
    empty: Any = None


def _wrong_type(name: str, expected: str) -> ValidationError:
    return ValidationError(f"Invalid parameter type for '{name}', expected: {expected}")


def parse_bool(_owner: Owner, name: str, value: Any, text: bool) -> bool:
    """Read a boolean; as text on/off, yes/no, true/false, y/n."""
    if text:
        if value not in keyval.BOOLEANS:
            raise ValidationError(f"Parameter '{name}' expects 'on' or 'off'")
        return keyval.BOOLEANS[value]
    if not isinstance(value, bool):
        raise _wrong_type(name, "boolean")
    return value


def parse_str(_owner: Owner, name: str, value: Any, _text: bool) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise _wrong_type(name, "string")
    return value


def _uint(bits: int) -> Parse:
    def parse(_owner: Owner, name: str, value: Any, text: bool) -> int:
        number = _unsigned(name, value, text)
        if number >= 1 << bits:
            raise ValidationError(f"Parameter '{name}' expects uint{bits}_t")
        return number

    return parse


def _unsigned(name: str, value: Any, text: bool) -> int:
    """Read a 64 bit unsigned integer; a negative one wraps."""
    if text:
        parsed = keyval.parse_uint64(value)
        if parsed is None:
            raise ValidationError(f"Parameter '{name}' expects integer")
        number = parsed
    elif isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 64:
        raise ValidationError(f"Parameter '{name}' expects uint64")
    else:
        number = value
    return number % (1 << 64)


def parse_int32(_owner: Owner, name: str, value: Any, text: bool) -> int:
    """Read a signed integer of 32 bits."""
    if text:
        parsed = keyval.parse_int64(value)
        if parsed is None:
            raise ValidationError(f"Parameter '{name}' expects integer")
        number = parsed
    elif isinstance(value, bool) or not isinstance(value, int) or value not in _INT64:
        raise _wrong_type(name, "integer")
    else:
        number = value
    if not -(1 << 31) <= number < 1 << 31:
        raise ValidationError(f"Parameter '{name}' expects int32_t")
    return number


def parse_size_property(_owner: Owner, name: str, value: Any, text: bool) -> int:
    """Read a size in bytes; as text with an optional suffix."""
    if not text:
        return _unsigned(name, value, text=False)
    size = keyval.parse_size(value)
    if size is None:
        raise ValidationError(f"Parameter '{name}' expects size")
    return size


def _size32(owner: Owner, name: str, value: Any, text: bool) -> int:
    number = parse_size_property(owner, name, value, text)
    if number >= 1 << 32:
        raise CommandError(f"Property {owner.type_name}.{name} doesn't take value {number} (maximum: {(1 << 32) - 1})")
    return number


def _block_size(owner: Owner, name: str, value: Any, text: bool) -> int:
    number = parse_size_property(owner, name, value, text)
    if number and not (MIN_BLOCK_SIZE <= number <= MAX_BLOCK_SIZE and is_power_of_two(number)):
        raise CommandError(f"parameter {name} must be a power of 2 between {MIN_BLOCK_SIZE} and {MAX_BLOCK_SIZE}")
    return number


def _enum(members: tuple[str, ...]) -> Parse:
    def parse(owner: Owner, name: str, value: Any, text: bool) -> str:
        chosen = parse_str(owner, name, value, text)
        if chosen not in members:
            raise ValidationError(f"Parameter '{name}' does not accept value '{chosen}'")
        return chosen

    return parse


def parse_pci_address(owner: Owner, name: str, value: Any, text: bool) -> int:
    """Read a PCI address, SLOT or SLOT.FUNCTION in hexadecimal or both in one number.

    Returns slot * 8 + function; -1 lets the bus choose.
    """
    if not text and not isinstance(value, str):
        if isinstance(value, float):
            raise _wrong_type(name, "integer")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValidationError(f"Invalid parameter type for '{name}', expected int or str")
        if not -1 <= value <= 255:
            raise ValidationError(f"Parameter '{name}' expects a value between -1 and 255")
        return value
    match = re.fullmatch(r"\s*\+?(?:0[xX])?([0-9a-fA-F]+)(?:\.\s*\+?(?:0[xX])?([0-9a-fA-F]+))?", value)
    slot, function = (int(match[1], 16), int(match[2] or "0", 16)) if match else (-1, 0)
    if not 0 <= slot <= 31 or function > 7:
        raise CommandError(f"Property '{owner.type_name}.{name}' doesn't take value '{value}'")
    return slot * 8 + function


def _iothread_mapping(_owner: Owner, name: str, value: Any, text: bool) -> list[dict[str, Any]]:
    if text or not isinstance(value, list):
        raise _wrong_type(name, "array")
    for index, entry in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(entry, dict):
            raise _wrong_type(place, "object")
        if "iothread" not in entry:
            raise ValidationError(f"Parameter '{place}.iothread' is missing")
        if not isinstance(entry["iothread"], str):
            raise _wrong_type(f"{place}.iothread", "string")
        queues = entry.get("vqs", [])
        if not isinstance(queues, list):
            raise _wrong_type(f"{place}.vqs", "array")
        for queue in queues:
            if _unsigned("null", queue, text=False) >= 1 << 16:
                raise ValidationError("Parameter 'null' expects uint16_t")
        for member in entry:
            if member not in ("iothread", "vqs"):
                raise ValidationError(f"Parameter '{place}.{member}' is unexpected")
    return value


KINDS: dict[str, Kind] = {
    "bool": Kind("bool", parse_bool, "on/off", False),
    "attached": Kind("bool", None, None, False),
    "str": Kind("str", parse_str, None, ""),
    "uint8": Kind("uint8", _uint(8), None, 0),
    "uint16": Kind("uint16", _uint(16), None, 0),
    "uint32": Kind("uint32", _uint(32), None, 0),
    "uint64": Kind("uint64", _uint(64), None, 0),
    "int32": Kind("int32", parse_int32, None, 0),
    "bootindex": Kind("int32", parse_int32, None, -1),
    "size": Kind("size", parse_size_property, None, 0),
    "bounce": Kind(
        "size",
        parse_size_property,
        "Maximum buffer size allocated for bounce buffers used for mapped access to indirect DMA memory",
        0,
    ),
    "size32": Kind("size", _size32, None, 0),
    "blocksize": Kind("size", _block_size, "A power of two between 512 B and 2 MiB", 0),
    "onoffauto": Kind("OnOffAuto", _enum(ON_OFF_AUTO), "on/off/auto", "auto"),
    "onerror": Kind(
        "BlockdevOnError", _enum(ON_ERROR), "Error handling policy (report/ignore/enospc/stop/auto)", "auto"
    ),
    "translation": Kind(
        "BiosAtaTranslation",
        _enum(ATA_TRANSLATION),
        "Logical CHS translation algorithm  (auto/none/lba/large/rechs)",
        "auto",
    ),
    "linkspeed": Kind("PCIELinkSpeed", _enum(LINK_SPEED), "2_5/5/8/16/32/64", "16"),
    "linkwidth": Kind("PCIELinkWidth", _enum(LINK_WIDTH), "1/2/4/8/12/16/32", "32"),
    "pciaddr": Kind("str", parse_pci_address, "Slot and optional function number, example: 06.0 or 06", -1),
    "busnr": Kind("busnr", None, None, 0),
    "drive": Kind("str", parse_str, "Node name or ID of a block device to use as a backend", ""),
    "iothread": Kind("link<iothread>", parse_str, None, ""),
    "vqmapping": Kind(
        "IOThreadVirtQueueMappingList",
        _iothread_mapping,
        'IOThread virtqueue mapping list [{"iothread":"<id>", "vqs":[1,2,3,...]},...]',
        [],
    ),
}
"""Every type by the short name that the tables use."""
