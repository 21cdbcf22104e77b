"""Checks on the JSON values that `qom-set` hands to a property, with QEMU's texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmpd.errors import ValidationError

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
