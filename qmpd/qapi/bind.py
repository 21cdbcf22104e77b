"""Makes options dataclasses of validated wire dictionaries.

A field is the member of the same name, `-` written as `_`; a field whose type is a dataclass, or a
list or tuple of one, is built the same way; everything else is taken as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from qmpd.qapi import hints
from qmpd.qapi.hints import Atom
from qmpd.qapi.visit import snake_case

T = TypeVar("T")
Converter = Callable[[Any], Any]

_converters: dict[type[Any], dict[str, Converter | None]] = {}
UNBOUND = frozenset(("backing",))
"""Members that are the graph's affair: a dataclass may leave them out."""


def build(options_cls: type[T], members: Mapping[str, Any]) -> T:
    """Return an `options_cls` with the values of `members` (wire names); absent members get its defaults.

    Raises TypeError for a member without a field, or a missing one without default: the start-up
    check (`qmpd.qapi.check`) has proven that neither happens with validated members.
    """
    converters = _converters.get(options_cls)
    if converters is None:
        converters = _converters[options_cls] = _field_converters(options_cls)
    values: dict[str, Any] = {}
    for wire, value in members.items():
        name = snake_case(wire)
        if name not in converters:
            if name in UNBOUND:
                continue
            raise TypeError(f"{options_cls.__name__} has no field for member '{wire}'")
        converter = converters[name]
        values[name] = value if converter is None else converter(value)
    return options_cls(**values)


def _field_converters(options_cls: type[Any]) -> dict[str, Converter | None]:
    return {
        field.name: _converter(hints.parse(str(field.type)), options_cls.__module__)
        for field in dataclasses.fields(options_cls)
    }


def _converter(atoms: tuple[Atom, ...], module: str) -> Converter | None:
    """Return what a field's type asks to be done to a value, None for nothing."""
    nested = hints.dataclass_of(atoms, module)
    if nested is not None:
        found = nested
        return lambda value: build(found, value) if isinstance(value, Mapping) else value
    for atom in atoms:
        if atom.name in ("list", "tuple", "Sequence") and atom.arguments:
            make: Callable[[Any], Any] = list if atom.name == "list" else tuple
            inner = _converter(atom.arguments[0], module)
            if inner is None and make is list:
                return None
            each: Converter = inner or (lambda value: value)
            return lambda value: None if value is None else make(map(each, value))
    return None
