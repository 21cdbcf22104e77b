"""What amend does to a qcow2 image: options are checked in the order given, then carried out in the reference's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from qmpd.cli.img._creation import FORMATS, Option
from qmpd.cli.img._names import parse_size
from qmpd.errors import CommandError, QmpdError
from qmpd.qapi import keyval
from qmpd.qapi.visit import validate

if TYPE_CHECKING:
    from qmpd.block.backend import BlockBackend
    from qmpd.cli.image import Workshop

OPTIONS = (
    Option("backing_file", "str", "image that shows where this one holds nothing", ""),
    Option("backing_fmt", "str", "its format", ""),
    Option("compat", "str", "version of the format: 0.10 (v2) or 1.1 (v3)", ""),
    Option("data_file", "str", "file that the content goes to, apart from the tables", ""),
    Option("data_file_raw", "bool", "keep that file usable as a raw image", ""),
    Option("encrypt.backup", "str", "new file that the LUKS header is copied to first", ""),
    Option("encrypt.iter-time", "num", "milliseconds that the key derivation of a new passphrase takes", ""),
    Option("encrypt.iterations", "num", "rounds of that key derivation, in place of a time", ""),
    Option("encrypt.keyslot", "num", "the key slot that is changed", ""),
    Option("encrypt.new-secret", "str", "id of the secret that a key slot is to take", ""),
    Option("encrypt.old-secret", "str", "id of the secret whose key slots are erased", ""),
    Option("encrypt.state", "str", "what becomes of key slots: active, inactive or changed", ""),
    Option("lazy_refcounts", "bool", "bring reference counts up to date late", ""),
    Option("refcount_bits", "num", "bits in a reference count", ""),
    Option("size", "size", "bytes that the disk shows", ""),
)
"""What can be changed: what the reference lists, and `encrypt.backup`, `encrypt.iterations`, as for luks."""

VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


class Qcow2(Protocol):
    """What this file asks of the driver's node."""

    backing_file: str | None
    backing_format: str | None

    def image_info(self) -> dict[str, Any]:
        """See `BlockNode.image_info`."""

    async def amend(self, options: Mapping[str, Any], *, force: bool) -> None:
        """Change key slots."""

    async def set_lazy_refcounts(self, lazy: bool) -> None:
        """Let refcounts be brought up to date late, or not."""

    async def set_version(self, version: int) -> None:
        """Make the image one of version 2 or 3."""

    async def set_refcount_bits(self, bits: int) -> None:
        """Change the width of the reference counts."""

    async def set_data_file_name(self, name: str) -> None:
        """Name another external data file in the image."""

    async def forget_raw_data_file(self) -> None:
        """Give up that the data file is valid as a raw image."""


@dataclass(slots=True)
class _Wanted:
    """The options, read; None where one was not given. Sizes in bytes."""

    version: int | None = None
    refcount_bits: int | None = None
    lazy: bool | None = None
    raw: bool | None = None
    data_file: str | None = None
    size: int | None = None
    backing: dict[str, str] = field(default_factory=dict)
    encrypt: dict[str, str] = field(default_factory=dict)


async def amend_qcow2(shop: Workshop, backend: BlockBackend, given: Mapping[str, str], *, force: bool) -> None:
    """Change options of the image. Raises CommandError."""
    node = cast(Qcow2, backend.node)
    data = node.image_info()["format-specific"]["data"]
    wanted = _read({name: _checked(name, value) for name, value in given.items()}, data)
    current = VERSIONS[data["compat"]]
    version = wanted.version or current
    try:
        if version > current:
            await node.set_version(version)
        if wanted.encrypt:
            members = {"format": "luks", **wanted.encrypt}
            await node.amend(
                {"encrypt": dict(validate(shop.schema, "Qcow2LuksAmendOptions", members, keyval=True))}, force=force
            )
        if wanted.refcount_bits is not None:
            await _refcount_bits(node, wanted.refcount_bits, data["refcount-bits"], version)
        if wanted.raw is False:
            await node.forget_raw_data_file()
        if wanted.data_file is not None:
            await node.set_data_file_name(wanted.data_file)
        _same_backing(node, wanted.backing)
        if wanted.lazy is not None and wanted.lazy != bool(data.get("lazy-refcounts")):
            if wanted.lazy and version < 3:
                raise CommandError(
                    "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
                )
            await node.set_lazy_refcounts(wanted.lazy)
        if wanted.size is not None:
            await backend.truncate(wanted.size)
        if version < current:
            await node.set_version(version)
    except (QmpdError, OSError) as error:
        text = str(error) if isinstance(error, QmpdError) else os.strerror(error.errno or 0)
        raise CommandError(text, hint=getattr(error, "hint", None)) from error


