"""The start-up check: every way in which code and schema can differ has a line that names both places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qmpd.qapi import check
from qmpd.qapi.ir import SchemaError
from qmpd.qapi.registry import ClassEntry, CommandEntry, Registry, discover
from qmpd.qapi.schema import STORAGE_DAEMON_ROOT, SYSTEM_ROOT, Schema, load, load_file

if TYPE_CHECKING:
    from qmpd.block.child import Child

HERE = "tests/unit/qapi/test_check.py"

SCHEMA = """
##
# @Kind:
#
# @thin: little
# @fat: much
##
{ 'enum': 'Kind',
  'data': [ 'thin', 'fat' ] }

##
# @Fat:
#
# @file: a child
# @size: bytes
# @kinds: several
##
{ 'struct': 'Fat',
  'data': { 'file': 'BlockdevRef', '*size': 'int', '*kinds': [ 'Kind' ] } }

##
# @BlockdevRef:
#
# @definition: new
# @reference: old
##
{ 'alternate': 'BlockdevRef',
  'data': { 'definition': 'BlockdevOptions', 'reference': 'str' } }

##
# @BlockdevOptions:
#
# @driver: which
##
{ 'union': 'BlockdevOptions', 'base': { 'driver': 'Kind' }, 'discriminator': 'driver',
  'data': { 'fat': 'Fat' } }

