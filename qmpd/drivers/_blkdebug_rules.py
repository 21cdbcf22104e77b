"""The rules of blkdebug: which event arms which error, from options and from a configuration file.

Model: add_rule, rule_check and blkdebug_co_debug_event (QEMU block/blkdebug.c), and the syntax of
qemu_config_foreach (QEMU util/qemu-config.c).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpd.errors import CommandError
from qmpd.units import SECTOR

MAX_CONFIG = 1 << 20
"""Bytes of a configuration file at most; the reference bounds a line only."""

MAX_ERRNO = 4095
"""The largest errno there can be."""

_DEFAULT_KINDS = frozenset(("read", "write", "write-zeroes", "discard", "flush"))
"""What a rule without `iotype` hits: all but block-status."""

_ID = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*\Z")
_GROUP_WITH_ID = re.compile(r'\[(\S{1,63}+)\s*"([^"]{1,63})"')
_GROUP = re.compile(r"\[([^\]]{1,63})")
_VALUE = re.compile(r'\s*(\S{1,63}+)\s*=\s*"([^"]{1,1023})')
_WORD = re.compile(r"\s*(\S{1,63}+)")
_NUMBERS = {"state", "errno", "sector", "new_state"}
_BOOLS = {"once", "immediately"}
_MEMBERS = {
    "inject-error": {"event", "state", "iotype", "errno", "sector", "once", "immediately"},
    "set-state": {"event", "state", "new_state"},
}


@dataclass(frozen=True, slots=True)
class InjectErrorOptions:
    """BlkdebugInjectErrorOptions; `sector` in units of 512 bytes, -1 for any."""

    event: str
    state: int = 0
    iotype: str | None = None
    errno: int = errno.EIO
    sector: int = -1
    once: bool = False
    immediately: bool = False


@dataclass(frozen=True, slots=True)
class SetStateOptions:
    """BlkdebugSetStateOptions."""

    event: str
    new_state: int
    state: int = 0


class Rules:
    """All rules of one node, its state, and the rules that are armed just now."""

    def __init__(self, inject: Sequence[InjectErrorOptions], states: Sequence[SetStateOptions]) -> None:
        self.state = 1
        self._inject: dict[str, list[InjectErrorOptions]] = {}
        self._states: dict[str, list[SetStateOptions]] = {}
        self._armed: list[InjectErrorOptions] = []
        for rule in inject:
            self._inject.setdefault(rule.event, []).append(rule)
        for change in states:
            self._states.setdefault(change.event, []).append(change)

    def happened(self, event: str) -> None:
        """Arm the rules of an event; they stay armed until another event arms others."""
        armed = [one for one in self._inject.get(event, ()) if one.state in (0, self.state)]
        change = next((one for one in self._states.get(event, ()) if one.state in (0, self.state)), None)
        if armed:
            self._armed = armed
        if change is not None:
            self.state = change.new_state

    def error_of(self, kind: str, offset: int, length: int) -> int:
        """Return the errno that a request meets, 0 for none; a rule for one time is then gone."""
        for rule in self._armed:
            if rule.sector != -1 and not offset <= rule.sector * SECTOR < offset + length:
                continue
            if kind != rule.iotype if rule.iotype else kind not in _DEFAULT_KINDS:
                continue
            if rule.once:
                self._armed.remove(rule)
                self._inject[rule.event] = [one for one in self._inject[rule.event] if one is not rule]
            return min(abs(rule.errno), MAX_ERRNO)
        return 0


def read_config(
    path: str, events: Sequence[str], kinds: Sequence[str]
) -> tuple[list[InjectErrorOptions], list[SetStateOptions]]:
    """Return the InjectErrorOptions and SetStateOptions of a configuration file.

    events, kinds   the values of BlkdebugEvent and BlkdebugIOType
    Raises CommandError.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise CommandError(f"Could not read blkdebug config file: {error.strerror}") from error
    if len(data) > MAX_CONFIG:
        raise CommandError(f"blkdebug config file '{path}' is longer than {MAX_CONFIG} bytes")
    inject: list[InjectErrorOptions] = []
    states: list[SetStateOptions] = []
    for group, members in _parse(data.decode("utf-8", "replace")):
        values = _converted(group, members, events, kinds)
        if group == "inject-error":
            inject.append(InjectErrorOptions(**values))
        else:
            states.append(SetStateOptions(**({"new_state": 0} | values)))
    return inject, states


def _parse(text: str) -> list[tuple[str, dict[str, str]]]:
    """Return the groups of a configuration text in order, with what they hold."""
    groups: list[tuple[str, dict[str, str]]] = []
    ids: set[tuple[str, str]] = set()
    for line in text.split("\n"):
        if not line or line.startswith("#"):
            continue
        named = _GROUP_WITH_ID.match(line)
        group = named or _GROUP.match(line)
        if group is not None:
            if group[1] not in _MEMBERS:
                raise CommandError(f"There is no option group '{group[1]}'")
            if named is not None:
                _check_id(named[1], named[2], ids)
            groups.append((group[1], {}))
            continue
        found = _VALUE.match(line)
        word = found or _WORD.match(line)
        if word is None:
            raise CommandError("parse error")
        if not groups:
            raise CommandError("no group defined")
        groups[-1][1][word[1]] = found[2] if found is not None else ""
    return groups


def _check_id(group: str, name: str, ids: set[tuple[str, str]]) -> None:
    if not _ID.match(name):
        raise CommandError("Parameter 'id' expects an identifier")
    if (group, name) in ids:
        raise CommandError(f"Duplicate ID '{name}' for {group}")
    ids.add((group, name))


def _converted(group: str, members: Mapping[str, str], events: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Return the values of a group as what they are."""
    values: dict[str, Any] = {}
    for name, value in members.items():
        if name not in _MEMBERS[group]:
            raise CommandError(f"Invalid parameter '{name}'")
        if name in _NUMBERS:
            values[name] = _number(name, value)
        elif name in _BOOLS:
            if value not in ("on", "off"):
                raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")
            values[name] = value == "on"
        else:
            values[name] = value
    if "event" not in values:
        raise CommandError("Missing event name for rule")
    for name, allowed in (("event", events), ("iotype", kinds)):
        if name in values and values[name] not in allowed:
            raise CommandError(f"invalid parameter value: {values[name]}")
    return values


def _number(name: str, value: str) -> int:
    """Return what strtoull makes of a number: decimal, octal with 0, hexadecimal with 0x."""
    match = re.fullmatch(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", value)
    if match is None:
        raise CommandError(f"Parameter '{name}' expects a number")
    digits = match[2]
    base = 16 if digits[:2].lower() == "0x" else 8 if digits.startswith("0") else 10
    number = int(digits, base)
    if number >= 1 << 64:
        raise CommandError(f"Value '{value}' is too large for parameter '{name}'")
    return -number if match[1] == "-" else number
