"""qmpd-img amend: change options of an image that is there.

What can be changed is what a driver offers: for luks the key slots, for qcow2 see `_amend_qcow2`. All else
is refused by name.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qmpd.block.amend import Amendable
from qmpd.cli.image import workshop
from qmpd.cli.img import _opts
from qmpd.cli.img._amend_qcow2 import OPTIONS, amend_qcow2
from qmpd.cli.img._common import add_objects, cache_mode, check_exclusive, common, one_operand, operands, refuse
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError
from qmpd.qapi.visit import validate

if TYPE_CHECKING:
    from qmpd.cli.image import Workshop

LUKS = {
    "backup": ("str", "new file that the header is copied to before it is changed"),
    "iter-time": ("num", "milliseconds that the key derivation takes"),
    "iterations": ("num", "rounds or passes of the key derivation, in place of a time"),
    "keyslot": ("num", "the key slot, where it is not found by a passphrase"),
    "new-secret": ("str", "id of the secret with the new passphrase"),
    "old-secret": ("str", "id of the secret with the passphrase that goes"),
    "pbkdf": ("str", "LUKS2: key derivation: pbkdf2, argon2i or argon2id"),
    "pbkdf-memory": ("num", "LUKS2: KiB that argon2 takes"),
    "pbkdf-parallel": ("num", "LUKS2: threads that argon2 takes"),
    "state": ("str", "active adds a passphrase, inactive erases one, changed does both"),
}
"""Options of luks, their kinds, and what they are: the reference's and ours."""


@subcommand("amend", help="change options of an image")
class Amend:
    """Change options of an image that is there."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "quiet", "progress", "format", "image_opts", "objects")
        parser.add_argument("-t", "--cache", default="writeback", metavar="MODE", help="cache mode")
        parser.add_argument("-o", "--options", action="append", default=[], metavar="OPTS", help="options, or help")
        parser.add_argument("--force", action="store_true", help="also what may lose data")
        operands(parser, "FILENAME", required=1)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Change them."""
        if not args.options:
            refuse("amend", "Must specify options (-o)")
        cache = cache_mode(args.cache)
        async with workshop() as shop:
            if args.format and _opts.asks_help(args.options):
                _help(shop, args.format)
                return 0
            name = one_operand(args, "amend")
            add_objects(shop, args.objects)
            check_exclusive(args)
            wish = Wish(
                image_format=args.format,
                image_opts=args.image_opts,
                writable=True,
                resize=True,
                cache=cache,
                quiet=args.quiet,
            )
            backend = await open_image(shop, name, wish)
            node = backend.node
            assert node is not None
            if _opts.asks_help(args.options):
                _help(shop, node.driver_name)
                return 0
            pairs = [pair for text in args.options for pair in _opts.parse(text)]
            if node.driver_name == "qcow2":
                await amend_qcow2(shop, backend, dict(pairs), force=args.force)
            elif isinstance(node, Amendable):
                await node.amend(_luks_options(shop, dict(pairs)), force=args.force)
            else:
                raise CommandError(f"Format driver '{node.driver_name}' does not support option amendment")
        return 0


def _help(shop: Workshop, image_format: str) -> None:
    if image_format not in shop.graph.registry.drivers:
        raise CommandError(f"Unknown file format '{image_format}'")
    if image_format == "luks":
        print("Amend options for 'luks':")
        for name, (kind, text) in LUKS.items():
            print(f"  {f'{name}=<{kind}>':<22} - {text}")
        return
    if image_format != "qcow2":
        raise CommandError(f"Format driver '{image_format}' does not support option amendment")
    print("Amend options for 'qcow2':")
    for option in OPTIONS:
        kind = "bool (on/off)" if option.kind == "bool" else option.kind
        print(f"  {f'{option.name}=<{kind}>':<22} - {option.help}")


def _luks_options(shop: Workshop, given: dict[str, str]) -> dict[str, Any]:
    """Return LuksAmendOptions as it was written on the command line. Raises QmpdError."""
    for name in given:
        if name not in LUKS:
            raise CommandError(f"Invalid parameter '{name}'")
    members: dict[str, Any] = validate(shop.schema, "LuksAmendOptions", given, keyval=True)
    return members
