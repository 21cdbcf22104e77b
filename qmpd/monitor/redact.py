"""What the log may show of a command's arguments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qmpd.protocols.qmp import to_text
from qmpd.qapi.ir import ObjectType

if TYPE_CHECKING:
    from qmpd.qapi.schema import Schema

MASK = "<hidden>"

_KEYVAL_SECRET = re.compile(r"((?:^|[,\s])(?:data|password|secret)=)(?:[^,\s]|,,)*")
_JSON_SECRET = re.compile(r"""((["'])(?:data|password)\2\s*:\s*)(?:"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?)""")


def sensitive_names(schema: Schema) -> frozenset[str]:
    """Return the names of all members that are marked sensitive or hold whatever the client likes.

    By name only, wherever they stand: rather too much is hidden than too little.
    """
    names: set[str] = set()
    for one in schema.types.values():
        if isinstance(one, ObjectType):
            names.update(member.name for member in one.members if "sensitive" in member.features)
            names.update(member.name for member in one.members if member.type == "any")
    return frozenset(names)


def redacted(schema: Schema, arguments: dict[str, Any]) -> str:
    """Return the arguments of a command as text for the log, without secrets."""
    hidden = schema.compiled.setdefault("monitor.redact", sensitive_names(schema))
    return to_text(_masked(arguments, hidden))


def _masked(value: Any, hidden: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: MASK if key in hidden and not isinstance(member, dict | list) else _masked(member, hidden)
            for key, member in value.items()
        }
    if isinstance(value, list):
        return [_masked(one, hidden) for one in value]
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """Return text that may hold key=value pairs or JSON (a command line) without the values of secrets."""
    return _JSON_SECRET.sub(rf'\1"{MASK}"', _KEYVAL_SECRET.sub(rf"\1{MASK}", text))
