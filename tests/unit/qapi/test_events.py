"""Events in the code against events in the schema: names and members, in both directions.

Read from the source: `emit("NAME", member=...)`, member names with `_` for `-`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from qmpd.qapi.schema import SYSTEM_ROOT, load

EVENT = re.compile(r"[A-Z]+(_[A-Z]+)*")
PACKAGE = Path(__file__).resolve().parents[3] / "qmpd"


def emitted() -> Iterator[tuple[str, str, set[str] | None]]:
    """Yield place, name and members of each call; None for members that are not written out.

    Where the name is not written out either, every event that the module names counts.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "emit":
                place = f"{path.name}:{node.lineno}"
                members = {(keyword.arg or "**").replace("_", "-") for keyword in node.keywords}
                if names := event_names(node.args[0]):
                    yield from ((place, name, None if "**" in members else members) for name in names)
                else:
                    yield from ((place, name, None) for name in event_names(tree))


def event_names(tree: ast.AST) -> list[str]:
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str) and EVENT.fullmatch(value)]


def test_code_emits_the_events_of_the_schema_with_their_members() -> None:
    schema = load(SYSTEM_ROOT)
    calls = list(emitted())
    for place, name, members in calls:
        assert name in schema.events, f"{place}: the schema has no event {name}"
        declared = schema.members(schema.events[name].data)
        if members is not None:
            required = {member.name for member in declared if not member.optional}
            assert required <= members <= {member.name for member in declared}, f"{place}: members of {name}"
    assert schema.events.keys() - {name for _, name, _ in calls} == set(), "events that nothing emits"
