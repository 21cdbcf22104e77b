"""Reads the QAPI schema into the types of `qmpd.qapi.ir`.

The language is the one the reference documents as "The QAPI schema language": JSON with single
quotes, `#` comments, doc comments between `##` lines. Taken are include, enum, struct, union (base
and discriminator), alternate, command and event; `if`, `pragma` and simple unions are refused.

A file is read by blanking its comments in place and handing what is left, quotes exchanged, to the
JSON decoder: positions stay those of the file, and a whole root takes a few milliseconds.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from qmpd.qapi.ir import (
    BUILTIN_JSON_TYPES,
    AlternateType,
    Command,
    Entity,
    EnumType,
    EnumValue,
    Event,
    Member,
    Module,
    ObjectType,
    SchemaError,
    SchemaType,
)

SYSTEM_ROOT = "qapi-schema.json"
STORAGE_DAEMON_ROOT = "storage-daemon.json"

_COMMENT = re.compile(r"^##\n(.*?)^##$|#[^\n]*", re.MULTILINE | re.DOTALL)
_SPACE = re.compile(r"\s*")
_KEYS = {
    "include": {"include"},
    "enum": {"enum", "data", "prefix", "features"},
    "struct": {"struct", "base", "data", "features"},
    "union": {"union", "base", "discriminator", "data", "features"},
    "alternate": {"alternate", "data", "features"},
    "command": {
        *("command", "data", "returns", "boxed", "features", "gen", "success-response"),
        *("allow-oob", "allow-preconfig", "coroutine"),
    },
    "event": {"event", "data", "boxed", "features"},
}


class Schema:
    """One root with everything it includes.

    types, commands, events   by name, in the order of the text
    compiled                  where `visit` and others keep what they made of it
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.modules: list[Module] = []
        self.types: dict[str, SchemaType] = {}
        self.commands: dict[str, Command] = {}
        self.events: dict[str, Event] = {}
        self.compiled: dict[Any, Any] = {}

    def object_type(self, name: str) -> ObjectType:
        """Return the struct or union `name`; KeyError if there is none."""
        found = self.types[name]
        if not isinstance(found, ObjectType):
            raise KeyError(name)
        return found

    def enum(self, name: str) -> EnumType:
        """Return the enumeration `name`; KeyError if there is none."""
        found = self.types[name]
        if not isinstance(found, EnumType):
            raise KeyError(name)
        return found

    def members(self, name: str | None) -> tuple[Member, ...]:
        """Return all members of an object type, those of its bases first; a union's branches not."""
        if name is None:
            return ()
        found = self.object_type(name)
        return (*self.members(found.base), *found.members) if found.base else found.members


def schema_directory() -> str:
    """Return the folder of the schema: package data of an installed wheel, else the checkout's."""
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    data = os.path.join(package, "_qapi")
    return data if os.path.isdir(data) else os.path.join(os.path.dirname(package), "qapi")


_loaded: dict[str, Schema] = {}
_files: dict[str, _File] = {}


def load(root: str) -> Schema:
    """Return the schema of `root` (SYSTEM_ROOT or STORAGE_DAEMON_ROOT), read once per process.

    What two roots share is read once and is the same object in both. Raises SchemaError, whose text
    begins with the file and the line.
    """
    if root not in _loaded:
        _loaded[root] = load_file(os.path.join(schema_directory(), root), _files)
    return _loaded[root]


def load_file(path: str | os.PathLike[str], files: dict[str, _File] | None = None) -> Schema:
    """Read a root file and what it includes. Raises SchemaError, also for a missing file.

    files  files read before, added to
    """
    schema = Schema(os.path.basename(path))
    _Loader(schema, {} if files is None else files).include(os.fspath(path), None)
    _check_references(schema)
    return schema


@dataclass(slots=True, eq=False, repr=False)
class _File:
    """One file as read: its own entities, and the includes between them, in order."""

    module: Module
    items: list[Entity | tuple[str, str]] = field(default_factory=list)


