"""Whether the code and the schema say the same: asked at a daemon's start, as it loads plug-ins, and in a test.

    qmpd/drivers/my.py: MyOptions.size is required, qapi/block-drivers.json:214 has '*size'

Checked in both directions: commands against handlers and their signatures, the branches of the four
open unions (drivers, creators, object types, exports) against the classes that serve them and their
options dataclasses, and the doc comment of every entity. A daemon does not start with a name that the
schema has and the code lacks, and offers nothing that differs.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Set
from typing import Any, NamedTuple

from qmpd.qapi import hints
from qmpd.qapi.bind import UNBOUND
from qmpd.qapi.hints import Atom
from qmpd.qapi.ir import (
    BUILTIN_JSON_TYPES,
    AlternateType,
    Command,
    Entity,
    EnumType,
    Event,
    Member,
    ObjectType,
    SchemaError,
)
from qmpd.qapi.offered import TABLES, Offered, declared, declared_entry
from qmpd.qapi.registry import ClassEntry, CommandEntry, Registry, discover
from qmpd.qapi.schema import SYSTEM_ROOT, Schema, load
from qmpd.qapi.visit import snake_case


class OpenUnion(NamedTuple):
    """A union whose branches are served by registered classes.

    table   the registry's attribute          decorator  how a class declares itself
    every   whether each value of the tag needs a class, or only each branch
    """

    table: str
    decorator: str
    union: str
    every: bool


OPEN_UNIONS = (
    OpenUnion("drivers", "driver", "BlockdevOptions", True),
    OpenUnion("qom_types", "qom_type", "ObjectOptions", True),
    OpenUnion("exports", "export", "BlockExportOptions", True),
    OpenUnion("creators", "creator", "BlockdevCreateOptions", False),
)
_MACHINE_TABLES = ("devices", "endpoints")
"""What only a program with a machine has."""
_INTEGERS = frozenset(name for name, json_type in BUILTIN_JSON_TYPES.items() if json_type == "int")
_DOCUMENTED = re.compile(r"^# @([^\s:]+):", re.MULTILINE)


def problems(registry: Registry, *schemas: Schema) -> list[str]:
    """Return what is wrong between the code in `registry` and the union of `schemas`, one line each."""
    merged = _merge(schemas)
    found = [*_command_problems(registry.commands, merged)]
    for union in OPEN_UNIONS:
        found += _union_problems(getattr(registry, union.table), union, merged)
    found += _jobtype_problems(registry, merged)
    found += _doc_problems(merged)
    return found


def offered(schema: Schema) -> Registry:
    """Return what the program with this root registers, each entry imported and checked when it is looked at.

    Raises SchemaError, one problem a line, if what the schema lists is not declared anywhere. Looking at an
    entry that does not agree with the schema raises it too. `registered` checks all, in the tests and once
    a daemon has loaded everything.
    """
    modules = declared()

    def check(table: str, entry: Any) -> None:
        if found := list(_entry_problems(table, entry, schema)):
            raise SchemaError("\n".join(found))

    found = []
    names: dict[str, Iterable[str]] = {"commands": schema.commands, "jobtypes": modules["jobtypes"]}
    for table in _MACHINE_TABLES:
        names[table] = modules[table] if "device_add" in schema.commands else ()
    for name in schema.commands.keys() - modules["commands"].keys():
        found.append(_no_handler(schema.commands[name]))
    for union in OPEN_UNIONS:
        tags = _tag_type(schema, union.union) or frozenset()
        names[union.table] = tags
        found += _unserved(modules[union.table].keys(), union, schema)
    if found:
        raise SchemaError("\n".join(sorted(found)))
    tables: dict[str, Any] = {
        table: Offered(
            {name: module for name, module in modules[table].items() if name in names[table]},
            declared_entry(table, check),
        )
        for table in TABLES.values()
    }
    return Registry(**tables)


def _entry_problems(table: str, entry: Any, schema: Schema) -> Iterator[str]:
    """Return what is wrong with one entry of a program's own."""
    if table == "commands":
        yield from _signature_problems(entry, schema.commands[entry.name], schema)
    for union in OPEN_UNIONS:
        if union.table == table:
            yield from _class_problems(entry.name, entry, union, schema.object_type(union.union), schema)


