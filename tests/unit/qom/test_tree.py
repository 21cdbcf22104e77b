"""The QOM tree: names, paths, properties and types as QEMU 10.0.2 shows them."""

from __future__ import annotations

from typing import Any

import pytest

from qmpd.errors import CommandError, DeviceNotFound
from qmpd.qapi.registry import Registry
from qmpd.qom.object import Container, Property, QomObject
from qmpd.qom.tree import ObjectTree, id_well_formed
from qmpd.qom.types import TypeInfo


class Base(QomObject):
    qom_type = "base"
    abstract = True
    interfaces = ("user-creatable",)
    qom_properties = (Property("size", "int", get=lambda self: self.size),)

    def __init__(self) -> None:
        super().__init__()
        self.size = 7
        self.log: list[str] = []

    def delete(self) -> None:
        self.log.append("delete")


class Thing(Base):
    qom_type = "thing"
    abstract = False
    busy = False
    fails = False

    def complete(self, objects: ObjectTree) -> None:
        assert objects.get(self.id) is self
        if self.fails:
            raise CommandError("no good")

    def in_use(self) -> bool:
        return self.busy


@pytest.fixture
def tree() -> ObjectTree:
    return ObjectTree(Registry())


def test_ids_are_a_letter_then_letters_digits_and_three_signs() -> None:
    for good in ("a", "a.b-c_d", "A1", "a" * 1000, "objects"):
        assert id_well_formed(good)
    for bad in ("", "1abc", "a b", "a/b", "_x", "-x", "#a", "é", "aé", "a\n"):
        assert not id_well_formed(bad)


def test_a_name_that_is_taken_is_a_duplicate_property_of_a_container(tree: ObjectTree) -> None:
    tree.add("a", Thing())
    for name in ("a", "type"):
        with pytest.raises(CommandError) as caught:
            tree.add(name, Thing())
        assert str(caught.value) == f"attempt to add duplicate property '{name}' to object (type 'container')"


def test_an_object_that_cannot_be_completed_leaves_nothing(tree: ObjectTree) -> None:
    thing = Thing()
    thing.fails = True
    with pytest.raises(CommandError, match="no good"):
        tree.add("a", thing)
    assert tree.get("a") is None
    assert thing.log == ["delete"]
    assert thing.path == ""


def test_removing(tree: ObjectTree) -> None:
    thing = Thing()
    tree.add("a", thing)
    thing.busy = True
    with pytest.raises(CommandError, match=r"^object 'a' is in use, can not be deleted$"):
        tree.remove("a")
    thing.busy = False
    tree.remove("a")
    assert thing.log == ["delete"]
    for name in ("a", "", "type", "/objects/a"):
        with pytest.raises(CommandError) as caught:
            tree.remove(name)
        assert str(caught.value) == f"object '{name}' not found"


def test_paths_absolute_and_partial(tree: ObjectTree) -> None:
    thing = Thing()
    tree.add("a", thing)
    for path in ("/objects/a", "//objects//a/", "a", "objects/a", "a/"):
        assert tree.resolve(path) is thing
    for path in ("/a", "/objects/b", "b", "objects/a/b", "/objects/a/size"):
        with pytest.raises(DeviceNotFound) as caught:
            tree.resolve(path)
        assert str(caught.value) == f"Device '{path}' not found"
    assert tree.resolve("/") is tree.root
    assert thing.path == "/objects/a"
    assert tree.root.path == "/"


def test_a_partial_path_that_fits_twice_is_ambiguous(tree: ObjectTree) -> None:
    tree.add("objects", Thing())
    assert tree.find("objects") == (None, True)
    assert tree.find("") == (None, True)
    assert tree.find("backend") == (tree.root.children["backend"], False)


def test_paths_follow_links(tree: ObjectTree) -> None:
    class Linked(Container):
        def link_target(self, name: str) -> QomObject | None:
            return tree.get("a") if name == "drive" else None

    tree.add("a", Thing())
    tree.root.add_child("machine", Linked())
    assert tree.resolve("/machine/drive") is tree.get("a")


def test_properties_are_those_of_the_class_its_bases_and_the_children(tree: ObjectTree) -> None:
    tree.add("a", Thing())
    objects = tree.resolve("/objects")
    assert [(one.name, one.type) for one in objects.properties().values()] == [
        ("type", "string"),
        ("a", "child<thing>"),
    ]
    assert objects.get_property("a") == "/objects/a"
    thing = tree.resolve("a")
    assert thing.get_property("type") == "thing"
    assert thing.get_property("size") == 7
    for action, text in (
        (lambda: thing.get_property("x"), "Property 'thing.x' not found"),
        (lambda: thing.set_property("x", 1), "Property 'thing.x' not found"),
        (lambda: thing.set_property("size", 1), "Property 'thing.size' is not writable"),
        (lambda: objects.set_property("a", 1), "Property 'container.a' is not writable"),
    ):
        with pytest.raises(CommandError) as caught:
            action()
        assert str(caught.value) == text


def names(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(row["name"] for row in rows)


def test_types_come_with_their_bases_and_interfaces(tree: ObjectTree) -> None:
    tree.types.add_class(Thing)
    tree.types.add(TypeInfo("widget", "base", properties={}))
    listed = tree.types.list_types
    assert names(listed(None, False)) == ["container", "thing", "widget"]
    assert names(listed(None, True)) == [
        "base", "container", "interface", "object", "thing", "user-creatable", "widget",
    ]  # fmt: skip
    assert names(listed("base", True)) == ["base", "thing", "widget"]
    assert names(listed("user-creatable", False)) == ["thing", "widget"]
    assert names(listed("interface", False)) == ["thing", "widget"]
    assert listed("nosuch", True) == []
    assert {"name": "base", "parent": "object", "abstract": True} in listed(None, True)
    assert {"name": "object", "abstract": True} in listed(None, True)
    assert tree.types.implements("thing", "user-creatable")


def test_properties_of_types(tree: ObjectTree) -> None:
    tree.types.add_class(Thing)
    assert tree.types.list_properties("thing") == [
        {"name": "type", "type": "string"},
        {"name": "size", "type": "int"},
    ]
    assert tree.types.list_properties("object") == [{"name": "type", "type": "string"}]
    with pytest.raises(DeviceNotFound, match=r"^Class 'nosuch' not found$"):
        tree.types.list_properties("nosuch")
    with pytest.raises(CommandError, match=r"^Parameter 'typename' expects a QOM type$"):
        tree.types.list_properties("user-creatable")


def test_closing_releases_the_newest_first(tree: ObjectTree) -> None:
    order: list[str] = []

    class Loud(Thing):
        def delete(self) -> None:
            order.append(self.name)

    for name in ("a", "b", "c"):
        tree.add(name, Loud())
    tree.close()
    assert order == ["c", "b", "a"]