class _Loader:
    """Adds files to a schema, each once, in the order of their includes."""

    def __init__(self, schema: Schema, files: dict[str, _File]) -> None:
        self.schema, self.files = schema, files
        self.seen: set[str] = set()
        self.entities: dict[str, Entity] = {}

    def include(self, path: str, wanted_at: str | None) -> None:
        """Add the file at `path`, unless it has been; `wanted_at` is the place of the include."""
        path = os.path.realpath(path)
        if path in self.seen:
            return
        self.seen.add(path)
        file = self.files.get(path)
        if file is None:
            file = self.files[path] = _read(path, wanted_at)
        self.schema.modules.append(file.module)
        for item in file.items:
            if isinstance(item, tuple):
                self.include(*item)
            else:
                self._add(item)

    def _add(self, entity: Entity) -> None:
        if (first := self.entities.setdefault(entity.name, entity)) is not entity:
            raise SchemaError(f"{entity.place}: '{entity.name}' is already defined {first.place}")
        if isinstance(entity, Command):
            self.schema.commands[entity.name] = entity
        elif isinstance(entity, Event):
            self.schema.events[entity.name] = entity
        else:
            assert isinstance(entity, SchemaType)
            self.schema.types[entity.name] = entity


def _read(path: str, wanted_at: str | None) -> _File:
    """Return what a file says. Raises SchemaError."""
    try:
        with open(path, encoding="utf-8") as source:
            text = source.read()
    except OSError as error:
        name = os.path.basename(path)
        raise SchemaError(f"{wanted_at or path}: cannot read '{name}': {error.strerror}") from error
    module = Module("/".join(path.split(os.sep)[-2:]), text)
    file = _File(module)
    docs: list[tuple[int, int]] = []

    def blank(match: re.Match[str]) -> str:
        if match.group(1) is not None:
            docs.append(match.span(1))
        return " " * len(match.group())

    code = _COMMENT.sub(blank, text)
    for stray in '"\\':
        if stray in code:
            raise SchemaError(f"{module.path}:{module.line(code.index(stray))}: stray '{stray}'")
    code = code.replace("'", '"')
    position, doc_index = 0, 0
    while (position := _SPACE.match(code, position).end()) < len(code):  # type: ignore[union-attr]
        doc = None
        while doc_index < len(docs) and docs[doc_index][0] < position:
            doc = docs[doc_index]
            doc_index += 1
        try:
            expression, end = _DECODER.raw_decode(code, position)
        except _DuplicateKey as error:
            raise SchemaError(f"{module.path}:{module.line(position)}: duplicate key '{error}'") from error
        except json.JSONDecodeError as error:
            raise SchemaError(f"{module.path}:{module.line(error.pos)}: {error.msg}") from error
        file.items += _items(expression, module, position, end, doc, path)
        position = end
    return file


def _items(
    expression: Any, module: Module, start: int, end: int, doc: tuple[int, int] | None, path: str
) -> list[Entity | tuple[str, str]]:
    """Return the entities of one expression, or the path of an include with its place."""
    where = f"{module.path}:{module.line(start)}"
    kinds = [kind for kind in _KEYS if isinstance(expression, dict) and kind in expression]
    if len(kinds) != 1:
        raise SchemaError(f"{where}: expected an object with one of {', '.join(_KEYS)}")
    kind = kinds[0]
    if unknown := expression.keys() - _KEYS[kind]:
        raise SchemaError(f"{where}: {kind} has unknown key '{sorted(unknown)[0]}'")
    name = expression[kind]
    if not isinstance(name, str):
        raise SchemaError(f"{where}: '{kind}' must be a string")
    if kind == "include":
        return [(os.path.join(os.path.dirname(path), name), where)]
    if name in BUILTIN_JSON_TYPES:
        raise SchemaError(f"{where}: '{name}' is a builtin type")
    builder = _Builder(name, expression, where, module, start, end, doc)
    entity = builder.build(kind)
    return [*builder.implicit, entity]