def registered(schema: Schema) -> Registry:
    """Import every plug-in and return what the program with this root registers.

    Raises SchemaError, one problem a line, unless all the code agrees with the whole schema: that of
    the system root, of which the other one is a part.
    """
    registry = discover()
    if found := problems(registry, load(SYSTEM_ROOT)):
        raise SchemaError("\n".join(found))
    return registry_for(registry, schema)


def registry_for(registry: Registry, schema: Schema) -> Registry:
    """Return what of `registry` one program registers: the entries its own root contains."""

    def tags(union: str, table: dict[str, ClassEntry]) -> dict[str, ClassEntry]:
        offered = _tag_type(schema, union)
        return {} if offered is None else {name: entry for name, entry in table.items() if name in offered}

    return Registry(
        commands={name: entry for name, entry in registry.commands.items() if name in schema.commands},
        jobtypes=dict(registry.jobtypes),
        **{
            table: dict(getattr(registry, table)) if "device_add" in schema.commands else {}
            for table in _MACHINE_TABLES
        },
        **{union.table: tags(union.union, getattr(registry, union.table)) for union in OPEN_UNIONS},
    )


def _merge(schemas: Iterable[Schema]) -> Schema:
    merged = Schema("")
    for schema in schemas:
        merged.types.update(schema.types)
        merged.commands.update(schema.commands)
        merged.events.update(schema.events)
    return merged


