"""Switches for debug output, one per flag of a module (`-T qcow2.l2`), over the logging module.

    _trace = trace.flag("qcow2.l2")
    if _trace:                       # a slot lookup when it is off
        _trace.log("slice %d read", index)

Nothing that a client sent is traced raw: callers pass values that are already redacted.
"""

from __future__ import annotations

import fnmatch
import logging

_flags: dict[str, Flag] = {}
_enabled: list[str] = []


class Flag:
    """One switch; true when it is on."""

    __slots__ = ("_logger", "name", "on")

    def __init__(self, name: str) -> None:
        self.name = name
        self.on = any(fnmatch.fnmatchcase(name, pattern) for pattern in _enabled)
        self._logger = logging.getLogger(f"qmpd.{name}")

    def __bool__(self) -> bool:
        return self.on

    def log(self, text: str, *values: object) -> None:
        """Write one line; `values` are formatted only here."""
        self._logger.info(text, *values)


def flag(name: str) -> Flag:
    """Return the switch `name` ("module.what"), the same object each time."""
    if name not in _flags:
        _flags[name] = Flag(name)
    return _flags[name]


def enable(pattern: str) -> None:
    """Turn on every present and future switch whose name matches the shell `pattern`."""
    _enabled.append(pattern)
    for one in _flags.values():
        one.on = one.on or fnmatch.fnmatchcase(one.name, pattern)
