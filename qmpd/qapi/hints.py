"""Type annotations of handlers and options dataclasses, read as text.

Annotations are strings (`from __future__ import annotations`), and names that are imported for type
checking only mean nothing at run time; so the text is taken apart, and a name is looked up in its
module only where its meaning matters.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import types
import typing
from functools import cache
from typing import Any, NamedTuple


class Atom(NamedTuple):
    """One alternative of an annotation: `list[str] | None` has two.

    name  "str", "list", "None", "Child" ...        arguments  what stands in its brackets
    """

    name: str
    arguments: tuple[tuple[Atom, ...], ...] = ()

    def __str__(self) -> str:
        """Return it as it would be written."""
        inner = ", ".join(" | ".join(map(str, argument)) for argument in self.arguments)
        return f"{self.name}[{inner}]" if inner else self.name


@cache
def parse(text: str) -> tuple[Atom, ...]:
    """Return the alternatives of an annotation."""
    return _atoms(ast.parse(text, mode="eval").body)


def _atoms(node: ast.expr) -> tuple[Atom, ...]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _atoms(node.left) + _atoms(node.right)
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return tuple(Atom(head.name, tuple(map(_atoms, inner))) for head in _atoms(node.value))
    if isinstance(node, ast.Constant):
        return (Atom("..." if node.value is ... else str(node.value)),)
    if isinstance(node, ast.Attribute):
        return (Atom(node.attr),)
    return (Atom(node.id if isinstance(node, ast.Name) else ast.unparse(node)),)


def expand(atoms: tuple[Atom, ...], module: str) -> tuple[Atom, ...]:
    """Replace names that are aliases of unions in the module by what they stand for."""
    if all(atom.name in _PLAIN for atom in atoms):
        return atoms
    expanded: list[Atom] = []
    for atom in atoms:
        alias = None if atom.name in _PLAIN else resolve(atom.name, module)
        if isinstance(alias, types.UnionType) or typing.get_origin(alias) is not None:
            expanded += parse(str(alias).replace("collections.abc.", "").replace("typing.", ""))
        else:
            expanded.append(atom)
    return tuple(expanded)


_PLAIN = frozenset(
    ("None", "str", "int", "bool", "float", "Any", "Child", "dict", "list", "tuple", "Mapping", "Sequence")
)


def resolve(name: str, module: str) -> Any:
    """Return what `name` means in `module`, None if nothing at run time."""
    return getattr(sys.modules[module], name, None)


def dataclass_of(atoms: tuple[Atom, ...], module: str) -> type[Any] | None:
    """Return the dataclass among the alternatives, if there is one."""
    for atom in atoms:
        if atom.name not in _PLAIN:
            found = resolve(atom.name, module)
            if isinstance(found, type) and dataclasses.is_dataclass(found):
                return found
    return None