def _file(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


# Commands


def _command_problems(handlers: dict[str, CommandEntry], schema: Schema) -> Iterator[str]:
    for name, command in schema.commands.items():
        if name not in handlers:
            yield _no_handler(command)
    for name, entry in handlers.items():
        if (found := schema.commands.get(name)) is None:
            yield f"{_file(entry.handler.__module__)}: handler of '{name}', which no schema has"
        else:
            yield from _signature_problems(entry, found, schema)


def _no_handler(command: Command) -> str:
    area = command.module.path.rpartition("/")[2].removesuffix(".json").replace("-", "_")
    return f"{command.place}: command '{command.name}' has no handler, qmpd/commands/{area}.py should have one"


def _signature_problems(entry: CommandEntry, command: Command, schema: Schema) -> Iterator[str]:
    handler = inspect.unwrap(entry.handler)
    here = f"{_file(handler.__module__)}: {handler.__name__}"
    code = handler.__code__
    if not inspect.iscoroutinefunction(handler):
        yield f"{here} is no coroutine function"
    if code.co_argcount != 1:
        yield f"{here} must take the context and then keyword arguments only"
    names = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    defaults = handler.__kwdefaults__ or {}
    members = schema.members(command.arguments)
    if command.boxed or (members and not command.gen):
        if names != ("options",) or defaults:
            yield f"{here} must take one keyword argument 'options', {command.place} is boxed"
        return
    parts = {
        name: _Part(str(handler.__annotations__.get(name, "Any")), name in defaults, handler.__module__)
        for name in names
    }
    owner = schema.types[command.arguments] if command.arguments else command
    yield from _member_problems(here, "argument", parts, members, owner, schema)


# Classes behind unions


def _tag_type(schema: Schema, union: str) -> frozenset[str] | None:
    """Return the values of the tag of `union`, None if the schema does not have it."""
    found = schema.types.get(union)
    if not isinstance(found, ObjectType):
        return None
    tag = next(member for member in schema.members(union) if member.name == found.tag)
    return frozenset(schema.enum(tag.type).value_names)


def _union_problems(table: dict[str, ClassEntry], union: OpenUnion, schema: Schema) -> Iterator[str]:
    found = schema.types.get(union.union)
    if not isinstance(found, ObjectType):
        for name, entry in table.items():
            yield f"{_file(entry.cls.__module__)}: {union.decorator} '{name}', but no schema has '{union.union}'"
        return
    yield from _unserved(table.keys(), union, schema)
    values = _served_tags(found, union, schema)
    for name, entry in table.items():
        if name not in values:
            here = _file(entry.cls.__module__)
            yield f"{here}: {union.decorator} '{name}' is no branch of '{union.union}', {found.place}"
            continue
        yield from _class_problems(name, entry, union, found, schema)


def _served_tags(found: ObjectType, union: OpenUnion, schema: Schema) -> Set[str]:
    """Return the values of the union's tag that a class has to serve."""
    tags = _tag_type(schema, union.union) if union.every else found.branches.keys()
    assert tags is not None
    return tags


def _unserved(names: Set[str], union: OpenUnion, schema: Schema) -> Iterator[str]:
    found = schema.types.get(union.union)
    if isinstance(found, ObjectType):
        for name in sorted(_served_tags(found, union, schema) - names):
            place = found.member_place(name)
            yield f"{place}: '{name}' of '{union.union}' is not served, no class has @{union.decorator}"


def _class_problems(name: str, entry: ClassEntry, union: OpenUnion, found: ObjectType, schema: Schema) -> Iterator[str]:
    branch = found.branches.get(name)
    if entry.schema != (branch or ""):
        here = _file(entry.cls.__module__)
        yield f"{here}: {union.decorator} '{name}' states schema '{entry.schema}', {found.place} has '{branch}'"
    elif branch is not None and entry.options is not None:
        yield from _dataclass_problems(entry.options, branch, schema)


def _jobtype_problems(registry: Registry, schema: Schema) -> Iterator[str]:
    known = schema.types.get("JobType")
    values = known.value_names if isinstance(known, EnumType) else ()
    for name, entry in registry.jobtypes.items():
        if name not in values:
            yield f"{_file(entry.cls.__module__)}: job type '{name}' is no value of 'JobType'"


# Members against fields and arguments


class _Part(NamedTuple):
    """A field or argument: its annotation, whether it has a default, the module that wrote it."""

    annotation: str
    has_default: bool
    module: str


def _dataclass_problems(options: type[Any], struct: str, schema: Schema) -> Iterator[str]:
    if not dataclasses.is_dataclass(options):
        yield f"{_file(options.__module__)}: {options.__name__} is no dataclass"
        return
    parts = {
        field.name: _Part(
            str(field.type),
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING,
            options.__module__,
        )
        for field in dataclasses.fields(options)
        if field.init
    }
    here = f"{_file(options.__module__)}: {options.__name__}"
    yield from _member_problems(here, "field", parts, schema.members(struct), schema.types[struct], schema)


def _member_problems(
    here: str, kind: str, parts: dict[str, _Part], members: tuple[Member, ...], owner: Entity, schema: Schema
) -> Iterator[str]:
    wanted = {snake_case(member.name): member for member in members}
    for name, part in parts.items():
        if (member := wanted.get(name)) is None:
            shown = owner.name.removeprefix("q_obj_").removesuffix("-arg")
            yield f"{here}.{name} is no member of '{shown}', {owner.place}"
            continue
        spelt = f"*{member.name}" if member.optional else member.name
        there = f"{_place(owner, spelt, schema)} has '{spelt}'"
        if member.optional and not part.has_default:
            yield f"{here}.{name} is required, {there}"
        elif part.has_default and not member.optional:
            yield f"{here}.{name} has a default, {there}"
        atoms = hints.expand(hints.parse(part.annotation), part.module)
        given = tuple(atom for atom in atoms if atom.name != "None") if member.optional else atoms
        yield from _type_problems(f"{here}.{name}", there, given, member.type, part.module, schema)
    for name, member in wanted.items():
        if name not in parts and name not in UNBOUND:
            spelt = f"*{member.name}" if member.optional else member.name
            yield f"{here} has no {kind} '{name}', {_place(owner, spelt, schema)} has '{spelt}'"


def _place(owner: Entity, spelt: str, schema: Schema) -> str:
    """Return the place of a member that `owner` or one of its bases declares."""
    at: Entity | None = owner
    while isinstance(at, ObjectType):
        if any(member.name == spelt.lstrip("*") for member in at.members):
            return at.member_place(spelt)
        at = schema.types.get(at.base) if at.base else None
    return owner.place


def _type_problems(
    name: str, there: str, atoms: tuple[Atom, ...], type_name: str, module: str, schema: Schema
) -> Iterator[str]:
    found = schema.types.get(type_name)
    nested = hints.dataclass_of(atoms, module)
    if nested is not None and isinstance(found, ObjectType) and found.tag is None:
        yield from _dataclass_problems(nested, type_name, schema)
    elif not _fits(atoms, type_name, module, schema):
        yield f"{name} is '{' | '.join(map(str, atoms))}', {there} of type '{type_name}'"


def _fits(atoms: tuple[Atom, ...], type_name: str, module: str, schema: Schema) -> bool:
    """Say whether an annotation can hold what the visitor of a type returns, and is no wider."""
    names = {atom.name for atom in atoms}
    if type_name[0] == "[":
        return (
            len(atoms) == 1
            and atoms[0].name in ("list", "tuple", "Sequence")
            and (not atoms[0].arguments or _fits(atoms[0].arguments[0], type_name[1:-1], module, schema))
        )
    if type_name in _INTEGERS:
        return names == {"int"}
    if type_name in _BUILTINS:
        return names == {_BUILTINS[type_name]} or type_name == "any"
    found = schema.types[type_name]
    if isinstance(found, EnumType):
        return names == {"str"} or names == {"Literal"} or _is_enum(names, module)
    if isinstance(found, AlternateType):
        return names == {"Any"} or names in _alternate_images(found, schema)
    return len(names) == 1 and (bool(names & {"dict", "Mapping"}) or hints.dataclass_of(atoms, module) is not None)


def _is_enum(names: set[str], module: str) -> bool:
    found = hints.resolve(next(iter(names)), module) if len(names) == 1 else None
    return hasattr(found, "__members__")


_BUILTINS = {"str": "str", "bool": "bool", "number": "float", "null": "None", "any": "Any"}


def _alternate_images(alternate: AlternateType, schema: Schema) -> list[set[str]]:
    """Return the sets of type names an alternate may have: its branches, or the graph's Child for nodes."""
    mappings: list[set[str]] = []
    for mapping in ("dict", "Mapping"):
        branches = set()
        for branch in alternate.branches.values():
            if branch in _BUILTINS:
                branches.add(_BUILTINS[branch])
            elif branch in _INTEGERS:
                branches.add("int")
            elif branch[0] == "[":
                branches.add("list")
            else:
                branches.add("str" if isinstance(schema.types[branch], EnumType) else mapping)
        mappings.append(branches)
    if "BlockdevOptions" in alternate.branches.values():
        mappings.append({"Child"} | ({"None"} if "null" in alternate.branches.values() else set()))
        mappings.append({"Child"})
    return mappings


# Doc comments


def _doc_problems(schema: Schema) -> Iterator[str]:
    for entity in (*schema.types.values(), *schema.commands.values(), *schema.events.values()):
        if isinstance(entity, ObjectType) and entity.implicit:
            continue
        if entity.doc is None:
            yield f"{entity.place}: '{entity.name}' has no doc comment"
            continue
        names = _DOCUMENTED.findall(entity.doc_text)
        if not names or names[0] != entity.name:
            yield f"{entity.place}: the doc comment is not that of '{entity.name}'"
            continue
        for name in _members_to_document(entity, schema):
            if name not in names:
                yield f"{entity.member_place(name)}: the doc comment of '{entity.name}' leaves out '{name}'"


def _members_to_document(entity: Entity, schema: Schema) -> Iterable[str]:
    """Return the names that stand in the entity's own expression."""
    if isinstance(entity, EnumType):
        return entity.value_names
    if isinstance(entity, AlternateType):
        return entity.branches
    owner: Entity | None = entity
    if isinstance(entity, Command):
        owner = schema.types.get(entity.arguments or "")
    elif isinstance(entity, Event):
        owner = schema.types.get(entity.data or "")
    elif isinstance(entity, ObjectType) and entity.tag is not None:
        owner = schema.types.get(entity.base or "")
    if not isinstance(owner, ObjectType) or (owner is not entity and not owner.implicit):
        return ()
    return [member.name for member in owner.members]
