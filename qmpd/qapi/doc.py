"""The reference page and option help, made of the schema's doc comments.

    python -m qmpd.qapi.doc [OUTPUT]     write the page (default: docs/qmp-reference.md)
    python -m qmpd.qapi.doc --check      fail if the page there is not what would be written

A doc comment names its entity, says what it is, then has a line per member (`@name: text`, further
lines indented) and, after `Features:`, a line per feature.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qmpd.qapi.ir import AlternateType, Command, Entity, EnumType, Event, Member, Module, ObjectType
from qmpd.qapi.schema import STORAGE_DAEMON_ROOT, SYSTEM_ROOT, Schema, load, schema_directory

_ENTRY = re.compile(r"@([^\s:]+):\s*(.*)")
_REFERENCE = re.compile(r"@([A-Za-z_][\w.-]*\w|\w)")


@dataclass(slots=True)
class Doc:
    """A doc comment taken apart.

    text      paragraphs about the entity         members, features  text by name
    """

    text: str = ""
    members: dict[str, str] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)


def parse_doc(entity: Entity) -> Doc:
    """Return the doc comment of an entity; empty without one."""
    doc = Doc()
    section: dict[str, str] = {}
    name = ""
    for raw in entity.doc_text.splitlines():
        line = raw[1:].strip()
        if line == "Features:":
            section, name = doc.features, ""
        elif match := _ENTRY.fullmatch(line):
            if not doc.text and not doc.members and match.group(1) == entity.name:
                section = doc.members
                continue
            name = match.group(1)
            section[name] = match.group(2)
        elif name and line and raw.startswith("#   "):
            section[name] += f" {line}"
        elif line:
            name = ""
            doc.text += f"{' ' if doc.text and not doc.text.endswith(chr(10)) else ''}{line}"
        elif doc.text and not doc.members:
            doc.text += "\n\n"
    doc.text = doc.text.strip()
    return doc


def help_text(schema: Schema, type_name: str, *, prefix: str = "") -> str:
    """Return what a struct's or union branch's members mean, one line each, for a command line.

    prefix  put before every name ("file." for the options of a child)
    """
    lines = []
    for member, text in _documented_members(schema, schema.object_type(type_name)):
        value = _shown_type(schema, member.type, plain=True)
        left = f"  {prefix}{member.name}=<{value}>"
        lines.append(f"{left:<38} {_plain(text)}" if len(left) < 38 else f"{left}\n{'':38} {_plain(text)}")
    return "".join(f"{line}\n" for line in lines)


def summary(schema: Schema, name: str) -> str:
    """Return the first sentence about a command, event or type, for lists."""
    entity = schema.commands.get(name) or schema.events.get(name) or schema.types[name]
    return _plain(parse_doc(entity).text.partition("\n\n")[0])


def reference(system: Schema, storage_daemon: Schema) -> str:
    """Return the reference page, in Markdown."""
    lines = [
        "# QMP reference",
        "",
        "<!-- Written by `make docs` from qapi/*.json; edit those. -->",
        "",
        "Commands, events and types of `qmpd`. What is marked † is in `qmpd-storage-daemon`, too.",
        "",
    ]
    for module in system.modules:
        entities = [one for one in _entities(system) if one.module is module]
        if not entities:
            continue
        name = module.path.rpartition("/")[2].removesuffix(".json")
        lines += [f"## {name}", "", *_heading(module)]
        for entity in entities:
            lines += _entry(system, storage_daemon, entity)
    return "\n".join(lines).rstrip("\n") + "\n"


def _entities(schema: Schema) -> Iterator[Entity]:
    """Yield the commands, then events, then types that have a name of their own."""
    yield from schema.commands.values()
    yield from schema.events.values()
    for entity in schema.types.values():
        if not (isinstance(entity, ObjectType) and entity.implicit):
            yield entity


def _heading(module: Module) -> list[str]:
    """Return the comment that opens a module."""
    text = []
    for line in module.text.splitlines():
        if not line.startswith("# "):
            break
        text.append(line[2:])
    return [_marked(" ".join(text)), ""] if text else []


def _entry(schema: Schema, storage_daemon: Schema, entity: Entity) -> list[str]:
    doc = parse_doc(entity)
    kind = {
        Command: "command",
        Event: "event",
        EnumType: "enumeration",
        AlternateType: "alternate",
        ObjectType: "union" if isinstance(entity, ObjectType) and entity.tag else "struct",
    }[type(entity)]
    both = entity.name in {**storage_daemon.commands, **storage_daemon.events, **storage_daemon.types}
    lines = [f"### {entity.name}", "", f"*{kind}*{' †' if both else ''}", ""]
    if doc.text:
        lines += [_marked(doc.text), ""]
    if isinstance(entity, EnumType):
        lines += [f"- `{value.name}`: {_marked(doc.members.get(value.name, ''))}" for value in entity.values]
    elif isinstance(entity, AlternateType):
        for branch, type_name in entity.branches.items():
            lines.append(f"- {_shown_type(schema, type_name)}: {_marked(doc.members.get(branch, ''))}")
    else:
        lines += _member_lines(schema, entity)
    if isinstance(entity, Command) and entity.returns is not None:
        lines += [*_gap(lines), f"Returns {_shown_type(schema, entity.returns)}."]
    if entity.features or doc.features:
        lines += [*_gap(lines), "Features:", ""]
        lines += [f"- `{name}`: {_marked(text)}" for name, text in doc.features.items()]
    return [*lines, *_gap(lines)]


def _gap(lines: list[str]) -> list[str]:
    return [""] if lines[-1] else []


def _member_lines(schema: Schema, entity: Entity) -> list[str]:
    lines = []
    for member, text in _documented_members(schema, entity):
        optional = ", optional" if member.optional else ""
        lines.append(f"- `{member.name}` ({_shown_type(schema, member.type)}{optional}): {_marked(text)}")
    if isinstance(entity, ObjectType) and entity.branches:
        for case, type_name in entity.branches.items():
            lines.append(f"- with `{entity.tag}` `{case}`: the members of {_shown_type(schema, type_name)}")
    if isinstance(entity, Command | Event):
        name = entity.arguments if isinstance(entity, Command) else entity.data
        found = schema.types.get(name or "")
        if isinstance(found, ObjectType) and found.tag is not None:
            lines.append(f"- and what {_shown_type(schema, found.name)} adds for its `{found.tag}`")
    return lines


def _documented_members(schema: Schema, entity: Entity) -> Iterator[tuple[Member, str]]:
    """Yield all members of an entity, those of its bases first, each with its text."""
    own = parse_doc(entity).members
    if isinstance(entity, Command | Event):
        name = entity.arguments if isinstance(entity, Command) else entity.data
        if name is None:
            return
        found = schema.object_type(name)
        if found.implicit:
            for member in found.members:
                yield member, own.get(member.name, "")
        else:
            yield from _documented_members(schema, found)
    elif isinstance(entity, ObjectType):
        if entity.base is not None:
            base = schema.object_type(entity.base)
            if base.implicit:
                for member in base.members:
                    yield member, own.get(member.name, "")
            else:
                yield from _documented_members(schema, base)
        for member in entity.members:
            yield member, own.get(member.name, "")


def _shown_type(schema: Schema, type_name: str, *, plain: bool = False) -> str:
    if type_name[0] == "[":
        return f"array of {_shown_type(schema, type_name[1:-1], plain=plain)}"
    if plain:
        found = schema.types.get(type_name)
        return "|".join(found.value_names) if isinstance(found, EnumType) else type_name
    return f"[{type_name}](#{type_name.lower()})" if type_name in schema.types else type_name


def _plain(text: str) -> str:
    return _REFERENCE.sub(r"\1", text)


def _marked(text: str) -> str:
    return _REFERENCE.sub(r"`\1`", text)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the reference page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qmpd.qapi.doc", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "output", nargs="?", type=Path, default=Path(schema_directory()).parent / "docs/qmp-reference.md"
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page is out of date")
    options = parser.parse_args(arguments)
    text = reference(load(SYSTEM_ROOT), load(STORAGE_DAEMON_ROOT))
    if not options.check:
        options.output.write_text(text, encoding="utf-8")
    elif not options.output.exists() or options.output.read_text(encoding="utf-8") != text:
        sys.stderr.write(f"{options.output} is out of date: run 'make docs'\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
