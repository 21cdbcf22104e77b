"""Checks values against the schema, with the reference's error texts in the reference's order.

Every type is compiled once, at first use, into a closure that takes a value and returns the
validated one. A closure knows nothing of where it stands: it raises `_Problem`, and the containers
add their part of the path while it passes, so a value without fault costs nothing for its errors.

Members are visited in the order of the schema, those of a union's branch after those of its base,
and members that the type does not know are reported last. What is observed of the texts:
a value of a wrong type is named by its full path (`actions[0].data`), while enumerations,
alternates and integers too wide for their type are named by their last member alone, `null` if that
is an element of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qmpd.errors import ValidationError
from qmpd.qapi import keyval as keyval_mode
from qmpd.qapi.hashorder import first_left
from qmpd.qapi.ir import AlternateType, EnumType, Member
from qmpd.qapi.schema import Schema

Visitor = Callable[[Any], Any]
_U64 = 1 << 64
_WIDTHS: dict[str, tuple[int, int]] = {
    **{f"int{bits}": (-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (8, 16, 32)},
    **{f"uint{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32)},
}
_WRONG_TYPE = "Invalid parameter type for '%s', expected: "
_MISSING = "Parameter '%s' is missing"
_UNEXPECTED = "Parameter '%s' is unexpected"
_TOO_DEEP = "The arguments are nested too deeply"


class _Problem(Exception):
    """What is wrong with a value; `%s` in the text stands for its name.

    bare  True if the name is the last member's alone        path  innermost step first
    """

    def __init__(self, text: str, bare: bool = False) -> None:
        super().__init__(text)
        self.text, self.bare = text, bare
        self.path: list[str | int] = []

    def render(self, keyval: bool) -> str:
        """Return the finished text."""
        if self.bare:
            return self.text % (self.path[0] if self.path and isinstance(self.path[0], str) else "null")
        name = ""
        for step in reversed(self.path):
            if isinstance(step, str):
                name += f".{step}" if name else step
            else:
                name += f".{step}" if keyval else f"[{step}]"
        return self.text % (name or "<anonymous>")


def validate(schema: Schema, type_name: str, value: Any, *, keyval: bool = False) -> Any:
    """Return `value` as the type `type_name` has it, in wire names: containers are new, integers in range.

    type_name  a type of the schema, a builtin, or an array of one in brackets: "BlockdevOptions", "[str]"
    keyval     the tree came from `key=value` text: its scalars are strings
    Raises ValidationError with the reference's text; KeyError if there is no such type.
    """
    visitor = _visitor(schema, type_name, keyval)
    try:
        return visitor(value)
    except _Problem as problem:
        raise ValidationError(problem.render(keyval)) from None
    except RecursionError:
        raise ValidationError(_TOO_DEEP) from None


def validate_arguments(schema: Schema, command_name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for the handler of a command.

    Top-level members become snake_case, absent optional ones stay absent, what lies below keeps its
    wire names. A command that is boxed, or declared `'gen': false`, has one argument, `options`;
    with `'gen': false` that is what came, unchecked.
    Raises ValidationError with the reference's text; KeyError if there is no such command.
    """
    visitor = schema.compiled.get(("arguments", command_name))
    if visitor is None:
        visitor = schema.compiled["arguments", command_name] = _compile_arguments(schema, command_name)
    try:
        keywords: dict[str, Any] = visitor(arguments)
    except _Problem as problem:
        raise ValidationError(problem.render(False)) from None
    except RecursionError:
        raise ValidationError(_TOO_DEEP) from None
    return keywords


def snake_case(wire: str) -> str:
    """Return the Python name of a wire name; a keyword of Python gets an underscore behind it."""
    name = wire.replace("-", "_")
    return f"{name}_" if name in _KEYWORDS else name


_KEYWORDS = frozenset(("from", "class", "global", "in", "is", "if", "import", "pass", "return", "not", "or", "and"))


def _compile_arguments(schema: Schema, command_name: str) -> Visitor:
    command = schema.commands[command_name]
    if not command.gen:
        return lambda arguments: {"options": dict(arguments)} if command.arguments else {}
    if command.arguments is None:
        return _no_arguments
    visit = _visitor(schema, command.arguments, False)
    if command.boxed:
        return lambda arguments: {"options": visit(arguments)}
    names = {member.name: snake_case(member.name) for member in schema.members(command.arguments)}
    return lambda arguments: {names[wire]: value for wire, value in visit(arguments).items()}


def _no_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    if arguments:
        _refuse_unexpected(arguments, {})
    return {}


def _visitor(schema: Schema, type_name: str, keyval: bool) -> Visitor:
    """Return the compiled visitor of a type, made at first use."""
    key = (type_name, keyval)
    visitor: Visitor | None = schema.compiled.get(key)
    if visitor is not None:
        return visitor

    def until_compiled(value: Any) -> Any:
        return schema.compiled[key](value)

    schema.compiled[key] = until_compiled  # what a type that contains itself gets
    try:
        visitor = _compile(schema, type_name, keyval)
    except BaseException:
        del schema.compiled[key]
        raise
    schema.compiled[key] = visitor
    return visitor


def _compile(schema: Schema, type_name: str, keyval: bool) -> Visitor:
    if type_name[0] == "[":
        return _array(_visitor(schema, type_name[1:-1], keyval))
    if keyval and (scalar := keyval_mode.parser(type_name)) is not None:
        return _keyval_scalar(type_name, *scalar)
    if (builtin := _BUILTINS.get(type_name)) is not None:
        return builtin
    found = schema.types[type_name]
    if isinstance(found, EnumType):
        return _enum(frozenset(found.value_names), _keyval_scalar("str", str, "") if keyval else _string)
    if isinstance(found, AlternateType):
        return _alternate(schema, found, keyval)
    return _object(_Members(schema, type_name, keyval))


