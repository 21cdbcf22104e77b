"""qmpd-img create: make an image."""

from __future__ import annotations

import argparse
from typing import Any

from qmpd.cli.image import create_image
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError

FORMATS = ("raw", "qcow2", "luks")
ALIASES = {"compat": "version", "backing_file": "backing-file", "backing_fmt": "backing-fmt"}
VERSIONS = {"0.10": "v2", "1.1": "v3"}


def parse_pairs(text: str, implied: str = "") -> dict[str, str]:
    """Parse key=value,key=value, a doubled comma standing for one; raises CommandError.

    implied  the key of a first part that has none
    """
    pairs: dict[str, str] = {}
    for part in text.replace(",,", "\0").split(","):
        key, sign, value = part.replace("\0", ",").partition("=")
        if not sign and implied and not pairs:
            key, value = implied, key
        elif not sign or not key:
            raise CommandError(f"'{part}' is not of the form key=value")
        pairs[key] = value
    return pairs


def creation_members(options: dict[str, str]) -> dict[str, Any]:
    """Return options in qemu-img's spelling as members of BlockdevCreateOptions, still as text."""
    members: dict[str, Any] = {}
    for key, value in options.items():
        name = ALIASES.get(key, key.replace("_", "-"))
        if name == "version":
            value = VERSIONS.get(value, value)
        target = members
        *path, last = name.split(".")
        for step in path:
            target = target.setdefault(step, {})
        target[last] = value
    return members


@subcommand("create", help="make an image: raw, qcow2, luks, or a detached luks header")
class Create:
    """Make an image. Options are those of qemu-img; detached-header=true makes a luks header without payload."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("-f", dest="format", choices=FORMATS, default="raw", help="default: %(default)s")
        parser.add_argument("-o", dest="options", action="append", default=[], metavar="KEY=VALUE,...")
        parser.add_argument("--object", dest="objects", action="append", default=[], metavar="TYPE,id=ID,...")
        parser.add_argument("-q", dest="quiet", action="store_true", help="print nothing")
        parser.add_argument("filename")
        parser.add_argument("size", nargs="?", help="of the disk, with a suffix such as G")

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Make it."""
        options: dict[str, str] = {}
        for text in args.options:
            options |= parse_pairs(text)
        size = options.pop("size", args.size)
        detached = options.pop("detached-header", "off") in ("on", "true", "yes", "y")
        if detached and args.format != "luks":
            raise CommandError(f"Format {args.format} has no detached header")
        if size is None and not detached:
            raise CommandError("Image creation needs a size parameter")
        await create_image(
            args.filename,
            args.format,
            creation_members(options),
            size=size,
            header_only=detached,
            objects=[parse_pairs(text, "qom-type") for text in args.objects],
        )
        if not args.quiet:
            print(f"Made '{args.filename}': {args.format}{' header' if detached else f' of {size}'}")
        return 0
