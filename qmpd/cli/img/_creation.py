"""What -o accepts when an image is made, per format, and how its text becomes members of blockdev-create.

Names, order and defaults are those of qemu-img 10.0.2; what the drivers here cannot make is refused by name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpd.cli.image import make_image
from qmpd.cli.img import _opts
from qmpd.cli.img._names import Wish, open_backend, parse_size, protocol_tree
from qmpd.errors import CommandError, QmpdError
from qmpd.qapi import keyval
from qmpd.units import SECTOR, align_up

if TYPE_CHECKING:
    from qmpd.cli.image import Workshop

MAX_SIZE = (1 << 63) - 1


class Option(NamedTuple):
    """One option of -o.

    kind     "str", "size", "num" or "bool"           member   its name in BlockdevCreateOptions
    default  what is shown (and used) when it is not given, None for nothing
    """

    name: str
    kind: str
    help: str
    member: str
    default: str | None = None


SIZE = Option("size", "size", "bytes that the disk shows", "size")
FILE_OPTIONS = (
    Option("nocow", "bool", "no copy-on-write below, where the file system has it (btrfs)", "nocow"),
    Option("preallocation", "str", "space taken at once: off, falloc or full", "preallocation"),
    Option(
        "extent_size_hint", "size", "bytes the file system should reserve at a time, 0 for none", "extent-size-hint"
    ),
)
_LUKS = (
    Option("key-secret", "str", "id of the secret that opens the first key slot", "key-secret"),
    Option("cipher-alg", "str", "cipher, such as aes-256", "cipher-alg"),
    Option("cipher-mode", "str", "mode of the cipher, such as xts", "cipher-mode"),
    Option("ivgen-alg", "str", "how a sector gets its initial value: plain, plain64, essiv", "ivgen-alg"),
    Option("ivgen-hash-alg", "str", "hash for essiv", "ivgen-hash-alg"),
    Option("hash-alg", "str", "hash of the key derivation", "hash-alg"),
    Option("iter-time", "num", "milliseconds that the key derivation takes", "iter-time"),
)
_LUKS_OWN = (
    Option("iterations", "num", "rounds or passes of the key derivation, in place of a time", "iterations"),
    Option("uuid", "str", "identifier of the volume", "uuid"),
    Option("force", "bool", "make also a key slot that the policy has a higher floor for", "force"),
)
FORMATS: Mapping[str, tuple[Option, ...]] = {
    "raw": (SIZE,),
    "file": (SIZE, *FILE_OPTIONS),
    "luks": (
        SIZE,
        *_LUKS,
        Option("detached-header", "bool", "make only a header, for a payload elsewhere", "detached-header"),
        Option("version", "num", "version of LUKS, 1 or 2", "version"),
        *_LUKS_OWN,
        Option("sector-size", "num", "LUKS2: bytes encrypted at a time, 512 to 4096", "sector-size"),
        Option("pbkdf", "str", "LUKS2: key derivation: pbkdf2, argon2i or argon2id", "pbkdf"),
        Option("pbkdf-memory", "num", "LUKS2: KiB that argon2 takes", "pbkdf-memory"),
        Option("pbkdf-parallel", "num", "LUKS2: threads that argon2 takes", "pbkdf-parallel"),
        Option("label", "str", "LUKS2: name of the volume", "label"),
        Option("subsystem", "str", "LUKS2: what the volume belongs to", "subsystem"),
    ),
    "qcow2": (
        Option("encryption", "bool", "encrypt by the old method, same as encrypt.format=aes", "encrypt"),
        Option("encrypt.format", "str", "encrypt the content: luks, or aes, the old method", "encrypt"),
        *(Option(f"encrypt.{one.name}", one.kind, one.help, "encrypt") for one in (*_LUKS, *_LUKS_OWN)),
        Option("cluster_size", "size", "bytes in a cluster", "cluster-size", "65536"),
        Option("extended_l2", "bool", "allocate in parts of clusters", "extended-l2", "off"),
        Option("preallocation", "str", "space taken at once: off, metadata, falloc or full", "preallocation"),
        Option("compression_type", "str", "how clusters are compressed: zlib or zstd", "compression-type", "zlib"),
        SIZE,
        Option("compat", "str", "version of the format: 0.10 (v2) or 1.1 (v3)", "version"),
        Option("backing_file", "str", "image that shows where this one holds nothing", "backing-file"),
        Option("backing_fmt", "str", "its format", "backing-fmt"),
        Option("data_file", "str", "file that the content goes to, apart from the tables", "data-file"),
        Option("data_file_raw", "bool", "keep that file usable as a raw image", "data-file-raw"),
        Option("lazy_refcounts", "bool", "bring reference counts up to date late", "lazy-refcounts", "off"),
        Option("refcount_bits", "num", "bits in a reference count", "refcount-bits", "16"),
    ),
}
VERSIONS = {"0.10": "v2", "1.1": "v3"}


def options_of(shop: Workshop, image_format: str, *, with_file: bool = True) -> tuple[Option, ...]:
    """Return the options that can be given for a format, those of the file below it included.

    Raises CommandError if there is no such format or none can be made.
    """
    known = known_options(shop, image_format)
    made = shop.member_names("BlockdevCreateOptions", "file" if image_format == "raw" else image_format)
    found = [one for one in known if one.member in made or one.member == "detached-header"]
    if with_file:
        names = {one.name for one in found}
        found += [one for one in FILE_OPTIONS if one.name not in names]
    return tuple(found)


def known_options(shop: Workshop, image_format: str) -> tuple[Option, ...]:
    """Return the options that the reference has for a format, built here or not. Raises CommandError."""
    if image_format not in shop.graph.registry.drivers:
        raise CommandError(f"Unknown file format '{image_format}'")
    if image_format not in FORMATS:
        raise CommandError(f"Format driver '{image_format}' does not support image creation")
    return FORMATS[image_format]


def print_help(shop: Workshop, image_format: str, *, with_file: bool) -> None:
    """Print the list that `-o help` asks for."""
    options = options_of(shop, image_format, with_file=with_file)
    print("Supported options:" if with_file else f"Supported {image_format} options:")
    for option in sorted(options, key=lambda one: one.name):
        kind = "bool (on/off)" if option.kind == "bool" else option.kind
        print(f"  {f'{option.name}=<{kind}>':<22} - {option.help}")
    if not with_file:
        print("\nThe file below the format may take further options.\nName a target to see those as well.")


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """An image that is to be made.

    given   what -o said, by name, as text             size     bytes of the disk, None if not said
    """

    shop: Workshop
    filename: str
    image_format: str
    given: dict[str, str] = field(default_factory=dict)
    size: int | None = None
    iterations: int | None = None

    def read(self, texts: Sequence[str]) -> None:
        """Take in the texts of -o. Raises CommandError for what the format does not know or accept."""
        known_options(self.shop, self.image_format)
        known = {one.name: one for one in (*known_options(self.shop, self.image_format), *FILE_OPTIONS)}
        can = {one.name for one in options_of(self.shop, self.image_format)}
        for text in texts:
            for name, value in _opts.parse(text):
                option = known.get(name)
                if option is None:
                    raise CommandError(f"Invalid parameter '{name}'")
                if name not in can:
                    raise CommandError(f"Option '{name}' of format '{self.image_format}' is not supported by qmpd")
                self.given[name] = self._checked(option, value)
        if "size" in self.given:
            if self.size is not None:
                raise CommandError("The image size must be specified only once")
            self.size = int(self.given["size"])

    @staticmethod
    def _checked(option: Option, value: str) -> str:
        if option.kind == "size":
            return str(parse_size(option.name, value))
        if option.kind == "num":
            number = keyval.parse_uint64(value)
            if number is None:
                raise CommandError(f"Parameter '{option.name}' expects a number")
            return str(number)
        if option.kind == "bool" and value not in keyval.BOOLEANS:
            raise CommandError(f"Parameter '{option.name}' expects 'on' or 'off'")
        return value

    @property
    def header_only(self) -> bool:
        """True if a detached header is to be made."""
        return keyval.BOOLEANS.get(self.given.get("detached-header", "off"), False)

    def announcement(self) -> str:
        """Return the line that says what is made."""
        words = [f"Formatting '{self.filename}', fmt={self.image_format}"]
        shown = dict(self.given)
        if self.size is not None:
            shown["size"] = str(self.size)
        options = FORMATS[self.image_format]
        names = {one.name for one in options}
        for option in (*options, *(one for one in FILE_OPTIONS if one.name not in names)):
            value = shown.get(option.name, option.default)
            if value is not None:
                words.append(f"{option.name}={value.replace(',', ',,')}")
        return " ".join(words)

    async def find_backing(self, *, unsafe: bool) -> None:
        """Look at the backing file, as far as one is named: it must open, and may give the size.

        Raises CommandError.
        """
        name = self.given.get("backing_file")
        if name is None:
            return
        if "backing_file" not in {one.name for one in FORMATS[self.image_format]}:
            raise CommandError(f"Backing file not supported for file format '{self.image_format}'")
        if not name:
            raise CommandError("Expected backing file name, got empty string")
        if name == self.filename:
            raise CommandError("Error: Trying to create an image with the same filename as the backing file")
        if unsafe:
            return
        try:
            shown = full_name(self.filename, name)
            backend = await open_backend(self.shop, shown, Wish(image_format=self.given.get("backing_fmt")))
        except (QmpdError, OSError) as error:
            raise CommandError(str(error), hint="Could not open backing image.") from error
        try:
            assert backend.node is not None
            if "backing_fmt" not in self.given:
                raise CommandError(
                    "Backing file specified without backing format",
                    hint=f"Detected format of {backend.node.driver_name}.",
                )
            if self.size is None:
                self.size = backend.size
        finally:
            await backend.remove()

    async def make(self) -> None:
        """Make the image. Raises QmpdError, OSError."""
        members: dict[str, str] = {}
        below: dict[str, str] = {}
        made = self.shop.member_names("BlockdevCreateOptions", self.image_format)
        options = {one.name: one for one in (*FILE_OPTIONS, *FORMATS[self.image_format])}
        for name, value in self.given.items():
            option = options[name]
            if name in ("size", "detached-header"):
                continue
            if name in ("nocow", "extent_size_hint") or self.image_format in ("raw", "file"):
                below[option.member] = value
            elif option.member == "encrypt":
                continue
            elif name == "compat":
                members["version"] = VERSIONS.get(value, value)
            elif option.member in made:
                members[option.member] = value
        members |= encryption_members(self.given)
        tree: dict[str, Any] = _opts.crumple([*members.items()])
        extended = keyval.BOOLEANS.get(members.get("extended-l2", "off"), False)
        if "backing-file" in members and members.get("preallocation", "off") != "off" and not extended:
            raise CommandError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
        await self._make_data_file(tree)
        size = None if self.size is None else str(align_up(self.size, SECTOR))
        await make_image(
            self.shop,
            protocol_tree(self.filename)["filename"],
            self.image_format,
            tree,
            size=size,
            header_only=self.header_only,
            file_options=below,
            iterations=self.iterations,
        )

    async def _make_data_file(self, tree: dict[str, Any]) -> None:
        """Make the external data file of `tree`, empty, unless the image cannot have it. Raises QmpdError, OSError."""
        name = tree.get("data-file")
        raw = keyval.BOOLEANS.get(tree.get("data-file-raw", "off"), False)
        if not isinstance(name, str):
            return
        if raw and "backing-file" in tree:
            raise CommandError("Backing file and data-file-raw cannot be used at the same time")
        if tree.get("version") == "v2":
            raise CommandError(
                "External data files are only supported with compatibility level 1.1 and above"
                " (use version=v3 or greater)"
            )
        place = protocol_tree(name)
        if place["driver"] != "file":
            raise CommandError(f"Protocol driver '{place['driver']}' does not support image creation")
        if os.path.realpath(place["filename"]) == os.path.realpath(protocol_tree(self.filename)["filename"]):
            raise CommandError("Error: Trying to create an image with the same filename as the data file")
        await self.shop.run_creator({"driver": "file", "filename": place["filename"], "size": "0"})
        tree["data-file"] = place


def encryption_members(given: Mapping[str, str]) -> dict[str, str]:
    """Return the options of qcow2 that say how to encrypt, under the names that blockdev-create has for them.

    Raises CommandError.
    """
    members = {name: value for name, value in given.items() if name.startswith("encrypt.")}
    if keyval.BOOLEANS.get(given.get("encryption", "off"), False):
        if "encrypt.format" in members:
            raise CommandError("'encrypt.format' and its alias 'encryption' can't be used at the same time")
        members["encrypt.format"] = "aes"
    if members.get("encrypt.format") == "aes":
        members["encrypt.format"] = "qcow"
    if members and "encrypt.format" not in members:
        raise CommandError("Parameter 'encrypt.format' is missing")
    return members


def full_name(image: str, backing: str) -> str:
    """Return where a backing file named in `image` lies."""
    scheme, colon, _ = backing.partition(":")
    if os.path.isabs(backing) or (colon and scheme and "/" not in scheme):
        return backing
    return os.path.join(os.path.dirname(image.removeprefix("file:")), backing)


async def img_create(request: Request, *, unsafe: bool = False, quiet: bool = False) -> None:
    """Check a request, say what is made, and make it (bdrv_img_create). Raises CommandError."""
    place = protocol_tree(request.filename)
    if "filename" not in place:
        raise CommandError(f"Protocol driver '{place['driver']}' does not support image creation")
    await request.find_backing(unsafe=unsafe)
    if request.size is None and not request.header_only:
        raise CommandError("Image creation needs a size parameter")
    if not quiet:
        print(request.announcement())
        sys.stdout.flush()
    await request.make()
