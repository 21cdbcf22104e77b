"""Every command and event we offer has the argument and return types of QEMU 10.0.2.

Compared is the structure clients see through query-qmp-schema, against the replies recorded from
the system emulator and the storage daemon. introspection_differences.toml names what differs.
"""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.qapi.introspect import schema_info
from qmpd.qapi.schema import STORAGE_DAEMON_ROOT, SYSTEM_ROOT, load

CORPUS = Path(__file__).resolve().parents[2] / "conformance" / "corpus"
RECORDED = {SYSTEM_ROOT: "schema-system.json.gz", STORAGE_DAEMON_ROOT: "schema-qsd.json.gz"}
LISTED = tomllib.loads(Path(__file__).with_name("introspection_differences.toml").read_text())["difference"]

Infos = dict[str, dict[str, Any]]
Difference = tuple[str, str]


class Comparison:
    """Walks both answers together from each command and event of ours; yields (path, what differs)."""

    def __init__(self, ours: Infos, theirs: Infos) -> None:
        self.ours, self.theirs = ours, theirs
        self.seen: set[tuple[str, str]] = set()
        self.added: set[str] = set()  # what is ours alone: commands, events, types of members and of theirs

    def run(self) -> Iterator[Difference]:
        for name, info in self.ours.items():
            if info["meta-type"] in ("command", "event"):
                if name in self.theirs:
                    yield from self.compare(name, name, name)
                else:
                    self.own(name)
                    yield name, "not in QEMU"

    def own(self, name: str) -> None:
        """Note that an entity, and what it refers to, need not be like anything in QEMU."""
        if name in self.added:
            return
        self.added.add(name)
        info = self.ours[name]
        for key in ("arg-type", "ret-type", "element-type"):
            if key in info:
                self.own(info[key])
        for member in [*info.get("members", []), *info.get("variants", [])]:
            if "type" in member:
                self.own(member["type"])

    def compare(self, path: str, our_name: str, their_name: str) -> Iterator[Difference]:
        if (our_name, their_name) in self.seen:
            return
        self.seen.add((our_name, their_name))
        ours, theirs = self.ours[our_name], self.theirs[their_name]
        if ours["meta-type"] != theirs["meta-type"]:
            yield path, f"{ours['meta-type']}, not {theirs['meta-type']}"
            return
        yield from self.features(path, ours, theirs)
        yield from getattr(self, f"compare_{ours['meta-type']}")(path, ours, theirs)

    def features(self, path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
        mine, others = ours.get("features", []), theirs.get("features", [])
        if mine != others:
            yield path, "feature" if set(mine) < set(others) else f"features {mine}, not {others}"

    def compare_command(self, path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
        if ours.get("allow-oob") != theirs.get("allow-oob"):
            yield path, "allow-oob"
        yield from self.compare(f"{path}(arg)", ours["arg-type"], theirs["arg-type"])
        yield from self.compare(f"{path}(ret)", ours["ret-type"], theirs["ret-type"])

    def compare_event(self, path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
        yield from self.compare(f"{path}(arg)", ours["arg-type"], theirs["arg-type"])

    def compare_builtin(self, path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
        if ours != theirs:
            yield path, f"{ours['name']}, not {theirs['name']}"

    def compare_array(self, path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
        yield from self.compare(f"{path}[]", ours["element-type"], theirs["element-type"])

    def compare_enum(self, path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
        mine, others = ours["members"], theirs["members"]
        added = [member["name"] for member in mine if member["name"] not in theirs["values"]]
        if added:
            yield path, f"adds {', '.join(added)}"
        if [member for member in others if member in mine] != [
            member for member in mine if member["name"] not in added
        ]:
            yield path, "order or features of values"
        if not {member["name"] for member in others} <= set(ours["values"]):
            yield path, "subset"

    def compare_alternate(self, path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
        if len(ours["members"]) != len(theirs["members"]):
            yield path, "number of choices"
        for mine, other in zip(ours["members"], theirs["members"], strict=False):
            yield from self.compare(f"{path}|", mine["type"], other["type"])

    def compare_object(self, path: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Difference]:
        mine, others = [{member["name"]: member for member in info["members"]} for info in (ours, theirs)]
        if added := [name for name in mine if name not in others]:
            yield path, f"adds {', '.join(added)}"
            for name in added:
                self.own(mine[name]["type"])
        if [name for name in others if name in mine] != [name for name in mine if name not in added]:
            yield path, f"members {list(mine)}, not {list(others)}"
        elif missing := [name for name in others if name not in mine]:
            yield path, f"lacks {', '.join(missing)}"
        for name in mine.keys() & others.keys():
            if ("default" in mine[name]) != ("default" in others[name]):
                yield f"{path}.{name}", "optional in one only"
        for name in [name for name in mine if name in others]:
            yield from self.features(f"{path}.{name}", mine[name], others[name])
            yield from self.compare(f"{path}.{name}", mine[name]["type"], others[name]["type"])
        if ours.get("tag") != theirs.get("tag"):
            yield path, "tag"
        branches = {variant["case"]: variant["type"] for variant in theirs.get("variants", [])}
        for variant in ours.get("variants", []):
            empty = self.ours[variant["type"]].get("members") == []
            if variant["case"] in branches and empty and self.theirs[branches[variant["case"]]]["members"]:
                yield f"{path}<{variant['case']}>", "no branch"
            elif variant["case"] in branches:
                yield from self.compare(f"{path}<{variant['case']}>", variant["type"], branches[variant["case"]])


def recorded(root: str) -> Infos:
    with gzip.open(CORPUS / RECORDED[root], "rt") as stream:
        return {info["name"]: info for info in json.load(stream)["return"]}


def own(root: str) -> Infos:
    return {info["name"]: info for info in schema_info(load(root))}


@pytest.mark.parametrize("root", RECORDED)
def test_only_listed_differences_remain(root: str) -> None:
    found = set(Comparison(own(root), recorded(root)).run())
    listed = {(entry["path"], entry["kind"]) for entry in LISTED if entry.get("root", root) == root}
    assert found == listed


def test_every_listed_difference_has_a_reason() -> None:
    assert [entry["path"] for entry in LISTED if len(entry["reason"]) < 15] == []


@pytest.mark.parametrize("root", RECORDED)
def test_a_changed_type_would_be_found(root: str) -> None:
    """The comparison reaches every entity we show: a change anywhere yields a difference."""
    ours, theirs = own(root), recorded(root)
    comparison = Comparison(ours, theirs)
    untouched = set(comparison.run())
    unlike_any = comparison.added - {name for name, _ in comparison.seen}
    for name, info in ours.items():
        if name in unlike_any:
            continue
        changes = {
            "object": ("members", [*info.get("members", []), {"name": "added", "type": "str"}]),
            "enum": ("members", [*info.get("members", []), {"name": "added"}]),
            "alternate": ("members", [*info.get("members", []), {"type": "str"}]),
            "array": ("element-type", "bool" if info.get("element-type") == "str" else "str"),
            "builtin": ("json-type", "nosuch"),
            "command": ("features", ["added"]),
            "event": ("features", ["added"]),
        }
        key, value = changes[info["meta-type"]]
        changed = {**ours, name: {**info, key: value}}
        assert set(Comparison(changed, theirs).run()) != untouched, name
