"""qmpd-img measure: how much room a new image would take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qmpd.cli.image import workshop
from qmpd.cli.img import _opts
from qmpd.cli.img._common import add_objects, check_exclusive, check_output, common, operands, parse_number, refuse
from qmpd.cli.img._creation import Request, print_help
from qmpd.cli.img._names import Wish, open_image
from qmpd.cli.img._sources import bitmaps_size, show_snapshot
from qmpd.cli.img._text import pretty
from qmpd.cli.subcommand import subcommand
from qmpd.errors import CommandError, QmpdError
from qmpd.qapi.visit import validate
from qmpd.units import SECTOR, align_up

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode
    from qmpd.cli.image import Workshop


CIPHER = ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg")
"""Options of LUKS that decide how long its header is, and those that must go with them."""


@subcommand("measure", help="tell how much room a new image would take")
class Measure:
    """Tell how much room an image would take, new and empty (--size) or converted from FILENAME."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        common(parser, "format", "image_opts", "objects", "share", "output")
        parser.add_argument("-O", "--target-format", default="raw", metavar="FMT", help="format of the new image")
        parser.add_argument("-o", "--options", action="append", default=[], metavar="OPTS", help="its options")
        parser.add_argument("-s", "--size", metavar="SIZE", help="size of the new disk")
        parser.add_argument("-l", "--snapshot", metavar="SNAPSHOT", help="convert from this internal snapshot")
        operands(parser, "FILENAME", required=0)

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Print both sizes."""
        as_json = check_output(args, "measure")
        if len(args.operands) > 1:
            refuse("measure", "At most one filename argument is allowed.")
        size = None if args.size is None else parse_number("image size", args.size)
        if args.operands and size is not None:
            raise CommandError("--size N cannot be used together with a filename.")
        if not args.operands and size is None:
            raise CommandError("Either --size N or one filename must be specified.")
        async with workshop() as shop:
            if _opts.asks_help(args.options):
                print_help(shop, args.target_format, with_file=True)
                return 0
            add_objects(shop, args.objects)
            check_exclusive(args)
            node = None
            if args.operands:
                wish = Wish(image_format=args.format, image_opts=args.image_opts, force_share=args.force_share)
                backend = await open_image(shop, args.operands[0], wish)
                node = backend.node
                if args.snapshot is not None and node is not None:
                    await show_snapshot(node, args.snapshot)
            info = await sizes(shop, args.target_format, args.options, size, node)
        if as_json:
            print(pretty(info))
        else:
            print(f"required size: {info['required']}\nfully allocated size: {info['fully-allocated']}")
            if "bitmaps" in info:
                print(f"bitmaps size: {info['bitmaps']}")
        return 0


async def sizes(
    shop: Workshop, image_format: str, texts: list[str], size: int | None, source: BlockNode | None
) -> dict[str, int]:
    """Return the BlockMeasureInfo of a new image. Raises CommandError."""
    if image_format not in shop.graph.registry.drivers:
        raise CommandError(f"Unknown file format '{image_format}'")
    if image_format not in ("raw", "luks", "qcow2"):
        raise CommandError(f"Block driver '{image_format}' does not support size measurement")
    request = Request(shop, "", image_format)
    try:
        request.read(texts)
    except QmpdError as error:
        hint = f"qmpd-img: Invalid options for file format '{image_format}'"
        raise CommandError(str(error), hint=hint) from error
    size = source.size if source is not None else size or request.size or 0
    if image_format == "qcow2":
        from qmpd.cli.img._space import qcow2_sizes

        required, full = await qcow2_sizes(request.given, size, source)
        header = encryption_length(shop, request.given)
        required, full = required + header, full + header
        info = {"required": required, "fully-allocated": full}
        if source is not None and source.keeps_bitmaps and request.given.get("compat") not in ("0.10", "v2"):
            info["bitmaps"] = bitmaps_size(source, int(request.given.get("cluster_size", "65536")))
        return info
    if image_format == "luks":
        size += luks_header_length(shop, request.given)
    else:
        size = align_up(size, SECTOR)
    return {"required": size, "fully-allocated": size}


def encryption_length(shop: Workshop, given: dict[str, str]) -> int:
    """Return the bytes of the clusters that a LUKS header takes within a qcow2 image. Raises CommandError."""
    if given.get("encrypt.format") != "luks":
        return 0
    members = {name.removeprefix("encrypt."): value for name, value in given.items() if name.startswith("encrypt.")}
    return align_up(luks_header_length(shop, members, "encrypt."), int(given.get("cluster_size", "65536")))


def luks_header_length(shop: Workshop, given: dict[str, str], prefix: str = "") -> int:
    """Return the bytes before the payload of a volume with these options; errors name them with `prefix`.

    Raises CommandError.
    """
    from qmpd.luks.create import Luks1Options, header_length

    if "key-secret" not in given:
        raise CommandError(f"Parameter '{prefix}key-secret' is required for cipher")
    shop.objects.passphrase(given["key-secret"]).wipe()
    cipher = {name: value for name, value in given.items() if name in CIPHER}
    validate(shop.schema, "QCryptoBlockCreateOptionsLUKS", cipher, keyval=True)
    return header_length(
        Luks1Options(
            cipher_alg=given.get("cipher-alg"),
            cipher_mode=given.get("cipher-mode"),
            ivgen_alg=given.get("ivgen-alg"),
            ivgen_hash_alg=given.get("ivgen-hash-alg"),
            hash_alg=given.get("hash-alg"),
        )
    )
