"""Checks on the JSON values that `qom-set` hands to a property, with QEMU's texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qmpd.errors import ValidationError
from qmpd.qapi.hashorder import first_left

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def wrong_type(name: str, expected: str) -> ValidationError:
    """Return the error for a value of another JSON type."""
    return ValidationError(f"Invalid parameter type for '{name}', expected: {expected}")


def string(name: str, value: Any) -> str:
    """Return `value` if it is a string. Raises ValidationError."""
    if not isinstance(value, str):
        raise wrong_type(name, "string")
    return value


def boolean(name: str, value: Any) -> bool:
    """Return `value` if it is true or false. Raises ValidationError."""
    if not isinstance(value, bool):
        raise wrong_type(name, "boolean")
    return value


def integer(name: str, value: Any) -> int:
    """Return `value` if it is an integer of 64 bits, signed. Raises ValidationError."""
    if not isinstance(value, int) or isinstance(value, bool) or not INT64_MIN <= value <= INT64_MAX:
        raise wrong_type(name, "integer")
    return value


def enum(name: str, value: Any, members: Sequence[str]) -> str:
    """Return `value` if it is one of `members`. Raises ValidationError."""
    if string(name, value) not in members:
        raise ValidationError(f"Parameter '{name.rpartition('.')[2]}' does not accept value '{value}'")
    return str(value)


def struct(name: str, value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object. Raises ValidationError."""
    if not isinstance(value, dict):
        raise wrong_type(name, "object")
    return value


def no_more(name: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ValidationError if the object `name` has members that are not in `known`.

    known  in the order they were visited, which decides which of several is reported
    """
    if any(member not in known for member in given):
        member = first_left(list(given), [one for one in known if one in given])
        raise ValidationError(f"Parameter '{name}{'.' if name else ''}{member}' is unexpected")