class _DuplicateKey(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in names if names.count(key) > 1))
    return made


class _Builder:
    """Makes one entity of one expression; `implicit` holds the types that stand inside it."""

    def __init__(
        self,
        name: str,
        expression: dict[str, Any],
        where: str,
        module: Module,
        start: int,
        end: int,
        doc: tuple[int, int] | None,
    ) -> None:
        self.name, self.expression, self.where = name, expression, where
        self.implicit: list[ObjectType] = []
        self.common = (module, start, end, doc)
        self.features = self._features(expression.get("features"))

    def build(self, kind: str) -> Entity:
        """Return the entity."""
        if kind == "command":
            return self._command()
        if kind == "event":
            return Event(self.name, *self.common, self.features, self._arguments(), self._flag("boxed", False))
        if kind == "enum":
            values = tuple(self._enum_value(value) for value in self._data(list))
            if len({value.name for value in values}) != len(values):
                raise SchemaError(f"{self.where}: enum '{self.name}' has a value twice")
            return EnumType(self.name, *self.common, self.features, values)
        if kind == "struct":
            return self._object_type(self.name, self._data(dict), self.expression.get("base"), self.features)
        if kind == "union":
            return self._union()
        branches = {key: self._type(key, value) for key, value in self._data(dict).items()}
        return AlternateType(self.name, *self.common, self.features, branches)

    def _command(self) -> Command:
        returns = self.expression.get("returns")
        return Command(
            self.name,
            *self.common,
            self.features,
            self._arguments(),
            None if returns is None else self._type("returns", returns),
            boxed=self._flag("boxed", False),
            gen=self._flag("gen", True),
            allow_oob=self._flag("allow-oob", False),
            allow_preconfig=self._flag("allow-preconfig", False),
            coroutine=self._flag("coroutine", False),
            success_response=self._flag("success-response", True),
        )

    def _union(self) -> ObjectType:
        base, tag = self.expression.get("base"), self.expression.get("discriminator")
        if not isinstance(tag, str) or base is None:
            raise SchemaError(f"{self.where}: union '{self.name}' needs 'base' and 'discriminator'")
        if isinstance(base, dict):
            implicit = self._object_type(f"q_obj_{self.name}-base", base, None, (), implicit=True)
            self.implicit.append(implicit)
            base = implicit.name
        branches = {key: self._type(key, value) for key, value in self._data(dict).items()}
        made = self._object_type(self.name, {}, base, self.features)
        made.tag, made.branches = tag, branches
        return made

    def _arguments(self) -> str | None:
        data = self.expression.get("data")
        if data is None or isinstance(data, str):
            return data
        if not isinstance(data, dict):
            raise SchemaError(f"{self.where}: 'data' of '{self.name}' must be a type name or an object")
        if not data:
            return None
        made = self._object_type(f"q_obj_{self.name}-arg", data, None, (), implicit=True)
        self.implicit.append(made)
        return made.name

    def _object_type(
        self, name: str, data: dict[str, Any], base: Any, features: tuple[str, ...], *, implicit: bool = False
    ) -> ObjectType:
        if base is not None and not isinstance(base, str):
            raise SchemaError(f"{self.where}: 'base' of '{name}' must be a type name")
        members = []
        for key, value in data.items():
            optional = key[0] == "*"
            wire = key[1:] if optional else key
            if type(value) is str:
                members.append(Member(wire, value, optional))
            elif type(value) is dict and value.keys() <= {"type", "features"} and "type" in value:
                own = self._features(value.get("features"))
                members.append(Member(wire, self._type(key, value["type"]), optional, own))
            else:
                members.append(Member(wire, self._type(key, value), optional))
        return ObjectType(name, *self.common, features, base, tuple(members), implicit=implicit)

    def _data(self, kind: type[Any]) -> Any:
        data = self.expression.get("data")
        if not isinstance(data, kind):
            wanted = "an array" if kind is list else "an object"
            raise SchemaError(f"{self.where}: 'data' of '{self.name}' must be {wanted}")
        return data

    def _type(self, key: str, value: Any) -> str:
        if isinstance(value, dict) and value.keys() == {"type"}:
            value = value["type"]
        if isinstance(value, str):
            return value
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            return f"[{value[0]}]"
        raise SchemaError(f"{self.where}: '{key}' of '{self.name}' must name a type, or hold one name in brackets")

    def _flag(self, key: str, default: bool) -> bool:
        value = self.expression.get(key, default)
        if not isinstance(value, bool):
            raise SchemaError(f"{self.where}: '{key}' of '{self.name}' must be true or false")
        return value

    def _features(self, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise SchemaError(f"{self.where}: 'features' of '{self.name}' must be an array of strings")
        return tuple(value)

    def _enum_value(self, value: Any) -> EnumValue:
        if isinstance(value, str):
            return EnumValue(value)
        if isinstance(value, dict) and value.keys() <= {"name", "features"} and isinstance(value.get("name"), str):
            return EnumValue(value["name"], self._features(value.get("features")))
        raise SchemaError(f"{self.where}: a value of enum '{self.name}' must be a string")


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _check_references(schema: Schema) -> None:
    """Raise SchemaError for the first name that means nothing, or not what its place needs."""
    types = schema.types
    known = types.keys() | BUILTIN_JSON_TYPES.keys()

    def wrong(entity: Entity, text: str) -> SchemaError:
        return SchemaError(f"{entity.place}: {text}")

    def need_object(entity: Entity, role: str, name: str) -> ObjectType:
        found = types.get(name)
        if not isinstance(found, ObjectType):
            raise wrong(entity, f"{role} of '{entity.name}' is '{name}', which is no struct or union")
        return found

    for entity in types.values():
        if isinstance(entity, AlternateType):
            for name in entity.branches.values():
                if name.strip("[]") not in known:
                    raise wrong(entity, f"'{entity.name}' uses unknown type '{name}'")
        elif isinstance(entity, ObjectType):
            for member in entity.members:
                if member.type not in known and member.type.strip("[]") not in known:
                    at = entity.member_place(f"*{member.name}" if member.optional else member.name)
                    raise SchemaError(f"{at}: '{member.name}' of '{entity.name}' has unknown type '{member.type}'")
            _check_object(schema, entity, need_object, wrong)
    for command in schema.commands.values():
        if command.arguments is not None:
            need_object(command, "'data'", command.arguments)
        if command.returns is not None and command.returns.strip("[]") not in known:
            raise wrong(command, f"'{command.name}' returns unknown type '{command.returns}'")
    for event in schema.events.values():
        if event.data is not None:
            need_object(event, "'data'", event.data)


def _check_object(schema: Schema, entity: ObjectType, need_object: Any, wrong: Any) -> None:
    if entity.base is not None:
        base: str | None = entity.base
        seen = {entity.name}
        while base is not None:
            if base in seen:
                raise wrong(entity, f"'{entity.name}' is its own base")
            seen.add(base)
            base = need_object(entity, "'base'", base).base
        names = [member.name for member in schema.members(entity.name)]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise wrong(entity, f"'{entity.name}' has member '{twice}' twice")
    if entity.tag is None:
        return
    tag = next((member for member in schema.members(entity.name) if member.name == entity.tag), None)
    tag_type = None if tag is None else schema.types.get(tag.type)
    if tag is None or tag.optional or not isinstance(tag_type, EnumType):
        raise wrong(entity, f"discriminator '{entity.tag}' of '{entity.name}' is no required enum member of its base")
    values = set(tag_type.value_names)
    for case, branch in entity.branches.items():
        if case not in values:
            raise wrong(entity, f"branch '{case}' of '{entity.name}' is no value of '{tag_type.name}'")
        need_object(entity, f"branch '{case}'", branch)
