"""What `query-qmp-schema` answers: the schema as data.

The structure is the reference's (its documentation calls it "client JSON protocol introspection"):
commands and events first, then the types they use, in order of use; names of types are masked by
numbers, arrays are `[name]`, every integer is `int`, and bases are folded into their types.
"""

from __future__ import annotations

from typing import Any

from qmpd.qapi.ir import BUILTIN_JSON_TYPES, AlternateType, Entity, EnumType, Member
from qmpd.qapi.schema import Schema

INTERNAL_FEATURES = frozenset({"sensitive"})
"""Features that are notes to ourselves and are not shown."""
_EMPTY = ""
"""Stands for the object type without members."""


def schema_info(schema: Schema) -> list[dict[str, Any]]:
    """Return the SchemaInfo objects of a schema; made once, the caller may not change them."""
    made: list[dict[str, Any]] | None = schema.compiled.get("introspection")
    if made is None:
        made = schema.compiled["introspection"] = _Introspection(schema).run()
    return made


class _Introspection:
    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.used: dict[str, None] = {}
        self.numbers: dict[str, str] = {}

    def run(self) -> list[dict[str, Any]]:
        infos = []
        for command in self.schema.commands.values():
            info = self._info(command.name, "command", command)
            info["arg-type"] = self._use(command.arguments or _EMPTY)
            info["ret-type"] = self._use(command.returns or _EMPTY)
            if command.allow_oob:
                info["allow-oob"] = True
            infos.append(info)
        for event in self.schema.events.values():
            info = self._info(event.name, "event", event)
            info["arg-type"] = self._use(event.data or _EMPTY)
            infos.append(info)
        done = 0
        while done < len(self.used):  # describing a type may use further ones
            for name in list(self.used)[done:]:
                infos.append(self._type(name))
                done += 1
        return infos

    def _use(self, name: str) -> str:
        """Return the name to show for a type, and note that it needs describing."""
        if name[:1] == "[":
            element = name[1:-1]
            if BUILTIN_JSON_TYPES.get(element) == "int":
                element = "int"
            self.used[f"[{element}]"] = None
            return f"[{self._use(element)}]"
        if BUILTIN_JSON_TYPES.get(name) == "int":
            name = "int"
        self.used[name] = None
        if name in BUILTIN_JSON_TYPES:
            return name
        return self.numbers.setdefault(name, str(len(self.numbers)))

    def _type(self, name: str) -> dict[str, Any]:
        if name == _EMPTY:
            return {"name": self._use(name), "meta-type": "object", "members": []}
        if name[0] == "[":
            element = self._use(name[1:-1])
            return {"name": f"[{element}]", "meta-type": "array", "element-type": element}
        if name in BUILTIN_JSON_TYPES:
            return {"name": name, "meta-type": "builtin", "json-type": BUILTIN_JSON_TYPES[name]}
        found = self.schema.types[name]
        shown = self._use(name)
        if isinstance(found, EnumType):
            info = self._info(shown, "enum", found)
            info["members"] = [_with_features({"name": value.name}, value.features) for value in found.values]
            info["values"] = list(found.value_names)
        elif isinstance(found, AlternateType):
            info = self._info(shown, "alternate", found)
            info["members"] = [{"type": self._use(branch)} for branch in found.branches.values()]
        else:
            info = self._info(shown, "object", found)
            members = self.schema.members(name)
            info["members"] = [self._member(member) for member in members]
            if found.tag is not None:
                tag_type = next(member.type for member in members if member.name == found.tag)
                info["tag"] = found.tag
                info["variants"] = [
                    {"case": case, "type": self._use(found.branches.get(case, _EMPTY))}
                    for case in self.schema.enum(tag_type).value_names
                ]
        return info

    def _member(self, member: Member) -> dict[str, Any]:
        info: dict[str, Any] = {"name": member.name, "type": self._use(member.type)}
        if member.optional:
            info["default"] = None
        return _with_features(info, member.features)

    def _info(self, name: str, meta_type: str, entity: Entity) -> dict[str, Any]:
        return _with_features({"name": name, "meta-type": meta_type}, entity.features)


def _with_features(info: dict[str, Any], features: tuple[str, ...]) -> dict[str, Any]:
    shown = [feature for feature in features if feature not in INTERNAL_FEATURES]
    if shown:
        info["features"] = shown
    return info
