"""Typed declarations of fixed binary layouts.

    @dataclass(frozen=True, slots=True)
    class Keyslot(Layout):
        SIZE: ClassVar[int] = 48
        active: u32
        salt: bytes32
        ...

The fields follow one another without padding. Byte order is ORDER, big-endian unless a class
says otherwise; the declared SIZE is compared with the sum of the fields at first use.
"""

from __future__ import annotations

import dataclasses
import struct
import typing
from typing import Annotated, Any, ClassVar, Self, TypeAlias

u8: TypeAlias = Annotated[int, "B"]
u16: TypeAlias = Annotated[int, "H"]
u32: TypeAlias = Annotated[int, "I"]
u64: TypeAlias = Annotated[int, "Q"]
bytes6: TypeAlias = Annotated[bytes, "6s"]
bytes20: TypeAlias = Annotated[bytes, "20s"]
bytes32: TypeAlias = Annotated[bytes, "32s"]
bytes40: TypeAlias = Annotated[bytes, "40s"]
bytes48: TypeAlias = Annotated[bytes, "48s"]
bytes64: TypeAlias = Annotated[bytes, "64s"]
bytes184: TypeAlias = Annotated[bytes, "184s"]

_structs: dict[type, struct.Struct] = {}
_offsets: dict[type, dict[str, int]] = {}


def _struct_of(cls: type[Layout]) -> struct.Struct:
    if cls not in _structs:
        hints = typing.get_type_hints(cls, include_extras=True)
        codes = [hints[field.name].__metadata__[0] for field in dataclasses.fields(cls)]
        made = struct.Struct(cls.ORDER + "".join(codes))
        if made.size != cls.SIZE:
            raise TypeError(f"{cls.__name__}: the fields take {made.size} bytes, SIZE says {cls.SIZE}")
        _structs[cls] = made
    return _structs[cls]


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Base of all layouts; see the module for how one is declared."""

    SIZE: ClassVar[int] = 0
    ORDER: ClassVar[str] = ">"

    @classmethod
    def unpack_from(cls, buffer: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """Return the value at `offset`. Raises ValueError if the buffer ends before it does."""
        if offset < 0 or len(buffer) - offset < cls.SIZE:
            raise ValueError(f"{cls.__name__} takes {cls.SIZE} bytes, {max(0, len(buffer) - offset)} are there")
        return cls(*_struct_of(cls).unpack_from(buffer, offset))

    def pack(self) -> bytes:
        """Return the SIZE bytes of this value."""
        return _struct_of(type(self)).pack(*self._values())

    def pack_into(self, buffer: bytearray | memoryview, offset: int = 0) -> None:
        """Write the SIZE bytes of this value at `offset`."""
        _struct_of(type(self)).pack_into(buffer, offset, *self._values())

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @classmethod
    def offset_of(cls, name: str) -> int:
        """Return the byte offset of field `name`: for error texts and for generators of bad input."""
        if cls not in _offsets:
            hints = typing.get_type_hints(cls, include_extras=True)
            places, at = {}, 0
            for field in dataclasses.fields(cls):
                places[field.name] = at
                at += struct.calcsize(cls.ORDER + hints[field.name].__metadata__[0])
            _offsets[cls] = places
        return _offsets[cls][name]