# Builtin types


def _string(value: Any) -> Any:
    if type(value) is not str:
        raise _Problem(_WRONG_TYPE + "string")
    return value


def _boolean(value: Any) -> Any:
    if type(value) is not bool:
        raise _Problem(_WRONG_TYPE + "boolean")
    return value


def _number(value: Any) -> Any:
    if type(value) is not float and type(value) is not int:
        raise _Problem(_WRONG_TYPE + "number")
    return value


def _null(value: Any) -> Any:
    if value is not None:
        raise _Problem(_WRONG_TYPE + "null")
    return value


def _any(value: Any) -> Any:
    return value


def _int64(value: Any) -> Any:
    if type(value) is not int or not -_U64 // 2 <= value < _U64 // 2:
        raise _Problem(_WRONG_TYPE + "integer")
    return value


def _uint64(value: Any) -> Any:
    """Negative numbers wrap around, as they always did."""
    if type(value) is not int or not -_U64 // 2 <= value < _U64:
        raise _Problem("Parameter '%s' expects uint64")
    return value % _U64


def _narrow(type_name: str, wide: Visitor) -> Visitor:
    low, high = _WIDTHS[type_name]
    text = f"Parameter '%s' expects {type_name}_t"

    def visit(value: Any) -> Any:
        number = wide(value)
        if not low <= number <= high:
            raise _Problem(text, bare=True)
        return number

    return visit


_BUILTINS: dict[str, Visitor] = {
    "str": _string,
    "bool": _boolean,
    "number": _number,
    "null": _null,
    "any": _any,
    "int": _int64,
    "int64": _int64,
    "uint64": _uint64,
    "size": _uint64,
    **{name: _narrow(name, _uint64 if name[0] == "u" else _int64) for name in _WIDTHS},
}


def _keyval_scalar(type_name: str, parse: Callable[[str], Any], expected: str) -> Visitor:
    def visit(value: Any) -> Any:
        if type(value) is not str:
            raise _Problem("Parameters '%s.*' are unexpected")
        parsed = parse(value)
        if parsed is None:
            raise _Problem(f"Parameter '%s' expects {expected}")
        return parsed

    return _narrow(type_name, visit) if type_name in _WIDTHS else visit


# Types of the schema


def _enum(values: frozenset[str], string: Visitor) -> Visitor:
    def visit(value: Any) -> Any:
        text = string(value)
        if text not in values:
            raise _Problem(f"Parameter '%s' does not accept value '{_escape(text)}'", bare=True)
        return text

    return visit


def _escape(text: str) -> str:
    """Protect `%`, which the rendering would take for the place of the name."""
    return text.replace("%", "%%")


def _array(element: Visitor) -> Visitor:
    def visit(value: Any) -> Any:
        if type(value) is not list:
            raise _Problem(_WRONG_TYPE + "array")
        made = []
        try:
            for item in value:
                made.append(element(item))
        except _Problem as problem:
            problem.path.append(len(made))
            raise
        return made

    return visit


_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "bool": (bool,),
    "int": (int,),
    "number": (int, float),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}


def _alternate(schema: Schema, alternate: AlternateType, keyval: bool) -> Visitor:
    """Choose the branch by the type of the value."""
    choice: dict[type, Visitor] = {}
    for branch in alternate.branches.values():
        if branch[0] == "[":
            kind = "array"
        elif branch in ("str", "bool", "number", "null"):
            kind = "string" if branch == "str" else branch
        elif branch in _BUILTINS:
            kind = "int"
        else:
            kind = "string" if isinstance(schema.types[branch], EnumType) else "object"
        visitor = _visitor(schema, branch, keyval)
        for python_type in _PYTHON_TYPES[kind]:
            choice[python_type] = visitor
    text = _WRONG_TYPE + alternate.name

    def visit(value: Any) -> Any:
        visitor = choice.get(type(value))
        if visitor is None:
            raise _Problem(text, bare=True)
        return visitor(value)

    return visit


class _Members:
    """The members of an object type, and for a union those of each branch, compiled at first use."""

    __slots__ = ("branches", "fields", "keyval", "schema", "tag", "types")

    def __init__(self, schema: Schema, name: str, keyval: bool) -> None:
        self.schema, self.keyval = schema, keyval
        found = schema.object_type(name)
        self.tag, self.types = found.tag, found.branches
        self.fields = [self._field(member) for member in schema.members(name)]
        self.branches: dict[str, _Members] = {}

    def _field(self, member: Member) -> tuple[str, bool, Visitor]:
        return member.name, member.optional, _visitor(self.schema, member.type, self.keyval)

    def visit(self, value: dict[str, Any], made: dict[str, Any]) -> None:
        """Move the members that are known from `value` to `made`."""
        name = ""
        try:
            for name, optional, visitor in self.fields:
                if name in value:
                    made[name] = visitor(value[name])
                elif not optional:
                    raise _Problem(_MISSING)
        except _Problem as problem:
            problem.path.append(name)
            raise
        if self.tag is not None and (branch := made[self.tag]) in self.types:
            members = self.branches.get(branch)
            if members is None:
                members = self.branches[branch] = _Members(self.schema, self.types[branch], self.keyval)
            members.visit(value, made)


def _object(members: _Members) -> Visitor:
    visit_members = members.visit

    def visit(value: Any) -> Any:
        if type(value) is not dict:
            raise _Problem(_WRONG_TYPE + "object")
        made: dict[str, Any] = {}
        visit_members(value, made)
        if len(made) != len(value):
            _refuse_unexpected(value, made)
        return made

    return visit


def _refuse_unexpected(value: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    problem = _Problem(_UNEXPECTED)
    problem.path.append(first_left(list(value), list(known)))
    raise problem