def _checked(name: str, value: str) -> str:
    """Return the value as it is, if there is such an option and it can have it. Raises CommandError."""
    option = next((one for one in OPTIONS if one.name == name), None)
    if option is None:
        known = name in {one.name for one in FORMATS["qcow2"]}
        hint = "This option is only supported for image creation" if known else None
        raise CommandError(f"Invalid parameter '{name}'", hint=hint)
    if option.kind == "bool" and value not in keyval.BOOLEANS:
        raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")
    if option.kind == "num" and keyval.parse_uint64(value) is None:
        raise CommandError(f"Parameter '{name}' expects a number")
    return value


def _read(given: Mapping[str, str], data: Mapping[str, Any]) -> _Wanted:
    """Return what is wanted of an image that says `data` of itself. Raises CommandError."""
    wanted = _Wanted()
    for option in OPTIONS_IN_ORDER:
        if option not in given:
            continue
        value = given[option]
        if option == "compat":
            if value not in VERSIONS:
                raise CommandError(f"Unknown compatibility level {value}")
            wanted.version = VERSIONS[value]
        elif option == "size":
            wanted.size = parse_size("size", value)
        elif option in ("backing_file", "backing_fmt"):
            wanted.backing[option] = value
        elif option.startswith("encrypt."):
            if "encrypt" not in data:
                raise CommandError("Can't amend encryption options - encryption not present")
            if data["encrypt"]["format"] != "luks":
                raise CommandError("Only LUKS encryption options can be amended")
            wanted.encrypt[option.removeprefix("encrypt.")] = value
        elif option == "lazy_refcounts":
            wanted.lazy = keyval.BOOLEANS[value]
        elif option == "refcount_bits":
            wanted.refcount_bits = int(value, 0)
            if wanted.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
                raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")
        elif option == "data_file":
            if value and "data-file-raw" not in data:
                raise CommandError("data-file can only be set for images that use an external data file")
            wanted.data_file = value if "data-file-raw" in data else None
        elif keyval.BOOLEANS[value] and not data.get("data-file-raw"):
            raise CommandError("data-file-raw cannot be set on existing images")
        else:
            wanted.raw = keyval.BOOLEANS[value]
    return wanted


OPTIONS_IN_ORDER = (
    "compat",
    "size",
    "backing_file",
    "backing_fmt",
    *(one.name for one in OPTIONS if one.name.startswith("encrypt.")),
    "lazy_refcounts",
    "refcount_bits",
    "data_file",
    "data_file_raw",
)
"""The order in which the reference complains."""


async def _refcount_bits(node: Qcow2, bits: int, current: int, version: int) -> None:
    if bits == current:
        return
    if version < 3 and bits != 16:
        raise CommandError(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        )
    await node.set_refcount_bits(bits)


def _same_backing(node: Qcow2, wanted: Mapping[str, str]) -> None:
    """Refuse another backing file or format than the image has: both are to be given as they are."""
    found = {"backing_file": node.backing_file, "backing_fmt": node.backing_format}
    if wanted and any(wanted.get(name) != found[name] for name in found):
        raise CommandError("Cannot amend the backing file", hint="You can use 'qmpd-img rebase' instead.")
