"""qmpd-img amend: change options of an image that is there.

What can be changed is what a driver offers: for qcow2 lazy refcounts and the size, for luks the key
slots. All else is refused by name.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from qmpd.block.amend import Amendable
from qmpd.cli.image import workshop
from qmpd.cli.img import _opts
from qmpd.cli.img._common import add_objects, cache_mode, check_exclusive, common, one_operand, operands, refuse
from qmpd.cli.img._creation import FORMATS
from qmpd.cli.img._names import Wish, open_image, parse_size
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError, QmpdError
from qmpd.qapi.keyval import BOOLEANS
from qmpd.qapi.visit import validate

if TYPE_CHECKING:
    from qmpd.block.backend import BlockBackend
    from qmpd.cli.image import Workshop

QCOW2 = ("lazy_refcounts", "size")
"""Options of qcow2 that can be changed here, of those below."""
REFERENCE = (
    "backing_file", "backing_fmt", "compat", "data_file", "data_file_raw", "encrypt.iter-time", "encrypt.keyslot",
    "encrypt.new-secret", "encrypt.old-secret", "encrypt.state", "lazy_refcounts", "refcount_bits", "size",
)  # fmt: skip
"""Those that the reference can change."""

LUKS = (
    "state", "new-secret", "old-secret", "keyslot", "iter-time", "iterations", "pbkdf", "pbkdf-memory",
    "pbkdf-parallel", "backup",
)  # fmt: skip
"""Options of luks: the reference's, and ours from iterations on."""

_SAME = {"backing_file": "backing_file", "backing_fmt": "backing_format"}


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
            if isinstance(node, Amendable):
                await node.amend(_luks_options(shop, dict(pairs)), force=args.force)
            elif node.driver_name == "qcow2":
                await _amend_qcow2(backend, dict(pairs))
            else:
                raise CommandError(f"Format driver '{node.driver_name}' does not support option amendment")
        return 0


def _help(shop: Workshop, image_format: str) -> None:
    if image_format not in shop.graph.registry.drivers:
        raise CommandError(f"Unknown file format '{image_format}'")
    if image_format != "qcow2":
        raise CommandError(f"Format driver '{image_format}' does not support option amendment")
    print("Amend options for 'qcow2':")
    for option in sorted(FORMATS["qcow2"], key=lambda one: one.name):
        if option.name in QCOW2:
            kind = "bool (on/off)" if option.kind == "bool" else option.kind
            print(f"  {f'{option.name}=<{kind}>':<22} - {option.help}")


def _luks_options(shop: Workshop, given: dict[str, str]) -> dict[str, Any]:
    """Return LuksAmendOptions as it was written on the command line. Raises QmpdError."""
    for name in given:
        if name not in LUKS:
            raise CommandError(f"Invalid parameter '{name}'")
    members: dict[str, Any] = validate(shop.schema, "LuksAmendOptions", given, keyval=True)
    return members


async def _amend_qcow2(backend: BlockBackend, given: dict[str, str]) -> None:
    """Change options of a qcow2 image: all are checked first. Raises CommandError."""
    node = backend.node
    assert node is not None
    for name, value in given.items():
        if name not in REFERENCE:
            known = name in {one.name for one in FORMATS["qcow2"]}
            hint = "This option is only supported for image creation" if known else None
            raise CommandError(f"Invalid parameter '{name}'", hint=hint)
        if name in ("backing_file", "backing_fmt") and value != (getattr(node, _SAME[name]) or ""):
            what = "backing file" if name == "backing_file" else "backing file format"
            raise CommandError(f"Cannot amend the {what}", hint="You can use 'qmpd-img rebase' instead.")
        if name not in (*QCOW2, *_SAME):
            raise CommandError(f"Changing option '{name}' is not supported by qmpd")
        if name == "lazy_refcounts" and value not in BOOLEANS:
            raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")
    try:
        if "size" in given:
            await backend.truncate(parse_size("size", given["size"]))
        if "lazy_refcounts" in given:
            await node.set_lazy_refcounts(BOOLEANS[given["lazy_refcounts"]])  # type: ignore[attr-defined]
    except (QmpdError, OSError) as error:
        text = str(error) if isinstance(error, QmpdError) else os.strerror(error.errno or 0)
        raise CommandError(text) from error
