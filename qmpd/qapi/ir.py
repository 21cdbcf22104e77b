"""What a loaded schema consists of: types, commands and events, each with its place in the text.

Words are those of the QAPI language. A type is referred to by name; `[name]` is the array of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

BUILTIN_JSON_TYPES = {
    "str": "string",
    "number": "number",
    "int": "int",
    "int8": "int",
    "int16": "int",
    "int32": "int",
    "int64": "int",
    "uint8": "int",
    "uint16": "int",
    "uint32": "int",
    "uint64": "int",
    "size": "int",
    "bool": "boolean",
    "null": "null",
    "any": "value",
}
"""The builtin types, and the JSON type introspection shows for each."""


class SchemaError(Exception):
    """A schema text that breaks the language's rules; the text begins with FILE:LINE."""


@dataclass(slots=True, eq=False, repr=False)
class Module:
    """One file of the schema.

    path   as shown in messages ("qapi/block-core.json")     text  its whole contents
    """

    path: str
    text: str

    def line(self, offset: int) -> int:
        """Return the number (from 1) of the line that holds the character at `offset`."""
        return self.text.count("\n", 0, offset) + 1


class Member(NamedTuple):
    """A member of a struct, of a command's arguments or of an event's data.

    name   on the wire            type   name of its type, in brackets for an array
    """

    name: str
    type: str
    optional: bool = False
    features: tuple[str, ...] = ()


class EnumValue(NamedTuple):
    """One value of an enumeration."""

    name: str
    features: tuple[str, ...] = ()


@dataclass(slots=True, eq=False, repr=False)
class Entity:
    """What types, commands and events have in common.

    start, end  the expression's range of characters in `module.text`
    doc         (start, end) of the text between the `##` lines above it, None if there is none
    """

    name: str
    module: Module
    start: int
    end: int
    doc: tuple[int, int] | None
    features: tuple[str, ...]

    @property
    def place(self) -> str:
        """FILE:LINE of the expression."""
        return f"{self.module.path}:{self.module.line(self.start)}"

    def member_place(self, name: str) -> str:
        """FILE:LINE of the member `name` (as spelt in the text, `*` included), else of the entity."""
        at = self.module.text.find(f"'{name}'", self.start, self.end)
        return f"{self.module.path}:{self.module.line(self.start if at < 0 else at)}"

    @property
    def doc_text(self) -> str:
        """The doc comment as it stands in the file, `#` signs included; "" without one."""
        return "" if self.doc is None else self.module.text[self.doc[0] : self.doc[1]]


@dataclass(slots=True, eq=False, repr=False)
class EnumType(Entity):
    """An enumeration."""

    values: tuple[EnumValue, ...]

    @property
    def value_names(self) -> tuple[str, ...]:
        """The values as they stand on the wire, in order."""
        return tuple(value.name for value in self.values)


@dataclass(slots=True, eq=False, repr=False)
class ObjectType(Entity):
    """A struct or a union.

    base      name of the type whose members come first, or None
    members   its own members, without those of the base
    tag       the member that selects the branch, None for a struct
    branches  struct name for each value of the tag that has one
    implicit  True if it stands inside another entity (arguments, data, a union's base)
    """

    base: str | None
    members: tuple[Member, ...]
    tag: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    implicit: bool = False


@dataclass(slots=True, eq=False, repr=False)
class AlternateType(Entity):
    """A type whose JSON type selects among its branches (branch name -> type name)."""

    branches: dict[str, str]


SchemaType = EnumType | ObjectType | AlternateType


@dataclass(slots=True, eq=False, repr=False)
class Command(Entity):
    """A QMP command.

    arguments  name of the object type of its arguments, None if it has none
    returns    name of its return type, None for the empty object
    boxed      the handler gets the arguments as one value
    gen        False: arguments go to the handler unchecked
    """

    arguments: str | None
    returns: str | None
    boxed: bool = False
    gen: bool = True
    allow_oob: bool = False
    allow_preconfig: bool = False
    coroutine: bool = False
    success_response: bool = True


@dataclass(slots=True, eq=False, repr=False)
class Event(Entity):
    """An event; `data` names the object type of its members, None if it has none."""

    data: str | None
    boxed: bool = False