##
# @do-it:
#
# @node-name: a node
# @count: how often
##
{ 'command': 'do-it', 'data': { 'node-name': 'str', '*count': 'int' } }
"""


@dataclass(frozen=True)
class ThinOptions:
    pass


@dataclass(frozen=True)
class FatOptions:
    file: Child
    size: int | None = None
    kinds: list[str] | None = None


async def do_it(ctx: Any, *, node_name: str, count: int = 1) -> None:
    pass


def entry(name: str, schema: str, options: type[Any]) -> ClassEntry:
    return ClassEntry(name, type(name.title(), (), {"__module__": __name__}), schema, options)


def registered() -> Registry:
    made = Registry()
    made.commands["do-it"] = CommandEntry("do-it", do_it)
    made.drivers["thin"] = entry("thin", "", ThinOptions)
    made.drivers["fat"] = entry("fat", "Fat", FatOptions)
    return made


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    return read(tmp_path, SCHEMA)


def read(folder: Path, text: str) -> Schema:
    (folder / "qapi").mkdir(exist_ok=True)
    path = folder / "qapi" / "root.json"
    path.write_text(text)
    return load_file(path)


def problems(registry: Registry, schema: Schema) -> list[str]:
    return [line.replace(f"{__name__.replace('.', '/')}.py", HERE) for line in check.problems(registry, schema)]


def test_nothing_is_said_when_both_agree(schema: Schema) -> None:
    assert problems(registered(), schema) == []


def test_a_command_needs_a_handler(schema: Schema) -> None:
    registry = registered()
    del registry.commands["do-it"]
    assert problems(registry, schema) == [
        "qapi/root.json:44: command 'do-it' has no handler, qmpd/commands/root.py should have one"
    ]


def test_a_handler_needs_a_command(schema: Schema) -> None:
    registry = registered()
    registry.commands["other"] = CommandEntry("other", do_it)
    assert problems(registry, schema) == [f"{HERE}: handler of 'other', which no schema has"]


def handler(text: str) -> Callable[..., Any]:
    """Return the function that `text` defines, as if it stood here."""
    names: dict[str, Any] = {"__name__": __name__, "Any": Any}
    exec(compile(f"from __future__ import annotations\n{text}", HERE, "exec"), names)
    made: Callable[..., Any] = names["f"]
    return made


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("async def f(ctx, *, node_name: str, count: int) -> None: pass",
         "f.count is required, qapi/root.json:44 has '*count'"),
        ("async def f(ctx, *, node_name: str = '', count: int = 1) -> None: pass",
         "f.node_name has a default, qapi/root.json:44 has 'node-name'"),
        ("async def f(ctx, *, node_name: int, count: int = 1) -> None: pass",
         "f.node_name is 'int', qapi/root.json:44 has 'node-name' of type 'str'"),
        ("async def f(ctx, *, node_name: str | None, count: int = 1) -> None: pass",
         "f.node_name is 'str | None', qapi/root.json:44 has 'node-name' of type 'str'"),
        ("async def f(ctx, *, node_name: str) -> None: pass",
         "f has no argument 'count', qapi/root.json:44 has '*count'"),
        ("async def f(ctx, *, node_name: str, count: int = 1, more: int = 1) -> None: pass",
         "f.more is no member of 'do-it', qapi/root.json:44"),
        ("async def f(ctx, node_name: str, *, count: int = 1) -> None: pass",
         "f must take the context and then keyword arguments only"),
        ("def f(ctx, *, node_name: str, count: int = 1) -> None: pass", "f is no coroutine function"),
    ],
)  # fmt: skip
def test_a_signature_differs(schema: Schema, text: str, line: str) -> None:
    registry = registered()
    registry.commands["do-it"] = CommandEntry("do-it", handler(text))
    assert f"{HERE}: {line}" in problems(registry, schema)


def test_a_boxed_command_has_one_argument(tmp_path: Path) -> None:
    schema = read(tmp_path, SCHEMA.replace("'*count': 'int' } }", "'*count': 'int' }, 'gen': false }"))
    assert problems(registered(), schema) == [
        f"{HERE}: do_it must take one keyword argument 'options', qapi/root.json:44 is boxed"
    ]
    registry = registered()
    registry.commands["do-it"] = CommandEntry(
        "do-it", handler("async def f(ctx, *, options: dict[str, Any]) -> None: pass")
    )
    assert problems(registry, schema) == []


def test_a_driver_needs_a_class_and_a_class_a_branch(schema: Schema) -> None:
    registry = registered()
    registry.drivers["huge"] = registry.drivers.pop("thin")
    assert problems(registry, schema) == [
        "qapi/root.json:35: 'thin' of 'BlockdevOptions' is not served, no class has @driver",
        f"{HERE}: driver 'huge' is no branch of 'BlockdevOptions', qapi/root.json:35",
    ]


def test_a_class_states_the_struct_of_its_branch(schema: Schema) -> None:
    registry = registered()
    registry.drivers["fat"] = entry("fat", "Slim", FatOptions)
    assert problems(registry, schema) == [
        f"{HERE}: driver 'fat' states schema 'Slim', qapi/root.json:35 has 'Fat'",
    ]


@dataclass(frozen=True)
class Required:
    file: Child
    size: int
    kinds: list[str] | None = None


@dataclass(frozen=True)
class Missing:
    file: Child
    size: int | None = None


@dataclass(frozen=True)
class Added:
    file: Child
    size: int | None = None
    kinds: list[str] | None = None
    more: int = 0


@dataclass(frozen=True)
class Mistyped:
    file: int
    size: str = ""
    kinds: list[int] | None = None


@dataclass(frozen=True)
class Defaulted:
    file: Child | None = None
    size: int | None = None
    kinds: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (Required, ["Required.size is required, qapi/root.json:19 has '*size'"]),
        (Missing, ["Missing has no field 'kinds', qapi/root.json:19 has '*kinds'"]),
        (Added, ["Added.more is no member of 'Fat', qapi/root.json:18"]),
        (
            Mistyped,
            [
                "Mistyped.file is 'int', qapi/root.json:19 has 'file' of type 'BlockdevRef'",
                "Mistyped.size is 'str', qapi/root.json:19 has '*size' of type 'int'",
                "Mistyped.kinds is 'list[int]', qapi/root.json:19 has '*kinds' of type '[Kind]'",
            ],
        ),
        (
            Defaulted,
            [
                "Defaulted.file has a default, qapi/root.json:19 has 'file'",
                "Defaulted.file is 'Child | None', qapi/root.json:19 has 'file' of type 'BlockdevRef'",
            ],
        ),
    ],
)
def test_an_options_dataclass_differs(schema: Schema, options: type[Any], lines: list[str]) -> None:
    registry = registered()
    registry.drivers["fat"] = entry("fat", "Fat", options)
    assert problems(registry, schema) == [f"{HERE}: {line}" for line in lines]


def test_a_job_type_stands_in_the_schema(schema: Schema) -> None:
    registry = registered()
    registry.jobtypes["mirror"] = entry("mirror", "", ThinOptions)
    assert problems(registry, schema) == [f"{HERE}: job type 'mirror' is no value of 'JobType'"]


def test_every_entity_and_member_is_documented(tmp_path: Path) -> None:
    schema = read(tmp_path, SCHEMA.replace("# @fat: much\n", "").replace("# @do-it:", "# @doit:"))
    assert problems(registered(), schema) == [
        "qapi/root.json:8: the doc comment of 'Kind' leaves out 'fat'",
        "qapi/root.json:43: the doc comment is not that of 'do-it'",
    ]
    schema = read(tmp_path, "{ 'enum': 'E', 'data': [ ] }")
    assert check.problems(Registry(), schema) == ["qapi/root.json:1: 'E' has no doc comment"]


def test_a_program_registers_what_its_root_contains(schema: Schema) -> None:
    registry = registered()
    registry.commands["other"] = CommandEntry("other", do_it)
    registry.devices["scsi-hd"] = registry.drivers["huge"] = entry("huge", "", ThinOptions)
    mine = check.registry_for(registry, schema)
    assert (set(mine.commands), set(mine.drivers), set(mine.devices)) == ({"do-it"}, {"thin", "fat"}, set())


def test_the_programs_agree_with_their_schemas() -> None:
    registry, system, daemon = discover(), load(SYSTEM_ROOT), load(STORAGE_DAEMON_ROOT)
    assert check.problems(registry, system, daemon) == []
    assert check.problems(check.registry_for(registry, system), system) == []
    assert check.problems(check.registry_for(registry, daemon), daemon) == []


def test_a_program_does_not_start_with_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(discover().commands, "no-such", CommandEntry("no-such", do_it))
    with pytest.raises(SchemaError, match="handler of 'no-such', which no schema has"):
        check.registered(load(STORAGE_DAEMON_ROOT))


def test_a_started_program_has_its_own_commands_only() -> None:
    assert "device_add" in check.registered(load(SYSTEM_ROOT)).commands
    assert "device_add" not in check.registered(load(STORAGE_DAEMON_ROOT)).commands
