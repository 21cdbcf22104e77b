"""What the log may show of a command's arguments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpd.protocols.qmp import to_text
from qmpd.qapi.ir import ObjectType

if TYPE_CHECKING:
    from qmpd.qapi.schema import Schema

MASK = "<hidden>"

_KEYVAL_SECRET = re.compile(r"((?:^|[,\s])(?:data|password|secret)=)(?:[^,\s]|,,)*")
_JSON_SECRET = re.compile(r"""((["'])(?:data|password)\2\s*:\s*)(?:"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?)""")


class _Hidden(NamedTuple):
    """Names of members that are not shown, wherever they stand: rather too much is hidden than too little.

    scalars   marked sensitive; a container of that name is somebody else's member
    whole     hold whatever the client likes, of any type
    """

    scalars: frozenset[str]
    whole: frozenset[str]


def _hidden(schema: Schema) -> _Hidden:
    members = [
        member for one in schema.types.values() if isinstance(one, ObjectType) for member in schema.members(one.name)
    ]
    return _Hidden(
        frozenset(member.name for member in members if "sensitive" in member.features),
        frozenset(member.name for member in members if member.type == "any"),
    )


def redacted(schema: Schema, arguments: dict[str, Any]) -> str:
    """Return the arguments of a command as text for the log, without secrets."""
    hidden = schema.compiled.get(_Hidden)
    if hidden is None:
        hidden = schema.compiled[_Hidden] = _hidden(schema)
    return to_text(_masked(arguments, hidden))


def _masked(value: Any, hidden: _Hidden) -> Any:
    if isinstance(value, dict):
        return {
            key: MASK
            if key in hidden.whole or (key in hidden.scalars and not isinstance(member, dict | list))
            else _masked(member, hidden)
            for key, member in value.items()
        }
    if isinstance(value, list):
        return [_masked(one, hidden) for one in value]
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """Return text that may hold key=value pairs or JSON (a command line) without the values of secrets."""
    return _JSON_SECRET.sub(rf'\1"{MASK}"', _KEYVAL_SECRET.sub(rf"\1{MASK}", text))
