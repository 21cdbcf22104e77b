"""QomObject: what lives in the QOM tree, with typed properties.

The Python classes are the QOM types: a class that sets `qom_type` in its own body is a type of
that name, its parent type is the nearest such base class. Texts are those of QEMU's object core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.qom.tree import ObjectTree


class Property(NamedTuple):
    """One property of a type.

    type     the name QEMU shows ("string", "int", "bool", an enum or struct name, "link<T>")
    get      reads it as a JSON value; None: not readable
    set      takes any JSON value, checks it and stores it; None: not writable
    default  JSON value shown by qom-list-properties, None if QEMU shows none
    """

    name: str
    type: str
    get: Callable[[Any], Any] | None = None
    set: Callable[[Any, Any], None] | None = None
    description: str | None = None
    default: Any = None


class QomObject:
    """An object: properties by its classes, children by the tree.

    Class attributes
    qom_type    name of the type
    abstract    True for types that only others derive from; set per class, not inherited
    interfaces  interface types that this one adds to its parent's
    qom_properties  properties that this type adds to its parent's

    name, parent   its place in the tree, "" and None outside it
    children       objects below this one, in order of their making
    """

    qom_type: ClassVar[str] = "object"
    abstract: ClassVar[bool] = True
    interfaces: ClassVar[tuple[str, ...]] = ()
    qom_properties: ClassVar[tuple[Property, ...]] = ()

    def __init__(self) -> None:
        self.name = ""
        self.parent: QomObject | None = None
        self.children: dict[str, QomObject] = {}

    # --- life of a user-creatable object ----------------------------------------------------

    def complete(self, objects: ObjectTree) -> None:
        """Check the options against each other and the world, and acquire what they name.

        Called once, when the object is in the tree already (so that a name that is taken is
        reported first). Raises CommandError; whatever it acquired before, it releases itself.
        """

    def in_use(self) -> bool:
        """Say whether `object-del` has to refuse."""
        return False

    def check_delete(self) -> None:
        """Raise CommandError if the object may not be deleted now."""
        if self.in_use():
            raise CommandError(f"object '{self.name}' is in use, can not be deleted")

    def delete(self) -> None:
        """Release everything; called after the object left the tree, also if `complete` failed."""

    # --- properties -------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The name of a user-created object, which is its name below /objects."""
        return self.name

    @property
    def path(self) -> str:
        """The absolute path, "" outside the tree."""
        if self.parent is None:
            return "/" if self.name == "/" else ""
        above = self.parent.path
        return f"{above if above != '/' else ''}/{self.name}"

    def properties(self) -> dict[str, Property]:
        """Return the properties of this object by name, children included."""
        table = type_properties(type(self))
        for name, child in self.children.items():
            table[name] = Property(name, f"child<{child.type_name}>", get=partial(_path_of, child))
        return table

    @property
    def type_name(self) -> str:
        """The QOM type name; instances may refine the class's."""
        return type(self).qom_type

    def link_target(self, name: str) -> QomObject | None:
        """Return the object that the link property `name` points to, if it is one (for paths)."""
        return None

    def _property(self, name: str) -> Property:
        found = self.properties().get(name)
        if found is None:
            raise CommandError(f"Property '{self.type_name}.{name}' not found")
        return found

    def get_property(self, name: str) -> Any:
        """Return the JSON value of a property. Raises CommandError."""
        found = self._property(name)
        if found.get is None:
            raise CommandError(f"Property '{self.type_name}.{name}' is not readable")
        return found.get(self)

    def set_property(self, name: str, value: Any) -> None:
        """Set a property from a JSON value. Raises CommandError or ValidationError."""
        found = self._property(name)
        if found.set is None:
            raise CommandError(f"Property '{self.type_name}.{name}' is not writable")
        found.set(self, value)

    def add_child(self, name: str, child: QomObject) -> None:
        """Put `child` below this object. Raises CommandError if any property has that name."""
        plain = type(self).properties is QomObject.properties  # then the table of children need not be made
        if name in self.children or name in (type_properties(type(self)) if plain else self.properties()):
            raise CommandError(f"attempt to add duplicate property '{name}' to object (type '{self.type_name}')")
        child.name, child.parent = name, self
        self.children[name] = child

    def remove_child(self, name: str) -> QomObject:
        """Take the child `name` out of the tree and return it."""
        child = self.children.pop(name)
        child.parent = None
        return child

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path or self.name or 'outside the tree'}>"


QomObject.qom_properties = (Property("type", "string", get=lambda self: self.type_name),)


class Container(QomObject):
    """A directory of the tree."""

    qom_type = "container"
    abstract = False


def _path_of(child: QomObject, _parent: QomObject) -> str:
    return child.path


def type_chain(cls: type[QomObject]) -> Iterator[type[QomObject]]:
    """Yield the classes that are QOM types, from `cls` up to `object`."""
    for base in cls.__mro__:
        if issubclass(base, QomObject) and "qom_type" in vars(base):
            yield base


def type_properties(cls: type[QomObject]) -> dict[str, Property]:
    """Return the properties that every object of `cls` has, those of `object` first."""
    table: dict[str, Property] = {}
    for base in reversed(cls.__mro__):
        for one in vars(base).get("qom_properties", ()):
            table[one.name] = one
    return table
